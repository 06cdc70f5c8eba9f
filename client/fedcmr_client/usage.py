"""Device hours of jobs at this site, by which their limits are kept; figures that never leave it.

The limit on energy is kept by device hours and the policy's `device_watts`, so that it holds on
every machine. What a job really used, as far as it can be measured, is in `fedcmr_client.energy`.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedcmr_client.ledger.place import write_durably
from fedcmr_shared.errors import JobRefused, LedgerError
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.policy import SitePolicy

_FILE: Final = "usage.json"
_LOCK: Final = "usage.lock"


@dataclass(frozen=True)
class Usage:
    """Device seconds by job, in a file of the ledger's folder; energy is device power times time.

    Raises:
        LedgerError: the file cannot be read or written.
    """

    policy: SitePolicy
    folder: Path

    def seconds(self, job: JobSpec) -> float:
        """Device seconds that ``job`` has used."""
        return self._read().get(job.sha256, 0.0)

    def require_left(self, job: JobSpec) -> None:
        """Raise JobRefused when ``job`` has used up what it declared."""
        hours = self.seconds(job) / 3600
        if hours >= job.resources.device_hours:
            raise JobRefused("device-hours", "used", f"the job has used {hours:.2f} device hours")
        kwh = self.policy.energy_kwh(hours)
        if kwh >= job.resources.energy_kwh:
            raise JobRefused("energy", "used", f"the job has used {kwh:.2f} kWh")

    def add(self, job: JobSpec, seconds: float) -> None:
        """Count ``seconds`` of work for ``job`` on each of the site's devices."""
        path = self.folder / _FILE
        try:
            with self._alone():
                values = self._read()
                values[job.sha256] = values.get(job.sha256, 0.0) + seconds * self.policy.processes
                write_durably(path, json.dumps(values).encode())
        except OSError as error:
            raise LedgerError(f"{path}: cannot be written: {error.strerror}") from error

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let one worker in at a time: those of several jobs end when they like."""
        with (self.folder / _LOCK).open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _read(self) -> dict[str, float]:
        path = self.folder / _FILE
        if not path.exists():
            return {}
        try:
            values = json.loads(path.read_text())
            return {str(job): float(seconds) for job, seconds in values.items()}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise LedgerError(
                f"{path}: cannot be read: {error}; delete it to start anew"
            ) from error
