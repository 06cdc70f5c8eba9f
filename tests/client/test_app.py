"""What a site answers to Flower, and what it does not say."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from joined_site import join, make_task

from fedcmr_client import app as app_module
from fedcmr_client.agent import SiteAgent
from fedcmr_client.app import SiteWork, create_client_app
from fedcmr_client.site_home import SiteHome
from fedcmr_shared.errors import ConfigurationError, DataError, JobRefused, LedgerError
from fedcmr_shared.federation.messages import Refusal, Scores, Task, Update, unpack_answer
from fedcmr_shared.schemas.refusals import RefusalCode
from fedcmr_shared.secagg.faults import ProtocolError
from fedcmr_shared.secagg.messages import STEPS, Step


@pytest.fixture(autouse=True)
def flower_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give this process the identity without which Flower makes no message."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def reply(site: SiteWork, action: str, content: RecordDict) -> RecordDict:
    context = Context(1, 2, {}, RecordDict(), {})
    message = Message(content, dst_node_id=2, message_type=action)
    answer = create_client_app(lambda _: site)(message, context)
    assert not answer.has_error()
    return answer.content


def test_update_and_scores_travel(make_home: Callable[..., SiteHome]) -> None:
    site = SiteAgent(make_home(), threads=1)
    assert isinstance(unpack_answer(reply(site, "train", make_task().pack())), Update)
    assert isinstance(unpack_answer(reply(site, "evaluate", make_task().pack())), Scores)


def test_a_private_update_carries_nothing_but_noised_arrays(
    make_home: Callable[..., SiteHome],
) -> None:
    content = reply(SiteAgent(make_home()), "train", make_task().pack())
    assert set(content) == {"header", "arrays", "metrics"}
    assert set(content.config_records["header"]) == {"answer", "site", "round", "model-sha256"}
    assert dict(content.metric_records["metrics"]) == {}


class Broken:
    """A site whose work fails with a text that must not leave."""

    name = "north"
    threads = 1
    reply_tick_s = 0.01

    def __init__(self, error: Exception) -> None:
        self.error = error

    def train(self, task: Task) -> Update:
        raise self.error

    def evaluate(self, task: Task) -> Scores:
        raise self.error

    def secure_answer(self, step: Step, content: RecordDict) -> RecordDict:
        raise self.error


SECRET = "patient Smith of ward 3"


SECURE_ACTIONS = [f"{phase}.{step}" for phase in ("train", "evaluate") for step in STEPS]


@pytest.mark.parametrize("action", ["train", "evaluate", *SECURE_ACTIONS])
@pytest.mark.parametrize("error", [DataError(SECRET), RuntimeError(SECRET), KeyError(SECRET)])
def test_the_text_of_an_error_stays_at_the_site(
    error: Exception, action: str, caplog: pytest.LogCaptureFixture
) -> None:
    content = reply(Broken(error), action, make_task().pack())
    assert unpack_answer(content) == Refusal("north", "failed")
    assert SECRET not in str(content)
    assert SECRET in caplog.text


def test_without_this_handler_flower_would_send_the_text() -> None:
    """Positive control: an app that lets an error pass hands it to Flower with its text."""
    from flwr.clientapp import ClientApp

    unguarded = ClientApp()

    @unguarded.train()
    def train(message: Message, context: Context) -> Message:
        raise RuntimeError(SECRET)

    message = Message(make_task().pack(), dst_node_id=2, message_type="train")
    with pytest.raises(RuntimeError, match=SECRET):
        unguarded(message, Context(1, 2, {}, RecordDict(), {}))


@pytest.mark.parametrize("action", SECURE_ACTIONS)
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ProtocolError("survivors", SECRET), "protocol"),
        (ProtocolError("malformed", SECRET), "protocol"),
        (JobRefused("minimum-sites", "minimum_sites", SECRET), "minimum-sites"),
        (JobRefused("declined", "cohort", SECRET), "declined"),
        (LedgerError(SECRET), "failed"),
    ],
)
def test_only_public_codes_leave_the_steps_of_a_secure_sum(
    error: Exception, code: RefusalCode, action: str, caplog: pytest.LogCaptureFixture
) -> None:
    content = reply(Broken(error), action, RecordDict())
    assert unpack_answer(content) == Refusal("north", code)
    assert set(content) == {"header"}
    assert SECRET not in str(content)
    assert SECRET in caplog.text


class Recording(Broken):
    """A site that notes the steps that it is asked for."""

    def __init__(self) -> None:
        super().__init__(AssertionError("a secure step is no task"))
        self.steps: list[tuple[Step, RecordDict]] = []

    def secure_answer(self, step: Step, content: RecordDict) -> RecordDict:
        self.steps.append((step, content))
        return RecordDict({"own": ConfigRecord({"step": step})})


def test_every_step_of_both_phases_is_an_action_of_its_own() -> None:
    assert len(SECURE_ACTIONS) == 10
    site = Recording()
    for action in SECURE_ACTIONS:
        asked = RecordDict({"question": ConfigRecord({"action": action})})
        answer = reply(site, action, asked)
        assert answer.config_records["own"]["step"] == action.partition(".")[2]
        assert site.steps[-1][1] == asked
    assert [step for step, _ in site.steps] == [*STEPS, *STEPS]
    # Positive control: what is no step is nothing that a site does.
    with pytest.raises(ValueError, match="'open'"):
        reply(site, "train.open", RecordDict())


@pytest.mark.parametrize("site", [Recording(), Broken(ProtocolError("order", SECRET))])
def test_of_the_steps_only_the_update_waits_for_the_tick(
    site: Broken, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[tuple[str, float]] = []
    for action in SECURE_ACTIONS:
        monkeypatch.setattr(
            app_module, "hold_until_tick", lambda tick, asked=action: held.append((asked, tick))
        )
        reply(site, action, RecordDict())
    assert held == [("train.update", 0.01), ("evaluate.update", 0.01)]


def test_a_real_site_refuses_what_it_cannot_read_by_code(
    make_home: Callable[..., SiteHome],
) -> None:
    site = SiteAgent(make_home(), threads=1)
    for action in SECURE_ACTIONS:
        content = reply(site, action, make_task().pack())
        assert unpack_answer(content) == Refusal("north", "protocol")


def test_a_malformed_message_is_refused_by_code() -> None:
    content = make_task().pack()
    del content["arrays"]
    site = Broken(RuntimeError("not reached"))
    assert unpack_answer(reply(site, "train", content)) == Refusal("north", "malformed")


def test_replies_leave_at_ticks() -> None:
    site = Broken(RuntimeError("fails at once"))
    site.reply_tick_s = 0.5
    task = make_task().pack()
    for _ in range(3):
        reply(site, "train", task)
        assert time.time() % 0.5 < 0.2


def test_deployed_site_names_the_missing_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedcmr_client.app import app

    monkeypatch.delenv("FEDCMR_POLICY", raising=False)
    message = Message(make_task().pack(), dst_node_id=2, message_type="train")
    with pytest.raises(ConfigurationError, match="FEDCMR_POLICY"):
        app(message, Context(1, 2, {}, RecordDict(), {}))


def test_deployed_site_reads_its_policy_and_works_for_its_coordinator_alone(
    monkeypatch: pytest.MonkeyPatch, make_home: Callable[..., SiteHome], tmp_path: Path
) -> None:
    from fedcmr_client.app import app

    home = make_home()
    monkeypatch.setenv("FEDCMR_POLICY", str(home.path))

    def answer(task: Task) -> object:
        message = Message(task.pack(), dst_node_id=2, message_type="train")
        return unpack_answer(app(message, Context(1, 2, {}, RecordDict(), {})).content)

    with pytest.raises(ConfigurationError, match="not joined"):
        answer(make_task())
    signed = join(home, tmp_path)
    assert answer(make_task()) == Refusal(home.policy.site, "signature")
    assert isinstance(answer(replace(make_task(), authorisation=signed)), Update)
