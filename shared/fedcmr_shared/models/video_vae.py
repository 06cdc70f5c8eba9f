"""Variational autoencoder of cine clips with three-dimensional convolutions: CPGG's second stage.

Written from the description in arXiv 2505.03426; the family is that of latent diffusion (Rombach et
al., arXiv 2112.10752). At paper size a clip of 50 frames of 96 x 96 pixels becomes latents of
16 x 25 x 12 x 12. No layer keeps statistics or meets two clips at once: each clip is normalised by
itself.

The published perceptual and adversarial losses are left out: the first needs weights from
elsewhere, the second a discriminator, which would be one more thing to train privately.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fedcmr_shared.errors import ConfigurationError, ModelError

Size = tuple[int, int, int]
"""Frames, rows and columns."""

_LOG_VARIANCES: Final = (-30.0, 20.0)


@dataclass(frozen=True)
class VideoVAEConfig:
    """Sizes of clips and layers.

    ``clip`` is (frames, rows, columns). ``widths`` run from fine to coarse, ``strides`` lie between
    them. ``blocks`` are the residual blocks of a level, ``groups`` those of the group norms.
    """

    clip: Size = (50, 96, 96)
    widths: tuple[int, ...] = (128, 256, 512, 512)
    strides: tuple[Size, ...] = ((2, 2, 2), (1, 2, 2), (1, 2, 2))
    blocks: int = 2
    groups: int = 32
    latents: int = 16
    kl_weight: float = 1e-6

    def __post_init__(self) -> None:
        if len(self.strides) != len(self.widths) - 1:
            raise ConfigurationError(
                f"{len(self.strides)} strides for {len(self.widths)} widths: give one less"
            )
        if self.blocks < 1 or self.latents < 1 or not self.kl_weight >= 0:
            raise ConfigurationError("blocks and latents must be at least 1, kl_weight 0")
        for width in self.widths:
            if width < 1 or width % self.groups:
                raise ConfigurationError(f"width {width} is not a multiple of {self.groups} groups")
        for name, size, factor in zip(
            ("frames", "rows", "columns"), self.clip, self.factors, strict=True
        ):
            if size < 1 or size % factor:
                raise ConfigurationError(f"clip: {size} {name} are not a multiple of {factor}")

    @property
    def factors(self) -> Size:
        """By how much latents are smaller than clips."""
        frames, rows, columns = (math.prod(axis) for axis in zip(*self.strides, strict=True))
        return frames, rows, columns

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Channels, frames, rows and columns of a clip's latents."""
        frames, rows, columns = (n // f for n, f in zip(self.clip, self.factors, strict=True))
        return self.latents, frames, rows, columns


class Posterior(NamedTuple):
    """Normal distribution of latents ``[batch, *latent_shape]``."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, generator: torch.Generator) -> Tensor:
        """Return one draw."""
        noise = torch.randn(self.mean.shape, generator=generator, device=generator.device)
        return self.mean + torch.exp(self.log_variance / 2) * noise.to(self.mean)

    def divergence(self) -> Tensor:
        """Return each clip's KL divergence from a standard normal distribution ``[batch]``."""
        each = self.mean.square() + self.log_variance.exp() - self.log_variance - 1
        return each.flatten(1).sum(1) / 2


class VideoVAE(nn.Module):
    """Encoder and decoder of clips ``[batch, 1, frames, rows, columns]`` with values in [-1, 1].

    Args:
        config: what the network computes.
        recompute: compute each residual block again in the backward pass instead of keeping its
            activations. Results and gradients are the same; memory falls, time rises.
    """

    def __init__(self, config: VideoVAEConfig, *, recompute: bool = False) -> None:
        super().__init__()
        self.config = config
        blocks = _Blocks(config, recompute)
        widths = config.widths
        self.head = _convolution(1, widths[0])
        self.encoder = nn.ModuleList(blocks.of(width) for width in widths)
        self.down = nn.ModuleList(
            nn.Conv3d(fine, coarse, 3, stride=stride, padding=1)
            for fine, coarse, stride in zip(widths[:-1], widths[1:], config.strides, strict=True)
        )
        self.posterior = _Out(config, widths[-1], 2 * config.latents)
        self.widen = _convolution(config.latents, widths[-1])
        self.decoder = nn.ModuleList(blocks.of(width) for width in reversed(widths))
        self.up = nn.ModuleList(
            _Upsampling(coarse, fine, stride)
            for fine, coarse, stride in reversed(
                [*zip(widths[:-1], widths[1:], config.strides, strict=True)]
            )
        )
        self.tail = _Out(config, widths[0], 1)

    def encode(self, clips: Tensor) -> Posterior:
        """Return the latents' distribution.

        Raises:
            ModelError: the clips have another shape.
        """
        expected = (1, *self.config.clip)
        if clips.shape[1:] != expected:
            raise ModelError(f"clips of shape {list(clips.shape[1:])}: give {list(expected)}")
        x = self.encoder[0](self.head(clips))
        for down, blocks in zip(self.down, self.encoder[1:], strict=True):
            x = blocks(down(x))
        mean, log_variance = self.posterior(x).chunk(2, 1)
        return Posterior(mean, log_variance.clamp(*_LOG_VARIANCES))

    def decode(self, latents: Tensor) -> Tensor:
        """Return clips of latents ``[batch, *latent_shape]``; values can leave [-1, 1]."""
        x = self.decoder[0](self.widen(latents))
        for up, blocks in zip(self.up, self.decoder[1:], strict=True):
            x = blocks(up(x))
        clips: Tensor = self.tail(x)
        return clips

    def forward(self, clips: Tensor, generator: torch.Generator) -> Tensor:
        """Return :meth:`loss`, for gradient engines that wrap modules."""
        return self.loss(clips, generator)

    def loss(self, clips: Tensor, generator: torch.Generator) -> Tensor:
        """Return each clip's mean absolute error and weighted KL divergence ``[batch]``."""
        posterior = self.encode(clips)
        error = (self.decode(posterior.sample(generator)) - clips).abs().flatten(1).mean(1)
        return error + self.config.kl_weight * posterior.divergence()


class _Out(nn.Sequential):
    """Norm, activation, convolution."""

    def __init__(self, config: VideoVAEConfig, inputs: int, outputs: int) -> None:
        norm = nn.GroupNorm(config.groups, inputs, eps=1e-6)
        super().__init__(norm, nn.SiLU(), _convolution(inputs, outputs))


class _ResidualBlock(nn.Module):
    """Adds a correction by two convolutions."""

    def __init__(self, config: VideoVAEConfig, width: int, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self.correction = nn.Sequential(_Out(config, width, width), _Out(config, width, width))

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            correction: Tensor = checkpoint(self.correction, x, use_reentrant=False)
        else:
            correction = self.correction(x)
        return x + correction


@dataclass(frozen=True)
class _Blocks:
    config: VideoVAEConfig
    recompute: bool

    def of(self, width: int) -> nn.Sequential:
        blocks = range(self.config.blocks)
        return nn.Sequential(*(_ResidualBlock(self.config, width, self.recompute) for _ in blocks))


class _Upsampling(nn.Module):
    """Repeats values, then one convolution."""

    def __init__(self, inputs: int, outputs: int, factors: Size) -> None:
        super().__init__()
        self.factors = factors
        self.convolution = _convolution(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        factors = tuple(map(float, self.factors))
        larger: Tensor = self.convolution(F.interpolate(x, scale_factor=factors, mode="nearest"))
        return larger


def _convolution(inputs: int, outputs: int) -> nn.Conv3d:
    return nn.Conv3d(inputs, outputs, 3, padding=1)
