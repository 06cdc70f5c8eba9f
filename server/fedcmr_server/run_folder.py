"""The folder that holds everything a job leaves behind.

::

    job.json                       the job as published
    roster.yaml                    the sites of a job that aggregates securely
    metrics.jsonl                  one event a line, on disk when it has happened
    checkpoints/                   see :mod:`fedcmr_server.checkpoint_files`

A round is committed when its bundle exists.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError
from torch import Tensor

from fedcmr_server.checkpoint_files import Checkpoint, CheckpointFiles
from fedcmr_shared.errors import ConfigurationError, FederationError
from fedcmr_shared.identity.roster import Roster, read_roster, roster_text
from fedcmr_shared.schemas.job import JobSpec

__all__ = ["Checkpoint", "RunFolder"]


class RunFolder:
    """Reads and writes a run folder; see the module for its layout.

    It is the :class:`fedcmr_server.job_run.JobRun` of a simulation: nobody stops that one, its
    sites do not ask for signatures, and all that are connected take part.
    """

    authorisation = None
    members = None

    def __init__(self, root: Path) -> None:
        self.root = root
        self._files = CheckpointFiles(root / "checkpoints")

    @classmethod
    def create(
        cls,
        root: Path,
        job: JobSpec,
        start: Mapping[str, Tensor] | None = None,
        roster: Roster | None = None,
    ) -> RunFolder:
        """Make the folder of a new run; the job starts from ``start``, or from its seed.

        A job that aggregates securely needs a ``roster`` before it runs.

        Raises:
            ConfigurationError: the folder exists and is not empty.
        """
        if root.exists() and any(root.iterdir()):
            raise ConfigurationError(f"run folder {root} is not empty: choose another with --out")
        (root / "checkpoints").mkdir(parents=True)
        (root / "job.json").write_text(job.model_dump_json(indent=2) + "\n")
        folder = cls(root)
        if roster is not None:
            folder.roster_path.write_text(roster_text(roster), encoding="utf-8")
        if start is not None:
            folder.commit(Checkpoint(round=0, state=start, optimiser={}))
        return folder

    @property
    def job(self) -> JobSpec:
        """The job of this run.

        Raises:
            FederationError: job.json is missing or malformed.
        """
        path = self.root / "job.json"
        try:
            return JobSpec.model_validate_json(path.read_text())
        except (OSError, ValidationError) as error:
            raise FederationError(f"{path} cannot be read as a job: {error}") from error

    @property
    def roster_path(self) -> Path:
        """Where the roster lies."""
        return self.root / "roster.yaml"

    @property
    def roster(self) -> Roster:
        """The sites of this run.

        Raises:
            FederationError: roster.yaml is missing.
            ConfigurationError: it cannot be read.
        """
        if not self.roster_path.exists():
            raise FederationError(
                f"{self.roster_path} is missing: a job that aggregates securely needs the roster "
                "that its sites hold"
            )
        return read_roster(self.roster_path)

    def record(self, event: str, **values: Any) -> None:
        """Append one event to metrics.jsonl, in place of a last line that a crash cut off.

        The event is on disk once this returns.
        """
        with Path(self.journal).open("ab+") as stream:
            _cut_partial_line(stream)
            stream.write(json.dumps({"event": event, **values}).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())

    def events(self) -> list[dict[str, Any]]:
        """All complete events so far; a last line cut off by a crash is left out."""
        path = Path(self.journal)
        if not path.exists():
            return []
        lines = path.read_text().split("\n")
        return [json.loads(line) for line in lines[:-1]]

    @property
    def journal(self) -> str:
        """Where the events can be read."""
        return str(self.root / "metrics.jsonl")

    def begin(self, number: int) -> None:
        """Nothing to note: a round is there when its bundle is."""

    def require_room(self) -> None:
        """Require that another checkpoint fits on the disk; ModelError if not."""
        self._files.require_room()

    def commit(self, checkpoint: Checkpoint, **figures: Any) -> None:
        """Store ``checkpoint``; with ``figures`` these become its event ``round``."""
        self._files.save(checkpoint, self.job.model)
        if figures:
            self.record("round", round=checkpoint.round, **figures)

    def bundle_path(self, round_number: int) -> Path:
        """Where the bundle of a round lies."""
        return self._files.path(round_number)

    def latest(self) -> Checkpoint | None:
        """The last committed round, or None before the first.

        Raises:
            ModelError: its files are damaged.
        """
        newest = self._files.newest()
        return None if newest is None else self._files.load(newest)

    def stop_requested(self) -> bool:
        """Nobody stops a simulation between rounds."""
        return False


def _cut_partial_line(stream: IO[bytes]) -> None:
    if stream.seek(0, os.SEEK_END) == 0:
        return
    stream.seek(-1, os.SEEK_END)
    if stream.read(1) != b"\n":
        stream.seek(0)
        stream.truncate(stream.read().rfind(b"\n") + 1)
