"""Reconstruction: images of a patient, undersampled as the job says."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedcmr_client.dataset import Cohort, Image, Undersampled, undersample
from fedcmr_client.store.site_store import ScanRecord
from fedcmr_client.trainer import ReconstructionLoss, draw_sampling
from fedcmr_shared.kspace.masks import Sampling
from fedcmr_shared.schemas.acquisition import AcquisitionMetadata
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.text.encoders import TextEncoder


class ReconstructionObjective:
    """The job's images of a patient, each under as many masks as it has augmentations."""

    def __init__(self, job: JobSpec, encoder: TextEncoder, device: str = "cpu") -> None:
        self._job = job
        self._encoder = encoder
        self._device = torch.device(device)

    def draw(
        self, cohort: Cohort, patient: str, generator: np.random.Generator
    ) -> list[Undersampled]:
        """See :class:`~fedcmr_client.objectives.interface.Objective`."""
        privacy = self._job.privacy
        assert privacy is not None  # no other job comes here
        images = cohort.draw(patient, privacy.images_per_patient, generator)
        return [
            draw_sampling(image, self._job, generator)
            for image in images
            for _ in range(privacy.augmentations)
        ]

    def loss_of(self, module: nn.Module) -> ReconstructionLoss:
        """See :class:`~fedcmr_client.objectives.interface.Objective`."""
        return ReconstructionLoss(module, self._job, self._encoder, self._device)

    def synthetic(self) -> Sequence[Undersampled]:
        """See :class:`~fedcmr_client.objectives.interface.Objective`."""
        shape = (2, 32, 32)
        metadata = AcquisitionMetadata(
            origin="simulated",
            source_format="random",
            frames=1,
            slices=1,
            coils=shape[0],
            phase_encodes=shape[1],
            readout_samples=shape[2],
        )
        record = ScanRecord("random", "nobody", Path(), metadata, "train", "", False)
        generator = torch.Generator().manual_seed(0)
        sampling = Sampling("uniform", 4.0, 8)
        images = []
        for seed in range(2):
            kspace = torch.randn(shape, dtype=torch.complex128, generator=generator)
            images.append(undersample(Image(record, 0, 0, kspace), sampling, seed))
        return images

    def shape_of(self, example: Undersampled) -> Hashable:
        """See :class:`~fedcmr_client.objectives.interface.Objective`."""
        return example.image.kspace.shape
