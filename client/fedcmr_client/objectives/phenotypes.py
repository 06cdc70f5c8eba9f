"""Generation of phenotypes: the vector of a patient, with the draw of its latents."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fedcmr_client.cine import read_phenotypes
from fedcmr_client.dataset import Cohort
from fedcmr_shared.models.standardisation import Standardisation
from fedcmr_shared.privacy.mechanism import Loss
from fedcmr_shared.schemas.job import JobSpec


class VectorExample(NamedTuple):
    """Phenotypes ``[names]`` in their units and standard normal numbers ``[latents]``."""

    phenotypes: Tensor
    noise: Tensor


class PhenotypeObjective:
    """The phenotypes of a patient, under as many draws as the job has augmentations.

    ``latents`` are the numbers that a network draws for a patient, 0 for one that draws none.
    """

    def __init__(
        self, scale: Standardisation, latents: int, job: JobSpec, device: str = "cpu"
    ) -> None:
        self._scale = scale
        self._latents = latents
        self._job = job
        self._device = torch.device(device)

    def draw(
        self, cohort: Cohort, patient: str, generator: np.random.Generator
    ) -> list[VectorExample]:
        """See :class:`~fedcmr_client.objectives.interface.Objective`."""
        privacy = self._job.privacy
        assert privacy is not None  # no other job comes here
        known = read_phenotypes(cohort.scans(patient))
        values = torch.tensor([known.get(name, np.nan) for name in self._scale.names])
        noise = generator.standard_normal((privacy.augmentations, self._latents))
        return [VectorExample(values, row) for row in torch.from_numpy(noise).float()]

    def loss_of(self, module: nn.Module) -> Loss[VectorExample]:
        """See :class:`~fedcmr_client.objectives.interface.Objective`."""

        def loss(examples: Sequence[VectorExample], /) -> Tensor:
            values = torch.stack([each.phenotypes for each in examples]).to(self._device)
            noise = torch.stack([each.noise for each in examples]).to(self._device)
            losses: Tensor = module(values, noise)
            return losses

        return loss

    def synthetic(self) -> Sequence[VectorExample]:
        """See :class:`~fedcmr_client.objectives.interface.Objective`."""
        random = torch.Generator().manual_seed(0)
        standard, noise = (
            torch.randn(2, width, generator=random, dtype=torch.float64)
            for width in (len(self._scale), self._latents)
        )
        values = self._scale.undo(standard)
        return [VectorExample(*pair) for pair in zip(values, noise, strict=True)]

    def shape_of(self, example: VectorExample) -> Hashable:
        """See :class:`~fedcmr_client.objectives.interface.Objective`."""
        return None
