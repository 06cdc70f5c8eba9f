"""Opens the coordinator's database, SQLite or PostgreSQL, and runs transactions in it.

Several processes use it at once: the supervisor, the ServerApps of running jobs, governance, the
dashboard and commands. Writers of SQLite come one after the other and keep no reader waiting; in
PostgreSQL they lock the rows that they decide about. What is committed lasts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, Self

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
)
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from fedcmr_shared.errors import ConfigurationError, FederationError

_WAIT_S: Final = 60
_TRY_AGAIN_S: Final = 1.0
_MIGRATION_LOCK: Final = 0x6665_6463_6D73  # "fedcms"
_WRITES: Final = "fedcmr_writes"


class StoreUnreachable(FederationError):
    """The database does not answer; what it holds is as it was before the transaction."""


class Store:
    """Transactions in the coordinator's database.

    With ``patience_s`` a transaction that cannot begin is tried again for so long: a database that
    restarts then costs a running job nothing. One that breaks off later is never repeated, because
    nobody can tell whether it was committed.
    """

    def __init__(self, engine: Engine, patience_s: float = 0.0) -> None:
        self._reader = engine
        self._writer = engine.execution_options(**{_WRITES: True})
        self._patience_s = patience_s

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def engine(self) -> Engine:
        """The engine beneath, for migrations and tests."""
        return self._reader

    def close(self) -> None:
        """Close all connections."""
        self._reader.dispose()

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """One transaction that changes nothing; its rows stay usable afterwards.

        Raises:
            StoreUnreachable: the database does not answer.
            FederationError: it refuses.
        """
        with self._transaction(self._reader) as session:
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """One transaction, rolled back on any exception; IntegrityError is left to the caller.

        Raises:
            StoreUnreachable: the database does not answer.
            FederationError: it refuses.
        """
        with self._transaction(self._writer) as session:
            yield session

    @contextmanager
    def _transaction(self, engine: Engine) -> Iterator[Session]:
        with _plain_errors(engine):
            connection = self._connect(engine)
            with connection, Session(connection, expire_on_commit=False) as session:
                yield session
                session.flush()
                connection.commit()

    def _connect(self, engine: Engine) -> Connection:
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                connection = engine.connect()
                connection.begin()
            except (OperationalError, InterfaceError):
                if time.monotonic() >= deadline:
                    raise
                time.sleep(_TRY_AGAIN_S)
            else:
                return connection


def open_store(url: str, patience_s: float = 0.0) -> Store:
    """Open the database at ``url``, with its tables made or brought up to date.

    Raises:
        ConfigurationError: the URL is none of SQLite or PostgreSQL, or holds a password.
        StoreUnreachable: the database does not answer.
        FederationError: a newer FedCMR made the tables.
    """
    store = Store(_engine(parse_url(url)), patience_s)
    try:
        _migrate(store)
    except BaseException:
        store.close()
        raise
    return store


def parse_url(url: str) -> URL:
    """Parse a database URL.

    Raises:
        ConfigurationError: it is none of SQLite or PostgreSQL, or holds a password.
    """
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigurationError("database_url is not a database URL") from error
    if parsed.drivername not in {"sqlite", "postgresql+psycopg"}:
        message = "use sqlite:///FILE or postgresql+psycopg://USER@HOST/DATABASE"
        raise ConfigurationError(f"database_url names {parsed.drivername}: {message}")
    if parsed.password is not None or "password" in parsed.query:
        message = "remove it, use PGPASSWORD or .pgpass"
        raise ConfigurationError(f"database_url holds a password: {message}")
    if parsed.drivername == "sqlite" and parsed.database in (None, "", ":memory:"):
        message = "several processes share it: write sqlite:///FILE"
        raise ConfigurationError(f"database_url names no file: {message}")
    return parsed


def migration_config() -> Config:
    """Alembic's settings for the packaged migrations."""
    config = Config()
    config.set_main_option("script_location", "fedcmr_server.store:migrations")
    return config


def _engine(url: URL) -> Engine:
    try:
        if url.get_backend_name() == "sqlite":
            engine = create_engine(url, poolclass=NullPool, connect_args={"timeout": _WAIT_S})
        else:
            # A connection that a restart of the server cut is replaced before its use.
            engine = create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": 10})
    except (ModuleNotFoundError, NoSuchModuleError) as error:
        message = "install fedcmr[postgresql]"
        raise ConfigurationError(f"no driver for {url.drivername}: {message}") from error
    if url.get_backend_name() == "sqlite":
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    else:
        event.listen(engine, "begin", _begin_postgresql)
    return engine


def _migrate(store: Store) -> None:
    config = migration_config()
    scripts = ScriptDirectory.from_config(config)
    known = {script.revision for script in scripts.walk_revisions()}
    head = scripts.get_current_head()
    with store.reading() as session:
        if _revision(session.connection(), known) == head:
            return
    with store.writing() as session:
        connection = session.connection()
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:n)"), {"n": _MIGRATION_LOCK})
        if _revision(connection, known) != head:  # unless another process was faster
            config.attributes["connection"] = connection
            command.upgrade(config, "head")


def _revision(connection: Connection, known: set[str]) -> str | None:
    revision = MigrationContext.configure(connection).get_current_revision()
    if revision is not None and revision not in known:
        message = "a newer FedCMR made it: update this one"
        raise FederationError(f"the coordinator's database has revision {revision}: {message}")
    return revision


def _set_up_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # transactions begin as `_begin_sqlite` says
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _begin_postgresql(connection: Connection) -> None:
    if connection.get_execution_options().get(_WRITES, False):
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{_WAIT_S}s'")
        # Whatever the server's default is: nobody may be asked for shares twice after a crash.
        connection.exec_driver_sql("SET LOCAL synchronous_commit = on")


@contextmanager
def _plain_errors(engine: Engine) -> Iterator[None]:
    try:
        yield
    except IntegrityError:
        raise
    except (OperationalError, InterfaceError) as error:
        where = engine.url.render_as_string(hide_password=True)
        message = f"start it, or check database_url ({where})"
        raise StoreUnreachable(
            f"the coordinator's database cannot be reached: {_reason(error)}: {message}"
        ) from error
    except DBAPIError as error:
        raise FederationError(f"the coordinator's database refuses: {_reason(error)}") from error


def _reason(error: DBAPIError) -> str:
    return str(error.orig).strip().partition("\n")[0]
