from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.schemas import vocabulary
from fedcmr_simulations.phantom import signals
from fedcmr_simulations.phantom.protocol import (
    MODALITIES,
    Modality,
    frame_signals,
    off_resonance_phase,
    protocol,
    steady_state,
)
from fedcmr_simulations.phantom.tissue import (
    PROPERTIES,
    RELAXATION,
    T1RHO_PER_T2,
    TISSUES,
    Tissue,
    relaxation,
)

T1 = st.floats(150, 4000)
FIELDS = (0.55, 1.5, 3.0, 5.0)
laws = settings(max_examples=30)


@laws
@given(T1)
def test_inversion_recovery_runs_from_inverted_to_recovered_through_its_null(t1: float) -> None:
    assert signals.inversion_recovery(t1, 0) == pytest.approx(-1)
    assert signals.inversion_recovery(t1, 50 * t1) == pytest.approx(1)
    assert signals.inversion_recovery(t1, t1 * np.log(2)) == pytest.approx(0, abs=1e-12)
    assert signals.null_time_ms(t1) == pytest.approx(t1 * np.log(2))


@laws
@given(T1)
def test_saturation_recovery_and_t2_preparation_have_their_limits(t: float) -> None:
    assert signals.saturation_recovery(t, 0) == pytest.approx(0)
    assert signals.saturation_recovery(t, t) == pytest.approx(1 - 1 / np.e)
    assert signals.t2_preparation(t, 0) == pytest.approx(1)
    assert signals.t2_preparation(t, t) == pytest.approx(1 / np.e)


@laws
@given(T1, st.floats(0.04, 0.9), st.floats(5, 90), st.floats(2, 6))
def test_bssfp_on_resonance_is_the_textbook_formula(
    t1: float, ratio: float, flip: float, repetition: float
) -> None:
    t2 = ratio * t1
    e1, e2 = np.exp(-repetition / t1), np.exp(-repetition / t2)
    cos, sin = np.cos(np.deg2rad(flip)), np.sin(np.deg2rad(flip))
    expected = sin * (1 - e1) / (1 - (e1 - e2) * cos - e1 * e2) * np.exp(-repetition / 2 / t2)
    found = signals.bssfp(
        t1, t2, flip_angle_deg=flip, repetition_time_ms=repetition, echo_time_ms=repetition / 2
    )
    assert found == pytest.approx(expected, rel=1e-9)


def test_bssfp_is_largest_at_the_optimal_flip_angle() -> None:
    flips = np.arange(1, 120)
    values = [
        abs(signals.bssfp(1000, 50, flip_angle_deg=f, repetition_time_ms=0.5, echo_time_ms=0.25))
        for f in flips
    ]
    optimum = signals.bssfp_optimal_flip_deg(1000, 50)
    assert flips[int(np.argmax(values))] == pytest.approx(optimum, abs=1)


def test_bssfp_bands_lie_half_a_turn_per_tr_from_resonance() -> None:
    offsets = np.linspace(-160, 160, 321)
    signal = signals.bssfp(
        1400,
        270,
        flip_angle_deg=50,
        repetition_time_ms=4.0,
        echo_time_ms=2.0,
        off_resonance_hz=offsets,
    )
    dark = offsets[np.abs(signal) < 0.2 * np.abs(signal).max()]
    assert set(np.abs(dark)) >= {125.0}
    assert np.all(np.abs(np.abs(dark) - 125) < 12)


def test_gamma_variate_starts_at_arrival_and_peaks_at_one() -> None:
    time = np.linspace(0, 40, 4001)
    curve = signals.gamma_variate(time, arrival_s=4, peak_s=9)
    assert np.all(curve[time <= 4] == 0)
    assert curve.max() == pytest.approx(1)
    assert time[int(np.argmax(curve))] == pytest.approx(9, abs=0.01)


@pytest.mark.parametrize("field", FIELDS)
def test_lge_blackens_healthy_muscle_and_brightens_scar(field: float) -> None:
    values = np.abs(frame_signals(protocol("LGE", "quick", field), 0, field))
    muscle, scar, blood = (
        values[TISSUES.index(t)] for t in ("myocardium", "scar", "arterial blood")
    )
    assert muscle < 0.2 * scar
    assert blood < scar


@pytest.mark.parametrize("field", FIELDS)
def test_cine_blood_is_brighter_than_muscle_and_fast_recovery_lengthens(field: float) -> None:
    signal = np.abs(steady_state(protocol("cine", "quick", field), field, np.zeros((1, 1), "f4")))
    blood, muscle = (signal[TISSUES.index(t), 0, 0] for t in ("arterial blood", "myocardium"))
    assert blood > 1.5 * muscle


def test_perfusion_fills_the_right_heart_before_the_left_before_the_muscle() -> None:
    sequence = protocol("perfusion", "standard", 1.5)
    curves = np.abs([frame_signals(sequence, f, 1.5) for f in range(sequence.frames)])
    right, left, muscle = (
        int(np.argmax(curves[:, TISSUES.index(t)]))
        for t in ("venous blood", "arterial blood", "myocardium")
    )
    assert right < left < muscle


def test_relaxation_times_are_physical_and_t1_grows_with_field() -> None:
    for tissue, by_field in RELAXATION.items():
        times = [by_field[field] for field in FIELDS]
        assert all(0 < entry.t2_ms < entry.t1_ms for entry in times)
        assert all(a.t1_ms <= b.t1_ms for a, b in pairwise(times)), tissue
    assert set(RELAXATION) == set(PROPERTIES)


def test_contrast_agent_shortens_t1_by_its_relaxivity() -> None:
    native = relaxation("myocardium", 1.5)
    rate = 1 / native.with_contrast(0.5) - 1 / native.t1_ms
    assert rate * 1e3 == pytest.approx(4.5 * 0.5)


def test_unknown_field_and_modality_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="7 T"):
        relaxation("fat", 7.0)
    with pytest.raises(ConfigurationError, match="tagging"):
        protocol("tagging", "quick", 1.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="no preparation"):
        frame_signals(protocol("cine", "quick", 1.5), 0, 1.5)
    assert set(MODALITIES) < set(vocabulary.MODALITIES)


@laws
@given(T1, st.floats(200, 3000))
def test_repeated_inversion_recovers_through_its_null(t1: float, repetition: float) -> None:
    saturated = signals.saturation_recovery(t1, repetition)
    assert signals.repeated_inversion(t1, 0, repetition) == pytest.approx(-saturated)
    null = signals.repeated_null_time_ms(t1, repetition)
    assert 0 < null < repetition
    assert signals.repeated_inversion(t1, null, repetition) == pytest.approx(0, abs=1e-9)
    assert signals.repeated_null_time_ms(t1, 60 * t1) == pytest.approx(signals.null_time_ms(t1))


@laws
@given(T1)
def test_spoiled_gradient_echo_is_largest_at_the_ernst_angle(t1: float) -> None:
    ernst = float(np.rad2deg(np.arccos(np.exp(-5 / t1))))
    values = [
        signals.spoiled_gradient_echo(t1, flip_angle_deg=angle, repetition_time_ms=5)
        for angle in (0.9 * ernst, ernst, 1.1 * ernst)
    ]
    assert values[1] == max(values)
    full = signals.spoiled_gradient_echo(t1, flip_angle_deg=90, repetition_time_ms=t1)
    assert full == pytest.approx(1 - 1 / np.e)


@pytest.mark.parametrize("field", [1.2, 2.0, 4.0])
def test_research_contrasts_show_what_they_are_named_after(field: float) -> None:
    def brightness(modality: Modality, frame: int = 0) -> dict[Tissue, float]:
        values = np.abs(frame_signals(protocol(modality, "quick", field), frame, field))
        return dict(zip(TISSUES, values, strict=True))

    dark, stir = brightness("black blood"), brightness("T2 weighted")
    assert dark["arterial blood"] == stir["venous blood"] == 0 < dark["myocardium"]
    assert stir["fat"] < 0.02 * stir["myocardium"]
    assert stir["scar"] > stir["myocardium"], "long T2 is bright"
    t1_weighted = brightness("T1 weighted")
    assert t1_weighted["fat"] > t1_weighted["myocardium"] > t1_weighted["fluid"]
    first, last = brightness("T1rho mapping"), brightness("T1rho mapping", 2)
    decay = {tissue: last[tissue] / first[tissue] for tissue in ("liver", "fluid")}
    assert decay["liver"] < decay["fluid"] < 1
    assert last["liver"] / first["liver"] == pytest.approx(
        np.exp(-50 / (T1RHO_PER_T2 * relaxation("liver", field).t2_ms))
    )


def test_a_spin_echo_refocuses_what_dephases_a_gradient_echo() -> None:
    offsets = np.full((2, 2), 40.0, np.float32)
    assert np.all(off_resonance_phase(protocol("black blood", "quick", 2.0), offsets) == 1)
    assert np.all(off_resonance_phase(protocol("T1 weighted", "quick", 2.0), offsets) != 1)


@pytest.mark.parametrize("tissue", TISSUES)
def test_relaxation_between_the_fields_follows_a_power_law(tissue: Tissue) -> None:
    low, middle, high = (relaxation(tissue, field) for field in (1.5, np.sqrt(4.5), 3.0))
    assert middle.t1_ms == pytest.approx(np.sqrt(low.t1_ms * high.t1_ms))
    assert middle.t2_ms == pytest.approx(np.sqrt(low.t2_ms * high.t2_ms))
    assert middle.source == "extra"


def test_one_frame_of_a_sequence_is_that_frame() -> None:
    sequence = protocol("T1 mapping", "quick", 1.5)
    for frame in range(sequence.frames):
        alone = sequence.only(frame)
        assert alone.frames == 1
        assert np.array_equal(frame_signals(alone, 0, 1.5), frame_signals(sequence, frame, 1.5))
    assert protocol("cine", "quick", 1.5).only(2).phases == (0.35,)
