"""Latents of a job's patients, kept between its rounds: encrypted, and erased at its end.

A generator trains on latents of a frozen autoencoder, which would else be computed anew in every
step of every round.

::

    <folder>/<job>/<pseudonym>-<source>.latents

*source* is a digest of the patient's scans and of the autoencoder: another one means another file.
The key follows from the site's secret, which lies with the store and not in this folder. Disks that
write elsewhere (flash, snapshots) and backups may keep what was erased, which that secret protects.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fedcmr_client.ledger.place import make_folder
from fedcmr_client.sealed_files import SealBroken, erase, read_sealed, write_sealed
from fedcmr_shared.errors import LedgerError

if TYPE_CHECKING:
    from torch import Tensor

    from fedcmr_client.store.site_store import ScanRecord

_log = logging.getLogger("fedcmr.site")


class Latents(NamedTuple):
    """One patient: the posterior's mean and log-variance ``[*latent_shape]``, phenotypes."""

    mean: Tensor
    log_variance: Tensor
    phenotypes: Tensor


@dataclass(frozen=True)
class LatentCache:
    """The latents of one job; ``key`` (32 bytes) follows from the site's secret.

    All methods raise LedgerError when a file cannot be read, written or erased.
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
        """Return a patient's latents, from the disk where they lie there already.

        A damaged file is computed and written anew, with a warning in the site's log.
        """
        from safetensors.torch import load, save

        digests = sorted(scan.digest for scan in scans)
        source = hashlib.sha256("\n".join([autoencoder_sha256, *digests]).encode()).hexdigest()
        path = self._folder / f"{patient}-{source[:32]}.latents"
        content = self._read(path)
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
        _erase_all(path for path in _files(self._folder) if _patient(path) not in patients)

    def erase(self) -> None:
        """Erase everything of the job, see `erase_job`."""
        erase_job(self.folder, self.job)

    def erase_others(self, running: Collection[str]) -> None:
        """Erase what other jobs left that run no more, such as those that were given up."""
        for folder in _files(self.folder):
            if folder.name != self.job and folder.name not in running:
                erase_job(self.folder, folder.name)

    def _read(self, path: Path) -> bytes | None:
        try:
            return read_sealed(path, self.key, "it is computed again")
        except SealBroken:
            # Without the key nobody can forge one. To fail would cost the round's privacy each time.
            _log.warning("%s: is damaged: computed and written anew", path)
            return None

    @property
    def _folder(self) -> Path:
        return self.folder / self.job


def erase_job(folder: Path, job: str) -> None:
    """Erase all latents of a job (its SHA-256) below ``folder``.

    A round that runs in another process may write some again: the next training round of any job
    erases those. What can be erased is; LedgerError names the first file that stays.
    """
    _erase_all(_files(folder / job))
    with suppress(OSError):  # another process has just written
        (folder / job).rmdir()


def erase_patient(folder: Path, patient: str) -> None:
    """Erase all latents of a patient (a pseudonym) below ``folder``, whatever the job.

    A round that runs in another process may write some again: the job's next training round, or
    its end, erases those. What can be erased is; LedgerError names the first file that stays.
    """
    _erase_all(path for job in _files(folder) for path in _files(job) if _patient(path) == patient)


def _erase_all(paths: Iterable[Path]) -> None:
    failed = []
    for path in paths:
        try:
            erase(path)
        except LedgerError as error:
            failed.append(error)
    if failed:
        raise failed[0]


def _patient(path: Path) -> str:
    """Return whose latents a file holds; one that is half written begins with a dot."""
    return path.name.lstrip(".").rpartition("-")[0]


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):  # another process may erase it just now
        return []
    except OSError as error:
        raise LedgerError(f"{folder}: cannot be read: {error.strerror}") from error
