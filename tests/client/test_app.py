"""What a site answers, and what it does not say."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedcmr_client.app import Site, create_client_app, evaluate_round, train_round
from fedcmr_client.store.split import SplitFractions
from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.federation.messages import Refusal, Scores, Task, Update, unpack_answer
from fedcmr_shared.models.bundle import state_sha256
from fedcmr_shared.models.registry import build_model
from fedcmr_shared.schemas.job import JobSpec, ModelSpec, SamplingSpec, TrainingSpec

JOB = JobSpec(
    model=ModelSpec(text_encoder="hashed"),
    sampling=SamplingSpec(acs_lines=8),
    training=TrainingSpec(local_steps=2),
)


@pytest.fixture(autouse=True)
def flower_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give this process the identity without which Flower makes no message."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def make_task(job: JobSpec = JOB) -> Task:
    torch.manual_seed(job.seed)
    return Task(job, 1, build_model(job.model).state_dict())


def ask(site: Site, action: str, content: RecordDict) -> Update | Scores | Refusal:
    context = Context(1, 2, {}, RecordDict(), {})
    message = Message(content, dst_node_id=2, message_type=action)
    return unpack_answer(create_client_app(lambda _: site)(message, context).content)


def test_update_holds_the_change_of_every_trainable_parameter(
    make_site: Callable[..., Path],
) -> None:
    task = make_task()
    answer = ask(Site("north", make_site(), threads=1), "train", task.pack())
    assert isinstance(answer, Update)
    assert answer.model_sha256 == state_sha256(task.state)
    model = build_model(JOB.model)
    assert set(answer.delta) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(bool(delta.abs().sum() > 0) for delta in answer.delta.values())


def test_a_repeated_round_gives_the_same_update(make_site: Callable[..., Path]) -> None:
    site = Site("north", make_site(), threads=1)
    first, second = (train_round(make_task(), site) for _ in range(2))
    assert all(torch.equal(first.delta[name], second.delta[name]) for name in first.delta)


def test_scores_are_means_over_validation_patients(make_site: Callable[..., Path]) -> None:
    store = make_site()
    answer = ask(Site("north", store), "evaluate", make_task().pack())
    assert isinstance(answer, Scores)
    assert set(answer.values) == {"psnr", "ssim", "nmse"}
    assert 5 < answer.values["psnr"] < 60
    assert answer.values["ssim"] <= 1
    again = evaluate_round(make_task(), Site("north", store))
    assert again.values == answer.values


@pytest.mark.parametrize("action", ["train", "evaluate"])
def test_a_site_without_patients_refuses_with_a_code_alone(
    action: str, make_site: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    store = make_site(patients=3, fractions=SplitFractions(0, 0, 1))
    answer = ask(Site("north", store), action, make_task().pack())
    assert answer == Refusal("north", "data")
    assert "north refuses" in caplog.text


def test_weights_of_another_model_are_refused(make_site: Callable[..., Path]) -> None:
    task = make_task()
    state = dict(task.state)
    state.pop(next(iter(state)))
    answer = ask(Site("north", make_site()), "train", Task(JOB, 1, state).pack())
    assert answer == Refusal("north", "model")


def test_a_missing_store_is_refused(tmp_path: Path) -> None:
    answer = ask(Site("north", tmp_path / "nowhere"), "train", make_task().pack())
    assert answer == Refusal("north", "data")


def test_deployed_site_names_the_missing_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedcmr_client.app import app

    monkeypatch.delenv("FEDCMR_SITE", raising=False)
    message = Message(make_task().pack(), dst_node_id=2, message_type="train")
    with pytest.raises(ConfigurationError, match="FEDCMR_SITE"):
        app(message, Context(1, 2, {}, RecordDict(), {}))
