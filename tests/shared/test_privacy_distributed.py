"""Distributed noise: the exact sampler, the law of the integers, and what the sum costs."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError
from scipy import signal, stats
from torch import nn

from fedcmr_shared.errors import ConfigurationError, LedgerError
from fedcmr_shared.privacy import discrete_noise, distributed
from fedcmr_shared.privacy.accounting import figures, pld_epsilon, prv_epsilon, rdp, total_rdp
from fedcmr_shared.privacy.budget import phases_of, replay
from fedcmr_shared.privacy.discrete_noise import discrete_gaussian, reach
from fedcmr_shared.privacy.distributed import NoiseShare, mean_update, noise_share, noisy_integers
from fedcmr_shared.privacy.mechanism import BackwardEngine, ClippedSum, Mechanism, noisy_mean
from fedcmr_shared.privacy.step import private_integers
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.ledger import (
    Admitted,
    Leaf,
    Masked,
    Opened,
    Padding,
    Release,
    Reservation,
    Started,
    Stored,
    Unmasked,
)
from fedcmr_shared.schemas.privacy import NoiseShares
from fedcmr_shared.secagg.encoding import Encoding, Segment

LEVELS = 2**14
CHANCE = 1e-9  # no test fails by chance more often

Log = NDArray[np.float64]


def make_job(**changes: Any) -> JobSpec:
    """Return a valid job with distributed noise; ``changes`` by dotted path, dots as two lines."""
    document: dict[str, Any] = {
        "minimum_sites": 5,
        "rounds": 4,
        "training": {"local_steps": 1, "optimiser": "sgd", "learning_rate": 0.5},
        "privacy": {
            "sampling_rate": 0.1,
            "cohort_size": 200,
            "noise_multiplier": 1.5,
            "clip_norm": 0.25,
            "distributed": {"unseen_sites": 1},
        },
    }
    for path, value in changes.items():
        *outer, last = path.split("__")
        part = document
        for name in outer:
            part = part.setdefault(name, {})
        part[last] = value
    return JobSpec.model_validate(document)


def log_pmf(variance: float, values: NDArray[np.int64]) -> Log:
    """Logarithm of the discrete Gaussian's probabilities, to the precision of float64."""
    exponents = -(values.astype(np.float64) ** 2) / (2 * variance)
    wide = np.arange(-int(40 * math.sqrt(variance)) - 40, int(40 * math.sqrt(variance)) + 41)
    return exponents - np.logaddexp.reduce(-(wide.astype(np.float64) ** 2) / (2 * variance))


def divergence(p: Log, q: Log, order: int) -> float:
    """Rényi divergence of ``order`` of P from Q, given as logarithms."""
    return float(np.logaddexp.reduce((order * p - (order - 1) * q).ravel())) / (order - 1)


def require_distribution(values: NDArray[np.int64], variance: float) -> None:
    """Chi-square of ``values`` against the discrete Gaussian, over five standard deviations."""
    edge = int(5 * math.sqrt(variance))
    cells = np.arange(-edge, edge + 1)
    expected = np.exp(log_pmf(variance, cells))
    found = np.bincount(np.clip(values, -edge - 1, edge + 1) + edge + 1, minlength=2 * edge + 3)
    found[0] += found[-1]  # both tails together
    expected = np.concatenate([[1 - expected.sum()], expected]) * len(values)
    # Cells of a few values are joined with their neighbours.
    starts = np.concatenate([[0], np.flatnonzero(np.diff(np.cumsum(expected) // 20)) + 1])
    grouped = np.add.reduceat(expected, starts), np.add.reduceat(found[:-1], starts)
    assert stats.chisquare(grouped[1], grouped[0], sum_check=False).pvalue > CHANCE


class TestSampler:
    @pytest.mark.parametrize("deviation", [16.0, 17.3, 40.0, 101.7])
    def test_frequencies_are_the_exact_probabilities(self, deviation: float) -> None:
        require_distribution(discrete_gaussian(1_000_000, deviation**2), deviation**2)

    def test_shares_add_up_to_the_whole_noise(self) -> None:
        shares = [discrete_gaussian(500_000, 400.0) for _ in range(5)]
        require_distribution(np.sum(shares, axis=0), 5 * 400.0)

    def test_a_share_left_out_is_missed_by_that_test(self) -> None:
        shares = [discrete_gaussian(500_000, 400.0) for _ in range(4)]
        with pytest.raises(AssertionError):
            require_distribution(np.sum(shares, axis=0), 5 * 400.0)

    def test_large_deviations(self) -> None:
        for deviation in (2.0**18 / 3, 2.0**40):
            values = discrete_gaussian(1_000_000, deviation**2) / deviation
            assert abs(values.mean()) < 6e-3
            assert np.mean(values**2) == pytest.approx(1, abs=6 * math.sqrt(2e-6))
            assert stats.kstest(values[:100_000], "norm").pvalue > CHANCE

    @pytest.mark.parametrize("count", [0, 1, 2, 16383, 16384, 16385, 40_000])
    def test_any_count_is_filled(self, count: int) -> None:
        values = discrete_gaussian(count, 1e12)
        assert values.shape == (count,)
        assert values.dtype == np.int64
        assert len(np.unique(values)) >= 0.97 * count

    @given(st.floats(16, 2.0**40))
    @settings(max_examples=40)
    def test_the_first_draws_are_exact_and_the_last_one_has_a_chance(
        self, deviation: float
    ) -> None:
        sampler = discrete_noise._sampler(deviation**2)
        assert int(sampler.ends[-1]) == sum(sampler.weights) < 2**64
        assert 2**64 - sum(sampler.weights) <= 2 * len(sampler.weights) + 2
        assert all(0 < height <= 1 for height in sampler.heights)
        assert 16 * deviation - 1 < reach(deviation**2) < 16.2 * deviation + 2

    def test_nothing_beyond_the_reach_and_it_is_rarely_missed(self) -> None:
        sampler = discrete_noise._sampler(256.0)
        beyond = np.arange(sampler.reach + 1, 4 * sampler.reach)
        assert 2 * np.exp(log_pmf(256.0, beyond)).sum() < 1e-55
        assert np.abs(discrete_gaussian(1_000_000, 256.0)).max() <= sampler.reach

    def test_known_words(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sampler = discrete_noise._sampler(256.0)
        first, minus = int(sampler.ends[0]), 1 << 63
        rows = [
            # block, place, coin, what comes of it
            (0, 1, 0, [1]),
            (first - 1, 0, 0, [0]),
            (first, 1 | minus, 0, [-(1 << sampler.bits) - 1]),
            (0, minus, 0, []),  # minus zero
            (int(sampler.ends[-1]), 1, 0, []),  # beyond all weights
            (0, 1, 2**64 - 1, []),
            (int(sampler.ends[9]) - 1, 0, 0, [9 << sampler.bits]),
            (int(sampler.ends[-1]) - 1, 0, 0, []),  # the last block has a chance of 10^-37
        ]
        for block, place, coin, expected in rows:
            triple = np.array([block, place, coin], np.uint64)
            monkeypatch.setattr(discrete_noise, "words", lambda count, triple=triple: triple)
            assert sampler.draw(1).tolist() == expected

    def test_the_repeated_comparison_decides_as_the_first(self) -> None:
        sampler = discrete_noise._sampler(123.4**2)
        generator = np.random.default_rng(0)
        for size in generator.integers(0, sampler.reach, 200):
            block = int(size) >> sampler.bits
            chance = float(sampler.scale * discrete_noise._density(int(size), sampler.variance))
            edge = min(int(chance / sampler.weights[block] * 2**64), 2**64 - 1)
            margin = 1 + edge >> 40
            if edge > 2 * margin:
                assert sampler._keeps(edge - margin - 1, int(size), block)
            if edge + margin + 1 < 2**64:
                assert not sampler._keeps(edge + margin + 1, int(size), block)

    def test_repeating_every_comparison_changes_nothing(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(discrete_noise, "_DOUBT", 1.0)
        require_distribution(discrete_gaussian(20_000, 300.0), 300.0)

    @pytest.mark.parametrize("variance", [-1.0, 0.0, 255.9, 2.0**80 * 1.01, math.nan])
    def test_deviations_out_of_range(self, variance: float) -> None:
        for draw in (lambda: discrete_gaussian(1, variance), lambda: reach(variance)):
            with pytest.raises(ConfigurationError, match=r"between 16 and 2\^40"):
                draw()


# Gradients as patients may make them: any size, and values on which rounding goes one way.
awkward = st.sampled_from([0.0, 0.5, 1.5, 2.5, 1e-30, 1e30, 0.49999997, 7.5])
gradients = st.lists(
    st.one_of(awkward, st.floats(-(2.0**100), 2.0**100, width=32), st.floats(-3, 3, width=32)),
    min_size=1,
    max_size=200,
)


def contribution(gradient: torch.Tensor, mechanism: Mechanism) -> torch.Tensor:
    """Return what one patient adds to a sum over three parameters."""
    third = gradient.numel() // 3
    shapes = [torch.Size([third]), torch.Size([third]), torch.Size([gradient.numel() - 2 * third])]
    total = ClippedSum(torch.zeros(gradient.numel(), dtype=torch.float64), shapes)
    total.add(list(torch.split(gradient, [shape.numel() for shape in shapes])), mechanism)
    return total.vector


def whole_norm_square(vector: torch.Tensor) -> int:
    assert bool((vector == vector.round()).all())
    return sum(int(value) ** 2 for value in vector.tolist())


class TestIntegers:
    @given(
        gradients,
        st.floats(1e-6, 1e6),
        st.sampled_from(["flat", "per-layer"]),
        st.sampled_from([torch.float32, torch.float64]),
    )
    @settings(max_examples=300)
    def test_no_patient_moves_the_sum_by_more_than_the_levels(
        self, values: list[float], clip: float, clipping: Any, dtype: torch.dtype
    ) -> None:
        mechanism = Mechanism(clip, 1.0, 1.0, clipping, LEVELS)
        vector = contribution(torch.tensor(values, dtype=dtype), mechanism)
        assert whole_norm_square(vector) <= LEVELS**2

    # Values of 81.92 steps all round up to 82 of them.
    EVEN = torch.full((40_000,), 1e6)

    def test_also_when_every_value_is_rounded_up(self) -> None:
        mechanism = Mechanism(3.0, 1.0, 1.0, levels=LEVELS)
        assert whole_norm_square(contribution(self.EVEN, mechanism)) <= LEVELS**2

    def test_without_room_for_rounding_that_law_breaks(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Positive control."""
        monkeypatch.setattr(Mechanism, "grid_scale", lambda self, _: self.levels / self.clip_norm)
        mechanism = Mechanism(3.0, 1.0, 1.0, levels=LEVELS)
        assert whole_norm_square(contribution(self.EVEN, mechanism)) > LEVELS**2

    def test_rounding_loses_less_than_its_room(self) -> None:
        generator = torch.Generator().manual_seed(0)
        gradient = torch.randn(10_000, generator=generator, dtype=torch.float64)
        mechanism = Mechanism(1.0, 1.0, 1.0, levels=2**18)
        found = contribution(gradient, mechanism) / mechanism.grid_scale(10_000)
        assert float((found - gradient / gradient.norm()).norm()) < 50 / 2**18 * 1.001
        assert mechanism.grid_scale(10_000) > 2**18 - 51

    @pytest.mark.parametrize(("levels", "values"), [(2**14, 3 * LEVELS**2), (2**24, 2**50)])
    def test_too_few_levels_for_a_model(self, levels: int, values: int) -> None:
        with pytest.raises(ConfigurationError, match=r"raise distributed\.levels"):
            Mechanism(1.0, 1.0, 1.0, levels=levels).grid_scale(values)
        with pytest.raises(ConfigurationError, match="clip norm of 1e-305"):
            Mechanism(1e-305, 1.0, 1.0, levels=levels).grid_scale(1)

    @given(st.lists(st.integers(-60, 60), min_size=4, max_size=4), st.data())
    @settings(max_examples=200)
    def test_limiting_the_sum_brings_neighbours_no_further_apart(
        self, others: list[int], data: st.DataObject
    ) -> None:
        patient = data.draw(st.lists(st.integers(-40, 40), min_size=4, max_size=4))
        silent = pytest.MonkeyPatch()
        with silent.context() as patch:
            patch.setattr(distributed, "discrete_gaussian", lambda n, _: np.zeros(n, np.int64))
            sums = [
                noisy_integers(
                    ClippedSum(torch.tensor(vector, dtype=torch.float64), [torch.Size([4])]),
                    NoiseShare(256.0, 50),
                )
                for vector in (others, [a + b for a, b in zip(others, patient, strict=True)])
            ]
        moved = (sums[1] - sums[0]).abs()
        assert bool((moved <= torch.tensor(patient).abs()).all())
        assert float(torch.stack(sums).abs().max()) <= 50

    def test_nothing_exceeds_the_bound_of_the_encoding(self) -> None:
        job = make_job(privacy__distributed__levels=LEVELS)
        share = noise_share(job)
        for extreme in (1e15, -1e15, 0.0):
            total = ClippedSum(torch.full((10_000,), extreme).double(), [torch.Size([10_000])])
            values = noisy_integers(total, share)
            assert whole_norm_square(values) > 0
            assert float(values.abs().max()) <= share.bound

    def test_the_share_of_a_job(self) -> None:
        job = make_job()
        share = noise_share(job)
        # Five sites, one of them unseen: four shares make up the noise of the sum.
        assert 4 * share.variance == pytest.approx((1.5 * 2**18) ** 2, rel=1e-12)
        assert share.limit == 20 * 2**18
        assert share.bound == share.limit + reach(share.variance)
        # 50 sites of this kind fit into words of 32 bits.
        Encoding((Segment("w", (3,), share.bound, integer=True),), 32, 50)

    def test_values_that_float64_cannot_hold(self) -> None:
        with pytest.raises(ConfigurationError, match=r"lower distributed\.levels"):
            NoiseShare(256.0, 2**53)

    @pytest.mark.parametrize("distributed_too", [False, True])
    def test_whole_noise_and_shares_do_not_mix(self, distributed_too: bool) -> None:
        if distributed_too:
            total = ClippedSum.zero([nn.Parameter(torch.zeros(3))])
            with pytest.raises(ValueError, match="whole numbers"):
                noisy_mean(total, Mechanism(1.0, 1.0, 1.0, levels=LEVELS))
            return
        job = make_job(privacy__distributed=None)
        for call in (lambda: noise_share(job), lambda: mean_update(job, 1, {}, 5)):
            with pytest.raises(ConfigurationError, match=r"no privacy\.distributed"):
                call()


class TestStep:
    def step(self, cohort: int, share: NoiseShare, values: int = 100_000) -> torch.Tensor:
        weight = nn.Parameter(torch.zeros(values))
        engine = BackwardEngine([weight], lambda examples: weight.sum().expand(len(examples)))
        mechanism = Mechanism(1.0, 1.0, 1.0, levels=LEVELS)
        result = private_integers(engine, range(cohort), lambda i: [i], mechanism, 1.0, share)
        (tensor,) = result.gradients
        assert tensor.dtype == torch.int64
        return tensor

    @pytest.mark.parametrize("patients", [0, 1, 3])
    def test_the_noise_is_added_once_however_many_are_drawn(self, patients: int) -> None:
        values = self.step(patients, NoiseShare(900.0, 10**6)).numpy()
        # All values of this model's gradient are equal: 2^14 / sqrt(10^5) steps less the room.
        each = round(Mechanism(1.0, 1.0, 1.0, levels=LEVELS).grid_scale(100_000) / math.sqrt(1e5))
        require_distribution(values - patients * each, 900.0)

    def test_every_call_draws_new_noise(self) -> None:
        first, second = (self.step(0, NoiseShare(900.0, 10**6)).numpy() for _ in range(2))
        assert abs(np.corrcoef(first, second)[0, 1]) < 6 / math.sqrt(100_000)

    def test_the_mean_update_is_that_of_the_clipped_gradients(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(distributed, "discrete_gaussian", lambda n, _: np.zeros(n, np.int64))
        job = make_job()
        assert job.privacy is not None
        mechanism = Mechanism.of(job.privacy, job.weight("alder"))
        generator = torch.Generator().manual_seed(0)
        sums: dict[str, torch.Tensor] = {"a": torch.zeros(5, 20), "b": torch.zeros(50)}
        expected = torch.zeros(150, dtype=torch.float64)
        shapes = [tensor.shape for tensor in sums.values()]
        for _ in range(3):  # sites
            total = ClippedSum(torch.zeros(150, dtype=torch.float64), shapes)
            for _ in range(7):
                gradient = [torch.randn(shape, generator=generator) for shape in shapes]
                total.add(gradient, mechanism)
                flat = torch.cat([part.flatten() for part in gradient]).double()
                expected += flat * (0.25 / flat.norm())
            site = noisy_integers(total, noise_share(job)).to(torch.int64)
            sums = {"a": sums["a"] + site[:100].view(5, 20), "b": sums["b"] + site[100:]}
        for number in (1, 4):
            update = mean_update(job, number, sums, sites=3)
            assert {n: (t.shape, t.dtype) for n, t in update.items()} == {
                "a": (torch.Size([5, 20]), torch.float64),
                "b": (torch.Size([50]), torch.float64),
            }
            # 20 patients are expected at each of three sites.
            wanted = -job.learning_rate(number - 1) * expected / (3 * 20)
            found = torch.cat([update["a"].flatten(), update["b"]])
            assert float((found - wanted).norm()) < 1e-4 * float(wanted.norm())
        assert job.learning_rate(0) == 0.5 > job.learning_rate(3)


GOLDEN = [
    # q, noise multiplier, order, Rényi divergence by direct summation with 40 digits (mpmath) of
    # the discrete Gaussian of deviation 8 z, shifted by 8 in one coordinate
    (0.1, 1.0, 2, 0.0170368632362),
    (0.1, 1.0, 16, 5.5439121709),
    (0.01, 0.7, 8, 2.90028446653),
    (0.5, 2.0, 4, 0.157368203194),
    (1.0, 1.5, 5, 1.11111111111),
]
SHARES = NoiseShares(levels=LEVELS, sites=5, unseen_sites=1)


def release(q: float, noise_multiplier: float, shares: NoiseShares | None = SHARES) -> Release:
    return Release(sampling_rate=q, noise_multiplier=noise_multiplier, steps=1, distributed=shares)


def shifted(variance: float, shift: tuple[int, ...], order: int) -> tuple[Log, Log]:
    """Logarithms of the noise and of the noise moved by ``shift``, on a grid that holds both."""
    axes = []
    for step in shift:
        edge = order * abs(step) + int(14 * math.sqrt(variance)) + 1
        values = np.arange(-edge, edge + 1)
        axes.append((log_pmf(variance, values), log_pmf(variance, values - step)))
    still, moved = (np.array(0.0), np.array(0.0))
    for one, other in axes:
        still, moved = np.add.outer(still, one), np.add.outer(moved, other)
    return still, moved


class TestAccounting:
    @pytest.mark.parametrize(("q", "noise", "order", "golden"), GOLDEN)
    def test_golden_values(self, q: float, noise: float, order: int, golden: float) -> None:
        assert rdp(release(q, noise), order) == pytest.approx(golden, rel=1e-9)

    @pytest.mark.parametrize("shift", [(5,), (3, 4), (1, 2, 2, 4)])
    @pytest.mark.parametrize(("q", "noise"), [(0.05, 0.6), (0.3, 1.0), (0.9, 2.0), (1.0, 1.3)])
    @pytest.mark.parametrize("order", [2, 3, 5])
    def test_never_below_the_exact_divergence_in_both_directions(
        self, shift: tuple[int, ...], q: float, noise: float, order: int
    ) -> None:
        """One patient moves the sum by ``shift`` when drawn; small so that grids stay small."""
        length = math.sqrt(sum(step**2 for step in shift))
        if len(shift) == 4:
            shift, length = (1, 1, 1), math.sqrt(3)
        variance = (noise * length) ** 2
        without, moved = shifted(variance, shift, order)
        with_patient = (
            np.logaddexp(math.log1p(-q) + without, math.log(q) + moved) if q < 1 else moved
        )
        claimed = rdp(release(q, noise), order)
        assert divergence(with_patient, without, order) <= claimed * (1 + 1e-9)
        assert divergence(without, with_patient, order) <= claimed * (1 + 1e-9)

    @given(st.floats(0.001, 0.999), st.floats(0.5, 8), st.integers(2, 32), st.integers(1, 6))
    @settings(max_examples=100)
    def test_the_mixture_is_further_from_the_noise_than_the_reverse(
        self, q: float, deviation: float, order: int, shift: int
    ) -> None:
        without, moved = shifted(deviation**2, (shift,), order)
        mixed = np.logaddexp(math.log1p(-q) + without, math.log(q) + moved)
        forward, reverse = divergence(mixed, without, order), divergence(without, mixed, order)
        assert reverse <= forward * (1 + 1e-9) + 1e-12

    @pytest.mark.parametrize("sites", [2, 3, 5])
    @pytest.mark.parametrize("deviation", [0.6, 0.8, 1.0, 1.5])
    def test_sums_of_shares_are_as_close_as_the_theorem_says(
        self, sites: int, deviation: float
    ) -> None:
        values = np.arange(-40, 41)
        one = np.exp(log_pmf(deviation**2, values))
        total = one
        for _ in range(sites - 1):
            total = signal.convolve(total, one, method="direct")
        middle = len(total) // 2
        near = np.arange(-8, 9)
        apart = np.abs(np.log(total[middle + near]) - log_pmf(sites * deviation**2, near)).max()
        exponents = [2 * math.pi**2 * deviation**2 * k / (k + 1) for k in range(1, sites)]
        assert apart <= 10 * math.fsum(math.exp(-exponent) for exponent in exponents) + 1e-12

    def test_shares_of_sixteen_steps_leave_nothing_to_count(self) -> None:
        assert math.pi**2 * 16**2 * math.log10(math.e) > 1000  # of sums, in decimal places

    @pytest.mark.parametrize("order", [2, 8, 32])
    def test_one_colluding_site_more_breaks_the_claim(self, order: int) -> None:
        """Positive control: the shares of 3 instead of 4 sites are less than what is claimed."""
        noise, length = 1.0, 8
        without, moved = shifted((noise * length) ** 2 * 3 / 4, (length,), order)
        mixed = np.logaddexp(math.log(0.9) + without, math.log(0.1) + moved)
        assert divergence(mixed, without, order) > 1.1 * rdp(release(0.1, noise), order)
        enough, shift = shifted((noise * length) ** 2, (length,), order)
        mixed = np.logaddexp(math.log(0.9) + enough, math.log(0.1) + shift)
        assert divergence(mixed, enough, order) <= rdp(release(0.1, noise), order) * (1 + 1e-9)

    @given(st.floats(0.001, 1), st.floats(0.5, 20), st.integers(2, 64))
    def test_costs_what_a_site_of_its_own_noise_would(
        self, q: float, noise: float, order: int
    ) -> None:
        assert rdp(release(q, noise), order) == rdp(release(q, noise, None), order)

    def test_figures_by_pld_and_prv_do_not_exist_and_nothing_is_dropped(self) -> None:
        releases = {release(0.1, 1.0): 3, release(0.1, 1.0, None): 2}
        result = figures(releases, 8, 1e-5, prv=True)
        assert (result.pld_epsilon, result.prv_epsilon) == (None, None)
        assert result.rdp == total_rdp(releases, 8) == pytest.approx(5 * rdp(release(0.1, 1.0), 8))
        for figure in (pld_epsilon, prv_epsilon):
            with pytest.raises(ConfigurationError, match="noise is distributed"):
                figure(releases, 1e-5)
        assert figures({release(0.1, 1.0): 0}, 8, 1e-5).pld_epsilon == 0


class TestSchemas:
    def test_leaves_from_before_keep_their_bytes(self) -> None:
        old = '{"noise_multiplier":2.0,"sampling_rate":0.1,"steps":5}'
        plain = Release.model_validate_json(old)
        reservation = Reservation(cohort="c1" * 32, release=plain, starts=1)
        assert "distributed" not in reservation.model_dump_json()
        entry = admitted(plain)
        leaf = Leaf(entry=entry, salt="ab" * 32)
        assert b"distributed" not in leaf.content()
        shared = Leaf(entry=admitted(release(0.1, 2.0)), salt="ab" * 32)
        assert b'"distributed":{"levels":16384,"sites":5,"unseen_sites":1}' in shared.content()
        for each in (leaf, shared):
            assert Leaf.model_validate_json(each.content()) == each

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"steps": 2}, "one step a round, not 2"),
            ({"noise_multiplier": None}, "needs a noise multiplier"),
            ({"noise_multiplier": 1e-3}, "by 8.192 grid steps"),
            ({"noise_multiplier": 1e200}, "by inf grid steps"),
            ({"distributed": {"levels": LEVELS, "sites": 3, "unseen_sites": 2}}, "fewer than two"),
            ({"distributed": {"levels": LEVELS, "sites": 2, "unseen_sites": 0}}, "sites"),
            ({"distributed": {"levels": 100, "sites": 3, "unseen_sites": 0}}, "levels"),
        ],
    )
    def test_releases_that_no_shares_make(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValidationError, match=message):
            Release.model_validate(release(0.1, 1.0).model_dump() | changes)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"aggregation": "secure_groups", "minimum_sites": 6}, "needs aggregation secure_sum"),
            ({"aggregation": "plain_with_local_dp"}, "needs aggregation secure_sum"),
            ({"training__local_steps": 2}, "needs training.local_steps 1, not 2"),
            ({"training__optimiser": "adam"}, "needs training.optimiser sgd"),
            ({"training__weight_decay": 0.1}, "weight_decay 0"),
            ({"site_sizes": {"alder": "medium", "birch": "medium"}}, "size class small"),
            ({"privacy__distributed__unseen_sites": 4}, "fewer than two"),
            ({"privacy__distributed__unseen_sites": -1}, "unseen_sites"),
            ({"privacy__distributed": {}}, "unseen_sites"),
            ({"privacy__distributed__levels": 2**13}, "levels"),
            ({"privacy__noise_multiplier": 1e-5}, "grid steps"),
        ],
    )
    def test_jobs_that_cannot_share_noise(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValidationError, match=message):
            make_job(**changes)

    def test_it_is_off_by_default(self) -> None:
        privacy = JobSpec.model_validate({"privacy": {}}).privacy
        assert privacy is not None
        assert privacy.distributed is None
        make_job(site_sizes={"alder": "small"})
        make_job(privacy__distributed__unseen_sites=3)


def admitted(train: Release) -> Admitted:
    return Admitted(
        at=0,
        job="a" * 64,
        sequence=0,
        name="job",
        coordinator="coordinator",
        model="cardiomm",
        part="full",
        rounds=1,
        spare_rounds=0,
        clip_norm=1.0,
        clipping="flat",
        delta=1e-5,
        policy="0" * 64,
        phases={"train": Reservation(cohort="c" * 64, release=train, starts=1)},
    )


class TestLedger:
    def test_a_job_reserves_what_its_sum_costs(self) -> None:
        phases = phases_of(make_job())
        shares = NoiseShares(levels=2**18, sites=5, unseen_sites=1)
        assert phases["train"][0] == Release(
            sampling_rate=0.1, noise_multiplier=1.5, steps=1, distributed=shares
        )
        assert phases["evaluate"][0].distributed is None

    @pytest.mark.parametrize(("sites", "possible"), [(4, False), (5, True), (6, True)])
    def test_a_sum_over_fewer_sites_than_planned_is_no_entry(
        self, sites: int, possible: bool
    ) -> None:
        place = {"at": 0, "job": "a" * 64, "phase": "train", "round": 1, "attempt": 1}
        life = [
            Opened(
                at=0,
                site="north",
                site_key="e" * 64,
                secret_fingerprint="f" * 64,
                epsilon=8,
                delta=1e-5,
                order=8,
            ),
            admitted(release(0.1, 2.0)),
            Started(**place, sequence=1),
            Stored(**place, sequence=2, sha256="1" * 64),
            Masked(**place, sequence=3, header="2" * 64),
            Unmasked(
                **place,
                sequence=4,
                survivors=tuple(itertools.islice("abcdefgh", sites)),
                answer="3" * 64,
            ),
            Padding(at=0),
        ]
        if possible:
            assert replay(life).size == len(life)
            return
        with pytest.raises(
            LedgerError, match="over 4 sites, but the noise is shared by at least 5"
        ):
            replay(life)
