"""Where the coordinator is, and the one forward proxy that may stand on the way."""

from __future__ import annotations

import base64
import ipaddress
import os
import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self
from urllib.parse import SplitResult, unquote, urlsplit

from fedcmr_shared.errors import ConfigurationError

PASSWORD_VARIABLE: Final = "FEDCMR_PROXY_PASSWORD"

_LABEL: Final = "[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_NAME: Final = re.compile(rf"(?=.{{1,253}}$){_LABEL}(\.{_LABEL})*")
_FORM: Final = "proxy: give it as http://[USER:PASSWORD@]HOST:PORT or https://…"


@dataclass(frozen=True)
class Proxy:
    """A forward proxy that answers CONNECT; ``tls`` means TLS to the proxy itself.

    Its certificate is checked against the certificates in ``authority`` (PEM), or the system's if
    that is None. The password is in no text that this class makes.

    Raises:
        ConfigurationError: host, port, user or password cannot be used.
    """

    host: str
    port: int
    tls: bool = False
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    authority: Path | None = None

    def __post_init__(self) -> None:
        _require_address("proxy", self.host, self.port)
        if self.user is None:
            return
        if self.password is None:
            raise ConfigurationError(
                f"proxy: there is a user but no password: set {PASSWORD_VARIABLE}"
            )
        # RFC 7617: the first colon ends the user's name.
        if ":" in self.user or not (self.user + self.password).isprintable():
            raise ConfigurationError(
                "proxy: the user holds a colon, or user or password a control character"
            )

    @classmethod
    def parse(cls, url: str, authority: Path | None = None) -> Self:
        """Read a proxy's URL; a missing password comes from ``FEDCMR_PROXY_PASSWORD``.

        Raises:
            ConfigurationError: it is no such URL; the message repeats nothing of it.
        """
        parts, port = _split(url)
        if (
            parts is None
            or port is None
            or parts.scheme not in {"http", "https"}
            or parts.hostname is None
            or parts.path not in {"", "/"}
            or parts.query
            or parts.fragment
        ):
            raise ConfigurationError(_FORM)
        user = unquote(parts.username) if parts.username else None
        password = os.environ.get(PASSWORD_VARIABLE) if user else None
        if user and parts.password is not None:
            password = unquote(parts.password)
        return cls(parts.hostname, port, parts.scheme == "https", user, password, authority)

    @property
    def address(self) -> str:
        """``HOST:PORT``."""
        return _address(self.host, self.port)

    @property
    def authorisation(self) -> str | None:
        """Value of ``Proxy-Authorization`` (Basic, RFC 7617), or None without a user."""
        if self.user is None:
            return None
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()

    def tls_context(self) -> ssl.SSLContext:
        """Return what the proxy's own certificate is checked against.

        Raises:
            ConfigurationError: ``authority`` cannot be read.
        """
        try:
            context = ssl.create_default_context(cafile=self.authority)
        except OSError as error:
            raise ConfigurationError(
                f"proxy: its authority {self.authority} cannot be read: give a file of "
                "certificates in PEM"
            ) from error
        context.set_alpn_protocols(["http/1.1"])
        return context


@dataclass(frozen=True)
class Route:
    """The coordinator's address, and the proxy on the way; ConfigurationError if it is none."""

    host: str
    port: int
    proxy: Proxy | None = None

    def __post_init__(self) -> None:
        _require_address("coordinator", self.host, self.port)

    @property
    def address(self) -> str:
        """``HOST:PORT``."""
        return _address(self.host, self.port)


def _split(url: str) -> tuple[SplitResult | None, int | None]:
    # What urllib says about a URL may quote the password: its error goes no further than here.
    try:
        parts = urlsplit(url)
        return parts, parts.port
    except ValueError:
        return None, None


def _require_address(setting: str, host: str, port: int) -> None:
    if not 1 <= port <= 65535:
        raise ConfigurationError(f"{setting}: the port must lie between 1 and 65535")
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if not _NAME.fullmatch(host):
            raise ConfigurationError(
                f"{setting}: the host must be a name or an IP address"
            ) from None


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
