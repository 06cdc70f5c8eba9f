"""Finds out whether the coordinator can be reached, and if not, why."""

from __future__ import annotations

import re
from typing import Final

import anyio
from anyio.streams.tls import TLSStream

from fedcmr_client.tunnel import obstacles
from fedcmr_client.tunnel.credentials import Credentials
from fedcmr_client.tunnel.dial import CONNECT_S, dial
from fedcmr_client.tunnel.relay import closing
from fedcmr_client.tunnel.route import Route
from fedcmr_shared.errors import ConnectionProblem

# nginx takes any certificate in the handshake and then answers 400 (or its own 495 and 496).
_CERTIFICATE_REFUSED: Final = re.compile(rb"HTTP/1\.[01] (400|495|496)\b")


def probe(route: Route, credentials: Credentials, timeout_s: float = CONNECT_S) -> None:
    """Open one connection as the tunnel does, ask for ``/``, and close it.

    Without the question nobody would know: in TLS 1.3 the handshake is over for the client before
    the server has looked at the client's certificate. Any answer but a refusal of the certificate
    will do. ``timeout_s`` bounds each step; not to be called inside an event loop.

    Raises:
        ConnectionProblem: the coordinator cannot be reached; ``kind`` and message say why.
        ConfigurationError: the credentials cannot be read.
    """
    anyio.run(_probe, route, credentials, timeout_s)


async def _probe(route: Route, credentials: Credentials, timeout_s: float) -> None:
    stream = await dial(route, credentials, "http/1.1", timeout_s)
    try:
        async with closing(stream):
            with anyio.fail_after(timeout_s):
                how = await _refusal(stream, route)
    except TimeoutError as error:
        raise ConnectionProblem(
            "timed-out",
            f"{route.address} took the connection but did not answer within {timeout_s:g} s: the "
            "coordinator is overloaded or being started: try again",
        ) from error
    if how is not None:
        raise obstacles.rejected(route, credentials.certificate, how)


async def _refusal(stream: TLSStream, route: Route) -> str | None:
    request = f"GET / HTTP/1.1\r\nHost: {route.address}\r\nConnection: close\r\n\r\n"
    try:
        await stream.send(request.encode())
        answer = await stream.receive()
    except (anyio.EndOfStream, anyio.BrokenResourceError, OSError) as error:
        return obstacles.refusal(error)
    match = _CERTIFICATE_REFUSED.match(answer)
    return f"status {match[1].decode()}" if match else None
