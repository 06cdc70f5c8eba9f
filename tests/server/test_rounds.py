"""The round loop over an in-memory link with sites that do known arithmetic."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from flwr.app import RecordDict

from fedcmr_server.links import Action
from fedcmr_server.rounds import run_job
from fedcmr_server.run_folder import RunFolder
from fedcmr_shared.errors import FederationError
from fedcmr_shared.federation.messages import Refusal, Scores, Task, Update
from fedcmr_shared.models.bundle import state_sha256
from fedcmr_shared.models.registry import build_model
from fedcmr_shared.schemas.job import JobSpec, ModelSpec

JOB = JobSpec(
    rounds=2,
    minimum_sites=2,
    model=ModelSpec(text_encoder="hashed"),
    site_sizes={"a": "large"},
)
TRAINABLE = [n for n, p in build_model(JOB.model).named_parameters() if p.requires_grad]

Answer = Update | Scores | Refusal


def adds(amount: float) -> Callable[[str, Action, Task], Answer]:
    """Return a site that adds ``amount`` to every parameter and reports it as its score."""

    def answer(name: str, action: Action, task: Task) -> Answer:
        base = state_sha256(task.state)
        if action == "evaluate":
            return Scores(name, task.round, base, {"psnr": amount})
        delta = {key: torch.full_like(task.state[key], amount) for key in TRAINABLE}
        return Update(name, task.round, base, delta, loss=amount)

    return answer


@dataclass
class MemoryLink:
    """A :class:`fedcmr_server.links.SiteLink` to functions."""

    sites: Mapping[str, Callable[[str, Action, Task], Answer | None]]
    asked: list[tuple[Action, int]] = field(default_factory=list)

    def connected(self, at_least: int, timeout_s: float) -> list[int]:
        return list(range(len(self.sites)))

    def exchange(
        self, action: Action, content: RecordDict, sites: list[int], timeout_s: float
    ) -> Mapping[int, RecordDict]:
        task = Task.unpack(content)
        self.asked.append((action, task.round))
        answers = {}
        for index, (name, site) in enumerate(self.sites.items()):
            answer = site(name, action, task)
            if answer is not None:
                answers[index] = answer.pack()
        return answers


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", JOB)


def test_rounds_average_by_public_weights(folder: RunFolder) -> None:
    link = MemoryLink({"a": adds(1.0), "b": adds(6.0)})
    last = run_job(link, folder)
    assert last.round == 2
    assert link.asked == [("train", 1), ("evaluate", 1), ("train", 2), ("evaluate", 2)]
    first = folder.bundle_path(0)
    assert first.exists()
    events = folder.events()
    # a is large (weight 4), b small (weight 1): (4·1 + 1·6) / 5 = 2
    assert [event["train_loss"] for event in events if event["event"] == "round"] == [2.0, 2.0]
    assert [event["psnr"] for event in events if event["event"] == "evaluation"] == [2.0, 2.0]
    torch.manual_seed(JOB.seed)
    start = build_model(JOB.model).state_dict()
    for name in TRAINABLE:
        torch.testing.assert_close(last.state[name], start[name] + 4.0)
    frozen = set(start) - set(TRAINABLE)
    assert all(torch.equal(last.state[name], start[name]) for name in frozen)


def test_a_killed_run_continues_at_the_last_committed_round(folder: RunFolder) -> None:
    def dies_in_round_2(name: str, action: Action, task: Task) -> Answer:
        if task.round == 2:
            raise KeyboardInterrupt
        return adds(1.0)(name, action, task)

    with pytest.raises(KeyboardInterrupt):
        run_job(MemoryLink({"a": adds(1.0), "b": dies_in_round_2}), folder)
    link = MemoryLink({"a": adds(1.0), "b": adds(1.0)})
    last = run_job(link, folder)
    assert link.asked == [("train", 2), ("evaluate", 2)]
    assert last.round == 2


def test_a_missing_site_is_left_out(folder: RunFolder) -> None:
    link = MemoryLink({"a": adds(1.0), "b": adds(1.0), "c": lambda *_: None})
    run_job(link, folder)
    assert [event["sites"] for event in folder.events()] == [2, 2, 2, 2]


def test_a_refusing_site_is_left_out(folder: RunFolder) -> None:
    link = MemoryLink(
        {"a": adds(1.0), "b": adds(1.0), "c": lambda name, *_: Refusal(name, "declined")}
    )
    run_job(link, folder)
    assert folder.events()[0]["sites"] == 2


def other_round(name: str, action: Action, task: Task) -> Answer:
    return adds(1.0)(name, action, Task(task.job, task.round + 1, task.state))


def other_model(name: str, action: Action, task: Task) -> Answer:
    changed = {key: value + 1 for key, value in task.state.items()}
    return adds(1.0)(name, action, Task(task.job, task.round, changed))


def scores_for_training(name: str, action: Action, task: Task) -> Answer:
    return Scores(name, task.round, state_sha256(task.state), {"psnr": 1.0})


def as_site_a(name: str, action: Action, task: Task) -> Answer:
    return adds(1.0)("a", action, task)


def not_finite(name: str, action: Action, task: Task) -> Answer:
    return adds(float("inf"))(name, action, task)


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (other_round, "another round or model"),
        (other_model, "another round or model"),
        (scores_for_training, "another answer"),
        (as_site_a, "two nodes answered as site a"),
        (not_finite, "not finite"),
        (lambda *_: None, "1 of at least 2 sites"),
        (lambda name, *_: Refusal(name, "model"), "1 of at least 2 sites"),
    ],
)
def test_a_wrong_answer_ends_the_run_with_nothing_committed(
    folder: RunFolder, site: Callable[[str, Action, Task], Answer | None], message: str
) -> None:
    with pytest.raises(FederationError, match=message):
        run_job(MemoryLink({"a": adds(1.0), "b": site}), folder)
    latest = folder.latest()
    assert latest is not None
    assert latest.round == 0
