"""The LV wall in the 16 segments of the American Heart Association (AHA), and its thickness at ED.

Angles in a slice: 0 anterior, 90 septal, 180 inferior, −90 lateral (degrees). The septum lies where
the RV touches the LV on the middle slice; up and down follow from how images are displayed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation, gaussian_filter
from scipy.spatial import cKDTree
from skimage.measure import find_contours

from fedcmr_shared.metrics.phenotypes.short_axis import (
    CAVITY,
    MYOCARDIUM,
    RV,
    Labels,
    Mask,
    ShortAxis,
    Spacing,
)
from fedcmr_shared.metrics.phenotypes.table import AHA_SEGMENTS, segment_name

Points = NDArray[np.float64]
"""Points ``[..., 2]`` in a slice as (x, y) in mm from the centre of the first pixel."""

_SMOOTHING_PX: Final = 0.7
_STEP_MM: Final = 1.0
_FINE_STEP_MM: Final = 0.1
_CONTACT_MM: Final = 4.0
_FEWEST_CONTACT: Final = 3
_FEWEST_POINTS: Final = 8
_SECTORS: Final = 6
_APICAL_SECTORS: Final = 4
_APICAL: Final = 2


@dataclass(frozen=True)
class SegmentAxes:
    """Unit vectors (x, y) in the slice from the middle of the LV to septum and anterior wall."""

    septal: tuple[float, float]
    anterior: tuple[float, float]

    def segments(self, offsets: Points, level: int) -> NDArray[np.int64]:
        """AHA number of ``offsets`` from the middle; ``level`` is 0 basal, 1 mid or 2 apical."""
        angle = np.degrees(np.arctan2(offsets @ self.septal, offsets @ self.anterior))
        sectors = _APICAL_SECTORS if level == _APICAL else _SECTORS
        sector = np.floor(angle * sectors / 360 + 0.5) % sectors
        return np.asarray(sector + _SECTORS * level + 1, np.int64)


def segment_axes(heart: ShortAxis) -> SegmentAxes | None:
    """Find septum and anterior wall at ED; None where the RV does not touch the LV mid-slice."""
    if heart.spacing is None or heart.middle is None:
        return None
    middle = heart.labels[0, heart.middle]
    ventricle = (middle == CAVITY) | (middle == MYOCARDIUM)
    reach = math.ceil(_CONTACT_MM / min(heart.spacing.row, heart.spacing.column))
    contact = ventricle & binary_dilation(middle == RV, iterations=reach)
    if contact.sum() < _FEWEST_CONTACT:
        return None
    offset = _centre(contact, heart.spacing) - _centre(ventricle, heart.spacing)
    x, y = (float(part) for part in offset / np.hypot(*offset))
    # Seen from the apex, a quarter turn clockwise leads from the septum to the anterior wall.
    return SegmentAxes((x, y), (y, -x) if heart.mirrored else (-y, x))


def levels(heart: ShortAxis) -> dict[int, int]:
    """Level of each slice with muscle: 0 the basal third, 1 the mid, 2 the apical one."""
    slices = heart.base_to_apex
    basal, mid = math.ceil(len(slices) / 3), math.ceil(2 * len(slices) / 3)
    return {s: (i >= basal) + (i >= mid) for i, s in enumerate(slices)}


def outlines(labels: Labels, spacing: Spacing) -> tuple[Points, Points] | None:
    """Endo- and epicardium of one slice ``[y, x]``, closed, in steps of about 1 mm.

    None where a contour is missing or too short to be one.
    """
    inner = outline(labels == CAVITY, spacing)
    outer = outline((labels == CAVITY) | (labels == MYOCARDIUM), spacing)
    return None if inner is None or outer is None else (inner, outer)


def outline(mask: Mask, spacing: Spacing, step_mm: float = _STEP_MM) -> Points | None:
    """Longest closed contour of ``mask``, smoothed, without its end repeating its start."""
    soft = gaussian_filter(np.pad(mask, 2).astype(np.float64), _SMOOTHING_PX)
    found = find_contours(soft, 0.5)  # type: ignore[no-untyped-call]  # scikit-image is untyped
    if not found:
        return None
    longest = max(found, key=len)[:, ::-1] - 2
    points = resample(longest * (spacing.column, spacing.row), step_mm)
    return points if len(points) >= _FEWEST_POINTS else None


def resample(contour: Points, step_mm: float) -> Points:
    """Points of a closed ``contour`` (end equal to start) at equal distances of about a step."""
    length = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(contour, axis=0).T))])
    count = round(length[-1] / step_mm)
    place = np.arange(count) * length[-1] / max(count, 1)
    return np.stack([np.interp(place, length, contour[:, axis]) for axis in (0, 1)], axis=1)


def wall_thickness(heart: ShortAxis) -> dict[str, float]:
    """Thickness in mm at ED of the segments and ``WT Global``, the mean over all points.

    Each point of the endocardium takes the distance to the nearest of the epicardium in its slice.
    Points without muscle beside them, as in the outflow tract, do not count. Without contact of the
    RV there are no segments; without spacing or with a stack that is not whole there is nothing.
    """
    if heart.spacing is None or not heart.whole:
        return {}
    axes = segment_axes(heart)
    least = min(heart.spacing.row, heart.spacing.column) / 2
    distances, segments = [], []
    for slice_, level in levels(heart).items():
        contours = outlines(heart.labels[0, slice_], heart.spacing)
        if contours is None:
            continue
        inner, outer = contours
        fine = resample(np.concatenate([outer, outer[:1]]), _FINE_STEP_MM)
        distance = np.asarray(cKDTree(fine).query(inner)[0])
        muscle = distance >= least
        distances.append(distance[muscle])
        if axes is not None:
            segments.append(axes.segments(inner - outer.mean(axis=0), level)[muscle])
    if not distances:
        return {}
    values = np.concatenate(distances)
    result = {"WT Global": float(values.mean())}
    return result | (segment_means("WT", values, np.concatenate(segments)) if segments else {})


def segment_means(
    kind: str, values: NDArray[np.float64], segments: NDArray[np.int64]
) -> dict[str, float]:
    """Mean of ``values`` in each segment that has any, under its name."""
    return {
        segment_name(kind, number): float(values[segments == number].mean())
        for number in range(1, len(AHA_SEGMENTS) + 1)
        if (segments == number).any()
    }


def _centre(mask: Mask, spacing: Spacing) -> Points:
    rows, columns = np.nonzero(mask)
    return np.array([columns.mean() * spacing.column, rows.mean() * spacing.row])
