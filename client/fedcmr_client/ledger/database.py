"""Tables of the ledger, and transactions that exclude all other ones.

Rows are only ever inserted. SQLite runs in WAL mode with full synchronisation; in PostgreSQL an
advisory lock serialises the transactions, and commits wait for the disk whatever the server's
default is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Engine,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    text,
)
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, NoSuchModuleError
from sqlalchemy.pool import NullPool

from fedcmr_shared.errors import LedgerError

_WAIT_S: Final = 60
_ADVISORY_LOCK: Final = 0x6665_6463_6D72  # "fedcmr"

metadata = MetaData()

entries = Table(
    "ledger_entries",
    metadata,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("leaf", Text, nullable=False),
    Column("leaf_hash", String(64), nullable=False),
)
"""The log; ``leaf`` is the canonical JSON that ``leaf_hash`` hashes."""


def _signed_heads(name: str, key: str) -> Table:
    return Table(
        name,
        metadata,
        *(
            Column(column, BigInteger, primary_key=column == key, autoincrement=False)
            for column in ("size", "at")
        ),
        Column("root", String(64), nullable=False),
        Column("signature", String(128), nullable=False),
    )


heads = _signed_heads("ledger_heads", "size")
"""The site's own signed heads: one for each transaction that appended."""

checkpoints = _signed_heads("ledger_checkpoints", "at")
"""Heads for others: on schedule, and padded."""

cohorts = Table(
    "ledger_cohorts",
    metadata,
    Column("cohort", String(64), primary_key=True),
    Column("members", Text, nullable=False),
)
"""The pseudonyms behind each cohort's keyed hash: sorted, one a line."""


def connect(url: URL) -> Engine:
    """Return an engine for the ledger; no connection is made before its first use.

    Raises:
        LedgerError: the database's driver is not installed.
    """
    sqlite = url.get_backend_name() == "sqlite"
    arguments: dict[str, Any] = {"timeout": _WAIT_S} if sqlite else {}
    try:
        # Without a pool nothing is shared with forked workers and nothing stays open.
        engine = create_engine(url, poolclass=NullPool, connect_args=arguments)
    except (ModuleNotFoundError, NoSuchModuleError) as error:
        message = "install fedcmr[postgresql]"
        raise LedgerError(f"no driver for {url.drivername}: {message}") from error
    if sqlite:
        event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _lock_sqlite if sqlite else _lock_postgresql)
    return engine


def require_file(url: URL) -> None:
    """Raise LedgerError when ``url`` names an SQLite file that is not there."""
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
        message = "make a ledger, or restore it from backup"
        raise LedgerError(f"{url.database}: no ledger is there: {message}")


@contextmanager
def exclusive(engine: Engine) -> Iterator[Connection]:
    """One transaction while which no other one runs; rolled back on any exception.

    Raises:
        LedgerError: the database fails; nothing was changed.
    """
    try:
        with engine.begin() as connection:
            yield connection
    except DBAPIError as error:
        reason = str(error.orig).strip().partition("\n")[0]
        raise LedgerError(f"ledger {engine.url!r}: {reason}") from error


def _configure_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # transactions begin as `_lock_sqlite` says
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")


def _lock_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _lock_postgresql(connection: Connection) -> None:
    connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{_WAIT_S}s'")
    connection.exec_driver_sql("SET LOCAL synchronous_commit = on")
    connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": _ADVISORY_LOCK})
