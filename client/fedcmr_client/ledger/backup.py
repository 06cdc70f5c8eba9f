"""A consistent copy of a ledger while it may be in use."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

from fedcmr_client.ledger.place import LedgerPlace, make_folder, write_durably
from fedcmr_shared.errors import LedgerError
from fedcmr_shared.privacy.budget import Budget


def copy(place: LedgerPlace, budget: Budget, target: Path) -> None:
    """Copy database, key and the results of open jobs; see `Ledger.backup`."""
    url = place.url()
    if url.get_backend_name() != "sqlite":
        raise LedgerError("back up a ledger in PostgreSQL with pg_dump, and site.key beside it")
    if target.exists():
        raise LedgerError(f"{target} exists: name a new folder for the backup")
    copied = LedgerPlace(target, place.second_place)
    try:
        make_folder(target)
        write_durably(copied.key, place.key.read_bytes())
        _copy_database(Path(url.database or ""), Path(copied.url().database or ""))
        for job, state in budget.jobs.items():
            for phase, number in state.stored if state.closed is None else ():
                result = copied.result(job, phase, number)
                make_folder(result.parent)
                shutil.copyfile(place.result(job, phase, number), result)
    except (OSError, sqlite3.Error) as error:
        raise LedgerError(f"{target}: the backup failed: {error}") from error


def _copy_database(source: Path, target: Path) -> None:
    with closing(sqlite3.connect(source)) as database, closing(sqlite3.connect(target)) as copied:
        database.backup(copied)
