"""Circumferential and radial strain by following the LV wall through the heart cycle.

Points are carried from frame to frame by optical flow (iterative Lucas-Kanade, Le Besnerais and
Champagnat, ICIP 2005, in scikit-image), forwards and backwards, and the two ways are averaged with
weights (T − t)/T and t/T: so the cycle closes, as in Bai et al., Nat Med 2020;26:1654. Flow tells how
points glide along the wall; across it they are put on the segmented contour of their frame, since
flow blurs a thin wall. The strain of an element is 100 (l(t) − l(ED)) / l(ED). It is that of the
muscle as one plane shows it: motion through the plane counts as strain, and rotation is seen only
where the image has texture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial import cKDTree
from skimage.draw import polygon2mask
from skimage.registration import optical_flow_ilk

from fedcmr_shared.errors import DataError
from fedcmr_shared.metrics.phenotypes.short_axis import (
    CAVITY,
    FEWEST_PIXELS,
    MYOCARDIUM,
    Labels,
    ShortAxis,
    Spacing,
)
from fedcmr_shared.metrics.phenotypes.table import AHA_SEGMENTS, segment_name
from fedcmr_shared.metrics.phenotypes.wall import (
    Points,
    SegmentAxes,
    outlines,
    resample,
    segment_axes,
)

Images = NDArray[np.floating]
Floats = NDArray[np.float64]

FEWEST_FRAMES: Final = 8
"""With fewer frames in a cycle the wall jumps further than flow can follow."""
LEAST_OVERLAP: Final = 0.75
"""Dice of the cavity followed to end systole with the cavity segmented there."""

_SHARES: Final = (0.25, 0.5, 0.75)
_RAYS: Final = 36
_PIXEL_MM: Final = 1.5
_RADIUS_PX: Final = 4  # of the window of the flow: narrower than a healthy wall
_WARPS: Final = 10
_MARGIN_MM: Final = 18.0
_HARMONICS: Final = 3  # of the motion around a contour: as many as six segments can tell apart
_SNAP_STEP_MM: Final = 0.2
_SHORTEST_MM: Final = 0.5
_RENDERED: Final = np.array([0.3, 1.0, 0.0, 0.3])
"""Brightness of the labels when there is no image. The RV is left out: its corners would pull."""


def strains(heart: ShortAxis, images: Images | None = None) -> dict[str, float]:
    """Ecc (least over time, %) and Err (greatest) of segments and as a whole, as far as they exist.

    Three slices are used, at 25, 50 and 75 % of those with muscle. ``images`` are magnitudes of the
    shape of the labels; without them the labels themselves are followed. The frames must divide one
    heart cycle evenly. A slice gives nothing where a frame lacks cavity or wall, or the followed
    cavity misses the segmented one at end systole; the global values need all three slices.

    Raises:
        DataError: ``images`` differ from the labels in shape or are not finite.
    """
    if images is not None and images.shape != heart.labels.shape:
        raise DataError(
            f"images {images.shape} and labels {heart.labels.shape} differ in shape: "
            "one image per frame and slice"
        )
    if images is not None and not np.isfinite(images).all():
        raise DataError("images have values that are not finite: motion cannot be followed")
    if heart.spacing is None or not heart.whole or len(heart.labels) < FEWEST_FRAMES:
        return {}
    axes = segment_axes(heart)
    slices = heart.base_to_apex
    followed = []
    for level, share in enumerate(_SHARES):
        index = slices[round(share * (len(slices) - 1))]
        picture = None if images is None else np.asarray(images[:, index], np.float64)
        elements = _follow(heart.labels[:, index], picture, heart.spacing, axes, level)
        followed += [] if elements is None else [elements]
    return _peaks(followed)


@dataclass(frozen=True, eq=False)
class _Elements:
    """Strain curves ``[frame, element]`` of one slice and the AHA segment of each element."""

    around: Floats
    around_segment: NDArray[np.int64] | None
    across: Floats
    across_segment: NDArray[np.int64] | None


def track(images: Images, points: Points) -> Points:
    """Follow ``points`` [n, 2] as (x, y) in pixels through the closed cycle ``images`` [t, y, x].

    Returns:
        Positions ``[t, n, 2]``; those of frame 0 are ``points``.
    """
    frames = len(images)
    there = _carry(images, points, list(range(frames)))
    # The frame after the last is the first again.
    back = _carry(images, points, [0, *range(frames - 1, 0, -1)])
    back[1:] = back[:0:-1].copy()
    weight = (np.arange(frames) / frames)[:, None, None]
    return there * (1 - weight) + back * weight


def _carry(images: Images, points: Points, order: list[int]) -> Points:
    places = [points]
    for start, end in pairwise(order):
        flow = optical_flow_ilk(  # type: ignore[no-untyped-call]  # scikit-image is untyped
            images[start], images[end], radius=_RADIUS_PX, num_warp=_WARPS, gaussian=True
        )
        x, y = places[-1].T
        step = [map_coordinates(part, [y, x], order=1, mode="nearest") for part in flow[::-1]]
        places.append(places[-1] + np.stack(step, axis=1))
    return np.stack(places)


def _follow(
    labels: Labels, images: Images | None, spacing: Spacing, axes: SegmentAxes | None, level: int
) -> _Elements | None:
    sizes = [(labels == part).sum(axis=(1, 2)).min() for part in (CAVITY, MYOCARDIUM)]
    found = [outlines(frame, spacing) for frame in labels]
    contours = [pair for pair in found if pair is not None]
    if min(sizes) < FEWEST_PIXELS or len(contours) < len(labels):
        return None
    middle = contours[0][1].mean(axis=0)
    start = np.concatenate([_on_rays(contour - middle) for contour in contours[0]])
    reach = float(np.hypot(*start.T).max()) + _MARGIN_MM
    window = _Window(middle - reach, math.ceil(2 * reach / _PIXEL_MM) + 1, spacing)
    places = track(_pictures(labels, images, window), (start + reach) / _PIXEL_MM)
    if not _hits(places[:, :_RAYS], labels, window):
        return None
    places = places * _PIXEL_MM + window.corner
    walls = [(places[:, :_RAYS], 0), (places[:, _RAYS:], 1)]
    smooth = [(_smooth(part), which) for part, which in walls]
    inner, outer = (
        np.stack([_snap(p, pair[which]) for p, pair in zip(part, contours, strict=True)])
        for part, which in smooth
    )
    return _elements(inner - middle, outer - middle, axes, level)


def _pictures(labels: Labels, images: Images | None, window: _Window) -> Floats:
    if images is None:
        cropped = np.stack([window.sample(_RENDERED[frame]) for frame in labels])
        return np.stack([gaussian_filter(picture, 1.0) for picture in cropped])
    cropped = np.stack([window.sample(image) for image in images])
    return cropped / max(float(np.percentile(cropped, 99)), 1e-12)


def _smooth(places: Points) -> Points:
    """Motion [t, n, 2] around a closed contour, limited to a few harmonics."""
    motion = np.fft.rfft(places - places[:1], axis=1)
    motion[:, _HARMONICS + 1 :] = 0
    return np.asarray(places[:1] + np.fft.irfft(motion, n=places.shape[1], axis=1))


def _snap(points: Points, contour: Points) -> Points:
    fine = resample(np.concatenate([contour, contour[:1]]), _SNAP_STEP_MM)
    return np.asarray(fine[cKDTree(fine).query(points)[1]])


def _on_rays(contour: Points) -> Points:
    """Points of a contour around the origin at equal angles."""
    angle = np.arctan2(contour[:, 1], contour[:, 0])
    order = np.argsort(angle)
    rays = (np.arange(_RAYS) + 0.5) * 2 * np.pi / _RAYS - np.pi
    radius = np.interp(rays, angle[order], np.hypot(*contour[order].T), period=2 * np.pi)
    return np.stack([radius * np.cos(rays), radius * np.sin(rays)], axis=1)


@dataclass(frozen=True, eq=False)
class _Window:
    """Square of ``size`` pixels of 1.5 mm whose first pixel lies at ``corner`` (x, y) in mm."""

    corner: Points
    size: int
    spacing: Spacing

    def sample(self, picture: Images) -> Floats:
        """Bilinear samples ``[y, x]`` of a slice."""
        steps = np.arange(self.size) * _PIXEL_MM
        rows = (self.corner[1] + steps) / self.spacing.row
        columns = (self.corner[0] + steps) / self.spacing.column
        grid = np.meshgrid(rows, columns, indexing="ij")
        return np.asarray(map_coordinates(picture, grid, order=1, mode="nearest"), np.float64)


def _hits(inner: Points, labels: Labels, window: _Window) -> bool:
    """Whether the followed cavity overlaps the segmented one where that is smallest."""
    systole = int((labels == CAVITY).sum(axis=(1, 2)).argmin())
    shape = (window.size, window.size)
    mask = polygon2mask(shape, inner[systole][:, ::-1])  # type: ignore[no-untyped-call]
    cavity = window.sample((labels[systole] == CAVITY).astype(np.float64)) > 0.5
    overlap = 2 * (mask & cavity).sum() / max(int(mask.sum() + cavity.sum()), 1)
    return bool(overlap >= LEAST_OVERLAP)


def _elements(inner: Points, outer: Points, axes: SegmentAxes | None, level: int) -> _Elements:
    turned = [(part, np.roll(part, -1, axis=1)) for part in (inner, outer)]
    start, end = (np.concatenate(part, axis=1) for part in zip(*turned, strict=True))
    return _Elements(*_strain(start, end, axes, level), *_strain(inner, outer, axes, level))


def _strain(
    start: Points, end: Points, axes: SegmentAxes | None, level: int
) -> tuple[Floats, NDArray[np.int64] | None]:
    """Strain [t, n] of elements and their segments, without those that ED shows as points."""
    length = np.linalg.norm(end - start, axis=-1)
    solid = length[0] >= _SHORTEST_MM
    strain = 100 * (length[:, solid] / length[0, solid] - 1)
    if axes is None:
        return strain, None
    return strain, axes.segments(((start[0] + end[0]) / 2)[solid], level)


def _peaks(followed: list[_Elements]) -> dict[str, float]:
    result: dict[str, float] = {}
    for number in range(1, len(AHA_SEGMENTS) + 1):
        for part in followed:
            if part.around_segment is None or part.across_segment is None:
                continue
            around = part.around[:, part.around_segment == number]
            across = part.across[:, part.across_segment == number]
            if around.size and across.size:
                result[segment_name("Ecc", number)] = float(around.mean(axis=1).min())
                result[segment_name("Err", number)] = float(across.mean(axis=1).max())
    if len(followed) == len(_SHARES):
        around = np.concatenate([part.around for part in followed], axis=1)
        across = np.concatenate([part.across for part in followed], axis=1)
        result["Ecc Global"] = float(around.mean(axis=1).min())
        result["Err Global"] = float(across.mean(axis=1).max())
    return result
