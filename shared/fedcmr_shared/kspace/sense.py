"""CG-SENSE: the classical parallel-imaging reconstruction that learned ones must beat.

Maps are estimated from the calibration (ACS) block, the image solves::

    minimise  ||M F S x - y||² + λ ||x||²

by conjugate gradients (Pruessmann et al. 2001, 10.1002/mrm.1241), and the measured samples are put
back before the coils are combined. λ has no unit: with maps of at most unit root-sum-of-squares the
eigenvalues of the unregularised normal operator lie in [0, 1]. Few iterations regularise too, so
λ, iterations and the support mask are tuned together, on validation patients.
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
    """Regularisation λ, number of conjugate-gradient iterations and support threshold.

    ``support`` is the magnitude, relative to the maximum of the calibration image, below which the
    maps fade to zero; 0 keeps unit maps everywhere.
    """

    regularisation: float = 0.01
    iterations: int = 20
    support: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.regularisation < float("inf"):
            raise ConfigurationError(
                f"SENSE regularisation {self.regularisation} must be finite and at least 0"
            )
        if self.iterations < 1:
            raise ConfigurationError(f"SENSE iterations {self.iterations} must be at least 1")
        if not 0 <= self.support < 1:
            raise ConfigurationError(f"SENSE support {self.support} must lie in [0, 1)")


@dataclass(frozen=True)
class SenseCase:
    """One fully sampled validation image and the sampling it is tuned for.

    ``kspace`` is complex64 [coil, phase, readout], ``mask`` bool [1, phase, readout].
    """

    kspace: Tensor
    mask: Tensor
    acs: AcsRegion


REGULARISATIONS: Final = (0.001, 0.003, 0.01, 0.03, 0.1)
ITERATIONS: Final = (6, 12, 24)
SUPPORTS: Final = (0.0, 0.05, 0.15)


def estimate_maps(kspace: Tensor, acs: AcsRegion, *, support: float = 0.1) -> Tensor:
    """Estimate coil sensitivities from the calibration block.

    The block is apodised by a Hann window (without it Gibbs ringing enters the maps), transformed
    and divided by its root-sum-of-squares (McKenzie et al. 2002, 10.1002/mrm.10087). A soft mask
    of the object then tells the solver where no signal can be.

    Args:
        kspace: masked or full k-space, complex ``[batch, coil, phase, readout]``.
        acs: calibration block, measured completely.
        support: see :class:`SenseSettings`.

    Returns:
        Maps of the shape of ``kspace``; their root-sum-of-squares is at most 1.

    Raises:
        DataError: the block of an example holds no signal.
    """
    window = torch.zeros(kspace.shape[-2:], device=kspace.device)
    window[acs] = torch.outer(*(_hann(size, kspace.device) for size in window[acs].shape))
    calibration = ifft2c(kspace * window)
    magnitude = rss(calibration).unsqueeze(-3)
    peak = magnitude.amax(_PLANE, keepdim=True)
    if not bool((peak > 0).all()):
        raise DataError("calibration lines hold no signal: coil sensitivities cannot be estimated")
    unit = calibration / magnitude.clamp_min(torch.finfo(magnitude.dtype).tiny)
    if support == 0:
        return unit
    return unit * (magnitude / torch.hypot(magnitude, support * peak))


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
    maps = estimate_maps(kspace, acs, support=settings.support)
    image = cg_sense(kspace, mask, maps, settings.regularisation, settings.iterations)
    return combine(image, kspace, mask, maps)


def tune_regularisation(
    cases: Sequence[SenseCase],
    *,
    regularisations: Collection[float] = REGULARISATIONS,
    iterations: Collection[int] = ITERATIONS,
    supports: Collection[float] = SUPPORTS,
) -> SenseSettings:
    """Return the settings of the grid with the highest mean PSNR over validation images.

    Use validation patients of the same kind as those that will be reported, never the same ones.

    Raises:
        ConfigurationError: there is no case, or the grid is empty.
    """
    grid = [
        SenseSettings(*point) for point in itertools.product(regularisations, iterations, supports)
    ]
    if not cases or not grid:
        raise ConfigurationError("tuning SENSE needs at least one validation image and one setting")
    totals = dict.fromkeys(grid, 0.0)
    for case in cases:
        for settings, psnr in _grid_scores(case, regularisations, iterations, supports):
            totals[settings] += psnr
    return max(grid, key=totals.__getitem__)


def _grid_scores(
    case: SenseCase,
    regularisations: Iterable[float],
    iterations: Collection[int],
    supports: Iterable[float],
) -> Iterator[tuple[SenseSettings, float]]:
    """One run of conjugate gradients serves all iteration counts."""
    kspace, mask = case.kspace[None], case.mask[None]
    reference = _array(rss(ifft2c(kspace)))
    for support in supports:
        maps = estimate_maps(kspace, case.acs, support=support)
        for regularisation in regularisations:
            steps = cg_iterates(kspace, mask, maps, regularisation)
            for count, image in enumerate(itertools.islice(steps, max(iterations)), start=1):
                if count in iterations:
                    quality = score(reference, _array(combine(image, kspace, mask, maps)))
                    yield SenseSettings(regularisation, count, support), quality.psnr


def _hann(size: int, device: torch.device) -> Tensor:
    # The end points of a Hann window are zero: two more points keep every calibration line.
    return torch.hann_window(size + 2, periodic=False, device=device)[1:-1]


def _energy(image: Tensor) -> Tensor:
    return image.abs().square().sum((-3, -2, -1), keepdim=True)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    # Zero over zero means that an example is solved exactly: it then stays where it is.
    tiny = torch.finfo(denominator.dtype).tiny
    return torch.where(denominator > tiny, numerator / denominator.clamp_min(tiny), 0.0)


def _array(image: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    values: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = image[0].cpu().numpy()
    return values
