"""What a site answers to Flower, and what it does not say."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedcmr_client.agent import SiteAgent
from fedcmr_client.app import SiteWork, create_client_app
from fedcmr_client.site_home import SiteHome
from fedcmr_shared.errors import ConfigurationError, DataError
from fedcmr_shared.federation.messages import Refusal, Scores, Task, Update, unpack_answer
from fedcmr_shared.models.registry import build_model
from fedcmr_shared.schemas.job import JobSpec, ModelSpec, SamplingSpec, TrainingSpec
from fedcmr_shared.schemas.privacy import PrivacySpec

JOB = JobSpec(
    rounds=1,
    model=ModelSpec(text_encoder="hashed"),
    sampling=SamplingSpec(acs_lines=8),
    training=TrainingSpec(local_steps=1, part="adapters"),
    aggregation="plain_with_local_dp",
    privacy=PrivacySpec(cohort_size=10, noise_multiplier=3.0),
)


@pytest.fixture(autouse=True)
def flower_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give this process the identity without which Flower makes no message."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def make_task(job: JobSpec = JOB) -> Task:
    torch.manual_seed(job.seed)
    return Task(job, 1, build_model(job.model).state_dict())


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


SECRET = "patient Smith of ward 3"


@pytest.mark.parametrize("action", ["train", "evaluate"])
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


def test_deployed_site_reads_its_policy(
    monkeypatch: pytest.MonkeyPatch, make_home: Callable[..., SiteHome], tmp_path: Path
) -> None:
    from fedcmr_client.app import app

    monkeypatch.setenv("FEDCMR_POLICY", str(make_home().path))
    message = Message(make_task().pack(), dst_node_id=2, message_type="train")
    answer = app(message, Context(1, 2, {}, RecordDict(), {}))
    assert isinstance(unpack_answer(answer.content), Update)
