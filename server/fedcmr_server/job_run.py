"""What the round loop works with: a job, what was committed, and what happened.

:class:`fedcmr_server.run_folder.RunFolder` is that of a simulation. A deployed job has a
:class:`StoredRun`: events and rounds are rows of the coordinator's database, models are files. A
round's files are on disk before its row is committed, and only rows count: killed in between, the
coordinator does the same round again from the model before it. In secure sums the sites then send
their stored results again, or, once shares were asked for, the round is closed.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from fedcmr_server.checkpoint_files import Checkpoint, CheckpointFiles
from fedcmr_server.job_states import CARRIED, TransitionRefused
from fedcmr_server.store import Events, Jobs, Rounds, Store
from fedcmr_server.store.tables import JobRow
from fedcmr_shared.errors import FederationError, ModelError
from fedcmr_shared.identity.roster import Roster
from fedcmr_shared.models.bundle import state_sha256
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.signed_job import JobAuthorisation


class JobRun(Protocol):
    """A run of a job.

    All methods raise a FederationError when what they need cannot be read or written.
    """

    @property
    def job(self) -> JobSpec:
        """The job."""

    @property
    def roster(self) -> Roster:
        """The sites of a job that aggregates securely."""

    @property
    def members(self) -> Collection[str] | None:
        """The sites whose answers in the open count; None, in a simulation, for all that come."""

    @property
    def authorisation(self) -> JobAuthorisation | None:
        """The coordinator's signature under the job, which deployed sites ask for."""

    @property
    def journal(self) -> str:
        """Where people find the events."""

    def record(self, event: str, **values: Any) -> None:
        """Add an event, to last once this returns."""

    def events(self) -> list[dict[str, Any]]:
        """Return all events: their values, and their name as ``event``."""

    def begin(self, number: int) -> None:
        """Note that a round begins, perhaps anew."""

    def require_room(self) -> None:
        """Require that `commit` will find room: a sum that was opened is not opened again."""

    def commit(self, checkpoint: Checkpoint, **figures: Any) -> None:
        """Store what a round led to, to last once this returns.

        ``figures`` become its event ``round``; round 0, the start, has none.
        """

    def latest(self) -> Checkpoint | None:
        """Return the last committed round; None before round 0."""

    def stop_requested(self) -> bool:
        """Whether to end before the next round."""


@dataclass(frozen=True)
class StoredRun:
    """The Flower run ``run`` of job ``job_id``; its files lie below ``jobs``, one folder a job.

    Once another run carries the job, or nobody does, every method that writes raises a
    TransitionRefused.
    """

    store: Store
    jobs: Path
    job_id: str
    run: str

    @property
    def job(self) -> JobSpec:
        """See :class:`JobRun`."""
        return self._read[0]

    @property
    def roster(self) -> Roster:
        """See :class:`JobRun`."""
        roster = self._read[1]
        if roster is None:
            raise FederationError(f"job {self.job.name} has no roster: it aggregates in the open")
        return roster

    @property
    def members(self) -> Collection[str] | None:
        """See :class:`JobRun`."""
        roster = self._read[1]
        return None if roster is None else roster.sites.keys()

    @property
    def authorisation(self) -> JobAuthorisation | None:
        """See :class:`JobRun`; read anew, for it may have been renewed."""
        text = self._row.authorisation
        return None if text is None else JobAuthorisation.model_validate_json(text)

    @property
    def journal(self) -> str:
        """See :class:`JobRun`."""
        return f"the events of job {self.job_id[:12]} in the dashboard"

    def record(self, event: str, **values: Any) -> None:
        """See :class:`JobRun`."""
        Events(self.store).record(self.job_id, event, values, run=self.run)

    def events(self) -> list[dict[str, Any]]:
        """See :class:`JobRun`."""
        return Events(self.store).as_values(self.job_id)

    def begin(self, number: int) -> None:
        """See :class:`JobRun`."""
        Rounds(self.store).start(self.job_id, number, self.run)

    def require_room(self) -> None:
        """See :class:`JobRun`."""
        self._files.require_room()

    def commit(self, checkpoint: Checkpoint, **figures: Any) -> None:
        """See :class:`JobRun`."""
        self._files.save(checkpoint, self.job.model)
        hashes = state_sha256(checkpoint.state), state_sha256(checkpoint.optimiser)
        Rounds(self.store).commit(self.job_id, checkpoint.round, hashes, self.run, figures)

    def latest(self) -> Checkpoint | None:
        """See :class:`JobRun`.

        Raises:
            ModelError: the files are missing, or are not those that were committed.
        """
        row = Rounds(self.store).latest(self.job_id)
        if row is None:
            return None
        checkpoint = self._files.load(row.number)
        found = state_sha256(checkpoint.state), state_sha256(checkpoint.optimiser)
        for what, digest, committed in zip(
            ("model", "server optimiser"),
            found,
            (row.model_sha256, row.optimiser_sha256),
            strict=True,
        ):
            if digest != committed:
                raise ModelError(
                    f"{self._files.path(row.number)}: the {what} has SHA-256 {digest}, and "
                    f"{committed} was committed: restore the jobs folder from backup"
                )
        return checkpoint

    def stop_requested(self) -> bool:
        """See :class:`JobRun`.

        Raises:
            TransitionRefused: the run carries the job no more.
        """
        row = self._row
        if row.run != self.run or row.state not in CARRIED:
            raise TransitionRefused(
                f"run {self.run} does not carry job {row.name} any more: the job is {row.state}"
            )
        return row.state == "pausing"

    @property
    def folder(self) -> Path:
        """Where the job's files lie."""
        return self.jobs / self.job_id

    @property
    def _files(self) -> CheckpointFiles:
        return CheckpointFiles(self.folder)

    @property
    def _row(self) -> JobRow:
        return Jobs(self.store).get(self.job_id)

    @cached_property
    def _read(self) -> tuple[JobSpec, Roster | None]:
        """Job and roster, which never change; both must be what the job's id was given for."""
        row = self._row
        try:
            job = JobSpec.model_validate_json(row.spec)
            roster = None if row.roster is None else Roster.model_validate_json(row.roster)
        except ValidationError as error:
            raise FederationError(f"job {row.name} cannot be read from the database") from error
        if job.sha256 != row.id or (roster and roster.sha256 != row.roster_sha256):
            raise FederationError(
                f"job {row.name} or its roster was changed in the database: restore it from backup"
            )
        return job, roster
