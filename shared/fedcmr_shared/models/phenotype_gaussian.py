"""A normal distribution of phenotypes from one private release: the baseline of the phenotype VAE.

Each patient contributes its standardised phenotypes x, shortened to norm R, as one vector

    ( sqrt(w) · x / R ,  sqrt(1 - w) · vech(x xᵀ) / R² )

where vech keeps the diagonal and sqrt(2) times one triangle, so that its norm is that of the
matrix. The vector's norm is at most 1, so the noisy sum of
:mod:`fedcmr_shared.privacy.mechanism` with clip norm 1 makes the release one step of the Gaussian
mechanism with sampling rate 1 (Dwork et al., Analyze Gauss, STOC 2014, does the same for the second
moments alone). What follows from the release costs nothing more.

82 phenotypes give 82 + 3,403 = 3,485 numbers, in a single step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fedcmr_shared.errors import ConfigurationError, ModelError
from fedcmr_shared.models.standardisation import Standardisation
from fedcmr_shared.privacy.mechanism import ClippedSum, Mechanism, noisy_mean
from fedcmr_shared.schemas.ledger import Release

_CLIP: Final = 1.0
_LEAST_VARIANCE: Final = 1e-4  # of a direction, where noise or too few patients leave less


@dataclass(frozen=True)
class MomentsConfig:
    """What is released: ``radius`` is R, in standard deviations; ``mean_share`` is w.

    Without ``radius`` it is sqrt(1.5 · number of phenotypes), which few healthy patients exceed.
    """

    standardisation: Standardisation
    radius: float | None = None
    mean_share: float = 0.2

    def __post_init__(self) -> None:
        if self.radius is not None and not self.radius > 0:
            raise ConfigurationError(f"radius {self.radius} must be positive")
        if not 0 < self.mean_share < 1:
            raise ConfigurationError(f"mean_share {self.mean_share} must lie between 0 and 1")

    @property
    def limit(self) -> float:
        """R: the norm to which a patient's standardised phenotypes are shortened."""
        return self.radius or math.sqrt(1.5 * len(self.standardisation))

    @property
    def numbers(self) -> int:
        """Length of a contribution: 3,485 for 82 phenotypes."""
        width = len(self.standardisation)
        return width + width * (width + 1) // 2


def contribution(values: Tensor, config: MomentsConfig) -> Tensor:
    """Return one patient's vector of norm at most 1, float64 ``[config.numbers]``.

    Args:
        values: phenotypes in their units ``[names]``; a missing one (NaN) counts as its centre.

    Raises:
        ModelError: ``values`` has another length.
    """
    width = len(config.standardisation)
    if values.shape != (width,):
        raise ModelError(f"phenotypes of shape {list(values.shape)}: give {width} for each patient")
    x = config.standardisation.apply(values.double())
    x = torch.where(x.isnan(), 0.0, x)
    x = x / torch.clamp(x.norm(), min=config.limit)
    rows, columns, factor = _triangle(width)
    products = x[rows] * x[columns] * factor
    share = config.mean_share
    return torch.cat([math.sqrt(share) * x, math.sqrt(1 - share) * products])


def noisy_moments(
    patients: Iterable[Tensor],
    config: MomentsConfig,
    *,
    noise_multiplier: float,
    cohort_size: float,
) -> Tensor:
    """Return the noisy mean contribution of ``patients``, float64 ``[config.numbers]``.

    Every call is a release, which :func:`release_of` describes to a ledger. Sites' results with
    equal cohort sizes are averaged. A patient with an infinite phenotype counts as zero.

    Args:
        patients: phenotypes in their units, one vector ``[names]`` for each patient.
        config: what is released.
        noise_multiplier: standard deviation of the noise on the sum, whose sensitivity is 1.
        cohort_size: public number by which the sum is divided.

    Raises:
        ConfigurationError: noise or cohort size is not positive and finite.
    """
    mechanism = Mechanism(_CLIP, noise_multiplier, cohort_size)
    shape = torch.Size([config.numbers])
    total = ClippedSum(torch.zeros(shape, dtype=torch.float64), [shape])
    for values in patients:
        total.add([contribution(values, config)], mechanism)
    return noisy_mean(total, mechanism)


def release_of(noise_multiplier: float) -> Release:
    """Return what one call of :func:`noisy_moments` costs a patient."""
    return Release(sampling_rate=1.0, noise_multiplier=noise_multiplier, steps=1)


@dataclass(frozen=True, eq=False)
class PhenotypeGaussian:
    """Normal distribution of standardised phenotypes: mean ``[names]``, covariance, constants."""

    mean: Tensor
    covariance: Tensor
    standardisation: Standardisation

    @classmethod
    def of(cls, moments: Tensor, config: MomentsConfig) -> PhenotypeGaussian:
        """Return the distribution with the released ``moments``.

        Noise can make a covariance with negative variances: its eigenvalues are raised to a small
        positive number.

        Raises:
            ModelError: ``moments`` has another length or is not finite.
        """
        width = len(config.standardisation)
        if moments.shape != (config.numbers,) or not bool(torch.isfinite(moments).all()):
            raise ModelError(f"moments must be {config.numbers} finite numbers")
        mean = moments[:width] * (config.limit / math.sqrt(config.mean_share))
        rows, columns, factor = _triangle(width)
        products = moments[width:] / factor * (config.limit**2 / math.sqrt(1 - config.mean_share))
        second = moments.new_zeros(width, width)
        second[rows, columns] = products
        second[columns, rows] = products
        variances, axes = torch.linalg.eigh(second - torch.outer(mean, mean))
        covariance = (axes * variances.clamp(min=_LEAST_VARIANCE)) @ axes.T
        return cls(mean, covariance, config.standardisation)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Return ``count`` vectors of phenotypes, float64 ``[count, names]``, in their units."""
        width = len(self.mean)
        noise = torch.randn(
            count, width, generator=generator, dtype=torch.float64, device=generator.device
        )
        factor = torch.linalg.cholesky(self.covariance)
        return self.standardisation.undo(self.mean + noise.to(factor) @ factor.T)


def _triangle(width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows and columns of the lower triangle, and by how much an entry counts there."""
    rows, columns = torch.tril_indices(width, width)
    factor = torch.ones(len(rows), dtype=torch.float64)
    factor[rows != columns] = math.sqrt(2)
    return rows, columns, factor
