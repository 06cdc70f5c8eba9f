"""A site's privacy ledger: it admits jobs, and its log is written before each deed.

::

    <folder>/ledger.sqlite               the log, unless it is kept in PostgreSQL
    <folder>/site.key                    key that signs the log
    <folder>/results/<job>/<phase>-<round>.bin
    <second place>                       newest head of the log

Backup and recovery: `Ledger.backup` makes a copy that may replace the folder. A copy is only good
while the log has not grown since: an older one would forget charges, and `Ledger.open` refuses it
because the second place keeps a newer head. So back up after each job or use a replicated
PostgreSQL, and never put the second place back together with the folder. Is the newest copy lost,
then so is the proof of what was spent: make a new ledger for patients that no job has used.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Self

from fedcmr_client.ledger import backup, checkpoints, cohorts, database
from fedcmr_client.ledger.checkpoints import CheckpointSchedule
from fedcmr_client.ledger.log import Clock, SignedLog, Transaction, wall_clock
from fedcmr_client.ledger.place import LedgerPlace, make_folder, write_durably
from fedcmr_client.ledger.second_place import SecondPlace
from fedcmr_client.ledger.spending import Spending, spending
from fedcmr_client.store.pseudonyms import fingerprint
from fedcmr_shared.errors import ConfigurationError, JobRefused, LedgerError
from fedcmr_shared.identity.keys import SiteKey
from fedcmr_shared.privacy.accounting import best_order, rdp_limit
from fedcmr_shared.privacy.budget import (
    Budget,
    JobState,
    masking_problem,
    memberships,
    patient_rdp,
    phases_of,
    unmasking_problem,
)
from fedcmr_shared.schemas.job import FEWEST_SITES, JobSpec
from fedcmr_shared.schemas.ledger import (
    Admitted,
    Checkpoint,
    ClockSet,
    Closed,
    Leaf,
    Masked,
    Opened,
    Outcome,
    Phase,
    Refused,
    Reservation,
    Started,
    Stored,
    Unmasked,
    Withdrawn,
)


class Ledger:
    """The ledger of one site; made by `create` or `open`. A context manager, too.

    Several processes may have it open. Every method that reads sees what all of them wrote, and
    every method that writes returns when the entry is on disk and in the second place. They raise
    LedgerError when the log cannot be read, trusted or written; then nothing should be trained.
    Jobs are named by their SHA-256.
    """

    def __init__(self, place: LedgerPlace, log: SignedLog, secret: bytes) -> None:
        self.place = place
        self._log = log
        self._secret = secret

    @classmethod
    def create(
        cls,
        place: LedgerPlace,
        *,
        site: str,
        secret: bytes,
        epsilon: float,
        delta: float,
        order: int | None = None,
        schedule: CheckpointSchedule = CheckpointSchedule(),  # noqa: B008  # frozen
        clock: Clock = wall_clock,
    ) -> Self:
        """Make a ledger with a budget of ``epsilon`` at ``delta`` for each patient, for ever.

        ``order`` is that of the Rényi filter, `best_order` when not given. ``secret`` is the key
        of the site's pseudonyms. Cut off in between, it can be called again.

        Raises:
            ConfigurationError: the budget is no budget or does not fit the order.
            LedgerError: there is a ledger or a second place already, or they cannot be written.
        """
        if not (math.isfinite(epsilon) and epsilon > 0):
            raise ConfigurationError(f"epsilon is {epsilon:g}: it must be positive and finite")
        order = best_order(epsilon, delta) if order is None else order
        rdp_limit(epsilon, delta, order)
        engine = database.connect(place.url())
        key = _key(place)
        log = SignedLog(engine, key, SecondPlace(place.second_place), clock)
        first = Opened(
            at=clock(),
            site=site,
            site_key=key.public_key,
            secret_fingerprint=fingerprint(secret),
            epsilon=epsilon,
            delta=delta,
            order=order,
            checkpoint_interval_ms=round(schedule.every_s * 1000),
            checkpoint_leaves=schedule.leaves,
        )
        log.begin(first)
        return cls(place, log, secret)

    @classmethod
    def open(cls, place: LedgerPlace, *, secret: bytes, clock: Clock = wall_clock) -> Self:
        """Open a ledger after verifying all of it.

        Raises:
            LedgerError: leaves, heads, signatures, cohorts or the order of entries do not fit;
                the key or ``secret`` is another one; the second place is missing or keeps a head
                that this log does not have. Nothing was changed.
        """
        ledger = cls._open_log(place, secret, clock)
        ledger._log.verify_second_place()
        return ledger

    @classmethod
    def restore_second_place(cls, place: LedgerPlace, *, secret: bytes) -> None:
        """Write a lost second place anew, for a ledger that is surely the newest.

        Raises:
            LedgerError: the second place is there, or the ledger cannot be trusted.
        """
        SecondPlace(place.second_place).require_absent()
        with cls._open_log(place, secret, wall_clock) as ledger:
            ledger._log.keep_newest_head()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the database."""
        self._log.engine.dispose()

    @property
    def public_key(self) -> str:
        """The key that signs this log, hexadecimal."""
        return self._log.key.public_key

    @property
    def budget(self) -> Budget:
        """What all entries add up to now."""
        with self._log.transaction() as work:
            return work.budget

    @property
    def limit_rdp(self) -> float:
        """Largest Rényi divergence that a patient may reach at the filter's order."""
        return _limit_rdp(self.budget.opened)

    def admit(
        self,
        job: JobSpec,
        *,
        site: str | None = None,
        policy_sha256: str,
        training: Collection[str],
        evaluation: Collection[str],
    ) -> None:
        """Reserve the budget of all rounds and spare rounds of ``job``, or nothing of it.

        ``training`` and ``evaluation`` are the pseudonyms of the job's patients; withdrawn ones
        are left out. A job that is admitted already keeps its first cohorts. ``site``, when given,
        must be the ledger's.

        Raises:
            JobRefused: a patient would exceed the budget, or the job was closed before.
        """
        patients: dict[Phase, Collection[str]] = {"train": training, "evaluate": evaluation}
        with self._log.transaction() as work:
            self._require_site(site)
            status = work.budget.status(job.sha256)
            if status == "closed":
                raise JobRefused("declined", "closed", f"job {job.name} is over at this site")
            if status == "unknown":
                self._admit(work, job, policy_sha256, patients)

    def cohort(self, job: str, phase: Phase) -> frozenset[str]:
        """Return the pseudonyms that ``job`` was admitted with, less those withdrawn since.

        Raises:
            LedgerError: the job was not admitted or has no such phase.
        """
        with self._log.transaction() as work:
            reservation = _state(work.budget, job).admitted.phases.get(phase)
            if reservation is None:
                raise LedgerError(f"job {job[:12]}… does not {phase}")
            members = self._cohorts(work)[reservation.cohort]
            return members - self._withdrawn(work.budget, members)

    def start(self, job: str, phase: Phase, round: int) -> int:
        """Charge one start of ``round`` and return its attempt, from 1; call before its first use.

        Raises:
            JobRefused: no start is left, or the job is closed.
            LedgerError: the job was not admitted, has no such round, or its result is stored.
        """
        with self._log.transaction() as work:
            state = _open_state(work.budget, job)
            if phase in state.admitted.phases and state.left(phase) == 0:
                message = f"all starts to {phase} that the job reserved are used up"
                raise JobRefused("declined", "spare-rounds", message)
            attempt = state.attempts.get((phase, round), 0) + 1
            work.append(
                Started(
                    at=work.now,
                    job=job,
                    sequence=state.next_sequence,
                    phase=phase,
                    round=round,
                    attempt=attempt,
                )
            )
        return attempt

    def store(self, job: str, phase: Phase, round: int, attempt: int, content: bytes) -> Path:
        """Keep the result of a started round, which may be sent from then on.

        Raises:
            JobRefused: the job is closed.
            LedgerError: the attempt was never started, a result is stored already, or the disk
                fails.
        """
        path = self.place.result(job, phase, round)
        with self._log.transaction() as work:
            state = _open_state(work.budget, job)
            work.append(
                Stored(
                    at=work.now,
                    job=job,
                    sequence=state.next_sequence,
                    phase=phase,
                    round=round,
                    attempt=attempt,
                    sha256=hashlib.sha256(content).hexdigest(),
                )
            )
            # A file without its entry counts as lost: the next attempt writes over it.
            try:
                make_folder(path.parent)
                write_durably(path, content)
            except OSError as error:
                raise LedgerError(f"{path}: cannot be written: {error.strerror}") from error
        return path

    def stored(self, job: str, phase: Phase, round: int) -> Path | None:
        """Return the file with the result of ``round``; None when none was stored.

        Raises:
            LedgerError: the file is missing or was changed.
        """
        state = self.budget.jobs.get(job)
        entry = None if state is None else state.stored.get((phase, round))
        if entry is None:
            return None
        path = self.place.result(job, phase, round)
        try:
            found = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            message = "restore it from backup, or close the job"
            raise LedgerError(f"{path}: the stored result is unreadable: {message}") from error
        if found != entry.sha256:
            message = "restore it from backup, or close the job"
            raise LedgerError(f"{path}: differs from what was stored: {message}")
        return path

    def mask(self, job: str, phase: Phase, round: int, attempt: int, header: str) -> None:
        """Let the stored result of ``round`` into ``attempt`` of its secure sum; call before.

        ``header`` is the SHA-256 (hexadecimal) of what the sites of the attempt agree on. Costs
        nothing, and goes on when the job is closed.

        Raises:
            JobRefused: no result is stored, the attempt is not a later one than all before, or an
                unmasking share of the round left; nothing was written.
            LedgerError: the job was not admitted.
        """
        with self._log.transaction() as work:
            state = _state(work.budget, job)
            _require_in_order("attempt", masking_problem(state, phase, round, attempt))
            work.append(
                Masked(
                    at=work.now,
                    job=job,
                    sequence=state.next_sequence,
                    phase=phase,
                    round=round,
                    attempt=attempt,
                    header=header,
                )
            )

    def unmask(
        self,
        job: str,
        phase: Phase,
        round: int,
        attempt: int,
        survivors: Collection[str],
        answer: str,
    ) -> None:
        """Let unmasking shares for the sum of ``survivors`` leave, once a round; call before.

        ``answer`` is the SHA-256 (hexadecimal) of the message with the shares, which may be sent
        as often as asked for.

        Raises:
            JobRefused: the attempt is not the newest masked one, shares of the round left before,
                or there are fewer than three survivors; nothing was written.
            LedgerError: the job was not admitted.
        """
        sites = tuple(sorted(set(survivors)))
        with self._log.transaction() as work:
            state = _state(work.budget, job)
            if len(sites) < FEWEST_SITES:
                message = f"a sum of {len(sites)} sites is never opened"
                raise JobRefused("protocol", "survivors", message)
            _require_in_order("unmask", unmasking_problem(state, phase, round, attempt))
            work.append(
                Unmasked(
                    at=work.now,
                    job=job,
                    sequence=state.next_sequence,
                    phase=phase,
                    round=round,
                    attempt=attempt,
                    survivors=sites,
                    answer=answer,
                )
            )

    def finish(self, job: str, outcome: Outcome) -> None:
        """Close ``job`` and release what it never started; nothing if it is closed so already.

        Raises:
            LedgerError: the job was not admitted, or was closed with another outcome.
        """
        with self._log.transaction() as work:
            state = _state(work.budget, job)
            if state.closed == outcome:
                return
            entry = Closed(at=work.now, job=job, sequence=state.next_sequence, outcome=outcome)
            work.append(entry)

    def refuse(self, job: str, code: str, rule: str) -> None:
        """Write down that the site did not take part in ``job``, and the rule that it broke."""
        with self._log.transaction() as work:
            work.append(Refused(at=work.now, job=job, code=code, rule=rule))

    def withdraw(self, patient: str) -> None:
        """Keep ``patient`` (a pseudonym) out of all further training; the charges stay."""
        with self._log.transaction() as work:
            if not self._withdrawn(work.budget, [patient]):
                work.append(Withdrawn(at=work.now, patient=self._patient_hash(patient)))

    def withdrawn(self, pseudonyms: Iterable[str]) -> frozenset[str]:
        """Return those of ``pseudonyms`` that were withdrawn."""
        return self._withdrawn(self.budget, pseudonyms)

    def set_clock(self) -> None:
        """Accept the machine's time although it is before the last entry's.

        For the operator, after a clock that was ahead has been set right.
        """
        with self._log.transaction() as work:
            work.append(ClockSet(at=work.wall_clock))

    def spending(self) -> Spending:
        """Return the worst patient's figures and a row for each job."""
        with self._log.transaction() as work:
            return spending(work.budget, self._cohorts(work))

    def head(self) -> Checkpoint:
        """Return the newest signed head, which covers every entry; for the site's own eyes."""
        return self._log.head()

    def leaves(self) -> list[Leaf]:
        """Return all entries with their salts, in the log's order."""
        return self._log.leaves()

    def checkpoint(self, now_ms: int | None = None) -> Checkpoint:
        """Return the outward checkpoint that is due; time and size follow the clock alone.

        Raises:
            LedgerError: the clock is behind the last entry, or years ahead of it.
        """
        return checkpoints.issue(self._log, now_ms)

    def checkpoints(self) -> list[Checkpoint]:
        """Return the outward checkpoints so far, oldest first."""
        return self._log.checkpoints()

    def backup(self, target: Path) -> None:
        """Copy ledger, key and the results of open jobs into the new folder ``target``.

        The copy holds the site's private key: guard it. The second place is no part of it.

        Raises:
            LedgerError: ``target`` exists or cannot be written, or the log is in PostgreSQL, which
                brings its own backup (``pg_dump``).
        """
        backup.copy(self.place, self.budget, target)

    @classmethod
    def _open_log(cls, place: LedgerPlace, secret: bytes, clock: Clock) -> Self:
        url = place.url()
        database.require_file(url)
        key = SiteKey.load(place.key)
        log = SignedLog(database.connect(url), key, SecondPlace(place.second_place), clock)
        log.verify()
        with log.transaction() as work:
            if work.budget.opened.secret_fingerprint != fingerprint(secret):
                message = "under new pseudonyms all budgets would silently restart"
                raise LedgerError(
                    f"{place.folder}: the ledger was made with another site secret: {message}; "
                    "restore the right one"
                )
            cohorts.load(work.connection, secret, work.budget)
        return cls(place, log, secret)

    def _admit(
        self,
        work: Transaction,
        job: JobSpec,
        policy_sha256: str,
        patients: dict[Phase, Collection[str]],
    ) -> None:
        phases: dict[Phase, Reservation] = {}
        members: dict[str, frozenset[str]] = {}
        for phase, (release, starts) in phases_of(job).items():
            given = frozenset(patients[phase])
            chosen = given - self._withdrawn(work.budget, given)
            cohort = cohorts.cohort_hash(self._secret, chosen)
            phases[phase] = Reservation(cohort=cohort, release=release, starts=starts)
            members[cohort] = chosen
        everyone = {**self._cohorts(work), **members}
        work.append(_admission(work.now, job, policy_sha256, phases))
        _require_affordable(work.budget, everyone, members)
        for cohort, chosen in members.items():
            cohorts.save(work.connection, cohort, chosen)

    def _require_site(self, site: str | None) -> None:
        if site is not None and site != self._log.site:
            raise LedgerError(
                f"{self.place.folder} is the ledger of {self._log.site}, not of {site}"
            )

    def _cohorts(self, work: Transaction) -> dict[str, frozenset[str]]:
        return cohorts.load(work.connection, self._secret, work.budget)

    def _withdrawn(self, budget: Budget, patients: Iterable[str]) -> frozenset[str]:
        if not budget.withdrawn:
            return frozenset()
        return frozenset(p for p in patients if self._patient_hash(p) in budget.withdrawn)

    def _patient_hash(self, patient: str) -> str:
        return cohorts.patient_hash(self._secret, patient)


def _key(place: LedgerPlace) -> SiteKey:
    try:
        make_folder(place.folder)
    except OSError as error:
        raise LedgerError(f"{place.folder}: cannot be made: {error.strerror}") from error
    # There already if an earlier attempt was cut off; a log made with it is found later.
    return SiteKey.load(place.key) if place.key.exists() else SiteKey.create(place.key)


def _limit_rdp(opened: Opened) -> float:
    return rdp_limit(opened.epsilon, opened.delta, opened.order)


def _state(budget: Budget, job: str) -> JobState:
    state = budget.jobs.get(job)
    if state is None:
        raise LedgerError(f"job {job[:12]}… was never admitted by this ledger")
    return state


def _open_state(budget: Budget, job: str) -> JobState:
    state = _state(budget, job)
    if state.closed is not None:
        raise JobRefused("declined", "closed", f"job {state.admitted.name} is over at this site")
    return state


def _require_in_order(rule: str, problem: str | None) -> None:
    if problem is not None:
        raise JobRefused("protocol", rule, problem)


def _admission(
    at: int, job: JobSpec, policy_sha256: str, phases: dict[Phase, Reservation]
) -> Admitted:
    privacy = job.privacy
    assert privacy is not None  # or `phases_of` would have refused
    return Admitted(
        at=at,
        job=job.sha256,
        sequence=0,
        name=job.name,
        coordinator=job.coordinator,
        model=job.model.name,
        part=job.training.part,
        rounds=job.rounds,
        spare_rounds=privacy.spare_rounds,
        clip_norm=privacy.clip_norm,
        clipping=privacy.clipping,
        delta=privacy.delta,
        policy=policy_sha256,
        phases=phases,
    )


def _require_affordable(
    budget: Budget,
    everyone: dict[str, frozenset[str]],
    members: dict[str, frozenset[str]],
) -> None:
    """Refuse a job, counted in ``budget``, if one of its ``members`` would exceed the limit."""
    limit = _limit_rdp(budget.opened)
    groups = memberships(everyone, frozenset().union(*members.values()))
    if any(patient_rdp(budget, group) > limit for group in groups):
        message = "the job would take a patient over the site's budget: see `fedcmr site status`"
        raise JobRefused("declined", "budget", message)
