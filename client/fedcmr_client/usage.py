"""Device hours and energy that jobs have used at this site; figures that never leave it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedcmr_shared.errors import JobRefused, LedgerError
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.policy import SitePolicy

_FILE: Final = "usage.json"


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
        values = self._read()
        values[job.sha256] = values.get(job.sha256, 0.0) + seconds * self.policy.processes
        path = self.folder / _FILE
        partial = path.with_suffix(".partial")
        try:
            partial.write_text(json.dumps(values))
            os.replace(partial, path)
        except OSError as error:
            raise LedgerError(f"{path}: cannot be written: {error.strerror}") from error

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
