"""From tissue fractions to noisy multi-coil k-space, on a finer grid than the scanner samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import scipy.fft
from scipy.ndimage import gaussian_filter, zoom

from fedcmr_simulations.phantom.canvas import Plane

SIMULATION_OVERSAMPLING: Final = 2.0
"""Readout field of view of the simulation over that of the image, as scanners sample it."""
REFINEMENT: Final = 2
"""Pixels of the simulation per pixel of the scan, along each axis."""

Kspace = npt.NDArray[np.complex64]


@dataclass(frozen=True)
class Grid:
    """Acquired matrix and spacing (phase, readout), oversampling already removed; mm."""

    phase: int
    readout: int
    spacing: tuple[float, float]
    oversampling: float

    @property
    def readout_samples(self) -> int:
        """Stored samples along the readout."""
        return round(self.readout * self.oversampling)

    def image_axes(self, centre: tuple[float, float]) -> tuple[Plane, Plane]:
        """(x, y) of the pixel centres in mm, with ``centre`` at the middle of the image."""
        x = centre[0] + (np.arange(self.readout) - self.readout // 2) * self.spacing[1]
        y = centre[1] + (np.arange(self.phase) - self.phase // 2) * self.spacing[0]
        return x.astype(np.float32), y.astype(np.float32)

    def fine_axes(self, centre: tuple[float, float]) -> tuple[Plane, Plane]:
        """(x, y) of the simulation grid: finer, and wider along the readout."""
        columns = round(self.readout * SIMULATION_OVERSAMPLING) * REFINEMENT
        rows = self.phase * REFINEMENT
        x = centre[0] + (np.arange(columns) - columns // 2) * self.spacing[1] / REFINEMENT
        y = centre[1] + (np.arange(rows) - rows // 2) * self.spacing[0] / REFINEMENT
        return x.astype(np.float32), y.astype(np.float32)


def acquire(
    image: npt.NDArray[np.complex64],
    maps: npt.NDArray[np.complex64],
    grid: Grid,
    noise_factor: npt.NDArray[np.complex128],
    rng: np.random.Generator,
) -> Kspace:
    """K-space ``[coil, phase, readout]`` of a fine ``image`` [y, x] seen by ``maps`` [coil, y, x].

    Only the centre of the fine k-space is kept, so the simulation does not share the grid of the
    reconstruction. ``noise_factor`` is a square root (Cholesky) of the noise covariance.
    """
    samples = round(grid.readout * SIMULATION_OVERSAMPLING)
    kspace = _centred(maps * image, -1)
    kspace = _centred(_middle(kspace, samples, -1), -2)
    kspace = _middle(kspace, grid.phase, -2) / REFINEMENT
    if grid.oversampling < SIMULATION_OVERSAMPLING:
        # What the scanner's reconstruction does: cut the field of view, keep the noise level.
        lines = _middle(_centred(kspace, -1, inverse=True), grid.readout_samples, -1)
        kspace = _centred(lines, -1)
    noise = rng.standard_normal((2, *kspace.shape), dtype=np.float32)
    white = (noise[0] + 1j * noise[1]).reshape(len(maps), -1) * np.float32(np.sqrt(0.5))
    coloured = noise_factor.astype(np.complex64) @ white
    return np.ascontiguousarray(kspace + coloured.reshape(kspace.shape), np.complex64)


def _centred(array: Kspace, axis: int, inverse: bool = False) -> Kspace:
    transform = scipy.fft.ifft if inverse else scipy.fft.fft
    shifted = transform(scipy.fft.ifftshift(array, axes=axis), axis=axis, norm="ortho")
    return np.asarray(scipy.fft.fftshift(shifted, axes=axis))


def _middle(array: Kspace, size: int, axis: int) -> Kspace:
    start = array.shape[axis] // 2 - size // 2
    return np.take(array, np.arange(start, start + size), axis=axis)


def smooth_field(shape: tuple[int, int], correlation_px: float, rng: np.random.Generator) -> Plane:
    """Random field of zero mean and unit variance with the given correlation length in pixels."""
    coarse = max(correlation_px / 2, 1.0)
    small = tuple(max(int(np.ceil(size / coarse)) + 4, 6) for size in shape)
    field = gaussian_filter(rng.standard_normal(small).astype(np.float32), 1.0, mode="reflect")
    field = zoom(field, coarse, order=1, mode="nearest", grid_mode=True)[: shape[0], : shape[1]]
    return np.asarray((field - field.mean()) / field.std(), np.float32)


def smooth_polynomial(x: Plane, y: Plane, scale_mm: float, rng: np.random.Generator) -> Plane:
    """Random cubic polynomial over the plane with values of order 1 within ``scale_mm``."""
    u, v = (x / scale_mm)[None, :], (y / scale_mm)[:, None]
    terms = (u, v, u * v, u**2, v**2, u**3, v**3)
    weights = rng.normal(0, 0.5, len(terms))
    return np.asarray(sum(w * t for w, t in zip(weights, terms, strict=True)), np.float32)
