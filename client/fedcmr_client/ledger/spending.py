"""What a site has spent: the worst patient's figures and a row for each job."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from fedcmr_shared.privacy.accounting import (
    Figures,
    epsilon_from_rdp,
    figures,
    rdp,
    rdp_limit,
    total_rdp,
)
from fedcmr_shared.privacy.budget import (
    Budget,
    JobState,
    memberships,
    noised,
    patient_committed,
    patient_spent,
)
from fedcmr_shared.schemas.ledger import Opened, Outcome, Phase, Release


@dataclass(frozen=True)
class JobSpending:
    """One job: starts done and still reserved by phase, and what it alone costs a patient.

    ``epsilon`` is the filter's figure of what was started and may still be, for the worst
    patient of this job; phases in ``without_noise`` are not in it.
    """

    job: str
    name: str
    model: str
    outcome: Outcome | None
    started: Mapping[Phase, int]
    left: Mapping[Phase, int]
    epsilon: float
    without_noise: tuple[Phase, ...]


@dataclass(frozen=True)
class Spending:
    """The budget and what the worst patients have used of it.

    *spent* is that of the patient with most started, *committed* that of the patient with most
    spent and reserved, both as Rényi divergence at the filter's ``order`` and as the epsilon that
    the filter certifies; ``releases`` are the latter patient's starts. What went without noise is
    in none of them.
    """

    epsilon: float
    delta: float
    order: int
    limit_rdp: float
    spent_rdp: float
    committed_rdp: float
    spent_epsilon: float
    committed_epsilon: float
    releases: Mapping[Release, int]
    jobs: tuple[JobSpending, ...]

    @cached_property
    def figures(self) -> Figures:
        """All figures of ``releases``, the PLD one among them; takes seconds."""
        return figures(self.releases, self.order, self.delta)


def spending(budget: Budget, cohorts: Mapping[str, Collection[str]]) -> Spending:
    """Return what ``budget`` adds up to; ``cohorts`` gives each cohort's members."""
    opened = budget.opened
    groups = memberships(cohorts)
    spent_rdp, _ = _worst([patient_spent(budget, group) for group in groups], opened.order)
    everything = [patient_committed(budget, group) for group in groups]
    committed_rdp, releases = _worst(everything, opened.order)
    return Spending(
        epsilon=opened.epsilon,
        delta=opened.delta,
        order=opened.order,
        limit_rdp=rdp_limit(opened.epsilon, opened.delta, opened.order),
        spent_rdp=spent_rdp,
        committed_rdp=committed_rdp,
        spent_epsilon=epsilon_from_rdp(spent_rdp, opened.order, opened.delta),
        committed_epsilon=epsilon_from_rdp(committed_rdp, opened.order, opened.delta),
        releases=releases,
        jobs=tuple(_job(job, state, opened, cohorts) for job, state in budget.jobs.items()),
    )


def _worst(
    patients: Iterable[Mapping[Release, int]], order: int
) -> tuple[float, dict[Release, int]]:
    """Return the largest Rényi divergence and the releases, those with noise, behind it."""
    noisy = [dict(noised(releases)) for releases in patients]
    costs = ((total_rdp(releases, order), releases) for releases in noisy)
    return max(costs, key=lambda cost: cost[0], default=(0.0, {}))


def _job(
    job: str, state: JobState, opened: Opened, cohorts: Mapping[str, Collection[str]]
) -> JobSpending:
    phases = state.admitted.phases
    members = {r.cohort: cohorts.get(r.cohort, ()) for r in phases.values()}
    costs = (_cost(state, group, opened.order) for group in memberships(members))
    return JobSpending(
        job=job,
        name=state.admitted.name,
        model=state.admitted.model,
        outcome=state.closed,
        started={phase: state.started(phase) for phase in phases},
        left={phase: state.left(phase) for phase in phases},
        epsilon=epsilon_from_rdp(max(costs, default=0.0), opened.order, opened.delta),
        without_noise=tuple(p for p, r in phases.items() if r.release.noise_multiplier is None),
    )


def _cost(state: JobState, cohorts: Iterable[str], order: int) -> float:
    wanted = frozenset(cohorts)
    return math.fsum(
        (state.started(phase) + state.left(phase)) * rdp(reservation.release, order)
        for phase, reservation in state.admitted.phases.items()
        if reservation.cohort in wanted and reservation.release.noise_multiplier is not None
    )
