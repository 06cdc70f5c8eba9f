"""Patient-level DP-SGD of a network on a site's cohort.

What the trainer learns about the data while it works (who was drawn, losses, how many gradients
were clipped) stays inside it; only the noisy weights are a release.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedcmr_client.dataset import Cohort
from fedcmr_client.objectives.choice import AnyObjective
from fedcmr_client.store.site_store import ScanRecord
from fedcmr_client.trainer import LocalOptimiser
from fedcmr_shared.errors import ConfigurationError, DataError
from fedcmr_shared.privacy.distributed import noise_share
from fedcmr_shared.privacy.engines import engine_for
from fedcmr_shared.privacy.mechanism import Engine, Mechanism, set_gradients
from fedcmr_shared.privacy.parts import freeze, trainable_names
from fedcmr_shared.privacy.ranks import ALONE, Ranks
from fedcmr_shared.privacy.step import PatientCounts, private_gradient, private_integers
from fedcmr_shared.schemas.job import JobSpec

_log = logging.getLogger("fedcmr.site")


class PrivateTrainer:
    """Trains the job's part of one model with the job's mechanism.

    Patients, their examples and noise are drawn from the operating system's entropy, so a repeated
    round is another release and costs a spare round. ``before_step`` may wait, and do nothing else.

    Raises:
        ConfigurationError: the job declares no privacy.
        JobRefused: the job's gradient engine is not exact for this model.
    """

    def __init__(
        self,
        model: nn.Module,
        job: JobSpec,
        records: Sequence[ScanRecord],
        objective: AnyObjective,
        *,
        site: str,
        device: str = "cpu",
        ranks: Ranks = ALONE,
        before_step: Callable[[], None] = lambda: None,
    ) -> None:
        if job.privacy is None:
            raise ConfigurationError(f"job {job.name} declares no privacy: nothing to account for")
        self._privacy = job.privacy
        self._job = job
        self._model = model.to(torch.device(device))
        self._cohort = Cohort(records)
        self._ranks = ranks
        self._before_step = before_step
        self._objective = objective
        self._engine = gradient_engine(self._model, job, objective)
        self._parameters = list(self._engine.parameters)
        self.mechanism = Mechanism.of(job.privacy, job.weight(site))
        self._optimiser = LocalOptimiser(job, self._parameters)

    def run(self, first_step: int, steps: int) -> None:
        """Take ``steps`` private steps; ``first_step`` counts from the start of the job."""
        self._model.train()
        for step in range(first_step, first_step + steps):
            self._before_step()
            result = private_gradient(
                self._engine,
                self._cohort.patients,
                self._load,
                self.mechanism,
                self._privacy.sampling_rate,
                ranks=self._ranks,
            )
            _report(step, result.counts)
            set_gradients(self._parameters, result.gradients)
            self._optimiser.step(step)

    def integers(self, number: int) -> dict[str, Tensor]:
        """Return the integer sum of one step, for a job with distributed noise; moves nothing.

        It holds this site's share of the noise, too little by itself: it may leave inside the
        secure sum only. ``number`` of the round is for the site's log.

        Raises:
            ConfigurationError: the job's noise is not distributed.
        """
        self._model.train()
        self._before_step()
        result = private_integers(
            self._engine,
            self._cohort.patients,
            self._load,
            self.mechanism,
            self._privacy.sampling_rate,
            noise_share(self._job),
            ranks=self._ranks,
        )
        _report(number - 1, result.counts)
        names = trainable_names(self._job.model, self._model, self._job.training.part)
        return {n: t.cpu() for n, t in zip(names, result.gradients, strict=True)}

    def _load(self, patient: str) -> list[Any]:
        generator = np.random.default_rng(int.from_bytes(os.urandom(16)))
        try:
            return self._objective.draw(self._cohort, patient, generator)
        except (ConfigurationError, DataError) as error:
            # A damaged scan, or one too small for the sampling, must not show outside, so its
            # patient counts as zero.
            _log.error("a drawn patient contributes nothing: %s", error)
            return []


def _report(step: int, counts: PatientCounts) -> None:
    # For the site's own log: each of these numbers depends on the data.
    level = logging.WARNING if counts.non_finite else logging.INFO
    _log.log(
        level,
        "step %d: %d patients drawn, %d clipped, %d without a finite gradient counted as zero",
        step,
        counts.drawn,
        counts.clipped,
        counts.non_finite,
    )


def gradient_engine(model: nn.Module, job: JobSpec, objective: AnyObjective) -> Engine[Any]:
    """Freeze what the job does not train and return the engine that it names.

    Raises:
        JobRefused: the engine is not exact for this model.
        ConfigurationError: distributed noise has too few levels for this model.
    """
    parameters = freeze(model, trainable_names(job.model, model, job.training.part))
    if job.privacy is not None:
        # A job whose levels are too few for this model fails here, before anything is spent.
        Mechanism.of(job.privacy, 1).grid_scale(sum(p.numel() for p in parameters))
    return engine_for(
        job.privacy.engine if job.privacy is not None else "backward",
        model,
        parameters,
        objective.loss_of,
        synthetic=objective.synthetic,
        shape_of=objective.shape_of,
    )
