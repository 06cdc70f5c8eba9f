"""Simulated patients: phenotypes by disease, body and heart shapes, all drawn from one seed.

The target distributions follow published group means: healthy hearts those of UK Biobank (Petersen
et al., J Cardiovasc Magn Reson 2017;19:18), hypertrophy and heart failure those of the Sunnybrook
data (Radau et al., MIDAS J 2009), class limits those of the ACDC challenge (Bernard et al., IEEE
Trans Med Imaging 2018;37:2514). Spreads and correlations are chosen by us: never a clinical
reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from fedcmr_shared.errors import ConfigurationError
from fedcmr_simulations.phantom.motion import BeatingHeart, Volumes


@dataclass(frozen=True)
class DiseaseProfile:
    """Mean and standard deviation of the free phenotypes of one disease group."""

    lv_edv: tuple[float, float]
    lv_ef: tuple[float, float]
    lv_mass: tuple[float, float]
    rv_ef: tuple[float, float]
    heart_rate: tuple[float, float] = (66.0, 9.0)
    rv_edv: tuple[float, float] | None = None
    """Only for diseases of the RV; otherwise both ventricles eject the same volume."""


PROFILES: Final[dict[str, DiseaseProfile]] = {
    "NC": DiseaseProfile((142, 28), (61, 5), (88, 18), (57, 5)),
    "HCM": DiseaseProfile((120, 24), (66, 6), (176, 40), (60, 6)),
    "DCM": DiseaseProfile((234, 48), (30, 8), (172, 34), (44, 9), (76, 11)),
    "MI": DiseaseProfile((190, 40), (36, 8), (140, 28), (52, 8), (72, 10)),
    "HHD": DiseaseProfile((140, 26), (60, 7), (150, 28), (57, 6), (70, 9)),
    "PAH": DiseaseProfile((112, 20), (59, 6), (84, 16), (36, 7), (80, 10), (215, 36)),
}
"""Disease codes of the vocabulary that the phantom can show."""


@dataclass(frozen=True)
class Vessel:
    """A round or oblique vessel: position in mm, radius, elongation, direction and drift along z."""

    x: float
    y: float
    radius: float
    elongation: float
    angle: float
    drift_x: float
    drift_y: float


@dataclass(frozen=True)
class Body:
    """Chest and upper abdomen in the short-axis plane; lengths in mm, angles in radians.

    The origin is the middle of the chest; x points to the patient's left, y to the back.
    """

    half_width: float
    half_depth: float
    roundness: float
    fat: float
    muscle: float
    liver: tuple[float, float, float, float]
    stomach: tuple[float, float, float]
    spine_x: float
    aorta: tuple[float, float, float]
    ripple: tuple[float, float, float, float]
    lung_vessels: tuple[Vessel, ...]
    liver_vessels: tuple[Vessel, ...]


@dataclass(frozen=True)
class HeartPlacement:
    """Where the heart lies and how its round model is bent; lengths in mm, angles in radians.

    ``bends`` are amplitudes of area-preserving shears, so no volume changes. ``cavity_offset`` moves
    the LV cavity inside its wall (share of the wall thickness, direction), which makes one wall
    thick and the other thin: septal hypertrophy, thinned infarcts.
    """

    x: float
    y: float
    rotation: float
    tilt: tuple[float, float]
    bends: tuple[float, float, float]
    stretch: float
    cavity_offset: tuple[float, float]
    papillaries: tuple[tuple[float, float], ...]
    fat: float
    scar: Scar | None


@dataclass(frozen=True)
class Scar:
    """Fibrosis in the LV wall: sector, depth range (0 endocardium, 1 epicardium), range along z."""

    angle: float
    half_width: float
    inner: float
    outer: float
    low: float
    high: float


@dataclass(frozen=True)
class Patient:
    """One simulated patient; ``disease`` is a code of PROFILES."""

    name: str
    disease: str
    heart_rate_bpm: float
    heart: BeatingHeart
    placement: HeartPlacement
    body: Body
    breathing_mm: float


def draw_patient(name: str, disease: str, rng: np.random.Generator) -> Patient:
    """Draw one patient of a disease group.

    Raises:
        ConfigurationError: the phantom has no profile for ``disease``.
    """
    if disease not in PROFILES:
        known = ", ".join(PROFILES)
        raise ConfigurationError(f"disease {disease!r} has no phantom profile; use {known}")
    profile = PROFILES[disease]
    size = float(np.clip(rng.normal(1.0, 0.09), 0.8, 1.22))
    volumes = draw_volumes(profile, size, rng)
    long_axis = 88 * (volumes.lv_edv / 146) ** 0.3 * float(rng.uniform(0.94, 1.06))
    shortening = 0.17 * (1 - volumes.lv_esv / volumes.lv_edv) / 0.6
    heart = BeatingHeart(volumes, long_axis, shortening, float(rng.uniform(0.32, 0.48)))
    return Patient(
        name=name,
        disease=disease,
        heart_rate_bpm=float(np.clip(rng.normal(*profile.heart_rate), 45, 115)),
        heart=heart,
        placement=_draw_placement(disease, size, rng),
        body=_draw_body(size, rng),
        breathing_mm=float(rng.uniform(1.0, 5.0)),
    )


def draw_volumes(profile: DiseaseProfile, size: float, rng: np.random.Generator) -> Volumes:
    """Draw consistent volumes: a shared body size, and equal stroke volumes where no RV disease."""
    volume_scale = size**2
    edv = float(np.clip(rng.normal(*profile.lv_edv), 70, 370)) * volume_scale
    ef = float(np.clip(rng.normal(*profile.lv_ef), 12, 80)) / 100
    mass = float(np.clip(rng.normal(*profile.lv_mass), 50, 300)) * volume_scale
    rv_ef = float(np.clip(rng.normal(*profile.rv_ef), 20, 75)) / 100
    if profile.rv_edv is not None:
        rv_edv = float(np.clip(rng.normal(*profile.rv_edv), 150, 295)) * volume_scale
    else:
        rv_edv = edv * ef * float(rng.normal(1.0, 0.03)) / rv_ef
    return Volumes(edv, edv * (1 - ef), rv_edv, rv_edv * (1 - rv_ef), mass)


def _draw_placement(disease: str, size: float, rng: np.random.Generator) -> HeartPlacement:
    offset = (float(rng.uniform(0, 0.15)), float(rng.uniform(-np.pi, np.pi)))
    scar = _draw_scar(disease, rng)
    if disease == "HCM":
        offset = (float(rng.uniform(0.25, 0.55)), float(rng.normal(0.0, 0.3)))
    elif disease == "MI" and scar is not None:
        offset = (float(rng.uniform(0.2, 0.4)), scar.angle)
    return HeartPlacement(
        x=float(rng.normal(24, 8)) * size,
        y=float(rng.normal(-22, 6)) * size,
        rotation=float(np.deg2rad(rng.normal(24, 11))),
        tilt=(float(rng.normal(0.14, 0.08)), float(rng.normal(0.10, 0.08))),
        bends=(
            float(rng.normal(0, 1.6)),
            float(rng.normal(0, 1.6)),
            float(rng.normal(3.0, 1.5)),
        ),
        stretch=float(np.exp(rng.normal(0, 0.04))),
        cavity_offset=offset,
        papillaries=(
            (float(rng.normal(0.9, 0.2)), float(rng.uniform(4.0, 6.0))),
            (float(rng.normal(-1.3, 0.2)), float(rng.uniform(4.0, 6.0))),
        ),
        fat=float(rng.uniform(2.0, 7.0)),
        scar=scar,
    )


def _draw_scar(disease: str, rng: np.random.Generator) -> Scar | None:
    along = float(rng.uniform(0.05, 0.35))
    low, high = along, along + float(rng.uniform(0.45, 0.65))
    if disease == "MI":  # from the endocardium outwards, in one coronary territory
        angle = float(rng.choice([-2.2, -0.8, 1.2, 2.6]) + rng.normal(0, 0.2))
        return Scar(
            angle, float(rng.uniform(0.45, 0.9)), 0.0, float(rng.uniform(0.45, 1)), low, high
        )
    if disease == "HCM" and rng.random() < 0.6:  # patchy, inside the thick septum
        return Scar(
            float(np.pi + rng.normal(0, 0.5)), float(rng.uniform(0.2, 0.4)), 0.3, 0.75, low, high
        )
    if disease == "DCM" and rng.random() < 0.5:  # thin stripe in the middle of the septum
        return Scar(float(np.pi + rng.normal(0, 0.2)), 0.6, 0.4, 0.65, low, high)
    return None


def _draw_body(size: float, rng: np.random.Generator) -> Body:
    return Body(
        half_width=float(rng.normal(160, 11)) * size,
        half_depth=float(rng.normal(113, 6)) * size,
        roundness=float(rng.uniform(2.2, 2.7)),
        fat=float(rng.gamma(4.0, 3.2) + 5),
        muscle=float(rng.uniform(10, 17)),
        liver=(
            float(rng.normal(-62, 10)) * size,
            float(rng.normal(58, 7)) * size,
            float(rng.uniform(76, 100)) * size,
            float(rng.uniform(46, 60)) * size,
        ),
        stomach=(
            float(rng.normal(62, 9)) * size,
            float(rng.normal(52, 7)) * size,
            float(rng.uniform(16, 32)) * size,
        ),
        spine_x=float(rng.normal(-6, 5)),
        aorta=(
            float(rng.normal(22, 4)),
            float(rng.normal(0.58, 0.03)),
            float(rng.normal(11.5, 1.5)),
        ),
        ripple=(
            float(rng.normal(0, 0.25)),
            float(rng.uniform(-np.pi, np.pi)),
            float(rng.normal(0, 0.2)),
            float(rng.uniform(-np.pi, np.pi)),
        ),
        lung_vessels=_draw_vessels(rng, count=150, spread=(145 * size, 95 * size), scale=1.1),
        liver_vessels=_draw_vessels(rng, count=16, spread=(80 * size, 50 * size), scale=2.2),
    )


def _draw_vessels(
    rng: np.random.Generator, *, count: int, spread: tuple[float, float], scale: float
) -> tuple[Vessel, ...]:
    # Many thin vessels and a few thick ones, mostly near the middle.
    columns = np.column_stack(
        [
            rng.uniform(-1, 1, count) * spread[0],
            rng.uniform(-1, 1, count) * spread[1],
            scale * (0.5 + rng.exponential(0.5, count)),
            1 + rng.exponential(0.9, count),
            rng.uniform(0, np.pi, count),
            rng.normal(0, 0.4, count),
            rng.normal(0, 0.4, count),
        ]
    )
    return tuple(Vessel(*map(float, row)) for row in columns)
