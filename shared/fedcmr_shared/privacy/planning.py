"""Which noise, rounds or local steps fit a budget: arithmetic before anything is admitted.

A plan reserves its spare rounds as well, as admission to a ledger does. It is about the patients
that a job trains on; scoring held-out patients costs those patients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.privacy.accounting import (
    best_order,
    epsilon_from_rdp,
    figures,
    rdp,
    rdp_limit,
)
from fedcmr_shared.schemas.ledger import Release

SAMPLING_RATES: Final = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Candidates when the user names none."""

_GRID: Final = 1000  # noise multipliers are multiples of 1/1000
_LARGEST_NOISE: Final = 10_000
_MOST: Final = 1_000_000


@dataclass(frozen=True)
class Allowance:
    """What a patient may cost: a budget of the filter, less a divergence spent already.

    Raises:
        ConfigurationError: the budget certifies nothing, or ``spent_rdp`` leaves nothing of it.
    """

    epsilon: float
    delta: float
    order: int
    spent_rdp: float = 0.0

    def __post_init__(self) -> None:
        if not self.spent_rdp >= 0:
            raise ConfigurationError(f"spent RDP is {self.spent_rdp:g}: it cannot be negative")
        if not self.remaining_rdp > 0:
            raise ConfigurationError(
                f"spent RDP {self.spent_rdp:g} leaves nothing of the {self.limit_rdp:.4g} that "
                f"epsilon {self.epsilon:g} allows at order {self.order}"
            )

    @classmethod
    def of(
        cls, epsilon: float, delta: float, order: int | None = None, spent_rdp: float = 0.0
    ) -> Allowance:
        """Return an allowance at ``order``, by default the one that a new ledger would take."""
        order = best_order(epsilon, delta) if order is None else order
        return cls(epsilon, delta, order, spent_rdp)

    @property
    def limit_rdp(self) -> float:
        """Rényi divergence at the order that the budget allows."""
        return rdp_limit(self.epsilon, self.delta, self.order)

    @property
    def remaining_rdp(self) -> float:
        """What of the limit is not spent."""
        return self.limit_rdp - self.spent_rdp


@dataclass(frozen=True)
class Outline:
    """A job's numbers. One of rounds, local steps and noise multiplier is None: to be found.

    ``cohort_size`` is the coarse number of training patients that the job declares.

    Raises:
        ConfigurationError: a number is out of range, or not exactly one is to be found.
    """

    rounds: int | None
    local_steps: int | None
    noise_multiplier: float | None
    cohort_size: int
    spare_rounds: int = 0

    def __post_init__(self) -> None:
        unknown = [self.rounds, self.local_steps, self.noise_multiplier].count(None)
        if unknown != 1:
            raise ConfigurationError(
                "give two of rounds, local steps and noise multiplier: the third is computed"
            )
        for name in ("rounds", "local_steps", "noise_multiplier", "cohort_size"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ConfigurationError(f"{name} is {value:g}: it must be positive and finite")
        if self.spare_rounds < 0:
            raise ConfigurationError(f"spare_rounds is {self.spare_rounds}: it must not be below 0")


@dataclass(frozen=True)
class Plan:
    """Numbers that fit an allowance, and what they cost a patient.

    ``filter_epsilon`` and ``pld_epsilon`` are those of the planned rounds alone;
    ``reserved_epsilon`` is the filter's figure once the spare rounds are used up as well, on top
    of what was spent before. ``expected_patients`` are drawn in a step. ``relative_noise`` is the
    standard deviation, per coordinate, of the noise in the mean of all steps' mean gradients, in
    units of the clip norm: the smaller, the better the gradient survives.
    """

    sampling_rate: float
    noise_multiplier: float
    rounds: int
    spare_rounds: int
    local_steps: int
    filter_epsilon: float
    pld_epsilon: float | None
    reserved_epsilon: float
    expected_patients: float
    relative_noise: float


def noise_multiplier_for(
    allowance: Allowance, *, sampling_rate: float, local_steps: int, starts: int
) -> float:
    """Return the smallest noise multiplier, in thousandths, with which ``starts`` rounds fit.

    Raises:
        ConfigurationError: not even a noise multiplier of 10,000 fits, or ``sampling_rate`` is
            not in (0, 1].
    """

    def fits(thousandths: int) -> bool:
        release = _release(sampling_rate, thousandths / _GRID, local_steps)
        return starts * rdp(release, allowance.order) <= allowance.remaining_rdp

    low, high = 0, _LARGEST_NOISE * _GRID
    if not fits(high):
        raise ConfigurationError(
            f"no noise is large enough for {starts} rounds of {local_steps} steps at sampling rate "
            f"{sampling_rate:g}: raise epsilon, or plan fewer rounds"
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high / _GRID


def starts_left(allowance: Allowance, release: Release) -> int:
    """Return how often ``release`` fits, at most a million times; never without noise."""
    return _largest_multiple(rdp(release, allowance.order), allowance.remaining_rdp)


def make_plan(allowance: Allowance, outline: Outline, sampling_rate: float) -> Plan | None:
    """Return ``outline`` completed to use the allowance up at ``sampling_rate``.

    None if not one round, or not one local step, fits besides the spare rounds.

    Raises:
        ConfigurationError: ``sampling_rate`` is not in (0, 1], or no noise is large enough.
    """
    rounds, local_steps, noise_multiplier = _complete(allowance, outline, sampling_rate)
    if rounds < 1 or local_steps < 1:
        return None
    release = _release(sampling_rate, noise_multiplier, local_steps)
    cost = figures({release: rounds}, allowance.order, allowance.delta)
    spare = outline.spare_rounds * rdp(release, allowance.order)
    reserved = allowance.spent_rdp + cost.rdp + spare
    expected_patients = sampling_rate * outline.cohort_size
    return Plan(
        sampling_rate=sampling_rate,
        noise_multiplier=noise_multiplier,
        rounds=rounds,
        spare_rounds=outline.spare_rounds,
        local_steps=local_steps,
        filter_epsilon=cost.filter_epsilon,
        pld_epsilon=cost.pld_epsilon,
        reserved_epsilon=epsilon_from_rdp(reserved, allowance.order, allowance.delta),
        expected_patients=expected_patients,
        relative_noise=noise_multiplier / (expected_patients * math.sqrt(rounds * local_steps)),
    )


def make_plans(
    allowance: Allowance, outline: Outline, sampling_rates: Sequence[float]
) -> list[Plan]:
    """Return one plan for each of ``sampling_rates`` at which something fits.

    Raises:
        ConfigurationError: nothing fits at any of them.
    """
    plans = (make_plan(allowance, outline, rate) for rate in sampling_rates)
    fitting = [plan for plan in plans if plan is not None]
    if not fitting:
        raise ConfigurationError(
            f"not one round fits epsilon {allowance.epsilon:g} at delta {allowance.delta:g} with "
            f"{outline.spare_rounds} spare rounds: raise the noise multiplier or epsilon, or lower "
            "the sampling rate, the local steps or the spare rounds"
        )
    return fitting


def sensible_rates(cohort_size: int) -> list[float]:
    """Return the candidate sampling rates that draw at least one patient on average."""
    return [rate for rate in SAMPLING_RATES if rate * cohort_size >= 1]


def _complete(
    allowance: Allowance, outline: Outline, sampling_rate: float
) -> tuple[int, int, float]:
    """Return rounds, local steps and noise multiplier; below one where nothing fits."""
    rounds, steps, noise = outline.rounds, outline.local_steps, outline.noise_multiplier
    spare = outline.spare_rounds
    if rounds is None and steps is not None and noise is not None:
        fitting = starts_left(allowance, _release(sampling_rate, noise, steps))
        return fitting - spare, steps, noise
    if steps is None and rounds is not None and noise is not None:
        step = rdp(_release(sampling_rate, noise, 1), allowance.order)
        return rounds, _largest_multiple((rounds + spare) * step, allowance.remaining_rdp), noise
    if noise is None and rounds is not None and steps is not None:
        least = noise_multiplier_for(
            allowance, sampling_rate=sampling_rate, local_steps=steps, starts=rounds + spare
        )
        return rounds, steps, least
    raise AssertionError("an outline lacks exactly one number")


def _largest_multiple(cost: float, available: float) -> int:
    """Return the largest n up to a million with n * cost <= available."""
    if _MOST * cost <= available:
        return _MOST
    multiple = int(available / cost)
    while multiple * cost > available:
        multiple -= 1
    return multiple


def _release(sampling_rate: float, noise_multiplier: float, steps: int) -> Release:
    if not 0 < sampling_rate <= 1:
        raise ConfigurationError(f"sampling rate is {sampling_rate:g}: it must be in (0, 1]")
    return Release(sampling_rate=sampling_rate, noise_multiplier=noise_multiplier, steps=steps)
