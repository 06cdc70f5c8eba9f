"""What an error on the way to the coordinator means, in words for the hospital's IT."""

from __future__ import annotations

import re
import socket
import ssl
from http import HTTPStatus
from pathlib import Path
from typing import Final

from fedcmr_client.tunnel.route import PASSWORD_VARIABLE, Proxy, Route
from fedcmr_shared.errors import ConnectionProblem, ProblemKind

# Numbers that OpenSSL's X509_V_ERR_… gives to why a certificate is not believed.
_NOT_YET_VALID: Final = 9
_EXPIRED: Final = 10
_OTHER_HOST: Final = frozenset({62, 64})  # name, address
_OTHER_ISSUER: Final = frozenset({7, 18, 19, 20, 21})

# TLS alerts by which a server refuses the client's certificate.
_CERTIFICATE_ALERT: Final = re.compile(
    r"ALERT_(\w*CERTIFICATE\w*|UNKNOWN_CA|ACCESS_DENIED|DECRYPT_ERROR|HANDSHAKE_FAILURE)"
)


def not_connected(route: Route, error: OSError, waited_s: float) -> ConnectionProblem:
    """Explain why no TCP connection came about, to the proxy if there is one."""
    proxy = route.proxy
    host, address = (proxy.host, proxy.address) if proxy else (route.host, route.address)
    kind, reason, remedy = _reason(error, host, address, waited_s)
    if proxy is None:
        return ConnectionProblem(kind, f"{address} {reason}: {remedy}")
    return ConnectionProblem(
        "proxy-unreachable", f"the proxy {address} {reason}: check the setting proxy"
    )


def proxy_not_trusted(proxy: Proxy, error: ssl.SSLError) -> ConnectionProblem:
    """Explain why TLS to the proxy itself failed."""
    reason = getattr(error, "verify_message", None) or error.reason or "no TLS"
    return ConnectionProblem(
        "proxy-unreachable",
        f"the proxy {proxy.address} is not trusted ({reason}): give the file of its authority's "
        "certificate, or http:// if it speaks no TLS",
    )


def proxy_silent(proxy: Proxy, waited_s: float) -> ConnectionProblem:
    """Explain a proxy that takes connections and does not answer."""
    return ConnectionProblem(
        "proxy-unreachable",
        f"the proxy {proxy.address} did not answer within {waited_s:g} s: check the setting proxy",
    )


def no_proxy(proxy: Proxy) -> ConnectionProblem:
    """Explain an answer that is none of an HTTP proxy."""
    return ConnectionProblem(
        "proxy-refused",
        f"the proxy {proxy.address} does not answer like an HTTP proxy: check the setting proxy",
    )


def proxy_refused(route: Route, proxy: Proxy, status: int) -> ConnectionProblem:
    """Explain an answer to CONNECT other than success."""
    if status == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
        who = f"does not accept the password of {proxy.user}" if proxy.user else "asks for a user"
        return ConnectionProblem(
            "proxy-credentials",
            f"the proxy {proxy.address} {who} (status 407): check user and password in the "
            f"setting proxy, or {PASSWORD_VARIABLE}",
        )
    return ConnectionProblem(
        "proxy-refused",
        f"the proxy {proxy.address} does not connect to {route.address} (status {status}): ask IT "
        f"to allow CONNECT to {route.address}",
    )


def handshake_silent(route: Route, waited_s: float) -> ConnectionProblem:
    """Explain a TLS handshake without an end."""
    return ConnectionProblem(
        "timed-out",
        f"{route.address} takes connections but did not finish the TLS handshake within "
        f"{waited_s:g} s: a firewall may hold it back: ask IT to let TLS to {route.address} pass "
        "untouched",
    )


def handshake_cut(route: Route) -> ConnectionProblem:
    """Explain a connection that ended in the middle of the handshake."""
    return ConnectionProblem(
        "tls",
        f"{route.address} ended the connection during the TLS handshake: the coordinator may be "
        f"starting; if it lasts, ask IT to let TLS to {route.address} pass untouched",
    )


def is_foreign(error: ssl.SSLError) -> bool:
    """Whether the server's certificate is of another issuer than the federation."""
    return isinstance(error, ssl.SSLCertVerificationError) and error.verify_code in _OTHER_ISSUER


def inspected(route: Route, issuer: str | None) -> ConnectionProblem:
    """Explain a certificate that ``issuer`` made and not the federation's authority."""
    name = f"“{issuer}”" if issuer else "someone else"
    return ConnectionProblem(
        "inspected",
        f"{route.address} shows a certificate issued by {name}, not by the federation's "
        f"authority: TLS is inspected on the way. IT must exempt {route.address} from TLS "
        "inspection; if it does not inspect, check the coordinator's address",
    )


def handshake_failed(route: Route, error: ssl.SSLError, certificate: Path) -> ConnectionProblem:
    """Explain any other failure of the handshake with the coordinator."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _not_believed(route, error)
    if _CERTIFICATE_ALERT.search(error.reason or ""):
        return rejected(route, certificate, _alert(error))
    return ConnectionProblem(
        "tls",
        f"{route.address} does not speak TLS as the coordinator does ({error.reason}): check "
        "host and port in the startup kit",
    )


def rejected(route: Route, certificate: Path, how: str) -> ConnectionProblem:
    """Explain an end right after the handshake, where TLS 1.3 reports the client's certificate."""
    return ConnectionProblem(
        "rejected",
        f"{route.address} does not take this site's certificate {certificate} ({how}): it may be "
        "revoked, expired or of another federation: ask the coordinator",
    )


def refusal(error: Exception) -> str:
    """Return how a connection ended before its first byte."""
    return _alert(error) if isinstance(error, ssl.SSLError) else "it closed without an answer"


def _alert(error: ssl.SSLError) -> str:
    return (error.reason or "TLS error").lower().replace("_", " ")


def _not_believed(route: Route, error: ssl.SSLCertVerificationError) -> ConnectionProblem:
    if error.verify_code in _OTHER_HOST:
        return ConnectionProblem(
            "wrong-host",
            f"the server at {route.address} shows the federation's certificate of another host: "
            "use the coordinator's address exactly as in the startup kit",
        )
    if error.verify_code in {_NOT_YET_VALID, _EXPIRED}:
        what = "has expired" if error.verify_code == _EXPIRED else "is not valid yet"
        return ConnectionProblem(
            "server-dates",
            f"the certificate of {route.address} {what}: check this machine's clock; if it is "
            "right, the coordinator must renew its certificate",
        )
    return ConnectionProblem(
        "tls",
        f"the certificate of {route.address} is not the coordinator's ({error.verify_message}): "
        "tell the coordinator",
    )


def _reason(
    error: OSError, host: str, address: str, waited_s: float
) -> tuple[ProblemKind, str, str]:
    """Return kind, what happened, and what to do."""
    if isinstance(error, socket.gaierror):
        remedy = "check the address; inside a closed network, ask IT which proxy to set"
        return "name-unknown", f"is unknown: the name {host} does not resolve", remedy
    causes = _causes(error)
    if any(isinstance(cause, TimeoutError) for cause in causes):
        reason = f"does not answer within {waited_s:g} s"
        return "timed-out", reason, f"a firewall is likely: ask IT to open outbound TCP {address}"
    if any(isinstance(cause, ConnectionRefusedError) for cause in causes):
        remedy = f"if the coordinator runs, ask IT to open outbound TCP {address}"
        return "refused", "refuses connections", remedy
    reason = causes[0].strerror or str(causes[0])
    return "unreachable", f"cannot be reached ({reason})", "check this machine's network"


def _causes(error: OSError) -> list[OSError]:
    """Return what happened at each of a host's addresses; anyio groups them."""
    cause = error.__cause__
    if isinstance(cause, ExceptionGroup):
        return [one for one in cause.exceptions if isinstance(one, OSError)] or [error]
    return [cause] if isinstance(cause, OSError) else [error]
