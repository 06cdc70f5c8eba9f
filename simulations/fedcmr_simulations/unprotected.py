"""A virtual site that trains without privacy, for comparison: only simulations have one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from flwr.app import RecordDict

from fedcmr_client.objectives.choice import load_encoder
from fedcmr_client.scoring import patient_scores
from fedcmr_client.store.site_store import SiteStore
from fedcmr_client.task_model import reconstructor
from fedcmr_client.trainer import Trainer, change_since, trained_values
from fedcmr_shared.errors import DataError, JobRefused
from fedcmr_shared.federation.messages import Scores, Task, Update
from fedcmr_shared.models.bundle import state_sha256
from fedcmr_shared.privacy.evaluation import UNPROTECTED, noisy_totals
from fedcmr_shared.secagg.messages import Step

SIMULATED_TICK_S: Final = 1.0


@dataclass(frozen=True)
class UnprotectedSite:
    """Answers tasks with exact updates and scores; see `fedcmr_client.app.SiteWork`."""

    store: Path
    # One thread a process: more contend, and sums would depend on their number.
    threads: int | None = 1
    reply_tick_s: float = SIMULATED_TICK_S

    @property
    def name(self) -> str:
        """The site's name: that of its folder."""
        return self.store.name

    def train(self, task: Task) -> Update:
        """Train one round; a repeated round gives the same update.

        Raises:
            JobRefused: the job declares privacy.
        """
        job = task.job
        if job.privacy is not None:
            raise JobRefused("failed", "privacy", "an unprotected site cannot run a private job")
        model = reconstructor(task)
        with SiteStore.open(self.store) as store:
            records = store.cohort("train", job.cohort)
        trainer = Trainer(model, job, records, load_encoder(job), site=self.name)
        before = trained_values(model)
        steps = job.training.local_steps
        loss = trainer.run((task.round - 1) * steps, steps)
        delta = change_since(before, model)
        return Update(self.name, task.round, state_sha256(task.state), delta, loss)

    def evaluate(self, task: Task) -> Scores:
        """Return exact totals over the site's validation patients."""
        job = task.job
        with SiteStore.open(self.store) as store:
            records = store.cohort("validation", job.cohort)
        if not records:
            raise DataError("no validation scan: import more patients or change the split")
        model = reconstructor(task)
        scores = patient_scores(model, job, records, load_encoder(job), torch.device("cpu"))
        totals = noisy_totals(list(scores.values()), UNPROTECTED.metrics, noise_multiplier=None)
        return Scores(self.name, task.round, state_sha256(task.state), totals)

    def secure_answer(self, step: Step, content: RecordDict) -> RecordDict:
        """Refuse: a sum of exact updates would suggest a protection that is not there."""
        raise JobRefused("aggregation", "aggregation", "an unprotected site sums nothing securely")
