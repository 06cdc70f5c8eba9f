"""Noisy totals of patients' scores: evaluation is a release, too.

For each of a job's m metrics, and whatever the data are, a site gives the same tensors:

=================  ==============================================================
``M/sum``          sum over patients of the score, scaled by public ranges to [0, 1]
``M/patients``     number of patients with such a score
``M/histogram``    number of patients in each of b equal bins of [0, 1], if b > 0
=================  ==============================================================

Totals of several sites add up, and their means and histograms are those of all patients.

**Sensitivity.** Leaving a patient out (zero-out) moves ``M/sum`` by at most 1, ``M/patients`` by at
most 1 and one coordinate of ``M/histogram`` by at most 1, and no other coordinate of M. So the vector
of all totals moves by at most sqrt(m · k) in the Euclidean norm, with k = 2, or 3 with a histogram.
Gaussian noise of standard deviation sigma · sqrt(m · k) on every coordinate makes the release a
Gaussian mechanism of noise multiplier sigma with sampling rate 1. A metric that a site does not
let out is zero for all its patients, which moves the vector by less.

The outcome of a generator's memorisation gate leaves by the same way, as one bit:
``memorisation/passed`` is 1 where the gate passed, and 0 where it failed or could not decide. It has no
noise and no epsilon, which every claim says. ``energy/kwh``, where a job asks for it, has none either:
each site's term is rounded up instead, and the ledger does not know of it, but the model's card does.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.metrics.memorisation import Outcome
from fedcmr_shared.privacy.noise import gaussian
from fedcmr_shared.schemas.job import SIZE_CLASS_WEIGHTS, JobSpec
from fedcmr_shared.schemas.privacy import EvaluationSpec

SCORE_RANGES: Final[Mapping[str, tuple[float, float]]] = {
    "psnr": (10.0, 50.0),
    "ssim": (0.0, 1.0),
    "nmse": (0.0, 1.0),
}
"""Public lowest and highest value of each score that may leave a site; ``psnr`` in dB."""

UNPROTECTED: Final = EvaluationSpec(
    noise_multiplier=None, rounds="all", metrics=("psnr", "ssim", "nmse")
)
"""What a simulated job without privacy evaluates."""

PASSED: Final = "memorisation/passed"
"""Name of the total that counts the sites whose memorisation gate passed."""

ENERGY: Final = "energy/kwh"
"""Name of the total of the energy that a job took, each site's term rounded up."""

_ROOM: Final = 10.0  # for sites with more patients than the job declares
_NOISE_DEVIATIONS: Final = 8.0


@dataclass(frozen=True)
class Histogram:
    """Patients per bin: ``counts[i]`` between ``edges[i]`` and ``edges[i + 1]``, in own units."""

    edges: tuple[float, ...]
    counts: tuple[float, ...]


def totals_layout(job: JobSpec) -> dict[str, tuple[int, float]]:
    """Return the length of each of a site's totals, and a public bound of its values.

    The bound holds ten times the declared patients of the largest size class, and the noise;
    larger totals are cut at it in a secure sum.

    Raises:
        ConfigurationError: a metric is named twice.
    """
    spec = UNPROTECTED if job.privacy is None else job.privacy.evaluation
    energy = {ENERGY: (1, job.resources.energy_kwh)} if spec.energy_total else {}
    if spec.memorisation:
        return {PASSED: (1, 1.0)} | energy
    noise = (spec.noise_multiplier or 0.0) * sensitivity(len(spec.metrics), spec.histogram_bins)
    patients = spec.cohort_size * max(SIZE_CLASS_WEIGHTS.values())
    bound = _ROOM * patients + _NOISE_DEVIATIONS * noise
    lengths = _lengths(spec.metrics, spec.histogram_bins)
    return {name: (length, bound) for name, length in lengths.items()} | energy


def sensitivity(metrics: int, histogram_bins: int) -> float:
    """Return the Euclidean norm by which one patient moves the totals at most."""
    return math.sqrt(metrics * (3 if histogram_bins else 2))


def noisy_totals(
    per_patient: Sequence[Mapping[str, float]],
    metrics: Sequence[str],
    noise_multiplier: float | None,
    histogram_bins: int = 0,
    allowed: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Return noisy totals as float64 tensors of shape (1,), or (histogram_bins,).

    Scores outside their range count as its nearer end; one that is missing or not finite adds to
    none of the totals. Of ``allowed`` metrics only, when given; the others are noise around zero.
    Every call draws new noise and is a release; ``noise_multiplier`` None adds none.

    Raises:
        ConfigurationError: a metric has no public range, or there is none or the same one twice.
    """
    totals: dict[str, NDArray[np.float64]] = {}
    for name, length in _lengths(metrics, histogram_bins).items():
        metric, _, kind = name.partition("/")
        shown = allowed is None or metric in allowed
        totals[name] = _total(_scaled(per_patient, metric) if shown else [], kind, length)
    if noise_multiplier is not None:
        deviation = noise_multiplier * sensitivity(len(metrics), histogram_bins)
        for total in totals.values():
            total += deviation * gaussian(len(total))
    return {name: torch.from_numpy(total) for name, total in totals.items()}


def energy_totals(kwh: float) -> dict[str, Tensor]:
    """Return one site's term of the energy that a job took."""
    return {ENERGY: torch.tensor([kwh], dtype=torch.float64)}


def energy_kwh(totals: Mapping[str, Tensor]) -> float | None:
    """Return the energy that all sites' terms add up to in kWh; None when nobody asked."""
    total = totals.get(ENERGY)
    return None if total is None else round(float(total), 1)


def gate_totals(outcome: Outcome) -> dict[str, Tensor]:
    """Return one site's bit, without noise: 1 if its memorisation gate passed, else 0."""
    return {PASSED: torch.tensor([float(outcome == "passed")], dtype=torch.float64)}


def gates_passed(totals: Mapping[str, Tensor]) -> int | None:
    """Return at how many sites the gate passed; None when the totals are none of a gate."""
    total = totals.get(PASSED)
    return None if total is None else round(float(total))


def mean_scores(totals: Mapping[str, Tensor]) -> dict[str, float]:
    """Return each metric's mean over patients in its own units, clipped to its range.

    ``totals`` may be the sum over several sites. A number of patients below one counts as one, so
    that noise alone never becomes a large mean.

    Raises:
        ConfigurationError: a metric has no public range, or its total is not complete.
    """
    means = {}
    for metric in _metrics_of(totals):
        low, high = SCORE_RANGES[metric]
        patients = max(float(totals[f"{metric}/patients"]), 1.0)
        share = float(totals[f"{metric}/sum"]) / patients
        means[metric] = low + (high - low) * min(1.0, max(0.0, share))
    return means


def histograms(totals: Mapping[str, Tensor]) -> dict[str, Histogram]:
    """Return each metric's histogram, where there is one; negative counts, from noise, are zero.

    Raises:
        ConfigurationError: as `mean_scores`.
    """
    found = {}
    for metric in _metrics_of(totals):
        counts = totals.get(f"{metric}/histogram")
        if counts is not None:
            edges = np.linspace(*SCORE_RANGES[metric], len(counts) + 1)
            found[metric] = Histogram(tuple(edges.tolist()), tuple(counts.clamp(min=0).tolist()))
    return found


def _lengths(metrics: Sequence[str], histogram_bins: int) -> dict[str, int]:
    if not metrics or len(set(metrics)) < len(metrics):
        raise ConfigurationError(
            f"evaluation metrics {list(metrics)}: name each of one or more once"
        )
    lengths: dict[str, int] = {}
    for metric in metrics:
        _require_known(metric)
        lengths |= {f"{metric}/sum": 1, f"{metric}/patients": 1}
        if histogram_bins:
            lengths[f"{metric}/histogram"] = histogram_bins
    return lengths


def _total(shares: Sequence[float], kind: str, length: int) -> NDArray[np.float64]:
    if kind == "sum":
        return np.array([math.fsum(shares)])
    if kind == "patients":
        return np.array([float(len(shares))])
    bins = [min(int(share * length), length - 1) for share in shares]
    return np.bincount(bins, minlength=length).astype(np.float64)


def _scaled(per_patient: Sequence[Mapping[str, float]], metric: str) -> list[float]:
    """Return the scores of the patients who have one, scaled to [0, 1]."""
    low, high = SCORE_RANGES[metric]
    scores = (scores.get(metric, math.nan) for scores in per_patient)
    finite = (score for score in scores if math.isfinite(score))
    return [min(1.0, max(0.0, (score - low) / (high - low))) for score in finite]


def _metrics_of(totals: Mapping[str, Tensor]) -> list[str]:
    scores = (name for name in totals if name != ENERGY)
    metrics = list(dict.fromkeys(name.partition("/")[0] for name in scores))
    for metric in metrics:
        _require_known(metric)
        for kind in ("sum", "patients"):
            if f"{metric}/{kind}" not in totals or totals[f"{metric}/{kind}"].numel() != 1:
                raise ConfigurationError(f"the totals have no single {metric}/{kind}")
    return metrics


def _require_known(metric: str) -> None:
    if metric not in SCORE_RANGES:
        known = ", ".join(SCORE_RANGES)
        raise ConfigurationError(f"score {metric!r} has no public range: use {known}")
