"""Volumes, mass and wall thickness from short-axis segmentations, as UK Biobank's pipeline takes them.

Formulas follow Bai et al., Nat Med 2020;26:1654, and the checks of their published pipeline: what
fails its check is missing from the result, never 0. End diastole (ED) is frame 0; end systole (ES)
the frame with the smallest LV cavity, for the RV as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedcmr_shared.errors import DataError

Labels = NDArray[np.uint8]
Mask = NDArray[np.bool_]

CAVITY: Final = 1
MYOCARDIUM: Final = 2
RV: Final = 3
DENSITY_G_PER_ML: Final = 1.05
"""Of myocardium."""
FEWEST_PIXELS: Final = 10
FEWEST_SLICES: Final = 6
SINGLE_SLICE_UNITS: Final = {"LVEDA": "mm2", "LVESA": "mm2", "LVMA": "mm2", "LVFAC": "%"}
"""What one slice gives: cavity area at ED and ES, wall area at ED and fractional area change."""


@dataclass(frozen=True)
class Spacing:
    """Distances in mm between rows, columns and slices (from centre to centre).

    Raises:
        DataError: a distance is not positive.
    """

    row: float
    column: float
    slice: float

    def __post_init__(self) -> None:
        if not all(0 < size < math.inf for size in (self.row, self.column, self.slice)):
            raise DataError(f"spacing {self} must be positive and finite, in mm")

    @property
    def pixel_mm2(self) -> float:
        """Area of a pixel."""
        return self.row * self.column

    @property
    def voxel_ml(self) -> float:
        """Volume that a pixel stands for, up to the next slice."""
        return self.pixel_mm2 * self.slice / 1000


@dataclass(frozen=True, eq=False)
class ShortAxis:
    """Labels ``[frame, slice, y, x]``: 0 other, 1 LV cavity, 2 LV myocardium, 3 RV cavity.

    Images are seen from the apex, with the RV left and the anterior wall on top, as scanners show
    them; ``mirrored`` tells that rows and columns were exchanged. Slices may run either way.
    Without ``spacing`` only ratios are known; without ``heart_rate_bpm`` no cardiac output is.

    Raises:
        DataError: the shape or a label is none of these, or the heart rate is not positive.
    """

    labels: Labels
    spacing: Spacing | None = None
    heart_rate_bpm: float | None = None
    mirrored: bool = False

    def __post_init__(self) -> None:
        if self.labels.ndim != 4 or 0 in self.labels.shape:
            raise DataError(
                f"labels of shape {self.labels.shape} are no stack: use [frame, slice, y, x]"
            )
        if not np.issubdtype(self.labels.dtype, np.integer):
            raise DataError(f"labels are {self.labels.dtype}: use whole numbers from 0 to 3")
        if self.labels.min() < 0 or self.labels.max() > RV:
            raise DataError(
                f"labels run from {self.labels.min()} to {self.labels.max()}: use 0 other, "
                "1 LV cavity, 2 LV myocardium, 3 RV"
            )
        if self.heart_rate_bpm is not None and not 0 < self.heart_rate_bpm < math.inf:
            raise DataError(f"heart_rate_bpm must be positive, not {self.heart_rate_bpm:g}")

    def pixels(self, label: int) -> NDArray[np.int64]:
        """Number of pixels ``[frame, slice]`` with one label."""
        return np.asarray((self.labels == label).sum(axis=(2, 3)), np.int64)

    @cached_property
    def end_systole(self) -> int:
        """Frame with the smallest LV cavity."""
        return int(self.pixels(CAVITY).sum(axis=1).argmin())

    @cached_property
    def muscle_slices(self) -> tuple[int, ...]:
        """Slices with cavity and myocardium at ED, each of 10 pixels at least."""
        cavity, wall = self.pixels(CAVITY)[0], self.pixels(MYOCARDIUM)[0]
        return tuple(int(i) for i in np.flatnonzero(np.minimum(cavity, wall) >= FEWEST_PIXELS))

    @cached_property
    def base_to_apex(self) -> tuple[int, ...]:
        """The slices with muscle from base to apex; the base is the half with more blood at ED."""
        slices, areas = self.muscle_slices, self.pixels(CAVITY)[0]
        half = len(slices) // 2
        first, last = (sum(areas[i] for i in part) for part in (slices[:half], slices[-half:]))
        return slices if first >= last else slices[::-1]

    @cached_property
    def middle(self) -> int | None:
        """The middle one of the slices with muscle; None where there is none."""
        return self.base_to_apex[len(self.base_to_apex) // 2] if self.base_to_apex else None

    @cached_property
    def whole(self) -> bool:
        """Whether the stack covers a ventricle: 6 slices with muscle at ED, without gaps."""
        slices = self.muscle_slices
        return len(slices) >= FEWEST_SLICES and slices[-1] - slices[0] + 1 == len(slices)


def volumes(heart: ShortAxis) -> dict[str, float]:
    """LV and RV volumes (mL), ejection fractions (%), LV mass (g) and output (L/min) that exist.

    Without spacing only the ejection fractions; with one frame only what ED tells. A ventricle with
    fewer than 10 pixels at ED or ES, or a stack that is not whole, gives nothing.
    """
    if not heart.whole:
        return {}
    result = _ventricle(heart, CAVITY, "LV") | _ventricle(heart, RV, "RV")
    wall = int(heart.pixels(MYOCARDIUM)[0].sum())
    if heart.spacing is not None:
        result["LVM"] = DENSITY_G_PER_ML * wall * heart.spacing.voxel_ml
    if heart.heart_rate_bpm is not None and "LVSV" in result:
        result["LVCO"] = result["LVSV"] * heart.heart_rate_bpm / 1000
    return result


def _ventricle(heart: ShortAxis, label: int, name: str) -> dict[str, float]:
    counts = heart.pixels(label).sum(axis=1)
    diastole, systole = int(counts[0]), int(counts[heart.end_systole])
    if diastole < FEWEST_PIXELS:
        return {}
    result = {}
    moves = len(counts) > 1 and FEWEST_PIXELS <= systole < diastole
    if moves:
        result[f"{name}EF"] = 100 * (1 - systole / diastole)
    if heart.spacing is not None:
        voxel = heart.spacing.voxel_ml
        result[f"{name}EDV"] = diastole * voxel
        if moves:
            result |= {f"{name}ESV": systole * voxel, f"{name}SV": (diastole - systole) * voxel}
    return result


def single_slice(heart: ShortAxis) -> dict[str, float]:
    """What the middle slice alone tells, for images of one slice; keys of SINGLE_SLICE_UNITS.

    The middle one is that of the slices with muscle. LVFAC = 100 (LVEDA − LVESA) / LVEDA, with ES
    where the cavity of this slice is smallest. It is 0 where all frames have the same; where others
    have larger ones than frame 0 and none a smaller one, frame 0 is no ED and there is no change.
    """
    middle = heart.middle
    if middle is None:
        return {}
    cavity, wall = heart.pixels(CAVITY)[:, middle], heart.pixels(MYOCARDIUM)[0, middle]
    diastole, systole = int(cavity[0]), int(cavity.min())
    result = {}
    still = systole == diastole == int(cavity.max())
    seen = len(cavity) > 1 and systole >= FEWEST_PIXELS
    changes = seen and (still or systole < diastole)
    if changes:
        result["LVFAC"] = 100 * (1 - systole / diastole)
    if heart.spacing is not None:
        pixel = heart.spacing.pixel_mm2
        result |= {"LVEDA": diastole * pixel, "LVMA": int(wall) * pixel}
        if changes:
            result["LVESA"] = systole * pixel
    return result
