"""Multi-coil k-space from magnitude images.

A Fourier transform of a magnitude image is not what a scanner measured: interpolation, filters and
the lost phase make such k-space too easy to reconstruct (the "data crimes" of Shimron et al.,
PNAS 119:e2117203119, 2022). The remedies here are partial: only the acquired part of k-space is
kept, and the images get a smooth phase, smooth coil sensitivities and correlated noise. The result
is always marked *synthesised*.

The random numbers depend on the seed and on the images, not on the patient's name, so the same
images under two names still give the same samples and the store notices.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy import fft

from fedcmr_client.importers.interface import ImportOptions
from fedcmr_shared.errors import DataError

_COIL_DISTANCE = 0.65
"""Distance of the coil centres from the middle, as a fraction of the field of view."""
_COIL_REACH = 0.45
_NEIGHBOUR_CORRELATION = 0.3


@dataclass(frozen=True)
class MagnitudeStack:
    """Magnitude images of one scan.

    ``image(frame, slice)`` gives a real array ``[phase, readout]``; ``matrix`` is the size
    (phase, readout) that the scanner acquired before it filled k-space with zeros.
    """

    frames: int
    slices: int
    matrix: tuple[int, int]
    image: Callable[[int, int], np.ndarray]
    source: str


class Synthesis:
    """K-space of a MagnitudeStack: the same coils, phase and noise level for all its images.

    ``noise_covariance`` is complex64 ``[coil, coil]``, E[n n^H] of the noise in k-space. The SNR is
    the 95th percentile of the middle slice over the mean standard deviation of the complex noise
    per coil. Raises DataError when that slice is empty or not finite.
    """

    def __init__(self, stack: MagnitudeStack, options: ImportOptions) -> None:
        self._stack, self._options = stack, options
        reference = _checked(stack, 0, stack.slices // 2)
        level = float(np.percentile(reference, 95)) or float(reference.max())
        if level <= 0:
            raise DataError(f"{stack.source}: frame 0, slice {stack.slices // 2} is empty")
        rng = _generator(options.seed, reference)
        phase = background_phase(stack.matrix, rng)
        self._sensitivity = coil_maps(options.coils, stack.matrix, rng) * np.exp(1j * phase)
        covariance = noise_covariance(options.coils, level / options.snr, rng)
        self._noise_factor = np.linalg.cholesky(covariance)
        self.noise_covariance = covariance.astype(np.complex64)

    def images(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield (frame, slice, k-space complex64 ``[coil, phase, readout]``)."""
        for frame, slice_ in np.ndindex(self._stack.frames, self._stack.slices):
            magnitude = _checked(self._stack, frame, slice_)
            rng = _generator(self._options.seed, magnitude, frame, slice_)
            image = crop_bandwidth(magnitude, self._stack.matrix)
            kspace = _fft2c((self._sensitivity * image).astype(np.complex64))
            yield frame, slice_, (kspace + self._noise(kspace.shape, rng)).astype(np.complex64)

    def _noise(self, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        white = rng.standard_normal((2, shape[0], shape[1] * shape[2]), np.float32)
        complex_white = (white[0] + 1j * white[1]) / np.sqrt(2)
        noise: np.ndarray = (self._noise_factor @ complex_white).reshape(shape)
        return noise


def coil_maps(coils: int, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Smooth sensitivities ``[coil, y, x]`` of coils around the body; root sum of squares 1."""
    y, x = _grid(shape)
    angles = 2 * np.pi * (np.arange(coils) + rng.uniform(-0.2, 0.2, coils)) / coils
    maps = np.empty((coils, *shape), np.complex128)
    for coil, angle in enumerate(angles + rng.uniform(0, 2 * np.pi)):
        dy, dx = y - _COIL_DISTANCE * np.sin(angle), x - _COIL_DISTANCE * np.cos(angle)
        strength = (1 + (dy**2 + dx**2) / _COIL_REACH**2) ** -1.5
        # The field of a loop turns along the direction tangential to the ring.
        phase = np.pi / 2 * (y * np.cos(angle) - x * np.sin(angle))
        maps[coil] = strength * np.exp(1j * (phase + rng.uniform(0, 2 * np.pi)))
    normalised: np.ndarray = maps / np.sqrt((np.abs(maps) ** 2).sum(axis=0))
    return normalised


def background_phase(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Smooth phase ``[y, x]`` in radians: a random polynomial of second order."""
    y, x = _grid(shape)
    terms = np.stack([np.ones(shape), x + 0 * y, y + 0 * x, x * y, x**2 + 0 * y, y**2 + 0 * x])
    phase: np.ndarray = np.tensordot(rng.uniform(-np.pi, np.pi, len(terms)), terms, axes=1)
    return phase


def noise_covariance(coils: int, deviation: float, rng: np.random.Generator) -> np.ndarray:
    """Positive definite covariance ``[coil, coil]`` in which neighbours on the ring correlate."""
    index = np.arange(coils)
    distance = np.abs(index[:, None] - index)
    ring = np.minimum(distance, coils - distance)
    scale = deviation * rng.uniform(0.8, 1.2, coils) * np.exp(2j * np.pi * rng.random(coils))
    covariance: np.ndarray = np.outer(scale, scale.conj()) * _NEIGHBOUR_CORRELATION**ring
    return covariance


def crop_bandwidth(image: np.ndarray, matrix: tuple[int, int]) -> np.ndarray:
    """Band-limited ``image`` on the smaller grid ``matrix`` over the same field of view."""
    if image.shape == matrix:
        return image
    kspace = _fft2c(image.astype(np.complex64))
    starts = [old // 2 - new // 2 for old, new in zip(image.shape, matrix, strict=True)]
    window = tuple(slice(s, s + new) for s, new in zip(starts, matrix, strict=True))
    # The scale keeps the grey values: the transform is orthonormal on either grid.
    scale = np.sqrt(np.prod(matrix) / np.prod(image.shape))
    cropped: np.ndarray = _ifft2c(kspace[window]).real * scale
    return cropped


def crop_labels(labels: np.ndarray, matrix: tuple[int, int]) -> np.ndarray:
    """``labels`` [..., y, x] at the nearest points of the grid of `crop_bandwidth`."""
    height, width = labels.shape[-2:]
    rows = np.floor((np.arange(matrix[0]) - matrix[0] // 2) * height / matrix[0] + 0.5)
    columns = np.floor((np.arange(matrix[1]) - matrix[1] // 2) * width / matrix[1] + 0.5)
    y = np.clip(rows.astype(int) + height // 2, 0, height - 1)
    x = np.clip(columns.astype(int) + width // 2, 0, width - 1)
    cropped: np.ndarray = labels[..., y[:, None], x]
    return cropped


def acquired_matrix(shape: tuple[int, int], fraction: tuple[float, float]) -> tuple[int, int]:
    """Even matrix size for the acquired ``fraction`` of the stored ``shape``, at least 2."""
    sizes = [max(2, 2 * round(n * part / 2)) for n, part in zip(shape, fraction, strict=True)]
    return min(sizes[0], shape[0]), min(sizes[1], shape[1])


def _checked(stack: MagnitudeStack, frame: int, slice_: int) -> np.ndarray:
    image = np.ascontiguousarray(stack.image(frame, slice_), np.float32)
    if not np.isfinite(image).all():
        raise DataError(f"{stack.source}: frame {frame}, slice {slice_} holds NaN or infinity")
    return image


def _generator(seed: int, image: np.ndarray, *place: int) -> np.random.Generator:
    content = hashlib.sha256(image.tobytes()).digest()
    return np.random.default_rng([seed, *place, int.from_bytes(content, "little")])


def _grid(shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    y, x = (np.arange(n) / n - 0.5 for n in shape)
    return y[:, None], x[None, :]


def _fft2c(image: np.ndarray) -> np.ndarray:
    shifted = fft.ifftshift(image, axes=(-2, -1))
    transformed: np.ndarray = fft.fftshift(fft.fft2(shifted, norm="ortho"), axes=(-2, -1))
    return transformed


def _ifft2c(kspace: np.ndarray) -> np.ndarray:
    shifted = fft.ifftshift(kspace, axes=(-2, -1))
    transformed: np.ndarray = fft.fftshift(fft.ifft2(shifted, norm="ortho"), axes=(-2, -1))
    return transformed
