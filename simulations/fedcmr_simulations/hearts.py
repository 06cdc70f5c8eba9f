"""Simulated hearts as a generator sees them: one mid-ventricular clip and its phenotypes.

How often which heart occurs is chosen here and follows no population: ejection fractions are
spread evenly, so that a generator learns to draw any of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from fedcmr_shared.errors import DataError
from fedcmr_shared.kspace.coils import remove_readout_oversampling, rss
from fedcmr_shared.kspace.fourier import ifft2c
from fedcmr_shared.metrics.phenotypes.short_axis import ShortAxis, Spacing, single_slice
from fedcmr_shared.metrics.phenotypes.table import PhenotypeTable
from fedcmr_shared.models.clips import ClipGrid, make_clip, ventricle_centre
from fedcmr_simulations.centres import CLIP_COILS, MID_VENTRICLE, TRAINING_CENTRES, Centre
from fedcmr_simulations.phantom.motion import END_SYSTOLE, BeatingHeart, Volumes
from fedcmr_simulations.phantom.patient import PROFILES, Patient, draw_patient
from fedcmr_simulations.phantom.protocol import protocol
from fedcmr_simulations.phantom.scan import Scan, Scanner

EJECTION_FRACTIONS: Final = (0.13, 0.77)
"""Least and largest, between which they are evenly spread."""

_OFF_CENTRE_MM: Final = 2.0  # as a segmenter errs
_RV_EDV_ML: Final = (50.0, 330.0)
_STREAM: Final = 31
# Of draw_patient: length and shortening of the long axis of hearts with these volumes.
_LONG_AXIS_MM: Final = 88.0
_LONG_AXIS_EDV_ML: Final = 146.0
_SHORTENING: Final = 0.17 / 0.6


@dataclass(frozen=True, eq=False)
class SimulatedHeart:
    """A clip ``[frames, rows, columns]`` in [-1, 1] and what is true of its heart.

    ``phenotypes`` are the 82 in the order of the table, NaN where the phantom knows none;
    ``single_slice`` is what the labels of this slice say (LVEDA, LVESA, LVMA in mm², LVFAC in %).
    """

    patient: str
    clip: NDArray[np.float32]
    phenotypes: NDArray[np.float64]
    single_slice: Mapping[str, float]


def simulate_hearts(
    patients: Sequence[int],
    grid: ClipGrid,
    seed: int,
    centres: Sequence[Centre] = TRAINING_CENTRES,
) -> Iterator[SimulatedHeart]:
    """Yield one heart for each number in ``patients``, which depends on that and ``seed`` alone.

    Raises:
        DataError: the phantom gave no labels.
    """
    for number in patients:
        rng = np.random.default_rng([seed, _STREAM, number])
        patient = draw_heart(f"simulated-{number:05d}", rng)
        yield _seen(patient, centres[number % len(centres)], grid, (seed, _STREAM, number), rng)


def draw_heart(name: str, rng: np.random.Generator) -> Patient:
    """Draw a patient of any disease, with an ejection fraction between EJECTION_FRACTIONS."""
    diseases = sorted(PROFILES)
    disease = diseases[int(rng.integers(len(diseases)))]
    patient = draw_patient(name, disease, rng)
    old, fraction = patient.heart.volumes, float(rng.uniform(*EJECTION_FRACTIONS))
    stroke = old.lv_edv * fraction
    rv_edv, rv_fraction = old.rv_edv, 1 - old.rv_esv / old.rv_edv
    if PROFILES[disease].rv_edv is None:  # both ventricles eject the same
        rv_edv = float(np.clip(stroke / rv_fraction, *_RV_EDV_ML))
    volumes = Volumes(
        old.lv_edv, old.lv_edv - stroke, rv_edv, rv_edv * (1 - rv_fraction), old.lv_mass
    )
    heart = replace(patient.heart, volumes=volumes, shortening=_SHORTENING * fraction)
    return replace(patient, heart=heart)


def expected_fac(phenotypes: Mapping[str, float]) -> float:
    """Return the mid-ventricular fractional area change in % that hearts of such volumes have.

    It is that of a heart of the length that the phantom's have on average, in the slice at
    MID_VENTRICLE. Needed are LVEDV and LVESV in mL and LVM in g.

    Raises:
        DataError: one of them is missing.
        ConfigurationError: no heart has these volumes.
    """
    missing = [name for name in ("LVEDV", "LVESV", "LVM") if not phenotypes.get(name, 0) > 0]
    if missing:
        raise DataError(f"phenotype {missing[0]} is needed to expect a change of area: give it")
    edv, esv, mass = (float(phenotypes[name]) for name in ("LVEDV", "LVESV", "LVM"))
    # The right ventricle does not matter here.
    volumes = Volumes(edv, esv, edv, esv, mass)
    length = _LONG_AXIS_MM * (edv / _LONG_AXIS_EDV_ML) ** 0.3
    heart = BeatingHeart(volumes, length, _SHORTENING * (1 - esv / edv))
    diastole, systole = heart.at(0), heart.at(END_SYSTOLE)
    height = MID_VENTRICLE * diastole.base
    radii = [float(state.endocardial_radius(height)) for state in (diastole, systole)]
    return 100 * (1 - (radii[1] / radii[0]) ** 2)


def _seen(
    patient: Patient,
    centre: Centre,
    grid: ClipGrid,
    seed: tuple[int, ...],
    rng: np.random.Generator,
) -> SimulatedHeart:
    scan = _scan(patient, centre, grid.frames, seed)
    scanner, labels = scan.scanner, scan.truth().labels
    if labels is None:
        raise DataError("the phantom gave no labels")
    spacing = scanner.grid.spacing
    middle = np.array(ventricle_centre(labels[:, 0])) + rng.normal(0, _OFF_CENTRE_MM, 2) / spacing
    place = (float(middle[0]), float(middle[1]))
    heart = ShortAxis(labels, Spacing(*spacing, scanner.slice_thickness_mm))
    truth = patient.heart.volumes.phenotypes(patient.heart_rate_bpm)
    return SimulatedHeart(
        patient=patient.name,
        clip=make_clip(_magnitudes(scan), scan.sequence.phases, spacing, place, grid),
        phenotypes=PhenotypeTable.of([truth]).values[0],
        single_slice=single_slice(heart),
    )


def _scan(patient: Patient, centre: Centre, frames: int, seed: tuple[int, ...]) -> Scan:
    scanner: Scanner = centre.equipment("quick")
    scanner = replace(
        scanner, array=replace(scanner.array, coils=CLIP_COILS, front=CLIP_COILS // 2)
    )
    sequence = protocol("cine", "quick", centre.field_strength_t)
    sequence = replace(sequence, phases=tuple(i / frames for i in range(frames)))
    height = MID_VENTRICLE * patient.heart.at(0).base
    return Scan(patient, scanner, sequence, (height,), seed)


def _magnitudes(scan: Scan) -> NDArray[np.float32]:
    """Images ``[frame, y, x]`` of the only slice."""
    oversampling = scan.scanner.grid.oversampling
    frames = []
    for _, _, kspace in scan.images():
        cropped = remove_readout_oversampling(torch.from_numpy(kspace), oversampling)
        frames.append(rss(ifft2c(cropped)).numpy().astype(np.float32))
    return np.stack(frames)
