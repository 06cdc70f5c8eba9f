"""Phenotypes of real hearts from expert contours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from real_data import NO_SUNNYBROOK
from real_data import SUNNYBROOK as DATA
from skimage.draw import polygon2mask

from fedcmr_shared.metrics.phenotypes.motion import track
from fedcmr_shared.metrics.phenotypes.short_axis import ShortAxis, Spacing, volumes
from fedcmr_shared.metrics.phenotypes.table import implausible
from fedcmr_shared.metrics.phenotypes.wall import wall_thickness

pytestmark = pytest.mark.skipif(not (DATA / "cine").is_dir(), reason=NO_SUNNYBROOK)
FINER = 4
"""Contours are drawn on a finer grid than the image, so that pixels do not blur their areas."""


@dataclass(frozen=True)
class Stack:
    """Images and contours of one patient around the heart; contours in fine pixels (x, y)."""

    images: np.ndarray
    contours: dict[tuple[str, int, int], np.ndarray]
    spacing: Spacing
    diastole: int
    systole: int
    heart_rate_bpm: float

    def heart(self) -> ShortAxis:
        """End diastole and end systole as labels on the fine grid."""
        frames = (self.diastole, self.systole)
        size = tuple(FINER * pixels for pixels in self.images.shape[2:])
        labels = np.zeros((2, self.images.shape[1], *size), np.uint8)
        for value, wanted in ((2, "epi"), (1, "endo")):
            for (kind, frame, slice_), points in self.contours.items():
                if kind == wanted and frame in frames:
                    labels[frames.index(frame), slice_][mask(size, points)] = value
        fine = Spacing(self.spacing.row / FINER, self.spacing.column / FINER, self.spacing.slice)
        return ShortAxis(labels, fine, self.heart_rate_bpm)


def mask(size: tuple[int, ...], points: np.ndarray) -> np.ndarray:
    return np.asarray(polygon2mask(size, points[:, ::-1]), bool)


def read(patient: str) -> Stack:
    with np.load(DATA / "cine" / f"{patient}.npz") as file:
        arrays = {name: file[name] for name in file.files}
    points = np.concatenate([arrays["endo_points"], arrays["epi_points"]])
    corner = np.floor(points.min(axis=0) - 20).astype(int)
    end = np.ceil(points.max(axis=0) + 20).astype(int)
    contours = {}
    for kind in ("endo", "epi"):
        parts = np.split(arrays[f"{kind}_points"], arrays[f"{kind}_offsets"][1:-1])
        for (slice_, frame), part in zip(arrays[f"{kind}_slice_frame"], parts, strict=True):
            # The middle of a coarse pixel is the middle of its fine ones.
            fine = FINER * (part - corner + 0.5) - 0.5
            contours[kind, int(frame), int(slice_)] = fine
    cine = arrays["cine"][:, :, corner[1] : end[1], corner[0] : end[0]].swapaxes(0, 1)
    return Stack(
        images=cine.astype(np.float64),
        contours=contours,
        spacing=Spacing(*map(float, arrays["pixel_spacing_mm"]), float(arrays["slice_pitch_mm"])),
        diastole=int(arrays["ed_frame"]),
        systole=int(arrays["es_frame"]),
        heart_rate_bpm=float(np.nanmean(arrays["heart_rate"])),
    )


@pytest.mark.parametrize(
    ("patient", "edv", "esv", "ef"),
    [
        ("SC-HF-I-01", 191.3, 141.3, 26.2),
        ("SC-HF-I-02", 241.9, 180.3, 25.5),
        ("SC-HF-I-04", 229.7, 179.6, 21.8),
    ],
)
def test_failing_hearts_as_their_contours_say(
    patient: str, edv: float, esv: float, ef: float
) -> None:
    """Areas of the expert contours times the pitch give what the labels give here."""
    heart = read(patient).heart()
    found = volumes(heart)
    assert found["LVEDV"] == pytest.approx(edv, rel=0.01)
    assert found["LVESV"] == pytest.approx(esv, rel=0.01)
    assert found["LVEF"] == pytest.approx(ef, abs=0.2)
    # Without contours of the RV there are no segments, but a wall there is.
    wall = wall_thickness(heart)
    assert set(wall) == {"WT Global"}
    assert 5 < wall["WT Global"] < 11
    assert "RVEDV" not in found
    assert implausible(found | wall) == {}


def test_a_stack_with_gaps_gives_nothing() -> None:
    assert volumes(read("SC-N-02").heart()) == {}


def test_the_endocardium_is_followed_to_the_systole_that_the_expert_drew() -> None:
    """Only the contour at end diastole is known to the tracker; two slices in the middle."""
    stack = read("SC-HF-I-02")
    frames, slices, *size = stack.images.shape
    order = [(stack.diastole + step) % frames for step in range(frames)]
    drawn = [s for s in range(slices) if ("endo", stack.systole, s) in stack.contours]
    middle = len(drawn) // 2
    followed, unmoved = [], []
    for slice_ in drawn[middle - 1 : middle + 1]:
        start = stack.contours["endo", stack.diastole, slice_]
        images = stack.images[order, slice_]
        places = track(images / np.percentile(images, 99), (start + 0.5) / FINER - 0.5)
        fine = FINER * (places[order.index(stack.systole)] + 0.5) - 0.5
        whole = tuple(FINER * pixels for pixels in size)
        truth = mask(whole, stack.contours["endo", stack.systole, slice_])
        followed.append(dice(mask(whole, fine), truth))
        unmoved.append(dice(mask(whole, start), truth))
    assert min(followed) > 0.9
    assert np.mean(followed) > np.mean(unmoved) + 0.07


def dice(first: np.ndarray, second: np.ndarray) -> float:
    return float(2 * (first & second).sum() / (first.sum() + second.sum()))
