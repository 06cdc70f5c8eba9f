"""Noisy sums of scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.privacy.evaluation import SCORE_RANGES, mean_scores, noisy_sums

NAMES = tuple(SCORE_RANGES)
scores = st.fixed_dictionaries({}, optional={name: st.floats() for name in NAMES})


def test_sums_are_scaled_to_the_public_ranges() -> None:
    patients = [{"psnr": 30.0, "ssim": 0.9, "nmse": 0.1}, {"psnr": 20.0, "ssim": 0.5, "nmse": 0.2}]
    assert noisy_sums(patients, NAMES, None) == pytest.approx(
        {"psnr": 0.75, "ssim": 1.4, "nmse": 0.3}
    )
    assert noisy_sums(patients, ["psnr"], None) == pytest.approx({"psnr": 0.75})
    assert noisy_sums([], ["psnr"], None) == {"psnr": 0.0}


def test_means_by_the_true_number_are_plain_means() -> None:
    patients = [{"psnr": 30.0, "ssim": 0.9, "nmse": 0.1}, {"psnr": 20.0, "ssim": 0.5, "nmse": 0.2}]
    means = mean_scores(noisy_sums(patients, NAMES, None), 2)
    assert means == pytest.approx({"psnr": 25.0, "ssim": 0.7, "nmse": 0.15})


def test_another_public_number_scales_towards_the_low_end() -> None:
    sums = noisy_sums([{"psnr": 30.0}] * 80, ["psnr"], None)
    assert mean_scores(sums, 100) == pytest.approx({"psnr": 10 + 20 * 0.8})
    assert mean_scores(sums, 10) == {"psnr": 50.0}
    assert mean_scores({"psnr": -3.0}, 10) == {"psnr": 10.0}


@settings(deadline=None, max_examples=100)
@given(st.lists(scores, max_size=4), scores, st.sets(st.sampled_from(NAMES), min_size=1))
def test_one_patient_moves_the_sums_by_at_most_the_sensitivity(
    others: list[dict[str, float]], patient: dict[str, float], names: set[str]
) -> None:
    chosen = sorted(names)
    with_, without = (noisy_sums(p, chosen, None) for p in ([*others, patient], others))
    moved = math.hypot(*(with_[name] - without[name] for name in chosen))
    assert moved <= math.sqrt(len(chosen)) * (1 + 1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_no_numbers_add_nothing(value: float) -> None:
    sums = noisy_sums([{"psnr": value, "ssim": 0.5}, {}], ["psnr", "ssim"], None)
    assert sums == {"psnr": 0.0, "ssim": 0.5}


def test_extreme_scores_count_as_the_end_of_the_range() -> None:
    patients = [{"psnr": 1e300, "nmse": 7.0}, {"psnr": -5.0, "nmse": -1.0}]
    assert noisy_sums(patients, ["psnr", "nmse"], None) == {"psnr": 1.0, "nmse": 1.0}


@pytest.mark.parametrize("names", [["psnr"], list(NAMES)])
def test_noise_grows_with_the_number_of_scores(names: list[str]) -> None:
    drawn = np.array([list(noisy_sums([], names, 2.0).values()) for _ in range(20_000)])
    variance = 4.0 * len(names)
    assert drawn.var(0) == pytest.approx(variance, rel=6 * math.sqrt(2 / 20_000))
    assert drawn.mean(0) == pytest.approx(0, abs=6 * math.sqrt(variance / 20_000))


def test_repeated_releases_have_new_noise() -> None:
    assert noisy_sums([], ["psnr"], 1.0) != noisy_sums([], ["psnr"], 1.0)


@pytest.mark.parametrize("names", [[], ["psnr", "psnr"]])
def test_names_are_given_once(names: list[str]) -> None:
    with pytest.raises(ConfigurationError, match="name each of one or more once"):
        noisy_sums([], names, None)


def test_only_scores_with_a_public_range_leave() -> None:
    with pytest.raises(
        ConfigurationError, match="'loss' has no public range: use psnr, ssim, nmse"
    ):
        noisy_sums([], ["loss"], 1.0)
    with pytest.raises(ConfigurationError, match="'loss' has no public range"):
        mean_scores({"loss": 1.0}, 10)


@pytest.mark.parametrize("patients", [0.0, -1.0, math.nan])
def test_the_public_number_is_positive(patients: float) -> None:
    with pytest.raises(ConfigurationError, match="give a positive number"):
        mean_scores({"psnr": 1.0}, patients)
