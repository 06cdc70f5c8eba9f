"""Metrics of generated clips: laws, and the damage that each must notice."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcmr_shared.errors import DataError
from fedcmr_shared.metrics.generation import (
    FeatureSample,
    FeatureSpace,
    adherence,
    compare_tables,
    distance,
    diversity,
    frechet_distance,
    kernel_distance,
    project,
    similarity,
)


def gaussian(
    mean: float, scale: float, count: int = 4000, width: int = 6, seed: int = 0
) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, scale, (count, width))


def beating(
    radius: float = 20.0, frames: int = 12, size: int = 96, phase: float = 0.0
) -> np.ndarray:
    """A disc that beats once, in [-1, 1]."""
    y, x = np.mgrid[:size, :size] - size / 2
    times = 2 * np.pi * np.arange(frames) / frames + phase
    edges = [radius * (0.85 + 0.15 * math.cos(t)) for t in times]
    return np.stack([np.tanh((edge - np.hypot(y, x)) / 2) for edge in edges])


class TestDistances:
    def test_frechet_of_gaussians_is_the_formula(self) -> None:
        """Equal axes: 6 (m1 - m2)² + 6 (s1 - s2)²."""
        found = frechet_distance(gaussian(0, 1), gaussian(0.5, 2, seed=1))
        assert found == pytest.approx(6 * 0.25 + 6 * 1.0, rel=0.06)

    @given(shift=st.floats(-3, 3), seed=st.integers(0, 99))
    def test_frechet_is_zero_for_the_same_and_a_shift_adds_its_square(
        self, shift: float, seed: int
    ) -> None:
        features = gaussian(0, 1, count=50, seed=seed)
        assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
        moved = frechet_distance(features, features + shift)
        assert moved == pytest.approx(6 * shift**2, abs=1e-8)

    def test_frechet_is_symmetric_and_does_not_see_the_axes(self) -> None:
        first, second = gaussian(0, 1, 60), gaussian(1, 2, 70, seed=1)
        turn = np.linalg.qr(gaussian(0, 1, 6, seed=3))[0]
        expected = frechet_distance(first, second)
        assert frechet_distance(second, first) == pytest.approx(expected)
        assert frechet_distance(first @ turn, second @ turn) == pytest.approx(expected)

    def test_frechet_of_few_samples_is_too_large_and_the_kernel_distance_is_not(self) -> None:
        """The bias for which few samples are projected."""
        pairs = [(gaussian(0, 1, 20, 30, s), gaussian(0, 1, 20, 30, s + 500)) for s in range(60)]
        assert min(frechet_distance(*pair) for pair in pairs) > 10
        kernel = [kernel_distance(*pair) for pair in pairs]
        assert abs(np.mean(kernel)) < 3 * np.std(kernel) / math.sqrt(len(kernel))

    def test_the_kernel_distance_grows_with_the_shift(self) -> None:
        first = gaussian(0, 1, 200)
        far = [kernel_distance(first, gaussian(m, 1, 200, seed=1)) for m in (0.0, 0.5, 1.0, 2.0)]
        assert far == sorted(far)
        assert far[1] > 3 * abs(far[0])

    def test_everybody_projects_alike_and_lengths_do_not_grow(self) -> None:
        features = gaussian(0, 1, 10, 40)
        found = project(features, 8)
        assert found.shape == (10, 8)
        assert np.array_equal(found, project(features, 8))
        assert (np.linalg.norm(found, axis=1) <= np.linalg.norm(features, axis=1) + 1e-12).all()
        with pytest.raises(DataError, match="40 features cannot be projected to 41"):
            project(features, 41)

    @pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
    @pytest.mark.parametrize(
        ("first", "second", "problem"),
        [
            (np.zeros((3, 2)), np.zeros((3, 4)), "cannot be compared"),
            (np.zeros((1, 2)), np.zeros((3, 2)), "at least two"),
            (np.full((3, 2), np.nan), np.zeros((3, 2)), "not finite"),
        ],
    )
    def test_refusals(
        self, distance: object, first: np.ndarray, second: np.ndarray, problem: str
    ) -> None:
        assert callable(distance)
        with pytest.raises(DataError, match=problem):
            distance(first, second)


def sample(values: np.ndarray, extractor: str = "ours", sha256: str = "a") -> FeatureSample:
    return FeatureSample(FeatureSpace(extractor, values.shape[1], "none", sha256), values)


class TestComparing:
    def test_distances_of_one_space_and_size_have_an_order(self) -> None:
        real, near, far = (
            sample(gaussian(m, 1, 50, seed=s)) for m, s in ((0, 0), (0.5, 1), (2, 2))
        )
        one, other = distance(real, near), distance(real, far)
        assert one < other
        assert other > one
        assert other - one == pytest.approx(other.frechet - one.frechet)
        assert one.samples == (50, 50)
        assert one.frechet == frechet_distance(real.values, near.values)
        assert one.kernel == kernel_distance(real.values, near.values)

    @pytest.mark.parametrize("change", [{"extractor": "theirs"}, {"sha256": "b"}])
    def test_other_extractors_and_other_weights_are_refused(self, change: dict[str, str]) -> None:
        values = gaussian(0, 1, 20)
        ours, theirs = (
            distance(sample(values, **c), sample(values + 1, **c)) for c in ({}, change)
        )
        with pytest.raises(DataError, match="different features cannot be compared"):
            _ = ours - theirs
        with pytest.raises(DataError, match="different features cannot be compared"):
            _ = ours < theirs
        with pytest.raises(DataError, match="have no distance"):
            distance(sample(values), sample(values, **change))

    def test_other_numbers_of_samples_are_refused_as_fewer_are_further_away(self) -> None:
        many = distance(sample(gaussian(0, 1, 200)), sample(gaussian(0, 1, 200, seed=1)))
        few = distance(sample(gaussian(0, 1, 20)), sample(gaussian(0, 1, 20, seed=1)))
        assert few.frechet > 3 * many.frechet
        with pytest.raises(DataError, match="Use as many for both"):
            _ = few - many

    def test_features_have_the_dimensions_of_their_space(self) -> None:
        with pytest.raises(DataError, match=r"ours gives \[sample, 4\]"):
            FeatureSample(FeatureSpace("ours", 4, "none"), np.zeros((5, 3)))


class TestDiversity:
    def test_copies_have_none_and_different_hearts_some(self) -> None:
        hearts = [beating(radius) for radius in (14.0, 20.0, 26.0, 32.0)]
        assert similarity(hearts[0], hearts[0]) == pytest.approx(1, abs=1e-3)
        assert diversity([hearts[0]] * 4, 6) == pytest.approx(0, abs=1e-3)
        assert diversity(hearts, 6) > 0.05
        alike = [beating(radius) for radius in (20.0, 20.5, 21.0, 21.5)]
        assert diversity(alike, 6) < diversity(hearts, 6)

    def test_refusals(self) -> None:
        with pytest.raises(DataError, match="at least 2"):
            diversity([beating()], 3)
        with pytest.raises(DataError, match="cannot be compared"):
            similarity(beating(), beating(frames=6))
        with pytest.raises(DataError, match="0 pairs"):
            diversity([beating()] * 2, 0)
        with pytest.raises(DataError, match="at least 44 pixels"):
            similarity(beating(size=43), beating(size=43))
        assert similarity(beating(size=44), beating(size=44)) == pytest.approx(1, abs=1e-3)
        with pytest.raises(DataError, match="not finite"):
            similarity(beating(), math.nan * beating())


class TestAdherence:
    @given(noise=st.floats(0, 2), bias=st.floats(-2, 2))
    def test_figures_are_those_of_the_errors(self, noise: float, bias: float) -> None:
        asked = np.linspace(20, 70, 40)
        error = bias + noise * np.tile([1.0, -1.0], 20)
        found = adherence(asked, asked + error)
        assert found.bias == pytest.approx(bias, abs=1e-9)
        assert found.mae == pytest.approx(np.abs(error).mean())
        assert found.r2 == pytest.approx(1 - (error**2).sum() / ((asked - 45) ** 2).sum())

    def test_a_generator_that_does_not_listen_gets_no_more_than_zero(self) -> None:
        asked = np.linspace(20, 70, 40)
        assert adherence(asked, np.full(40, 45.0)).r2 == pytest.approx(0)
        assert adherence(asked, asked[::-1]).r2 < 0

    def test_what_could_not_be_measured_is_left_out_and_counted(self) -> None:
        asked = np.array([1.0, 2.0, 3.0, 4.0])
        assert adherence(asked, np.array([1.0, np.nan, 3.0, 4.0])).samples == 3
        with pytest.raises(DataError, match="2 measured samples"):
            adherence(asked, np.array([1.0, np.nan, np.nan, 4.0]))
        with pytest.raises(DataError, match="that differ"):
            adherence(np.ones(4), asked)

    def test_each_measured_sample_has_a_request(self) -> None:
        asked, found = np.array([1.0, math.nan, 3.0, 4.0]), np.arange(4.0)
        with pytest.raises(DataError, match="give one for each"):
            adherence(asked[:3], found)
        with pytest.raises(DataError, match="a request is not finite"):
            adherence(asked, found)
        assert adherence(asked, np.where(np.isnan(asked), math.nan, found)).samples == 3


class TestTables:
    def test_a_shift_is_its_own_distance_and_leaves_the_correlation(self) -> None:
        real = gaussian(0, 2, 400, 2)
        found = compare_tables(("LVEF", "LVM"), real, real + np.array([2 * real[:, 0].std(), 0]))
        assert found.wasserstein["LVEF"] == pytest.approx(2)
        assert found.wasserstein["LVM"] == pytest.approx(0, abs=1e-12)
        assert found.correlation == pytest.approx(0, abs=1e-12)

    def test_a_broken_bond_shows_in_the_correlation_alone(self) -> None:
        draws = np.random.default_rng(0)
        x = draws.normal(size=500)
        real = np.stack([x, x + 0.1 * draws.normal(size=500)], axis=1)
        made = np.stack([real[:, 0], draws.permutation(real[:, 1])], axis=1)
        found = compare_tables(("a", "b"), real, made)
        assert max(found.wasserstein.values()) == pytest.approx(0, abs=1e-12)
        assert found.correlation > 0.6

    def test_refusals(self) -> None:
        with pytest.raises(DataError, match="1 names for 2"):
            compare_tables(("a",), np.zeros((3, 2)), np.zeros((3, 2)))
        with pytest.raises(DataError, match="b: all values"):
            compare_tables(("a", "b"), np.array([[0.0, 1], [1, 1]]), np.zeros((3, 2)))
