"""One outgoing connection: TCP, through the proxy if there is one, then mutual TLS."""

from __future__ import annotations

import socket
import ssl
from typing import Final

import anyio
import h11
from anyio.abc import ByteStream, SocketAttribute
from anyio.streams.tls import TLSAttribute, TLSStream
from cryptography import x509
from cryptography.x509.oid import NameOID

from fedcmr_client.tunnel import obstacles
from fedcmr_client.tunnel.credentials import Credentials, Protocol
from fedcmr_client.tunnel.route import Proxy, Route
from fedcmr_shared.errors import ConnectionProblem

CONNECT_S: Final = 20.0
"""Longest wait for each of: the TCP connection with the proxy's answer, and the TLS handshake."""

_KEEPALIVE_S: Final = 60  # firewalls forget quiet connections, mostly after minutes
_CUT: Final = (anyio.BrokenResourceError, anyio.EndOfStream)


async def dial(
    route: Route, credentials: Credentials, protocol: Protocol, timeout_s: float = CONNECT_S
) -> TLSStream:
    """Connect to the coordinator.

    Raises:
        ConnectionProblem: there is no connection, or not to the coordinator itself.
        ConfigurationError: the credentials cannot be read.
    """
    credentials.require_current()
    context = credentials.tls_context(protocol)
    stream = await _reach(route, timeout_s)
    try:
        return await _handshake(stream, context, route.host, timeout_s)
    except TimeoutError as error:
        raise obstacles.handshake_silent(route, timeout_s) from error
    except _CUT as error:
        raise obstacles.handshake_cut(route) from error
    except ssl.SSLError as error:
        if obstacles.is_foreign(error):
            issuer = await _shown_issuer(route, timeout_s)
            raise obstacles.inspected(route, issuer) from error
        raise obstacles.handshake_failed(route, error, credentials.certificate) from error


async def _handshake(
    stream: ByteStream, context: ssl.SSLContext, host: str, timeout_s: float
) -> TLSStream:
    """Return ``stream`` under TLS; closed if that fails."""
    try:
        with anyio.fail_after(timeout_s):
            return await TLSStream.wrap(
                stream, server_side=False, hostname=host, ssl_context=context
            )
    except BaseException:
        await anyio.aclose_forcefully(stream)
        raise


async def _reach(route: Route, timeout_s: float) -> ByteStream:
    """Return a stream that ends at the coordinator's port; nothing has been sent on it."""
    proxy = route.proxy
    if proxy is None:
        return await _connect(route, route.host, route.port, timeout_s)
    context = proxy.tls_context() if proxy.tls else None
    stream = await _connect(route, proxy.host, proxy.port, timeout_s)
    try:
        if context is not None:
            stream = await _tls_to_proxy(stream, proxy, context, timeout_s)
        await _ask_proxy(stream, route, proxy, timeout_s)
    except BaseException:
        await anyio.aclose_forcefully(stream)
        raise
    return stream


async def _connect(route: Route, host: str, port: int, timeout_s: float) -> ByteStream:
    try:
        with anyio.fail_after(timeout_s):
            stream = await anyio.connect_tcp(host, port)
    except OSError as error:
        raise obstacles.not_connected(route, error, timeout_s) from error
    raw = stream.extra(SocketAttribute.raw_socket)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_S)
    return stream


async def _tls_to_proxy(
    stream: ByteStream, proxy: Proxy, context: ssl.SSLContext, timeout_s: float
) -> TLSStream:
    try:
        return await _handshake(stream, context, proxy.host, timeout_s)
    except TimeoutError as error:
        raise obstacles.proxy_silent(proxy, timeout_s) from error
    except ssl.SSLError as error:
        raise obstacles.proxy_not_trusted(proxy, error) from error
    except _CUT as error:
        raise obstacles.no_proxy(proxy) from error


async def _ask_proxy(stream: ByteStream, route: Route, proxy: Proxy, timeout_s: float) -> None:
    """Have the proxy connect ``stream`` to the coordinator."""
    try:
        with anyio.fail_after(timeout_s):
            status = await _connect_status(stream, route, proxy)
    except TimeoutError as error:
        raise obstacles.proxy_silent(proxy, timeout_s) from error
    except (h11.RemoteProtocolError, ssl.SSLError, *_CUT) as error:
        raise obstacles.no_proxy(proxy) from error
    if not 200 <= status < 300:  # RFC 9110, 9.3.6
        raise obstacles.proxy_refused(route, proxy, status)


async def _connect_status(stream: ByteStream, route: Route, proxy: Proxy) -> int:
    headers = [("Host", route.address)]
    if proxy.authorisation is not None:
        headers.append(("Proxy-Authorization", proxy.authorisation))
    http = h11.Connection(h11.CLIENT)
    request = h11.Request(method="CONNECT", target=route.address, headers=headers)
    await stream.send((http.send(request) or b"") + (http.send(h11.EndOfMessage()) or b""))
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            http.receive_data(await stream.receive())
        elif isinstance(event, h11.Response):
            break
    if http.trailing_data[0] and 200 <= event.status_code < 300:
        # In TLS the client speaks first: these bytes cannot be the coordinator's.
        raise obstacles.no_proxy(proxy)
    return event.status_code


async def _shown_issuer(route: Route, timeout_s: float) -> str | None:
    """Return who issued the certificate that is shown at the coordinator's address.

    A second connection that trusts anybody and therefore shows no certificate and sends nothing.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        stream = await _handshake(await _reach(route, timeout_s), context, route.host, timeout_s)
    except (ConnectionProblem, OSError, *_CUT):
        return None
    shown = stream.extra(TLSAttribute.peer_certificate_binary)
    await anyio.aclose_forcefully(stream)
    return _issuer_name(shown)


def _issuer_name(der: bytes | None) -> str | None:
    """Return the issuer's common name, shortened and printable: a stranger wrote it."""
    try:
        issuer = x509.load_der_x509_certificate(der or b"").issuer
    except (ValueError, x509.InvalidVersion):
        return None
    names = issuer.get_attributes_for_oid(NameOID.COMMON_NAME)
    text = str(names[0].value) if names else issuer.rfc4514_string()
    return "".join(letter for letter in text[:100] if letter.isprintable()) or None
