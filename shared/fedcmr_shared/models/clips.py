"""Clips: what a generator of cine images learns from and draws.

A clip shows one heart beat of one slice on a public grid: a fixed number of frames, evenly spaced
over the heart cycle from the R wave, and pixels of a fixed size around the left ventricle (LV).
Nothing is fitted to other patients: each clip is scaled by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fedcmr_shared.errors import ConfigurationError, DataError
from fedcmr_shared.models.segmenter import CLASSES, Segmenter, segment

if TYPE_CHECKING:
    from fedcmr_shared.models.cpgg import CPGGConfig

_PERCENTILE: Final = 95.0  # about that of blood, which fat near the coils outshines
_VENTRICLE: Final = tuple(CLASSES.index(name) for name in ("LV cavity", "LV myocardium"))


@dataclass(frozen=True)
class ClipGrid:
    """Size of a clip, and of its square pixels in mm.

    Raises:
        ConfigurationError: a size is not positive.
    """

    frames: int
    rows: int
    columns: int
    pixel_mm: float

    def __post_init__(self) -> None:
        for name in ("frames", "rows", "columns"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} {getattr(self, name)} must be at least 1")
        if not 0 < self.pixel_mm < math.inf:
            raise ConfigurationError(f"pixel_mm {self.pixel_mm} must be positive, in mm")


def clip_grid(config: CPGGConfig) -> ClipGrid:
    """Return the grid of the clips that a network of this configuration takes and gives."""
    return ClipGrid(*config.video.clip, config.pixel_mm)


def make_clip(
    images: NDArray[np.floating],
    phases: Sequence[float],
    spacing_mm: tuple[float, float],
    centre: tuple[float, float],
    grid: ClipGrid,
) -> NDArray[np.float32]:
    """Return the clip ``[frames, rows, columns]`` in [-1, 1] of one slice.

    Frames are interpolated linearly in time, the last one towards the first; what lies outside the
    images is black. Values are divided by the clip's own 95 percentile, and larger ones cut.

    Args:
        images: magnitudes ``[frame, y, x]``.
        phases: of each frame, in heart cycles after the R wave, in [0, 1).
        spacing_mm: distance of rows and of columns.
        centre: what comes to lie in the middle of the clip, (y, x) in pixels.
        grid: frames and pixels of the clip.

    Raises:
        DataError: the images are none, dark or not finite, there is not one phase in [0, 1) for
            each, two phases are the same, or a spacing is not positive.
    """
    _check(images, phases, spacing_mm)
    frames = np.stack([_resampled(image, spacing_mm, centre, grid) for image in images])
    clip = np.tensordot(_time_weights(phases, grid.frames), frames, 1)
    scale = float(np.percentile(clip, _PERCENTILE))
    if scale <= 0:
        raise DataError("the images are dark around the centre: use those of the heart")
    return np.asarray(2 * np.clip(clip / scale, 0, 1) - 1, np.float32)


def ventricle_centre(labels: NDArray[np.uint8]) -> tuple[float, float]:
    """Return the mean place (y, x), in pixels, of the LV with its wall in ``labels [frame, y, x]``.

    Raises:
        DataError: no pixel belongs to the LV.
    """
    places = np.argwhere(np.isin(labels, _VENTRICLE))
    if not len(places):
        raise DataError("no left ventricle was found: use short-axis images that show it")
    _, y, x = places.mean(axis=0)
    return float(y), float(x)


def heart_centre(
    images: NDArray[np.floating], spacing_mm: tuple[float, float], segmenter: Segmenter
) -> tuple[float, float]:
    """Return where in magnitudes ``images [frame, y, x]`` the LV lies: (y, x) in pixels.

    Raises:
        DataError: the segmenter finds no LV, or the images cannot be segmented.
    """
    return ventricle_centre(segment(segmenter, images, spacing_mm))


def _check(
    images: NDArray[np.floating], phases: Sequence[float], spacing_mm: tuple[float, float]
) -> None:
    if images.ndim != 3 or 0 in images.shape or not np.isfinite(images).all():
        raise DataError(f"images of shape {images.shape}: give finite magnitudes [frame, y, x]")
    if len(phases) != len(images):
        raise DataError(f"{len(phases)} phases for {len(images)} images: give one for each")
    if not all(0 <= phase < 1 for phase in phases) or len(set(phases)) < len(phases):
        raise DataError(f"phases {list(phases)}: give different heart cycles in [0, 1)")
    if not all(0 < size < math.inf for size in spacing_mm):
        raise DataError(f"spacing_mm {spacing_mm} must be positive, in mm")


def _resampled(
    image: NDArray[np.floating],
    spacing_mm: tuple[float, float],
    centre: tuple[float, float],
    grid: ClipGrid,
) -> NDArray[np.float64]:
    coarser = [grid.pixel_mm / size for size in spacing_mm]
    # Where pixels become larger, what is between them counts as well.
    smooth = ndimage.gaussian_filter(
        np.asarray(image, np.float64), [max(factor - 1, 0) / 2 for factor in coarser]
    )
    axes = [
        middle + (np.arange(size) - (size - 1) / 2) * factor
        for middle, size, factor in zip(centre, (grid.rows, grid.columns), coarser, strict=True)
    ]
    places = np.meshgrid(*axes, indexing="ij")
    return np.asarray(ndimage.map_coordinates(smooth, places, order=1), np.float64)


def _time_weights(phases: Sequence[float], frames: int) -> NDArray[np.float64]:
    """Weights ``[clip frame, image]`` of linear interpolation on a circle."""
    order = np.argsort(phases)
    known = np.asarray(phases, np.float64)[order]
    wanted = np.arange(frames) / frames
    after = np.searchsorted(known, wanted, side="right") % len(known)
    before = (after - 1) % len(known)
    # From a frame to itself, where there is one alone, it is a whole cycle.
    gap = np.mod(known[after] - known[before], 1)
    gap[gap == 0] = 1
    share = np.mod(wanted - known[before], 1) / gap
    weights = np.zeros((frames, len(known)))
    rows = np.arange(frames)
    np.add.at(weights, (rows, order[before]), 1 - share)
    np.add.at(weights, (rows, order[after]), share)
    return weights
