"""Where a ledger lives, and files that are complete or not there at all."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from fedcmr_shared.errors import LedgerError


@dataclass(frozen=True)
class LedgerPlace:
    """Files of a ledger.

    ``folder`` holds ``ledger.sqlite``, ``site.key`` and ``results/``. ``second_place`` is a file
    (or an existing folder for one) that keeps the newest head of the log; it belongs on another
    disk or share, outside of what is backed up together with ``folder``. ``database_url`` (PostgreSQL, or SQLite elsewhere)
    replaces ``ledger.sqlite``.
    """

    folder: Path
    second_place: Path
    database_url: str | None = None

    @property
    def key(self) -> Path:
        """The site's private key."""
        return self.folder / "site.key"

    def result(self, job: str, phase: str, number: int) -> Path:
        """The stored result of round ``number`` of a phase."""
        return self.folder / "results" / job / f"{phase}-{number}.bin"

    def url(self) -> URL:
        """Return the database's URL; LedgerError unless it names SQLite or PostgreSQL."""
        if self.database_url is None:
            return URL.create("sqlite", database=str(self.folder / "ledger.sqlite"))
        try:
            url = make_url(self.database_url)
        except ArgumentError as error:
            raise LedgerError("the ledger's URL is not a database URL") from error
        if url.drivername not in {"sqlite", "postgresql+psycopg"}:
            message = "use sqlite:///FILE or postgresql+psycopg://USER@HOST/DATABASE"
            raise LedgerError(f"the ledger cannot be kept in {url.drivername}: {message}")
        return url


def make_folder(folder: Path) -> None:
    """Make ``folder``, and those above it, to last; only the owner may enter it."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
        _sync_folder(folder.parent)


def write_durably(path: Path, content: bytes) -> None:
    """Give ``path`` the new ``content``, to last once this returns.

    Whoever reads it, also after a crash, finds the old content or the new one. Only one process
    may write a path at a time. Raises OSError.
    """
    partial = path.with_name(f".{path.name}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
