"""Gives each running job its Flower run, and takes away those that carry no job any more."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from typing import Final, Protocol

from fedcmr_server.job_states import CANCELLED, CARRIED, TransitionRefused
from fedcmr_server.store import Jobs, Store
from fedcmr_server.store.tables import JobRow
from fedcmr_server.superlink import FlowerRun, SuperLinkUnreachable
from fedcmr_shared.errors import FederationError
from fedcmr_shared.federation.flower_app import app_bundle

GRACE_S: Final = 60.0
"""A run may carry no job for so long: it is starting, or it ends by itself. One whose job was
cancelled is stopped at once."""

LOOK_S: Final = 10.0
"""How often all runs are looked through."""

_log = logging.getLogger("fedcmr.supervisor")


class Runs(Protocol):
    """What the carrier needs of :class:`fedcmr_server.superlink.Control`."""

    def start_run(self, bundle: bytes, config: dict[str, str]) -> str:
        """Start a run and return its number."""

    def stop_run(self, run: str) -> None:
        """Stop a run."""

    def run(self, run: str) -> FlowerRun | None:
        """Return a run, if it is known."""

    def runs(self) -> list[FlowerRun]:
        """Return the newest runs."""


class JobCarrier:
    """Compares jobs with Flower runs and mends what differs, step by step.

    It keeps nothing that a restart would lose, but the time since when a run carries no job.
    """

    def __init__(self, store: Store, at_once: int, stop_patience_s: float) -> None:
        self._jobs = Jobs(store)
        self._at_once = at_once
        self._stop_patience = timedelta(seconds=stop_patience_s)
        self._idle_since: dict[str, float] = {}
        self._looked_at = -LOOK_S

    def step(self, control: Runs) -> None:
        """Look once at all jobs.

        Raises:
            FederationError: SuperLink or the database does not answer.
        """
        carried = [row for row in self._jobs.all(CARRIED) if row.run is not None]
        left = [row for row in carried if self._still_runs(control, row)]
        due = self._jobs.due()
        if due or time.monotonic() - self._looked_at >= LOOK_S:
            self._looked_at = time.monotonic()
            alive = [run for run in control.runs() if not run.over]
            self._stop_idle(control, alive)
            self._start(control, due, self._at_once - len(left), {run.job for run in alive})

    def give_up_runs(self, control: Runs, reason: str) -> None:
        """Count all runs as lost: the SuperLink that ran their server apps is gone.

        Flower would notice a minute later, when their heartbeats are missing.

        Raises:
            FederationError: SuperLink or the database does not answer.
        """
        for row in self._jobs.all(CARRIED):
            if row.run is not None:
                self._report_lost(row, reason)
        for run in control.runs():
            if not run.over:
                control.stop_run(run.id)

    def _still_runs(self, control: Runs, row: JobRow) -> bool:
        assert row.run is not None
        run = control.run(row.run)
        if run is None or run.over:
            ending = "unknown to SuperLink" if run is None else run.ending
            self._report_lost(row, f"Flower run {row.run} is {ending}")
            return False
        if row.state == "pausing" and row.changed_at + self._stop_patience < datetime.now(UTC):
            _log.warning("job %s: its round took too long to pause; it is stopped", row.name)
            control.stop_run(row.run)
        return True

    def _report_lost(self, row: JobRow, reason: str) -> None:
        try:
            self._jobs.change(row.id, "run_lost", run=row.run, reason=reason)
        except TransitionRefused:  # it ended well between two looks
            return
        _log.warning("job %s: %s", row.name, reason)

    def _stop_idle(self, control: Runs, alive: Collection[FlowerRun]) -> None:
        carriers = {row.run for row in self._jobs.all(CARRIED)}
        cancelled = {row.id for row in self._jobs.all(CANCELLED)}
        now = time.monotonic()
        idle = [run for run in alive if run.id not in carriers]
        self._idle_since = {run.id: self._idle_since.get(run.id, now) for run in idle}
        for run in idle:
            if run.job in cancelled or now - self._idle_since[run.id] > GRACE_S:
                _log.warning("run %s carries no job: it is stopped", run.id)
                control.stop_run(run.id)

    def _start(
        self, control: Runs, due: list[JobRow], room: int, alive: Collection[str | None]
    ) -> None:
        # A job whose run is alive is taken over by that one, or that one is stopped first.
        for row in [row for row in due if row.id not in alive][: max(room, 0)]:
            try:
                run = control.start_run(app_bundle(), {"job": row.id})
            except SuperLinkUnreachable:
                raise
            except FederationError as error:
                _log.error("job %s cannot be started: %s", row.name, error)
                self._jobs.change(row.id, "fail", reason=str(error))
                continue
            try:
                self._jobs.change(row.id, "start", run=run)
            except TransitionRefused:  # cancelled or paused meanwhile
                control.stop_run(run)
            else:
                _log.info("job %s: run %s", row.name, run)
