"""Latents of a job's patients, kept between its rounds: encrypted, and erased at its end.

A generator trains on latents of a frozen autoencoder, which would else be computed anew in every
step of every round.

::

    <folder>/<job>/<pseudonym>-<source>.latents

*source* is a digest of the patient's scans and of the autoencoder: another one means another file.
The key follows from the site's secret, which lies with the store and not in this folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from safetensors.torch import load, save
from torch import Tensor

from fedcmr_client.ledger.place import make_folder
from fedcmr_client.sealed_files import erase, read_sealed, write_sealed
from fedcmr_client.store.site_store import ScanRecord
from fedcmr_shared.errors import LedgerError

_CONSEQUENCE: Final = "it is computed again"


class Latents(NamedTuple):
    """One patient: the posterior's mean and log-variance ``[*latent_shape]``, phenotypes."""

    mean: Tensor
    log_variance: Tensor
    phenotypes: Tensor


@dataclass(frozen=True)
class LatentCache:
    """The latents of one job; ``key`` (32 bytes) follows from the site's secret.

    All methods raise LedgerError when a file cannot be read, written, trusted or erased.
    """

    folder: Path
    job: str
    key: bytes = field(repr=False)

    def latents(
        self,
        patient: str,
        scans: Sequence[ScanRecord],
        autoencoder_sha256: str,
        compute: Callable[[], Latents],
    ) -> Latents:
        """Return a patient's latents, from the disk where they lie there already."""
        digests = sorted(scan.digest for scan in scans)
        source = hashlib.sha256("\n".join([autoencoder_sha256, *digests]).encode()).hexdigest()
        path = self._folder / f"{patient}-{source[:32]}.latents"
        content = read_sealed(path, self.key, _CONSEQUENCE)
        if content is not None:
            return Latents(**load(content))
        found = compute()
        try:
            make_folder(self._folder)
        except OSError as error:
            raise LedgerError(f"{self._folder}: cannot be made: {error.strerror}") from error
        tensors = {name: tensor.contiguous() for name, tensor in found._asdict().items()}
        write_sealed(path, self.key, save(tensors))
        return found

    def keep_only(self, patients: Collection[str]) -> None:
        """Erase what others left, such as patients who withdrew since."""
        for path in _files(self._folder):
            if path.name.lstrip(".").rpartition("-")[0] not in patients:
                erase(path)

    def erase(self) -> None:
        """Erase everything of the job."""
        for path in _files(self._folder):
            erase(path)
        with suppress(OSError):  # another process writes its last file: the next job erases it
            self._folder.rmdir()

    def erase_others(self, running: Collection[str]) -> None:
        """Erase what other jobs left that run no more, such as those that were given up."""
        if self.folder.is_dir():
            for folder in sorted(self.folder.iterdir()):
                if folder.name != self.job and folder.name not in running:
                    LatentCache(self.folder, folder.name, self.key).erase()

    @property
    def _folder(self) -> Path:
        return self.folder / self.job


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir()) if folder.is_dir() else []
