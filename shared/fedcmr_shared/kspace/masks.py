"""Undersampling masks of CMRxRecon2025 and CardioMM (arXiv 2512.21652).

All nominal acceleration factors exclude the calibration (ACS) lines, so the realised factor is
far lower: a uniform mask of 128 phase encodes with 20 ACS lines and nominal factor 8 measures
every 3.9th line. Print both.

The test patterns (``uniform`` and ``kt-…``) follow the published formulas and change from frame to
frame. ``random`` and ``radial`` are the training patterns: one draw for all frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, get_args

import numpy as np
from numpy.typing import NDArray

from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.schemas.job import Pattern

Mask = NDArray[np.bool_]

RADIAL_PATTERNS: Final = frozenset({"kt-radial", "radial"})
"""Patterns whose calibration region is a central square instead of full lines."""

RANDOM_PATTERNS: Final = frozenset({"kt-gaussian", "random", "radial"})
"""Patterns that depend on the seed."""

_FRAME_ANGLE_DEG: Final = 137.5  # golden angle between the spokes of successive frames
_BEAM_FACTOR: Final = 0.6  # radial masks are cut for this fraction of the nominal factor
_GAUSSIAN_WEIGHT: Final = 0.2  # alpha of the kt-gaussian density
_UNIFORM_FLOOR: Final = 0.1


@dataclass(frozen=True)
class Sampling:
    """How k-space is undersampled: pattern, nominal acceleration factor, number of ACS lines."""

    pattern: Pattern
    acceleration: float
    acs_lines: int = 20

    def __post_init__(self) -> None:
        if self.pattern not in get_args(Pattern):
            known = ", ".join(get_args(Pattern))
            raise ConfigurationError(f"sampling pattern {self.pattern!r} is unknown: use {known}")
        if not (math.isfinite(self.acceleration) and self.acceleration >= 1):
            raise ConfigurationError(f"acceleration {self.acceleration} must be at least 1")
        if self.acs_lines < 1:
            raise ConfigurationError(f"acs_lines {self.acs_lines} must be at least 1")

    @property
    def is_radial(self) -> bool:
        """Whether the calibration region is a central square instead of full lines."""
        return self.pattern in RADIAL_PATTERNS


def make_mask(
    sampling: Sampling, *, phase_encodes: int, readout: int, frames: int, seed: int
) -> Mask:
    """Return the mask ``[frame, phase, readout]``, True where a sample is measured.

    The same arguments always give the same mask; patterns outside :data:`RANDOM_PATTERNS` do not
    use ``seed``.

    Raises:
        ConfigurationError: if a size is below 1 or the ACS region does not fit.
    """
    if frames < 1:
        raise ConfigurationError(f"frames {frames} must be at least 1")
    acs = acs_region(sampling, phase_encodes, readout)
    if sampling.is_radial:
        mask = _radial(sampling, (phase_encodes, readout), frames, seed)
    else:
        lines = _LINES[sampling.pattern](sampling.acceleration, phase_encodes, frames, seed)
        mask = np.repeat(lines[:, :, None], readout, axis=2)
    mask[:, *acs] = True
    return mask


def acs_region(sampling: Sampling, phase_encodes: int, readout: int) -> tuple[slice, slice]:
    """Return the calibration region as slices of (phase, readout).

    Cartesian patterns: the central ``acs_lines`` lines over the full readout. Radial patterns:
    the central ``acs_lines`` x ``acs_lines`` square.

    Raises:
        ConfigurationError: if a size is below 1 or the region does not fit.
    """
    if phase_encodes < 1 or readout < 1:
        raise ConfigurationError(
            f"phase_encodes {phase_encodes} and readout {readout} must be at least 1"
        )
    phase = _centre(phase_encodes, sampling.acs_lines, "phase_encodes")
    if sampling.is_radial:
        return phase, _centre(readout, sampling.acs_lines, "readout")
    return phase, slice(0, readout)


def acs_mask(sampling: Sampling, phase_encodes: int, readout: int) -> Mask:
    """Return :func:`acs_region` as a mask ``[phase, readout]``."""
    mask = np.zeros((phase_encodes, readout), dtype=np.bool_)
    mask[acs_region(sampling, phase_encodes, readout)] = True
    return mask


def realised_acceleration(mask: Mask) -> float:
    """Return the number of positions over the number of measured samples, ACS included.

    Raises:
        ConfigurationError: if nothing is measured.
    """
    measured = int(np.count_nonzero(mask))
    if measured == 0:
        raise ConfigurationError("mask measures no sample: its acceleration is undefined")
    return mask.size / measured


def _centre(size: int, width: int, name: str) -> slice:
    if width > size:
        raise ConfigurationError(f"acs_lines {width} exceeds {name} {size}: use at most {size}")
    start = size // 2 - width // 2
    return slice(start, start + width)


def _uniform(acceleration: float, phase_encodes: int, frames: int, seed: int) -> Mask:
    lines = np.zeros((frames, phase_encodes), dtype=np.bool_)
    lines[:, np.arange(0, phase_encodes, acceleration).astype(int)] = True
    return lines


def _kt_uniform(acceleration: float, phase_encodes: int, frames: int, seed: int) -> Mask:
    lines = np.zeros((frames, phase_encodes), dtype=np.bool_)
    for frame in range(frames):
        lines[frame, np.arange(frame % acceleration, phase_encodes, acceleration).astype(int)] = (
            True
        )
    return lines


def _random(acceleration: float, phase_encodes: int, frames: int, seed: int) -> Mask:
    drawn = np.random.default_rng(seed).random(phase_encodes) < 1 / acceleration
    return np.repeat(drawn[None], frames, axis=0)


def _kt_gaussian(acceleration: float, phase_encodes: int, frames: int, seed: int) -> Mask:
    position = np.arange(phase_encodes) - phase_encodes // 2
    bell = np.exp(-((position / (phase_encodes / 5)) ** 2))
    density = _UNIFORM_FLOOR + _GAUSSIAN_WEIGHT / (1 - _GAUSSIAN_WEIGHT) * bell
    density /= density.sum()
    lines = np.zeros((frames, phase_encodes), dtype=np.bool_)
    for frame in range(frames):
        rng = np.random.default_rng((seed, frame))
        for line in rng.choice(phase_encodes, size=round(phase_encodes / acceleration), p=density):
            free = np.flatnonzero(~lines[frame])
            lines[frame, free[np.argmin(np.abs(free - line))]] = True
    return lines


def _radial(sampling: Sampling, shape: tuple[int, int], frames: int, seed: int) -> Mask:
    beams = max(1, int(180 / (_BEAM_FACTOR * sampling.acceleration)))
    if sampling.pattern == "kt-radial":
        offsets = _FRAME_ANGLE_DEG * np.arange(frames)
    else:
        offsets = np.random.default_rng(seed).uniform(0, 180, size=1)
    mask = np.zeros((len(offsets), *shape), dtype=np.bool_)
    for frame, offset in enumerate(offsets):
        for beam in range(beams):
            mask[frame] |= _spoke(shape, offset + beam * 180 / beams)
    return np.broadcast_to(mask, (frames, *shape)).copy()


def _spoke(shape: tuple[int, int], angle_deg: float) -> Mask:
    """Nearest-neighbour rotation of a line of ``max(shape)`` samples about the k-space centre."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    y, x = y - shape[0] // 2, x - shape[1] // 2
    cosine, sine = math.cos(math.radians(angle_deg)), math.sin(math.radians(angle_deg))
    # Rounding first makes ties at half a sample the same on every machine.
    across = np.floor(np.round(y * cosine - x * sine, 9) + 0.5)
    along = np.floor(np.round(y * sine + x * cosine, 9) + 0.5)
    length = max(shape)
    inside = (along >= -(length // 2)) & (along < length - length // 2)
    return np.asarray((across == 0) & inside, dtype=np.bool_)


_LINES: Final[dict[str, Callable[[float, int, int, int], Mask]]] = {
    "uniform": _uniform,
    "kt-uniform": _kt_uniform,
    "kt-gaussian": _kt_gaussian,
    "random": _random,
}
