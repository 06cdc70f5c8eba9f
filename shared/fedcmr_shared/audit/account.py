"""What the entries of a ledger cost, computed again by the auditor.

Cohorts are keyed hashes: an auditor sees when two jobs used the same cohort, but not whether two
cohorts share patients. So there are two figures: that of each cohort, exact for patients of no
other cohort, and a bound over all cohorts together, which holds for everybody.

An open job is charged all that it reserved, a closed one all that it started. Hence entries that
a bundle leaves out at the end of a job never make a figure smaller.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from fedcmr_shared.privacy.accounting import Figures, figures, rdp_limit
from fedcmr_shared.privacy.budget import Budget, JobState, noised, patient_committed
from fedcmr_shared.schemas.ledger import (
    Admitted,
    Opened,
    Phase,
    Release,
    Reservation,
    Unmasked,
)
from fedcmr_shared.schemas.privacy import NoiseShares

_MOST_PRV: Final = 20  # a cross-check takes up to seconds


@dataclass(frozen=True)
class PhaseAccount:
    """Started, reserved and charged rounds of one phase of a job."""

    phase: Phase
    cohort: str
    release: Release
    reserved: int
    started: int
    charged: int

    @property
    def noised(self) -> bool:
        """Whether the releases have a finite cost."""
        return self.release.noise_multiplier is not None


@dataclass(frozen=True)
class JobAccount:
    """One job's figures at the job's own delta, for a patient of all its cohorts.

    ``opened`` are the secure sums that the site helped to open, in the order of the log.
    """

    job: str
    admitted: Admitted
    outcome: str
    phases: tuple[PhaseAccount, ...]
    figures: Figures
    opened: tuple[Unmasked, ...]

    @property
    def without_noise(self) -> tuple[PhaseAccount, ...]:
        """Phases that may release, or released, something without noise."""
        return tuple(phase for phase in self.phases if not phase.noised and phase.charged)

    @property
    def shared_noise(self) -> NoiseShares | None:
        """How sites share the noise of this job; None when each adds the whole."""
        shares = (phase.release.distributed for phase in self.phases if phase.charged)
        return next((share for share in shares if share is not None), None)


@dataclass(frozen=True)
class CohortAccount:
    """One cohort's figures over all jobs, at the ledger's delta."""

    cohort: str
    jobs: int
    figures: Figures


@dataclass(frozen=True)
class Account:
    """All figures of a bundle. ``limit_rdp`` is the budget as a Rényi divergence at the order."""

    opened: Opened
    limit_rdp: float
    jobs: tuple[JobAccount, ...]
    cohorts: tuple[CohortAccount, ...]
    everything: Figures

    @cached_property
    def worst(self) -> Figures:
        """Figures that hold for the patients of any one cohort."""
        if not self.cohorts:
            return self.everything
        most = max((cohort.figures for cohort in self.cohorts), key=lambda item: item.rdp)
        # Another cohort may cost more by PLD although it costs less by the filter.
        plds = [cohort.figures.pld_epsilon for cohort in self.cohorts]
        known = [pld for pld in plds if pld is not None]
        pld = min(max(known), most.filter_epsilon) if len(known) == len(plds) else None
        return replace(most, pld_epsilon=pld)

    @property
    def within_budget(self) -> bool:
        """Whether the budget holds even for whoever was in all cohorts."""
        return self.everything.rdp <= self.limit_rdp

    @property
    def remaining(self) -> float:
        """Share of the budget, 0 to 1, that the most charged cohort has left."""
        return self.left(self.worst)

    def left(self, figures: Figures) -> float:
        """Share of the budget, 0 to 1, that ``figures`` leave."""
        return max(0.0, 1 - figures.rdp / self.limit_rdp)


def account(budget: Budget) -> Account:
    """Compute the figures of the jobs, cohorts and whole of ``budget``; PRV for the newest 20 jobs.

    Raises:
        ConfigurationError: the ledger's budget, delta or order cannot be used.
        ArithmeticError: a number is too large or too small to compute with.
    """
    opened = budget.opened
    limit = rdp_limit(opened.epsilon, opened.delta, opened.order)

    def committed(cohorts: Collection[str]) -> Figures:
        releases = dict(noised(patient_committed(budget, cohorts)))
        return figures(releases, opened.order, opened.delta)

    # The order in which jobs brought their cohorts, not that of a set.
    used = Counter(cohort for state in budget.jobs.values() for cohort in _cohorts(state.admitted))
    return Account(
        opened=opened,
        limit_rdp=limit,
        jobs=tuple(
            _job(job, state, opened.order, prv=len(budget.jobs) - number <= _MOST_PRV)
            for number, (job, state) in enumerate(budget.jobs.items())
        ),
        cohorts=tuple(
            CohortAccount(cohort, jobs, committed([cohort])) for cohort, jobs in used.items()
        ),
        everything=committed(used),
    )


def _cohorts(admitted: Admitted) -> list[str]:
    return list(dict.fromkeys(reservation.cohort for _, reservation in _phases(admitted)))


def _phases(admitted: Admitted) -> list[tuple[Phase, Reservation]]:
    return sorted(admitted.phases.items(), reverse=True)  # training first


def _job(job: str, state: JobState, order: int, *, prv: bool) -> JobAccount:
    phases = tuple(
        PhaseAccount(
            phase=phase,
            cohort=reservation.cohort,
            release=reservation.release,
            reserved=reservation.starts,
            started=state.started(phase),
            charged=state.started(phase) + state.left(phase),
        )
        for phase, reservation in _phases(state.admitted)
    )
    charge: Counter[Release] = Counter()
    for phase in phases:
        # A release without noise has no finite cost: it is named in words instead.
        charge.update({phase.release: phase.charged} if phase.noised else {})
    return JobAccount(
        job=job,
        admitted=state.admitted,
        outcome=state.closed or "open",
        phases=phases,
        figures=figures(charge, order, state.admitted.delta, prv=prv),
        opened=tuple(state.unmasked.values()),
    )
