"""Certificates name their member, fit their key and stand under one authority alone."""

from __future__ import annotations

import re
import subprocess
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.identity.certificates import (
    MEMBER_DAYS,
    Member,
    certificate_pem,
    certificate_request,
    days_left,
    fingerprint,
    fits_key,
    is_issued_by,
    issue_member,
    issue_server,
    key_pem,
    member_of,
    new_authority,
    new_key,
    read_certificate,
    read_key,
    request_key,
    serial,
    spoken,
)

AUTHORITY = new_authority("heart")
ALDER = Member("site", "alder")
KEY = new_key()
CERTIFICATE = issue_member(AUTHORITY, certificate_request(KEY, ALDER), ALDER)


def store() -> Store:
    return Store([AUTHORITY.certificate])


def test_a_certificate_names_its_member_and_fits_its_key_alone() -> None:
    assert member_of(CERTIFICATE) == ALDER
    assert fits_key(CERTIFICATE, KEY)
    assert not fits_key(CERTIFICATE, new_key())
    assert is_issued_by(CERTIFICATE, AUTHORITY.certificate)
    assert not is_issued_by(CERTIFICATE, new_authority("heart").certificate)
    assert MEMBER_DAYS - 1 < days_left(CERTIFICATE) <= MEMBER_DAYS  # it is as old as this module


def test_an_independent_verifier_takes_it_as_a_client_only() -> None:
    verified = PolicyBuilder().store(store()).build_client_verifier().verify(CERTIFICATE, [])
    assert verified.chain == [CERTIFICATE, AUTHORITY.certificate]
    server = PolicyBuilder().store(store()).build_server_verifier(x509.DNSName("alder"))
    with pytest.raises(VerificationError):
        server.verify(CERTIFICATE, [])


def test_a_server_certificate_is_for_its_names() -> None:
    certificate = issue_server(AUTHORITY, KEY, ["heart.example", "192.0.2.7"])
    for name in (x509.DNSName("heart.example"), x509.IPAddress(ip_address("192.0.2.7"))):
        PolicyBuilder().store(store()).build_server_verifier(name).verify(certificate, [])
    other = PolicyBuilder().store(store()).build_server_verifier(x509.DNSName("other"))
    with pytest.raises(VerificationError):
        other.verify(certificate, [])
    with pytest.raises(ConfigurationError, match="names no member"):
        member_of(certificate)


def test_of_a_request_only_the_key_counts() -> None:
    """A request that asks for another role or name gets what the coordinator wrote."""
    asked = certificate_request(KEY, Member("coordinator", "root"))
    assert member_of(issue_member(AUTHORITY, asked, ALDER)) == ALDER


def test_requests_without_a_usable_key_or_own_signature_are_refused() -> None:
    subject = x509.Name([])
    builder = x509.CertificateSigningRequestBuilder(subject_name=subject)
    for key in (ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP384R1())):
        algorithm = SHA256() if isinstance(key, ec.EllipticCurvePrivateKey) else None
        request = builder.sign(key, algorithm).public_bytes(Encoding.PEM).decode()
        with pytest.raises(ConfigurationError, match="P-256"):
            request_key(request)
    with pytest.raises(ConfigurationError, match="not a certificate request"):
        request_key("no request")
    good = x509.load_pem_x509_csr(certificate_request(KEY, ALDER).encode())
    altered = good.public_bytes(Encoding.DER).replace(b"alder", b"birch")
    text = x509.load_der_x509_csr(altered).public_bytes(Encoding.PEM).decode()
    with pytest.raises(ConfigurationError, match="not signed by its own key"):
        request_key(text)


def test_keys_and_certificates_survive_their_files() -> None:
    assert key_pem(read_key(key_pem(KEY))) == key_pem(KEY)
    assert read_certificate(certificate_pem(CERTIFICATE)) == CERTIFICATE
    for wrong in (b"", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"):
        with pytest.raises(ConfigurationError, match="not a private key"):
            read_key(wrong)
        with pytest.raises(ConfigurationError, match="not a certificate"):
            read_certificate(wrong)


def test_another_kind_of_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    command = ["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(path)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    with pytest.raises(ConfigurationError, match="not an ECDSA key"):
        read_key(path.read_bytes())


def test_expiry_counts_from_the_day_of_issue() -> None:
    now = datetime(2030, 1, 1, tzinfo=UTC)
    certificate = issue_member(AUTHORITY, certificate_request(KEY, ALDER), ALDER, now)
    assert days_left(certificate, now) == MEMBER_DAYS
    assert days_left(certificate, now + timedelta(days=MEMBER_DAYS + 1)) == -1
    assert certificate.not_valid_before_utc < now


def test_serial_and_fingerprint_are_those_that_openssl_shows() -> None:
    assert serial(CERTIFICATE) == f"{CERTIFICATE.serial_number:x}"
    assert fingerprint(CERTIFICATE) == CERTIFICATE.fingerprint(SHA256()).hex()
    assert re.fullmatch(r"([0-9a-f]{4} ){15}[0-9a-f]{4}", spoken(fingerprint(CERTIFICATE)))
