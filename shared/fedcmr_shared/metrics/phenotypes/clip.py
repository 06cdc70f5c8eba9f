"""What a clip of one slice tells about the left ventricle (LV): areas, and how they change."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from fedcmr_shared.errors import DataError
from fedcmr_shared.metrics.phenotypes.short_axis import CAVITY, MYOCARDIUM
from fedcmr_shared.models.segmenter import Segmenter, segment

LEAST_AREA_MM2: Final = 25.0
"""Smaller cavities count as not found."""
_FINE_MM: Final = 1.0
# The network is shown hearts a little larger than they are: dilated ones, which it otherwise loses
# in single frames, are found, and areas of the others stay what they are.
_SHOWN_MM: Final = 1.2 * _FINE_MM
_NEIGHBOURS: Final = (-1, 0, 1)


def measure_clip(
    clip: NDArray[np.floating], pixel_mm: float, segmenter: Segmenter
) -> dict[str, float]:
    """Return those of LVEDA, LVESA, LVMA (mm²) and LVFAC (%) that can be measured.

    End diastole (ED) is the first frame or a neighbour of it, whichever has the larger cavity; end
    systole the frame with the smallest. The wall is measured at ED. LVFAC =
    100 (LVEDA - LVESA) / LVEDA, 0 where no frame has a smaller cavity than ED: a heart that stands
    still was measured. Nothing is returned where ED shows no cavity, and no change where a frame
    shows none or the clip has only one.

    Args:
        clip: ``[frame, y, x]`` in [-1, 1]; one beat from the R wave.
        pixel_mm: size of its pixels.
        segmenter: finds the LV.

    Raises:
        DataError: the clip is no clip.
    """
    cavity, wall = _areas(clip, pixel_mm, segmenter)
    diastole = max(_NEIGHBOURS, key=lambda frame: cavity[frame % len(cavity)]) % len(cavity)
    largest, smallest = float(cavity[diastole]), float(cavity.min())
    if largest < LEAST_AREA_MM2:
        return {}
    result = {"LVEDA": largest, "LVMA": float(wall[diastole])}
    if len(cavity) > 1 and smallest >= LEAST_AREA_MM2:
        result |= {"LVESA": smallest, "LVFAC": 100 * (1 - smallest / largest)}
    return result


def area_curve(
    clip: NDArray[np.floating], pixel_mm: float, segmenter: Segmenter
) -> NDArray[np.float64]:
    """Return the area of the LV cavity in each frame of a clip, in mm²; 0 where none is found.

    Raises:
        DataError: the clip is no clip.
    """
    return _areas(clip, pixel_mm, segmenter)[0]


def _areas(
    clip: NDArray[np.floating], pixel_mm: float, segmenter: Segmenter
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Areas of cavity and wall ``[frame]`` in mm², counted on pixels finer than the clip's."""
    if clip.ndim != 3 or 0 in clip.shape or not np.isfinite(clip).all():
        raise DataError(f"clip of shape {clip.shape}: give finite values [frame, y, x]")
    magnitudes = torch.from_numpy((np.asarray(clip, np.float32) + 1) / 2)[:, None]
    size = [round(pixels * pixel_mm / _FINE_MM) for pixels in clip.shape[1:]]
    fine = F.interpolate(magnitudes, size, mode="bilinear", align_corners=False)[:, 0].numpy()
    labels = segment(segmenter, fine, (_SHOWN_MM, _SHOWN_MM))
    # The fine pixels are a whole number, and so not always of exactly _FINE_MM.
    pixel_mm2 = math.prod(clip.shape[1:]) * pixel_mm**2 / math.prod(size)
    cavity, wall = ((labels == label).sum(axis=(1, 2)) for label in (CAVITY, MYOCARDIUM))
    return cavity * pixel_mm2, wall * pixel_mm2
