"""Who joins, leaves and is thrown out, and the roster that follows from it.

A name belongs to one member at a time. Keys that were revoked or replaced never come back. Whoever
replaces a member's keys, or lets it come back, says why, and the roster's history keeps it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, Literal

from fedcmr_server.home import CoordinatorHome
from fedcmr_server.store import Certificates, Members, Rosters, Store, Tokens
from fedcmr_server.store.tables import CertificateRow, MemberRow
from fedcmr_shared.errors import FederationError
from fedcmr_shared.identity.certificates import WARNING_DAYS, certificate_pem, issue_member
from fedcmr_shared.identity.enrolment import EnrolmentRequest, StartupKit
from fedcmr_shared.identity.roster import new_roster
from fedcmr_shared.identity.roster_history import RosterVersion, changes, next_version
from fedcmr_shared.schemas.job import FEWEST_SITES

TOKEN_HOURS: Final = 1.0
"""So long a one-time link into the dashboard can be used."""

Entry = Literal["new", "back", "unfinished", "same keys", "new keys"]
"""How a request relates to the members of now; see `entry_of`."""


@dataclass(frozen=True)
class Enrolled:
    """What an enrolment led to; ``roster`` is null unless it changed."""

    kit: StartupKit
    roster: RosterVersion | None


@dataclass(frozen=True)
class Standing:
    """A member and the certificate with which it can act, if it has one."""

    member: MemberRow
    certificate: CertificateRow | None

    def warning(self, now: datetime) -> str | None:
        """What somebody should see to, if there is something."""
        if self.member.state != "active":
            return None
        if self.certificate is None:
            return "no certificate: enrol it again"
        days = (self.certificate.not_after - now) / timedelta(days=1)
        if days < 0:
            return "the certificate has expired: enrol it again with --replace"
        if days < WARNING_DAYS:
            return f"the certificate expires in {days:.0f} days"
        return None


def entry_of(
    request: EnrolmentRequest,
    known: Sequence[MemberRow],
    certified: bool,
    coordinator: str,
    replace: bool,
) -> Entry:
    """Return what enrolling ``request`` means among all who are or were members.

    ``certified`` tells whether the active member of this name has a certificate: without one, an
    enrolment was cut off and may go on. ``replace`` allows what takes something's place.

    Raises:
        FederationError: it may not be enrolled.
    """
    if request.role == "coordinator" or request.name == coordinator:
        raise FederationError(
            f"{request.role} {request.name} is no site or auditor: ask for another"
        )
    _require_own_keys(request, known)
    same_name = [row for row in known if row.name == request.name]
    active = next((row for row in same_name if row.state == "active"), None)
    if active is None:
        back = bool(same_name) and _comes_back(request, same_name[-1])
        if not back:
            _require_fresh_keys(request, same_name)
        if same_name and not replace:
            raise FederationError(
                f"{request.name} was a member before ({same_name[-1].state}) and comes with "
                f"{'the same' if back else 'other'} keys: ask there whether this is right, then "
                "add --replace REASON"
            )
        return "back" if back else "new"
    if active.role != request.role:
        raise FederationError(f"{request.name} is {active.role} already: choose another name")
    if (active.identity, active.node_key) == (request.identity, plain_node_key(request)):
        if certified and not replace:
            raise FederationError(
                f"{request.name} is a member already: for another certificate add --replace REASON"
            )
        return "same keys" if certified else "unfinished"
    _require_fresh_keys(request, same_name)
    if not replace:
        raise FederationError(
            f"{request.name} is a member already, with other keys: ask there whether this is "
            "right, then add --replace REASON"
        )
    return "new keys"


def enrol(
    home: CoordinatorHome, store: Store, request: EnrolmentRequest, replace: str | None = None
) -> Enrolled:
    """Make whoever asks a member, and return what to send back.

    Killed in between, the same call goes on from there. ``replace`` is the reason for which a
    member gets other keys, or another certificate.

    Raises:
        FederationError: it may not be enrolled; see `entry_of`.
    """
    members, certificates = Members(store), Certificates(store)
    certified = any(row.state == "active" for row in certificates.of(request.name))
    entry = entry_of(
        request, members.all(), certified, home.settings.name, replace=replace is not None
    )
    certificate = issue_member(home.authority(), request.certificate_request, request.member)
    if entry == "new keys":
        members.end(request.name, "revoked", f"keys replaced: {replace}")
    if entry in ("new", "new keys"):
        members.add(request.member, request.identity, plain_node_key(request))
    if entry == "back":
        members.bring_back(request.name)
    if entry == "same keys":  # at once: its TLS key may have been stolen
        for row in certificates.of(request.name):
            if row.state != "revoked":
                certificates.revoke(row.serial, f"certificate replaced: {replace}")
    certificates.add(request.name, certificate)
    kit = home.kit(certificate_pem(certificate))
    return Enrolled(kit, propose_roster(home, store, replace))


def end_membership(
    home: CoordinatorHome,
    store: Store,
    name: str,
    state: Literal["revoked", "left"],
    reason: str,
) -> RosterVersion | None:
    """Let a member go: it is refused from its next message on. Return the roster if it changed.

    Raises:
        FederationError: nobody of this name is active.
    """
    Members(store).end(name, state, reason)
    return propose_roster(home, store, reason)


def propose_roster(
    home: CoordinatorHome, store: Store, reason: str | None = None
) -> RosterVersion | None:
    """Make the sites of now the newest roster; None if they are that, or are too few for one."""
    sites = {row.name: row.identity for row in Members(store).active() if row.role == "site"}
    if len(sites) < FEWEST_SITES:
        return None
    history = Rosters(store).history()
    newest = history[-1].roster if history else None
    roster = new_roster(sites)
    changed = "; ".join(changes(newest, roster))
    if not changed:
        return None
    text = f"{changed}: {reason}" if reason else changed
    version = next_version(history, roster, _shortened(text), home.identity())
    Rosters(store).add(version)
    return version


def standings(store: Store) -> list[Standing]:
    """Everybody who is or was a member, with the newest certificate that counts."""
    certificates = Certificates(store)
    found = []
    for member in Members(store).all():
        rows = [row for row in certificates.of(member.name) if row.member_id == member.id]
        found.append(Standing(member, next((r for r in rows if r.state == "active"), None)))
    return found


def dashboard_link(home: CoordinatorHome, store: Store, label: str) -> str:
    """Return a link that opens the dashboard once, within an hour; ``label`` says for whom."""
    token = Tokens(store).issue(label, timedelta(hours=TOKEN_HOURS), datetime.now(UTC))
    return f"{home.address}/login?token={token}"


def plain_node_key(request: EnrolmentRequest) -> str | None:
    """Return the site's node key without the comment, which makes no other key of it."""
    return None if request.node_key is None else " ".join(request.node_key.split()[:2])


def _require_own_keys(request: EnrolmentRequest, known: Sequence[MemberRow]) -> None:
    for row in known:
        if row.name == request.name:
            continue
        for what, ours, theirs in (
            ("identity key", request.identity, row.identity),
            ("node key", plain_node_key(request), row.node_key),
        ):
            if ours is not None and ours == theirs:
                raise FederationError(
                    f"the {what} of {request.name} is or was that of {row.name}: "
                    "each member draws its own, ask for a new request"
                )


def _comes_back(request: EnrolmentRequest, last: MemberRow) -> bool:
    """Whether a member that left has come again with all its keys, and so with its ledger."""
    asked = request.role, request.identity, plain_node_key(request)
    return last.state == "left" and asked == (last.role, last.identity, last.node_key)


def _require_fresh_keys(request: EnrolmentRequest, before: Sequence[MemberRow]) -> None:
    old = {row.identity for row in before} | {row.node_key for row in before if row.node_key}
    if request.identity in old or plain_node_key(request) in old:
        raise FederationError(
            f"{request.name} comes with a key of an earlier membership that was revoked or "
            "replaced: such keys never come back, ask for a request with new ones"
        )


def _shortened(text: str) -> str:
    return text if len(text) <= 500 else f"{text[:499]}…"
