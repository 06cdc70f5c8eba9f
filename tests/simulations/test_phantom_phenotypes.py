"""Phenotypes measured in the phantom against its closed-form truth, from labels and from images."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from fedcmr_shared.kspace.coils import rss
from fedcmr_shared.kspace.fourier import ifft2c
from fedcmr_shared.metrics.phenotypes.measurement import measure
from fedcmr_shared.metrics.phenotypes.motion import strains
from fedcmr_shared.metrics.phenotypes.short_axis import ShortAxis, Spacing, volumes
from fedcmr_shared.metrics.phenotypes.table import PHENOTYPES, implausible
from fedcmr_shared.metrics.phenotypes.wall import levels, wall_thickness
from fedcmr_simulations.centres import CENTRES
from fedcmr_simulations.phantom import anatomy
from fedcmr_simulations.phantom.patient import Patient, draw_patient
from fedcmr_simulations.phantom.protocol import protocol
from fedcmr_simulations.phantom.scan import Scan

DISEASES = ("NC", "HCM", "DCM", "MI", "HHD", "PAH")
FRAMES = 12
SLICES = 12
PIXEL_MM = 1.5


@cache
def patient_of(disease: str, seed: int = 4, *, straight: bool = False) -> Patient:
    """One patient; a ``straight`` one has round, concentric ventricles."""
    patient = draw_patient(disease, disease, np.random.default_rng(seed))
    if not straight:
        return patient
    shape = replace(patient.placement, bends=(0.0, 0.0, 0.0), stretch=1.0, cavity_offset=(0.0, 0.0))
    return replace(patient, placement=shape)


def heights(patient: Patient) -> np.ndarray:
    """Middles of equal slices from the base at end diastole to the apex."""
    base = patient.heart.at(0).base
    return base - (np.arange(SLICES) + 0.5) * base / SLICES


@cache
def heart_of(patient: Patient, frames: int = FRAMES) -> ShortAxis:
    # Wide enough for the RV of a heart with pulmonary hypertension.
    axis = np.arange(-110, 90, PIXEL_MM, dtype=np.float32)
    x, y = axis + patient.placement.x, axis + patient.placement.y
    states = [patient.heart.at(frame / frames) for frame in range(frames)]
    labels = [
        [anatomy.labels(x, y, patient, state, z, 0.0) for z in heights(patient)] for state in states
    ]
    pitch = patient.heart.at(0).base / SLICES
    return ShortAxis(
        np.array(labels, np.uint8), Spacing(PIXEL_MM, PIXEL_MM, pitch), patient.heart_rate_bpm
    )


@pytest.mark.parametrize("disease", DISEASES)
def test_volumes_and_mass(disease: str) -> None:
    """At ED the slices fill the heart; later the base sinks past whole slices, hence the room."""
    patient = patient_of(disease)
    truth = patient.heart.volumes.phenotypes(patient.heart_rate_bpm)
    found = volumes(heart_of(patient))
    for name in ("LVEDV", "RVEDV", "LVM"):
        assert found[name] == pytest.approx(truth[name], rel=0.015), name
    for name in ("LVESV", "RVESV"):
        assert found[name] == pytest.approx(truth[name], rel=0.1), name
    assert found["LVEF"] == pytest.approx(truth["LVEF"], abs=3)
    assert found["RVEF"] == pytest.approx(truth["RVEF"], abs=4.5)
    assert found["LVCO"] == pytest.approx(truth["LVCO"], rel=0.07)


def ring(patient: Patient, z: float, frame: int) -> tuple[float, float]:
    state = patient.heart.at(frame / FRAMES)
    return float(state.endocardial_radius(z)), float(state.epicardial_radius(z))


@pytest.mark.parametrize("disease", DISEASES)
def test_wall_thickness_of_round_hearts(disease: str) -> None:
    patient = patient_of(disease, straight=True)
    heart = heart_of(patient)
    found = wall_thickness(heart)
    by_level: list[list[tuple[float, float]]] = [[], [], []]
    for slice_, level in levels(heart).items():
        inner, outer = ring(patient, heights(patient)[slice_], 0)
        by_level[level].append((outer - inner, inner))
    flat = np.array([pair for part in by_level for pair in part])
    whole = np.average(flat[:, 0], weights=flat[:, 1])
    assert found["WT Global"] == pytest.approx(whole, abs=0.25)
    for number in range(1, 17):
        part = np.array(by_level[(number - 1) // 6])
        truth = np.average(part[:, 0], weights=part[:, 1])
        assert found[f"WT_AHA_{number}"] == pytest.approx(truth, abs=0.6), number


def test_the_septum_is_thick_where_the_phantom_made_it_thick() -> None:
    """Hypertrophy: the cavity lies off centre, away from the septum."""
    patient = patient_of("HCM")
    shape = replace(patient.placement, bends=(0.0, 0.0, 0.0), stretch=1.0, cavity_offset=(0.4, 0.0))
    patient = replace(patient, placement=shape)
    heart = heart_of(patient)
    found = wall_thickness(heart)
    by_level = [
        [ring(patient, heights(patient)[s], 0) for s, at in levels(heart).items() if at == n]
        for n in range(3)
    ]
    for level, rings in enumerate(by_level[:2]):
        thickness = np.mean([outer - inner for inner, outer in rings])
        # Segments 60 degrees wide beside septum and lateral wall see 83 % of the shift on average.
        shift = 0.4 * 0.83 * thickness
        septum = np.mean([found[f"WT_AHA_{6 * level + n}"] for n in (2, 3)])
        lateral = np.mean([found[f"WT_AHA_{6 * level + n}"] for n in (5, 6)])
        assert septum == pytest.approx(thickness + shift, rel=0.05)
        assert lateral == pytest.approx(thickness - shift, rel=0.05)


def strain_truth(patient: Patient, heart: ShortAxis) -> tuple[np.ndarray, np.ndarray]:
    """Curves [level, frame] of Ecc and Err in the three slices; both contours weigh the same."""
    slices = heart.base_to_apex
    around, across = [], []
    for share in (0.25, 0.5, 0.75):
        z = heights(patient)[slices[round(share * (len(slices) - 1))]]
        inner, outer = np.array([ring(patient, z, frame) for frame in range(FRAMES)]).T
        around.append(50 * (inner / inner[0] - 1) + 50 * (outer / outer[0] - 1))
        across.append(100 * ((outer - inner) / (outer - inner)[0] - 1))
    return np.array(around), np.array(across)


@pytest.mark.parametrize("disease", ["NC", "HCM", "MI"])
def test_global_strains_of_bent_hearts(disease: str) -> None:
    patient = patient_of(disease)
    heart = heart_of(patient)
    around, across = strain_truth(patient, heart)
    found = measure(heart)
    assert found["Ecc Global"] == pytest.approx(around.mean(axis=0).min(), abs=1)
    assert found["Err Global"] == pytest.approx(across.mean(axis=0).max(), rel=0.1)
    # All 61 of the 82 that a short-axis stack allows, plausible in sick hearts as well.
    assert set(found) == {p.name for p in PHENOTYPES if p.views == ("short-axis",)}
    strange = implausible(found)
    assert all(name.startswith("Ecc") or name[:2] in ("LV", "RV") for name in strange), strange


@pytest.mark.parametrize("disease", ["NC", "DCM"])
def test_segment_strains_of_round_hearts(disease: str) -> None:
    patient = patient_of(disease, straight=True)
    heart = heart_of(patient)
    around, across = strain_truth(patient, heart)
    found = measure(heart)
    for number in range(1, 17):
        level = (number - 1) // 6
        assert found[f"Ecc_AHA_{number}"] == pytest.approx(around[level].min(), abs=6), number
        assert found[f"Err_AHA_{number}"] == pytest.approx(across[level].max(), rel=0.2), number


def test_strains_of_simulated_images() -> None:
    """The same heart, followed in noisy images instead of labels."""
    patient = replace(patient_of("HHD"), breathing_mm=0.0)
    phases = tuple(frame / FRAMES for frame in range(FRAMES))
    centre = next(centre for centre in CENTRES if centre.name == "alder")
    sequence = replace(protocol("cine", "standard", centre.field_strength_t), phases=phases)
    equipment = centre.equipment("quick")
    scanner = replace(
        equipment,
        array=replace(equipment.array, coils=4, front=2),
        grid=replace(equipment.grid, oversampling=1.0),
    )
    scan = Scan(patient, scanner, sequence, tuple(heights(patient)), seed=(1, 2))
    labels = scan.truth().labels
    assert labels is not None
    grid = scan.scanner.grid
    heart = ShortAxis(labels, Spacing(*grid.spacing, patient.heart.at(0).base / SLICES))
    slices = heart.base_to_apex
    used = [slices[round(share * (len(slices) - 1))] for share in (0.25, 0.5, 0.75)]
    only = replace(scan, heights_mm=tuple(heights(patient)[used]))
    images = np.zeros(labels.shape)
    for frame, place, kspace in only.images():
        images[frame, used[place]] = rss(ifft2c(torch.from_numpy(kspace))).numpy()
    around, across = strain_truth(patient, heart)
    found = strains(heart, images)
    assert found["Ecc Global"] == pytest.approx(around.mean(axis=0).min(), abs=1.5)
    assert found["Err Global"] == pytest.approx(across.mean(axis=0).max(), rel=0.12)
