"""Relaxation times of thoracic tissues at 0.55, 1.5, 3 and 5 T, and interpolated in between.

Sources, by the key used in the table:

=====  ===========================================================================================
CW19   Campbell-Washburn et al., Radiology 2019;293:384 (0.55 T, in vivo)
ST05   Stanisz et al., Magn Reson Med 2005;54:507 (1.5 and 3 T, ex vivo, 37 °C)
DB04   de Bazelaire et al., Radiology 2004;230:652 (1.5 and 3 T, in vivo)
KB13   von Knobelsdorff-Brenkenhoff et al., J Cardiovasc Magn Reson 2013;15:53 (3 T, in vivo)
GR19   Granitz et al., Wien Klin Wochenschr 2019;131:143 (1.5 T, in vivo)
MT25   Myocardial T1 and T2 mapping at 5.0 T, comparison with 3.0 T (2025 preprint; 5 T, in vivo)
extra  extrapolated by us from the neighbouring fields: T1 grows by a power law (as Bottomley et
       al., Med Phys 1984;11:425, describe), T2 falls slowly
ours   chosen by us for a plausible picture; no measurement behind it
=====  ===========================================================================================

The values give realistic contrast. They are no clinical reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Final, Literal

import numpy as np

from fedcmr_shared.errors import ConfigurationError

Tissue = Literal[
    "fat",
    "muscle",
    "myocardium",
    "scar",
    "arterial blood",
    "venous blood",
    "liver",
    "lung",
    "marrow",
    "bone",
    "fluid",
    "spleen",
]

FAT_SHIFT_PPM: Final = -3.4
"""Chemical shift of the main fat peak against water."""
GAMMA_MHZ_PER_T: Final = 42.577
"""Gyromagnetic ratio of the proton over 2π."""
T1RHO_PER_T2: Final = 1.15
"""T1ρ over T2 at a spin lock of 500 Hz (ours): always above T2, in muscle by a few ms."""
RELAXIVITY_PER_S_MM: Final = 4.5
"""Longitudinal relaxivity of a gadolinium chelate in blood, in 1/(s·mmol/L)."""


@dataclass(frozen=True)
class Relaxation:
    """T1 and T2 in ms, and the key of their source in the table of this module."""

    t1_ms: float
    t2_ms: float
    source: str

    def with_contrast(self, concentration_mm: float) -> float:
        """T1 in ms when ``concentration_mm`` (mmol/L) of contrast agent is present.

        Fast exchange: 1/T1 = 1/T1₀ + r₁c.
        """
        return 1e3 / (1e3 / self.t1_ms + RELAXIVITY_PER_S_MM * concentration_mm)


@dataclass(frozen=True)
class TissueProperties:
    """What the signal models need to know of a tissue beside its relaxation times."""

    proton_density: float
    texture: float
    """Relative standard deviation of the signal inside the tissue."""
    late_concentration_mm: float
    """Contrast agent about ten minutes after injection, in mmol/L (ours)."""


PROPERTIES: Final[dict[Tissue, TissueProperties]] = {
    "fat": TissueProperties(0.72, 0.04, 0.0),
    "muscle": TissueProperties(0.75, 0.06, 0.15),
    "myocardium": TissueProperties(0.80, 0.05, 0.30),
    "scar": TissueProperties(0.82, 0.08, 1.00),
    "arterial blood": TissueProperties(0.95, 0.03, 0.46),
    "venous blood": TissueProperties(0.93, 0.03, 0.46),
    "liver": TissueProperties(0.75, 0.05, 0.40),
    "lung": TissueProperties(0.10, 0.40, 0.25),
    "marrow": TissueProperties(0.65, 0.10, 0.15),
    "bone": TissueProperties(0.06, 0.10, 0.0),
    "fluid": TissueProperties(0.95, 0.08, 0.05),
    "spleen": TissueProperties(0.85, 0.05, 0.45),
}
TISSUES: Final[tuple[Tissue, ...]] = tuple(PROPERTIES)
"""Order of the tissue axis wherever fractions of tissues are stored."""

_BLOOD: Final = {
    0.55: Relaxation(1122, 263, "CW19"),
    1.5: Relaxation(1441, 290, "ST05"),
    3.0: Relaxation(1932, 275, "ST05"),
    5.0: Relaxation(2250, 250, "extra"),
}
RELAXATION: Final[dict[Tissue, dict[float, Relaxation]]] = {
    "fat": {
        0.55: Relaxation(187, 93, "CW19"),
        1.5: Relaxation(343, 58, "DB04"),
        3.0: Relaxation(382, 68, "DB04"),
        5.0: Relaxation(413, 60, "extra"),
    },
    "muscle": {
        0.55: Relaxation(695, 44, "extra"),
        1.5: Relaxation(1008, 44, "ST05"),
        3.0: Relaxation(1412, 50, "ST05"),
        5.0: Relaxation(1810, 44, "extra"),
    },
    "myocardium": {
        0.55: Relaxation(701, 58, "CW19"),
        1.5: Relaxation(996, 56, "GR19"),
        3.0: Relaxation(1158, 45, "KB13"),
        5.0: Relaxation(1453, 37.5, "MT25"),
    },
    # Native scar: longer T1 and slightly longer T2 than healthy muscle, the same ratio everywhere.
    "scar": {
        0.55: Relaxation(806, 64, "ours"),
        1.5: Relaxation(1145, 61, "ours"),
        3.0: Relaxation(1332, 50, "ours"),
        5.0: Relaxation(1671, 41, "ours"),
    },
    "arterial blood": _BLOOD,
    "venous blood": _BLOOD,
    "liver": {
        0.55: Relaxation(339, 66, "CW19"),
        1.5: Relaxation(586, 46, "DB04"),
        3.0: Relaxation(809, 34, "DB04"),
        5.0: Relaxation(1026, 28, "extra"),
    },
    "lung": {
        0.55: Relaxation(950, 40, "ours"),
        1.5: Relaxation(1200, 35, "ours"),
        3.0: Relaxation(1400, 30, "ours"),
        5.0: Relaxation(1550, 25, "ours"),
    },
    "marrow": {
        0.55: Relaxation(500, 52, "extra"),
        1.5: Relaxation(549, 49, "DB04"),
        3.0: Relaxation(586, 49, "DB04"),
        5.0: Relaxation(615, 46, "extra"),
    },
    "bone": {field: Relaxation(600, 2, "ours") for field in (0.55, 1.5, 3.0, 5.0)},
    "fluid": {field: Relaxation(3200, 600, "ours") for field in (0.55, 1.5, 3.0, 5.0)},
    "spleen": {
        0.55: Relaxation(760, 90, "extra"),
        1.5: Relaxation(1057, 79, "DB04"),
        3.0: Relaxation(1328, 61, "DB04"),
        5.0: Relaxation(1571, 50, "extra"),
    },
}


@cache
def relaxation(tissue: Tissue, field_strength_t: float) -> Relaxation:
    """T1 and T2 of ``tissue``; between the tabulated fields both follow a power law.

    Raises:
        ConfigurationError: ``field_strength_t`` lies outside the tabulated fields.
    """
    by_field = RELAXATION[tissue]
    if field_strength_t in by_field:
        return by_field[field_strength_t]
    fields = sorted(by_field)
    if not fields[0] < field_strength_t < fields[-1]:
        raise ConfigurationError(
            f"field_strength_t: no relaxation times for {field_strength_t:g} T; "
            f"use {fields[0]:g} to {fields[-1]:g} T"
        )
    place = np.log(field_strength_t)
    columns = [[by_field[field].t1_ms, by_field[field].t2_ms] for field in fields]
    t1, t2 = (
        float(np.exp(np.interp(place, np.log(fields), np.log(values))))
        for values in zip(*columns, strict=True)
    )
    return Relaxation(t1, t2, "extra")


def fat_shift_hz(field_strength_t: float) -> float:
    """Resonance offset of fat against water in Hz."""
    return FAT_SHIFT_PPM * GAMMA_MHZ_PER_T * field_strength_t
