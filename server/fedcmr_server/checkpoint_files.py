"""The models and server optimisers that a job leaves behind, as files.

::

    round-000.safetensors            bundle with the model after round 0, 1, …
    round-000.optimiser.safetensors  server optimiser state after that round

The bundle is written last: with it, a round's files are complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedcmr_shared.errors import ModelError
from fedcmr_shared.models.bundle import load_bundle, save_bundle
from fedcmr_shared.schemas.job import ModelSpec


@dataclass(frozen=True)
class Checkpoint:
    """Model and server optimiser after ``round`` rounds."""

    round: int
    state: Mapping[str, Tensor]
    optimiser: Mapping[str, Tensor]


@dataclass(frozen=True)
class CheckpointFiles:
    """Reads and writes the files in ``folder``."""

    folder: Path

    def path(self, number: int) -> Path:
        """Where the bundle of a round lies."""
        return self.folder / f"round-{number:03d}.safetensors"

    def save(self, checkpoint: Checkpoint, model: ModelSpec) -> Path:
        """Store ``checkpoint``, to last once this returns, and return the path of its bundle.

        Raises:
            ModelError: a file cannot be written.
        """
        path = self.path(checkpoint.round)
        optimiser = _optimiser_path(path)
        partial = optimiser.with_suffix(".partial")
        try:
            if not self.folder.is_dir():
                self.folder.mkdir(mode=0o700, parents=True)
                _sync(self.folder.parent)
            save_file(dict(checkpoint.optimiser), partial)
            _sync(partial)
            os.replace(partial, optimiser)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{optimiser}: cannot write the server optimiser: {error}") from error
        save_bundle(path, checkpoint.state, model, {"round": str(checkpoint.round)})
        return path

    def require_room(self) -> None:
        """Require that another round fits on the disk: a bundle as large as the newest, and an
        optimiser with two values for each of its parameters.

        Raises:
            ModelError: it does not, or the folder cannot be read.
        """
        newest = self.newest()
        if newest is None:
            return
        try:
            needed = 3 * self.path(newest).stat().st_size
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise ModelError(f"{self.folder} cannot be read: {error.strerror}") from error
        if free < needed:
            raise ModelError(
                f"{self.folder}: the next model may need {needed >> 10} KiB and {free >> 10} KiB "
                "are free: make room, then resume the job"
            )

    def load(self, number: int) -> Checkpoint:
        """Read the files of a round.

        Raises:
            ModelError: one is missing, damaged or of another round.
        """
        path = self.path(number)
        bundle = load_bundle(path)
        if bundle.extra.get("round") != str(number):
            raise ModelError(f"{path} is not the bundle of round {number}: restore it from backup")
        try:
            optimiser = load_file(_optimiser_path(path))
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"{_optimiser_path(path)} cannot be read: {error}: restore it from backup"
            ) from error
        return Checkpoint(number, bundle.model.state_dict(), optimiser)

    def newest(self) -> int | None:
        """The last round whose files are complete; None when there is none."""
        numbers = [
            int(path.name.removesuffix(".safetensors").removeprefix("round-"))
            for path in self.folder.glob("round-*.safetensors")
            if not path.name.endswith(".optimiser.safetensors")
        ]
        return max(numbers, default=None)


def _optimiser_path(bundle: Path) -> Path:
    return bundle.with_suffix(".optimiser.safetensors")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
