"""CG-SENSE: the classical parallel-imaging reconstruction that learned ones must beat.

ESPIRiT estimates the maps from the calibration (ACS) block, the image solves::

    minimise  ||M F S x - y||² + λ ||x||²

by conjugate gradients (Pruessmann et al. 2001, 10.1002/mrm.1241), and the measured samples are put
back before the coils are combined. λ has no unit: with maps of at most unit root-sum-of-squares the
eigenvalues of the unregularised normal operator lie in [0, 1]. Few iterations regularise too, so
λ, iterations and the crop of the maps are tuned together, on validation patients.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from fedcmr_shared.errors import ConfigurationError, DataError
from fedcmr_shared.kspace.coils import expand, reduce, rss
from fedcmr_shared.kspace.consistency import weighted_data_consistency
from fedcmr_shared.kspace.fourier import fft2c, ifft2c
from fedcmr_shared.metrics.image_quality import score

AcsRegion = tuple[slice, slice]
"""Calibration block as slices of (phase, readout)."""

_PLANE = (-2, -1)


@dataclass(frozen=True)
class SenseSettings:
    """Regularisation λ, number of conjugate-gradient iterations and crop of the maps.

    Maps are zero where ESPIRiT's eigenvalue, which is 1 inside the object, is below ``crop``.
    """

    regularisation: float = 0.01
    iterations: int = 20
    crop: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.regularisation < float("inf"):
            raise ConfigurationError(
                f"SENSE regularisation {self.regularisation} must be finite and at least 0"
            )
        if self.iterations < 1:
            raise ConfigurationError(f"SENSE iterations {self.iterations} must be at least 1")
        if not 0 <= self.crop < 1:
            raise ConfigurationError(f"SENSE crop {self.crop} must lie in [0, 1)")


@dataclass(frozen=True)
class SenseCase:
    """One fully sampled validation image and the sampling it is tuned for.

    ``kspace`` is complex64 [coil, phase, readout], ``mask`` bool [1, phase, readout].
    """

    kspace: Tensor
    mask: Tensor
    acs: AcsRegion


REGULARISATIONS: Final = (0.003, 0.01, 0.03, 0.1)
ITERATIONS: Final = (6, 12, 24)
CROPS: Final = (0.0, 0.95)

_KERNEL_WIDTH: Final = 6
_SINGULAR_THRESHOLD: Final = 0.02  # relative to the largest singular value


def estimate_maps(kspace: Tensor, acs: AcsRegion, *, crop: float = 0.8) -> Tensor:
    """Estimate coil sensitivities by ESPIRiT (Uecker et al. 2014, 10.1002/mrm.24751), one set.

    At each pixel the map is the eigenvector of largest eigenvalue of the operator that projects
    patches of k-space on the row space of the calibration matrix. Its phase is arbitrary at each
    pixel, which neither SENSE nor the magnitude of its result notices.

    Args:
        kspace: masked or full k-space, complex ``[batch, coil, phase, readout]``.
        acs: calibration block, measured completely; its central square is used.
        crop: see :class:`SenseSettings`.

    Returns:
        Maps of the shape of ``kspace``; their root-sum-of-squares is 1, or 0 where cropped.

    Raises:
        DataError: the block of an example holds no signal.
    """
    block = kspace[..., *_central_square(acs)]
    if not bool(block.abs().amax((-3, -2, -1)).gt(0).all()):
        raise DataError("calibration lines hold no signal: coil sensitivities cannot be estimated")
    return torch.stack([_espirit(example, kspace.shape[-2:], crop) for example in block])


def _central_square(acs: AcsRegion) -> AcsRegion:
    width = min(region.stop - region.start for region in acs)
    starts = [(r.start + r.stop) // 2 - width // 2 for r in acs]
    return slice(starts[0], starts[0] + width), slice(starts[1], starts[1] + width)


def _espirit(block: Tensor, shape: torch.Size, crop: float) -> Tensor:
    """Return maps ``[coil, *shape]`` of one calibration block ``[coil, n, n]``."""
    coils, width = block.shape[0], min(_KERNEL_WIDTH, (block.shape[-1] + 1) // 2)
    patches = block.unfold(-2, width, 1).unfold(-2, width, 1)  # [coil, n, n, width, width]
    matrix = patches.permute(1, 2, 0, 3, 4).reshape(-1, coils * width**2)
    # Eigenvalues of the Gram matrix are squared singular values, in ascending order.
    energies, vectors = torch.linalg.eigh(matrix.mT @ matrix.conj())
    kept = vectors[:, energies > _SINGULAR_THRESHOLD**2 * energies[-1]]
    projection = (kept @ kept.mH).reshape(coils, width, width, coils, width, width)
    lags = block.new_zeros(coils, coils, 2 * width - 1, 2 * width - 1)
    for row in range(width):
        for column in range(width):
            shifted = projection[:, row, column].flip((-2, -1))
            lags[..., row : row + width, column : column + width] += shifted
    waves = [_waves(size, width, block) for size in shape]
    gram = torch.einsum("cdpq,yp,xq->yxcd", lags, *waves) / width**2
    eigenvalues, eigenvectors = torch.linalg.eigh(gram)
    maps: Tensor = eigenvectors[..., -1].permute(2, 0, 1) * (eigenvalues[..., -1] >= crop)
    return maps


def _waves(size: int, width: int, like: Tensor) -> Tensor:
    """Return ``exp(2πi · position · lag / size)`` as ``[size, 2 width - 1]``."""
    position = torch.arange(size, device=like.device) - size // 2
    lag = torch.arange(1 - width, width, device=like.device)
    angle = (2 * torch.pi / size) * torch.outer(position, lag)
    waves: Tensor = torch.polar(torch.ones_like(angle), angle).to(like.dtype)
    return waves


def normal_operator(image: Tensor, mask: Tensor, maps: Tensor, regularisation: float) -> Tensor:
    """Apply ``S* F* M F S + λ`` to complex images ``[batch, 1, y, x]``.

    Self-adjoint and positive; positive definite for ``regularisation`` above 0.
    """
    projected = reduce(ifft2c(mask * fft2c(expand(image, maps))), maps)
    return projected + regularisation * image


def cg_sense(
    kspace: Tensor, mask: Tensor, maps: Tensor, regularisation: float, iterations: int
) -> Tensor:
    """Solve SENSE for a batch, each example with its own step sizes.

    Args:
        kspace: k-space, complex ``[batch, coil, phase, readout]``; only samples in ``mask`` count.
        mask: bool or 0/1, ``[batch, 1, phase, readout]``.
        maps: coil sensitivities of the shape of ``kspace``.
        regularisation: λ, without unit.
        iterations: number of conjugate-gradient steps.

    Returns:
        Complex images ``[batch, 1, y, x]``.

    Raises:
        ConfigurationError: λ is negative or not finite, or ``iterations`` is below 1.
    """
    SenseSettings(regularisation, iterations)
    steps = cg_iterates(kspace, mask, maps, regularisation)
    return next(itertools.islice(steps, iterations - 1, None))


def cg_iterates(
    kspace: Tensor, mask: Tensor, maps: Tensor, regularisation: float
) -> Iterator[Tensor]:
    """Yield the image ``[batch, 1, y, x]`` after each conjugate-gradient step, without end."""
    residual = reduce(ifft2c(mask * kspace), maps)
    image = torch.zeros_like(residual)
    direction = residual
    energy = _energy(residual)
    while True:
        product = normal_operator(direction, mask, maps, regularisation)
        curvature = (direction.conj() * product).real.sum((-3, -2, -1), keepdim=True)
        step = _ratio(energy, curvature)
        image = image + step * direction
        residual = residual - step * product
        previous, energy = energy, _energy(residual)
        direction = residual + _ratio(energy, previous) * direction
        yield image


def combine(image: Tensor, kspace: Tensor, mask: Tensor, maps: Tensor) -> Tensor:
    """Return the magnitude ``[batch, y, x]`` of a SENSE image with the measured samples put back.

    The reference is the root-sum-of-squares of all coils, noise included. The measured part of
    that is known, so SENSE is given it: without it the comparison would be too easy.
    """
    predicted = fft2c(expand(image, maps))
    exact = torch.zeros((), device=kspace.device)
    return rss(ifft2c(weighted_data_consistency(predicted, mask * kspace, mask, exact)))


def reconstruct(kspace: Tensor, mask: Tensor, acs: AcsRegion, settings: SenseSettings) -> Tensor:
    """Return magnitudes ``[batch, y, x]``: maps, CG-SENSE and coil combination.

    Arguments as in :func:`estimate_maps` and :func:`cg_sense`.
    """
    maps = estimate_maps(kspace, acs, crop=settings.crop)
    image = cg_sense(kspace, mask, maps, settings.regularisation, settings.iterations)
    return combine(image, kspace, mask, maps)


def tune_regularisation(
    cases: Sequence[SenseCase],
    *,
    regularisations: Collection[float] = REGULARISATIONS,
    iterations: Collection[int] = ITERATIONS,
    crops: Collection[float] = CROPS,
) -> SenseSettings:
    """Return the settings of the grid with the highest mean PSNR over validation images.

    Use validation patients of the same kind as those that will be reported, never the same ones.

    Raises:
        ConfigurationError: there is no case, or the grid is empty.
    """
    grid = [
        SenseSettings(*point) for point in itertools.product(regularisations, iterations, crops)
    ]
    if not cases or not grid:
        raise ConfigurationError("tuning SENSE needs at least one validation image and one setting")
    totals = dict.fromkeys(grid, 0.0)
    for case in cases:
        for settings, psnr in _grid_scores(case, regularisations, iterations, crops):
            totals[settings] += psnr
    return max(grid, key=totals.__getitem__)


def _grid_scores(
    case: SenseCase,
    regularisations: Iterable[float],
    iterations: Collection[int],
    crops: Iterable[float],
) -> Iterator[tuple[SenseSettings, float]]:
    """One run of conjugate gradients serves all iteration counts."""
    kspace, mask = case.kspace[None], case.mask[None]
    reference = _array(rss(ifft2c(kspace)))
    for crop in crops:
        maps = estimate_maps(kspace, case.acs, crop=crop)
        for regularisation in regularisations:
            steps = cg_iterates(kspace, mask, maps, regularisation)
            for count, image in enumerate(itertools.islice(steps, max(iterations)), start=1):
                if count in iterations:
                    quality = score(reference, _array(combine(image, kspace, mask, maps)))
                    yield SenseSettings(regularisation, count, crop), quality.psnr


def _energy(image: Tensor) -> Tensor:
    return image.abs().square().sum((-3, -2, -1), keepdim=True)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    # Zero over zero means that an example is solved exactly: it then stays where it is.
    tiny = torch.finfo(denominator.dtype).tiny
    return torch.where(denominator > tiny, numerator / denominator.clamp_min(tiny), 0.0)


def _array(image: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    values: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = image[0].cpu().numpy()
    return values
