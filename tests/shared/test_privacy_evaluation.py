"""Totals of scores: bounded by each patient, noised, additive, silent about what may not leave."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.privacy import evaluation
from fedcmr_shared.privacy.evaluation import (
    ENERGY,
    PASSED,
    SCORE_RANGES,
    UNPROTECTED,
    Histogram,
    energy_kwh,
    energy_totals,
    gate_totals,
    gates_passed,
    histograms,
    mean_scores,
    noisy_totals,
    sensitivity,
    totals_layout,
)
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.privacy import EvaluationSpec, PrivacySpec

NAMES = tuple(SCORE_RANGES)
PATIENTS = [{"psnr": 30.0, "ssim": 0.9, "nmse": 0.1}, {"psnr": 20.0, "ssim": 0.5, "nmse": 0.2}]

number = st.floats(allow_nan=True, allow_infinity=True)
scores = st.fixed_dictionaries({}, optional=dict.fromkeys(NAMES, number))
metrics = st.sets(st.sampled_from(NAMES), min_size=1).map(sorted)
bins = st.sampled_from([0, 2, 7, 50])


def values(totals: dict[str, Tensor]) -> dict[str, list[float]]:
    return {name: total.tolist() for name, total in totals.items()}


def added(*sites: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.stack([site[name] for site in sites]).sum(0) for name in sites[0]}


def moved(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return float(torch.cat([one[name] - other[name] for name in one]).norm())


def job(**evaluation: Any) -> JobSpec:
    return JobSpec(privacy=PrivacySpec(evaluation=EvaluationSpec(**evaluation)))


def test_totals_of_scaled_scores() -> None:
    totals = values(noisy_totals(PATIENTS, NAMES, None))
    assert totals == {
        "psnr/sum": [pytest.approx(0.75)],
        "psnr/patients": [2.0],
        "ssim/sum": [pytest.approx(1.4)],
        "ssim/patients": [2.0],
        "nmse/sum": [pytest.approx(0.3)],
        "nmse/patients": [2.0],
    }
    assert values(noisy_totals(PATIENTS, ["psnr"], None, 4)) == {
        "psnr/sum": [pytest.approx(0.75)],
        "psnr/patients": [2.0],
        "psnr/histogram": [0.0, 1.0, 1.0, 0.0],
    }


@settings(max_examples=100)
@given(st.lists(scores, max_size=4), metrics, bins, st.none() | st.just(1.0))
def test_the_layout_is_the_jobs_and_not_the_datas(
    patients: list[dict[str, float]], chosen: list[str], count: int, noise: float | None
) -> None:
    layout = totals_layout(job(metrics=chosen, histogram_bins=count, noise_multiplier=noise))
    for allowed in (None, [], chosen[:1]):
        totals = noisy_totals(patients, chosen, noise, count, allowed)
        assert {name: tuple(total.shape) for name, total in totals.items()} == {
            name: (length,) for name, (length, _) in layout.items()
        }
        assert all(total.dtype == torch.float64 for total in totals.values())
        assert all(bool(torch.isfinite(total).all()) for total in totals.values())


@settings(max_examples=200)
@given(st.lists(scores, max_size=4), scores, metrics, bins, metrics)
def test_one_patient_moves_the_totals_by_at_most_the_sensitivity(
    others: list[dict[str, float]],
    patient: dict[str, float],
    chosen: list[str],
    count: int,
    allowed: list[str],
) -> None:
    for shown in (None, allowed):
        with_ = noisy_totals([*others, patient], chosen, None, count, shown)
        without = noisy_totals(others, chosen, None, count, shown)
        assert moved(with_, without) <= sensitivity(len(chosen), count) * (1 + 1e-12)


@pytest.mark.parametrize("count", [0, 5])
def test_the_sensitivity_is_reached(count: int) -> None:
    best = {"psnr": 50.0, "ssim": 1.0, "nmse": 1.0}
    with_, without = (noisy_totals(p, NAMES, None, count) for p in ([best], []))
    assert moved(with_, without) == pytest.approx(math.sqrt(9 if count else 6), rel=1e-12)
    assert sensitivity(3, count) == pytest.approx(math.sqrt(9 if count else 6), rel=1e-12)


@settings(max_examples=100)
@given(st.lists(scores, max_size=5), st.lists(scores, max_size=5), metrics, bins)
def test_totals_of_sites_add_up_to_those_of_all_patients(
    north: list[dict[str, float]], south: list[dict[str, float]], chosen: list[str], count: int
) -> None:
    parts = added(*(noisy_totals(site, chosen, None, count) for site in (north, south)))
    whole = noisy_totals([*north, *south], chosen, None, count)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-12, atol=1e-12)


def test_means_are_those_of_all_patients_whatever_the_sites_sizes() -> None:
    north = noisy_totals([{"psnr": 30.0}] * 3, ["psnr"], None)
    south = noisy_totals([{"psnr": 20.0}], ["psnr"], None)
    assert mean_scores(added(north, south)) == pytest.approx({"psnr": 27.5})


def test_a_site_that_lets_a_metric_not_out_changes_nothing() -> None:
    north = noisy_totals(PATIENTS, NAMES, None, 2)
    south = noisy_totals([{"psnr": 10.0, "ssim": 0.0}], NAMES, None, 2, allowed=["psnr"])
    both = added(north, south)
    assert values(both)["ssim/histogram"] == values(north)["ssim/histogram"]
    means = mean_scores(both)
    assert means["psnr"] == pytest.approx(20.0)
    assert means["ssim"] == pytest.approx(0.7)


def test_what_may_not_leave_is_noise_and_no_constant() -> None:
    first, second = (noisy_totals(PATIENTS, ["ssim"], 1.0, 3, allowed=[]) for _ in range(2))
    assert all(not torch.equal(first[name], second[name]) for name in first)
    assert all(bool((total != 0).all()) for total in first.values())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_no_numbers_add_nothing(value: float) -> None:
    totals = noisy_totals([{"psnr": value, "ssim": 0.5}, {}], ["psnr", "ssim"], None, 2)
    assert values(totals) == {
        "psnr/sum": [0.0],
        "psnr/patients": [0.0],
        "psnr/histogram": [0.0, 0.0],
        "ssim/sum": [0.5],
        "ssim/patients": [1.0],
        "ssim/histogram": [0.0, 1.0],
    }


def test_extreme_scores_count_as_the_end_of_the_range() -> None:
    patients = [{"psnr": 1e300, "nmse": 7.0}, {"psnr": -5.0, "nmse": -1.0}]
    totals = noisy_totals(patients, ["psnr", "nmse"], None, 3)
    for metric in ("psnr", "nmse"):
        assert totals[f"{metric}/sum"].tolist() == [1.0]
        assert totals[f"{metric}/histogram"].tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(("names", "count"), [(["psnr"], 0), (list(NAMES), 0), (list(NAMES), 2)])
def test_noise_is_the_multiplier_times_the_sensitivity(names: list[str], count: int) -> None:
    drawn = np.array(
        [torch.cat(list(noisy_totals([], names, 2.0, count).values())) for _ in range(20_000)]
    )
    variance = 4.0 * len(names) * (3 if count else 2)
    # 6.6 standard deviations on at most 18 figures: by chance once in 10^9 runs.
    assert drawn.var(0) == pytest.approx(variance, rel=6.6 * math.sqrt(2 / 20_000))
    assert drawn.mean(0) == pytest.approx(0, abs=6.6 * math.sqrt(variance / 20_000))


def test_noise_is_added_to_the_exact_totals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "gaussian", lambda count: np.arange(1.0, count + 1))
    exact, noised = (noisy_totals(PATIENTS, ["psnr"], noise, 4) for noise in (None, 3.0))
    for name, total in exact.items():
        steps = torch.arange(1.0, len(total) + 1, dtype=torch.float64)
        torch.testing.assert_close(noised[name], total + 3 * math.sqrt(3) * steps)


def test_repeated_releases_have_new_noise() -> None:
    first, second = (values(noisy_totals([], ["psnr"], 1.0)) for _ in range(2))
    assert first["psnr/sum"] != second["psnr/sum"]
    assert first["psnr/sum"] != first["psnr/patients"]


def test_noise_alone_becomes_no_extreme_mean() -> None:
    for patients in (0.9, 0.0, -3.0):
        totals = {"psnr/sum": torch.tensor([0.5]), "psnr/patients": torch.tensor([patients])}
        assert mean_scores(totals) == {"psnr": 30.0}
    for total, end in ((-0.1, 10.0), (7.0, 50.0)):
        totals = {"psnr/sum": torch.tensor([total]), "psnr/patients": torch.tensor([5.0])}
        assert mean_scores(totals) == {"psnr": end}


def test_histograms_in_own_units_and_never_negative() -> None:
    totals = {
        "psnr/sum": torch.tensor([1.0]),
        "psnr/patients": torch.tensor([2.0]),
        "psnr/histogram": torch.tensor([-1.5, 0.25]),
    }
    assert histograms(totals) == {"psnr": Histogram((10.0, 30.0, 50.0), (0.0, 0.25))}
    del totals["psnr/histogram"]
    assert histograms(totals) == {}


@pytest.mark.parametrize("names", [[], ["psnr", "psnr"]])
def test_names_are_given_once(names: list[str]) -> None:
    with pytest.raises(ConfigurationError, match="name each of one or more once"):
        noisy_totals([], names, None)


def test_only_scores_with_a_public_range_leave() -> None:
    with pytest.raises(
        ConfigurationError, match="'loss' has no public range: use psnr, ssim, nmse"
    ):
        noisy_totals([], ["loss"], 1.0)
    with pytest.raises(ConfigurationError, match="'loss' has no public range"):
        mean_scores({"loss/sum": torch.ones(1), "loss/patients": torch.ones(1)})


@pytest.mark.parametrize(
    "totals",
    [
        {"psnr/sum": torch.ones(1)},
        {"psnr/patients": torch.ones(1)},
        {"psnr/histogram": torch.ones(2)},
        {"psnr/sum": torch.ones(2), "psnr/patients": torch.ones(1)},
    ],
)
def test_incomplete_totals_have_no_mean(totals: dict[str, Tensor]) -> None:
    for read in (mean_scores, histograms):
        with pytest.raises(ConfigurationError, match="the totals have no single psnr/"):
            read(totals)


class TestBound:
    def test_holds_the_declared_patients_of_every_size_class_and_the_noise(self) -> None:
        layout = totals_layout(job(cohort_size=50, noise_multiplier=20.0, histogram_bins=3))
        patients = noisy_totals([{"psnr": 50.0}] * 50 * 4, ["psnr"], None, 3)
        for name, (_, bound) in layout.items():
            assert float(patients[name].max()) + 8 * 20.0 * math.sqrt(3) <= bound

    def test_follows_from_the_job_alone(self) -> None:
        one, other = (totals_layout(job(cohort_size=size)) for size in (50, 100))
        assert one.keys() == other.keys()
        assert all(one[name][1] < other[name][1] for name in one)

    def test_a_job_without_privacy_has_all_scores(self) -> None:
        exact = noisy_totals(PATIENTS, UNPROTECTED.metrics, None)
        assert totals_layout(JobSpec()).keys() == exact.keys()
        assert {name.partition("/")[0] for name in exact} == set(NAMES)


GATE = {"noise_multiplier": None, "metrics": ("memorisation",)}


class TestGate:
    def test_one_bit_leaves(self) -> None:
        sites = [gate_totals(outcome) for outcome in ("passed", "failed", "undecided", "passed")]
        assert [float(each[PASSED]) for each in sites] == [1.0, 0.0, 0.0, 1.0]
        assert values(sites[1]) == values(sites[2])  # nobody can tell these apart
        assert gates_passed(added(*sites)) == 2
        assert gates_passed(noisy_totals(PATIENTS, NAMES, None)) is None

    def test_its_layout_is_that_bit(self) -> None:
        assert totals_layout(job(**GATE)) == {PASSED: (1, 1.0)}

    @pytest.mark.parametrize(
        "change",
        [
            {"noise_multiplier": 1.0},
            {"rounds": "all"},
            {"rounds": "none"},
            {"histogram_bins": 4},
            {"metrics": ("memorisation", "psnr")},
        ],
    )
    def test_it_stands_alone(self, change: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="memorisation is one bit after the last round"):
            EvaluationSpec(**(GATE | change))


class TestEnergy:
    def test_terms_add_up_beside_scores_and_gates(self) -> None:
        for asked in ({}, GATE):
            layout = totals_layout(job(energy_total=True, **asked))
            assert layout.pop(ENERGY) == (1, JobSpec().resources.energy_kwh)
            assert layout == totals_layout(job(**asked))
        sites = [noisy_totals(PATIENTS, NAMES, None) | energy_totals(kwh) for kwh in (0.1, 0.0, 2)]
        total = added(*sites)
        assert energy_kwh(total) == 2.1
        assert mean_scores(total) == mean_scores({k: v for k, v in total.items() if k != ENERGY})
        assert energy_kwh(gate_totals("passed")) is None

    def test_a_job_that_does_not_ask_keeps_its_identity(self) -> None:
        assert "energy_total" not in job().model_dump_json()
        assert job(energy_total=True).sha256 != job().sha256

    def test_a_site_by_itself_is_never_asked(self) -> None:
        asked = PrivacySpec(evaluation=EvaluationSpec(energy_total=True))
        with pytest.raises(ValueError, match="energy_total needs a secure sum"):
            JobSpec(privacy=asked, aggregation="plain_with_local_dp")
