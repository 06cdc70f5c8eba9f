"""The federation's certificates (X.509, RFC 5280): an authority signs what members ask for.

A member's certificate names it twice: as common name for people, and as the URI
``urn:fedcmr:ROLE:NAME`` for programs. Keys are ECDSA on P-256, which every TLS library takes.
Certificates are no root of trust for results: those rest on the Ed25519 keys of the roster.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, Literal, get_args

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedcmr_shared.errors import ConfigurationError

Role = Literal["site", "auditor", "coordinator"]
"""What a member may do: take part, read evidence, or run the federation."""

AUTHORITY_DAYS: Final = 3650
MEMBER_DAYS: Final = 365
WARNING_DAYS: Final = 30
"""An expiry so near is announced."""

_CLOCK_SLACK: Final = timedelta(minutes=5)  # new certificates are valid on clocks that lag
_URI: Final = re.compile(r"urn:fedcmr:([a-z]+):(.+)")

PrivateKey = ec.EllipticCurvePrivateKey


@dataclass(frozen=True)
class Member:
    """Whose certificate it is."""

    role: Role
    name: str


@dataclass(frozen=True)
class Authority:
    """The key and certificate that sign all others of a federation."""

    key: PrivateKey
    certificate: x509.Certificate


def new_key() -> PrivateKey:
    """Draw a key."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: PrivateKey) -> bytes:
    """Return a key as PKCS #8 in PEM, not encrypted: the file's permissions protect it."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def read_key(pem: bytes) -> PrivateKey:
    """Read a key that `key_pem` wrote.

    Raises:
        ConfigurationError: it is no such key.
    """
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigurationError("not a private key in PEM: restore it from backup") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigurationError("not an ECDSA key: restore it from backup")
    return key


def certificate_pem(certificate: x509.Certificate) -> str:
    """Return a certificate in PEM."""
    return certificate.public_bytes(Encoding.PEM).decode()


def read_certificate(pem: str | bytes) -> x509.Certificate:
    """Read a certificate in PEM.

    Raises:
        ConfigurationError: it is none.
    """
    try:
        return x509.load_pem_x509_certificate(pem.encode() if isinstance(pem, str) else pem)
    except ValueError as error:
        raise ConfigurationError("not a certificate in PEM") from error


def new_authority(federation: str, now: datetime | None = None) -> Authority:
    """Make the authority of a new federation."""
    key = new_key()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"FedCMR {federation}")])
    builder = _builder(name, name, key.public_key(), AUTHORITY_DAYS, now)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    builder = builder.add_extension(
        x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
    )
    return Authority(key, builder.sign(key, SHA256()))


def certificate_request(key: PrivateKey, member: Member) -> str:
    """Return the request (PKCS #10, PEM) with which a member asks for its certificate."""
    request = x509.CertificateSigningRequestBuilder(
        subject_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, member.name)])
    ).add_extension(x509.SubjectAlternativeName([_uri(member)]), critical=False)
    return request.sign(key, SHA256()).public_bytes(Encoding.PEM).decode()


def issue_member(
    authority: Authority, request_pem: str, member: Member, now: datetime | None = None
) -> x509.Certificate:
    """Sign a member's request; of the request only the key is taken over.

    Raises:
        ConfigurationError: the request is malformed, not signed by its own key, or the key is not
            on P-256.
    """
    public = request_key(request_pem)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, member.name)])
    builder = _builder(subject, authority.certificate.subject, public, MEMBER_DAYS, now)
    return _issue(authority, builder, [_uri(member)], ExtendedKeyUsageOID.CLIENT_AUTH)


def issue_server(
    authority: Authority, key: PrivateKey, hosts: Sequence[str], now: datetime | None = None
) -> x509.Certificate:
    """Sign the certificate that the coordinator shows under its host names and IP addresses."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    issuer = authority.certificate.subject
    builder = _builder(subject, issuer, key.public_key(), MEMBER_DAYS, now)
    return _issue(authority, builder, [_host(host) for host in hosts], _SERVER)


def request_key(request_pem: str) -> ec.EllipticCurvePublicKey:
    """Return the key of a request that its owner signed.

    Raises:
        ConfigurationError: the request is malformed, not signed by its own key, or the key is not
            on P-256.
    """
    try:
        request = x509.load_pem_x509_csr(request_pem.encode())
        if not request.is_signature_valid:
            raise ConfigurationError("the certificate request is not signed by its own key")
        public = request.public_key()
    except (ValueError, InvalidSignature, UnsupportedAlgorithm) as error:
        raise ConfigurationError("not a certificate request in PEM") from error
    if not isinstance(public, ec.EllipticCurvePublicKey) or public.curve.name != "secp256r1":
        raise ConfigurationError("the certificate request's key is not on the curve P-256")
    return public


def member_of(certificate: x509.Certificate) -> Member:
    """Return whose certificate it is.

    Raises:
        ConfigurationError: it is no member's.
    """
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (x509.ExtensionNotFound, ValueError) as error:
        raise ConfigurationError("the certificate names no member of a federation") from error
    match = _URI.fullmatch(uris[0]) if len(uris) == 1 else None
    for role in get_args(Role):
        if match is not None and match[1] == role:
            return Member(role, match[2])
    raise ConfigurationError("the certificate names no member of a federation")


def is_issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether ``authority`` signed ``certificate``."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def fits_key(certificate: x509.Certificate, key: PrivateKey) -> bool:
    """Whether ``certificate`` is for ``key``."""
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return certificate.public_key().public_bytes(*form) == key.public_key().public_bytes(*form)


def fingerprint(certificate: x509.Certificate) -> str:
    """Return the SHA-256 (hexadecimal) of a certificate."""
    return certificate.fingerprint(SHA256()).hex()


def serial(certificate: x509.Certificate) -> str:
    """Return the serial number, hexadecimal."""
    return f"{certificate.serial_number:x}"


def days_left(certificate: x509.Certificate, now: datetime | None = None) -> float:
    """Return days until the certificate expires; negative afterwards."""
    return (certificate.not_valid_after_utc - (now or datetime.now(UTC))) / timedelta(days=1)


def spoken(digits: str) -> str:
    """Return hexadecimal digits in groups of four, to be read out on the telephone."""
    return " ".join(digits[at : at + 4] for at in range(0, len(digits), 4))


_SERVER: Final = ExtendedKeyUsageOID.SERVER_AUTH


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    days: int,
    now: datetime | None,
) -> x509.CertificateBuilder:
    now = now or datetime.now(UTC)
    return x509.CertificateBuilder(
        subject_name=subject,
        issuer_name=issuer,
        public_key=public,
        serial_number=x509.random_serial_number(),
        not_valid_before=now - _CLOCK_SLACK,
        not_valid_after=now + timedelta(days=days),
    )


def _issue(
    authority: Authority,
    builder: x509.CertificateBuilder,
    names: Sequence[x509.GeneralName],
    use: x509.ObjectIdentifier,
) -> x509.Certificate:
    signer = authority.key.public_key()
    extensions: list[tuple[x509.ExtensionType, bool]] = [
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_usage(signs_certificates=False), True),
        (x509.ExtendedKeyUsage([use]), False),
        (x509.SubjectAlternativeName(names), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), False),
    ]
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return builder.sign(authority.key, SHA256())


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _uri(member: Member) -> x509.UniformResourceIdentifier:
    return x509.UniformResourceIdentifier(f"urn:fedcmr:{member.role}:{member.name}")


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
