"""Simulated hearts as a generator sees them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from fedcmr_client.store.split import SPLITS, SplitFractions
from fedcmr_shared.errors import DataError
from fedcmr_shared.metrics.phenotypes.clip import measure_clip
from fedcmr_shared.metrics.phenotypes.table import NAMES
from fedcmr_shared.models.clips import clip_grid
from fedcmr_shared.models.cpgg import CONFIGS
from fedcmr_shared.models.segmenter import load_segmenter
from fedcmr_simulations.balanced_split import balanced_secret
from fedcmr_simulations.centres import CENTRES, CLIP_COILS, simulate_centre
from fedcmr_simulations.hearts import (
    EJECTION_FRACTIONS,
    SimulatedHeart,
    draw_heart,
    expected_fac,
    simulate_hearts,
)
from fedcmr_simulations.phantom.protocol import CLIP_FRAMES

GRID = clip_grid(CONFIGS["tiny"])
SMALL = replace(GRID, frames=3, rows=16, columns=16)


def named(heart: SimulatedHeart) -> dict[str, float]:
    return dict(zip(NAMES, heart.phenotypes, strict=True))


@cache
def hearts() -> list[SimulatedHeart]:
    return list(simulate_hearts(range(500, 508), GRID, 3))


def test_a_heart_depends_on_its_number_and_the_seed_alone() -> None:
    (first,) = simulate_hearts([7], SMALL, 0)
    *_, again = simulate_hearts([5, 7], SMALL, 0)
    (other,) = simulate_hearts([7], SMALL, 1)
    assert first.patient == again.patient
    np.testing.assert_array_equal(first.clip, again.clip)
    np.testing.assert_array_equal(first.phenotypes, again.phenotypes)
    assert not np.array_equal(first.clip, other.clip)


def test_a_clip_is_one_of_the_networks() -> None:
    heart = hearts()[0]
    assert heart.clip.shape == (GRID.frames, GRID.rows, GRID.columns)
    assert heart.clip.min() >= -1
    assert heart.clip.max() == 1


def test_phenotypes_obey_their_definitions_and_the_unknown_are_missing() -> None:
    values = named(hearts()[0])
    assert values["LVSV"] == pytest.approx(values["LVEDV"] - values["LVESV"])
    assert values["LVEF"] == pytest.approx(100 * values["LVSV"] / values["LVEDV"])
    assert np.isnan(values["LAV max"])
    assert sum(np.isfinite(list(values.values()))) == 10


def test_ejection_fractions_are_spread_evenly() -> None:
    rng = np.random.default_rng(0)
    volumes = [draw_heart("x", rng).heart.volumes for _ in range(400)]
    found = np.array([1 - each.lv_esv / each.lv_edv for each in volumes])
    low, high = EJECTION_FRACTIONS
    counts, _ = np.histogram(found, bins=4, range=(low, high))
    assert counts.sum() == 400
    assert counts.min() > 70


def test_the_expected_change_of_area_is_that_of_the_labels() -> None:
    errors = [heart.single_slice["LVFAC"] - expected_fac(named(heart)) for heart in hearts()]
    assert np.abs(errors).max() < 4
    assert np.abs(np.mean(errors)) < 1.5


def test_more_ejection_is_more_change_of_area() -> None:
    asked = [expected_fac({"LVEDV": 150, "LVESV": v, "LVM": 100}) for v in (120, 90, 60, 40)]
    assert asked == sorted(asked)
    assert asked[0] < 25
    assert asked[-1] > 60


@pytest.mark.parametrize("name", ["LVEDV", "LVESV", "LVM"])
def test_nothing_is_expected_of_unknown_volumes(name: str) -> None:
    values = {"LVEDV": 150.0, "LVESV": 60.0, "LVM": 100.0, name: np.nan}
    with pytest.raises(DataError, match=f"phenotype {name} is needed"):
        expected_fac(values)


def test_what_is_measured_on_true_clips_is_the_truth() -> None:
    segmenter = load_segmenter().model
    pairs = [
        (measure_clip(heart.clip, GRID.pixel_mm, segmenter), heart.single_slice)
        for heart in hearts()
    ]
    change = [found["LVFAC"] - truth["LVFAC"] for found, truth in pairs]
    area = [found["LVEDA"] / truth["LVEDA"] for found, truth in pairs]
    assert np.median(np.abs(change)) < 3
    assert np.median(area) == pytest.approx(1, abs=0.06)


def test_a_hospital_of_clips_has_one_beating_slice_of_each_patient(tmp_path: Path) -> None:
    with simulate_centre(tmp_path / "site", CENTRES[0], 3, 0, "clip") as store:
        shown = [
            (scan.modality, scan.frames, scan.slices, scan.coils)
            for scan in (record.metadata for record in store.scans())
        ]
    assert shown == [("cine", CLIP_FRAMES, 1, CLIP_COILS)] * 3


@pytest.mark.parametrize("part", SPLITS)
def test_a_part_of_the_split_without_a_share_is_refused(part: str) -> None:
    """Of such a split no secret is balanced: the search would not end."""
    shares = {each: 0.0 if each == part else 0.5 for each in SPLITS}
    with pytest.raises(DataError, match=f"the part {part} of a virtual site's patients is empty"):
        balanced_secret("alder 0", ["a", "b", "c"], SplitFractions(**shares))
