"""The private step that trainers take: draw patients, sum clipped gradients, release once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from fedcmr_shared.privacy.distributed import NoiseShare, noisy_integers
from fedcmr_shared.privacy.mechanism import ClippedSum, Engine, Mechanism, noisy_mean, split
from fedcmr_shared.privacy.ranks import ALONE, Ranks
from fedcmr_shared.privacy.sampling import draw_patients

Example = TypeVar("Example")
Patient = TypeVar("Patient")


@dataclass(frozen=True)
class PatientCounts:
    """What happened to the drawn patients, over all ranks: for the site's eyes only."""

    drawn: int
    clipped: int
    non_finite: int


@dataclass(frozen=True)
class PrivateStep:
    """What is released: one tensor per parameter, complex ones as real pairs."""

    gradients: list[Tensor]
    counts: PatientCounts


def private_gradient(
    engine: Engine[Example],
    cohort: Sequence[Patient],
    load: Callable[[Patient], Sequence[Example]],
    mechanism: Mechanism,
    sampling_rate: float,
    ranks: Ranks = ALONE,
) -> PrivateStep:
    """Return the noisy mean gradient, float64, of patients drawn from ``cohort``.

    Every call is a release. Each patient is drawn independently with the public ``sampling_rate``
    and loaded just before it is needed. With several ranks all must hold the same cohort in the
    same order and the same weights; all get the same gradient, with the noise of rank 0.
    """
    return _step(
        engine, cohort, load, mechanism, sampling_rate, ranks, lambda t: noisy_mean(t, mechanism)
    )


def private_integers(
    engine: Engine[Example],
    cohort: Sequence[Patient],
    load: Callable[[Patient], Sequence[Example]],
    mechanism: Mechanism,
    sampling_rate: float,
    share: NoiseShare,
    ranks: Ranks = ALONE,
) -> PrivateStep:
    """Return the integer sum of contributions, int64, with the site's share of the noise.

    For the secure sum alone: by itself a share is too little noise. ``mechanism`` has levels;
    otherwise as :func:`private_gradient`.
    """
    step = _step(
        engine, cohort, load, mechanism, sampling_rate, ranks, lambda t: noisy_integers(t, share)
    )
    return replace(step, gradients=[tensor.to(torch.int64) for tensor in step.gradients])


def _step(
    engine: Engine[Example],
    cohort: Sequence[Patient],
    load: Callable[[Patient], Sequence[Example]],
    mechanism: Mechanism,
    sampling_rate: float,
    ranks: Ranks,
    release: Callable[[ClippedSum], Tensor],
) -> PrivateStep:
    device = engine.parameters[0].device
    # Dealt one at a time, like cards: the numbers of patients per rank differ by one at most.
    share = _drawn(len(cohort), sampling_rate, ranks, device)[ranks.index :: ranks.count]
    total = engine.clipped_sum((load(cohort[position]) for position in share), mechanism)
    counts = torch.tensor([total.patients, total.clipped, total.non_finite], device=device)
    ranks.add_up(total.vector)
    ranks.add_up(counts)
    # One lot of noise: the other ranks' vector is only a place for that of rank 0.
    noisy = release(total) if ranks.index == 0 else total.vector
    ranks.spread(noisy)
    return PrivateStep(split(noisy, total.shapes), PatientCounts(*counts.tolist()))


def _drawn(cohort: int, sampling_rate: float, ranks: Ranks, device: torch.device) -> list[int]:
    """Return the positions that rank 0 draws."""
    drawn = torch.zeros(cohort, dtype=torch.uint8, device=device)
    if ranks.index == 0:
        drawn[draw_patients(range(cohort), sampling_rate)] = 1
    ranks.spread(drawn)
    return drawn.nonzero().flatten().tolist()
