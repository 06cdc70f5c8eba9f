"""Who may call what, for how long: rules without IO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import grpc
from cryptography import x509

from fedcmr_server.store.members import CertificateProblem
from fedcmr_shared.governance.governance_pb2 import DESCRIPTOR
from fedcmr_shared.identity.certificates import Role

SERVICE: Final = DESCRIPTOR.services_by_name["Governance"].full_name

LONGEST_CALL_S: Final = 120.0
LONGEST_STREAM_S: Final = 3600.0
"""A call or stream that would wait longer is refused: it would hold a thread for so long."""

ROUNDING: Final = 1.05
"""gRPC rounds the seconds up on their way."""

_SITES: Final[frozenset[Role]] = frozenset({"site"})
_READERS: Final[frozenset[Role]] = frozenset({"auditor", "coordinator"})
_ALL: Final[frozenset[Role]] = _SITES | _READERS

ROLES: Final[Mapping[str, frozenset[Role]]] = {
    f"/{SERVICE}/Renew": _ALL,
    f"/{SERVICE}/GetRoster": _ALL,
    f"/{SERVICE}/ListJobs": _ALL,
    f"/{SERVICE}/PutCheckpoint": _SITES,
    f"/{SERVICE}/ListCheckpoints": _ALL,
    f"/{SERVICE}/PutCosignature": _SITES,
    f"/{SERVICE}/PutReceipt": _SITES,
    f"/{SERVICE}/ListReceipts": _ALL,
    f"/{SERVICE}/Report": frozenset({"site", "auditor"}),
    f"/{SERVICE}/Leave": frozenset({"site", "auditor"}),
    f"/{SERVICE}/PutEvidence": _SITES,
    f"/{SERVICE}/ListEvidence": _READERS,
    f"/{SERVICE}/GetEvidence": _READERS,
    f"/{SERVICE}/ListReleases": _ALL,
    f"/{SERVICE}/GetRelease": _ALL,
}
"""Roles that may call a method; what is not here is refused to everybody."""

OPEN: Final = frozenset({"/grpc.health.v1.Health/Check"})
"""Needs no certificate: it says no more than whether the service runs."""

_CERTIFICATE_PROBLEMS: Final[Mapping[CertificateProblem, str]] = {
    "left": "you left the federation: to come back, ask the coordinator for a new kit",
    "revoked": "the certificate was revoked: ask the coordinator",
    "replaced": "a newer certificate was issued in place of this one: use that",
    "expired": "the certificate has expired: ask the coordinator for a new kit",
    "early": "the certificate is not valid yet: set the clocks",
}


@dataclass(frozen=True)
class Caller:
    """The member behind a call, and the certificate that it showed.

    ``identity`` is its Ed25519 public key (hexadecimal).
    """

    name: str
    role: Role
    identity: str
    certificate: x509.Certificate


class Refused(Exception):
    """A call that ends before its handler; ``reason`` is the word for it in the access log."""

    def __init__(self, code: grpc.StatusCode, reason: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason


def bad_certificate(problem: CertificateProblem) -> Refused:
    """Return the refusal of a known certificate that does not pass."""
    return Refused(grpc.StatusCode.UNAUTHENTICATED, problem, _CERTIFICATE_PROBLEMS[problem])


def require_role(method: str, role: Role) -> None:
    """Return if members in ``role`` may call ``method`` (its full name); Refused if not."""
    if role not in ROLES.get(method, frozenset()):
        raise Refused(
            grpc.StatusCode.PERMISSION_DENIED,
            "role",
            f"{method.rpartition('/')[2]} is not for members in the role {role}",
        )


def require_deadline(remaining_s: float | None, *, streams: bool) -> None:
    """Return if a call with ``remaining_s`` seconds left may begin; Refused if not."""
    longest = LONGEST_STREAM_S if streams else LONGEST_CALL_S
    if remaining_s is None or remaining_s > ROUNDING * longest:
        raise Refused(
            grpc.StatusCode.INVALID_ARGUMENT,
            "deadline",
            f"set a deadline of at most {longest:g} s",
        )
