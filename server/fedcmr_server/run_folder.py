"""The folder that holds everything a job leaves behind.

::

    job.json                       the job as published
    roster.yaml                    the sites of a job that aggregates securely
    metrics.jsonl                  one event a line, on disk when it has happened
    checkpoints/round-000.safetensors            bundle with the model after round 0, 1, …
    checkpoints/round-000.optimiser.safetensors  server optimiser state after that round

A round is committed when its bundle exists: the optimiser state is written before it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedcmr_shared.errors import ConfigurationError, FederationError
from fedcmr_shared.identity.roster import Roster, read_roster, roster_text
from fedcmr_shared.models.bundle import load_bundle, save_bundle
from fedcmr_shared.schemas.job import JobSpec


@dataclass(frozen=True)
class Checkpoint:
    """Model and server optimiser after ``round`` rounds."""

    round: int
    state: Mapping[str, Tensor]
    optimiser: Mapping[str, Tensor]


class RunFolder:
    """Reads and writes a run folder; see the module for its layout."""

    def __init__(self, root: Path) -> None:
        self.root = root

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
        with (self.root / "metrics.jsonl").open("ab+") as stream:
            _cut_partial_line(stream)
            stream.write(json.dumps({"event": event, **values}).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())

    def events(self) -> list[dict[str, Any]]:
        """All complete events so far; a last line cut off by a crash is left out."""
        path = self.root / "metrics.jsonl"
        if not path.exists():
            return []
        lines = path.read_text().split("\n")
        return [json.loads(line) for line in lines[:-1]]

    def commit(self, checkpoint: Checkpoint) -> Path:
        """Store ``checkpoint`` and return the path of its bundle."""
        path = self.bundle_path(checkpoint.round)
        optimiser_path = path.with_suffix(".optimiser.safetensors")
        partial = optimiser_path.with_suffix(".partial")
        save_file(dict(checkpoint.optimiser), partial)
        os.replace(partial, optimiser_path)
        save_bundle(path, dict(checkpoint.state), self.job.model, {"round": str(checkpoint.round)})
        return path

    def bundle_path(self, round_number: int) -> Path:
        """Where the bundle of a round lies."""
        return self.root / "checkpoints" / f"round-{round_number:03d}.safetensors"

    def latest(self) -> Checkpoint | None:
        """The last committed round, or None before the first."""
        bundles = sorted(
            path
            for path in (self.root / "checkpoints").glob("round-*.safetensors")
            if not path.name.endswith(".optimiser.safetensors")
        )
        if not bundles:
            return None
        bundle = load_bundle(bundles[-1])
        return Checkpoint(
            round=int(bundle.extra["round"]),
            state=bundle.model.state_dict(),
            optimiser=load_file(bundles[-1].with_suffix(".optimiser.safetensors")),
        )


def _cut_partial_line(stream: IO[bytes]) -> None:
    if stream.seek(0, os.SEEK_END) == 0:
        return
    stream.seek(-1, os.SEEK_END)
    if stream.read(1) != b"\n":
        stream.seek(0)
        stream.truncate(stream.read().rfind(b"\n") + 1)
