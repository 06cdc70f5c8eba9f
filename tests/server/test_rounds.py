"""The round loop over an in-memory link with sites that do known arithmetic."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from plain_federation import JOB, JOB_PARAMETERS, TRAINABLE, Answer, MemoryLink, adds, totals

from fedcmr_server import rounds
from fedcmr_server.answers import Totals, Updates
from fedcmr_server.rounds import initial_state, run_job
from fedcmr_server.run_folder import RunFolder
from fedcmr_shared.errors import FederationError
from fedcmr_shared.federation.messages import Refusal, Scores, Task
from fedcmr_shared.models.bundle import state_sha256
from fedcmr_shared.models.registry import build_model
from fedcmr_shared.privacy.evaluation import ENERGY, PASSED
from fedcmr_shared.schemas.job import JobSpec


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
    # Each of the two has one patient, with 11 and 16 dB; weights have no say in that.
    assert [event["psnr"] for event in events if event["event"] == "evaluation"] == [13.5, 13.5]
    torch.manual_seed(JOB.seed)
    start = build_model(JOB.model).state_dict()
    for name in TRAINABLE:
        torch.testing.assert_close(last.state[name], start[name] + 4.0)
    frozen = set(start) - set(TRAINABLE)
    assert all(torch.equal(last.state[name], start[name]) for name in frozen)


@dataclass(frozen=True)
class Told:
    """Sites whose gates passed, and who used so much energy."""

    kwh: float

    def updates(self, task: Task) -> Updates:
        raise NotImplementedError

    def totals(self, task: Task) -> Totals:
        found = {PASSED: torch.tensor([2.0]), ENERGY: torch.tensor([self.kwh])}
        return Totals(found, 3, bytes_up=0, bytes_down=0)


@pytest.mark.parametrize(("kwh", "told"), [(0.0, None), (-2e-5, None), (0.34, 0.3)])
def test_an_evaluation_names_its_model_and_what_energy_was_counted(
    folder: RunFolder, kwh: float, told: float | None
) -> None:
    """Sums of words stand for zero only nearly."""
    state = initial_state(JOB)
    rounds._evaluate(Told(kwh), folder, Task(JOB, 1, state))
    (event,) = folder.events()
    assert event["model_sha256"] == state_sha256(state)
    assert (event["gates_passed"], event["sites"]) == (2, 3)
    assert event.get("energy_kwh") == told
    assert ("energy_kwh" in event) is (told is not None)


def test_a_killed_run_continues_at_the_last_committed_round(folder: RunFolder) -> None:
    def dies_in_round_2(name: str, action: str, task: Task) -> Answer:
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


def other_round(name: str, action: str, task: Task) -> Answer:
    return adds(1.0)(name, action, Task(task.job, task.round + 1, task.state))


def other_model(name: str, action: str, task: Task) -> Answer:
    changed = {key: value + 1 for key, value in task.state.items()}
    return adds(1.0)(name, action, Task(task.job, task.round, changed))


def scores_for_training(name: str, action: str, task: Task) -> Answer:
    return Scores(name, task.round, state_sha256(task.state), totals(task.job, 0.5))


def as_site_a(name: str, action: str, task: Task) -> Answer:
    return adds(1.0)("a", action, task)


def not_finite(name: str, action: str, task: Task) -> Answer:
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
    folder: RunFolder, site: Callable[[str, str, Task], Answer | None], message: str
) -> None:
    with pytest.raises(FederationError, match=message):
        run_job(MemoryLink({"a": adds(1.0), "b": site}), folder)
    latest = folder.latest()
    assert latest is not None
    assert latest.round == 0


def test_other_totals_than_the_jobs_are_refused(folder: RunFolder) -> None:
    def other_totals(name: str, action: str, task: Task) -> Answer:
        answer = adds(1.0)(name, action, task)
        if isinstance(answer, Scores):
            return replace(answer, totals={"psnr/sum": torch.ones(2)})
        return answer

    with pytest.raises(FederationError, match="totals of site b are not those"):
        run_job(MemoryLink({"a": adds(1.0), "b": other_totals}), folder)


@pytest.mark.parametrize("rule", ["mean", "median", "trimmed-mean", "krum"])
def test_one_poisoned_site_moves_the_mean_alone(tmp_path: Path, rule: str) -> None:
    job = JobSpec.model_validate({**JOB.model_dump(), "robust": rule, "rounds": 1})
    folder = RunFolder.create(tmp_path / rule, job)
    link = MemoryLink({"w": adds(1.0), "x": adds(1.0), "y": adds(1.0), "z": adds(1e4)})
    last = run_job(link, folder)
    moved = last.state[TRAINABLE[0]] - initial_state(job)[TRAINABLE[0]]
    expected = 2500.75 if rule == "mean" else 1.0
    torch.testing.assert_close(moved, torch.full_like(moved, expected), rtol=1e-3, atol=1e-3)


def test_an_update_of_large_norm_is_left_out(tmp_path: Path) -> None:
    size = sum(JOB_PARAMETERS[name].numel() for name in TRAINABLE)
    job = JobSpec.model_validate({**JOB.model_dump(), "max_update_norm": 2 * size**0.5})
    folder = RunFolder.create(tmp_path / "screened", job)
    last = run_job(MemoryLink({"b": adds(1.0), "c": adds(3.0), "d": not_finite}), folder)
    moved = last.state[TRAINABLE[0]] - initial_state(job)[TRAINABLE[0]]
    torch.testing.assert_close(moved, torch.full_like(moved, 2.0), rtol=0, atol=1e-4)
    assert [e["left_out"] for e in folder.events() if e["event"] == "round"] == [2, 2]


def test_too_few_updates_for_a_robust_rule_end_the_run(tmp_path: Path) -> None:
    job = JobSpec.model_validate({**JOB.model_dump(), "robust": "krum"})
    folder = RunFolder.create(tmp_path / "krum", job)
    with pytest.raises(FederationError, match="2 updates came, and robust krum needs at least 3"):
        run_job(MemoryLink({"a": adds(1.0), "b": adds(1.0)}), folder)
