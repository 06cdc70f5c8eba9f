"""Does a generator give back the patients that it learned from? Asked before it leaves a site.

After Dar et al. (Nature Biomedical Engineering 2025, arXiv 2402.01054): a network that recognises a
clip again is trained on the site's training patients, and clips are compared by the correlation of
what it says of them. A generated clip and a training clip are near when their correlation is above
*tau*, which 5 % of the training patients exceed with the nearest of the patients held out.

The rule. With as many synthetic clips as held-out patients, chance gives two shares for a generator
that copies nobody and whose clips are spread as new patients' are:

- of the training patients, 5 % are near a synthetic clip;
- of the synthetic clips, as many are near a training patient as of the held-out patients.

Each excess has a 99 % bootstrap interval. The generator *fails* when either lower bound is above 0
and *passes* otherwise. The first share sees many patients copied once, the second a few patients
copied often. The level is strict because one site that fails by chance keeps a model back: nominally
1 in 200 for each bound. With fewer than 19 training patients tau is the largest correlation of any
held-out patient, and chance fails more; `tests/shared/test_memorisation.py` holds how many.

The gate is *undecided* where copies could pass unseen: with fewer than 60 held-out patients; where tau
is 1 or no number, as held-out patients are training patients or the detector tells nobody apart; and
where nothing was found by a detector that misses more than 10 % of plain copies of the training
patients, made for the purpose.

What else is computed has no vote, as its expectation without copying is not known. The detector has
learned to hold the training patients apart, so distances to them are not distances to others.

Everything here depends on private data without noise. Nothing but the outcome is meant to leave a
site. A pass does not bound what an attacker may learn; that is what differential privacy is for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedcmr_shared.errors import ConfigurationError, DataError
from fedcmr_shared.models.copy_detector import (
    CopyDetector,
    CopyDetectorConfig,
    correlations,
    plainly_copied,
    train_detector,
)

Outcome = Literal["passed", "failed", "undecided"]
LEAST_HELD_OUT: Final = 60
"""Held-out patients below which the gate does not decide."""
_SAME: Final = 1e-9  # 1 - correlation of clips that differ by rounding alone; others are far above

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class GateConfig:
    """The detector, the share of training patients above tau, and the bootstrap's intervals.

    ``least_found`` is the share of plain copies that the detector has to find.
    """

    detector: CopyDetectorConfig = field(default_factory=CopyDetectorConfig)
    chance: float = 0.05
    least_found: float = 0.9
    confidence: float = 0.99
    resamples: int = 2000

    def __post_init__(self) -> None:
        for name in ("chance", "least_found", "confidence"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigurationError(f"{name} {getattr(self, name)} must lie between 0 and 1")
        if self.resamples < 100:
            raise ConfigurationError(f"resamples {self.resamples} must be at least 100")


class Excess(NamedTuple):
    """A share, what it is without copying, and the interval of their difference."""

    share: float
    chance: float
    interval: tuple[float, float]


class Neighbours(NamedTuple):
    """Where clips lie among the training clips; distances are ``sqrt(2 - 2 correlation)``.

    ``ratio`` is the median of the distance to the nearest over that to the second nearest, near 0
    for copies. ``authenticity`` is the share of clips that are further from their nearest training
    clip than that one is from its own nearest other (Alaa et al., ICML 2022), small for copies.
    """

    ratio: float
    authenticity: float


@dataclass(frozen=True)
class Findings:
    """What the gate saw, for the site's own report.

    ``training`` and ``synthetic`` are the two shares that decide. ``copies`` are the indices of the
    synthetic clips above tau, some of them by chance. ``made`` and ``held_out`` say how synthetic
    clips and held-out patients lie among the training patients. ``nearer_to_training`` is the share
    of synthetic clips that are nearer to a training patient than to equally many held-out ones.
    """

    tau: float
    training: Excess
    synthetic: Excess
    copies: tuple[int, ...]
    made: Neighbours
    held_out: Neighbours
    nearer_to_training: float


@dataclass(frozen=True)
class Examination:
    """The outcome, the numbers of patients, and the findings unless too few were held out.

    ``found`` is the share of plain copies of the training patients that the detector found.
    """

    outcome: Outcome
    training: int
    held_out: int
    findings: Findings | None
    found: float | None = None

    @property
    def text(self) -> str:
        """One line for the site's own log."""
        if self.findings is None:
            return f"undecided: {self.held_out} held-out patients, at least {LEAST_HELD_OUT} needed"
        found = self.findings
        if not found.tau < 1 - _SAME:
            return (
                f"undecided: with tau {found.tau:.3f} the detector does not tell held-out from "
                "training patients: hold out people who are not among these"
            )
        if self.outcome == "undecided":
            return (
                f"undecided: the detector found {100 * (self.found or 0):.0f} % of plain copies of "
                "training patients: it learned too little from these patients"
            )
        return (
            f"{self.outcome}: of {self.training} training patients {_told(found.training)} are "
            f"near a synthetic clip; of {self.held_out} synthetic clips {_told(found.synthetic)} "
            f"are near a training patient; tau {found.tau:.3f}"
        )


def examine(
    training: Tensor,
    validation: Tensor,
    synthetic: Tensor,
    config: GateConfig,
    generator: torch.Generator,
) -> Examination:
    """Examine clips ``[n, 1, frames, rows, columns]`` in [-1, 1], one of each patient.

    With too few held-out patients nothing is computed.

    Args:
        training: of the patients that the generator learned from.
        validation: of patients held out of everything: training, choices, fitted constants.
        synthetic: drawn by the generator, as many as ``validation``.
        config: how to examine.
        generator: source of all that is random.

    Raises:
        ConfigurationError: synthetic clips are not as many as held-out patients.
        DataError: clips have different shapes, or values that are not in [-1, 1]; or there are
            fewer than two training patients.
    """
    _check(training, validation, synthetic)
    sizes = len(training), len(validation)
    if len(validation) < LEAST_HELD_OUT:
        return Examination("undecided", *sizes, None)
    detector = train_detector(training, config.detector, generator)
    findings = compare(
        detector.embed(training),
        detector.embed(validation),
        detector.embed(synthetic),
        config,
        generator,
    )
    if not findings.tau < 1 - _SAME:  # nothing exceeds it, nor a value that is no number
        return Examination("undecided", *sizes, findings)
    found = _share_found(detector, training, findings.tau, generator)
    excess = max(findings.training.interval[0], findings.synthetic.interval[0])
    unseen: Outcome = "passed" if found >= config.least_found else "undecided"
    return Examination("failed" if excess > 0 else unseen, *sizes, findings, found)


def _share_found(
    detector: CopyDetector, training: Tensor, tau: float, generator: torch.Generator
) -> float:
    """Return the share of plain copies of the training clips that are nearer to these than tau."""
    copies = detector.embed(plainly_copied(training, generator))
    return float((_correlations(detector.embed(training), copies).max(0) > tau).mean())


def compare(
    training: Tensor,
    validation: Tensor,
    synthetic: Tensor,
    config: GateConfig,
    generator: torch.Generator,
) -> Findings:
    """Compare embeddings ``[n, embedding]``; as many synthetic as validation ones."""
    held_out, made = (_correlations(training, each) for each in (validation, synthetic))
    tau = _threshold(held_out.max(1), config.chance)
    others = _correlations(training, training)
    np.fill_diagonal(others, -1)
    return Findings(
        tau=float(tau),
        training=_training_excess(held_out.max(1), made.max(1), config, generator),
        synthetic=_synthetic_excess(held_out.max(0) > tau, made.max(0) > tau, config, generator),
        copies=tuple(int(index) for index in np.flatnonzero(made.max(0) > tau)),
        made=_neighbours(made, others),
        held_out=_neighbours(held_out, others),
        nearer_to_training=_nearer(made, _correlations(validation, synthetic), generator),
    )


def _correlations(first: Tensor, second: Tensor) -> Floats:
    return correlations(first.double(), second.double()).cpu().numpy()


def _threshold(nearest: Floats, chance: float) -> Floats:
    """The correlation that one more patient exceeds with probability ``chance``.

    Weibull's quantile has that property; the usual interpolation is exceeded more often. Fewer than
    1 / chance patients cannot tell, and give their largest.
    """
    return np.asarray(np.quantile(nearest, 1 - chance, axis=-1, method="weibull"))


def _training_excess(
    held_out: Floats, made: Floats, config: GateConfig, generator: torch.Generator
) -> Excess:
    """Training patients near a synthetic clip, from correlations with the nearest ``[patient]``.

    The bootstrap draws training patients and computes tau again, as tau is their quantile.
    """
    chance = max(config.chance, 1 / (len(made) + 1))
    share = float((made > _threshold(held_out, config.chance)).mean())
    drawn = _resampled(len(made), config, generator)
    taus = _threshold(held_out[drawn], config.chance)
    shares = (made[drawn] > taus[:, None]).mean(1)
    return Excess(share, chance, _interval(shares - chance, config))


def _synthetic_excess(
    held_out: NDArray[np.bool_],
    made: NDArray[np.bool_],
    config: GateConfig,
    generator: torch.Generator,
) -> Excess:
    """Synthetic clips near a training patient, against held-out patients ``[clip]``."""
    made_share, chance = (
        each[_resampled(len(each), config, generator)].mean(1) for each in (made, held_out)
    )
    interval = _interval(made_share - chance, config)
    return Excess(float(made.mean()), float(held_out.mean()), interval)


def _resampled(count: int, config: GateConfig, generator: torch.Generator) -> NDArray[np.int64]:
    return torch.randint(count, (config.resamples, count), generator=generator).numpy()


def _interval(values: Floats, config: GateConfig) -> tuple[float, float]:
    tail = (1 - config.confidence) / 2
    low, high = np.quantile(values, (tail, 1 - tail))
    return float(low), float(high)


def _neighbours(found: Floats, others: Floats) -> Neighbours:
    """Of clips with correlations ``[training, clip]``; ``others`` are [training, training]."""
    second, first = _distance(np.sort(found, axis=0)[-2:])
    ratio = float(np.median(first / np.maximum(second, 1e-12)))
    nearest = found.argmax(0)
    return Neighbours(ratio, float((first > _distance(others.max(1))[nearest]).mean()))


def _distance(correlation: Floats) -> Floats:
    return np.asarray(np.sqrt(np.clip(2 - 2 * correlation, 0, None)))


def _nearer(training: Floats, held_out: Floats, generator: torch.Generator) -> float:
    """Share of the columns whose largest value is in ``training``; both with as many rows."""
    rows = min(len(training), len(held_out))
    nearest, other = (
        each[torch.randperm(len(each), generator=generator)[:rows].numpy()].max(0)
        for each in (training, held_out)
    )
    return float(((nearest > other) + 0.5 * (nearest == other)).mean())


def _told(excess: Excess) -> str:
    low, high = (100 * bound for bound in excess.interval)
    return (
        f"{100 * excess.share:.0f} % (by chance {100 * excess.chance:.0f} %, "
        f"excess {low:.0f} to {high:.0f} points)"
    )


def _check(training: Tensor, validation: Tensor, synthetic: Tensor) -> None:
    named = {"training": training, "validation": validation, "synthetic": synthetic}
    for name, clips in named.items():
        if clips.ndim != 5 or clips.shape[1] != 1 or clips.shape[2:] != training.shape[2:]:
            raise DataError(
                f"{name} clips of shape {list(clips.shape)} cannot be compared with training clips "
                f"of {list(training.shape)}: give all as [n, 1, frames, rows, columns]"
            )
        if not (clips.abs() <= 1 + 1e-3).all():
            raise DataError(f"{name} clips have values that are not in [-1, 1]: scale them alike")
    if len(synthetic) != len(validation):
        raise ConfigurationError(
            f"{len(synthetic)} synthetic clips for {len(validation)} held-out patients: draw as "
            "many, as more would find more neighbours by chance"
        )
