"""Accountants against golden figures, independent implementations and laws."""

import math
import random
import subprocess
import sys
import time
from importlib.metadata import version

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.privacy.accounting import (
    accountant_versions,
    best_order,
    epsilon_from_rdp,
    figures,
    pld_epsilon,
    prv_epsilon,
    rdp,
    rdp_limit,
    total_rdp,
)
from fedcmr_shared.schemas.ledger import Release

# Sampling rate, noise multiplier, steps, delta, epsilon by pessimistic PLD on a grid of 1e-4.
GOLDEN = [
    (0.01, 0.6, 1000, 1e-5, 7.434),
    (0.01, 1.0, 10000, 1e-5, 6.188),
    (0.05, 0.8, 1000, 1e-5, 17.581),
    (0.05, 1.0, 1000, 1e-5, 10.987),
    (0.1, 1.0, 1000, 1e-5, 25.205),
    (0.25, 1.0, 100, 1e-5, 18.463),
    (0.25, 2.0, 1000, 1e-5, 25.957),
    (0.1, 4.0, 10000, 1e-5, 13.498),
    (0.25, 4.0, 10000, 1e-5, 46.260),
    (0.05, 2.0, 400, 1e-5, 2.246),
    (0.02, 1.0, 400, 5e-4, 1.736),
    (1.0, 4.0, 100, 1e-5, 13.207),
]

rates = st.one_of(st.floats(0.001, 1), st.just(1.0))
noises = st.floats(0.5, 20)
orders = st.integers(2, 64)
deltas = st.floats(1e-9, 1e-2)


def release(sampling_rate: float, noise_multiplier: float | None, steps: int = 1) -> Release:
    return Release(sampling_rate=sampling_rate, noise_multiplier=noise_multiplier, steps=steps)


releases = st.builds(release, rates, noises, st.integers(1, 50))


class TestRenyi:
    @pytest.mark.parametrize(("q", "sigma", "steps", "delta", "_"), GOLDEN)
    @pytest.mark.parametrize("order", [2, 5, 16])
    def test_opacus_and_dp_accounting_agree_at_integer_orders(
        self, q: float, sigma: float, steps: int, delta: float, _: float, order: int
    ) -> None:
        from opacus.accountants.analysis.rdp import compute_rdp

        ours = rdp(release(q, sigma, steps), order)
        opacus = compute_rdp(q=q, noise_multiplier=sigma, steps=steps, orders=[order])
        assert ours == pytest.approx(float(opacus[0]), rel=1e-9)
        google = RdpAccountant([order])
        gaussian = dp_accounting.GaussianDpEvent(sigma)
        google.compose(dp_accounting.PoissonSampledDpEvent(q, gaussian), steps)
        ours_epsilon = epsilon_from_rdp(ours, order, delta)
        assert ours_epsilon == pytest.approx(google.get_epsilon(delta), rel=1e-9)

    @pytest.mark.parametrize(
        ("q", "sigma", "order"), [(0.3, 1.5, 3), (0.01, 0.9, 2), (0.5, 4.0, 12), (1.0, 2.0, 5)]
    )
    def test_integral_of_the_definition_agrees(self, q: float, sigma: float, order: int) -> None:
        without = stats.norm(0, sigma)
        drawn = stats.norm(1, sigma)

        def integrand(x: float) -> float:
            ratio = 1 - q + q * math.exp(drawn.logpdf(x) - without.logpdf(x))
            return float(without.pdf(x)) * ratio**order

        span = 15 * sigma + order
        moment, _ = integrate.quad(integrand, -span, span, epsabs=0, epsrel=1e-11, limit=500)
        assert rdp(release(q, sigma), order) == pytest.approx(
            math.log(moment) / (order - 1), rel=1e-8
        )

    def test_tiny_cost_keeps_its_digits(self) -> None:
        # At order 2 the moment is 1 + q^2 (e^(1/sigma^2) - 1), which rounds to 1 here.
        cost = rdp(release(1e-7, 50.0), 2)
        assert cost == pytest.approx(1e-14 * math.expm1(1 / 2500), rel=1e-12)

    @settings(max_examples=60)
    @given(rates, noises, st.integers(1, 1000), orders, st.floats(1.01, 3))
    def test_cost_grows_with_rate_steps_and_order_and_falls_with_noise(
        self, q: float, sigma: float, steps: int, order: int, factor: float
    ) -> None:
        cost = rdp(release(q, sigma, steps), order)
        rounding = 1 + 1e-12
        assert cost > 0
        assert rdp(release(min(1.0, q * factor), sigma, steps), order) * rounding >= cost
        assert rdp(release(q, sigma * factor, steps), order) < cost
        assert rdp(release(q, sigma, steps + 1), order) > cost
        assert rdp(release(q, sigma, steps), order + 1) * rounding >= cost

    def test_sampling_amplifies(self) -> None:
        assert rdp(release(0.1, 1.0), 4) < 0.1 * rdp(release(1.0, 1.0), 4)

    def test_no_noise_is_infinite_and_noise_beyond_floats_is_neither_free_nor_finite(self) -> None:
        assert rdp(release(0.1, None), 4) == math.inf
        assert rdp(release(0.1, 1e-200), 4) == math.inf
        assert rdp(release(0.1, 1e200), 4) == rdp(release(0.1, 1e6), 4) > 0
        assert rdp(release(0.1, 1.0, steps=10**400), 4) == math.inf

    @pytest.mark.parametrize("order", [-1, 0, 1, 5000])
    def test_other_orders_are_refused(self, order: int) -> None:
        with pytest.raises(ConfigurationError, match=f"order is {order}"):
            rdp(release(0.1, 1.0), order)


class TestConversion:
    @settings(max_examples=80)
    @given(st.floats(0.1, 50), deltas, orders)
    def test_limit_is_the_largest_divergence_that_keeps_epsilon(
        self, epsilon: float, delta: float, order: int
    ) -> None:
        try:
            limit = rdp_limit(epsilon, delta, order)
        except ConfigurationError:
            assert epsilon_from_rdp(1e-12, order, delta) > epsilon - 1e-9
            return
        assert epsilon_from_rdp(limit, order, delta) <= epsilon
        assert epsilon_from_rdp(limit * (1 + 1e-9) + 1e-9, order, delta) > epsilon

    @pytest.mark.parametrize("sigma", [0.7, 2.0, 10.0])
    def test_conversion_bounds_the_exact_gaussian(self, sigma: float) -> None:
        epsilons = [epsilon_from_rdp(order / (2 * sigma**2), order, 1e-5) for order in range(2, 99)]

        def delta_of(epsilon: float) -> float:
            # Balle and Wang, arXiv 1805.06530, theorem 8.
            low, high = 1 / (2 * sigma) - epsilon * sigma, -1 / (2 * sigma) - epsilon * sigma
            return float(stats.norm.cdf(low) - math.exp(epsilon) * stats.norm.cdf(high))

        assert delta_of(min(epsilons)) <= 1e-5
        assert delta_of(0.8 * min(epsilons)) > 1e-5

    def test_nothing_costs_nothing_and_infinity_stays(self) -> None:
        assert epsilon_from_rdp(0.0, 4, 1e-5) == 0
        assert epsilon_from_rdp(1e-9, 4, 0.5) == 0
        assert epsilon_from_rdp(math.inf, 4, 1e-5) == math.inf

    @pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 1e-5), (3, 1e-6), (8, 1e-5), (20, 1e-5)])
    def test_best_order_admits_most_gaussian_steps(self, epsilon: float, delta: float) -> None:
        best = best_order(epsilon, delta)

        def steps(order: int) -> float:
            try:
                return rdp_limit(epsilon, delta, order) / rdp(release(1.0, 50.0), order)
            except ConfigurationError:
                return 0.0

        assert steps(best) == max(steps(order) for order in range(2, 200)) > 0

    @pytest.mark.parametrize("delta", [-1.0, 0.0, 1e-13, 1.0, math.nan])
    def test_unusable_delta(self, delta: float) -> None:
        releases = {release(0.1, 1.0): 1}
        for refused in (
            lambda: epsilon_from_rdp(1.0, 4, delta),
            lambda: rdp_limit(8.0, delta, 4),
            lambda: best_order(8.0, delta),
            lambda: pld_epsilon(releases, delta),
            lambda: prv_epsilon(releases, delta),
            lambda: figures(releases, 4, delta),
        ):
            with pytest.raises(ConfigurationError, match="delta is"):
                refused()

    @pytest.mark.parametrize("epsilon", [-1.0, 0.0, math.nan, math.inf])
    def test_unusable_epsilon(self, epsilon: float) -> None:
        with pytest.raises(ConfigurationError, match="positive and finite"):
            rdp_limit(epsilon, 1e-5, 4)
        with pytest.raises(ConfigurationError, match="positive and finite"):
            best_order(epsilon, 1e-5)

    def test_epsilon_out_of_reach(self) -> None:
        with pytest.raises(ConfigurationError, match=r"epsilon above 10\.1"):
            rdp_limit(8.0, 1e-5, 2)
        with pytest.raises(ConfigurationError, match="out of reach"):
            best_order(1e-5, 1e-5)


class TestLossDistribution:
    @pytest.mark.parametrize(("q", "sigma", "steps", "delta", "golden"), GOLDEN)
    def test_golden_figures(
        self, q: float, sigma: float, steps: int, delta: float, golden: float
    ) -> None:
        assert pld_epsilon({release(q, sigma, steps): 1}, delta) == pytest.approx(golden, abs=0.01)

    def test_three_models_on_the_same_patients(self) -> None:
        reconstructor = release(0.05, 1.2, 400)
        generator = release(0.1, 2.0, 1000)
        classifier = release(0.02, 0.8, 300)
        alone = [pld_epsilon({model: 1}, 1e-5) for model in (reconstructor, generator, classifier)]
        assert alone == pytest.approx([4.80, 8.28, 3.79], abs=0.01)
        together = {reconstructor: 1, generator: 1, classifier: 1}
        assert pld_epsilon(together, 1e-5) == pytest.approx(10.70, abs=0.02)

    def test_zero_out_costs_what_add_or_remove_costs_and_replacing_more(self) -> None:
        event = dp_accounting.PoissonSampledDpEvent(0.05, dp_accounting.GaussianDpEvent(1.0))
        costs = {}
        for relation in dp_accounting.NeighboringRelation:
            accountant = PLDAccountant(relation, value_discretization_interval=1e-3)
            costs[relation.name] = accountant.compose(event, 400).get_epsilon(1e-5)
        ours = pld_epsilon({release(0.05, 1.0, 400): 1}, 1e-5)
        assert ours == pytest.approx(costs["REPLACE_SPECIAL"], abs=1e-9)
        assert ours == pytest.approx(costs["ADD_OR_REMOVE_ONE"], abs=1e-9)
        assert ours == pytest.approx(6.700, abs=0.01)
        assert costs["REPLACE_ONE"] == pytest.approx(10.616, abs=0.01)

    def test_counts_compose_like_one_by_one(self) -> None:
        starts = {release(0.1, 1.3, 2): 3, release(0.2, 3.0, 1): 2}
        pieces = {release(0.2, 3.0, 2): 1, release(0.1, 1.3, 5): 1, release(0.1, 1.3, 1): 1}
        assert pld_epsilon(starts, 1e-5) == pld_epsilon(pieces, 1e-5)
        assert total_rdp(starts, 6) == pytest.approx(total_rdp(pieces, 6), rel=1e-12)
        step = dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(1.3))
        other = dp_accounting.PoissonSampledDpEvent(0.2, dp_accounting.GaussianDpEvent(3.0))
        accountant = PLDAccountant(value_discretization_interval=1e-3)
        for one in [step, other, step, step, other, step, step, step]:
            accountant.compose(one)
        one_by_one = accountant.get_epsilon(1e-5)
        assert pld_epsilon(starts, 1e-5) == pytest.approx(one_by_one, abs=1e-6)

    def test_many_steps_take_no_integer_powers(self) -> None:
        # One exact self-composition of so many steps takes dp-accounting minutes.
        many = {release(0.02, 2000.0, 10**7 + 3): 1}
        began = time.process_time()
        epsilon = pld_epsilon(many, 1e-5, interval=1e-4)
        assert time.process_time() - began < 10
        exact = pld_epsilon({release(1.0, 2000 / 0.02 / math.sqrt(10**7)): 1}, 1e-5)
        assert exact < epsilon < 4 * exact  # the limit of small steps is a Gaussian

    @pytest.mark.parametrize("interval", [0.0, -1e-3, math.nan])
    def test_unusable_grid(self, interval: float) -> None:
        with pytest.raises(ConfigurationError, match="interval"):
            pld_epsilon({release(0.1, 1.0): 1}, 1e-5, interval=interval)


class TestFigures:
    @settings(max_examples=25)
    @given(st.dictionaries(releases, st.integers(1, 20), min_size=1, max_size=3), deltas, orders)
    def test_pld_never_exceeds_the_filter(
        self, spent: dict[Release, int], delta: float, order: int
    ) -> None:
        result = figures(spent, order, delta)
        assert 0 <= result.pld_epsilon <= result.filter_epsilon
        assert result.filter_epsilon == epsilon_from_rdp(total_rdp(spent, order), order, delta)

    def test_coarse_grid_is_refined(self) -> None:
        many = {release(0.001, 2.0, 1_000_000): 1}
        coarse = pld_epsilon(many, 1e-5)
        result = figures(many, 10, 1e-5)
        assert coarse > result.filter_epsilon > result.pld_epsilon
        assert result.pld_epsilon == pld_epsilon(many, 1e-5, interval=1e-4)

    def test_where_no_grid_is_fine_enough_the_filter_bounds(self) -> None:
        tiny_steps = {release(0.02, 6800.0, 10**8): 1}
        result = figures(tiny_steps, 125, 1e-5)
        assert pld_epsilon(tiny_steps, 1e-5, interval=1e-5) > result.filter_epsilon
        assert 0 < result.pld_epsilon == result.filter_epsilon < 0.1

    @pytest.mark.parametrize("noise", [1e-5, 1e-3, 0.02])
    def test_hardly_any_noise_needs_little_memory(self, noise: float) -> None:
        result = figures({release(0.1, noise, 10): 2}, 4, 1e-5)
        assert 100 < result.pld_epsilon <= result.filter_epsilon < math.inf

    def test_hundred_mixed_jobs_in_ten_seconds(self) -> None:
        dice = random.Random(7)
        ledger = {
            release(
                round(dice.uniform(0.01, 0.3), 3),
                round(dice.uniform(0.8, 6), 2),
                dice.choice([20, 60]),
            ): dice.randint(1, 30)
            for _ in range(100)
        }
        assert len(ledger) == 100
        began = time.process_time()
        result = figures(ledger, 4, 1e-5)
        assert time.process_time() - began < 10
        assert 0 < result.pld_epsilon < result.filter_epsilon < math.inf

    def test_order_of_the_releases_is_irrelevant(self) -> None:
        pairs = [(release(0.1, 1.0 + i / 10, 5), i + 1) for i in range(6)]
        assert figures(dict(pairs), 6, 1e-5) == figures(dict(reversed(pairs)), 6, 1e-5)

    def test_release_without_noise_is_infinite(self) -> None:
        result = figures({release(0.1, 1.0): 1, release(1.0, None): 1}, 4, 1e-5, prv=True)
        assert result.rdp == result.filter_epsilon == result.pld_epsilon == math.inf
        assert result.prv_epsilon == math.inf

    def test_nothing_started_costs_nothing(self) -> None:
        for nothing in ({}, {release(0.1, 1.0): 0, release(0.1, None): 0}):
            result = figures(nothing, 4, 1e-5, prv=True)
            assert (result.rdp, result.filter_epsilon) == (0, 0)
            assert (result.pld_epsilon, result.prv_epsilon) == (0, 0)

    def test_negative_counts_cannot_lower_a_figure(self) -> None:
        with pytest.raises(ValueError, match="negative"):
            figures({release(0.1, 1.0): 5, release(0.2, 1.0): -1}, 4, 1e-5)


class TestCrossCheck:
    @pytest.mark.parametrize(
        ("q", "sigma", "steps", "delta"),
        [row[:4] for row in GOLDEN if row[2] <= 400 or row[1] == 0.8],
    )
    def test_prv_agrees_with_pld_within_its_error(
        self, q: float, sigma: float, steps: int, delta: float
    ) -> None:
        result = figures({release(q, sigma, steps): 1}, 8, delta, prv=True)
        assert result.prv_epsilon is not None
        # The upper bound adds an error of 0.01 to the estimate.
        assert result.prv_epsilon - 0.01 == pytest.approx(result.pld_epsilon, abs=0.002)

    def test_prv_of_several_mechanisms(self) -> None:
        together = {release(0.05, 1.2, 40): 2, release(0.1, 2.0, 100): 1, release(1.0, 8.0): 1}
        estimate = prv_epsilon(together, 1e-5) - 0.01
        assert estimate == pytest.approx(pld_epsilon(together, 1e-5), abs=0.002)

    def test_beyond_prv_it_is_left_out(self) -> None:
        many = {release(0.1, 1e4, 10**8): 1}
        with pytest.raises(ConfigurationError, match="Opacus PRV"):
            prv_epsilon(many, 1e-5)
        assert figures(many, 64, 1e-5, prv=True).prv_epsilon is None

    def test_prv_is_computed_when_asked_for(self) -> None:
        assert figures({release(0.1, 1.0): 1}, 4, 1e-5).prv_epsilon is None


def test_versions_are_the_installed_ones() -> None:
    packages = ("dp-accounting", "opacus", "fedcmr")
    assert accountant_versions() == {name: version(name) for name in packages}


def test_figures_need_no_torch() -> None:
    program = (
        "import sys\n"
        "from fedcmr_shared.privacy import accounting, planning\n"
        "assert not {'dp_accounting', 'scipy', 'opacus'} & set(sys.modules)\n"
        "from fedcmr_shared.schemas.ledger import Release\n"
        "release = Release(sampling_rate=0.1, noise_multiplier=1.0, steps=3)\n"
        "accounting.figures({release: 2}, 4, 1e-5)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
