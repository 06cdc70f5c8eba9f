"""A coordinator's folder, and members with keys and certificates, for tests of the coordinator."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from fedcmr_server.home import CoordinatorHome, CoordinatorSettings
from fedcmr_server.members import Enrolled, enrol
from fedcmr_server.store import Store
from fedcmr_shared.identity.certificates import (
    Authority,
    Member,
    Role,
    certificate_pem,
    certificate_request,
    key_pem,
    new_key,
)
from fedcmr_shared.identity.enrolment import EnrolmentRequest
from fedcmr_shared.identity.keys import SiteKey


def new_home(folder: Path, **settings: Any) -> CoordinatorHome:
    """Make a coordinator's folder whose public address is the loopback."""
    values = {"federation": "heart", "host": "127.0.0.1", "listen": "127.0.0.1", **settings}
    return CoordinatorHome.create(folder, CoordinatorSettings.model_validate(values))


@dataclass(frozen=True)
class Party:
    """Somebody with keys; its certificate is there once it was enrolled."""

    folder: Path
    request: EnrolmentRequest

    @classmethod
    def make(cls, folder: Path, name: str, role: Role = "site") -> Self:
        """Draw keys and write a request."""
        folder.mkdir(parents=True)
        member, key, node = Member(role, name), new_key(), ec.generate_private_key(ec.SECP384R1())
        (folder / "tls.key").write_bytes(key_pem(key))
        (folder / "node.key").write_bytes(
            node.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        )
        public = node.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
        request = EnrolmentRequest.sign(
            member,
            SiteKey.create(folder / "identity.pem"),
            certificate_request(key, member),
            public if role == "site" else None,
        )
        return cls(folder, request)

    @property
    def name(self) -> str:
        """The member's name."""
        return self.request.name

    def join(self, home: CoordinatorHome, store: Store, replace: str | None = None) -> Enrolled:
        """Have the coordinator enrol the party, and keep its certificate."""
        enrolled = enrol(home, store, self.request, replace)
        self.take(enrolled.kit.certificate)
        return enrolled

    def take(self, certificate: str) -> None:
        """Keep a certificate (PEM)."""
        (self.folder / "certificate.pem").write_text(certificate)

    def context(self, authority: Authority) -> ssl.SSLContext:
        """Return what it speaks TLS with; it shows its certificate if it has one."""
        made = ssl.create_default_context(cadata=certificate_pem(authority.certificate))
        if (self.folder / "certificate.pem").exists():
            made.load_cert_chain(self.folder / "certificate.pem", self.folder / "tls.key")
        return made
