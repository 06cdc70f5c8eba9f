"""Generation of clips: latents of a patient's heart, with the randomness of the loss.

Of the frozen autoencoder nothing is learned. How much is masked, which tokens, whether the
condition is dropped, times and noise are drawn for each example by itself.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fedcmr_client.cine import read_heart
from fedcmr_client.dataset import Cohort
from fedcmr_client.latents import LatentCache, Latents
from fedcmr_client.store.site_store import ScanRecord
from fedcmr_shared.models.bundle import state_sha256
from fedcmr_shared.models.clips import clip_grid
from fedcmr_shared.models.cpgg import CPGG
from fedcmr_shared.models.masked_generator import Draws, draw
from fedcmr_shared.models.token_diffusion import Noised
from fedcmr_shared.models.video_vae import Posterior
from fedcmr_shared.privacy.mechanism import Loss
from fedcmr_shared.schemas.job import JobSpec


class LatentExample(NamedTuple):
    """Latents ``[*latent_shape]``, phenotypes ``[names]`` and draws for one patient."""

    latents: Tensor
    phenotypes: Tensor
    draws: Draws


class GenerationObjective:
    """One heart of a patient, under as many draws as the job has augmentations.

    Args:
        model: its autoencoder makes the latents.
        job: the job; ``privacy.augmentations`` counts.
        device: where the loss is computed.
        cache: where latents are kept; without it no patient can be drawn.
    """

    def __init__(
        self, model: CPGG, job: JobSpec, device: str = "cpu", cache: LatentCache | None = None
    ) -> None:
        self._model = model
        self._job = job
        self._device = torch.device(device)
        self._cache = cache
        self._autoencoder_sha256 = state_sha256(model.autoencoder.state_dict())

    def draw(
        self, cohort: Cohort, patient: str, generator: np.random.Generator
    ) -> list[LatentExample]:
        """See :class:`~fedcmr_client.objectives.interface.Objective`."""
        privacy = self._job.privacy
        assert privacy is not None  # no other job comes here
        if self._cache is None:
            # No error of the tree: the trainer would count the patient as zero and go on.
            raise ValueError("an objective without a cache checks gradients only")
        scans = cohort.scans(patient)
        found = self._cache.latents(
            patient, scans, self._autoencoder_sha256, lambda: self._encode(scans)
        )
        random = torch.Generator().manual_seed(int(generator.integers(2**63)))
        posterior = Posterior(found.mean[None], found.log_variance[None])
        config = self._model.config.generator
        return [
            LatentExample(posterior.sample(random)[0], found.phenotypes, draw(config, 1, random))
            for _ in range(privacy.augmentations)
        ]

    def loss_of(self, module: nn.Module) -> Loss[LatentExample]:
        """See :class:`~fedcmr_client.objectives.interface.Objective`."""

        def loss(examples: Sequence[LatentExample], /) -> Tensor:
            latents = torch.stack([each.latents for each in examples]).to(self._device)
            phenotypes = torch.stack([each.phenotypes for each in examples]).to(latents)
            draws = _together([each.draws for each in examples]).to(latents)
            losses: Tensor = module(latents, phenotypes, draws)
            return losses

        return loss

    def synthetic(self) -> Sequence[LatentExample]:
        """See :class:`~fedcmr_client.objectives.interface.Objective`."""
        random = torch.Generator().manual_seed(0)
        config = self._model.config.generator
        centres = torch.tensor(self._model.config.standardisation.centres, dtype=torch.float64)
        examples = []
        for _ in range(2):
            latents = torch.randn(config.latent_shape, generator=random, dtype=torch.float64)
            phenotypes = centres * (1 + 0.1 * torch.randn(centres.shape, generator=random))
            examples.append(LatentExample(latents, phenotypes, draw(config, 1, random)))
        return examples

    def shape_of(self, example: LatentExample) -> Hashable:
        """See :class:`~fedcmr_client.objectives.interface.Objective`."""
        return example.latents.shape

    @torch.no_grad()
    def _encode(self, scans: Sequence[ScanRecord]) -> Latents:
        config = self._model.config
        heart = read_heart(scans, clip_grid(config))
        weights = self._model.generator.condition.weight
        clip = torch.from_numpy(heart.clip)[None, None].to(weights)
        posterior = self._model.autoencoder.encode(clip)
        phenotypes = torch.from_numpy(heart.vector(config.standardisation.names))
        return Latents(posterior.mean[0].cpu(), posterior.log_variance[0].cpu(), phenotypes)


def _together(draws: Sequence[Draws]) -> Draws:
    order, visible, dropped = (
        torch.cat(rows) for rows in zip(*(d[:3] for d in draws), strict=True)
    )
    time, noise = (torch.cat(rows) for rows in zip(*(d.noised for d in draws), strict=True))
    return Draws(order, visible, dropped, Noised(time, noise))
