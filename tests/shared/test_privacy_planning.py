"""What fits a budget: exactly as much as a ledger's filter admits, and not one more."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.privacy.accounting import best_order, epsilon_from_rdp, rdp, rdp_limit, total_rdp
from fedcmr_shared.privacy.planning import (
    Allowance,
    Outline,
    make_plan,
    make_plans,
    noise_multiplier_for,
    sensible_rates,
    starts_left,
)
from fedcmr_shared.schemas.ledger import Release

rates = st.floats(0.01, 1)
allowances = st.builds(
    lambda epsilon, share: Allowance.of(
        epsilon, 1e-5, spent_rdp=share * Allowance.of(epsilon, 1e-5).limit_rdp
    ),
    st.floats(0.5, 20),
    st.floats(0, 0.9),
)


def release(sampling_rate: float, noise_multiplier: float | None, steps: int) -> Release:
    return Release(sampling_rate=sampling_rate, noise_multiplier=noise_multiplier, steps=steps)


class TestLargestAndLeast:
    @settings(max_examples=40)
    @given(allowances, rates, st.integers(1, 100), st.integers(1, 50))
    def test_least_noise_fits_and_a_thousandth_less_does_not(
        self, allowance: Allowance, rate: float, steps: int, starts: int
    ) -> None:
        sigma = noise_multiplier_for(
            allowance, sampling_rate=rate, local_steps=steps, starts=starts
        )
        less = sigma - 0.001
        cost = starts * rdp(release(rate, sigma, steps), allowance.order)
        assert cost <= allowance.remaining_rdp
        assert starts * rdp(release(rate, less, steps), allowance.order) > allowance.remaining_rdp
        assert round(sigma, 3) == sigma

    @settings(max_examples=40)
    @given(allowances, rates, st.floats(0.5, 10), st.integers(1, 100))
    def test_one_start_more_than_fit_breaks_the_budget(
        self, allowance: Allowance, rate: float, sigma: float, steps: int
    ) -> None:
        one = release(rate, sigma, steps)
        starts = starts_left(allowance, one)
        assert starts * rdp(one, allowance.order) <= allowance.remaining_rdp
        assert (starts + 1) * rdp(one, allowance.order) > allowance.remaining_rdp

    def test_without_noise_nothing_fits_and_almost_free_is_capped(self) -> None:
        allowance = Allowance.of(8, 1e-5)
        assert starts_left(allowance, release(0.1, None, 1)) == 0
        assert starts_left(allowance, release(1e-300, 1.0, 1)) == 1_000_000

    def test_budget_too_small_for_any_noise(self) -> None:
        allowance = Allowance.of(0.1, 1e-5)
        with pytest.raises(ConfigurationError, match="raise epsilon"):
            noise_multiplier_for(allowance, sampling_rate=1.0, local_steps=10**5, starts=10**4)


class TestPlans:
    @pytest.mark.parametrize("rate", [0.05, 0.3, 1.0])
    @pytest.mark.parametrize("missing", ["rounds", "local_steps", "noise_multiplier"])
    def test_plan_uses_the_budget_up_and_the_filter_admits_it(
        self, rate: float, missing: str
    ) -> None:
        allowance = Allowance.of(8, 1e-5, spent_rdp=0.5)
        numbers: dict[str, Any] = {
            "rounds": 5,
            "local_steps": 4,
            "noise_multiplier": 3.0,
            missing: None,
        }
        plan = make_plan(allowance, Outline(**numbers, cohort_size=100, spare_rounds=2), rate)
        assert plan is not None
        one = release(rate, plan.noise_multiplier, plan.local_steps)
        reserved = total_rdp({one: plan.rounds + plan.spare_rounds}, allowance.order)
        assert reserved + 0.5 <= rdp_limit(8, 1e-5, allowance.order)
        assert plan.reserved_epsilon == pytest.approx(
            epsilon_from_rdp(reserved + 0.5, allowance.order, 1e-5)
        )
        assert 0 < plan.pld_epsilon <= plan.filter_epsilon < plan.reserved_epsilon <= 8
        more = {
            "rounds": (plan.rounds + 1, plan.local_steps, plan.noise_multiplier),
            "local_steps": (plan.rounds, plan.local_steps + 1, plan.noise_multiplier),
            "noise_multiplier": (plan.rounds, plan.local_steps, plan.noise_multiplier - 0.001),
        }
        rounds, steps, sigma = more[missing]
        beyond = total_rdp({release(rate, sigma, steps): rounds + 2}, allowance.order)
        assert beyond + 0.5 > rdp_limit(8, 1e-5, allowance.order)

    def test_relative_noise_is_that_of_the_mean_of_all_steps(self) -> None:
        allowance = Allowance.of(100, 1e-5)
        outline = Outline(rounds=4, local_steps=25, noise_multiplier=None, cohort_size=100)
        plan = make_plan(allowance, outline, 0.1)
        assert plan is not None
        assert plan.expected_patients == 10
        assert plan.relative_noise == pytest.approx(plan.noise_multiplier / 10 / 10)

    def test_more_spare_rounds_ask_for_more_noise(self) -> None:
        allowance = Allowance.of(8, 1e-5)
        sigmas = []
        for spare in (0, 1, 10):
            plan = make_plan(allowance, Outline(10, 5, None, 200, spare), 0.1)
            assert plan is not None
            sigmas.append(plan.noise_multiplier)
        assert sigmas == sorted(set(sigmas))

    def test_rates_at_which_nothing_fits_are_left_out(self) -> None:
        outline = Outline(rounds=None, local_steps=60, noise_multiplier=1.0, cohort_size=200)
        plans = make_plans(Allowance.of(8, 1e-5), outline, [0.02, 1.0])
        assert [plan.sampling_rate for plan in plans] == [0.02]

    def test_spare_rounds_alone_are_no_plan(self) -> None:
        allowance = Allowance.of(8, 1e-5)
        fitting = starts_left(allowance, release(0.05, 1.0, 60))
        assert fitting > 0
        outline = Outline(None, 60, 1.0, 200, spare_rounds=fitting)
        with pytest.raises(ConfigurationError, match=f"{fitting} spare rounds"):
            make_plans(allowance, outline, [0.05])

    def test_rates_draw_somebody(self) -> None:
        assert sensible_rates(10) == [0.1, 0.2, 0.5, 1.0]
        assert all(rate * 300 >= 1 for rate in sensible_rates(300))

    @pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, math.nan])
    def test_unusable_rate(self, rate: float) -> None:
        with pytest.raises(ConfigurationError, match="sampling rate"):
            make_plan(Allowance.of(8, 1e-5), Outline(5, 5, None, 100), rate)


class TestInputs:
    def test_default_order_is_that_of_a_new_ledger(self) -> None:
        assert Allowance.of(3, 1e-6).order == best_order(3, 1e-6)
        assert Allowance.of(3, 1e-6, order=12).order == 12

    @pytest.mark.parametrize("spent", [-0.1, 4.92, math.inf, math.nan])
    def test_unusable_spending(self, spent: float) -> None:
        with pytest.raises(ConfigurationError, match="spent RDP"):
            Allowance.of(8, 1e-5, order=4, spent_rdp=spent)

    def test_impossible_budget(self) -> None:
        with pytest.raises(ConfigurationError, match="epsilon 1 is out of reach"):
            Allowance.of(1, 1e-5, order=2)
        with pytest.raises(ConfigurationError, match="epsilon is -1"):
            Allowance.of(-1, 1e-5)

    @pytest.mark.parametrize(
        "numbers", [(None, None, 1.0), (5, None, None), (5, 5, 1.0), (None, None, None)]
    )
    def test_exactly_one_number_is_to_be_found(
        self, numbers: tuple[int | None, int | None, float | None]
    ) -> None:
        with pytest.raises(ConfigurationError, match="give two of"):
            Outline(*numbers, cohort_size=100)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("rounds", 0),
            ("local_steps", -3),
            ("noise_multiplier", math.nan),
            ("noise_multiplier", math.inf),
            ("cohort_size", 0),
            ("spare_rounds", -1),
        ],
    )
    def test_numbers_out_of_range(self, name: str, value: float) -> None:
        numbers: dict[str, Any] = {
            "rounds": 5,
            "local_steps": 5,
            "noise_multiplier": 1.0,
            "cohort_size": 100,
        }
        unknown = "local_steps" if name != "local_steps" else "rounds"
        with pytest.raises(ConfigurationError, match=name):
            Outline(**{**numbers, unknown: None, name: value})
