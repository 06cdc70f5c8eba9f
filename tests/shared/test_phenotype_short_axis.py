"""Phenotypes of hearts made of cylinders and rings, whose numbers are known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter, map_coordinates

from fedcmr_shared.errors import DataError
from fedcmr_shared.metrics.phenotypes.measurement import measure
from fedcmr_shared.metrics.phenotypes.motion import strains, track
from fedcmr_shared.metrics.phenotypes.short_axis import (
    ShortAxis,
    Spacing,
    single_slice,
    volumes,
)
from fedcmr_shared.metrics.phenotypes.table import NAMES
from fedcmr_shared.metrics.phenotypes.wall import SegmentAxes, levels, segment_axes, wall_thickness

MM = 1.0
SIZE = 110
SEPTAL_LEFT = SegmentAxes((-1.0, 0.0), (0.0, -1.0))


def slice_of(inner: float, outer: float, rv: float = 22.0, thick: float = 0.0) -> np.ndarray:
    """Round LV with the RV on its left; ``thick`` moves the cavity away from the septum (mm)."""
    y, x = np.mgrid[:SIZE, :SIZE] * MM - SIZE * MM / 2
    labels = np.zeros((SIZE, SIZE), np.uint8)
    labels[np.hypot(x + outer + 4, y) < rv] = 3
    labels[np.hypot(x, y) < outer] = 2
    labels[np.hypot(x - thick, y) < inner] = 1
    return labels


def beating(frames: int = 2, slices: int = 8, thick: float = 0.0) -> ShortAxis:
    """Cavity from 24 to 16 mm, wall area constant, RV from 22 to 18 mm; smaller towards the apex (the last slice)."""
    stack = np.zeros((frames, slices, SIZE, SIZE), np.uint8)
    for frame in range(frames):
        share = 0.5 - 0.5 * math.cos(2 * math.pi * frame / frames)
        for level in range(slices):
            scale = 1 - 0.05 * level
            inner = scale * (24 - 8 * share)
            outer = math.sqrt(inner**2 + scale**2 * (32**2 - 24**2))
            rv = scale * (22 - 4 * share)
            stack[frame, level] = slice_of(inner, outer, rv, thick * scale)
    return ShortAxis(stack, Spacing(MM, MM, 8.0), 60.0)


def test_volumes_are_voxels_times_pitch() -> None:
    heart = beating()
    counts = heart.pixels(1).sum(axis=1) * 8 / 1000
    found = volumes(heart)
    assert found["LVEDV"] == pytest.approx(counts[0])
    assert found["LVESV"] == pytest.approx(counts[1])
    assert found["LVSV"] == pytest.approx(counts[0] - counts[1])
    assert found["LVEF"] == pytest.approx(100 * (1 - counts[1] / counts[0]))
    assert found["LVCO"] == pytest.approx(found["LVSV"] * 60 / 1000)
    assert found["LVM"] == pytest.approx(1.05 * heart.pixels(2)[0].sum() * 8 / 1000)


def test_the_rv_is_read_at_the_systole_of_the_lv() -> None:
    heart = beating(frames=4)
    labels = heart.labels.copy()
    labels[3][labels[3] == 3] = 0  # smallest RV, but not the smallest LV
    found = volumes(replace(heart, labels=labels))
    assert heart.end_systole == 2
    assert found["RVESV"] == pytest.approx(volumes(heart)["RVESV"])


@settings(max_examples=20)
@given(st.floats(0.3, 4), st.floats(0.3, 4), st.floats(2, 15), st.floats(0.5, 3))
def test_ratios_ignore_spacing_and_volumes_scale_with_it(
    row: float, column: float, pitch: float, factor: float
) -> None:
    heart = replace(beating(), spacing=Spacing(row, column, pitch))
    wider = replace(heart, spacing=Spacing(row, column, factor * pitch))
    unknown = replace(heart, spacing=None)
    first, second = volumes(heart), volumes(wider)
    assert volumes(unknown) == {name: first[name] for name in ("LVEF", "RVEF")}
    for name, value in first.items():
        times = 1 if name.endswith("EF") else factor
        assert second[name] == pytest.approx(times * value)


def test_order_of_slices_and_exchanged_axes_change_nothing() -> None:
    heart = beating(frames=8, thick=3.0)
    expected = measure(heart)
    assert len(expected) == 61
    assert set(expected) <= set(NAMES)
    upside_down = replace(heart, labels=heart.labels[:, ::-1])
    assert volumes(upside_down) == pytest.approx(volumes(heart))
    assert wall_thickness(upside_down) == pytest.approx(wall_thickness(heart))
    exchanged = replace(heart, labels=heart.labels.swapaxes(-1, -2), mirrored=True)
    found = measure(exchanged)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # Contours and rays start elsewhere, so that all but the volumes differ a little.
        tolerance = {"E": 0.1, "W": 0.01}.get(name[0], 1e-9)
        assert found[name] == pytest.approx(value, rel=tolerance), name


def test_unmarked_mirror_images_have_septum_and_segments_exchanged() -> None:
    """The control of the test above: the mark matters."""
    heart = beating()
    honest = segment_axes(replace(heart, labels=heart.labels.swapaxes(-1, -2), mirrored=True))
    wrong = segment_axes(replace(heart, labels=heart.labels.swapaxes(-1, -2)))
    assert honest is not None
    assert wrong is not None
    assert np.dot(honest.anterior, wrong.anterior) == pytest.approx(-1)


@pytest.mark.parametrize(
    ("angle", "numbers"),
    [
        (0, (1, 7, 13)),
        (-20, (1, 7, 13)),
        (60, (2, 8, 14)),
        (89, (2, 8, 14)),
        (91, (3, 9, 14)),
        (120, (3, 9, 14)),
        (180, (4, 10, 15)),
        (-120, (5, 11, 16)),
        (-60, (6, 12, 16)),
    ],
)
def test_segments_lie_where_the_heart_association_drew_them(
    angle: float, numbers: tuple[int, int, int]
) -> None:
    """0 degrees anterior (up), 90 septal (left in the image)."""
    turn = math.radians(angle)
    offset = np.array([[-math.sin(turn), -math.cos(turn)]])
    assert tuple(int(SEPTAL_LEFT.segments(offset, level)[0]) for level in range(3)) == numbers


def test_axes_point_to_septum_and_upwards() -> None:
    axes = segment_axes(beating())
    assert axes is not None
    assert axes.septal == pytest.approx((-1, 0), abs=0.03)
    assert axes.anterior == pytest.approx((0, -1), abs=0.03)


@pytest.mark.parametrize(("slices", "expected"), [(6, (2, 2, 2)), (7, (3, 2, 2)), (8, (3, 3, 2))])
def test_thirds_of_the_stack(slices: int, expected: tuple[int, int, int]) -> None:
    found = list(levels(beating(slices=slices)).values())
    assert tuple(found.count(level) for level in range(3)) == expected


def test_wall_of_a_ring_is_its_thickness() -> None:
    heart = beating()
    found = wall_thickness(heart)
    # Slices shrink by 5 % each, 8 mm at the base; points are as many as the contour is long.
    scale = 1 - 0.05 * np.arange(8)
    assert found["WT Global"] == pytest.approx(8 * (scale**2).sum() / scale.sum(), abs=0.1)
    for number in range(1, 7):
        assert found[f"WT_AHA_{number}"] == pytest.approx(8 * 0.95, abs=0.25)


def test_a_thick_septum_is_found_in_the_septal_segments() -> None:
    found = wall_thickness(beating(thick=4.0))
    # Nearest distance R − |c + r e|, here along septum and lateral wall.
    assert found["WT_AHA_14"] == pytest.approx(12 * 0.675, abs=0.6)
    assert found["WT_AHA_16"] == pytest.approx(4 * 0.675, abs=0.6)
    assert found["WT_AHA_3"] > found["WT_AHA_4"] > found["WT_AHA_5"]


def test_strains_of_a_ring() -> None:
    found = strains(beating(frames=12))
    inner, outer = 16 / 24, math.sqrt(16**2 + 32**2 - 24**2) / 32
    around = 100 * ((inner * 24 + outer * 32) / 56 - 1)  # of elements as long as they are
    across = 100 * ((outer * 32 - inner * 24) / 8 - 1)
    assert found["Ecc Global"] == pytest.approx(50 * (inner + outer) - 100, abs=1)
    assert found["Err Global"] == pytest.approx(across, abs=4)
    assert around < found["Ecc Global"] + 5
    for number in range(1, 17):
        assert found[f"Ecc_AHA_{number}"] == pytest.approx(found["Ecc Global"], abs=4)


def without(heart: ShortAxis, label: int, slices: slice, frame: int = 0) -> ShortAxis:
    labels = heart.labels.copy()
    part = labels[frame, slices]
    part[part == label] = 0
    return replace(heart, labels=labels)


def test_a_failed_check_is_missing_and_never_zero() -> None:
    heart = beating(frames=8)
    assert measure(replace(heart, labels=heart.labels[:, :5])) == {}  # too few slices
    assert measure(without(heart, 2, slice(3, 4))) == {}  # a gap
    no_rv = measure(without(heart, 3, slice(None)))
    assert not {"RVEDV", "RVEF", "WT_AHA_1", "Ecc_AHA_1"} & set(no_rv)
    assert {"LVEF", "WT Global", "Ecc Global"} <= set(no_rv)
    still = volumes(replace(heart, labels=heart.labels[:1]))
    assert set(still) == {"LVEDV", "RVEDV", "LVM"}
    assert strains(beating(frames=7)) == {}
    # A wall that vanishes in one frame cannot be followed, so the whole has no strain either.
    broken = strains(without(heart, 2, slice(2, 3), frame=4))
    assert "Ecc Global" not in broken
    assert not {"Ecc_AHA_1", "Err_AHA_6"} & set(broken)
    assert "Ecc_AHA_7" in broken


def test_an_open_wall_at_the_base_is_no_thin_wall() -> None:
    """As in the outflow tract: a quarter of the basal ring is missing."""
    heart = beating(frames=8)
    labels = heart.labels.copy()
    open_part = labels[:, :3, : SIZE // 2, SIZE // 2 :]
    open_part[open_part == 2] = 0
    found = measure(replace(heart, labels=labels))
    whole = wall_thickness(heart)
    # The nearest epicardium of the ends of the wall lies in the gap, hence the room.
    assert found["WT_AHA_3"] == pytest.approx(whole["WT_AHA_3"], abs=0.5)
    assert found["WT Global"] == pytest.approx(whole["WT Global"], abs=0.5)
    assert all(math.isfinite(value) for value in found.values())


def test_one_slice_gives_its_own_numbers() -> None:
    heart = beating(frames=4, slices=1)
    assert measure(heart) == {}
    found = single_slice(heart)
    areas = heart.pixels(1)[:, 0]
    assert found["LVEDA"] == areas[0]
    assert found["LVESA"] == areas[2]
    assert found["LVFAC"] == pytest.approx(100 * (1 - areas[2] / areas[0]))
    assert found["LVMA"] == heart.pixels(2)[0, 0]
    assert single_slice(replace(heart, spacing=None)) == {"LVFAC": found["LVFAC"]}
    assert single_slice(replace(heart, labels=np.zeros_like(heart.labels))) == {}


def test_one_slice_that_stands_still_has_a_change_of_area_of_0() -> None:
    heart = beating(frames=4)
    still = replace(heart, labels=heart.labels[[0, 0, 0]])
    found = single_slice(still)
    assert found["LVFAC"] == 0
    assert found["LVESA"] == found["LVEDA"] > 0
    assert not {"LVEF", "LVESV"} & set(volumes(still))
    # One frame tells no change, nor does a beat whose first frame is the smallest.
    for frames in ([0], [2, 1, 0, 1]):
        other = single_slice(replace(heart, labels=heart.labels[frames]))
        assert set(other) == {"LVEDA", "LVMA"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.zeros((3, 4, 5), np.uint8)}, "no stack"),
        ({"labels": np.full((1, 1, 4, 4), 4, np.uint8)}, "run from 4 to 4"),
        ({"labels": np.zeros((1, 1, 4, 4), np.float32)}, "whole numbers"),
        ({"heart_rate_bpm": 0.0}, "heart_rate_bpm"),
    ],
)
def test_stacks_that_are_none_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        replace(beating(), **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("spacing", [(0.0, 1.0, 8.0), (1.0, -1.0, 8.0), (1.0, 1.0, math.nan)])
def test_impossible_spacing_is_refused(spacing: tuple[float, float, float]) -> None:
    with pytest.raises(DataError, match="must be positive"):
        Spacing(*spacing)


def test_images_that_do_not_fit_are_refused() -> None:
    heart = beating()
    with pytest.raises(DataError, match="differ in shape"):
        strains(heart, np.zeros((1, 2, 3, 4)))
    with pytest.raises(DataError, match="not finite"):
        strains(heart, np.full(heart.labels.shape, np.nan))


def textured_cycle(turn_deg: float, squeeze: float, frames: int = 12) -> np.ndarray:
    """Texture that turns and shrinks about the middle and comes back."""
    texture = gaussian_filter(np.random.default_rng(0).normal(size=(120, 120)), 2.0)
    y, x = np.mgrid[:120, :120] - 60.0
    result = []
    for frame in range(frames):
        share = 0.5 - 0.5 * math.cos(2 * math.pi * frame / frames)
        angle, scale = math.radians(turn_deg * share), 1 - squeeze * share
        cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
        source = [cos * y - sin * x + 60, sin * y + cos * x + 60]
        result.append(map_coordinates(texture, source, order=1, mode="nearest"))
    return np.stack(result)


@pytest.mark.parametrize(("turn", "squeeze"), [(12.0, 0.0), (0.0, 0.25), (10.0, 0.2)])
def test_points_follow_rotation_and_shrinking_and_come_back(turn: float, squeeze: float) -> None:
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    offset = 25 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    places = track(textured_cycle(turn, squeeze), offset + 60)
    assert np.array_equal(places[0], offset + 60)
    angle, scale = math.radians(turn), 1 - squeeze
    # The picture is sampled backwards, so the pattern moves by the transpose.
    move = scale * np.array(
        [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]
    )
    expected = offset @ move
    error = np.sqrt(((places[6] - 60 - expected) ** 2).sum(axis=1).mean())
    unmoved = np.sqrt(((offset - expected) ** 2).sum(axis=1).mean())
    assert unmoved > 5
    assert error < 0.12 * unmoved
