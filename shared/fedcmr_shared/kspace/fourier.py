"""Centred, orthonormal Fourier transforms between images and k-space."""

from __future__ import annotations

import torch
from torch import Tensor

_PLANE = (-2, -1)


def fft2c(image: Tensor) -> Tensor:
    """Return the k-space of ``image``: complex ``[..., y, x]`` to ``[..., phase, readout]``.

    The transform is unitary. The origin of the image and the centre of k-space both lie at index
    ``n // 2`` of an axis of ``n`` samples, for odd and even ``n``.
    """
    centred = torch.fft.ifftshift(image, dim=_PLANE)
    shifted: Tensor = torch.fft.fftshift(torch.fft.fft2(centred, norm="ortho"), dim=_PLANE)
    return shifted


def ifft2c(kspace: Tensor) -> Tensor:
    """Return the image of ``kspace``: the inverse, and the adjoint, of :func:`fft2c`."""
    centred = torch.fft.ifftshift(kspace, dim=_PLANE)
    shifted: Tensor = torch.fft.fftshift(torch.fft.ifft2(centred, norm="ortho"), dim=_PLANE)
    return shifted
