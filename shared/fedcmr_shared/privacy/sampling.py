"""Poisson sampling of patients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from fedcmr_shared.privacy.noise import uniforms

Patient = TypeVar("Patient")


def draw_patients(patients: Sequence[Patient], sampling_rate: float) -> list[Patient]:
    """Return each patient independently with probability ``sampling_rate``; often nobody.

    The choice comes from the operating system's entropy: amplification by sampling counts only
    while nobody can know who was drawn.
    """
    chances = uniforms(len(patients))
    return [
        patient
        for patient, chance in zip(patients, chances, strict=True)
        # Uniform on the multiples of 2^-53 in (0, 1]: rate 1 takes everybody.
        if chance <= sampling_rate
    ]
