"""The files by which a member recognises the coordinator, and the coordinator the member."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from cryptography import x509

from fedcmr_shared.errors import ConfigurationError, ConnectionProblem
from fedcmr_shared.identity.certificates import days_left, read_certificate

Protocol = Literal["http/1.1", "h2"]


@dataclass(frozen=True)
class Credentials:
    """PEM files: the federation's authority, this member's certificate, and its key.

    They are read anew for every connection, so that a renewed certificate needs no restart.
    """

    authority: Path
    certificate: Path
    key: Path

    def tls_context(self, protocol: Protocol) -> ssl.SSLContext:
        """Return what a connection to the coordinator needs; nobody but ``authority`` is trusted.

        Raises:
            ConfigurationError: a file is missing, or key and certificate do not belong together.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts nobody yet; checks the host
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.hostname_checks_common_name = False
        context.set_alpn_protocols([protocol])
        try:
            context.load_verify_locations(cadata=_content(self.authority).decode("ascii"))
        except (ssl.SSLError, ValueError) as error:
            raise ConfigurationError(
                f"{self.authority} holds no certificate in PEM: take it from the startup kit again"
            ) from error
        self.own_certificate()
        _content(self.key)
        try:
            # An empty password: OpenSSL would ask the terminal for that of an encrypted key.
            context.load_cert_chain(self.certificate, self.key, password="")
        except OSError as error:
            raise ConfigurationError(
                f"{self.key} is not the key of {self.certificate}, or it is encrypted: give the "
                "key with which this certificate was requested"
            ) from error
        return context

    def own_certificate(self) -> x509.Certificate:
        """Return this member's certificate; ConfigurationError if the file holds none."""
        content = _content(self.certificate)
        try:
            return read_certificate(content)
        except ConfigurationError as error:
            raise ConfigurationError(f"{self.certificate}: {error}") from error

    def days_left(self) -> float:
        """Return days until this member's certificate expires; negative afterwards."""
        return days_left(self.own_certificate())

    def require_current(self, now: datetime | None = None) -> None:
        """Hold the certificate's dates against this machine's clock.

        Raises:
            ConnectionProblem: it has expired, or is not valid yet; the message has the date.
            ConfigurationError: the file holds none.
        """
        certificate = self.own_certificate()
        now = now or datetime.now(UTC)
        begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        if now > end:
            raise ConnectionProblem(
                "own-certificate",
                f"this site's certificate {self.certificate} expired on {end:%Y-%m-%d}: ask the "
                "coordinator for a new one (or set this machine's clock)",
            )
        if now < begin:
            raise ConnectionProblem(
                "own-certificate",
                f"this site's certificate {self.certificate} is valid only from "
                f"{begin:%Y-%m-%d %H:%M} UTC, and this machine's clock says "
                f"{now:%Y-%m-%d %H:%M}: set the clock",
            )


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error
