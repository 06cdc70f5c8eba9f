"""The beating ventricles: volumes over the heart cycle and the shapes that have them.

The left ventricle (LV) is a truncated prolate ellipsoid inside another; the right ventricle (RV)
is, in every short-axis plane, a disc from which the LV is cut out. Both have closed areas in each
plane, so every volume is known without counting voxels. Lengths in mm, volumes in mL; z runs along
the long axis from the epicardial apex (0) to the base.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq

from fedcmr_shared.errors import ConfigurationError

MYOCARDIAL_DENSITY_G_PER_ML: Final = 1.05
END_SYSTOLE: Final = 0.35
"""Fraction of the heart cycle at which the ventricles are smallest."""
_APICAL_WALL: Final = 0.6  # the wall is thinner at the apex than at the equator
_RV_APEX: Final = 0.12  # the RV ends short of the LV apex
_Z_SAMPLES: Final = 200

Floats = npt.NDArray[np.float64]


def volume_curve(phase: npt.ArrayLike) -> Floats:
    """Fraction of the stroke volume still inside at ``phase`` (heart cycles): 1 at ED, 0 at ES.

    Ejection over the first third, early filling, rest (diastasis), atrial contraction.
    """
    cycle = np.mod(np.asarray(phase, dtype=np.float64), 1.0)
    knots: tuple[float, ...] = (0.0, END_SYSTOLE, 0.60, 0.82, 1.0)
    values: tuple[float, ...] = (1.0, 0.0, 0.76, 0.82, 1.0)
    left = np.clip(np.searchsorted(knots, cycle, side="right") - 1, 0, len(knots) - 2)
    start, stop = np.take(knots, left), np.take(knots, left + 1)
    # Half a cosine between the knots: no kink, no overshoot.
    blend = 0.5 - 0.5 * np.cos(np.pi * (cycle - start) / (stop - start))
    return np.asarray(np.take(values, left) * (1 - blend) + np.take(values, left + 1) * blend)


@dataclass(frozen=True)
class Volumes:
    """Targets of one patient: volumes in mL, LV mass in g.

    Raises:
        ConfigurationError: a volume or mass is not positive, or ESV is not below EDV.
    """

    lv_edv: float
    lv_esv: float
    rv_edv: float
    rv_esv: float
    lv_mass: float

    def __post_init__(self) -> None:
        for ventricle in ("lv", "rv"):
            edv, esv = getattr(self, f"{ventricle}_edv"), getattr(self, f"{ventricle}_esv")
            if not 0 < esv < edv:
                raise ConfigurationError(
                    f"{ventricle}_esv must lie between 0 and {ventricle}_edv ({edv:g} mL), "
                    f"not {esv:g}"
                )
        if self.lv_mass <= 0:
            raise ConfigurationError(f"lv_mass must be positive, not {self.lv_mass:g} g")

    def phenotypes(self, heart_rate_bpm: float) -> dict[str, float]:
        """Ventricular phenotypes by the names of UK Biobank category 157 (mL, %, g, L/min)."""
        lv_sv, rv_sv = self.lv_edv - self.lv_esv, self.rv_edv - self.rv_esv
        return {
            "LVEDV": self.lv_edv,
            "LVESV": self.lv_esv,
            "LVSV": lv_sv,
            "LVEF": 100 * lv_sv / self.lv_edv,
            "LVCO": lv_sv * heart_rate_bpm / 1000,
            "LVM": self.lv_mass,
            "RVEDV": self.rv_edv,
            "RVESV": self.rv_esv,
            "RVSV": rv_sv,
            "RVEF": 100 * rv_sv / self.rv_edv,
            "HR": heart_rate_bpm,
        }


@dataclass(frozen=True)
class HeartState:
    """Shape of both ventricles at one instant.

    The endocardium has short semi-axis ``radius`` and long semi-axis ``length`` about its equator
    and is cut ``above`` mm above it; ``wall`` is the LV wall at the equator and ``rv_depth`` the
    width of the RV at the base.
    """

    radius: float
    length: float
    above: float
    wall: float
    rv_depth: float

    @property
    def equator(self) -> float:
        """Position of the equator along z."""
        return self.length + _APICAL_WALL * self.wall

    @property
    def base(self) -> float:
        """Position of the base plane along z."""
        return self.equator + self.above

    def endocardial_radius(self, z: npt.ArrayLike) -> Floats:
        """Radius of the LV cavity at ``z``; 0 beyond apex and base."""
        return self._section(z, self.radius, self.length)

    def epicardial_radius(self, z: npt.ArrayLike) -> Floats:
        """Outer radius of the LV wall at ``z``; 0 beyond apex and base."""
        return self._section(z, self.radius + self.wall, self.equator)

    def _section(self, z: npt.ArrayLike, short: float, long: float) -> Floats:
        height = np.asarray(z, dtype=np.float64) - self.equator
        inside = np.maximum(1 - (height / long) ** 2, 0)
        return np.asarray(short * np.sqrt(inside) * (height <= self.above))

    def rv_disc(self, z: npt.ArrayLike) -> tuple[Floats, Floats]:
        """Radius of the RV disc at ``z`` and the distance of its centre from the LV axis."""
        z = np.asarray(z, dtype=np.float64)
        epicardium = self.epicardial_radius(z)
        height = np.clip((z / self.base - _RV_APEX) / (1 - _RV_APEX), 0, 1)
        depth = self.rv_depth * height**0.6 * (z <= self.base)
        disc = np.where(depth > 0, 0.9 * epicardium + 0.25 * depth, 0)
        return disc, depth + epicardium - disc

    def rv_area(self, z: npt.ArrayLike) -> Floats:
        """Area of the RV cavity at ``z`` in mm²: the disc without what the LV covers."""
        disc, distance = self.rv_disc(z)
        covered = lens_area(disc, self.epicardial_radius(z), distance)
        return np.asarray(np.pi * disc**2 - covered)

    def lv_volume(self) -> float:
        """LV cavity in mL, in closed form."""
        return truncated_ellipsoid_ml(self.radius, self.length, self.above)

    def wall_volume(self) -> float:
        """LV myocardium in mL, in closed form."""
        outer = truncated_ellipsoid_ml(self.radius + self.wall, self.equator, self.above)
        return outer - self.lv_volume()

    def rv_volume(self) -> float:
        """RV cavity in mL: closed-form areas, summed along the long axis."""
        z = (np.arange(_Z_SAMPLES) + 0.5) * self.base / _Z_SAMPLES
        return float(self.rv_area(z).sum() * self.base / _Z_SAMPLES / 1000)


def truncated_ellipsoid_ml(short: float, long: float, above: float) -> float:
    """Volume in mL of an ellipsoid of revolution, from one tip to ``above`` mm past its equator."""
    ratio = above / long
    return float(np.pi * short**2 * long * (2 / 3 + ratio - ratio**3 / 3) / 1000)


def lens_area(first: npt.ArrayLike, second: npt.ArrayLike, distance: npt.ArrayLike) -> Floats:
    """Area common to two discs with these radii and this distance between their centres."""
    a, b, d = np.broadcast_arrays(
        *(np.asarray(value, dtype=np.float64) for value in (first, second, distance))
    )
    smaller = np.minimum(a, b)
    with np.errstate(divide="ignore", invalid="ignore"):
        angle_a = np.arccos(np.clip((d**2 + a**2 - b**2) / (2 * d * a), -1, 1))
        angle_b = np.arccos(np.clip((d**2 + b**2 - a**2) / (2 * d * b), -1, 1))
    kite = np.sqrt(np.maximum((-d + a + b) * (d + a - b) * (d - a + b) * (d + a + b), 0)) / 2
    partial = a**2 * angle_a + b**2 * angle_b - kite
    result = np.where(d <= np.abs(a - b), np.pi * smaller**2, partial)
    return np.asarray(np.where((d >= a + b) | (smaller == 0), 0.0, result))


@dataclass(frozen=True)
class BeatingHeart:
    """Ventricles that follow the volume curve.

    The volume of the LV wall stays what it is at end diastole, so the wall thickens when the cavity
    empties; the long axis shortens by ``shortening`` (fraction of its length) towards a fixed apex.

    Args:
        volumes: targets at end diastole and end systole.
        long_axis_mm: LV cavity from apex to base at end diastole.
        shortening: loss of long-axis length at end systole, as a fraction.
        truncation: height of the base above the equator over the long semi-axis.
    """

    volumes: Volumes
    long_axis_mm: float = 88.0
    shortening: float = 0.14
    truncation: float = 0.4

    def at(self, phase: float) -> HeartState:
        """Shape at ``phase`` (heart cycles after the R wave)."""
        remaining = float(volume_curve(phase))
        return self._shape(
            lv=_between(self.volumes.lv_esv, self.volumes.lv_edv, remaining),
            rv=_between(self.volumes.rv_esv, self.volumes.rv_edv, remaining),
            scale=1 - self.shortening * (1 - remaining),
        )

    def _shape(self, *, lv: float, rv: float, scale: float) -> HeartState:
        length = scale * self.long_axis_mm / (1 + self.truncation)
        above = self.truncation * length
        radius = float(np.sqrt(lv / truncated_ellipsoid_ml(1.0, length, above)))
        mass_volume = self.volumes.lv_mass / MYOCARDIAL_DENSITY_G_PER_ML

        def excess_wall(wall: float) -> float:
            return HeartState(radius, length, above, wall, 0.0).wall_volume() - mass_volume

        wall = float(brentq(excess_wall, 1e-3, 80.0))

        def excess_rv(depth: float) -> float:
            return HeartState(radius, length, above, wall, depth).rv_volume() - rv

        depth = float(brentq(excess_rv, 1e-3, 200.0, xtol=1e-6))
        return HeartState(radius, length, above, wall, depth)


def _between(low: float, high: float, fraction: float) -> float:
    return low + (high - low) * fraction
