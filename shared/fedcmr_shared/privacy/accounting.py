"""What releases cost: a Rényi filter certifies, privacy loss distributions report.

The *filter* adds Rényi divergences at one integer order that was fixed before the first release.
Its epsilon holds although later jobs are chosen after seeing earlier results (Feldman and Zrnic,
Individual privacy accounting via a Rényi filter, arXiv 2008.11193). The *PLD* figure is tighter
and holds had all jobs been fixed in advance. Opacus' PRV accountant is a cross-check of it.
Gaussian DP (the central-limit accountant) is no upper bound and is not used.

The relation is zero-out: one patient's contribution is replaced by zero while sampling rate,
steps, denominators and weights stay. It costs the same as adding or removing a patient (Kairouz et
al., arXiv 2103.00039; `REPLACE_SPECIAL` in dp-accounting), so the known figures of the
Poisson-subsampled Gaussian for add/remove are used.

A release with distributed noise has the Rényi divergence of a Gaussian one with the same noise
multiplier (why: :mod:`fedcmr_shared.privacy.distributed`), while its sum is what the release says.
No figure by PLD or PRV is known for it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Final, TypeAlias

from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.schemas.ledger import Release

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

RELATION: Final = "zero-out"
UNIT: Final = "patient"
SMALLEST_DELTA: Final = 1e-12
"""Below this, rounding errors of Fourier transforms could hide in a figure by PLD or PRV."""
LARGEST_ORDER: Final = 4096

# Grid of privacy losses, in units of epsilon. Below 1e-5 rounding errors outweigh the gain.
_COARSEST: Final = 1e-3
_FINEST: Final = 1e-5
_FINEST_RELATIVE: Final = 1e-6  # to the filter's figure: bounds memory and time
_REFINEMENT: Final = 10
_LARGEST_SELF_COMPOSITION: Final = 10_000
# Beyond these noise multipliers squares leave the range of floats (and a comparison with the NaN
# that follows would admit anything): below, the cost counts as infinite, above, as at the border.
_LEAST_NOISE: Final = 1e-6
_MOST_NOISE: Final = 1e6
_MOST_STEPS: Final = 10**15  # of one start; more count as infinite cost

_PRV_ERROR: Final = 0.01  # of epsilon
_MOST_PRV_POINTS: Final = 10**7

_Steps: TypeAlias = dict[tuple[float, float], int]


@dataclass(frozen=True)
class Figures:
    """Privacy of one patient over some releases, at ``delta``.

    ``rdp`` is the Rényi divergence at ``order``, ``filter_epsilon`` what it certifies,
    ``pld_epsilon`` the figure had all jobs been fixed in advance. Where noise was distributed
    there is neither a PLD nor a PRV figure, but None. ``prv_epsilon`` is None also when not asked
    for and where Opacus cannot compute it.
    """

    order: int
    delta: float
    rdp: float
    filter_epsilon: float
    pld_epsilon: float | None
    prv_epsilon: float | None


def rdp(release: Release, order: int) -> float:
    """Return the Rényi divergence at integer ``order`` of all steps of one start.

    Infinite for a release without noise. With distributed noise it holds for the sum over the
    sites that the release names, and for nothing less.

    Raises:
        ConfigurationError: ``order`` is not in [2, 4096].
    """
    _check_order(order)
    sigma = _counted_noise(release)
    if sigma is None or release.steps > _MOST_STEPS:
        return math.inf
    return release.steps * _step_rdp(release.sampling_rate, sigma, order)


def total_rdp(releases: Mapping[Release, int], order: int) -> float:
    """Return the Rényi divergence at ``order`` of ``releases``, each with its count of starts."""
    _check_counts(releases)
    return math.fsum(count * rdp(release, order) for release, count in releases.items() if count)


def epsilon_from_rdp(rdp: float, order: int, delta: float) -> float:
    """Return the least epsilon that a Rényi divergence at ``order`` gives for ``delta``.

    Canonne, Kamath and Steinke, arXiv 2004.00010, proposition 12; no divergence costs nothing.

    Raises:
        ConfigurationError: ``order`` is not in [2, 4096] or ``delta`` not in [1e-12, 1).
    """
    return 0.0 if rdp == 0 else max(0.0, rdp + _conversion(order, delta))


def rdp_limit(epsilon: float, delta: float, order: int) -> float:
    """Return the largest Rényi divergence at ``order`` that certifies ``epsilon`` at ``delta``.

    Raises:
        ConfigurationError: no divergence does, ``epsilon`` is not positive and finite, ``order``
            not in [2, 4096], or ``delta`` not in [1e-12, 1).
    """
    _check_epsilon(epsilon)
    limit = _limit(epsilon, delta, order)
    if limit <= 0:
        raise ConfigurationError(
            f"epsilon {epsilon:g} is out of reach at delta {delta:g} and order {order}: "
            f"use a higher order, or epsilon above {epsilon - limit:.3g}"
        )
    while epsilon_from_rdp(limit, order, delta) > epsilon:
        limit = math.nextafter(limit, 0.0)
    return limit


def best_order(epsilon: float, delta: float) -> int:
    """Return the integer order at which most steps of the Gaussian mechanism fit the budget.

    A step costs in proportion to the order, so the best one has the largest limit per order.

    Raises:
        ConfigurationError: ``epsilon`` is not positive and finite or too small for any order up
            to 4096, or ``delta`` is not in [1e-12, 1).
    """
    _check_epsilon(epsilon)
    orders = range(2, LARGEST_ORDER + 1)
    order = max(orders, key=lambda order: _limit(epsilon, delta, order) / order)
    if _limit(epsilon, delta, order) <= 0:
        raise ConfigurationError(
            f"epsilon {epsilon:g} is out of reach at delta {delta:g}: use a larger one of them"
        )
    return order


def pld_epsilon(
    releases: Mapping[Release, int], delta: float, *, interval: float = _COARSEST
) -> float:
    """Return epsilon at ``delta`` of all releases, each with its count of starts, by PLD.

    dp-accounting discretises privacy losses on a grid with steps of ``interval`` and rounds so
    that the result is an upper bound on any grid (Doroshenko et al., arXiv 2207.04380). Infinite
    for releases without noise, and where losses leave the range of floats.

    Raises:
        ConfigurationError: ``delta`` is not in [1e-12, 1), ``interval`` not positive, or noise is
            distributed.
    """
    _check_delta(delta)
    _check_own_noise(releases)
    if not interval > 0:
        raise ConfigurationError(f"interval is {interval:g}: it must be positive")
    steps = _steps_per_mechanism(releases)
    if steps is None:
        return math.inf
    try:
        return float(_composed(steps, interval).get_epsilon_for_delta(delta))
    except OverflowError:
        return math.inf


def prv_epsilon(releases: Mapping[Release, int], delta: float) -> float:
    """Return epsilon at ``delta`` by Opacus' PRV accountant, its error of 0.01 added.

    Gopi, Lee and Wutschitz, arXiv 2106.02848. Slow for many different mechanisms.

    Raises:
        ConfigurationError: ``delta`` is not in [1e-12, 1), noise is distributed, or this is beyond
            Opacus.
    """
    _check_delta(delta)
    _check_own_noise(releases)
    steps = _steps_per_mechanism(releases)
    if not steps:
        return 0.0 if steps is not None else math.inf
    if _prv_points(releases, steps, delta) > _MOST_PRV_POINTS:
        raise ConfigurationError("too many steps for Opacus PRV: leave it out")
    import numpy as np
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(sigma, q, count) for (q, sigma), count in sorted(steps.items())]
    try:
        # Its densities divide by zero and overflow where they are replaced afterwards; it warns of
        # loose Rényi bounds, which only widen its grid.
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(accountant.get_epsilon(delta, eps_error=_PRV_ERROR))
    except (ArithmeticError, RuntimeError, ValueError) as error:
        raise ConfigurationError(f"Opacus PRV cannot compute this epsilon: {error}") from error


def figures(
    releases: Mapping[Release, int], order: int, delta: float, *, prv: bool = False
) -> Figures:
    """Return the figures of ``releases``, each with its count of starts.

    The PLD grid is refined while its figure exceeds the filter's. Both bound the same epsilon
    from above, so where even the finest grid rounds too much, the filter's figure is reported as
    the PLD one.

    Raises:
        ConfigurationError: ``order`` is not in [2, 4096] or ``delta`` not in [1e-12, 1).
    """
    divergence = total_rdp(releases, order)
    filter_epsilon = epsilon_from_rdp(divergence, order, delta)
    return Figures(
        order=order,
        delta=delta,
        rdp=divergence,
        filter_epsilon=filter_epsilon,
        pld_epsilon=None if _shared(releases) else _refined_pld(releases, delta, filter_epsilon),
        prv_epsilon=_prv_or_none(releases, delta) if prv else None,
    )


def accountant_versions() -> dict[str, str]:
    """Return the versions of the packages behind the figures."""
    return {name: version(name) for name in ("dp-accounting", "fedcmr", "opacus")}


@lru_cache(maxsize=4096)
def _step_rdp(sampling_rate: float, noise_multiplier: float, order: int) -> float:
    """Return the Rényi divergence of one Poisson-subsampled Gaussian step.

    Mironov, Talwar and Zhang, arXiv 1908.10530, section 3.3: the moment is the mean over
    k ~ Binomial(order, q) of exp((k^2 - k) / (2 sigma^2)). We sum its excess over one, whose terms
    are all positive: no digits cancel where q is small or sigma large.
    """
    q = sampling_rate
    if q == 1:
        return order / (2 * noise_multiplier**2)
    log_terms = [
        _log_binomial(order, k)
        + k * math.log(q)
        + (order - k) * math.log1p(-q)
        + _log_expm1(k * (k - 1) / (2 * noise_multiplier**2))
        for k in range(2, order + 1)
    ]
    peak = max(log_terms)
    log_excess = peak + math.log(math.fsum(math.exp(term - peak) for term in log_terms))
    return _log_1p_exp(log_excess) / (order - 1)


def _log_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _log_expm1(x: float) -> float:
    """Return log(exp(x) - 1) for x > 0."""
    return math.log(math.expm1(x)) if x < 1 else x + math.log1p(-math.exp(-x))


def _log_1p_exp(x: float) -> float:
    """Return log(1 + exp(x))."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _conversion(order: int, delta: float) -> float:
    """Return what epsilon exceeds a Rényi divergence by."""
    _check_order(order)
    _check_delta(delta)
    return math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)


def _limit(epsilon: float, delta: float, order: int) -> float:
    return epsilon - _conversion(order, delta)


def _steps_per_mechanism(releases: Mapping[Release, int]) -> _Steps | None:
    """Return steps by (sampling rate, noise multiplier); None if anything went without noise."""
    _check_counts(releases)
    steps: _Steps = {}
    for release, count in releases.items():
        if not count:
            continue
        sigma = _counted_noise(release)
        if sigma is None:
            return None
        mechanism = (release.sampling_rate, sigma)
        steps[mechanism] = steps.get(mechanism, 0) + count * release.steps
    return steps


def _counted_noise(release: Release) -> float | None:
    """Return the noise multiplier to count with; None if as good as none."""
    sigma = release.noise_multiplier
    return None if sigma is None or sigma < _LEAST_NOISE else min(sigma, _MOST_NOISE)


def _refined_pld(releases: Mapping[Release, int], delta: float, bound: float) -> float:
    if bound in (0.0, math.inf):
        return bound
    finest = max(_FINEST, _FINEST_RELATIVE * bound)
    interval = max(_COARSEST, finest)
    epsilon = pld_epsilon(releases, delta, interval=interval)
    while epsilon > bound and interval > finest:
        interval = max(interval / _REFINEMENT, finest)
        epsilon = pld_epsilon(releases, delta, interval=interval)
    return min(epsilon, bound)


def _composed(steps: _Steps, interval: float) -> PrivacyLossDistribution:
    from dp_accounting.pld import privacy_loss_distribution as pld

    composed = pld.identity(value_discretization_interval=interval)
    for (sampling_rate, noise_multiplier), count in sorted(steps.items()):
        step = pld.from_gaussian_mechanism(
            noise_multiplier, value_discretization_interval=interval, sampling_prob=sampling_rate
        )
        composed = composed.compose(_self_composed(step, count))
    return composed


def _self_composed(step: PrivacyLossDistribution, count: int) -> PrivacyLossDistribution:
    # dp-accounting computes (points on the grid) ** count as an exact integer: minutes for 10^8.
    if count <= _LARGEST_SELF_COMPOSITION:
        return step.self_compose(count)
    many, rest = divmod(count, _LARGEST_SELF_COMPOSITION)
    whole = _self_composed(step.self_compose(_LARGEST_SELF_COMPOSITION), many)
    return whole.compose(step.self_compose(rest)) if rest else whole


def _prv_points(releases: Mapping[Release, int], steps: _Steps, delta: float) -> float:
    """Return about how many points PRV's grid has: the losses' range over the mesh size."""
    orders = (2, 4, 8, 16, 32, 64)
    reach = min(epsilon_from_rdp(total_rdp(releases, order), order, delta) for order in orders)
    reach = max(3.0, reach)  # the narrowest range that Opacus uses
    mesh = _PRV_ERROR / math.sqrt(sum(steps.values()) * math.log(12_000 / delta) / 2)
    return 2 * reach / mesh


def _prv_or_none(releases: Mapping[Release, int], delta: float) -> float | None:
    try:
        return prv_epsilon(releases, delta)
    except ConfigurationError:
        return None


def _shared(releases: Mapping[Release, int]) -> bool:
    """Whether anything was released with distributed noise."""
    return any(count and release.distributed for release, count in releases.items())


def _check_own_noise(releases: Mapping[Release, int]) -> None:
    if _shared(releases):
        raise ConfigurationError(
            "noise is distributed: only its Rényi divergence is known, so take the filter's figure"
        )


def _check_epsilon(epsilon: float) -> None:
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ConfigurationError(f"epsilon is {epsilon:g}: it must be positive and finite")


def _check_order(order: int) -> None:
    if not 2 <= order <= LARGEST_ORDER:
        raise ConfigurationError(f"order is {order}: it must be an integer in [2, {LARGEST_ORDER}]")


def _check_delta(delta: float) -> None:
    if not SMALLEST_DELTA <= delta < 1:
        raise ConfigurationError(f"delta is {delta:g}: it must be in [{SMALLEST_DELTA:g}, 1)")


def _check_counts(releases: Mapping[Release, int]) -> None:
    if any(count < 0 for count in releases.values()):
        raise ValueError("a release cannot have been started a negative number of times")
