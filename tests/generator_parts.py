"""Small generators, and clips of beating discs that they can learn in seconds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedcmr_shared.models.cpgg import CPGG, CPGGConfig
from fedcmr_shared.models.masked_generator import Attention, MaskedGeneratorConfig
from fedcmr_shared.models.standardisation import Standardisation
from fedcmr_shared.models.token_diffusion import TokenDiffusionConfig
from fedcmr_shared.models.video_vae import VideoVAEConfig

NAMES = ("LVEDV", "LVESV", "LVEF")
SCALE = Standardisation.of_priors(NAMES)
VIDEO = VideoVAEConfig(
    clip=(4, 16, 16),
    widths=(4, 8),
    strides=((2, 2, 2),),
    blocks=1,
    groups=2,
    latents=2,
)


def generator_config(attention: Attention = "full", **changes: object) -> MaskedGeneratorConfig:
    """12 tokens of 16 numbers."""
    options = {
        "latent_shape": (2, 6, 4, 4),
        "patch": (2, 2, 2),
        "conditions": 3,
        "width": 16,
        "heads": 2,
        "encoder_blocks": 2,
        "decoder_blocks": 2,
        "condition_tokens": 3,
        "dropout": 0.0,
        "diffusion": TokenDiffusionConfig(width=16, blocks=2, steps=50),
        "attention": attention,
        **changes,
    }
    return MaskedGeneratorConfig(**options)  # type: ignore[arg-type]  # any of its fields


MICRO = CPGGConfig(
    video=VIDEO,
    generator=generator_config(
        latent_shape=VIDEO.latent_shape, patch=(1, 4, 4), condition_drop=0.5
    ),
    standardisation=SCALE,
)


def moved(module: torch.nn.Module, deviation: float = 0.1) -> torch.nn.Module:
    """Move all weights off their first values, of which many are zero; float64."""
    generator = torch.Generator().manual_seed(7)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(deviation * noise)
    return module


def micro() -> CPGG:
    """A complete network in float64 with weights off their first values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = CPGG(MICRO)
    moved(model)
    return model


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def discs(count: int, clip: Sequence[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Clips ``[count, 1, *clip]`` of a disc that contracts once, and its LVEDV, LVESV and LVEF.

    The radius is 45 % of the half image at 250 mL.
    """
    generator = torch.Generator().manual_seed(seed)
    frames, rows, columns = clip
    largest = 90 + 160 * torch.rand(count, generator=generator, dtype=torch.float64)
    fraction = 0.25 + 0.45 * torch.rand(count, generator=generator, dtype=torch.float64)
    phase = torch.arange(frames) / frames
    volume = largest[:, None] * (1 - fraction[:, None] * torch.sin(torch.pi * phase) ** 2)
    radius = 0.45 * (volume / 250).sqrt()
    y, x = torch.linspace(-1, 1, rows)[:, None], torch.linspace(-1, 1, columns)
    distance = (y**2 + x**2).sqrt()
    edge = torch.sigmoid((radius[..., None, None] - distance) * 20)
    clips = (2 * edge - 1)[:, None]
    phenotypes = torch.stack([largest, largest * (1 - fraction), 100 * fraction], 1)
    return clips.float(), phenotypes
