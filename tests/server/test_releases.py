"""Only the model of a finished job leaves, once, whole, and with what happened to it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from job_parties import JOB, add_roster, carry, model_state, new_home
from safetensors.torch import save_file

from fedcmr_server import releases
from fedcmr_server.commands.release import release as release_command
from fedcmr_server.home import CoordinatorHome
from fedcmr_server.job_control import authorise, submit
from fedcmr_server.job_events import event_text
from fedcmr_server.job_states import JobEvent
from fedcmr_server.release_gates import MemorisationGate
from fedcmr_server.releases import copy_release, of_job, release
from fedcmr_server.store import Events, Jobs, Releases, Store
from fedcmr_server.store.tables import JobRow, RoundRow
from fedcmr_shared.cli import main
from fedcmr_shared.errors import FederationError, ModelError
from fedcmr_shared.models.bundle import Bundle, save_bundle, state_sha256
from fedcmr_shared.models.card import GateResult
from fedcmr_shared.models.refusal import ReleaseRefusal
from fedcmr_shared.models.release import ReleaseBundle
from fedcmr_shared.privacy.job_claim import claim_of
from fedcmr_shared.schemas.job import JobSpec

NOW = datetime(2030, 5, 1, 12, tzinfo=UTC)


@pytest.fixture
def home(tmp_path: Path) -> CoordinatorHome:
    return new_home(tmp_path / "centre")


@pytest.fixture
def store(home: CoordinatorHome) -> Iterator[Store]:
    with home.store() as store:
        add_roster(home, store)
        yield store


@pytest.fixture
def job(home: CoordinatorHome, store: Store) -> str:
    """A submitted job."""
    return submit(home, store, JOB).id


@pytest.fixture
def finished(home: CoordinatorHome, store: Store, job: str) -> str:
    carry(home, store, job)
    return job


class Gate:
    """A gate with a fixed result."""

    def __init__(self, *, passes: bool, text: str = "0.3 of 1 allowed") -> None:
        self._passes = passes
        self._text = text

    def check(
        self, job: JobSpec, bundle: Bundle, events: Sequence[Mapping[str, Any]]
    ) -> GateResult:
        assert bundle.spec == job.model
        assert events[0]["event"] == "submit"
        return GateResult(gate="memorisation", passed=self._passes, text=self._text)


class TestRelease:
    def test_a_released_model_tells_where_it_comes_from(
        self, home: CoordinatorHome, store: Store, finished: str
    ) -> None:
        row = release(home, store, finished, now=NOW)
        path = home.releases / row.path
        assert row.path == f"heart-{finished[:12]}.zip"
        found = ReleaseBundle.verify(path, home.identity().public_key)
        assert (found.sha256, found.size) == (row.sha256, row.size)
        card = found.card
        assert card.model_dump_json() == row.card
        assert (card.federation, card.job) == ("hearts", JOB)
        assert card.federation_sha256 == home.federation_sha256
        assert card.privacy == claim_of(JOB)
        assert card.lineage.start.model_sha256 == state_sha256(model_state(0))
        assert card.lineage.start.origin == "seed"
        assert [(one.number, one.sites, one.closed) for one in card.lineage.rounds] == [
            (1, 4, False),
            (2, 4, False),
        ]
        assert card.lineage.roster_sha256 == Jobs(store).get(finished).roster_sha256
        assert [found.means for found in card.evaluation] == [{"psnr": 21.0}, {"psnr": 22.0}]
        assert {"fedcmr", "torch", "flwr", "opacus", "python"} <= set(card.software)
        assert found.bundle.sha256 == state_sha256(model_state(2))
        assert of_job(store, finished) == Releases(store).all()[0]
        assert Events(store).of(finished)[-1].name == "release"

    def test_closed_rounds_and_the_start_show(
        self, home: CoordinatorHome, store: Store, tmp_path: Path
    ) -> None:
        save_bundle(tmp_path / "b", model_state(5), JOB.model, {"origin": "simulated"})
        job = submit(home, store, JOB, start_from=tmp_path / "b").id
        carry(home, store, job, closed=(1,))
        card = ReleaseBundle.read(home.releases / release(home, store, job).path).card
        assert card.lineage.start.origin == "bundle"
        assert card.lineage.start.notes == {"origin": "simulated"}
        assert card.lineage.rounds[0].closed
        assert card.lineage.rounds[0].model_sha256 == state_sha256(model_state(5))
        assert [found.round for found in card.evaluation] == [2]

    @pytest.mark.parametrize("told", [None, 1.5])
    def test_the_energy_of_all_sites_is_in_the_card_where_they_told_it(
        self, told: float | None, home: CoordinatorHome, store: Store
    ) -> None:
        assert JOB.privacy is not None
        asked = JOB.privacy.evaluation.model_copy(update={"energy_total": True})
        privacy = JOB.privacy.model_copy(update={"evaluation": asked})
        job = submit(home, store, JOB.model_copy(update={"privacy": privacy})).id
        carry(home, store, job)
        if told is not None:
            scores = {"round": 2, "sites": 4, "psnr": 22.0, "energy_kwh": told}
            Events(store).record(job, "evaluation", scores)
        row = release(home, store, job)
        assert ReleaseBundle.read(home.releases / row.path).card.energy_kwh == told

    def test_only_the_moment_differs(
        self, home: CoordinatorHome, store: Store, finished: str
    ) -> None:
        row = release(home, store, finished, now=NOW)
        first = ReleaseBundle.read(home.releases / row.path)
        _forget(store, home)
        again = release(home, store, finished, now=NOW)
        assert again.sha256 == row.sha256
        _forget(store, home)
        later = release(home, store, finished, now=NOW + timedelta(days=1))
        second = ReleaseBundle.read(home.releases / later.path)
        assert second.card == first.card.model_copy(update={"created_at": second.card.created_at})

    @pytest.mark.parametrize(
        ("events", "state"),
        [
            ((), "submitted: wait"),
            (("start",), "running: wait"),
            (("start", "pause"), "pausing: let it resume"),
            (("pause",), "paused: let it resume"),
            (("fail",), "failed: no model of a failed job"),
            (("cancel",), "cancelled: no model of a cancelled job"),
        ],
    )
    def test_only_a_finished_job_is_released(
        self,
        events: tuple[JobEvent, ...],
        state: str,
        home: CoordinatorHome,
        store: Store,
        job: str,
    ) -> None:
        for event in events:
            Jobs(store).change(job, event, run="1" if event == "start" else None)
        with pytest.raises(FederationError, match=f"is {state}"):
            release(home, store, job)
        assert _nothing_left(home, store)

    def test_a_job_is_released_once(
        self, home: CoordinatorHome, store: Store, finished: str
    ) -> None:
        path = home.releases / release(home, store, finished).path
        before = path.read_bytes()
        with pytest.raises(FederationError, match="was released before, as heart-"):
            release(home, store, finished)
        assert path.read_bytes() == before


class TestGates:
    def test_a_gate_that_passes_is_in_the_card(
        self, home: CoordinatorHome, store: Store, finished: str
    ) -> None:
        gates = {"cardiomm": (Gate(passes=True),)}
        row = release(home, store, finished, gates=gates)
        assert json.loads(row.card)["gates"] == [
            {"gate": "memorisation", "passed": True, "text": "0.3 of 1 allowed"}
        ]

    def test_a_gate_that_refuses_keeps_the_model_here(
        self, home: CoordinatorHome, store: Store, finished: str
    ) -> None:
        gates = {"cardiomm": (Gate(passes=True), Gate(passes=False))}
        with pytest.raises(FederationError, match="gate memorisation refuses: 0"):
            release(home, store, finished, gates=gates)
        assert _nothing_left(home, store)
        event = Events(store).of(finished)[-1]
        assert (event.name, event.content["gate"]) == ("release_refused", "memorisation")
        line = event_text(event.name, event.content)
        assert line == "not released: memorisation: 0.3 of 1 allowed"

    def test_a_refusal_is_signed_with_the_coordinators_identity(
        self, home: CoordinatorHome, store: Store, finished: str
    ) -> None:
        with pytest.raises(FederationError, match="refuses"):
            release(home, store, finished, gates={"cardiomm": (Gate(passes=False),)}, now=NOW)
        (refusal,) = _refusals(store, finished)
        refusal.verify((home.federation_sha256, home.identity().public_key))
        assert (refusal.federation, refusal.refused_at) == ("hearts", NOW)
        assert refusal.job_sha256 == JOB.sha256
        assert refusal.model_sha256 == state_sha256(model_state(2))
        assert refusal.gate == GateResult(
            gate="memorisation", passed=False, text="0.3 of 1 allowed"
        )

    def test_the_same_refusal_is_recorded_once(
        self, home: CoordinatorHome, store: Store, finished: str
    ) -> None:
        def refuse(text: str) -> None:
            with pytest.raises(FederationError, match=text):
                release(home, store, finished, gates={"cardiomm": (Gate(passes=False, text=text),)})

        old = GateResult(gate="memorisation", passed=False, text="no sum")
        # A version that did not sign: this one is said again, with a signature.
        Events(store).record(finished, "release_refused", old.model_dump())
        for text in ("no sum", "no sum", "1 of 3 sites", "no sum"):
            refuse(text)
        assert [each.gate.text for each in _refusals(store, finished)] == ["no sum", "1 of 3 sites"]
        # Other weights: another refusal.
        path = home.jobs / finished / "round-002.safetensors"
        save_bundle(path, model_state(3), JOB.model, {"round": "2"})
        refuse("no sum")
        models = [each.model_sha256 for each in _refusals(store, finished)]
        assert models == [*[state_sha256(model_state(2))] * 2, state_sha256(model_state(3))]

    @pytest.mark.parametrize(
        ("told", "reason"),
        [
            ({"closed": True}, "not opened after the last round"),
            ({"gates_passed": 3}, "passed at 3 of 4 sites"),
            ({"gates_passed": 4, "model_sha256": "0" * 64}, "about other weights"),
            ({"gates_passed": 4, "round": 1}, "not opened after the last round"),
        ],
    )
    def test_what_sites_say_about_these_weights_decides(
        self,
        told: dict[str, Any],
        reason: str,
        home: CoordinatorHome,
        store: Store,
        finished: str,
    ) -> None:
        gates = {"cardiomm": (MemorisationGate(),)}
        about = {"round": 2, "sites": 4, "model_sha256": state_sha256(model_state(2))}
        Events(store).record(finished, "evaluation", {**about, **told})
        with pytest.raises(FederationError, match=f"memorisation refuses: .*{reason}"):
            release(home, store, finished, gates=gates)
        assert _nothing_left(home, store)
        # Control: with all sites' word about these weights it leaves.
        Events(store).record(finished, "evaluation", {**about, "gates_passed": 4})
        card = json.loads(release(home, store, finished, gates=gates).card)
        assert [each["passed"] for each in card["gates"]] == [True]

    def test_a_model_without_known_gates_stays(
        self, home: CoordinatorHome, store: Store, finished: str
    ) -> None:
        with pytest.raises(FederationError, match="no release gates are known for cardiomm"):
            release(home, store, finished, gates={})
        assert _nothing_left(home, store)


class TestDamage:
    def test_other_weights_than_were_committed(
        self, home: CoordinatorHome, store: Store, finished: str
    ) -> None:
        path = home.jobs / finished / "round-002.safetensors"
        save_bundle(path, model_state(3), JOB.model, {"round": "2"})
        with pytest.raises(ModelError, match="and the lineage ends with"):
            release(home, store, finished)
        assert _nothing_left(home, store)

    def test_no_weights(self, home: CoordinatorHome, store: Store, finished: str) -> None:
        path = home.jobs / finished / "round-002.safetensors"
        save_file({}, path)
        with pytest.raises(ModelError, match="not a model bundle"):
            release(home, store, finished)
        path.unlink()
        with pytest.raises(ModelError, match="does not exist"):
            release(home, store, finished)
        assert _nothing_left(home, store)

    def test_rounds_that_do_not_fit_the_job(
        self, home: CoordinatorHome, store: Store, finished: str
    ) -> None:
        with store.writing() as session:
            row = session.get(RoundRow, (finished, 1))
            assert row is not None
            row.state = "closed"
        with pytest.raises(FederationError, match="round 1 is closed, yet the model changed"):
            release(home, store, finished)
        with store.writing() as session:
            session.delete(session.get(RoundRow, (finished, 1)))
        with pytest.raises(FederationError, match="rounds: they must be numbered"):
            release(home, store, finished)
        with store.writing() as session:
            for number in (0, 2):
                session.delete(session.get(RoundRow, (finished, number)))
        with pytest.raises(FederationError, match="has no rounds"):
            release(home, store, finished)
        assert _nothing_left(home, store)

    def test_a_job_that_another_federation_signed(
        self, home: CoordinatorHome, store: Store, finished: str, tmp_path: Path
    ) -> None:
        foreign = authorise(new_home(tmp_path / "foreign"), JOB, 90)
        with store.writing() as session:
            row = session.get(JobRow, finished)
            assert row is not None
            row.authorisation = foreign.model_dump_json()
        with pytest.raises(FederationError, match="authorisation: it is of another federation"):
            release(home, store, finished)
        assert _nothing_left(home, store)

    def test_a_job_that_nobody_signed(
        self, home: CoordinatorHome, store: Store, finished: str
    ) -> None:
        with store.writing() as session:
            row = session.get(JobRow, finished)
            assert row is not None
            row.authorisation = None
        with pytest.raises(FederationError, match="never signed"):
            release(home, store, finished)


class TestCrash:
    @pytest.mark.parametrize("place", ["write_archive", "verify", "link", "row"])
    def test_killed_anywhere_the_next_one_releases(
        self,
        place: str,
        home: CoordinatorHome,
        store: Store,
        finished: str,
    ) -> None:
        child = os.fork()
        if child == 0:
            try:
                _die_in(place)
                with home.store() as own:
                    release(home, own, finished)
            finally:
                os._exit(99)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        # Members are offered nothing, and what lies under the final name is whole.
        assert Releases(store).all() == []
        for path in home.releases.glob("*.zip"):
            assert ReleaseBundle.verify(path, home.identity().public_key)
        row = release(home, store, finished)
        assert ReleaseBundle.read(home.releases / row.path).sha256 == row.sha256
        assert len(Releases(store).all()) == 1
        assert [path.name for path in home.releases.iterdir()] == [row.path]


class TestCopies:
    def test_a_copy_is_whole_and_new(
        self, home: CoordinatorHome, store: Store, finished: str, tmp_path: Path
    ) -> None:
        row = release(home, store, finished)
        copy_release(home, row, tmp_path / "heart.zip")
        assert ReleaseBundle.read(tmp_path / "heart.zip").sha256 == row.sha256
        with pytest.raises(FederationError, match="exists: choose another name"):
            copy_release(home, row, tmp_path / "heart.zip")
        with pytest.raises(FederationError, match="No such file"):
            copy_release(home, row, tmp_path / "none" / "heart.zip")
        (home.releases / row.path).write_bytes(b"PK")
        with pytest.raises(FederationError, match="is damaged: restore it"):
            copy_release(home, row, tmp_path / "second.zip")
        assert [path.name for path in tmp_path.glob("*.zip*")] == ["heart.zip"]


class TestCommand:
    def run(
        self, capsys: pytest.CaptureFixture[str], *arguments: object
    ) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["models", *map(str, arguments)])
        output = capsys.readouterr()
        return stopped.value.code, output.out, output.err

    def test_release_verify_and_show(
        self,
        home: CoordinatorHome,
        store: Store,
        finished: str,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("FEDCMR_COORDINATOR", str(home.folder))
        code, out, _ = self.run(capsys, "release", "heart", "--json")
        assert code == 0
        released = json.loads(out)
        key = home.identity().public_key
        assert released["signed_by"] == key
        code, out, _ = self.run(capsys, "verify", released["path"], "--trust", key, "--json")
        assert code == 0
        assert json.loads(out)["sha256"] == released["sha256"]
        # A second call copies what was released.
        copy = tmp_path / "copy.zip"
        code, out, _ = self.run(capsys, "release", finished[:8], "--out", copy)
        assert code == 0
        assert str(copy) in out
        assert self.run(capsys, "verify", copy, "--trust", key)[0] == 0
        code, out, _ = self.run(capsys, "show", copy)
        assert "# heart" in out
        code, _, err = self.run(capsys, "release", "heart")
        assert code == 1
        assert "was released before" in err

    def test_refusals_are_one_line(
        self, home: CoordinatorHome, job: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for arguments, message in (
            ((job[:8], "--coordinator", home.folder), "is submitted: wait until it has finished"),
            (("lung", "--coordinator", home.folder), "no job lung is known"),
            (("heart", "--coordinator", home.folder / "none"), "is no coordinator's folder"),
        ):
            code, _, err = self.run(capsys, "release", *arguments)
            assert (code, err.count("\n")) == (1, 1)
            assert message in err
        assert release_command.help


def _refusals(store: Store, job: str) -> list[ReleaseRefusal]:
    """The signed refusals of a job, the first first."""
    return [
        ReleaseRefusal.model_validate(event.content["refusal"])
        for event in Events(store).of(job)
        if event.name == "release_refused" and "refusal" in event.content
    ]


def _nothing_left(home: CoordinatorHome, store: Store) -> bool:
    return list(home.releases.iterdir()) == [] == Releases(store).all()


def _forget(store: Store, home: CoordinatorHome) -> None:
    """Undo the release, as if the machine had been restored from an earlier backup."""
    with store.writing() as session:
        for row in Releases(store).all():
            session.delete(session.merge(row))
    for path in home.releases.iterdir():
        path.unlink()


def _die_in(place: str) -> None:
    """Have this process be killed when a release gets to ``place``."""

    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    from fedcmr_shared.models import release as release_module

    if place == "write_archive":
        original = release_module.write_archive

        def half(file: object, contents: object) -> None:
            original(file, contents)  # type: ignore[arg-type]
            file.flush()  # type: ignore[attr-defined]
            die()

        release_module.write_archive = half  # type: ignore[assignment]
    elif place == "verify":
        ReleaseBundle.verify = die  # type: ignore[method-assign,assignment]
    elif place == "link":
        os.link = die  # type: ignore[assignment]
    else:
        releases._add_row = die  # type: ignore[assignment]
