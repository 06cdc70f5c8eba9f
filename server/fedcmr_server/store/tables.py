"""Tables of the coordinator's database. Times are UTC.

They change by the Alembic migrations in ``migrations``, which run when a store is opened.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Final, Literal, get_args

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column
from sqlalchemy.types import TypeDecorator

from fedcmr_server.job_states import JobState, RoundState
from fedcmr_shared.identity.certificates import Role

MemberState = Literal["active", "revoked", "left"]
CertificateState = Literal["active", "revoked", "replaced"]

# SQLite numbers rows by itself in columns of its own integer type alone.
_KEY: Final = BigInteger().with_variant(Integer(), "sqlite")
_ACTIVE: Final = text("state = 'active'")


class Utc(TypeDecorator[datetime]):
    """A moment with its time zone; SQLite keeps none, so that UTC is put back."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """To the database; a moment without a time zone is refused."""
        if value is not None and value.tzinfo is None:
            raise ValueError(f"{value} has no time zone: give it in UTC")
        return value if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """From the database."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Values(TypeDecorator[dict[str, Any]]):
    """A JSON object as text: PostgreSQL's own type takes no NaN, which a figure can be."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: dict[str, Any] | None, dialect: Dialect) -> str | None:
        """To the database."""
        return None if value is None else json.dumps(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> dict[str, Any] | None:
        """From the database."""
        return None if value is None else json.loads(value)


def _one_of(column: str, values: Iterable[str]) -> CheckConstraint:
    allowed = ", ".join(f"'{value}'" for value in values)
    return CheckConstraint(f"{column} IN ({allowed})", name=f"known_{column}")


class Base(MappedAsDataclass, DeclarativeBase, kw_only=True):
    """Root of the tables; constraints have stable names so that migrations find them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012  # the declarative base reads it from the class
        datetime: Utc,
        dict[str, Any]: Values,
        str: Text,
        int: BigInteger,
        bool: Boolean,
    }


class MemberRow(Base):
    """Who is or was a member.

    Who left can come back with the same keys, which keep its ledger; after a revocation a name
    comes back with other keys alone.

    ``identity`` is the Ed25519 public key (hexadecimal), ``node_key`` (OpenSSH) a site's key in
    Flower. ``seen_at``, ``software`` and ``condition`` are what the member last said of itself.
    """

    __tablename__ = "members"
    __table_args__ = (
        _one_of("role", get_args(Role)),
        _one_of("state", get_args(MemberState)),
        Index(
            "uq_members_active_name",
            "name",
            unique=True,
            sqlite_where=_ACTIVE,
            postgresql_where=_ACTIVE,
        ),
        UniqueConstraint("identity"),
        UniqueConstraint("node_key"),
    )

    id: Mapped[int] = mapped_column(_KEY, primary_key=True, init=False)
    name: Mapped[str] = mapped_column(index=True)
    role: Mapped[Role] = mapped_column(Text)
    identity: Mapped[str] = mapped_column(String(64))
    node_key: Mapped[str | None]
    state: Mapped[MemberState] = mapped_column(Text)
    since: Mapped[datetime]
    reason: Mapped[str | None] = mapped_column(default=None)
    seen_at: Mapped[datetime | None] = mapped_column(default=None)
    software: Mapped[str | None] = mapped_column(default=None)
    condition: Mapped[str | None] = mapped_column(default=None)


class CertificateRow(Base):
    """A certificate that the authority issued.

    Active ones pass, and replaced ones until ``ended_at``.
    """

    __tablename__ = "certificates"
    __table_args__ = (_one_of("state", get_args(CertificateState)), UniqueConstraint("fingerprint"))

    serial: Mapped[str] = mapped_column(String(40), primary_key=True)
    member_id: Mapped[int] = mapped_column(ForeignKey("members.id"), index=True)
    fingerprint: Mapped[str] = mapped_column(String(64))
    not_before: Mapped[datetime]
    not_after: Mapped[datetime]
    state: Mapped[CertificateState] = mapped_column(Text, default="active")
    ended_at: Mapped[datetime | None] = mapped_column(default=None)
    reason: Mapped[str | None] = mapped_column(default=None)


class RosterRow(Base):
    """A version of the roster; ``document`` is the signed version as JSON, all of it."""

    __tablename__ = "roster_versions"

    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    sha256: Mapped[str] = mapped_column(String(64), unique=True)
    roster_sha256: Mapped[str] = mapped_column(String(64))
    document: Mapped[str]
    signature: Mapped[str] = mapped_column(String(128))
    reason: Mapped[str]
    at: Mapped[datetime]


class JobRow(Base):
    """A job. ``id`` is the SHA-256 of its ``spec`` (JSON), ``run`` the Flower run that carries it.

    ``authorisation`` is the coordinator's signature under it (JSON), ``roster`` (JSON) its sites.
    """

    __tablename__ = "jobs"
    __table_args__ = (_one_of("state", get_args(JobState)),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(index=True)
    spec: Mapped[str]
    authorisation: Mapped[str | None]
    roster: Mapped[str | None]
    roster_sha256: Mapped[str | None] = mapped_column(String(64))
    submitted_at: Mapped[datetime]
    changed_at: Mapped[datetime]
    device: Mapped[str | None] = mapped_column(default=None)
    state: Mapped[JobState] = mapped_column(Text, default="submitted")
    run: Mapped[str | None] = mapped_column("flower_run_id", default=None)
    losses: Mapped[int] = mapped_column(Integer, default=0)
    reason: Mapped[str | None] = mapped_column(default=None)


class EventRow(Base):
    """What happened in a job, numbered from 1; rows are only ever added."""

    __tablename__ = "events"

    job: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    at: Mapped[datetime]
    name: Mapped[str] = mapped_column(index=True)
    content: Mapped[dict[str, Any]]


class RoundRow(Base):
    """A round of a job; round 0 is the model that it starts from."""

    __tablename__ = "rounds"
    __table_args__ = (_one_of("state", get_args(RoundState)),)

    job: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    state: Mapped[RoundState] = mapped_column(Text)
    started_at: Mapped[datetime]
    model_sha256: Mapped[str | None] = mapped_column(String(64), default=None)
    optimiser_sha256: Mapped[str | None] = mapped_column(String(64), default=None)
    committed_at: Mapped[datetime | None] = mapped_column(default=None)


class CheckpointRow(Base):
    """A site's signed head of its ledger, as received; ``at`` is the site's own time (UTC, ms).

    Two of one size with different roots are kept both: they prove that a site shows two histories.
    ``proof`` is the consistency proof from the one before (hexadecimal, separated by spaces), and
    ``problem`` says why this one was refused; null in those that others see and cosign.
    """

    __tablename__ = "checkpoints"
    __table_args__ = (UniqueConstraint("site", "size", "at", "root"),)

    id: Mapped[int] = mapped_column(_KEY, primary_key=True, init=False)
    site: Mapped[str]
    size: Mapped[int]
    at: Mapped[int]
    root: Mapped[str] = mapped_column(String(64))
    signature: Mapped[str] = mapped_column(String(128))
    document: Mapped[str]
    received_at: Mapped[datetime]
    proof: Mapped[str] = mapped_column(default="")
    problem: Mapped[str | None] = mapped_column(default=None)


class CosignatureRow(Base):
    """Another site's signature under a checkpoint, and the public key that verifies it."""

    __tablename__ = "cosignatures"

    checkpoint_id: Mapped[int] = mapped_column(ForeignKey("checkpoints.id"), primary_key=True)
    site: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(String(64))
    signature: Mapped[str] = mapped_column(String(128))
    at: Mapped[datetime]


class ReceiptRow(Base):
    """A site's signed receipt that it started a round of a phase, as received."""

    __tablename__ = "receipts"

    job: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    site: Mapped[str] = mapped_column(primary_key=True)
    phase: Mapped[str] = mapped_column(primary_key=True)
    round: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    attempt: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    document: Mapped[str]
    signature: Mapped[str] = mapped_column(String(128))
    received_at: Mapped[datetime]


class ReleaseRow(Base):
    """A released model; ``sha256`` is that of its file, ``card`` the model card as JSON."""

    __tablename__ = "releases"
    __table_args__ = (UniqueConstraint("path"), UniqueConstraint("job", "sha256"))

    id: Mapped[int] = mapped_column(_KEY, primary_key=True, init=False)
    job: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    path: Mapped[str]
    sha256: Mapped[str] = mapped_column(String(64))
    size: Mapped[int]
    signature: Mapped[str] = mapped_column(String(128))
    card: Mapped[str]
    at: Mapped[datetime]


class AccessRow(Base):
    """Who asked for what, and whether it was allowed."""

    __tablename__ = "access_log"

    id: Mapped[int] = mapped_column(_KEY, primary_key=True, init=False)
    at: Mapped[datetime] = mapped_column(index=True)
    member: Mapped[str | None]
    method: Mapped[str]
    allowed: Mapped[bool]
    detail: Mapped[str]


class TokenRow(Base):
    """A token that opens the dashboard once; only its SHA-256 is kept."""

    __tablename__ = "tokens"

    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    label: Mapped[str]
    expires_at: Mapped[datetime]
    used_at: Mapped[datetime | None] = mapped_column(default=None)
