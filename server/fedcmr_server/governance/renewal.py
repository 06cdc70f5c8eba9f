"""When a member gets a new certificate in place of its present one."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedcmr_server.governance.admission import Caller
from fedcmr_server.home import CoordinatorHome
from fedcmr_server.store import Certificates, Store
from fedcmr_server.store.members import GRACE
from fedcmr_shared.errors import ConfigurationError, FederationError
from fedcmr_shared.identity.certificates import (
    Member,
    certificate_pem,
    days_left,
    issue_member,
    request_key,
)

RENEWAL_DAYS: Final = 60
"""A certificate is renewed once it has no more days left, or for a new key."""

MOST_A_DAY: Final = 5


def require_renewable(days: float, *, new_key: bool, issued_today: int) -> None:
    """Return if a certificate with ``days`` left may be replaced.

    Raises:
        FederationError: it is too early, or so many were issued within a day.
    """
    if issued_today >= MOST_A_DAY:
        raise FederationError(f"{issued_today} certificates were issued within a day: try tomorrow")
    if not new_key and days > RENEWAL_DAYS:
        raise FederationError(
            f"the certificate is good for {days:.0f} more days: it is renewed in its last "
            f"{RENEWAL_DAYS}, or with a new key"
        )


def renew(home: CoordinatorHome, store: Store, caller: Caller, request: str) -> str:
    """Return a new certificate (PEM) for the caller and the key of ``request`` (PEM).

    The present one still passes for a grace period: a lost answer locks nobody out.

    Raises:
        ConfigurationError: the request is none.
        FederationError: it is too early; see `require_renewable`.
    """
    now = datetime.now(UTC)
    key, certificates = request_key(request), Certificates(store)
    issued = [row.not_before for row in certificates.of(caller.name)]
    require_renewable(
        days_left(caller.certificate, now),
        new_key=_key_bytes(key) != _key_bytes(caller.certificate.public_key()),
        issued_today=sum(at > now - timedelta(days=1) for at in issued),
    )
    try:
        authority = home.authority()
    except ConfigurationError as error:  # speaks of the coordinator's own files
        raise RuntimeError("the authority cannot be used") from error
    renewed = issue_member(authority, request, Member(caller.role, caller.name), now)
    certificates.add(caller.name, renewed, replaces_others=True, grace=GRACE)
    return certificate_pem(renewed)


def _key_bytes(key: CertificatePublicKeyTypes) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
