"""A coordinator with its governance service on a socket, and members with certificates."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedcmr_client.governance import Governance
from fedcmr_server.governance import serve
from fedcmr_server.home import CoordinatorHome, CoordinatorSettings
from fedcmr_server.members import propose_roster
from fedcmr_server.store import Certificates, Members, Store
from fedcmr_shared.governance.governance_pb2_grpc import GovernanceStub
from fedcmr_shared.identity.certificates import (
    Authority,
    Member,
    PrivateKey,
    Role,
    certificate_pem,
    certificate_request,
    issue_member,
    new_key,
    read_certificate,
)
from fedcmr_shared.identity.keys import SiteKey
from fedcmr_shared.privacy.merkle import MerkleTree, leaf_hash
from fedcmr_shared.schemas.ledger import Checkpoint

SITES = ("alder", "birch", "cedar")
DEADLINE_S = 60.0

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Party:
    """A member with all of its keys."""

    member: Member
    identity: SiteKey
    key: PrivateKey
    certificate: str

    @property
    def name(self) -> str:
        return self.member.name

    @property
    def metadata(self) -> Metadata:
        """What the gateway would write."""
        return shown(self.certificate)


def shown(certificate: str) -> Metadata:
    return (("x-fedcmr-certificate", quote(certificate)),)


def draw_identity() -> SiteKey:
    return SiteKey(Ed25519PrivateKey.generate())


def issue(
    authority: Authority, member: Member, key: PrivateKey, now: datetime | None = None
) -> str:
    return certificate_pem(issue_member(authority, certificate_request(key, member), member, now))


@dataclass(frozen=True)
class Coordinator:
    """A running service and its database."""

    home: CoordinatorHome
    store: Store
    server: grpc.Server
    target: str

    def join(
        self,
        name: str,
        role: Role = "site",
        identity: SiteKey | None = None,
        now: datetime | None = None,
        node_key: str | None = None,
    ) -> Party:
        """Make a member, with a certificate of time ``now``; of the node key nothing is asked."""
        member, identity, key = Member(role, name), identity or draw_identity(), new_key()
        node_key = (node_key or f"node-key-of-{name}") if role == "site" else None
        Members(self.store).add(member, identity.public_key, node_key)
        return self.certify(Party(member, identity, key, ""), now)

    def certify(self, party: Party, now: datetime | None = None) -> Party:
        """Return ``party`` with a further certificate."""
        pem = issue(self.home.authority(), party.member, party.key, now)
        Certificates(self.store).add(party.name, read_certificate(pem))
        return Party(party.member, party.identity, party.key, pem)

    def roster(self) -> None:
        """Make the sites of now the roster."""
        assert propose_roster(self.home, self.store) is not None

    @contextmanager
    def stub(self) -> Iterator[Any]:
        """A bare client."""
        options = [("grpc.max_send_message_length", -1)]
        with grpc.insecure_channel(self.target, options=options) as channel:
            yield GovernanceStub(channel)  # type: ignore[no-untyped-call]

    def as_member(self, party: Party) -> Governance:
        """The client of ``party``; it waits for nothing."""
        return Governance(self.target, party.metadata, wait=lambda _: None)


@contextmanager
def coordinator() -> Iterator[Coordinator]:
    """Run a service without members, in a folder of its own."""
    # Not tmp_path: a socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="gov") as name:
        settings = CoordinatorSettings(federation="hearts", host="localhost")
        home = CoordinatorHome.create(Path(name) / "c", settings)
        with home.store() as store:
            server = serve(home, store, home.governance_socket)
            try:
                yield Coordinator(home, store, server, f"unix:{home.governance_socket}")
            finally:
                server.stop(None).wait()


class History:
    """A log of a site that need not keep any rule."""

    def __init__(self, site: str, identity: SiteKey, words: str = "") -> None:
        self.site = site
        self.identity = identity
        self._leaves = [leaf_hash(f"{site} {number} {words}".encode()) for number in range(100)]

    def head(self, size: int, **changes: Any) -> Checkpoint:
        """The signed head of the first ``size`` leaves."""
        root = MerkleTree(self._leaves).root(size).hex()
        values = {"site": self.site, "size": size, "root": root, "at": 1000 * size} | changes
        unsigned = Checkpoint(**values, signature="0" * 128)
        signature = self.identity.sign(unsigned.signed_bytes())
        return unsigned.model_copy(update={"signature": signature})

    def proof(self, old: int, new: int) -> Sequence[bytes]:
        """The proof that the log only grew."""
        return MerkleTree(self._leaves).consistency_proof(old, new) if old else []


def long_ago(days: float) -> datetime:
    """A moment ``days`` before now."""
    return datetime.now(UTC) - timedelta(days=days)
