"""Reads from the store what the pages show."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import Final

from sqlalchemy import select

from fedcmr_server.dashboard.job_view import LIVE, JobRows
from fedcmr_server.dashboard.views import OverviewRows
from fedcmr_server.store import Checkpoints, Events, Jobs, Members, Releases, Rosters, Rounds, Store
from fedcmr_server.store.tables import CertificateRow, EventRow, JobRow, MemberRow
from fedcmr_shared.identity.roster_history import RosterVersion

MOST_JOBS: Final = 12
"""Jobs that the overview shows in full, besides all that are under way."""

_MOST_KEPT: Final = 64


class Reader:
    """What the pages need; each call reads what is new."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._events = EventCache(store)

    def overview(self) -> OverviewRows:
        """Rows of the first page, the newest job first."""
        every = Jobs(self._store).all()[::-1]
        newest = {job.id for job in every[:MOST_JOBS]}
        shown = [job for job in every if job.id in newest or job.state in LIVE]
        shown.sort(key=lambda job: (job.state not in LIVE, job.state == "submitted"))
        kept = {job.id for job in shown}
        return OverviewRows(
            jobs=shown,
            older=[job for job in every if job.id not in kept],
            rounds={job.id: Rounds(self._store).of(job.id) for job in shown},
            events={job.id: self._events.of(job.id) for job in shown},
            members=Members(self._store).all(),
            certificates=self._certificates(),
            contradicting=Checkpoints(self._store).contradicting(),
        )

    def job(self, job: str) -> JobRows | None:
        """Rows of one job; None for an unknown one."""
        with self._store.reading() as session:
            row = session.get(JobRow, job)
        if row is None:
            return None
        releases = [release for release in Releases(self._store).all() if release.job == job]
        rounds = Rounds(self._store).of(job)
        return JobRows(row, rounds, self._events.of(job), releases)

    def sites(self) -> tuple[Sequence[MemberRow], Sequence[CertificateRow], list[RosterVersion]]:
        """Members, certificates and the roster's versions."""
        history = Rosters(self._store).history()
        return Members(self._store).all(), self._certificates(), history

    def check(self) -> None:
        """Return if the database answers.

        Raises:
            FederationError: it does not.
        """
        with self._store.reading() as session:
            session.execute(select(1))

    def _certificates(self) -> list[CertificateRow]:
        with self._store.reading() as session:
            return list(session.scalars(select(CertificateRow)))


class EventCache:
    """Events of jobs that were looked at lately. Events are only ever added, so only new are read."""

    def __init__(self, store: Store, most: int = _MOST_KEPT) -> None:
        self._source, self._most = Events(store), most
        self._kept: OrderedDict[str, tuple[EventRow, ...]] = OrderedDict()
        self._lock = Lock()

    def of(self, job: str) -> tuple[EventRow, ...]:
        """All events of a job, in their order."""
        with self._lock:
            kept = self._kept.get(job, ())
        new = self._source.of(job, after=kept[-1].number if kept else 0)
        found = (*kept, *new)
        with self._lock:
            self._kept[job] = found
            self._kept.move_to_end(job)
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return found
