"""CPGG: phenotype-guided generation of cine cardiac MR (arXiv 2505.03426), without its first stage.

A video autoencoder, trained beforehand on public or simulated clips and frozen here, turns clips
into latents and back; the masked generator, which a job trains, draws latents for a vector of
phenotypes. Vectors come from :mod:`fedcmr_shared.models.phenotype_vae` or from
:mod:`fedcmr_shared.models.phenotype_gaussian`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor, nn

from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.models.masked_generator import (
    PUBLISHED,
    Draws,
    MaskedGenerator,
    MaskedGeneratorConfig,
    SamplingPlan,
    draw,
)
from fedcmr_shared.models.standardisation import PhenotypeScale, Standardisation
from fedcmr_shared.models.token_diffusion import TokenDiffusionConfig
from fedcmr_shared.models.video_vae import VideoVAE, VideoVAEConfig


@dataclass(frozen=True)
class CPGGConfig:
    """The parts' configurations, which must fit one another.

    ``pixel_mm`` is the public size of a clip's pixels.
    """

    video: VideoVAEConfig = field(default_factory=VideoVAEConfig)
    generator: MaskedGeneratorConfig = field(default_factory=MaskedGeneratorConfig)
    standardisation: Standardisation = field(default_factory=Standardisation.of_priors)
    pixel_mm: float = 1.5

    def __post_init__(self) -> None:
        if self.video.latent_shape != self.generator.latent_shape:
            raise ConfigurationError(
                f"the autoencoder's latents {self.video.latent_shape} are not the generator's "
                f"{self.generator.latent_shape}: give both the same shape"
            )
        if len(self.standardisation) != self.generator.conditions:
            raise ConfigurationError(
                f"{len(self.standardisation)} phenotypes for a generator with "
                f"{self.generator.conditions} conditions: give it as many"
            )
        if not self.pixel_mm > 0:
            raise ConfigurationError(f"pixel_mm {self.pixel_mm} must be positive, in mm")


_TINY: Final = CPGGConfig(
    video=VideoVAEConfig(clip=(16, 48, 48), widths=(16, 24, 24, 24), blocks=1, groups=8, latents=8),
    generator=MaskedGeneratorConfig(
        latent_shape=(8, 8, 6, 6),
        patch=(8, 2, 1),
        width=128,
        heads=4,
        encoder_blocks=2,
        decoder_blocks=2,
        condition_tokens=4,
        dropout=0.0,
        diffusion=TokenDiffusionConfig(width=224, blocks=2, predicts="velocity"),
        least_masked=0.2,
    ),
    pixel_mm=3.0,
)

_SMALL: Final = CPGGConfig(
    video=VideoVAEConfig(widths=(32, 64, 128, 128), groups=16),
    generator=MaskedGeneratorConfig(
        width=384,
        heads=6,
        encoder_blocks=6,
        decoder_blocks=6,
        condition_tokens=32,
        diffusion=TokenDiffusionConfig(width=512, predicts="velocity"),
    ),
)

CONFIGS: Final[dict[str, CPGGConfig]] = {"tiny": _TINY, "small": _SMALL, "paper": CPGGConfig()}
"""Configurations by size: `paper` as published; `tiny` trains in minutes on one CPU core."""


class CPGG(nn.Module):
    """Frozen autoencoder and generator of clips; phenotypes are in their units.

    Args:
        config: what the network computes.
    """

    def __init__(self, config: CPGGConfig) -> None:
        super().__init__()
        self.config = config
        self.scale = PhenotypeScale(config.standardisation)
        self.autoencoder = VideoVAE(config.video).requires_grad_(False)
        self.generator = MaskedGenerator(config.generator)

    def forward(self, latents: Tensor, phenotypes: Tensor, draws: Draws) -> Tensor:
        """Return each patient's loss ``[batch]`` from latents of the frozen autoencoder.

        Args:
            latents: ``[batch, *latent_shape]``, drawn from the autoencoder's posterior.
            phenotypes: ``[batch, names]``; a missing one (NaN) counts as the prior's mean.
            draws: the loss's randomness, as `masked_generator.draw` gives it.
        """
        conditions, _ = self.scale(phenotypes.to(latents.dtype))
        return self.generator.loss(latents, conditions, draws)

    def loss(self, clips: Tensor, phenotypes: Tensor, generator: torch.Generator) -> Tensor:
        """Return each patient's loss ``[batch]``.

        Args:
            clips: ``[batch, 1, frames, rows, columns]`` with values in [-1, 1].
            phenotypes: ``[batch, names]``; a missing one (NaN) counts as the prior's mean.
            generator: source of all draws.
        """
        with torch.no_grad():
            latents = self.autoencoder.encode(clips).sample(generator)
        draws = draw(self.config.generator, len(clips), generator)
        return self.forward(latents, phenotypes, draws)

    @torch.no_grad()
    def sample(
        self,
        phenotypes: Tensor,
        generators: Sequence[torch.Generator],
        plan: SamplingPlan = PUBLISHED,
    ) -> Tensor:
        """Return one clip ``[batch, 1, frames, rows, columns]`` for each row and generator.

        Args:
            phenotypes: ``[batch, names]``, as in :meth:`loss`.
            generators: one for each clip, so that a clip does not depend on its batch.
            plan: how clips are drawn.
        """
        conditions, _ = self.scale(phenotypes.to(self.generator.condition.weight.dtype))
        latents = self.generator.sample(conditions, generators, plan)
        return self.autoencoder.decode(latents).clamp(-1, 1)
