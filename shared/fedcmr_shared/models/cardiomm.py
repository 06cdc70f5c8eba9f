"""CardioMM: a text-conditioned unrolled reconstructor for multi-coil cardiac k-space.

Written from the description in Wang et al. 2025 (arXiv 2512.21652); the U-Net family is that of
PromptMR (Xin et al. 2023, arXiv 2309.13839). Pipeline: calibration block → coil sensitivities;
then cascades of coil combination → prompt U-Net → coil expansion → weighted data consistency;
finally the root-sum-of-squares image.

Where the published code differs from what the method needs, this follows the method: projected
text embeddings are normalised over their own axis (``legacy_projection`` brings the published
sign code back), every coil of an example gets that example's text, and each block has its own
activation. Layers are free of in-place operations and of statistics shared by examples, as
patient-level differential privacy needs.

The prompt banks are random, frozen and part of the state: they must travel with the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fedcmr_shared.errors import ModelError
from fedcmr_shared.kspace.coils import expand, reduce, rss
from fedcmr_shared.kspace.consistency import weighted_data_consistency
from fedcmr_shared.kspace.fourier import fft2c, ifft2c
from fedcmr_shared.models.cardiomm_config import CONFIGS, CardioMMConfig, UNetConfig, Variant

__all__ = ["CONFIGS", "CardioMM", "CardioMMConfig", "Reconstruction", "UNetConfig", "Variant"]

_ATTENTION_REDUCTION: Final = 4
_ATTENTION_WIDTH: Final = 4  # fewer rectified channels may all be dead in a narrow network
_RESIDUAL_START: Final = 0.1  # factor on the last convolution of residual networks


class Reconstruction(NamedTuple):
    """Result for a batch, in the units of the measured k-space."""

    image: Tensor
    """Real root-sum-of-squares magnitude ``[batch, y, x]``."""
    kspace: Tensor
    """Completed complex k-space ``[batch, coil, phase, readout]``."""
    maps: Tensor
    """Complex coil sensitivities ``[batch, coil, y, x]`` with unit root-sum-of-squares."""


class TextEmbedding(NamedTuple):
    """Projected texts ``[batch, embedding_width]``; None where the variant has none."""

    metadata: Tensor | None
    sampling: Tensor | None

    def for_coils(self, coils: int) -> TextEmbedding:
        """Repeat each example's embeddings for its coils, which follow one another."""
        return TextEmbedding(
            *(None if part is None else part.repeat_interleave(coils, 0) for part in self)
        )


class ChannelAttention(nn.Module):
    """Scale each channel by a gate computed from all channel means."""

    def __init__(self, width: int) -> None:
        super().__init__()
        squeezed = max(_ATTENTION_WIDTH, width // _ATTENTION_REDUCTION)
        self.squeeze = nn.Conv2d(width, squeezed, 1, bias=False)
        self.excite = nn.Conv2d(squeezed, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x [batch, width, y, x]`` with gated channels."""
        means = x.mean((-2, -1), keepdim=True)
        return x * torch.sigmoid(self.excite(F.relu(self.squeeze(means))))


class AttentionBlock(nn.Module):
    """Residual block: convolution, activation, convolution, channel attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.activation = nn.PReLU()
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.attention = ChannelAttention(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` plus its correction; zero stays zero, as there is no bias."""
        correction: Tensor = self.attention(self.second(self.activation(self.first(x))))
        return x + correction


def _blocks(count: int, width: int) -> nn.Sequential:
    return nn.Sequential(*(AttentionBlock(width) for _ in range(count)))


class SamplingPrompter(nn.Module):
    """Mix frozen random prompts by the undersampling text.

    The bank is never trained, as published: only the mixing weights and the convolution are.
    """

    def __init__(self, embedding_width: int, width: int, size: int, prompts: int) -> None:
        super().__init__()
        self.mix = nn.Linear(embedding_width, prompts)
        self.bank = nn.Parameter(torch.rand(prompts, width, size, size), requires_grad=False)
        self.refine = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, embedding: Tensor, shape: Sequence[int]) -> Tensor:
        """Return a prompt ``[batch, width, *shape]`` for each example."""
        weights = torch.softmax(self.mix(embedding), dim=-1)
        prompt = torch.einsum("np,pcyx->ncyx", weights, self.bank)
        resized = F.interpolate(prompt, size=tuple(shape), mode="bilinear", align_corners=False)
        refined: Tensor = self.refine(resized)
        return refined


class MetadataAdapter(nn.Module):
    """Gate features by the metadata text; the identity until ``scale`` or ``shift`` is trained."""

    def __init__(self, embedding_width: int, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(embedding_width, width)
        self.scale = nn.Parameter(torch.zeros(width, 1, 1))
        self.shift = nn.Parameter(torch.zeros(width, 1, 1))
        self.block = AttentionBlock(width)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Return ``x + block((scale · x + shift) · gate)``."""
        gate = torch.sigmoid(self.gate(embedding))[:, :, None, None]
        correction: Tensor = self.block((self.scale * x + self.shift) * gate)
        return x + correction


class EncoderLevel(nn.Module):
    """Attention blocks, a skip branch and a strided convolution."""

    def __init__(self, width: int, coarser: int, blocks: int, skip_blocks: int) -> None:
        super().__init__()
        self.blocks = _blocks(blocks, width)
        self.skip = _blocks(skip_blocks, width)
        self.down = nn.Conv2d(width, coarser, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the coarser features and those of the skip connection."""
        features = self.blocks(x)
        return self.down(features), self.skip(features)


class DecoderLevel(nn.Module):
    """Prompt, attention blocks, upsampling, skip connection and metadata adapter."""

    def __init__(self, width: int, finer: int, level: int, config: UNetConfig, text: _Widths):
        super().__init__()
        self.prompter: SamplingPrompter | None = None
        self.adapter: MetadataAdapter | None = None
        mixed = width
        if text.sampling is not None:
            prompt_width = config.prompt_widths[level]
            self.prompter = SamplingPrompter(
                text.sampling, prompt_width, config.prompt_sizes[level], config.prompts
            )
            mixed += prompt_width
        self.blocks = _blocks(config.decoder_blocks[level], mixed)
        self.narrow = nn.Conv2d(mixed, width, 1, bias=False)
        self.up = nn.Conv2d(width, finer, 1, bias=False)
        self.merge = AttentionBlock(finer)
        if text.metadata is not None:
            self.adapter = MetadataAdapter(text.metadata, finer)

    def forward(self, x: Tensor, skip: Tensor, text: TextEmbedding) -> Tensor:
        """Return features at the size of ``skip``."""
        if self.prompter is not None and text.sampling is not None:
            x = torch.cat([x, self.prompter(text.sampling, x.shape[-2:])], dim=1)
        # A 1x1 convolution commutes with bilinear interpolation and is cheaper before it.
        coarse = self.up(self.narrow(self.blocks(x)))
        fine = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
        merged: Tensor = self.merge(fine + skip)
        if self.adapter is not None and text.metadata is not None:
            merged = self.adapter(merged, text.metadata)
        return merged


class _Widths(NamedTuple):
    metadata: int | None
    sampling: int | None


class PromptUNet(nn.Module):
    """Text-conditioned U-Net on complex images, each normalised by its own mean and deviation."""

    def __init__(self, config: UNetConfig, text: _Widths) -> None:
        super().__init__()
        self.config = config
        channels = 2 * config.pixel_unshuffle**2
        widths = (config.features, *config.widths)
        levels = range(len(config.widths))
        self.head = nn.Conv2d(channels, config.features, 3, padding=1)
        self.encoder = nn.ModuleList(
            EncoderLevel(widths[i], widths[i + 1], config.encoder_blocks[i], config.skip_blocks[i])
            for i in levels
        )
        self.bottleneck = _blocks(config.bottleneck_blocks, widths[-1])
        self.decoder = nn.ModuleList(
            DecoderLevel(widths[i + 1], widths[i], i, config, text) for i in reversed(levels)
        )
        self.tail = nn.Conv2d(config.features, channels, 5, padding=2)
        if config.residual:
            with torch.no_grad():
                for parameter in self.tail.parameters():
                    parameter.mul_(_RESIDUAL_START)

    def forward(self, images: Tensor, text: TextEmbedding) -> Tensor:
        """Map complex images ``[n, 1, y, x]`` to complex images of the same shape."""
        planes = torch.cat([images.real, images.imag], dim=1)
        normalised, mean, deviation = _normalise(planes)
        output = self._network(normalised, text)
        if self.config.residual:
            output = output + normalised
        output = output * deviation + mean
        return torch.complex(output[:, :1], output[:, 1:])

    def _network(self, planes: Tensor, text: TextEmbedding) -> Tensor:
        """Pad, run the network and crop; real ``[n, 2, y, x]``."""
        padding = _padding(planes.shape[-2:], self.config.multiple)
        x = F.pixel_unshuffle(F.pad(planes, padding), self.config.pixel_unshuffle)
        x = self.head(x)
        skips = []
        for encoder in self.encoder:
            x, skip = encoder(x)
            skips.append(skip)
        x = self.bottleneck(x)
        for decoder, skip in zip(self.decoder, reversed(skips), strict=True):
            x = decoder(x, skip, text)
        x = F.pixel_shuffle(self.tail(x), self.config.pixel_unshuffle)
        left, _, top, _ = padding
        height, width = planes.shape[-2:]
        return x[..., top : top + height, left : left + width]


def _normalise(planes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return planes of zero mean and unit deviation per example, with mean and deviation."""
    mean = planes.mean((1, 2, 3), keepdim=True)
    variance = (planes - mean).square().mean((1, 2, 3), keepdim=True)
    # A dead coil is constant: it stays zero instead of becoming NaN.
    deviation = torch.where(variance == 0, 1.0, variance).sqrt()
    return (planes - mean) / deviation, mean, deviation


def _padding(shape: Sequence[int], multiple: int) -> tuple[int, int, int, int]:
    """Return (left, right, top, bottom) that bring both sizes to multiples."""
    rows, columns = (-size % multiple for size in shape)
    return columns // 2, columns - columns // 2, rows // 2, rows - rows // 2


class SensitivityNetwork(nn.Module):
    """Estimate coil sensitivities from the calibration block, one coil at a time."""

    def __init__(self, config: UNetConfig, text: _Widths) -> None:
        super().__init__()
        self.unet = PromptUNet(config, text)

    def forward(self, kspace: Tensor, acs: Tensor, text: TextEmbedding) -> Tensor:
        """Return maps ``[batch, coil, y, x]`` with unit root-sum-of-squares over the coils."""
        calibration = ifft2c(kspace * acs)
        coils = calibration.shape[1]
        folded = calibration.flatten(0, 1)[:, None]
        maps: Tensor = self.unet(folded, text.for_coils(coils)).reshape(calibration.shape)
        norm = rss(maps)[:, None]
        return maps / torch.where(norm == 0, 1.0, norm)


class Cascade(nn.Module):
    """One unrolled iteration: prior (U-Net) and weighted data consistency."""

    def __init__(self, config: UNetConfig, text: _Widths, consistency_start: float) -> None:
        super().__init__()
        self.unet = PromptUNet(config, text)
        self.consistency_weight = nn.Parameter(torch.full((1,), consistency_start))

    def forward(
        self, kspace: Tensor, measured: Tensor, mask: Tensor, maps: Tensor, text: TextEmbedding
    ) -> Tensor:
        """Return the next k-space estimate ``[batch, coil, phase, readout]``."""
        image = self.unet(reduce(ifft2c(kspace), maps), text)
        prediction = fft2c(expand(image, maps))
        return weighted_data_consistency(prediction, measured, mask, self.consistency_weight)


class ProjectionHead(nn.Module):
    """Linear projection of a text embedding to unit length.

    ``legacy`` normalises over an axis of length 1 instead, as the published code does: every
    element becomes +1 or -1 and no gradient passes.
    """

    def __init__(self, text_width: int, embedding_width: int, legacy: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(text_width, embedding_width)
        self.legacy = legacy

    def forward(self, embedding: Tensor) -> Tensor:
        """Map ``[batch, text_width]`` to ``[batch, embedding_width]``."""
        projected: Tensor = self.linear(embedding)
        if self.legacy:
            return F.normalize(projected[:, None], dim=1)[:, 0]
        return F.normalize(projected, dim=-1)


class CardioMM(nn.Module):
    """The complete reconstructor.

    Args:
        config: what the network computes.
        recompute: compute each cascade again in the backward pass instead of keeping its
            activations. Results and gradients are the same; memory falls, time rises.
    """

    def __init__(self, config: CardioMMConfig, *, recompute: bool = False) -> None:
        super().__init__()
        self.config = config
        self.recompute = recompute
        text = _Widths(config.metadata_width, config.sampling_width)
        self.metadata_head = _head(config, text.metadata)
        self.sampling_head = _head(config, text.sampling)
        self.sensitivity = SensitivityNetwork(config.sensitivity, text)
        self.cascades = nn.ModuleList(
            Cascade(config.unet, text, config.consistency_start) for _ in range(config.cascades)
        )

    def forward(
        self,
        kspace: Tensor,
        mask: Tensor,
        acs: Tensor,
        metadata_text: Tensor | None = None,
        sampling_text: Tensor | None = None,
    ) -> Reconstruction:
        """Reconstruct a batch of single images.

        Args:
            kspace: measured k-space, zero elsewhere, complex ``[batch, coil, phase, readout]``.
            mask: measured positions ``[batch, 1, phase, readout]``, bool or 0/1.
            acs: positions of the calibration block, as ``mask``.
            metadata_text: text encoder output ``[batch, text_width]``; variants SM and UT
                ignore it.
            sampling_text: likewise for the undersampling text; variants SM and MT ignore it.

        Raises:
            ModelError: if a text that the variant needs is absent or has the wrong shape.
        """
        text = TextEmbedding(
            self._project("metadata_text", self.metadata_head, metadata_text, len(kspace)),
            self._project("sampling_text", self.sampling_head, sampling_text, len(kspace)),
        )
        # Unit peak, so that no scale of raw data under- or overflows in squares.
        peak = kspace.abs().amax((1, 2, 3), keepdim=True)
        scale = torch.where(peak == 0, 1.0, peak)
        measured = kspace / scale
        maps = self.sensitivity(measured, acs, text)
        estimate = measured
        for cascade in self.cascades:
            if self.recompute and torch.is_grad_enabled():
                estimate = checkpoint(
                    cascade, estimate, measured, mask, maps, text, use_reentrant=False
                )
            else:
                estimate = cascade(estimate, measured, mask, maps, text)
        return Reconstruction(rss(ifft2c(estimate)) * peak[:, 0], estimate * peak, maps)

    def _project(
        self, name: str, head: ProjectionHead | None, text: Tensor | None, batch: int
    ) -> Tensor | None:
        if head is None:
            return None
        if text is None:
            raise ModelError(f"{name} is absent: CardioMM variant {self.config.variant} needs it")
        if text.shape != (batch, self.config.text_width):
            raise ModelError(
                f"{name} has shape {tuple(text.shape)}: "
                f"give one row of {self.config.text_width} values for each of {batch} images"
            )
        projected: Tensor = head(text.to(head.linear.weight.dtype))
        return projected


def _head(config: CardioMMConfig, width: int | None) -> ProjectionHead | None:
    if width is None:
        return None
    return ProjectionHead(config.text_width, width, config.legacy_projection)
