"""A coordinator's folder with a roster, and jobs in it that ran without any site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor

from fedcmr_server.checkpoint_files import Checkpoint
from fedcmr_server.home import CoordinatorHome, CoordinatorSettings
from fedcmr_server.job_run import StoredRun
from fedcmr_server.store import Jobs, Rosters, Store
from fedcmr_shared.identity.keys import SiteKey
from fedcmr_shared.identity.roster import new_roster
from fedcmr_shared.identity.roster_history import next_version
from fedcmr_shared.models.bundle import state_sha256
from fedcmr_shared.models.registry import build_model
from fedcmr_shared.schemas.job import JobSpec, ModelSpec
from fedcmr_shared.schemas.privacy import EvaluationSpec, PrivacySpec

SITES = ("alder", "birch", "cedar", "dogwood")
JOB = JobSpec(
    name="heart",
    coordinator="centre",
    rounds=2,
    model=ModelSpec(text_encoder="hashed"),
    privacy=PrivacySpec(noise_multiplier=2.0, evaluation=EvaluationSpec(rounds="all")),
)


def new_home(folder: Path) -> CoordinatorHome:
    settings = CoordinatorSettings(federation="hearts", name="centre", host="localhost")
    return CoordinatorHome.create(folder, settings)


def add_roster(home: CoordinatorHome, store: Store, names: tuple[str, ...] = SITES) -> None:
    """Make sites of these names, with fresh keys, the newest roster."""
    keys = {name: SiteKey(Ed25519PrivateKey.generate()).public_key for name in names}
    history = Rosters(store).history()
    Rosters(store).add(next_version(history, new_roster(keys), "test", home.identity()))


def model_state(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    state: dict[str, Tensor] = build_model(JOB.model).state_dict()
    return state


def carry(home: CoordinatorHome, store: Store, job: str, closed: tuple[int, ...] = ()) -> None:
    """Do all rounds of a job as its run ``7`` and finish it; some rounds cannot be opened."""
    Jobs(store).change(job, "start", run="7")
    run = StoredRun(store, home.jobs, job, "7")
    start = run.latest()
    if start is None:
        start = Checkpoint(0, model_state(0), {})
        run.begin(0)
        run.commit(start)
    state = start.state
    for number in range(1, run.job.rounds + 1):
        run.begin(number)
        state = state if number in closed else model_state(number)
        figures: dict[str, Any] = {
            "sites": 0 if number in closed else 4,
            "closed": number in closed,
            "left_out": 0,
            "seconds": 3.0,
            "train_loss": None,
            "model_sha256": state_sha256(state),
        }
        run.commit(Checkpoint(number, state, {}), **figures)
        scores = {} if number in closed else {"psnr": 20.0 + number}
        run.record("evaluation", round=number, sites=4, closed=not scores, **scores)
    Jobs(store).change(job, "finish", run="7")
