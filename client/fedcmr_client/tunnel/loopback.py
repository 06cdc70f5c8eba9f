"""A certificate that only one machine believes, for TLS between two of its own processes."""

from __future__ import annotations

import ipaddress
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import NameOID

from fedcmr_client.ledger.place import write_durably
from fedcmr_shared.identity.certificates import certificate_pem, key_pem, new_key

_LIFE: Final = timedelta(days=3650)  # a service may run for years, on a clock that is set late


def loopback_context(root: Path, key_file: Path) -> ssl.SSLContext:
    """Write a fresh certificate and key; return the context of a server that shows them.

    ``root`` is also what a client gives as its only root certificate.
    """
    key = new_key()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "FedCMR on this machine")])
    now = datetime.now(UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder(
            subject_name=name,
            issuer_name=name,
            public_key=key.public_key(),
            serial_number=x509.random_serial_number(),
            not_valid_before=now - _LIFE,
            not_valid_after=now + _LIFE,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, SHA256())
    )
    write_durably(key_file, key_pem(key))
    write_durably(root, certificate_pem(certificate).encode())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(root, key_file)
    context.set_alpn_protocols(["http/1.1"])
    return context
