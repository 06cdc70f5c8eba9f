"""Clips on a public grid, and what is measured on them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from drawn_hearts import PIXEL_MM, drawn_heart

from fedcmr_shared.errors import ConfigurationError, DataError
from fedcmr_shared.metrics.phenotypes.clip import area_curve, measure_clip
from fedcmr_shared.models.clips import (
    ClipGrid,
    clip_grid,
    heart_centre,
    make_clip,
    ventricle_centre,
)
from fedcmr_shared.models.cpgg import CONFIGS
from fedcmr_shared.models.segmenter import load_segmenter

GRID = ClipGrid(frames=8, rows=32, columns=40, pixel_mm=2.0)
FRAMES = 4
PHASES = tuple(index / FRAMES for index in range(FRAMES))


def disc(
    radius_mm: float, spacing_mm: tuple[float, float], centre: tuple[float, float], size: int = 80
) -> np.ndarray:
    """A bright disc with a soft edge, ``centre`` in pixels."""
    y, x = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
    away = np.hypot((y - centre[0]) * spacing_mm[0], (x - centre[1]) * spacing_mm[1])
    return np.asarray(np.clip(radius_mm - away + 0.5, 0, 1))


def moving(size: int = 40) -> np.ndarray:
    """Four frames of noise that have nothing in common."""
    return np.random.default_rng(0).uniform(0.5, 1, (FRAMES, size, size))


def area_mm2(frame: np.ndarray, grid: ClipGrid) -> float:
    return float(((frame + 1) / 2).sum() * grid.pixel_mm**2)


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (2.5, 1.5), (3.0, 3.0)])
def test_a_disc_keeps_its_area_whatever_the_images_spacing(spacing: tuple[float, float]) -> None:
    image = disc(20, spacing, (38.0, 41.0))
    clip = make_clip(image[None], (0.0,), spacing, (38.0, 41.0), GRID)
    assert area_mm2(clip[0], GRID) == pytest.approx(np.pi * 20**2, rel=0.03)


def test_the_centre_comes_to_lie_in_the_middle() -> None:
    clip = make_clip(disc(10, (1.5, 2.0), (30.0, 45.5))[None], (0.0,), (1.5, 2.0), (30, 45.5), GRID)
    lit = (clip[0] + 1) / 2
    rows, columns = np.indices(lit.shape)
    assert (lit * rows).sum() / lit.sum() == pytest.approx((GRID.rows - 1) / 2, abs=0.05)
    assert (lit * columns).sum() / lit.sum() == pytest.approx((GRID.columns - 1) / 2, abs=0.05)


def test_a_later_trigger_rolls_the_clip() -> None:
    """Time has no seam: what comes a frame later appears a frame later, around the beat."""
    first = make_clip(moving(), PHASES, (2.0, 2.0), (20, 20), GRID)
    for frames in (1, 3):
        later = tuple((phase + frames / GRID.frames) % 1 for phase in PHASES)
        shifted = make_clip(moving(), later, (2.0, 2.0), (20, 20), GRID)
        np.testing.assert_allclose(shifted, np.roll(first, frames, axis=0), atol=1e-6)
    assert not np.allclose(first, np.roll(first, 1, axis=0), atol=0.1)


def test_the_order_of_the_images_does_not_matter() -> None:
    order = [2, 0, 3, 1]
    first = make_clip(moving(), PHASES, (2.0, 2.0), (20, 20), GRID)
    again = make_clip(moving()[order], [PHASES[i] for i in order], (2.0, 2.0), (20, 20), GRID)
    np.testing.assert_allclose(again, first, atol=1e-6)


def test_frames_between_images_are_their_mixture() -> None:
    clip = make_clip(np.stack([np.full((9, 9), 0.2), np.ones((9, 9))]), (0.0, 0.5), (9, 9), (4, 4),
                     replace(GRID, rows=3, columns=3))  # fmt: skip
    magnitudes = (clip[:, 1, 1] + 1) / 2
    np.testing.assert_allclose(magnitudes, [0.2, 0.4, 0.6, 0.8, 1.0, 0.8, 0.6, 0.4], atol=0.02)


def test_values_lie_in_range_and_brightness_does_not_matter() -> None:
    images = moving()
    clip = make_clip(images, PHASES, (2.0, 2.0), (20, 20), GRID)
    assert clip.dtype == np.float32
    assert clip.shape == (8, 32, 40)
    assert clip.min() >= -1
    assert clip.max() == 1
    np.testing.assert_allclose(
        make_clip(900 * images, PHASES, (2.0, 2.0), (20, 20), GRID), clip, atol=1e-6
    )


def test_what_lies_outside_the_images_is_black() -> None:
    clip = make_clip(np.ones((1, 10, 10)), (0.0,), (2.0, 2.0), (4.5, 4.5), GRID)
    assert (clip[0, 0] == -1).all()
    assert clip[0, 15, 19] == 1


@pytest.mark.parametrize(
    ("images", "phases", "spacing", "message"),
    [
        (np.ones((4, 4)), (0.0,), (1.0, 1.0), "finite magnitudes"),
        (np.full((1, 4, 4), np.nan), (0.0,), (1.0, 1.0), "finite magnitudes"),
        (np.ones((2, 4, 4)), (0.0,), (1.0, 1.0), "1 phases for 2 images"),
        (np.ones((2, 4, 4)), (0.0, 1.0), (1.0, 1.0), r"in \[0, 1\)"),
        (np.ones((2, 4, 4)), (0.3, 0.3), (1.0, 1.0), "different heart cycles"),
        (np.ones((1, 4, 4)), (0.0,), (0.0, 1.0), "must be positive"),
        (np.zeros((1, 4, 4)), (0.0,), (1.0, 1.0), "dark"),
    ],
)
def test_what_is_no_beat_is_refused(
    images: np.ndarray, phases: tuple[float, ...], spacing: tuple[float, float], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        make_clip(images, phases, spacing, (2, 2), GRID)


@pytest.mark.parametrize("change", [{"frames": 0}, {"rows": 0}, {"pixel_mm": 0.0}])
def test_a_grid_has_a_size(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(change))):
        replace(GRID, **change)


def test_a_networks_grid_is_that_of_its_configuration() -> None:
    tiny = CONFIGS["tiny"]
    assert clip_grid(tiny) == ClipGrid(*tiny.video.clip, tiny.pixel_mm)


def test_the_ventricle_is_cavity_and_wall_without_the_right_one() -> None:
    labels = np.zeros((2, 20, 30), np.uint8)
    labels[0, 4:7, 10:13] = 2
    labels[0, 5, 11] = 1
    labels[0, 15:, 20:] = 3
    assert ventricle_centre(labels) == (5.0, 11.0)


def test_areas_of_a_drawn_heart_are_measured() -> None:
    """Frame 0 is end diastole, and so is a neighbour with a larger cavity, but no later frame."""
    segmenter = load_segmenter().model
    clip = drawn_heart(26.0, 0.2, frames=12)
    found = measure_clip(clip, PIXEL_MM, segmenter)
    assert found["LVEDA"] == pytest.approx(np.pi * 26**2, rel=0.12)
    assert found["LVESA"] == pytest.approx(np.pi * (0.8 * 26) ** 2, rel=0.12)
    assert found["LVFAC"] == pytest.approx(100 * (1 - 0.8**2), abs=4)
    assert found["LVFAC"] == pytest.approx(100 * (1 - found["LVESA"] / found["LVEDA"]))
    assert found["LVMA"] == pytest.approx(np.pi * (35**2 - 26**2), rel=0.25)
    for frames in (1, -1):
        assert measure_clip(np.roll(clip, frames, 0), PIXEL_MM, segmenter) == found
    later = measure_clip(np.roll(clip, 4, 0), PIXEL_MM, segmenter)
    assert later["LVEDA"] < 0.9 * found["LVEDA"]


def test_a_heart_that_stands_still_has_a_change_of_area_of_0() -> None:
    still = np.repeat(drawn_heart()[:1], 8, axis=0)
    found = measure_clip(still, PIXEL_MM, load_segmenter().model)
    assert found["LVFAC"] == 0
    assert found["LVESA"] == found["LVEDA"] > 0


def test_one_frame_shows_no_change_of_area() -> None:
    assert set(measure_clip(drawn_heart()[:1], PIXEL_MM, load_segmenter().model)) == {
        "LVEDA",
        "LVMA",
    }


def test_areas_do_not_depend_on_how_many_fine_pixels_fit() -> None:
    """48 pixels of 2.99 and of 3.01 mm are 144 fine ones, but not as large."""
    clip, segmenter = drawn_heart(), load_segmenter().model
    small, large = (area_curve(clip, pixel_mm, segmenter) for pixel_mm in (2.99, 3.01))
    np.testing.assert_allclose(large / small, (3.01 / 2.99) ** 2)


def test_without_a_heart_nothing_is_found() -> None:
    segmenter = load_segmenter().model
    dark = np.zeros((2, 48, 48))
    with pytest.raises(DataError, match="no left ventricle"):
        heart_centre(dark, (2.0, 2.0), segmenter)
    assert measure_clip(dark - 1, 3.0, segmenter) == {}
    assert (area_curve(dark - 1, 3.0, segmenter) == 0).all()
    with pytest.raises(DataError, match="clip of shape"):
        measure_clip(dark[0], 3.0, segmenter)
