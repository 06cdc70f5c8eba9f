"""Copies a ledger's log into another database, as it is."""

from __future__ import annotations

from sqlalchemy import insert, select

from fedcmr_client.ledger import database
from fedcmr_client.ledger.place import LedgerPlace
from fedcmr_shared.errors import LedgerError


def copy_log(source: LedgerPlace, target: LedgerPlace) -> int:
    """Copy all rows of ``source``'s log to ``target``'s database; return the number of entries.

    The log in ``source`` stays. Only one of them may be used afterwards: the second place notices
    when the other one has grown.

    Raises:
        LedgerError: ``target`` holds a ledger, or either database fails; nothing was copied.
    """
    if source.url() == target.url():
        raise LedgerError(f"{source.url()!r} is where the log lies: choose another database")
    from_engine, to_engine = database.connect(source.url()), database.connect(target.url())
    try:
        with database.exclusive(from_engine) as old, database.exclusive(to_engine) as new:
            database.metadata.create_all(new)
            if new.scalar(select(database.entries.c.number).limit(1)) is not None:
                message = "choose an empty database"
                raise LedgerError(f"{to_engine.url!r} holds a ledger already: {message}")
            for table in database.metadata.sorted_tables:
                rows = [dict(row) for row in old.execute(select(table)).mappings()]
                if rows:
                    new.execute(insert(table), rows)
            entries = new.execute(select(database.entries.c.number)).all()
        return len(entries)
    finally:
        from_engine.dispose()
        to_engine.dispose()
