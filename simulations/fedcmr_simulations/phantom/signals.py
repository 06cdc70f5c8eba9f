"""Closed-form signal models of the simulated sequences. Times in ms, angles in degrees."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Real = npt.NDArray[np.float64] | float
Complex = npt.NDArray[np.complex128]


def bssfp(
    t1_ms: float,
    t2_ms: float,
    *,
    flip_angle_deg: float,
    repetition_time_ms: float,
    echo_time_ms: float,
    off_resonance_hz: npt.ArrayLike = 0.0,
) -> Complex:
    """Steady state of balanced SSFP with alternating pulse phase, for unit proton density.

    Freeman and Hill, J Magn Reson 1971;4:366. On resonance this is
    sin α (1 − E1) / (1 − (E1 − E2) cos α − E1 E2) · exp(−TE/T2); signal is lost (banding) where the
    spins precess by half a turn per TR, at ±1/(2 TR). Shape: that of ``off_resonance_hz``.
    """
    offset = np.asarray(off_resonance_hz, dtype=np.float64)
    e1, e2 = np.exp(-repetition_time_ms / t1_ms), np.exp(-repetition_time_ms / t2_ms)
    cos_flip, sin_flip = np.cos(np.deg2rad(flip_angle_deg)), np.sin(np.deg2rad(flip_angle_deg))
    # Alternating the pulse phase adds half a turn to the precession per TR.
    turn = np.pi + 2e-3 * np.pi * offset * repetition_time_ms
    weight = e2 * (e1 - 1) * (1 + cos_flip)
    constant = 1 - e1 * cos_flip - (e1 - cos_flip) * e2**2
    after_pulse = sin_flip * (1 - e1) * (1 - e2 * np.exp(-1j * turn))
    after_pulse = after_pulse / (weight * np.cos(turn) + constant)
    echo = np.exp(-echo_time_ms / t2_ms + 2e-3j * np.pi * offset * echo_time_ms)
    return np.asarray(after_pulse * echo, dtype=np.complex128)


def bssfp_optimal_flip_deg(t1_ms: float, t2_ms: float) -> float:
    """Flip angle of the largest on-resonance bSSFP signal, for TR far below T1 and T2.

    cos α = (T1/T2 − 1) / (T1/T2 + 1); Sekihara, IEEE Trans Med Imaging 1987;6:157.
    """
    ratio = t1_ms / t2_ms
    return float(np.rad2deg(np.arccos((ratio - 1) / (ratio + 1))))


def inversion_recovery(t1_ms: Real, inversion_time_ms: Real) -> Real:
    """Signed recovery 1 − 2 exp(−TI/T1) after full inversion; zero at TI = T1 ln 2.

    Magnitude images show its absolute value. The saturation by the read-out is left out, so the
    apparent T1* of Look-Locker sequences is not modelled.
    """
    return 1 - 2 * np.exp(-np.asarray(inversion_time_ms) / t1_ms)


def null_time_ms(t1_ms: float) -> float:
    """Inversion time at which a tissue gives no signal."""
    return float(t1_ms * np.log(2))


def saturation_recovery(t1_ms: Real, saturation_time_ms: Real) -> Real:
    """Recovery 1 − exp(−TS/T1) after full saturation."""
    return 1 - np.exp(-np.asarray(saturation_time_ms) / t1_ms)


def t2_preparation(t2_ms: Real, preparation_time_ms: Real) -> Real:
    """Decay exp(−TE/T2) during a T2 preparation."""
    return np.exp(-np.asarray(preparation_time_ms) / t2_ms)


def spin_lock(t1rho_ms: Real, lock_time_ms: Real) -> Real:
    """Decay exp(−TSL/T1ρ) during a spin lock."""
    return np.exp(-np.asarray(lock_time_ms) / t1rho_ms)


def spoiled_gradient_echo(
    t1_ms: float, *, flip_angle_deg: float, repetition_time_ms: float
) -> float:
    """Steady state sin α (1 − E1) / (1 − E1 cos α) behind the pulse, for unit proton density.

    Ernst and Anderson, Rev Sci Instrum 1966;37:93. Largest where cos α = E1.
    """
    e1, flip = np.exp(-repetition_time_ms / t1_ms), np.deg2rad(flip_angle_deg)
    return float(np.sin(flip) * (1 - e1) / (1 - e1 * np.cos(flip)))


def repeated_inversion(t1_ms: float, inversion_time_ms: float, repetition_time_ms: float) -> float:
    """Signed recovery 1 − 2 exp(−TI/T1) + exp(−TR/T1) when a 90° pulse ends each repetition."""
    return float(1 - 2 * np.exp(-inversion_time_ms / t1_ms) + np.exp(-repetition_time_ms / t1_ms))


def repeated_null_time_ms(t1_ms: float, repetition_time_ms: float) -> float:
    """Inversion time at which `repeated_inversion` is zero.

    For blood it is that of the black-blood preparation (Simonetti et al., Radiology 1996;199:49).
    """
    return float(t1_ms * np.log(2 / (1 + np.exp(-repetition_time_ms / t1_ms))))


def gamma_variate(
    time_s: npt.ArrayLike, *, arrival_s: float, peak_s: float, shape: float = 3.0
) -> npt.NDArray[np.float64]:
    """Bolus curve with its maximum 1 at ``peak_s`` and nothing before ``arrival_s``.

    c(τ) = (τ e^(1−τ))^shape with τ = (t − arrival)/(peak − arrival); Thompson et al., Circ Res
    1964;14:502, in the form of Madsen, Phys Med Biol 1992;37:1597.
    """
    tau = (np.asarray(time_s, dtype=np.float64) - arrival_s) / (peak_s - arrival_s)
    tau = np.maximum(tau, 0)
    return np.asarray((tau * np.exp(1 - tau)) ** shape)
