"""Members, their certificates, and the versions of the roster."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final, Literal

from cryptography import x509
from sqlalchemy import Select, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from fedcmr_server.store.database import Store
from fedcmr_server.store.tables import CertificateRow, MemberRow, RosterRow
from fedcmr_shared.errors import FederationError
from fedcmr_shared.identity.certificates import Member, fingerprint, serial
from fedcmr_shared.identity.roster_history import RosterVersion

GRACE: Final = timedelta(days=7)
"""So long a renewed certificate still passes: the answer with the new one may have been lost."""

_AT_ONCE: Final = timedelta(0)

CertificateProblem = Literal["left", "revoked", "replaced", "expired", "early"]
"""Why a known certificate does not pass."""


class Members:
    """Who belongs to the federation."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def add(
        self, member: Member, identity: str, node_key: str | None, now: datetime | None = None
    ) -> MemberRow:
        """Make ``member`` an active one; a site has a ``node_key``.

        Raises:
            FederationError: the name is in use, or one of the keys is or was.
        """
        row = MemberRow(
            name=member.name,
            role=member.role,
            identity=identity,
            node_key=node_key,
            state="active",
            since=now or datetime.now(UTC),
        )
        try:
            with self._store.writing() as session:
                session.add(row)
        except IntegrityError as error:
            message = "revoke the member of this name first, and let it make new keys"
            raise FederationError(
                f"{member.role} {member.name} cannot join: its name is in use, or one of its keys "
                f"was used before: {message}"
            ) from error
        return row

    def all(self) -> list[MemberRow]:
        """Everybody who is or was a member, by name and then by time."""
        with self._store.reading() as session:
            return list(session.scalars(select(MemberRow).order_by(MemberRow.name, MemberRow.id)))

    def active(self) -> list[MemberRow]:
        """The members of now, by name."""
        return [row for row in self.all() if row.state == "active"]

    def find(self, name: str) -> MemberRow | None:
        """The active member of this name."""
        with self._store.reading() as session:
            return session.scalar(_active(name))

    def end(
        self,
        name: str,
        state: Literal["revoked", "left"],
        reason: str,
        now: datetime | None = None,
    ) -> MemberRow:
        """End a membership, and with it all of the member's certificates.

        Raises:
            FederationError: nobody of this name is active.
        """
        now = now or datetime.now(UTC)
        with self._store.writing() as session:
            row = _required(session, name)
            row.state, row.reason, row.since = state, reason, now
            session.execute(
                update(CertificateRow)
                .where(CertificateRow.member_id == row.id, CertificateRow.state == "active")
                .values(state="revoked", ended_at=now, reason=reason)
            )
        return row

    def bring_back(self, name: str, now: datetime | None = None) -> MemberRow:
        """Make the last membership of ``name``, which left, active again.

        Raises:
            FederationError: the last membership of this name did not end by leaving.
        """
        newest = select(MemberRow).where(MemberRow.name == name).order_by(MemberRow.id.desc())
        with self._store.writing() as session:
            row = session.scalars(newest).first()
            if row is None or row.state != "left":
                raise FederationError(f"{name} did not leave: only who left comes back")
            row.state, row.reason, row.since = "active", None, now or datetime.now(UTC)
        return row

    def seen(
        self,
        name: str,
        software: str,
        now: datetime | None = None,
        condition: str | None = None,
    ) -> None:
        """Note that the active member was heard of, the software that it runs, and how it is.

        Raises:
            FederationError: nobody of this name is active.
        """
        with self._store.writing() as session:
            row = _required(session, name)
            row.seen_at, row.software = now or datetime.now(UTC), software
            row.condition = condition


class Certificates:
    """The certificates that the authority issued."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def add(
        self,
        name: str,
        certificate: x509.Certificate,
        *,
        replaces_others: bool = False,
        grace: timedelta = _AT_ONCE,
    ) -> CertificateRow:
        """Keep the certificate of active member ``name``; the ones before can end with it.

        Then they still pass for a ``grace`` period, or for what is left of an earlier one.

        Raises:
            FederationError: nobody of this name is active, or the certificate is kept already.
        """
        now = datetime.now(UTC)
        try:
            with self._store.writing() as session:
                member = _required(session, name)
                row = CertificateRow(
                    serial=serial(certificate),
                    member_id=member.id,
                    fingerprint=fingerprint(certificate),
                    not_before=certificate.not_valid_before_utc,
                    not_after=certificate.not_valid_after_utc,
                )
                if replaces_others:
                    session.execute(
                        update(CertificateRow)
                        .where(
                            CertificateRow.member_id == member.id,
                            CertificateRow.state.in_(("active", "replaced")),
                            or_(
                                CertificateRow.ended_at.is_(None),
                                CertificateRow.ended_at > now + grace,
                            ),
                        )
                        .values(state="replaced", ended_at=now + grace)
                    )
                session.add(row)
        except IntegrityError as error:
            raise FederationError(f"the certificate of {name} is kept already") from error
        return row

    def holder(
        self, fingerprint: str, now: datetime | None = None
    ) -> tuple[MemberRow, CertificateRow] | None:
        """Who may act with the certificate of this SHA-256; see `certificate_problem`."""
        found = self.find(fingerprint)
        if found is None or certificate_problem(*found, now or datetime.now(UTC)) is not None:
            return None
        return found

    def find(self, fingerprint: str) -> tuple[MemberRow, CertificateRow] | None:
        """Whose certificate has this SHA-256, whatever became of it; None when it is unknown."""
        with self._store.reading() as session:
            found = session.execute(
                select(MemberRow, CertificateRow)
                .join(CertificateRow, CertificateRow.member_id == MemberRow.id)
                .where(CertificateRow.fingerprint == fingerprint)
            ).one_or_none()
        return None if found is None else (found[0], found[1])

    def of(self, name: str) -> list[CertificateRow]:
        """All certificates of members of this name, the newest first."""
        with self._store.reading() as session:
            return list(
                session.scalars(
                    select(CertificateRow)
                    .join(MemberRow, CertificateRow.member_id == MemberRow.id)
                    .where(MemberRow.name == name)
                    .order_by(CertificateRow.not_after.desc())
                )
            )

    def expiring(self, until: datetime) -> list[tuple[MemberRow, CertificateRow]]:
        """Active certificates that end before ``until``, with whose they are; the first first."""
        with self._store.reading() as session:
            found = session.execute(
                select(MemberRow, CertificateRow)
                .join(CertificateRow, CertificateRow.member_id == MemberRow.id)
                .where(CertificateRow.state == "active", CertificateRow.not_after < until)
                .order_by(CertificateRow.not_after)
            )
            return [(member, certificate) for member, certificate in found]

    def revoke(self, serial: str, reason: str, now: datetime | None = None) -> None:
        """End one certificate.

        Raises:
            FederationError: there is none of this serial number (hexadecimal), or it has ended.
        """
        with self._store.writing() as session:
            row = session.get(CertificateRow, serial, with_for_update=True)
            # One that was replaced still passes for a while.
            if row is None or row.state == "revoked":
                raise FederationError(f"no certificate with serial number {serial} is in use")
            row.state, row.reason = "revoked", reason
            row.ended_at = now or datetime.now(UTC)


class Rosters:
    """The versions of the federation's roster."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def add(self, version: RosterVersion) -> None:
        """Keep the version that follows the newest one.

        Raises:
            FederationError: it follows another one; somebody else changed the roster meanwhile.
        """
        row = RosterRow(
            number=version.number,
            sha256=version.sha256,
            roster_sha256=version.roster.sha256,
            document=version.model_dump_json(),
            signature=version.signature,
            reason=version.reason,
            at=version.at,
        )
        try:
            with self._store.writing() as session:
                newest = session.scalar(_newest_first())
                previous = (newest.number, newest.sha256) if newest else (0, None)
                if (version.number - 1, version.previous) != previous:
                    raise _overtaken(version)
                session.add(row)
        except IntegrityError as error:
            raise _overtaken(version) from error

    def history(self) -> list[RosterVersion]:
        """All versions, the first first."""
        with self._store.reading() as session:
            rows = session.scalars(select(RosterRow).order_by(RosterRow.number)).all()
        return [RosterVersion.model_validate_json(row.document) for row in rows]

    def newest(self) -> RosterVersion | None:
        """The roster of now; None before the first."""
        with self._store.reading() as session:
            row = session.scalar(_newest_first())
        return None if row is None else RosterVersion.model_validate_json(row.document)


def certificate_problem(
    member: MemberRow, certificate: CertificateRow, now: datetime
) -> CertificateProblem | None:
    """Return why ``certificate`` does not pass at ``now``, or None when it does."""
    if member.state == "left":
        return "left"
    if member.state == "revoked" or certificate.state == "revoked":
        return "revoked"
    if certificate.state == "replaced":
        ended = certificate.ended_at or certificate.not_before
        if now >= ended:
            return "replaced"
    if now > certificate.not_after:
        return "expired"
    return "early" if now < certificate.not_before else None


def _newest_first() -> Select[RosterRow]:
    return select(RosterRow).order_by(RosterRow.number.desc()).limit(1)


def _overtaken(version: RosterVersion) -> FederationError:
    return FederationError(
        f"roster version {version.number} does not follow the newest one: the roster was changed "
        "meanwhile, look at it and try again"
    )


def _active(name: str) -> Select[MemberRow]:
    return select(MemberRow).where(MemberRow.name == name, MemberRow.state == "active")


def _required(session: Session, name: str) -> MemberRow:
    row = session.scalar(_active(name).with_for_update())
    if row is None:
        raise FederationError(f"no active member is called {name}")
    return row
