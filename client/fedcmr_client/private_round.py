"""One round of private training at a site: in this process, or in one process per GPU.

With several processes `torchrun` starts this module as a program in each. They get the task and
the names of the cohort's patients in a folder that only the site's user may read, and rank 0
leaves the update there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedcmr_client.job_records import job_records
from fedcmr_client.objectives import training_objective
from fedcmr_client.pauses import wait_while_held
from fedcmr_client.private_trainer import PrivateTrainer
from fedcmr_client.site_home import SiteHome
from fedcmr_client.store.site_store import ScanRecord
from fedcmr_client.task_model import task_model
from fedcmr_client.trainer import change_since, trained_values
from fedcmr_client.usage import Usage
from fedcmr_shared.errors import FedcmrError, FederationError
from fedcmr_shared.federation.messages import Task
from fedcmr_shared.privacy.ranks import ALONE, Ranks, joined
from fedcmr_shared.schemas.job import JobSpec

_STATE: Final = "state.safetensors"
_TASK: Final = "task.json"
_UPDATE: Final = "update.safetensors"


def train_round(
    task: Task,
    model: nn.Module,
    records: list[ScanRecord],
    home: SiteHome,
    *,
    device: str | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    """Train ``model`` on ``records`` for the task's round and return the noisy update.

    With distributed noise that is the integer sum of one step, for the secure sum alone. Between
    steps the site's pause and quiet hours are kept; a wait costs the job no device hours.

    Raises:
        JobRefused: the job's gradient engine is not exact for this model.
    """
    job = task.job
    device = device or home.policy.device
    usage = Usage(home.policy, home.policy.ledger.folder)

    def wait() -> None:
        waited = wait_while_held(home, ranks, device)
        if waited and ranks.index == 0:
            usage.add(job, -waited)  # the agent counts from begin to end

    trainer = PrivateTrainer(
        model,
        job,
        records,
        training_objective(model, job, home, device),
        site=home.policy.site,
        device=device,
        ranks=ranks,
        before_step=wait,
    )
    if job.privacy is not None and job.privacy.distributed is not None:
        return trainer.integers(task.round)
    before = trained_values(model)
    steps = job.training.local_steps
    trainer.run((task.round - 1) * steps, steps)
    return change_since(before, model)


def train_round_on_gpus(task: Task, patients: Collection[str], home: SiteHome) -> dict[str, Tensor]:
    """Train the round in as many processes as the site's policy says; see `train_round`.

    Raises:
        FederationError: a process failed; what they printed is in the message, at the site only.
    """
    # The ledger's folder is the site's own, unlike the machine's temporary one.
    with TemporaryDirectory(prefix=".round-", dir=home.policy.ledger.folder) as name:
        folder = Path(name)
        save_file({key: t.contiguous() for key, t in task.state.items()}, folder / _STATE)
        content = {
            "job": task.job.model_dump(mode="json"),
            "round": task.round,
            "patients": sorted(patients),
            "policy": str(home.path.absolute()),
        }
        (folder / _TASK).write_text(json.dumps(content))
        _run_processes(home.policy.processes, folder)
        return load_file(folder / _UPDATE)


def _run_processes(count: int, folder: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={count}", "-m", __name__, str(folder)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0 or not (folder / _UPDATE).exists():
        tail = finished.stderr.strip().splitlines()[-20:]
        raise FederationError(f"training in {count} processes failed: " + "\n".join(tail))


def main(folder: Path) -> None:
    """Train as one rank of `torchrun`."""
    content = json.loads((folder / _TASK).read_text())
    home = SiteHome.open(Path(content["policy"]))
    task = Task(
        JobSpec.model_validate(content["job"]), content["round"], load_file(folder / _STATE)
    )
    patients = set(content["patients"])
    with home.open_store() as store:
        allowed = job_records(store, task.job, home.policy, "train")
    records = [record for record in allowed if record.patient in patients]
    cuda = home.policy.device == "cuda"
    device = f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu"
    with joined(torch.device(device)) as ranks:
        update = train_round(task, task_model(task), records, home, device=device, ranks=ranks)
        if ranks.index == 0:
            save_file({key: t.contiguous() for key, t in update.items()}, folder / _UPDATE)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except FedcmrError as error:
        sys.exit(str(error))
