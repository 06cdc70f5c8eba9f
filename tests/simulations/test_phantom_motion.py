from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcmr_shared.errors import ConfigurationError
from fedcmr_simulations.phantom import anatomy
from fedcmr_simulations.phantom.motion import (
    END_SYSTOLE,
    MYOCARDIAL_DENSITY_G_PER_ML,
    BeatingHeart,
    Volumes,
    lens_area,
    truncated_ellipsoid_ml,
    volume_curve,
)
from fedcmr_simulations.phantom.patient import PROFILES, draw_patient

HEALTHY = Volumes(146, 59, 155, 67, 86)


def test_volume_curve_ejects_in_a_third_of_the_cycle_and_closes() -> None:
    phase = np.linspace(0, 1, 1001)
    curve = volume_curve(phase)
    assert curve[0] == pytest.approx(1)
    assert curve[-1] == pytest.approx(1)
    assert curve.min() == pytest.approx(0, abs=1e-4)
    assert phase[int(np.argmin(curve))] == pytest.approx(END_SYSTOLE, abs=0.002)
    assert curve.max() <= 1 + 1e-12
    assert np.abs(np.diff(curve)).max() < 0.01


@settings(max_examples=15)
@given(st.sampled_from(sorted(PROFILES)), st.integers(0, 2**20), st.floats(0, 1, exclude_max=True))
def test_shapes_hit_their_volumes_and_keep_the_muscle(
    disease: str, seed: int, phase: float
) -> None:
    heart = draw_patient("p", disease, np.random.default_rng(seed)).heart
    volumes, state = heart.volumes, heart.at(phase)
    left = float(volume_curve(phase))
    assert state.lv_volume() == pytest.approx(
        volumes.lv_esv + left * (volumes.lv_edv - volumes.lv_esv)
    )
    assert state.rv_volume() == pytest.approx(
        volumes.rv_esv + left * (volumes.rv_edv - volumes.rv_esv), rel=1e-4
    )
    assert state.wall_volume() * MYOCARDIAL_DENSITY_G_PER_ML == pytest.approx(volumes.lv_mass)


def test_systole_thickens_the_wall_and_shortens_the_heart() -> None:
    heart = BeatingHeart(HEALTHY)
    relaxed, contracted = heart.at(0), heart.at(END_SYSTOLE)
    assert contracted.wall > 1.2 * relaxed.wall
    assert contracted.base < relaxed.base - 4


def test_ellipsoid_volume_is_the_integral_of_its_sections() -> None:
    state = BeatingHeart(HEALTHY).at(0)
    z = (np.arange(20000) + 0.5) * state.base / 20000
    volume = (np.pi * state.endocardial_radius(z) ** 2).sum() * state.base / 20000 / 1000
    assert volume == pytest.approx(state.lv_volume(), rel=1e-4)
    assert truncated_ellipsoid_ml(10, 10, 10) == pytest.approx(4 / 3 * np.pi)


def test_lens_area_matches_counting_and_its_limits() -> None:
    x = np.arange(-60, 60, 0.1)
    inside = (x[None] ** 2 + x[:, None] ** 2 < 30**2) & (
        (x[None] - 25) ** 2 + x[:, None] ** 2 < 20**2
    )
    assert lens_area(30, 20, 25) == pytest.approx(inside.sum() * 0.01, rel=2e-3)
    assert lens_area(30, 20, 5) == pytest.approx(np.pi * 400)
    assert lens_area(30, 20, 50) == 0
    assert lens_area(30, 0, 5) == 0


@pytest.mark.parametrize("disease", ["NC", "HCM", "DCM", "PAH"])
def test_counted_voxels_agree_with_analytic_volumes(disease: str) -> None:
    # Strong bends and an off-centre cavity: the picture is warped, the volumes must not be.
    patient = draw_patient("p", disease, np.random.default_rng(5))
    axis = np.arange(-140, 140, 1.0, dtype=np.float32)
    counted: dict[str, float] = {}
    for name, phase in (("ED", 0.0), ("ES", END_SYSTOLE)):
        state = patient.heart.at(phase)
        step = state.base / 40
        planes = [
            anatomy.labels(axis, axis, patient, state, (i + 0.5) * step, 0.0) for i in range(40)
        ]
        for value, label in enumerate(anatomy.LABEL_NAMES):
            counted[f"{label} {name}"] = sum((p == value).sum() for p in planes) * step / 1000
    truth = patient.heart.volumes.phenotypes(60)
    assert counted["LV cavity ED"] == pytest.approx(truth["LVEDV"], rel=0.02)
    assert counted["LV cavity ES"] == pytest.approx(truth["LVESV"], rel=0.03)
    assert counted["RV ED"] == pytest.approx(truth["RVEDV"], rel=0.03)
    assert counted["RV ES"] == pytest.approx(truth["RVESV"], rel=0.03)
    assert counted["LV myocardium ED"] * 1.05 == pytest.approx(truth["LVM"], rel=0.03)
    fraction = 100 * (1 - counted["LV cavity ES"] / counted["LV cavity ED"])
    assert fraction == pytest.approx(truth["LVEF"], abs=1.5)


def test_phenotypes_obey_their_identities() -> None:
    values = HEALTHY.phenotypes(62)
    assert values["LVSV"] == values["LVEDV"] - values["LVESV"] == 87
    assert values["LVEF"] == pytest.approx(100 * 87 / 146)
    assert values["LVCO"] == pytest.approx(87 * 62 / 1000)


def test_disease_groups_differ_as_their_definitions_say() -> None:
    def mean(disease: str, name: str) -> float:
        drawn = (draw_patient("p", disease, np.random.default_rng(seed)) for seed in range(40))
        return float(np.mean([p.heart.volumes.phenotypes(60)[name] for p in drawn]))

    assert mean("NC", "LVEF") > 55
    assert mean("DCM", "LVEF") < 40
    assert mean("MI", "LVEF") < 45
    assert mean("HCM", "LVM") > 1.6 * mean("NC", "LVM")
    assert mean("PAH", "RVEDV") > 1.3 * mean("NC", "RVEDV")


@pytest.mark.parametrize(
    ("change", "field"),
    [({"lv_esv": 146.0}, "lv_esv"), ({"rv_esv": -1.0}, "rv_esv"), ({"lv_mass": 0.0}, "lv_mass")],
)
def test_impossible_volumes_are_refused(change: dict[str, float], field: str) -> None:
    with pytest.raises(ConfigurationError, match=field):
        replace(HEALTHY, **change)


def test_unknown_disease_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="'CBN'"):
        draw_patient("p", "CBN", np.random.default_rng(0))
