"""A site killed at every stage of its rounds: charges cover the work done, and the job goes on.

Run as a program (`python test_agent_crash.py FOLDER`), this file plays a whole job once for each
stage, kills the player there with SIGKILL, lets another process go on, and prints what was found.
The ledger's own statements have a matrix of their own in `test_ledger_crash.py`.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from fedcmr_client import agent as agent_module
from fedcmr_client import private_trainer
from fedcmr_client.agent import SiteAgent
from fedcmr_client.ledger import Ledger
from fedcmr_client.policy import load_policy, policy_text
from fedcmr_client.site_home import SiteHome
from fedcmr_client.usage import Usage
from fedcmr_shared.federation.messages import Task
from fedcmr_shared.models.registry import build_model
from fedcmr_shared.schemas.job import JobSpec, ModelSpec, SamplingSpec, TrainingSpec
from fedcmr_shared.schemas.privacy import EvaluationSpec, PrivacySpec

JOB = JobSpec(
    name="crash",
    rounds=1,
    model=ModelSpec(text_encoder="hashed"),
    sampling=SamplingSpec(acs_lines=8),
    training=TrainingSpec(local_steps=1, part="adapters"),
    aggregation="plain_with_local_dp",
    privacy=PrivacySpec(
        cohort_size=10,
        sampling_rate=0.5,
        noise_multiplier=2.0,
        evaluation=EvaluationSpec(cohort_size=2),
    ),
)
STAGES: list[tuple[Any, str]] = [
    (agent_module, "examine"),
    (agent_module, "task_model"),
    (Usage, "require_left"),
    (Ledger, "admit"),
    (Ledger, "cohort"),
    (Ledger, "start"),
    (private_trainer, "private_gradient"),
    (agent_module, "patient_scores"),
    (agent_module, "noisy_totals"),
    (Usage, "add"),
    (Ledger, "store"),
    (Ledger, "finish"),
]
WORK = {"private_gradient", "patient_scores"}


class Stages:
    """Counts the moments before and after each stage, and kills the process at one of them."""

    def __init__(self, deadly: int | None, work: Path) -> None:
        self.deadly = deadly
        self.work = work
        self.names: list[str] = []

    def reach(self, name: str) -> None:
        if len(self.names) == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        self.names.append(name)

    def watch(self, owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def watched(*arguments: Any, **named: Any) -> Any:
            self.reach(f"before {name}")
            if name in WORK:
                with self.work.open("a") as file:
                    file.write(f"{name}\n")
                    file.flush()
                    os.fsync(file.fileno())
            result = original(*arguments, **named)
            self.reach(f"after {name}")
            return result

        setattr(owner, name, watched)


def make_task() -> Task:
    torch.manual_seed(0)
    return Task(JOB, 1, build_model(JOB.model).state_dict())


def live(home: SiteHome) -> None:
    site = SiteAgent(home, threads=1)
    site.train(make_task())
    site.evaluate(make_task())


def play(home: SiteHome, work: Path, deadly: int | None, report: Path | None = None) -> None:
    stages = Stages(deadly, work)
    for owner, name in STAGES:
        stages.watch(owner, name)
    live(home)
    if report is not None:
        report.write_text(json.dumps(stages.names))


def in_child(action: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def fresh_home(template: Path, folder: Path) -> SiteHome:
    policy = load_policy(template)
    (folder / "second-place").mkdir(parents=True)
    ledger = policy.ledger.model_copy(
        update={"folder": folder / "ledger", "second_place": folder / "second-place"}
    )
    path = folder / "policy.yaml"
    path.write_text(policy_text(policy.model_copy(update={"ledger": ledger})))
    home = SiteHome.open(path)
    home.create_ledger().close()
    return home


def charged(home: SiteHome) -> dict[str, int]:
    with closing(home.open_ledger()) as ledger:
        state = ledger.budget.jobs.get(JOB.sha256)
        return {
            phase: 0 if state is None else state.starts.get(phase, 0)
            for phase in ("train", "evaluate")
        }


def spent(work: Path) -> dict[str, int]:
    lines = work.read_text().splitlines() if work.exists() else []
    return {"train": lines.count("private_gradient"), "evaluate": lines.count("patient_scores")}


def matrix(template: Path, folder: Path) -> list[dict[str, Any]]:
    # Children inherit what the first life imports and loads.
    live(fresh_home(template, folder / "warm"))
    counting = folder / "counting"
    report = folder / "stages.json"
    home = fresh_home(template, counting)
    assert in_child(lambda: play(home, counting / "work", None, report)) == 0
    findings = []
    for point, name in enumerate(json.loads(report.read_text())):
        scene = folder / str(point)
        home, work = fresh_home(template, scene), scene / "work"
        status = in_child(lambda h=home, w=work, p=point: play(h, w, p))  # type: ignore[misc]
        # mypy cannot infer a lambda with defaults
        assert os.WIFSIGNALED(status), name
        done, counted = spent(work), charged(home)
        finished = in_child(lambda h=home, w=work: play(h, w, None)) == 0  # type: ignore[misc]
        with closing(home.open_ledger()) as ledger:
            closed = ledger.budget.jobs[JOB.sha256].closed
        findings.append(
            {
                "stage": name,
                "charged": counted,
                "spent": done,
                "finished": finished and closed == "finished",
                "charged_at_the_end": charged(home),
                "spent_at_the_end": spent(work),
            }
        )
    return findings


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_no_stage_of_a_round_hides_work(make_home: Callable[..., SiteHome], tmp_path: Path) -> None:
    template = make_home().path
    folder = tmp_path / "crash"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, __file__, str(template), str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    findings = json.loads(done.stdout.splitlines()[-1])
    assert len(findings) >= 25
    for finding in findings:
        for when in ("", "_at_the_end"):
            for phase, work in finding[f"spent{when}"].items():
                assert finding[f"charged{when}"][phase] >= work, finding
        assert finding["finished"], finding
    # Deaths between charge and result do cost a spare round: the matrix reaches them.
    assert any(finding["charged_at_the_end"]["train"] == 2 for finding in findings)
    assert any(finding["charged_at_the_end"]["evaluate"] == 2 for finding in findings)


if __name__ == "__main__":
    print(json.dumps(matrix(Path(sys.argv[1]), Path(sys.argv[2]))))
