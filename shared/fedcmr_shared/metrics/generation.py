"""How generated clips compare with real ones: realism, diversity and obedience.

Distances are between features of :mod:`fedcmr_shared.metrics.clip_features`, and mean something only
beside others of the same extractor, number of samples and preprocessing: never compare them with a
paper's FID or FVD. `Distance` refuses it. Each metric has a known damage that it must notice; see
`tests/shared/test_generation.py` and `tests/shared/test_clip_features.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh
from scipy.stats import wasserstein_distance
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from fedcmr_shared.errors import DataError

Floats = NDArray[np.float64]
Features = NDArray[np.floating]
"""``[sample, feature]``."""

Clip = NDArray[np.floating]
"""``[frame, y, x]`` in [-1, 1]; one heart beat, whose last frame is followed by its first."""

_KERNEL_DEGREE: Final = 3
_SCALES: Final = (0.0448, 0.2856, 0.3001)  # of Wang et al.'s five, those that fit 96 pixels
_WINDOW: Final = 11
_LEAST_SIDE: Final = _WINDOW * 2 ** (len(_SCALES) - 1)  # the window on the coarsest scale


@dataclass(frozen=True)
class FeatureSpace:
    """What features are: ``sha256`` is that of the extractor's weights, empty where it has none."""

    extractor: str
    dimensions: int
    preprocessing: str
    sha256: str = ""

    def __str__(self) -> str:
        weights = f", weights {self.sha256[:12]}" if self.sha256 else ""
        return f"{self.extractor} ({self.dimensions} dimensions{weights}; {self.preprocessing})"


@dataclass(frozen=True, eq=False)
class FeatureSample:
    """Features ``[sample, dimension]`` of one set of clips.

    ``unmeasured`` counts the clips that gave none, as no heart was found in them: a distance cannot
    see them, so look at both.

    Raises:
        DataError: ``values`` do not have the dimensions of ``space``.
    """

    space: FeatureSpace
    values: Features
    unmeasured: int = 0

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.values.shape[1] != self.space.dimensions:
            raise DataError(
                f"features of shape {self.values.shape}: {self.space.extractor} gives "
                f"[sample, {self.space.dimensions}]"
            )


@dataclass(frozen=True)
class Distance:
    """A distance of two feature samples, relative to others of the same space and sizes only.

    Fewer samples make ``frechet`` larger, hence the sizes: a difference asks for equal ones.
    """

    space: FeatureSpace
    samples: tuple[int, int]
    frechet: float
    kernel: float

    def __sub__(self, other: Distance) -> float:
        """Return by how much the Fréchet distance is larger.

        Raises:
            DataError: the other distance is of another space or other numbers of samples.
        """
        if self.space != other.space:
            raise DataError(
                f"distances in different features cannot be compared: {self.space} and "
                f"{other.space}. Measure both with one extractor"
            )
        if self.samples != other.samples:
            raise DataError(
                f"distances between {self.samples} and {other.samples} samples cannot be "
                "compared: fewer samples make it larger. Use as many for both"
            )
        return self.frechet - other.frechet

    def __lt__(self, other: Distance) -> bool:
        """Tell whether this distance is smaller; raises as a difference does."""
        return self - other < 0


def distance(first: FeatureSample, second: FeatureSample) -> Distance:
    """Return Fréchet and kernel distance of two samples.

    Raises:
        DataError: they are of different spaces, or have fewer than two rows.
    """
    if first.space != second.space:
        raise DataError(f"features of {first.space} and {second.space} have no distance")
    return Distance(
        space=first.space,
        samples=(len(first.values), len(second.values)),
        frechet=frechet_distance(first.values, second.values),
        kernel=kernel_distance(first.values, second.values),
    )


def frechet_distance(first: Features, second: Features) -> float:
    """Return ``|m1 - m2|² + tr(S1 + S2 - 2 (S1 S2)^½)`` (Dowson and Landau 1982).

    Biased upward where samples are few for the number of features: use `project` before.

    Raises:
        DataError: fewer than two samples, different numbers of features, or a value not finite.
    """
    _check(first, second)
    means = first.mean(axis=0) - second.mean(axis=0)
    one, two = (np.atleast_2d(np.cov(each, rowvar=False)) for each in (first, second))
    # (S1 S2)^½ has the eigenvalues of the symmetric S1^½ S2 S1^½, which rounding keeps real.
    root = _square_root(one)
    mixed = eigh(root @ two @ root, eigvals_only=True)
    overlap = np.sqrt(np.clip(mixed, 0, None)).sum()
    return float(means @ means + np.trace(one) + np.trace(two) - 2 * overlap)


def kernel_distance(first: Features, second: Features) -> float:
    """Return the squared maximum mean discrepancy, unbiased: it may be below 0.

    Cubic kernel ``(x·y / d + 1)³`` (Binkowski et al. 2018).

    Raises:
        DataError: as `frechet_distance`.
    """
    _check(first, second)

    def kernel(a: Features, b: Features) -> Floats:
        return np.asarray((a @ b.T / a.shape[1] + 1) ** _KERNEL_DEGREE, dtype=np.float64)

    def within(a: Features) -> float:
        values = kernel(a, a)
        return float((values.sum() - np.trace(values)) / (len(a) * (len(a) - 1)))

    return within(first) + within(second) - 2 * float(kernel(first, second).mean())


def project(features: Features, width: int) -> Floats:
    """Return ``features`` in ``width`` dimensions, by a projection that everybody has.

    Raises:
        DataError: there are fewer features than that.
    """
    if features.shape[1] < width:
        raise DataError(f"{features.shape[1]} features cannot be projected to {width}")
    axes = np.random.default_rng(0).standard_normal((features.shape[1], width))
    return np.asarray(features @ np.linalg.qr(axes)[0], dtype=np.float64)


def similarity(first: Clip, second: Clip) -> float:
    """Return the mean multi-scale structural similarity of two clips in [-1, 1], frame by frame.

    Three of the five scales of Wang et al. 2003 with their weights, which add up to 0.63, and even
    windows: compare the values with one another only. Single precision, good to 1e-3.

    Raises:
        DataError: their shapes differ, a side is below 44 pixels, or a value is not finite.
    """
    if first.shape != second.shape:
        raise DataError(f"clips of {first.shape} and {second.shape} cannot be compared")
    if min(first.shape[1:]) < _LEAST_SIDE:
        raise DataError(f"frames of {first.shape[1:]}: give at least {_LEAST_SIDE} pixels a side")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise DataError("a clip holds values that are not finite: leave it out")
    one, two = (torch.as_tensor(np.asarray(each, np.float32))[:, None] for each in (first, second))
    value = multiscale_structural_similarity_index_measure(
        one, two, data_range=2.0, kernel_size=_WINDOW, betas=_SCALES, gaussian_kernel=False
    )
    return float(value)


def diversity(clips: Sequence[Clip], pairs: int, seed: int = 0) -> float:
    """Return 1 less the mean similarity of random pairs: 0 when all clips are the same.

    Raises:
        DataError: there are fewer than two clips or no pairs, or as `similarity`.
    """
    if len(clips) < 2 or pairs < 1:
        raise DataError(
            f"the diversity of {len(clips)} clips in {pairs} pairs says nothing: give at least 2 "
            "and 1"
        )
    draws = np.random.default_rng(seed)
    chosen = [draws.choice(len(clips), 2, replace=False) for _ in range(pairs)]
    return 1 - float(np.mean([similarity(clips[a], clips[b]) for a, b in chosen]))


class Adherence(NamedTuple):
    """How what was measured on generated clips follows what was requested, in its unit."""

    r2: float
    mae: float
    bias: float
    samples: int


def adherence(requested: Features, measured: Features) -> Adherence:
    """Compare one phenotype ``[sample]``; samples that could not be measured (NaN) are left out.

    ``r2`` is 1 - residual / total sum of squares about the line ``measured = requested``, so that a
    bias lowers it, and may be negative.

    Raises:
        DataError: not one finite request for each measured sample, fewer than three samples are
            left, or all requests are the same.
    """
    if np.shape(requested) != np.shape(measured):
        raise DataError(
            f"{np.shape(requested)} requests for {np.shape(measured)} samples: give one for each"
        )
    there = np.isfinite(measured)
    asked, found = np.asarray(requested)[there], np.asarray(measured)[there]
    if not np.isfinite(asked).all():
        raise DataError("a request is not finite: leave its sample out, or make it NaN as well")
    if len(asked) < 3 or np.ptp(asked) == 0:
        raise DataError(f"{len(asked)} measured samples say nothing: ask for 3 or more that differ")
    error = found - asked
    total = float(((asked - asked.mean()) ** 2).sum())
    return Adherence(
        r2=1 - float((error**2).sum()) / total,
        mae=float(np.abs(error).mean()),
        bias=float(error.mean()),
        samples=len(asked),
    )


class Tables(NamedTuple):
    """How two samples of phenotypes differ, in units of the first one's standard deviation.

    ``wasserstein`` is by name; ``correlation`` the root mean square difference of the two
    correlation matrices, over the columns of the second that vary; NaN where none does.
    """

    wasserstein: Mapping[str, float]
    correlation: float


def compare_tables(names: Sequence[str], real: Features, made: Features) -> Tables:
    """Compare samples ``[sample, phenotype]`` with columns in the order of ``names``.

    Raises:
        DataError: as `frechet_distance`, or a column of ``real`` does not vary.
    """
    _check(real, made)
    if real.shape[1] != len(names):
        raise DataError(f"{len(names)} names for {real.shape[1]} columns")
    scale = real.std(axis=0)
    if not (scale > 0).all():
        still = ", ".join(name for name, each in zip(names, scale, strict=True) if each == 0)
        raise DataError(f"{still}: all values are the same")
    distances = {
        name: float(wasserstein_distance(real[:, k], made[:, k]) / scale[k])
        for k, name in enumerate(names)
    }
    spread = made.std(axis=0) > 0
    kept = [np.corrcoef(each[:, spread], rowvar=False) for each in (real, made)]
    difference = np.atleast_2d(kept[0] - kept[1])
    return Tables(distances, math.sqrt(float((difference**2).mean())) if spread.any() else math.nan)


def _square_root(matrix: Features) -> Floats:
    values, vectors = eigh(matrix)
    return np.asarray((vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T)


def _check(first: Features, second: Features) -> None:
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise DataError(f"features of {first.shape} and {second.shape} cannot be compared")
    if min(len(first), len(second)) < 2:
        raise DataError("a distance needs at least two samples on either side")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise DataError("a feature is not finite: look at the clips that gave it")
