"""A normal distribution of phenotypes from one private release: the baseline of the phenotype VAE.

Each patient contributes its standardised phenotypes x, shortened to norm R, as one vector

    ( sqrt(w) · x / R ,  sqrt(1 - w) · vech(x xᵀ) / R² )

where vech keeps the diagonal and sqrt(2) times one triangle, so that its norm is that of the
matrix. The vector's norm is at most 1. Dwork et al. (Analyze Gauss, STOC 2014) do the same for the
second moments alone. 82 phenotypes give 82 + 3,403 = 3,485 numbers.

A job releases them by the private step that trains networks. The loss of a patient is the negative
product of its vector with the parameters, so that its gradient is the negative vector: one step of
plain descent from zero, with learning rate 1, sampling rate 1 and clip norm 1, makes the parameters
the noisy mean vector. What follows from the release costs nothing more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor, nn

from fedcmr_shared.errors import ConfigurationError, ModelError
from fedcmr_shared.models.standardisation import PhenotypeScale, Standardisation

_LEAST_VARIANCE: Final = 1e-4  # of a direction, where noise or too few patients leave less


@dataclass(frozen=True)
class MomentsConfig:
    """What is released: ``radius`` is R, in standard deviations; ``mean_share`` is w.

    Without ``radius`` it is sqrt(1.5 · number of phenotypes), which few healthy patients exceed.
    """

    standardisation: Standardisation = field(default_factory=Standardisation.of_priors)
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


CONFIGS: Final[dict[str, MomentsConfig]] = dict.fromkeys(
    ("tiny", "small", "paper"), MomentsConfig()
)
"""Configurations by size, which are all the same."""


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


class PhenotypeMoments(nn.Module):
    """The released numbers as a network's parameters ``moments [config.numbers]``; zero at first."""

    def __init__(self, config: MomentsConfig) -> None:
        super().__init__()
        self.config = config
        self.scale = PhenotypeScale(config.standardisation)
        self.moments = nn.Parameter(torch.zeros(config.numbers))

    def forward(self, values: Tensor, noise: Tensor) -> Tensor:
        """Return each patient's loss ``[batch]``, whose gradient is its negative contribution.

        Args:
            values: ``[batch, names]`` in the phenotypes' units, NaN where missing.
            noise: ``[batch, 0]``: unlike an autoencoder of phenotypes there is nothing to draw.
        """
        rows = torch.stack([contribution(row, self.config) for row in values])
        return -(rows.to(self.moments) @ self.moments)

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Return ``count`` vectors of phenotypes ``[count, names]`` in their units.

        Raises:
            ModelError: the moments are not finite.
        """
        fitted = PhenotypeGaussian.of(self.moments.double().cpu(), self.config)
        return fitted.sample(count, generator)


def _triangle(width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows and columns of the lower triangle, and by how much an entry counts there."""
    rows, columns = torch.tril_indices(width, width)
    factor = torch.ones(len(rows), dtype=torch.float64)
    factor[rows != columns] = math.sqrt(2)
    return rows, columns, factor
