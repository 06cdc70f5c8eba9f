"""Jobs, what happened in them, and their rounds.

Whatever changes a job first locks its row and applies the rules of
:mod:`fedcmr_server.job_states` to what it finds there: of two processes that want the same, one is
refused. What a run writes is refused once another run carries the job.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from fedcmr_server.job_states import (
    ATTEMPT_EVENTS,
    CARRIED,
    JobEvent,
    JobState,
    RoundEvent,
    Standing,
    TransitionRefused,
    after,
    after_round,
    attempts_at,
    check_attempt,
    restart_pause_s,
    round_after,
)
from fedcmr_server.store.database import Store
from fedcmr_server.store.tables import EventRow, JobRow, RoundRow
from fedcmr_shared.errors import FederationError
from fedcmr_shared.identity.roster import Roster
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.signed_job import JobAuthorisation


@dataclass(frozen=True)
class JobStart:
    """Round 0 of a job, whose files are on disk; ``notes`` are what its bundle says of itself."""

    model_sha256: str
    optimiser_sha256: str
    notes: Mapping[str, str]


class Jobs:
    """The jobs of a federation and where they stand. Each change of state is an event too."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def submit(
        self,
        job: JobSpec,
        authorisation: JobAuthorisation | None,
        roster: Roster | None,
        device: str | None = None,
        start: JobStart | None = None,
    ) -> JobRow:
        """Add a job; one that aggregates securely needs the ``roster`` that its sites hold.

        Without ``start`` it begins with the weights that its seed gives.

        Raises:
            FederationError: it needs a roster, or was submitted before.
        """
        if roster is None and job.aggregation != "plain_with_local_dp":
            raise FederationError(f"job {job.name} aggregates securely: it needs a roster")
        now = datetime.now(UTC)
        row = JobRow(
            id=job.sha256,
            name=job.name,
            spec=job.model_dump_json(),
            authorisation=None if authorisation is None else authorisation.model_dump_json(),
            roster=None if roster is None else roster.model_dump_json(),
            roster_sha256=None if roster is None else roster.sha256,
            submitted_at=now,
            changed_at=now,
            device=device,
        )
        try:
            with self._store.writing() as session:
                session.add(row)
                session.flush()
                if start is not None:
                    session.add(_round_0(row, start))
                notes = {} if start is None else {"start": dict(start.notes)}
                _add_event(session, row.id, "submit", notes)
        except IntegrityError as error:
            raise FederationError(
                f"job {job.name} was submitted before: change its name or seed to run it again"
            ) from error
        return row

    def get(self, job: str) -> JobRow:
        """Return the job with this id; FederationError when there is none."""
        with self._store.reading() as session:
            return _known(session.get(JobRow, job), job)

    def find(self, text: str) -> JobRow:
        """Return the job whose id begins with ``text``, or else the only one of this name.

        Raises:
            FederationError: there is none, or more than one.
        """
        by_id = select(JobRow).where(JobRow.id.startswith(text, autoescape=True))
        by_name = select(JobRow).where(JobRow.name == text)
        with self._store.reading() as session:
            found = session.scalars(by_id).all() if text else []
            found = found or session.scalars(by_name).all()
        if len(found) > 1:
            ids = ", ".join(sorted(row.id[:12] for row in found))
            raise FederationError(f"{text!r} means several jobs: say which one: {ids}")
        return _known(found[0] if found else None, text)

    def all(self, states: Collection[JobState] | None = None) -> list[JobRow]:
        """All jobs, or those in ``states``, in the order of their submission."""
        query = select(JobRow).order_by(JobRow.submitted_at, JobRow.id)
        if states is not None:
            query = query.where(JobRow.state.in_(states))
        with self._store.reading() as session:
            return list(session.scalars(query))

    def due(self, now: datetime | None = None) -> list[JobRow]:
        """Jobs for which a run should be started now.

        After a lost run this waits, longer after each one.
        """
        now = now or datetime.now(UTC)
        return [
            row
            for row in self.all(("submitted", "running"))
            if standing_of(row).waits_for_run
            and row.changed_at + timedelta(seconds=restart_pause_s(row.losses)) <= now
        ]

    def authorise(self, job: str, authorisation: JobAuthorisation) -> JobRow:
        """Put a new signature in the place of one whose time is over.

        Raises:
            FederationError: the job is unknown.
        """
        with self._store.writing() as session:
            row = _locked(session, job)
            row.authorisation = authorisation.model_dump_json()
            until = {"not_after": authorisation.not_after.isoformat()}
            _add_event(session, job, "authorise", until)
        return row

    def change(
        self, job: str, event: JobEvent, *, run: str | None = None, reason: str | None = None
    ) -> JobRow:
        """Let ``event`` happen to a job and return it as it is then; ``run`` is who reports it.

        Raises:
            TransitionRefused: it does not fit the job's state, or another run carries the job.
            FederationError: the job is unknown.
        """
        with self._store.writing() as session:
            row = _locked(session, job)
            before = standing_of(row)
            standing = after(before, event, run, reason)
            if standing != before:
                _stand(row, standing)
                values = {"run": run, "reason": reason, "state": standing.state}
                _add_event(session, job, event, values)
        return row


class Events:
    """What happened in jobs."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def record(
        self, job: str, name: str, values: Mapping[str, Any], *, run: str | None = None
    ) -> int:
        """Add an event and return its number; with ``run``, only while that one carries the job.

        Raises:
            TransitionRefused: another run carries the job, or an attempt's event does not follow.
            FederationError: the job is unknown.
        """
        with self._store.writing() as session:
            row = _locked(session, job)
            if run is not None:
                _require_carrier(row, run)
            if name in ATTEMPT_EVENTS:
                before = attempts_at(
                    _as_events(session, job, ATTEMPT_EVENTS), values["phase"], values["round"]
                )
                check_attempt(before, name, values["attempt"])
            return _add_event(session, job, name, values)

    def of(self, job: str, after: int = 0, limit: int | None = None) -> list[EventRow]:
        """Events of a job with numbers above ``after``, in their order."""
        query = select(EventRow).where(EventRow.job == job, EventRow.number > after)
        with self._store.reading() as session:
            return list(session.scalars(query.order_by(EventRow.number).limit(limit)))

    def as_values(self, job: str) -> list[dict[str, Any]]:
        """Events of a job as a run folder has them: name and values in one."""
        with self._store.reading() as session:
            return _as_events(session, job)

    def named(self, name: str) -> list[EventRow]:
        """Events of this name in all jobs, the first first."""
        query = select(EventRow).where(EventRow.name == name)
        with self._store.reading() as session:
            return list(session.scalars(query.order_by(EventRow.at, EventRow.job, EventRow.number)))


class Rounds:
    """The rounds of jobs."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def of(self, job: str) -> list[RoundRow]:
        """All rounds of a job, round 0 first."""
        query = select(RoundRow).where(RoundRow.job == job).order_by(RoundRow.number)
        with self._store.reading() as session:
            return list(session.scalars(query))

    def that_made(self, model_sha256: str) -> list[RoundRow]:
        """The rounds of any job whose update led to this model."""
        query = select(RoundRow).where(
            RoundRow.model_sha256 == model_sha256,
            RoundRow.state == "committed",
            RoundRow.number > 0,
        )
        with self._store.reading() as session:
            return list(session.scalars(query))

    def latest(self, job: str) -> RoundRow | None:
        """The last round that is over; None before round 0."""
        done = [row for row in self.of(job) if row.state != "started"]
        return done[-1] if done else None

    def start(self, job: str, number: int, run: str) -> None:
        """Note that round ``number`` begins, perhaps anew after a crash.

        Raises:
            TransitionRefused: another run carries the job, or it is not this round's turn.
        """
        with self._store.writing() as session:
            _require_carrier(_locked(session, job), run)
            row = session.get(RoundRow, (job, number))
            before = session.get(RoundRow, (job, number - 1))
            if number > 0 and (before is None or before.state == "started"):
                raise TransitionRefused(f"round {number} may not start: the one before is not over")
            state = round_after(None if row is None else row.state, "start")
            if row is None:
                now = datetime.now(UTC)
                session.add(RoundRow(job=job, number=number, state=state, started_at=now))

    def commit(
        self,
        job: str,
        number: int,
        hashes: tuple[str, str],
        run: str,
        figures: Mapping[str, Any],
    ) -> None:
        """End a round whose files are on disk, with its event, at once.

        ``hashes`` are those of model and server optimiser. The round is closed, not committed,
        when ``figures`` say so.

        Raises:
            TransitionRefused: another run carries the job, or the round was not started.
        """
        with self._store.writing() as session:
            job_row = _locked(session, job)
            _require_carrier(job_row, run)
            row = session.get(RoundRow, (job, number))
            event: RoundEvent = "close" if figures.get("closed") else "commit"
            state = round_after(None if row is None else row.state, event)
            assert row is not None  # what is not started takes neither event
            row.state, row.committed_at = state, datetime.now(UTC)
            row.model_sha256, row.optimiser_sha256 = hashes
            _stand(job_row, after_round(standing_of(job_row)), changed=False)
            if figures:
                _add_event(session, job, "round", {"round": number, **figures})


def _round_0(job: JobRow, start: JobStart) -> RoundRow:
    return RoundRow(
        job=job.id,
        number=0,
        state="committed",
        started_at=job.submitted_at,
        model_sha256=start.model_sha256,
        optimiser_sha256=start.optimiser_sha256,
        committed_at=job.submitted_at,
    )


def standing_of(row: JobRow) -> Standing:
    """Return where a job stands."""
    return Standing(row.state, row.run, row.losses, row.reason)


def _stand(row: JobRow, standing: Standing, *, changed: bool = True) -> None:
    row.state, row.run = standing.state, standing.run
    row.losses, row.reason = standing.losses, standing.reason
    if changed:
        row.changed_at = datetime.now(UTC)


def _locked(session: Session, job: str) -> JobRow:
    """Return a job that nobody else changes before the transaction is over."""
    return _known(session.get(JobRow, job, with_for_update=True), job)


def _known(row: JobRow | None, job: str) -> JobRow:
    if row is None:
        raise FederationError(f"no job {job} is known: see `fedcmr coordinator status`")
    return row


def _require_carrier(row: JobRow, run: str) -> None:
    if row.state not in CARRIED or row.run != run:
        raise TransitionRefused(
            f"run {run} does not carry job {row.name} any more: the job is {row.state}"
            + (f", carried by run {row.run}" if row.run else "")
        )


def _add_event(session: Session, job: str, name: str, values: Mapping[str, Any]) -> int:
    """Add an event; the job's row is locked, so that numbers are given one after the other."""
    last = session.scalar(select(func.max(EventRow.number)).where(EventRow.job == job))
    number = (last or 0) + 1
    now = datetime.now(UTC)
    session.add(EventRow(job=job, number=number, at=now, name=name, content=dict(values)))
    return number


def _as_events(
    session: Session, job: str, names: Collection[str] | None = None
) -> list[dict[str, Any]]:
    query = select(EventRow).where(EventRow.job == job).order_by(EventRow.number)
    if names is not None:
        query = query.where(EventRow.name.in_(names))
    return [{"event": row.name, **row.content} for row in session.scalars(query)]
