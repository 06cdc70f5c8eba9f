"""A member's place in a federation: its keys, its request, and the kit that answered it.

::

    federation/        0700
    ├── tls.key        key of the certificate; 0600, never copied
    ├── tls.key.next   the key that is to take its place, until there is a certificate for it
    ├── node.key       key by which Flower knows the site (OpenSSH); sites only, 0600
    ├── request.json   what was asked for; there once all keys are
    ├── authority.pem, certificate.pem   from the kit, as TLS libraries want them
    ├── kit.json       the kit; there once the member has joined
    └── left.json      when the member left

The kit's authority and coordinator key are pinned by the first kit: no later one replaces them.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from fedcmr_client.ledger.place import make_folder, write_durably
from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.identity.certificates import (
    Member,
    PrivateKey,
    certificate_pem,
    certificate_request,
    days_left,
    fingerprint,
    fits_key,
    is_issued_by,
    key_pem,
    member_of,
    read_certificate,
    read_key,
)
from fedcmr_shared.identity.certificates import new_key as draw_key
from fedcmr_shared.identity.enrolment import EnrolmentRequest, StartupKit, file_text

if TYPE_CHECKING:
    from fedcmr_client.tunnel import Credentials, Proxy, Route
    from fedcmr_shared.identity.keys import SiteKey

FOLDER: Final = "federation"
"""Name of a site's member folder, beside its policy."""

State = Literal["absent", "asked", "joined", "left"]
"""How far a member is."""


@dataclass(frozen=True)
class Membership:
    """What ``folder`` holds; every question reads the files anew, as another process may renew."""

    folder: Path

    @classmethod
    def create(
        cls, folder: Path, member: Member, identity: SiteKey, *, with_node_key: bool
    ) -> EnrolmentRequest:
        """Draw the keys and write the request that the coordinator is to sign.

        An attempt that broke off before the request was written is started again: nobody has
        seen its keys.

        Raises:
            ConfigurationError: there is a request already, or the folder cannot be written.
        """
        made = cls(folder)
        if made.state != "absent":
            raise ConfigurationError(
                f"{folder} holds a request already: send {made.request_path}, or move the folder "
                "away to ask anew"
            )
        key = draw_key()
        node = ec.generate_private_key(ec.SECP384R1()) if with_node_key else None
        asked = EnrolmentRequest.sign(
            member, identity, certificate_request(key, member), _public(node) if node else None
        )
        files = {made.key_path: key_pem(key)}
        if node is not None:
            files[made.node_key_path] = node.private_bytes(
                Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()
            )
        _write({**files, made.request_path: file_text(asked).encode()})
        return asked

    @property
    def state(self) -> State:
        """Whether the keys were made, the kit was taken, and the member stayed."""
        if self._left_path.exists():
            return "left"
        if self._kit_path.exists():
            return "joined"
        return "asked" if self.request_path.exists() else "absent"

    @property
    def request(self) -> EnrolmentRequest:
        """The request; ConfigurationError when there is none."""
        if not self.request_path.exists():
            raise ConfigurationError(
                f"{self.folder} holds no keys for a federation: make them with `fedcmr site request`"
            )
        return EnrolmentRequest.read(self.request_path)

    @property
    def member(self) -> Member:
        """Whose folder it is; ConfigurationError when there is no request."""
        return self.request.member

    @property
    def kit(self) -> StartupKit:
        """The kit, pinned at joining; ConfigurationError when the member has not joined."""
        if not self._kit_path.exists():
            raise ConfigurationError(
                f"{self.folder}: not joined yet: send {self.request_path.name} to the "
                "coordinator, then run `fedcmr site join KIT` with the file that comes back"
            )
        return StartupKit.read(self._kit_path)

    @property
    def pinned(self) -> tuple[str, str]:
        """SHA-256 of the authority's certificate, and the coordinator's public key.

        Raises:
            ConfigurationError: the member has not joined.
        """
        return _pinned(self.kit)

    @property
    def certificate(self) -> x509.Certificate:
        """The newest certificate; ConfigurationError when the member has not joined."""
        kit = self.kit
        try:
            certificate = read_certificate(self.certificate_path.read_bytes())
        except OSError as error:
            message = f"{self.certificate_path} cannot be read ({error.strerror})"
            raise ConfigurationError(f"{message}: join with the kit again") from error
        self._finish_key_change(certificate)
        self._require_mine(certificate, read_certificate(kit.authority), "certificate.pem")
        return certificate

    @property
    def key(self) -> PrivateKey:
        """The certificate's private key; ConfigurationError when it cannot be read."""
        try:
            return read_key(self.key_path.read_bytes())
        except OSError as error:
            message = f"{self.key_path} cannot be read ({error.strerror})"
            raise ConfigurationError(f"{message}: restore it from backup") from error
        except ConfigurationError as error:
            raise ConfigurationError(f"{self.key_path}: {error}") from error

    @property
    def left_at(self) -> datetime | None:
        """When the member left, or None."""
        try:
            content = json.loads(self._left_path.read_bytes())
            return datetime.fromisoformat(content["at"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(
                f"{self._left_path} is damaged: remove or restore it"
            ) from error

    def check_kit(self, kit: StartupKit) -> None:
        """Return if `join` would take ``kit``.

        Raises:
            ConfigurationError: it is for another member or key, has expired, or is of another
                federation than the one that was joined.
        """
        asked = self.request
        if kit.member != asked.member:
            raise ConfigurationError(
                f"the kit is for {kit.member.role} {kit.member.name}, but this is "
                f"{asked.role} {asked.name}: ask the coordinator for your own"
            )
        certificate = read_certificate(kit.certificate)
        self._require_mine(certificate, read_certificate(kit.authority), "the kit")
        if days_left(certificate) <= 0:
            raise ConfigurationError(
                f"the kit expired on {certificate.not_valid_after_utc:%Y-%m-%d}: ask the "
                "coordinator for a new one, or set this machine's clock"
            )
        if self._kit_path.exists() and _pinned(kit) != self.pinned:
            raise ConfigurationError(
                f"{self.folder} belongs to federation {self.kit.federation} with another "
                "authority or coordinator key: a member folder serves one federation; to join "
                "another one move the folder away and ask anew"
            )

    def join(self, kit: StartupKit) -> None:
        """Pin the federation of ``kit`` and take its certificate; undoes `leave`.

        A later kit of the same federation may bring a new certificate or address.

        Raises:
            ConfigurationError: see `check_kit`; or the folder cannot be written.
        """
        self.check_kit(kit)
        _write(
            {
                self.authority_path: kit.authority.encode(),
                self.certificate_path: kit.certificate.encode(),
                self._kit_path: file_text(kit).encode(),  # last: now the member has joined
            }
        )
        self._left_path.unlink(missing_ok=True)

    @property
    def changing_key(self) -> bool:
        """Whether a new key waits for its certificate."""
        return self._next_key_path.exists()

    def renewal_request(self, *, new_key: bool = False) -> str:
        """Return a certificate request (PEM) for the same name, and the same or a new key.

        A new key is kept aside until `replace_certificate` brings its certificate.
        """
        if not new_key:
            return certificate_request(self.key, self.member)
        drawn = draw_key()
        _write({self._next_key_path: key_pem(drawn)})
        return certificate_request(drawn, self.member)

    def write_request(self, identity: SiteKey) -> None:
        """Write the request anew, for the present key: a later kit is to fit that one.

        Raises:
            ConfigurationError: the folder cannot be written.
        """
        asked = self.request
        signed = certificate_request(self.key, self.member)
        again = EnrolmentRequest.sign(self.member, identity, signed, asked.node_key)
        _write({self.request_path: file_text(again).encode()})

    def replace_certificate(self, pem: str) -> None:
        """Take a renewed certificate; connections made from now on show it.

        Raises:
            ConfigurationError: it is of another authority, for another key or member, expires
                before the present one, or cannot be written.
        """
        renewed, present = read_certificate(pem), self.certificate
        key = self._next_key(renewed) or self.key
        authority = read_certificate(self.kit.authority)
        self._require_mine(renewed, authority, "the renewed certificate", key)
        if member_of(renewed) != self.member:
            raise ConfigurationError("the renewed certificate names another member: keep the old")
        if renewed.not_valid_after_utc < present.not_valid_after_utc:
            raise ConfigurationError("the renewed certificate ends before the present: keep that")
        _write({self.certificate_path: certificate_pem(renewed).encode()})
        self._finish_key_change(renewed)

    def leave(self, now: datetime | None = None) -> None:
        """Mark that the member left: its agent no longer starts; keys and kit are kept."""
        at = (now or datetime.now(UTC)).isoformat(timespec="seconds")
        _write({self._left_path: json.dumps({"at": at}).encode()})

    def require_joined(self, now: datetime | None = None) -> None:
        """Return if the member can connect.

        Raises:
            ConfigurationError: it has not joined, has left, or its certificate has expired.
        """
        certificate = self.certificate
        left = self.left_at
        if left is not None:
            raise ConfigurationError(
                f"this site left the federation on {left:%Y-%m-%d}: to come back, ask the "
                "coordinator for a kit and run `fedcmr site join KIT`"
            )
        if days_left(certificate, now) <= 0:
            raise ConfigurationError(
                f"{self.certificate_path} expired on {certificate.not_valid_after_utc:%Y-%m-%d}: "
                f"ask the coordinator for a new kit for {self.request_path.name} and run "
                "`fedcmr site join KIT`; if the date is to come, set this machine's clock"
            )

    def require_of(self, site: str, identity: SiteKey) -> None:
        """Return if the request is that of ``site`` with ``identity``.

        Raises:
            ConfigurationError: it was made for another name, or before the ledger was made anew.
        """
        asked = self.request
        if (asked.name, asked.identity) != (site, identity.public_key):
            raise ConfigurationError(
                f"{self.request_path} is of another site or ledger key than the policy: move "
                f"{self.folder} away and run `fedcmr site request`"
            )

    def credentials(self) -> Credentials:
        """Return the files for connections; ConfigurationError when the member has not joined."""
        from fedcmr_client.tunnel import Credentials

        _ = self.certificate
        return Credentials(self.authority_path, self.certificate_path, self.key_path)

    def route(self, proxy: Proxy | None) -> Route:
        """Return the way to the coordinator; ConfigurationError when the member has not joined."""
        from fedcmr_client.tunnel import Route

        kit = self.kit
        return Route(kit.host, kit.port, proxy)

    @property
    def key_path(self) -> Path:
        """File of the certificate's key."""
        return self.folder / "tls.key"

    @property
    def node_key_path(self) -> Path:
        """File of the site's Flower key."""
        return self.folder / "node.key"

    @property
    def request_path(self) -> Path:
        """File to send to the coordinator."""
        return self.folder / "request.json"

    @property
    def authority_path(self) -> Path:
        """File of the authority's certificate."""
        return self.folder / "authority.pem"

    @property
    def certificate_path(self) -> Path:
        """File of the member's certificate."""
        return self.folder / "certificate.pem"

    @property
    def _kit_path(self) -> Path:
        return self.folder / "kit.json"

    @property
    def _left_path(self) -> Path:
        return self.folder / "left.json"

    @property
    def _next_key_path(self) -> Path:
        return self.folder / "tls.key.next"

    def _next_key(self, certificate: x509.Certificate) -> PrivateKey | None:
        """The new key, if it is the one that ``certificate`` is for."""
        try:
            key = read_key(self._next_key_path.read_bytes())
        except (OSError, ConfigurationError):
            return None
        return key if fits_key(certificate, key) else None

    def _finish_key_change(self, certificate: x509.Certificate) -> None:
        """Let a new key take its place once its certificate has, also after a crash in between."""
        if self._next_key(certificate) is None:
            return
        try:
            os.replace(self._next_key_path, self.key_path)
        except OSError as error:
            raise ConfigurationError(f"{self.key_path}: {error.strerror}: free the disk") from error

    def _require_mine(
        self,
        certificate: x509.Certificate,
        authority: x509.Certificate,
        what: str,
        key: PrivateKey | None = None,
    ) -> None:
        if not is_issued_by(certificate, authority):
            raise ConfigurationError(f"{what}: the federation's authority did not sign it")
        if not fits_key(certificate, key or self.key):
            raise ConfigurationError(
                f"{what}: the certificate is not for the key in {self.key_path}: it answers "
                f"another request; send {self.request_path} to the coordinator"
            )


def _pinned(kit: StartupKit) -> tuple[str, str]:
    return fingerprint(read_certificate(kit.authority)), kit.coordinator_key


def _public(key: ec.EllipticCurvePrivateKey) -> str:
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def _write(files: dict[Path, bytes]) -> None:
    """Write ``files`` of one folder one after another, each to last."""
    for path, content in files.items():
        try:
            make_folder(path.parent)
            path.parent.chmod(0o700)  # also a folder that somebody else made
            write_durably(path, content)
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be written: {error.strerror}") from error
