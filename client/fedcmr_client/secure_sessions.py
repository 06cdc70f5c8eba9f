"""Secrets of running secure sums on a site's disk: encrypted, and erased when they are over.

::

    <folder>/<session>.key      the session's own key, under the site's
    <folder>/<session>.session  job and state, under the session's key
    <folder>/<session>.answer   unmasking shares that left and may be sent again, under the site's

A file is complete or not there at all. The key file is written once and overwritten with zeros
before it is removed; without it no version of the session file can be read, wherever the disk may
have kept one. On disks that write elsewhere (flash, snapshots) the key's block may outlive that,
and then the site's key protects it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationError

from fedcmr_client.ledger.place import make_folder
from fedcmr_client.sealed_files import KEY_BYTES, erase, read_sealed, write_sealed
from fedcmr_shared.errors import LedgerError
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.secagg.session import Session
from fedcmr_shared.secagg.site import SiteState

_CONSEQUENCE: Final = "the site then misses this sum"


class SessionRecord(BaseModel):
    """A running session: its job and where the site stands."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    job: JobSpec
    state: SiteState


@dataclass(frozen=True)
class SessionStore:
    """The folder of session files; ``key`` (32 bytes) is the site's own.

    All methods raise LedgerError when a file cannot be read, written or trusted.
    """

    folder: Path
    key: bytes = field(repr=False)

    @contextmanager
    def locked(self, name: str = "sessions") -> Iterator[None]:
        """Let one process at a time read, decide and write; other names are other locks."""
        try:
            make_folder(self.folder)
            descriptor = os.open(self.folder / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise LedgerError(f"{self.folder}: cannot be used: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def load(self, session: Session) -> SessionRecord | None:
        """Return the record of ``session``; None when there is none."""
        path = self._path(session, "session")
        key = read_sealed(self._path(session, "key"), self.key, _CONSEQUENCE)
        content = None if key is None else read_sealed(path, key, _CONSEQUENCE)
        if content is None:
            return None
        try:
            return SessionRecord.model_validate_json(content)
        except ValidationError as error:
            message = "another version of FedCMR wrote it: remove it, the site then misses this sum"
            raise LedgerError(f"{path}: {message}") from error

    def newest_attempt(self, session: Session) -> int:
        """Return the newest attempt of the same sum that is kept here; 0 when none is."""
        start = self._path(session, "key").name.removesuffix(f"{session.attempt}.key")
        kept = (path.stem.removeprefix(start) for path in self.folder.glob(f"{start}*.key"))
        return max(map(int, kept), default=0)

    def save(self, record: SessionRecord) -> None:
        """Keep ``record``, to last once this returns."""
        session = record.state.header.session
        path = self._path(session, "key")
        key = read_sealed(path, self.key, _CONSEQUENCE)
        if key is None:
            key = os.urandom(KEY_BYTES)
            write_sealed(path, self.key, key)
        write_sealed(self._path(session, "session"), key, record.model_dump_json().encode())

    def finish(self, session: Session, answer: str) -> None:
        """Keep the answer that may be sent again, and erase the session's secrets."""
        write_sealed(self._path(session, "answer"), self.key, answer.encode())
        self.erase(session)

    def answer(self, session: Session) -> str | None:
        """Return the answer that ended ``session``; None when none is kept."""
        content = read_sealed(self._path(session, "answer"), self.key, _CONSEQUENCE)
        return None if content is None else content.decode()

    def erase(self, session: Session) -> None:
        """Erase the secrets of ``session``; nothing where there are none."""
        erase(self._path(session, "key"))
        erase(self._path(session, "session"))

    def erase_others(self, session: Session) -> None:
        """Erase the secrets of the same job's other sessions."""
        self._erase_others(session, "key")
        self._erase_others(session, "session")

    def erase_other_answers(self, session: Session) -> None:
        """Erase the answers that ended the same job's earlier sessions."""
        self._erase_others(session, "answer")

    def _erase_others(self, session: Session, kind: str) -> None:
        # A file that a crash left half-written is hidden, and erased like the whole ones.
        for pattern in (f"{session.job}-*.{kind}", f".{session.job}-*.{kind}.partial"):
            for path in sorted(self.folder.glob(pattern)):
                if path != self._path(session, kind):
                    erase(path)

    def _path(self, session: Session, kind: str) -> Path:
        name = f"{session.job}-{session.phase}-{session.round}-{session.attempt}.{kind}"
        return self.folder / name
