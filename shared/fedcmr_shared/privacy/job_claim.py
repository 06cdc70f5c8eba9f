"""What a job costs a patient at most, from its published numbers alone.

Nobody needs a site's ledger for this: sampling rate, noise and rounds stand in the job, and every
site reserves its spare rounds as well. A site's ledger shows what was spent, and over all jobs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.privacy.accounting import epsilon_from_rdp, rdp
from fedcmr_shared.privacy.budget import phases_of
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.ledger import Phase, Release
from fedcmr_shared.schemas.privacy import Clipping, NoiseShares

_FROZEN = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

ORDERS: Final[tuple[int, ...]] = (*range(2, 65), *range(72, 257, 8), 512, 1024)
"""Orders among which that of a job is chosen."""

_ROUNDING: Final = 1e-9  # relative: libraries of mathematics differ in the last digits


class PhaseClaim(BaseModel):
    """One phase of a job: ``starts`` releases, the spare ones included.

    ``epsilon`` is null where a release has no noise: no number bounds its cost.
    """

    model_config = _FROZEN

    release: Release
    starts: Annotated[int, Field(ge=1)]
    epsilon: Annotated[float, Field(ge=0)] | None

    @property
    def steps(self) -> int:
        """Noisy steps in all."""
        return self.starts * self.release.steps


class JobClaim(BaseModel):
    """Patient-level differential privacy of one job at every site, whatever its results are.

    A patient is trained on or evaluated, never both, so that ``epsilon`` is the larger of the
    phases' figures; it leaves out a phase without noise, which `without_noise` names. All figures
    are Rényi divergences at ``order``, converted at ``delta``; they hold although each round
    depends on the ones before. The order follows from the job, so it was fixed before round 1.
    """

    model_config = _FROZEN

    unit: Literal["patient"] = "patient"
    relation: Literal["zero-out"] = "zero-out"
    mechanism: Literal["poisson-subsampled-gaussian"] = "poisson-subsampled-gaussian"
    clip_norm: Annotated[float, Field(gt=0)]
    clipping: Clipping
    delta: Annotated[float, Field(gt=0, lt=1)]
    order: Annotated[int, Field(ge=2)]
    epsilon: Annotated[float, Field(ge=0)]
    phases: dict[Phase, PhaseClaim]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if "train" not in self.phases:
            raise ValueError("phases: a job trains")
        return self

    @property
    def without_noise(self) -> tuple[Phase, ...]:
        """Phases that no figure covers."""
        return tuple(name for name, phase in self.phases.items() if phase.epsilon is None)

    @property
    def shared_noise(self) -> NoiseShares | None:
        """How the sites share the noise of training; None when each adds the whole."""
        return self.phases["train"].release.distributed

    def agrees_with(self, other: JobClaim) -> bool:
        """Whether both say the same, but for the last digits of the figures."""
        mine, others = _figures(self), _figures(other)
        return (
            _without_figures(self) == _without_figures(other)
            and mine.keys() == others.keys()
            and all(math.isclose(mine[k], others[k], rel_tol=_ROUNDING) for k in mine)
        )


def claim_of(job: JobSpec) -> JobClaim:
    """Return what ``job`` costs a patient of any one site at most, at the job's delta.

    Raises:
        JobRefused: the job declares no privacy.
        ConfigurationError: no epsilon bounds the cost, or the delta is out of the accountant's
            range.
    """
    phases = phases_of(job)
    privacy = job.privacy
    assert privacy is not None  # `phases_of` refuses the others
    order = min(ORDERS, key=lambda order: _worst(phases, order, privacy.delta))
    worst = _worst(phases, order, privacy.delta)
    if not math.isfinite(worst):
        raise ConfigurationError(
            f"job {job.name}: no epsilon bounds what it costs a patient: raise the noise "
            "multipliers of privacy and privacy.evaluation"
        )
    claims = {
        name: PhaseClaim(
            release=release,
            starts=starts,
            epsilon=_epsilon(release, starts, order, privacy.delta),
        )
        for name, (release, starts) in phases.items()
    }
    return JobClaim(
        clip_norm=privacy.clip_norm,
        clipping=privacy.clipping,
        delta=privacy.delta,
        order=order,
        epsilon=worst,
        phases=claims,
    )


def _worst(phases: Mapping[Phase, tuple[Release, int]], order: int, delta: float) -> float:
    found = (_epsilon(release, starts, order, delta) for release, starts in phases.values())
    return max(epsilon for epsilon in found if epsilon is not None)


def _epsilon(release: Release, starts: int, order: int, delta: float) -> float | None:
    if release.noise_multiplier is None:
        return None
    try:
        return epsilon_from_rdp(starts * rdp(release, order), order, delta)
    except OverflowError:  # more steps than a float can count
        return math.inf


def _figures(claim: JobClaim) -> dict[str, float]:
    found = {name: phase.epsilon for name, phase in claim.phases.items()}
    return {"": claim.epsilon, **{k: value for k, value in found.items() if value is not None}}


def _without_figures(claim: JobClaim) -> dict[str, object]:
    return claim.model_dump(exclude={"epsilon": True, "phases": {"__all__": {"epsilon"}}})
