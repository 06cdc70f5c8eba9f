"""Coil combination and the removal of readout oversampling."""

from __future__ import annotations

import torch
from torch import Tensor

from fedcmr_shared.errors import ConfigurationError


def rss(images: Tensor, dim: int = -3) -> Tensor:
    """Return the real root-sum-of-squares of coil ``images`` over the coil axis ``dim``.

    Where all coils are zero the gradient is zero, so an empty background does no harm.
    """
    energy = (images.real.square() + images.imag.square()).sum(dim)
    empty = energy == 0
    return torch.where(empty, 1.0, energy).sqrt().masked_fill(empty, 0.0)


def expand(image: Tensor, maps: Tensor) -> Tensor:
    """Return coil images ``[..., coil, y, x]`` of one complex ``image`` ``[..., 1, y, x]``."""
    return maps * image


def reduce(images: Tensor, maps: Tensor) -> Tensor:
    """Return the image ``[..., 1, y, x]`` of coil ``images``: the adjoint of :func:`expand`.

    The coil axis stays, with length 1. Where the maps have unit root-sum-of-squares,
    ``reduce(expand(image, maps), maps)`` is ``image``.
    """
    return (maps.conj() * images).sum(-3, keepdim=True)


def remove_readout_oversampling(kspace: Tensor, factor: float) -> Tensor:
    """Crop the field of view along the readout (last axis) to ``round(n / factor)`` samples.

    The phase-encoding axis is not touched, so this commutes with undersampling of phase encodes.
    The transform is orthonormal: the noise level per sample stays the same.

    Raises:
        ConfigurationError: if ``factor`` is below 1 or leaves no sample.
    """
    samples = kspace.shape[-1]
    if not (1.0 <= factor <= samples):
        raise ConfigurationError(
            f"readout oversampling {factor} must lie between 1 and {samples} (readout samples)"
        )
    kept = round(samples / factor)
    if kept == samples:
        return kspace
    profile = torch.fft.ifft(torch.fft.ifftshift(kspace, dim=-1), dim=-1, norm="ortho")
    start = samples // 2 - kept // 2
    cropped = torch.fft.fftshift(profile, dim=-1)[..., start : start + kept]
    cropped = torch.fft.fft(torch.fft.ifftshift(cropped, dim=-1), dim=-1, norm="ortho")
    spectrum: Tensor = torch.fft.fftshift(cropped, dim=-1)
    return spectrum
