"""What a member and the coordinator hand each other when the member joins.

The member sends a request, the coordinator answers with a startup kit. Neither holds a secret, so
both may travel by mail; each side reads the other's fingerprint out on the telephone before it
believes the file.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Final, Literal, Self, TypeVar

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedcmr_shared.errors import ConfigurationError, LedgerError
from fedcmr_shared.identity.certificates import (
    Member,
    Role,
    is_issued_by,
    member_of,
    read_certificate,
    request_key,
    spoken,
)
from fedcmr_shared.identity.keys import SiteKey, verify_signature
from fedcmr_shared.schemas.canonical import canonical_json
from fedcmr_shared.schemas.ledger import Hash
from fedcmr_shared.schemas.policy import SiteName
from fedcmr_shared.schemas.problems import problems

_FROZEN = ConfigDict(frozen=True, extra="forbid")
_LONGEST: Final = 65_536  # bytes of a request or kit

_Content = TypeVar("_Content", bound=BaseModel)

Signature = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
Host = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.:-]{0,251}[A-Za-z0-9])?$")]


class EnrolmentRequest(BaseModel):
    """What a member asks the coordinator to sign; its keys' public halves alone.

    ``identity`` is the Ed25519 key that signs the member's ledger and its part in secure sums;
    ``node_key`` the key (OpenSSH) by which Flower knows the site. The identity signs the rest.
    """

    model_config = _FROZEN

    format: Literal["fedcmr-request-1"] = "fedcmr-request-1"
    role: Role
    name: SiteName
    identity: Hash
    certificate_request: str
    node_key: str | None = None
    signature: Signature

    @classmethod
    def sign(
        cls, member: Member, identity: SiteKey, certificate_request: str, node_key: str | None
    ) -> Self:
        """Return the request of ``member``, signed by its identity."""
        values = {
            "format": "fedcmr-request-1",
            "role": member.role,
            "name": member.name,
            "identity": identity.public_key,
            "certificate_request": certificate_request,
            "node_key": node_key,
        }
        signature = identity.sign(_signed("enrolment request", values))
        return cls.model_validate({**values, "signature": signature})

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.role == "site") != (self.node_key is not None):
            raise ValueError("node_key: a site has one, others have none")
        if self.node_key is not None:
            _require_node_key(self.node_key)
        try:
            request_key(self.certificate_request)
            content = self.model_dump(mode="json", exclude={"signature"})
            verify_signature(self.identity, self.signature, _signed("enrolment request", content))
        except (ConfigurationError, LedgerError) as error:
            raise ValueError(str(error)) from error
        return self

    @property
    def member(self) -> Member:
        """Who asks."""
        return Member(self.role, self.name)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the whole request, in groups of four digits to be read out."""
        return spoken(hashlib.sha256(canonical_json(self.model_dump(mode="json"))).hexdigest())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a request file; ConfigurationError when it is none, altered or not signed."""
        return _read(cls, path, "enrolment request")


class StartupKit(BaseModel):
    """What a member needs to reach the coordinator and to recognise it.

    ``coordinator_key`` (Ed25519) signs jobs, rosters and releases.
    """

    model_config = _FROZEN

    format: Literal["fedcmr-kit-1"] = "fedcmr-kit-1"
    federation: SiteName
    coordinator: SiteName
    coordinator_key: Hash
    host: Host
    port: Annotated[int, Field(ge=1, le=65535)]
    authority: str
    certificate: str

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            certificate = read_certificate(self.certificate)
            member_of(certificate)
            if not is_issued_by(certificate, read_certificate(self.authority)):
                raise ValueError("certificate: the kit's authority did not sign it")
        except ConfigurationError as error:
            raise ValueError(str(error)) from error
        return self

    @property
    def member(self) -> Member:
        """Whose kit it is."""
        return member_of(read_certificate(self.certificate))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what is the same in every member's kit, in groups of four digits.

        All members of a federation see the same one, and so does the coordinator.
        """
        same = self.model_dump(mode="json", exclude={"certificate"})
        return spoken(hashlib.sha256(canonical_json(same)).hexdigest())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a kit; ConfigurationError when it is none or does not fit together."""
        return _read(cls, path, "startup kit")


def file_text(content: EnrolmentRequest | StartupKit) -> str:
    """Return the content of a request or kit file."""
    return json.dumps(content.model_dump(mode="json"), indent=1) + "\n"


def _signed(what: str, values: object) -> bytes:
    return f"fedcmr {what} 1\n".encode() + canonical_json(values)


def _require_node_key(text: str) -> None:
    try:
        key = load_ssh_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ValueError("node_key is no public key of OpenSSH") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError("node_key is not ECDSA, which Flower needs")  # noqa: TRY004  # for pydantic


def _read(kind: type[_Content], path: Path, what: str) -> _Content:
    try:
        with path.open("rb") as file:
            text = file.read(_LONGEST + 1)
    except OSError as error:
        raise ConfigurationError(f"{what} {path} cannot be read: {error.strerror}") from error
    if len(text) > _LONGEST:
        raise ConfigurationError(f"{path} is no {what}: it is larger than {_LONGEST} bytes")
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise ConfigurationError(
            f"{what} {path}: {problems(error)}: ask for the file again"
        ) from error
