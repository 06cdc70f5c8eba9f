"""What each sequence measures: timing of the frames and the signal of every tissue."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from fedcmr_shared.errors import ConfigurationError
from fedcmr_simulations.phantom import signals
from fedcmr_simulations.phantom.canvas import Plane
from fedcmr_simulations.phantom.tissue import (
    PROPERTIES,
    T1RHO_PER_T2,
    TISSUES,
    Relaxation,
    Tissue,
    fat_shift_hz,
    relaxation,
)

Modality = Literal[
    "cine",
    "T1 mapping",
    "T2 mapping",
    "LGE",
    "perfusion",
    "T1rho mapping",
    "black blood",
    "T1 weighted",
    "T2 weighted",
]
Detail = Literal["small", "clip", "quick", "standard"]
MODALITIES: Final[tuple[Modality, ...]] = get_args(Modality)
DETAILS: Final[tuple[Detail, ...]] = get_args(Detail)

CLIP_FRAMES: Final = 12
"""Frames of a cine that shows one slice over the whole beat."""

_DIASTOLE: Final = 0.78  # static sequences are triggered into the rest before the atria contract
_SATURATION_MS: Final = 110.0
_BOLUS_MM: Final = 4.0
_BLOOD: Final = ("arterial blood", "venous blood")


@dataclass(frozen=True)
class Protocol:
    """One sequence: heart phase (cycles) and preparation time of each frame; times in ms.

    ``preparation_ms`` holds inversion, T2-preparation or spin-lock times; for perfusion it is the
    time since the injection. ``free_breathing`` sequences move from frame to frame. A spin echo
    refocuses off-resonance.
    """

    modality: Modality
    phases: tuple[float, ...]
    preparation_ms: tuple[float, ...] | None
    repetition_time_ms: float
    echo_time_ms: float
    flip_angle_deg: float
    free_breathing: bool = False
    spin_echo: bool = False

    @property
    def frames(self) -> int:
        """Number of images per slice."""
        return len(self.phases)

    def only(self, frame: int) -> Protocol:
        """Return the sequence with one of its frames alone."""
        times = None if self.preparation_ms is None else (self.preparation_ms[frame],)
        return replace(self, phases=(self.phases[frame],), preparation_ms=times)


def protocol(modality: Modality, detail: Detail, field_strength_t: float) -> Protocol:
    """Sequence parameters at a field.

    Raises:
        ConfigurationError: the phantom does not simulate ``modality``.
    """
    if modality not in MODALITIES:
        known = ", ".join(MODALITIES)
        raise ConfigurationError(f"modality {modality!r} is not simulated; use {known}")
    quick = detail != "standard"
    if modality == "cine":
        return _cine({"clip": CLIP_FRAMES, "standard": 25}.get(detail, 4), field_strength_t)
    if modality == "T1 mapping":
        times = (120.0, 400.0, 1100.0, 2800.0)
        more = (120.0, 200.0, 280.0, 1000.0, 1080.0, 1160.0, 1900.0, 2800.0)
        return _static(modality, times if quick else more, 2.8, 1.2, 35.0)
    if modality == "T2 mapping":
        return _static(modality, (0.0, 25.0, 55.0), 2.8, 1.2, 50.0)
    if modality == "LGE":
        myocardium = relaxation("myocardium", field_strength_t)
        late = myocardium.with_contrast(PROPERTIES["myocardium"].late_concentration_mm)
        # A little past the null, as operators choose it: muscle is nearly black, not negative.
        return _static(modality, (1.06 * signals.null_time_ms(late),), 5.2, 2.0, 25.0)
    if modality == "T1rho mapping":
        return _static(modality, (0.0, 25.0, 50.0), 2.8, 1.2, 40.0)
    if modality == "T1 weighted":
        return _static(modality, (0.0,), 5.0, 2.0, 18.0)
    if modality in ("black blood", "T2 weighted"):
        return _dark_blood(modality, field_strength_t)
    times = tuple(np.linspace(3, 24, 4 if quick else 30) * 1e3)
    return Protocol(modality, (_DIASTOLE,) * len(times), times, 2.4, 1.1, 12.0, True)


def _cine(frames: int, field_strength_t: float) -> Protocol:
    # Power deposition limits the flip angle at high field, and TR grows with it.
    flip = {0.55: 70.0, 1.5: 55.0, 3.0: 42.0, 5.0: 30.0}.get(field_strength_t, 50.0)
    repetition = {0.55: 4.2, 1.5: 2.9, 3.0: 3.1, 5.0: 3.2}.get(field_strength_t, 3.0)
    phases = (0.0, 0.17, 0.35, 0.6) if frames == 4 else tuple(np.arange(frames) / frames)
    return Protocol("cine", phases, None, repetition, repetition / 2, flip)


def _dark_blood(modality: Modality, field_strength_t: float) -> Protocol:
    """Turbo spin echo with nulled blood; T2 weighted adds an inversion that nulls fat.

    Edelman et al., Radiology 1991;181:655; Simonetti et al., Radiology 1996;199:49.
    """
    fat_too = modality == "T2 weighted"
    repetition, echo = (1800.0, 65.0) if fat_too else (900.0, 22.0)
    nulled = relaxation("fat" if fat_too else "arterial blood", field_strength_t).t1_ms
    time = signals.repeated_null_time_ms(nulled, repetition)
    sequence = _static(modality, (time,), repetition, echo, 90.0)
    return replace(sequence, spin_echo=True)


def _static(
    modality: Modality, times: tuple[float, ...], repetition: float, echo: float, flip: float
) -> Protocol:
    return Protocol(modality, (_DIASTOLE,) * len(times), times, repetition, echo, flip)


def bolus_mm(time_s: float) -> dict[Tissue, float]:
    """Contrast agent in each tissue ``time_s`` after injection, in mmol/L.

    It passes the right heart, then the lung and the left heart, then, later and smoother, the
    myocardium; an infarct takes up little.
    """
    right = _BOLUS_MM * float(signals.gamma_variate(time_s, arrival_s=3, peak_s=8))
    left = 0.8 * _BOLUS_MM * float(signals.gamma_variate(time_s, arrival_s=7, peak_s=13))
    muscle = 0.16 * _BOLUS_MM * float(signals.gamma_variate(time_s, arrival_s=9, peak_s=19))
    return {
        "venous blood": right + 0.3 * left,
        "arterial blood": left + 0.1 * right,
        "lung": 0.5 * right,
        "myocardium": muscle,
        "scar": 0.3 * muscle,
        "spleen": 1.5 * muscle,
        "liver": 0.5 * muscle,
    }


def frame_signals(
    sequence: Protocol, frame: int, field_strength_t: float
) -> npt.NDArray[np.complex128]:
    """Signal of each tissue in one frame of a prepared sequence, in the order of TISSUES.

    Off-resonance only turns the phase of these short-echo read-outs (see `off_resonance_phase`).
    """
    if sequence.preparation_ms is None:
        raise ConfigurationError(f"{sequence.modality} has no preparation: use steady_state")
    time = sequence.preparation_ms[frame]
    agent = bolus_mm(time / 1e3) if sequence.modality == "perfusion" else {}
    values = [
        _prepared(sequence, tissue, time, agent.get(tissue, 0.0), field_strength_t)
        for tissue in TISSUES
    ]
    density = [PROPERTIES[tissue].proton_density for tissue in TISSUES]
    return np.asarray(np.array(values) * np.array(density), np.complex128)


def _prepared(
    sequence: Protocol, tissue: Tissue, time_ms: float, agent_mm: float, field_strength_t: float
) -> complex:
    times = relaxation(tissue, field_strength_t)
    weight = _preparation(sequence, tissue, times, time_ms, agent_mm)
    readout = np.exp(-sequence.echo_time_ms / times.t2_ms)
    if sequence.modality == "T1 weighted":
        readout *= signals.spoiled_gradient_echo(
            times.t1_ms,
            flip_angle_deg=sequence.flip_angle_deg,
            repetition_time_ms=sequence.repetition_time_ms,
        )
    else:
        readout *= np.sin(np.deg2rad(sequence.flip_angle_deg))
    shift = fat_shift_hz(field_strength_t) if tissue in ("fat", "marrow") else 0.0
    dephasing_ms = 0.0 if sequence.spin_echo else sequence.echo_time_ms
    turn = np.exp(2e-3j * np.pi * shift * dephasing_ms)
    return complex(float(weight) * readout * turn)


def _preparation(
    sequence: Protocol, tissue: Tissue, times: Relaxation, time_ms: float, agent_mm: float
) -> signals.Real:
    """Longitudinal magnetisation of one tissue when the read-out begins, over its equilibrium."""
    modality, repetition = sequence.modality, sequence.repetition_time_ms
    if modality == "T1 mapping":
        return signals.inversion_recovery(times.t1_ms, time_ms)
    if modality == "LGE":
        late = times.with_contrast(PROPERTIES[tissue].late_concentration_mm)
        return signals.inversion_recovery(late, time_ms)
    if modality == "T2 mapping":
        return signals.t2_preparation(times.t2_ms, time_ms)
    if modality == "T1rho mapping":
        return signals.spin_lock(T1RHO_PER_T2 * times.t2_ms, time_ms)
    if modality == "T1 weighted":
        return 1.0
    if modality in ("black blood", "T2 weighted") and tissue in _BLOOD:
        return 0.0  # blood that flows in was inverted outside of the slice
    if modality == "T2 weighted":
        return signals.repeated_inversion(times.t1_ms, time_ms, repetition)
    if modality == "black blood":
        return signals.saturation_recovery(times.t1_ms, repetition)
    return signals.saturation_recovery(times.with_contrast(agent_mm), _SATURATION_MS)


def steady_state(
    sequence: Protocol, field_strength_t: float, off_resonance_hz: Plane
) -> npt.NDArray[np.complex64]:
    """Signal ``[tissue, y, x]`` of a bSSFP sequence with off-resonance in Hz at each pixel."""
    # The response repeats every 1/TR: a few periods on a fine table, then look-up.
    table_hz, responses = _steady_table(
        sequence.flip_angle_deg,
        sequence.repetition_time_ms,
        sequence.echo_time_ms,
        field_strength_t,
    )
    place = np.interp(off_resonance_hz, table_hz, np.arange(len(table_hz)))
    return responses[:, np.rint(place).astype(np.intp)]


@cache
def _steady_table(
    flip_angle_deg: float, repetition_time_ms: float, echo_time_ms: float, field_strength_t: float
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.complex64]]:
    """Offsets in Hz and the response [tissue, offset] to them."""
    period = 1e3 / repetition_time_ms
    table_hz = np.linspace(-2 * period, 2 * period, 2048)
    responses = np.empty((len(TISSUES), len(table_hz)), np.complex64)
    for index, tissue in enumerate(TISSUES):
        times = relaxation(tissue, field_strength_t)
        shift = fat_shift_hz(field_strength_t) if tissue in ("fat", "marrow") else 0.0
        response = signals.bssfp(
            times.t1_ms,
            times.t2_ms,
            flip_angle_deg=flip_angle_deg,
            repetition_time_ms=repetition_time_ms,
            echo_time_ms=echo_time_ms,
            off_resonance_hz=table_hz + shift,
        )
        responses[index] = PROPERTIES[tissue].proton_density * response
    return table_hz, responses


def off_resonance_phase(sequence: Protocol, off_resonance_hz: Plane) -> npt.NDArray[np.complex64]:
    """Phase factor ``[y, x]`` that off-resonance gives at the echo; 1 for a spin echo."""
    if sequence.spin_echo:
        return np.ones(off_resonance_hz.shape, np.complex64)
    turn = 2e-3 * np.pi * sequence.echo_time_ms * off_resonance_hz
    return np.asarray(np.exp(1j * turn), np.complex64)
