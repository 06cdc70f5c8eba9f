"""The memorisation gate: what it flags, what it lets pass, and that chance alone gives 5 %."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from clip_copies import different_hearts, noisy, turned
from torch import Tensor

from fedcmr_shared.errors import ConfigurationError, DataError
from fedcmr_shared.metrics.memorisation import (
    LEAST_HELD_OUT,
    Findings,
    GateConfig,
    compare,
    examine,
)
from fedcmr_shared.models.copy_detector import CopyDetector, CopyDetectorConfig, train_detector

FAST = CopyDetectorConfig(width=8, steps=40, batch=20)
QUICK = GateConfig(FAST, resamples=500)
LONGER = replace(FAST, steps=140, batch=30)
STEP = GateConfig(CopyDetectorConfig(width=4, steps=1, batch=4), resamples=100)
PATIENTS = 60


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(count: int, seed: int) -> Tensor:
    """Embeddings of clips that have nothing to do with each other, of eight dimensions in 32."""
    axes = torch.randn(8, 32, generator=seeded(99))
    return torch.randn(count, 8, generator=seeded(seed)) @ axes


def compared(synthetic: Tensor, seed: int = 0, config: GateConfig = STEP) -> Findings:
    """``synthetic`` against training and held-out points that depend on ``seed``."""
    training, held_out = points(PATIENTS, 3 * seed), points(PATIENTS, 3 * seed + 1)
    return compare(training, held_out, synthetic, config, seeded(seed))


def fails(found: Findings) -> bool:
    return found.training.interval[0] > 0 or found.synthetic.interval[0] > 0


class Site(NamedTuple):
    training: Tensor
    held_out: Tensor
    others: Tensor
    detector: CopyDetector

    def shares(self, synthetic: Tensor) -> Findings:
        clips = (self.training, self.held_out, synthetic)
        return compare(*(self.detector.embed(each) for each in clips), QUICK, seeded())


@pytest.fixture(scope="module")
def site() -> Site:
    clips = different_hearts(5 * PATIENTS)
    training, held_out, others = torch.split(clips, [PATIENTS, PATIENTS, 3 * PATIENTS])
    detector = train_detector(training, LONGER, seeded())
    return Site(training, held_out, others, detector)


COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "exact": lambda clips: clips,
    "mirrored left and right": lambda clips: clips.flip(-1),
    "mirrored up and down": lambda clips: clips.flip(-2),
    "turned by 5 degrees": lambda clips: turned(clips, 5),
    "turned by -10 degrees": lambda clips: turned(clips, -10),
    "begun later": lambda clips: torch.roll(clips, 5, 2),
    "noisy": lambda clips: noisy(clips, 0.2),
    "darker": lambda clips: 0.7 * clips - 0.3,
    "mirrored, turned, noisy": lambda clips: noisy(turned(clips.flip(-1), 8), 0.1),
}


class TestCopies:
    @pytest.mark.parametrize("kind", COPIES)
    def test_altered_copies_are_flagged(self, site: Site, kind: str) -> None:
        found = site.shares(COPIES[kind](site.training))
        assert len(found.copies) / PATIENTS >= 0.9
        assert found.synthetic.share == len(found.copies) / PATIENTS
        assert found.training.share >= 0.9
        assert fails(found)

    def test_patients_who_were_never_seen_are_not(self, site: Site) -> None:
        """Over splits of the others into held-out and "synthetic": the shares are those of chance.

        One detector and one set of training patients serve all splits.
        """
        training, others = (site.detector.embed(each) for each in (site.training, site.others))
        found = []
        for seed in range(30):
            order = torch.randperm(len(others), generator=seeded(seed))
            held_out, fresh = others[order[:PATIENTS]], others[order[PATIENTS : 2 * PATIENTS]]
            found.append(compare(training, held_out, fresh, QUICK, seeded(seed)))
        assert 0.02 <= np.mean([each.training.share for each in found]) <= 0.09
        assert sum(fails(each) for each in found) <= 4

    def test_a_generator_that_memorised_a_few_patients_fails(self, site: Site) -> None:
        """Clips of 8 of 60 training patients, over and over, as a worn decoder would give them."""
        memorised = noisy(site.training[:8].repeat(8, 1, 1, 1, 1)[:PATIENTS], 0.1)
        found = site.shares(memorised)
        assert len(found.copies) / PATIENTS >= 0.9
        assert found.synthetic.interval[0] > 0.5


class TestExamine:
    def test_a_memorising_generator_fails_and_new_patients_pass(self) -> None:
        clips = different_hearts(3 * PATIENTS, seed=1)
        training, held_out, fresh = torch.split(clips, PATIENTS)
        honest = examine(training, held_out, fresh, replace(QUICK, detector=LONGER), seeded())
        assert honest.outcome == "passed"
        assert honest.text.startswith("passed: of 60 training patients ")
        assert honest.found is not None
        assert honest.found >= 0.95
        copied = noisy(training[:12].repeat(5, 1, 1, 1, 1), 0.1)
        memorising = examine(training, held_out, copied, QUICK, seeded())
        assert memorising.outcome == "failed"
        assert "\n" not in memorising.text

    def test_a_detector_that_misses_plain_copies_lets_nothing_pass(self) -> None:
        """The attack has to succeed where it should; what it finds all the same has been found."""
        clips = different_hearts(3 * PATIENTS, seed=1)
        training, held_out, fresh = torch.split(clips, PATIENTS)
        found = examine(training, held_out, fresh, QUICK, seeded()).found
        assert found is not None
        assert found < 1
        strict = replace(QUICK, least_found=(1 + found) / 2)
        weak = examine(training, held_out, fresh, strict, seeded())
        assert weak.found == found
        assert weak.outcome == "undecided"
        assert weak.text.startswith("undecided: the detector found ")
        content = replace(QUICK, least_found=found)
        assert examine(training, held_out, fresh, content, seeded()).outcome == "passed"
        copied = noisy(training[:12].repeat(5, 1, 1, 1, 1), 0.1)
        assert examine(training, held_out, copied, strict, seeded()).outcome == "failed"

    def test_59_held_out_patients_decide_nothing_and_60_do(self) -> None:
        training, held_out = different_hearts(8), different_hearts(LEAST_HELD_OUT, 1)
        generator = seeded()
        before = generator.get_state()
        few = examine(training, held_out[1:], held_out[1:], STEP, generator)
        assert (few.outcome, few.training, few.held_out) == ("undecided", 8, 59)
        assert few.findings is None
        assert few.text == "undecided: 59 held-out patients, at least 60 needed"
        assert torch.equal(generator.get_state(), before)  # no detector was trained
        enough = examine(training, held_out, held_out, STEP, generator)
        assert enough.outcome != "undecided"
        assert enough.findings is not None

    def test_even_copies_leave_a_small_site_undecided(self) -> None:
        few = different_hearts(10)
        assert examine(few, few, few, STEP, seeded()).outcome == "undecided"

    def test_held_out_patients_who_are_training_patients_decide_nothing(self) -> None:
        """Nothing but rounding exceeds a correlation of 1: even exact copies could pass."""
        training = different_hearts(LEAST_HELD_OUT)
        assert examine(training, training, training, STEP, seeded()).outcome == "undecided"
        held_out = torch.cat([training[:6].flip(-1), different_hearts(LEAST_HELD_OUT - 6, 1)])
        found = examine(training, held_out, training, STEP, seeded())
        assert found.findings is not None
        assert found.outcome == "undecided"
        assert found.text.startswith("undecided: with tau 1.000 the detector does not tell")

    def test_a_detector_whose_training_went_astray_decides_nothing(self) -> None:
        """What is no number exceeds nothing, so that even exact copies would pass."""
        training, held_out = different_hearts(8), different_hearts(LEAST_HELD_OUT, 1)
        astray = replace(STEP, detector=replace(STEP.detector, steps=3, learning_rate=1e30))
        copied = training.repeat(8, 1, 1, 1, 1)[:LEAST_HELD_OUT]
        found = examine(training, held_out, copied, astray, seeded())
        assert found.findings is not None
        assert math.isnan(found.findings.tau)
        assert found.text.startswith("undecided: with tau nan the detector does not tell")
        assert found.outcome == "undecided"

    def test_equal_generators_give_equal_findings(self) -> None:
        training, held_out = different_hearts(8), different_hearts(LEAST_HELD_OUT, 1)
        made = different_hearts(LEAST_HELD_OUT, 2)
        one, same, other = (
            examine(training, held_out, made, STEP, seeded(seed)) for seed in (1, 1, 2)
        )
        assert one == same
        assert one != other

    @pytest.mark.parametrize("count", [59, 61, 240])
    def test_as_many_synthetic_clips_as_held_out_patients_are_needed(self, count: int) -> None:
        clips = torch.zeros(60, 1, 2, 4, 4)
        with pytest.raises(ConfigurationError, match=f"{count} synthetic clips for 60 held-out"):
            examine(clips, clips, torch.zeros(count, 1, 2, 4, 4), STEP, seeded())

    @pytest.mark.parametrize("place", [0, 1, 2])
    @pytest.mark.parametrize(
        ("wrong", "said"),
        [
            (torch.zeros(60, 1, 2, 4, 6), "cannot be compared"),
            (torch.zeros(60, 2, 4, 4), "cannot be compared"),
            (torch.zeros(60, 2, 2, 4, 4), "cannot be compared"),
            (torch.full((60, 1, 2, 4, 4), math.nan), r"not in \[-1, 1\]"),
            (torch.full((60, 1, 2, 4, 4), 255.0), r"not in \[-1, 1\]"),
        ],
    )
    def test_clips_that_cannot_be_compared_are_refused(
        self, place: int, wrong: Tensor, said: str
    ) -> None:
        clips = [torch.zeros(60, 1, 2, 4, 4) for _ in range(3)]
        clips[place] = wrong
        with pytest.raises(DataError, match=said):
            examine(*clips, STEP, seeded())  # type: ignore[arg-type]  # three clips

    @pytest.mark.parametrize(
        ("field", "value"),
        [("chance", 0.0), ("chance", math.nan), ("confidence", 1.0), ("resamples", 99)],
    )
    def test_a_setting_that_cannot_be_used_is_named(self, field: str, value: float) -> None:
        with pytest.raises(ConfigurationError, match=f"^{field} "):
            GateConfig(**{field: value})  # type: ignore[arg-type]


class TestShares:
    """Laws of the shares, on embeddings without a network."""

    def test_chance_gives_five_percent_and_seldom_fails(self) -> None:
        found = [compared(points(PATIENTS, 3 * seed + 2), seed) for seed in range(300)]
        assert np.mean([each.training.share for each in found]) == pytest.approx(0.05, abs=0.006)
        excess = [each.synthetic.share - each.synthetic.chance for each in found]
        assert np.mean(excess) == pytest.approx(0, abs=0.01)
        assert np.mean([fails(each) for each in found]) <= 0.03

    def test_more_clips_than_held_out_patients_would_find_more_neighbours(self) -> None:
        """Why sizes must match: four times as many give up to 1 - 0.95⁴ = 18.5 % by chance."""
        found = [compared(points(4 * PATIENTS, 3 * seed + 2), seed) for seed in range(200)]
        assert 0.13 < np.mean([each.training.share for each in found]) < 0.20

    def test_the_training_patients_themselves_are_all_copies(self) -> None:
        found = compared(points(PATIENTS, 0))
        assert found.training.share == found.synthetic.share == 1
        assert found.copies == tuple(range(PATIENTS))
        assert found.made.ratio == pytest.approx(0, abs=1e-6)
        assert found.made.authenticity == 0
        assert found.nearer_to_training == 1

    def test_new_points_lie_as_the_held_out_ones_do(self) -> None:
        found = [compared(points(PATIENTS, 3 * seed + 2), seed) for seed in range(60)]
        for name in ("ratio", "authenticity"):
            made, held_out = (
                np.mean([getattr(getattr(each, kind), name) for each in found])
                for kind in ("made", "held_out")
            )
            assert made == pytest.approx(held_out, abs=0.03)
        nearer = [each.nearer_to_training for each in found]
        assert np.mean(nearer) == pytest.approx(0.5, abs=0.03)

    def test_a_higher_chance_lowers_tau_and_raises_the_shares(self) -> None:
        found = [
            compared(points(PATIENTS, 2), config=replace(STEP, chance=chance))
            for chance in (0.02, 0.05, 0.1, 0.3)
        ]
        taus = [each.tau for each in found]
        assert taus == sorted(taus, reverse=True)
        for name in ("training", "synthetic"):
            shares = [getattr(each, name).share for each in found]
            assert shares == sorted(shares)
            assert shares[0] < shares[-1]

    def test_more_copies_give_larger_shares(self) -> None:
        training, fresh = points(PATIENTS, 0), points(PATIENTS, 2)
        found = [compared(torch.cat([training[:n], fresh[n:]])) for n in (0, 6, 12, 30, 60)]
        for name in ("training", "synthetic"):
            shares = [getattr(each, name).share for each in found]
            assert shares == sorted(shares)
        assert [fails(found[k]) for k in (0, 2, 3, 4)] == [False, True, True, True]

    def test_either_share_can_fail_a_generator(self) -> None:
        """One patient copied often, and many patients near few clips."""
        training, fresh = points(PATIENTS, 0), points(PATIENTS, 2)
        often = compared(torch.cat([training[:1].expand(20, -1), fresh[20:]]))
        assert often.training.interval[0] <= 0 < often.synthetic.interval[0]
        crowd = training[:1] + 0.05 * points(20, 5)
        patients = torch.cat([crowd, training[20:]])
        made = torch.cat([training[:1], fresh[1:]])
        many = compare(patients, points(PATIENTS, 1), made, STEP, seeded())
        assert many.synthetic.interval[0] <= 0 < many.training.interval[0]

    def test_the_order_of_clips_does_not_matter(self) -> None:
        training, held_out = points(PATIENTS, 0), points(PATIENTS, 1)
        made = torch.cat([training[:10], points(PATIENTS, 2)[10:]])
        order = torch.randperm(PATIENTS, generator=seeded())
        one = compare(training, held_out, made, STEP, seeded())
        other = compare(training[order], held_out[order], made[order], STEP, seeded())
        assert other.tau == pytest.approx(one.tau)
        assert (other.training.share, other.synthetic[:2]) == (
            one.training.share,
            one.synthetic[:2],
        )
        assert sorted(order[list(other.copies)].tolist()) == list(one.copies)
        assert other.made == pytest.approx(one.made)
        assert other.nearer_to_training == one.nearer_to_training

    def test_the_bootstrap_comes_from_the_generator(self) -> None:
        made = points(PATIENTS, 2)
        intervals = [
            compare(points(60, 0), points(60, 1), made, STEP, seeded(seed)).training.interval
            for seed in (1, 1, 2)
        ]
        assert intervals[0] == intervals[1] != intervals[2]

    def test_of_few_training_patients_chance_is_larger(self) -> None:
        """The largest of 8 correlations is exceeded by a ninth with probability 1 / 9."""
        found = compare(points(8, 0), points(60, 1), points(60, 2), STEP, seeded())
        assert found.training.chance == pytest.approx(1 / 9)
        honest = [
            compare(points(8, 3 * k), points(60, 3 * k + 1), points(60, 3 * k + 2), STEP, seeded(k))
            for k in range(200)
        ]
        assert np.mean([each.training.share for each in honest]) == pytest.approx(1 / 9, abs=0.03)
        assert np.mean([fails(each) for each in honest]) <= 0.1
        copied = compare(
            points(8, 0), points(60, 1), points(8, 0).repeat(8, 1)[:60], STEP, seeded()
        )
        assert fails(copied)
