"""Noisy sums of patients' scores: evaluation is a release, too.

A patient's m scores are scaled by public ranges to [0, 1]^m, so that leaving the patient out
(zero-out) moves the vector of sums by at most sqrt(m) in the Euclidean norm. Gaussian noise of
standard deviation sigma · sqrt(m) on each sum makes the release a Gaussian mechanism of noise
multiplier sigma with sampling rate 1.

The sums are divided by a *public* number of patients. When a site really has n of the declared N,
the means are those of its patients times n / N, towards the lower end of each range: with n < N
figures of merit look worse and ``nmse`` looks better than it is. Figures of one job with the same
cohort may still be compared, as the factor is the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.privacy.noise import gaussian

SCORE_RANGES: Final[Mapping[str, tuple[float, float]]] = {
    "psnr": (10.0, 50.0),
    "ssim": (0.0, 1.0),
    "nmse": (0.0, 1.0),
}
"""Public lowest and highest value of each score that may leave a site; ``psnr`` in dB."""


def noisy_sums(
    per_patient: Sequence[Mapping[str, float]],
    names: Sequence[str],
    noise_multiplier: float | None,
) -> dict[str, float]:
    """Return the noisy sum over patients of each named score, scaled to [0, 1].

    Scores outside their range count as its nearer end; one that is missing or not finite adds
    nothing. Every call draws new noise and is a release; ``noise_multiplier`` None adds none.

    Raises:
        ConfigurationError: a score has no public range, or there is none or the same one twice.
    """
    if not names or len(set(names)) < len(names):
        raise ConfigurationError(f"evaluation metrics {list(names)}: name each of one or more once")
    _require_known(names)
    sums = np.array([math.fsum(_scaled(scores, name) for scores in per_patient) for name in names])
    if noise_multiplier is not None:
        sums += noise_multiplier * math.sqrt(len(names)) * gaussian(len(names))
    return dict(zip(names, sums.tolist(), strict=True))


def mean_scores(sums: Mapping[str, float], patients: float) -> dict[str, float]:
    """Return means in the scores' own units, clipped to their ranges, by a public number.

    See the module's text for the bias when ``patients`` is not the number of scored patients.

    Raises:
        ConfigurationError: a score has no public range, or ``patients`` is not positive.
    """
    _require_known(sums)
    if not patients > 0:
        raise ConfigurationError(f"evaluated patients are {patients}: give a positive number")
    means = {}
    for name, total in sums.items():
        low, high = SCORE_RANGES[name]
        means[name] = low + (high - low) * min(1.0, max(0.0, total / patients))
    return means


def _require_known(names: Sequence[str] | Mapping[str, float]) -> None:
    for name in names:
        if name not in SCORE_RANGES:
            known = ", ".join(SCORE_RANGES)
            raise ConfigurationError(f"score {name!r} has no public range: use {known}")


def _scaled(scores: Mapping[str, float], name: str) -> float:
    value = scores.get(name, math.nan)
    if not math.isfinite(value):
        return 0.0
    low, high = SCORE_RANGES[name]
    return min(1.0, max(0.0, (value - low) / (high - low)))
