"""Who asked for what, and tokens that open the dashboard once."""

from __future__ import annotations

import hashlib
import secrets
from datetime import UTC, datetime, timedelta
from typing import Final

from sqlalchemy import delete, select, update

from fedcmr_server.store.database import Store
from fedcmr_server.store.tables import AccessRow, TokenRow

_LONGEST: Final = 500


class AccessLog:
    """Requests of members and strangers. Texts may be anything that somebody sent."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def write(self, member: str | None, method: str, allowed: bool, detail: str = "") -> None:
        """Note one request; ``member`` is None for whoever is none."""
        row = AccessRow(
            at=datetime.now(UTC),
            member=None if member is None else _printable(member),
            method=_printable(method),
            allowed=allowed,
            detail=_printable(detail),
        )
        with self._store.writing() as session:
            session.add(row)

    def newest(self, limit: int = 100, *, refused_only: bool = False) -> list[AccessRow]:
        """The newest requests first."""
        query = select(AccessRow).order_by(AccessRow.id.desc()).limit(limit)
        if refused_only:
            query = query.where(AccessRow.allowed.is_(False))
        with self._store.reading() as session:
            return list(session.scalars(query))

    def forget(self, before: datetime) -> int:
        """Delete what is older than ``before``; return how many requests that were."""
        with self._store.writing() as session:
            gone = session.scalars(
                delete(AccessRow).where(AccessRow.at < before).returning(AccessRow.id)
            )
            return len(gone.all())


class Tokens:
    """One-time tokens for the dashboard, kept as hashes."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def issue(self, label: str, lifetime: timedelta, now: datetime | None = None) -> str:
        """Return a fresh token; ``label`` says for whom it is."""
        token = secrets.token_urlsafe(32)
        expires_at = (now or datetime.now(UTC)) + lifetime
        with self._store.writing() as session:
            session.add(TokenRow(sha256=_hash(token), label=label, expires_at=expires_at))
        return token

    def use(self, token: str, now: datetime | None = None) -> str | None:
        """Use up a token and return its label; None when it is unknown, used or too old."""
        now = now or datetime.now(UTC)
        with self._store.writing() as session:
            # One statement: of two who come with the same token, one gets in.
            return session.scalar(
                update(TokenRow)
                .where(
                    TokenRow.sha256 == _hash(token),
                    TokenRow.used_at.is_(None),
                    TokenRow.expires_at > now,
                )
                .values(used_at=now)
                .returning(TokenRow.label)
            )


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:_LONGEST])
