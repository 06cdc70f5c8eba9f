"""Sites that die in a simulated run: how they are named, and what is left of them."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hospitals import SECURE, Hospital, write_roster
from hypothesis import given
from hypothesis import strategies as st

from fedcmr_client.site_home import SiteHome
from fedcmr_shared.cli import main
from fedcmr_shared.errors import ConfigurationError, FederationError
from fedcmr_shared.federation.secure_messages import KeysQuestion, pack_record, read_record
from fedcmr_shared.schemas.job import JobSpec, ModelSpec
from fedcmr_shared.schemas.ledger import Phase
from fedcmr_shared.schemas.privacy import PrivacySpec
from fedcmr_shared.secagg.messages import STEPS, Keys, Step
from fedcmr_shared.secagg.session import Session
from fedcmr_simulations import drops as drops_module
from fedcmr_simulations.drops import Drop, SiteDied, dropping

JOB = JobSpec(
    name="dropping",
    model=ModelSpec(text_encoder="hashed"),
    privacy=PrivacySpec(noise_multiplier=8.0),
)


class TestParsing:
    @given(
        site=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
        number=st.integers(1, 10_000),
        step=st.sampled_from(STEPS),
    )
    def test_site_round_and_step(self, site: str, number: int, step: Step) -> None:
        assert Drop.parse(f"{site}:{number}:{step}") == Drop(site, number, step)
        assert Drop.parse(f"{site}:{number}") == Drop(site, number, "update")

    @pytest.mark.parametrize(
        "text",
        [
            *("", "cedar", "cedar:", "cedar:two", "cedar:0", "cedar:-1", "cedar:1.5", ":2"),
            *("cedar:2:", ":2:update", "cedar::update", "cedar:٢", "cedar:" + "9" * 5000),
            "cedar: 2",
        ],
    )
    def test_anything_else_names_the_form(self, text: str) -> None:
        with pytest.raises(ConfigurationError, match=r"--drop .*write SITE:ROUND or"):
            Drop.parse(text)

    @pytest.mark.parametrize("step", ["train", "Update", "update:2", "update ", "opened"])
    def test_an_unknown_step_names_the_known_ones(self, step: str) -> None:
        with pytest.raises(ConfigurationError) as error:
            Drop.parse(f"cedar:2:{step}")
        assert str(error.value) == f"--drop cedar:2:{step}: the steps are {', '.join(STEPS)}"


class TestCommand:
    def run(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
        """Run a simulation that must be refused, and return what it says."""
        with pytest.raises(SystemExit) as stop:
            main(["simulate", "run", *arguments])
        assert stop.value.code == 1
        return capsys.readouterr().err

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--drop", "oak:2"), "--drop oak:2: the sites are alder, birch, cedar, dogwood"),
            (("--drop", "cedar:4"), "--drop cedar:4: the sites are"),
            (("--drop", "cedar:4"), "the rounds 1 to 3"),
            (("--drop", "cedar:2", "--rounds", "1"), "the rounds 1 to 1"),
            (("--drop", "dogwood:1", "--sites", "3"), "the sites are alder, birch, cedar, the"),
            (("--drop", "cedar:2:never"), "--drop cedar:2:never: the steps are keys"),
            (("--drop", "cedar"), "--drop cedar: write SITE:ROUND"),
            (("--drop", "cedar:2", "--no-privacy"), "which this run does not use"),
            (("--drop", "cedar:2", "--drop", "elm:1"), "--drop elm:1"),
        ],
    )
    def test_a_drop_that_cannot_be_is_refused_before_anything_is_written(
        self,
        options: tuple[str, ...],
        message: str,
        capsys: pytest.CaptureFixture[str],
        tmp_path: Path,
    ) -> None:
        out = tmp_path / "run"
        errors = self.run(capsys, "--out", str(out), *options)
        assert message in " ".join(errors.split())
        assert not out.exists()

    def test_a_job_in_the_open_has_no_step_to_die_in(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        config, out = tmp_path / "config.yaml", tmp_path / "run"
        job = JOB.model_copy(update={"aggregation": "plain_with_local_dp"})
        config.write_text(f'{{"job": {job.model_dump_json()}}}')
        options = ("--config", str(config), "--out", str(out), "--drop", "cedar:2")
        errors = self.run(capsys, *options)
        assert "--drop kills a site in a step of secure aggregation" in errors
        assert "aggregation secure_sum" in errors
        assert not out.exists()


@pytest.fixture(autouse=True)
def flower_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give this process the identity without which Flower makes no message."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def site(
    make_home: Callable[..., SiteHome], make_site: Callable[..., Path], tmp_path: Path
) -> Hospital:
    """A site that can answer a question for keys."""
    roster = tmp_path / "roster.yaml"
    home = make_home(make_site("cedar", 1), roster=roster, **SECURE)
    own = {"cedar": home.identity().public_key}
    write_roster(roster, {"alder": "a" * 64, "birch": "b" * 64, **own})
    return Hospital(home)


def message(step: Step = "keys", phase: Phase = "train", number: int = 2) -> Message:
    session = Session(job=JOB.sha256, phase=phase, round=number, attempt=1)
    content = pack_record(KeysQuestion(session=session, job=JOB))
    return Message(content, dst_node_id=2, message_type=f"{phase}.{step}")


def context() -> Context:
    return Context(1, 2, {"partition-id": 0}, RecordDict(), {})


class Answering:
    """Stands in for the site's app, and counts what gets through to it."""

    def __init__(self) -> None:
        self.asked: list[Message] = []

    def __call__(self, asked: Message, _context: Context) -> Message:
        self.asked.append(asked)
        return Message(RecordDict({"answer": ConfigRecord({})}), reply_to=asked)


def test_the_site_dies_after_its_work_and_once_only(site: Hospital) -> None:
    mod, app = dropping([Drop("cedar", 2, "keys")], [site.home.path]), Answering()
    question = message()
    with pytest.raises(SiteDied, match="cedar was killed in step keys"):
        mod(question, context(), app)
    assert app.asked == []
    # The work was done and lies on its disk; the site is back with it.
    folder = site.home.sessions().folder
    assert {path.suffix for path in folder.iterdir()} == {".key", ".session", ".lock"}
    kept = site.home.sessions().load(read_record(question.content, KeysQuestion).session)
    assert kept is not None
    assert kept.state.peers["cedar"] == read_record(site.reply("keys", question.content), Keys)
    for _ in range(2):
        mod(question, context(), app)
    assert len(app.asked) == 2


@pytest.mark.parametrize(
    "other",
    [{"step": "shares"}, {"phase": "evaluate"}, {"number": 1}, {"number": 3}, {"step": "update"}],
)
def test_other_questions_get_through(
    other: dict[str, Any], site: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    def died(*_: object) -> None:
        raise AssertionError("the site was killed")

    monkeypatch.setattr(drops_module, "_work_and_die", died)
    app = Answering()
    drops = [Drop("cedar", 2, "keys"), Drop("alder", 1, "keys"), Drop("alder", 3, "keys")]
    mod = dropping(drops, [site.home.path])
    before = set(site.home.path.parent.iterdir())
    mod(message(**other), context(), app)
    assert len(app.asked) == 1
    assert set(site.home.path.parent.iterdir()) == before
    # Positive control: the right one does not.
    with pytest.raises(AssertionError, match="was killed"):
        mod(message(), context(), app)


def test_a_site_that_fails_before_its_death_says_so(
    site: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failed(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "no roster")

    monkeypatch.setattr(subprocess, "run", failed)
    mod = dropping([Drop("cedar", 2, "keys")], [site.home.path])
    with pytest.raises(FederationError, match="did not get so far: no roster"):
        mod(message(), context(), Answering())
