"""The rules of a privacy budget: what ledger entries add up to, and when a job fits.

A budget is the fold of a log's entries, nothing else; the site and an auditor run the same code.
A job's life::

    (unknown) --admitted--> open --started, stored--> open --closed--> closed

A stored result may be masked for an attempt of the secure sum, also when the job is closed: the
last round closes it. Attempts only increase, and once an unmasking share left there is no further
one: a server that opened a sum S could else ask for S without one site, and subtract.

Admission reserves the starts of every phase, a start counts as spent from then on, and closing
releases what was never started. A patient's cost is the sum over all cohorts that the patient
belongs to, as a Rényi divergence at the order that the first entry fixed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final, Literal

from fedcmr_shared.errors import JobRefused, LedgerError
from fedcmr_shared.privacy.accounting import rdp
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.ledger import (
    Admitted,
    ClockSet,
    Closed,
    Entry,
    JobEntry,
    Masked,
    Opened,
    Outcome,
    Padding,
    Phase,
    Refused,
    Release,
    Started,
    Stored,
    Unmasked,
    Withdrawn,
)

JobStatus = Literal["unknown", "open", "closed"]
RoundOfPhase = tuple[Phase, int]


def phases_of(job: JobSpec) -> dict[Phase, tuple[Release, int]]:
    """Return what each phase of ``job`` releases in one start, and how many starts it reserves.

    Raises:
        JobRefused: the job declares no privacy.
    """
    privacy = job.privacy
    if privacy is None:
        message = f"job {job.name} declares no privacy: add a privacy section"
        raise JobRefused("privacy-missing", "privacy-missing", message)
    train = Release(
        sampling_rate=privacy.sampling_rate,
        noise_multiplier=privacy.noise_multiplier,
        steps=job.training.local_steps,
        distributed=privacy.noise_shares(job.minimum_sites),
    )
    phases: dict[Phase, tuple[Release, int]] = {"train": (train, job.rounds + privacy.spare_rounds)}
    evaluations = len(job.evaluated_rounds())
    if evaluations:
        noise = privacy.evaluation.noise_multiplier
        evaluate = Release(sampling_rate=1.0, noise_multiplier=noise, steps=1)
        phases["evaluate"] = (evaluate, evaluations + privacy.spare_rounds)
    return phases


@dataclass(frozen=True)
class JobState:
    """What the log says of one job.

    ``starts`` counts started rounds of each phase, repeated ones included; ``attempts`` those of
    one round. ``masked`` gives the newest attempt of each secure sum, ``unmasked`` what was opened.
    ``next_sequence`` is the place of the job's next entry among its own.
    """

    admitted: Admitted
    next_sequence: int = 1
    closed: Outcome | None = None
    starts: Mapping[Phase, int] = field(default_factory=dict)
    attempts: Mapping[RoundOfPhase, int] = field(default_factory=dict)
    stored: Mapping[RoundOfPhase, Stored] = field(default_factory=dict)
    masked: Mapping[RoundOfPhase, int] = field(default_factory=dict)
    unmasked: Mapping[RoundOfPhase, Unmasked] = field(default_factory=dict)

    def started(self, phase: Phase) -> int:
        """Starts of ``phase`` so far."""
        return self.starts.get(phase, 0)

    def left(self, phase: Phase) -> int:
        """Starts of ``phase`` that are still reserved."""
        reservation = self.admitted.phases.get(phase)
        if reservation is None or self.closed is not None:
            return 0
        return reservation.starts - self.started(phase)


@dataclass(frozen=True)
class Budget:
    """The sum of a log's first ``size`` entries; never changes, `apply` returns another one.

    ``clock`` is the time of the last entry in UTC milliseconds.
    """

    first: Opened | None = None
    size: int = 0
    clock: int = 0
    jobs: Mapping[str, JobState] = field(default_factory=lambda: MappingProxyType({}))
    withdrawn: frozenset[str] = frozenset()

    @property
    def opened(self) -> Opened:
        """The first entry; LedgerError when the log is empty."""
        if self.first is None:
            raise LedgerError("the log is empty: it has no opening entry")
        return self.first

    def apply(self, entry: Entry) -> Budget:
        """Return the budget after ``entry``.

        Raises:
            LedgerError: the entry cannot follow the ones before; names its number and why.
        """
        try:
            after = self._follow(entry)
        except _Impossible as error:
            raise LedgerError(f"entry {self.size} ({entry.kind}) is impossible: {error}") from None
        return Budget(after.first, self.size + 1, entry.at, after.jobs, after.withdrawn)

    def status(self, job: str) -> JobStatus:
        """Where a job stands in its life."""
        state = self.jobs.get(job)
        if state is None:
            return "unknown"
        return "open" if state.closed is None else "closed"

    def cohorts(self) -> frozenset[str]:
        """Return the keyed hashes of all cohorts that jobs were admitted with."""
        return frozenset(
            reservation.cohort
            for state in self.jobs.values()
            for reservation in state.admitted.phases.values()
        )

    def spent(self, cohort: str) -> dict[Release, int]:
        """Return how often each release was started on ``cohort``."""
        return patient_spent(self, [cohort])

    def reserved(self, cohort: str) -> dict[Release, int]:
        """Return how often open jobs may still start each release on ``cohort``."""
        return patient_reserved(self, [cohort])

    def committed_rdp(self, cohort: str) -> float:
        """Return the Rényi divergence of what is spent and reserved; see `patient_rdp`."""
        return patient_rdp(self, [cohort])

    def _follow(self, entry: Entry) -> Budget:
        if isinstance(entry, Opened) == (self.size > 0):
            raise _Impossible("a log begins with its opening entry and has no other one")
        if entry.at < self.clock and not isinstance(entry, ClockSet):
            raise _Impossible("its time is before that of the entry ahead of it")
        match entry:
            case Opened():
                return replace(self, first=entry)
            case Admitted() | Started() | Stored() | Masked() | Unmasked() | Closed():
                state = self._follow_in_job(entry)
                return replace(self, jobs=MappingProxyType({**self.jobs, entry.job: state}))
            case Withdrawn():
                if entry.patient in self.withdrawn:
                    raise _Impossible("the patient was withdrawn before")
                return replace(self, withdrawn=self.withdrawn | {entry.patient})
            case Refused() | ClockSet() | Padding():
                return self

    def _follow_in_job(self, entry: JobEntry) -> JobState:
        status, required = self.status(entry.job), _REQUIRED[entry.kind]
        if status not in required:
            raise _Impossible(f"job {entry.job[:12]}… is {status}, not {' or '.join(required)}")
        sequence = self.jobs[entry.job].next_sequence if entry.job in self.jobs else 0
        if entry.sequence != sequence:
            raise _Impossible(f"its sequence is {entry.sequence} instead of {sequence}")
        match entry:
            case Admitted():
                state = _admitted(entry)
            case Started():
                state = _started(self.jobs[entry.job], entry)
            case Stored():
                state = _stored(self.jobs[entry.job], entry)
            case Masked():
                state = _masked(self.jobs[entry.job], entry)
            case Unmasked():
                state = _unmasked(self.jobs[entry.job], entry)
            case Closed():
                state = _closed(self.jobs[entry.job], entry)
        return replace(state, next_sequence=sequence + 1)


def replay(entries: Iterable[Entry]) -> Budget:
    """Return the budget that ``entries`` add up to.

    Raises:
        LedgerError: an entry cannot follow the ones before; names its number and why.
    """
    return fold(Budget(), entries)


def fold(budget: Budget, entries: Iterable[Entry]) -> Budget:
    """Return the budget after ``entries``, the oldest first; see `Budget.apply`."""
    for entry in entries:
        budget = budget.apply(entry)
    return budget


def patient_spent(budget: Budget, cohorts: Iterable[str]) -> dict[Release, int]:
    """Return how often each release was started on a patient who belongs to ``cohorts``."""
    return _count(budget, cohorts, lambda state, phase: state.started(phase))


def patient_reserved(budget: Budget, cohorts: Iterable[str]) -> dict[Release, int]:
    """Return how often open jobs may still start each release on a patient of ``cohorts``."""
    return _count(budget, cohorts, lambda state, phase: state.left(phase))


def patient_committed(budget: Budget, cohorts: Iterable[str]) -> dict[Release, int]:
    """Return spent and reserved starts together."""
    return _count(budget, cohorts, lambda state, phase: state.started(phase) + state.left(phase))


def patient_rdp(budget: Budget, cohorts: Iterable[str]) -> float:
    """Return the Rényi divergence of what is spent and reserved for a patient of ``cohorts``.

    At the ledger's order. Releases without noise have no finite cost; they are left out here and
    every claim names them. A start moves a release from reserved to spent and leaves this sum
    exactly as it was; closing a job lowers it.
    """
    order = budget.opened.order
    return math.fsum(
        count * rdp(release, order) for release, count in noised(patient_committed(budget, cohorts))
    )


def noised(releases: Mapping[Release, int]) -> list[tuple[Release, int]]:
    """Return the releases that have noise, with their counts."""
    return [(r, count) for r, count in releases.items() if r.noise_multiplier is not None]


def memberships(
    cohorts: Mapping[str, Collection[str]], patients: Collection[str] | None = None
) -> set[frozenset[str]]:
    """Return the distinct sets of cohorts that patients belong to.

    ``cohorts`` gives each cohort's members. Patients in the same cohorts have the same cost, and
    there are far fewer such sets than patients. Of all patients unless some are given; patients
    of no cohort do not count.
    """
    wanted = None if patients is None else frozenset(patients)
    belongs: dict[str, int] = {}
    names = list(cohorts)
    for number, name in enumerate(names):
        for patient in cohorts[name]:
            if wanted is None or patient in wanted:
                belongs[patient] = belongs.get(patient, 0) | 1 << number
    return {
        frozenset(name for number, name in enumerate(names) if mask >> number & 1)
        for mask in set(belongs.values())
    }


def masking_problem(state: JobState, phase: Phase, round: int, attempt: int) -> str | None:
    """Say why the result of ``round`` may not be masked for ``attempt``; None when it may."""
    place = (phase, round)
    newest = state.masked.get(place, 0)
    if place not in state.stored:
        return f"round {round} ({phase}) has no stored result to mask"
    if place in state.unmasked:
        return f"an unmasking share of round {round} ({phase}) left: no further attempt"
    if attempt <= newest:
        return f"attempt {attempt} of round {round} ({phase}) does not follow attempt {newest}"
    return None


def unmasking_problem(state: JobState, phase: Phase, round: int, attempt: int) -> str | None:
    """Say why no unmasking share of ``round`` may leave in ``attempt``; None when one may."""
    place = (phase, round)
    newest = state.masked.get(place, 0)
    if place in state.unmasked:
        return f"an unmasking share of round {round} ({phase}) left before"
    if attempt != newest:
        masked = f"attempt {newest} was" if newest else "nothing was"
        return f"attempt {attempt} of round {round} ({phase}) cannot be opened: {masked} masked"
    return None


def _count(
    budget: Budget, cohorts: Iterable[str], starts: Callable[[JobState, Phase], int]
) -> dict[Release, int]:
    wanted = frozenset(cohorts)
    counts: Counter[Release] = Counter()
    for state in budget.jobs.values():
        for phase, reservation in state.admitted.phases.items():
            if reservation.cohort in wanted:
                counts[reservation.release] += starts(state, phase)
    return {release: count for release, count in counts.items() if count}


def _admitted(entry: Admitted) -> JobState:
    if "train" not in entry.phases:
        raise _Impossible("it reserves no training")
    return JobState(entry)


def _started(state: JobState, entry: Started) -> JobState:
    place = (entry.phase, entry.round)
    attempt = state.attempts.get(place, 0) + 1
    if entry.phase not in state.admitted.phases or entry.round > state.admitted.rounds:
        raise _Impossible(f"the job has no round {entry.round} to {entry.phase}")
    if place in state.stored:
        raise _Impossible(f"the result of round {entry.round} ({entry.phase}) is stored already")
    if entry.attempt != attempt:
        raise _Impossible(f"its attempt is {entry.attempt} instead of {attempt}")
    if state.left(entry.phase) == 0:
        raise _Impossible(f"all reserved starts to {entry.phase} are used up")
    starts = {**state.starts, entry.phase: state.started(entry.phase) + 1}
    return replace(state, starts=starts, attempts={**state.attempts, place: attempt})


def _stored(state: JobState, entry: Stored) -> JobState:
    place = (entry.phase, entry.round)
    if entry.attempt > state.attempts.get(place, 0):
        raise _Impossible(f"attempt {entry.attempt} of round {entry.round} was never started")
    if place in state.stored:
        raise _Impossible(f"the result of round {entry.round} ({entry.phase}) is stored already")
    return replace(state, stored={**state.stored, place: entry})


def _masked(state: JobState, entry: Masked) -> JobState:
    problem = masking_problem(state, entry.phase, entry.round, entry.attempt)
    if problem:
        raise _Impossible(problem)
    return replace(state, masked={**state.masked, (entry.phase, entry.round): entry.attempt})


def _unmasked(state: JobState, entry: Unmasked) -> JobState:
    problem = unmasking_problem(state, entry.phase, entry.round, entry.attempt)
    if problem:
        raise _Impossible(problem)
    shares = state.admitted.phases[entry.phase].release.distributed
    if shares is not None and len(entry.survivors) < shares.sites:
        raise _Impossible(
            f"it opens a sum over {len(entry.survivors)} sites, but the noise is shared by at "
            f"least {shares.sites}"
        )
    return replace(state, unmasked={**state.unmasked, (entry.phase, entry.round): entry})


def _closed(state: JobState, entry: Closed) -> JobState:
    return replace(state, closed=entry.outcome)


# What a job must be before each of its entries.
_REQUIRED: Final[Mapping[str, tuple[JobStatus, ...]]] = {
    "admitted": ("unknown",),
    "started": ("open",),
    "stored": ("open",),
    "masked": ("open", "closed"),
    "unmasked": ("open", "closed"),
    "closed": ("open",),
}


class _Impossible(Exception):
    """Why an entry cannot follow; becomes a LedgerError that names the entry."""
