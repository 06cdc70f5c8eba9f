"""The site catalogue: which patient has which scans, in SQLite or PostgreSQL.

The tables change by the Alembic migrations in ``migrations``, which run when a store is created
or opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import (
    CheckConstraint,
    Double,
    Engine,
    ForeignKey,
    MetaData,
    String,
    Text,
    create_engine,
    event,
    false,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import NullPool

from fedcmr_shared.errors import DataError

_SQLITE_WAIT_S: Final = 60


class Base(DeclarativeBase):
    """Root of the catalogue's tables; constraints have stable names so that migrations find them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class SiteRow(Base):
    """The only row about the site itself: check value of its secret, and split fractions."""

    __tablename__ = "site"
    __table_args__ = (CheckConstraint("id = 1", name="single_row"),)

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    secret_fingerprint: Mapped[str] = mapped_column(String(64))
    train: Mapped[float] = mapped_column(Double)
    validation: Mapped[float] = mapped_column(Double)
    test: Mapped[float] = mapped_column(Double)


class PatientRow(Base):
    """One patient over all visits, modalities and views.

    ``consent`` is None until somebody says what the patient decided. The row of a withdrawn
    patient stays, so that nothing of theirs is imported again.
    """

    __tablename__ = "patients"

    pseudonym: Mapped[str] = mapped_column(String(28), primary_key=True)
    consent: Mapped[bool | None]
    withdrawn: Mapped[bool] = mapped_column(default=False, server_default=false())


class ScanRow(Base):
    """One stored scan; its file is ``scans/<patient>/<scan_id>.h5`` in the store."""

    __tablename__ = "scans"

    scan_id: Mapped[str] = mapped_column(String(16), primary_key=True)
    patient: Mapped[str] = mapped_column(ForeignKey("patients.pseudonym"), index=True)
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    modality: Mapped[str | None] = mapped_column(String(64), index=True)
    has_truth: Mapped[bool]
    acquisition: Mapped[str] = mapped_column("metadata", Text)


def parse_url(text: str) -> URL:
    """Parse a database URL; DataError unless it names SQLite or PostgreSQL."""
    try:
        url = make_url(text)
    except ArgumentError as error:
        raise DataError("the catalogue URL is not a database URL") from error
    if url.drivername not in {"sqlite", "postgresql+psycopg"}:
        message = "use sqlite:///FILE or postgresql+psycopg://USER@HOST/DATABASE"
        raise DataError(f"the catalogue cannot be kept in {url.drivername}: {message}")
    return url


def connect(url: URL) -> Engine:
    """Return an engine for the catalogue at ``url``; no connection is made before its first use."""
    sqlite = url.get_backend_name() == "sqlite"
    arguments: dict[str, Any] = {"timeout": _SQLITE_WAIT_S} if sqlite else {}
    try:
        # Without a pool nothing is shared with forked workers and nothing stays open.
        engine = create_engine(url, poolclass=NullPool, connect_args=arguments)
    except (ModuleNotFoundError, NoSuchModuleError) as error:
        message = "install fedcmr[postgresql]"
        raise DataError(f"no driver for {url.drivername}: {message}") from error
    if sqlite:
        event.listen(engine, "connect", _set_up_sqlite)
    return engine


def create_tables(engine: Engine) -> None:
    """Make or update the tables; DataError when a newer FedCMR made them."""
    _migrate(engine, may_create=True)


def update_tables(engine: Engine) -> None:
    """Update existing tables; DataError when there are none or a newer FedCMR made them."""
    _migrate(engine, may_create=False)


@contextmanager
def transaction(engine: Engine) -> Iterator[Session]:
    """One transaction, rolled back on any exception.

    Raises DataError when the database fails; IntegrityError is left to the caller.
    """
    try:
        with Session(engine) as session, session.begin():
            yield session
    except IntegrityError:
        raise
    except DBAPIError as error:
        raise DataError(f"catalogue {engine.url!r}: {_reason(error)}") from error


def migration_config() -> Config:
    """Alembic's settings for the packaged migrations."""
    config = Config()
    config.set_main_option("script_location", "fedcmr_client.store:migrations")
    return config


def _migrate(engine: Engine, *, may_create: bool) -> None:
    config = migration_config()
    scripts = ScriptDirectory.from_config(config)
    known = {script.revision for script in scripts.walk_revisions()}
    try:
        with engine.begin() as connection:
            revision = MigrationContext.configure(connection).get_current_revision()
            if revision is None and not may_create:
                raise DataError(f"{engine.url!r} holds no catalogue: restore it from backup")
            if revision is not None and revision not in known:
                message = "a newer FedCMR made it: update this one"
                raise DataError(f"catalogue {engine.url!r} has revision {revision}: {message}")
            if revision != scripts.get_current_head():
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
    except DBAPIError as error:
        raise DataError(f"catalogue {engine.url!r}: {_reason(error)}") from error


def _set_up_sqlite(connection: Any, _record: object) -> None:
    connection.execute("PRAGMA foreign_keys = ON")
    # What is deleted is overwritten, so that a withdrawn patient's rows are really gone.
    connection.execute("PRAGMA secure_delete = ON")


def _reason(error: DBAPIError) -> str:
    return str(error.orig).strip().partition("\n")[0]
