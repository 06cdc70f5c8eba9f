"""Refuses undersampled k-space: training needs fully sampled references."""

from __future__ import annotations

import numpy as np

from fedcmr_shared.errors import DataError

MINIMUM_COVERAGE = 0.5
"""Smallest share of phase encodes; partial Fourier needs a little more than one half."""


def check_coverage(sampled: np.ndarray, place: str) -> None:
    """Check the sampled phase-encoding lines, bool ``[phase]``, of one image.

    Missing outer lines (partial Fourier) are fine; missing lines between sampled ones, or fewer
    than half of all, raise DataError that names the coverage and ``place``.
    """
    lines = np.flatnonzero(sampled)
    if lines.size == 0:
        raise DataError(f"{place}: no phase-encoding line was acquired")
    contiguous = lines[-1] - lines[0] + 1 == lines.size
    if contiguous and lines.size >= MINIMUM_COVERAGE * sampled.size:
        return
    share = f"{lines.size} of {sampled.size} phase-encoding lines ({lines.size / sampled.size:.0%})"
    raise DataError(f"{place}: undersampled acquisition, {share}: import fully sampled scans only")


def check_image(image: np.ndarray, place: str) -> None:
    """Apply `check_coverage` to the lines of ``image`` ``[coil, phase, readout]`` with any signal.

    An image without any signal passes: the store refuses a scan of nothing but zeros.
    """
    centre = image.shape[-1] // 2
    # An acquired line has signal in its middle; only a doubtful image is looked at as a whole.
    if (image[..., centre - 1 : centre + 2] != 0).any(axis=(0, 2)).all():
        return
    sampled = (image != 0).any(axis=(0, 2))
    if sampled.any():
        check_coverage(sampled, place)
