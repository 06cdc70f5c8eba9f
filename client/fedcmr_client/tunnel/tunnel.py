"""The doors inside the hospital: one for the SuperNode, one for the governance client."""

from __future__ import annotations

import logging
import os
import socket
import ssl
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import anyio
from anyio.abc import ByteStream
from anyio.from_thread import start_blocking_portal
from anyio.streams.tls import TLSStream

from fedcmr_client.ledger.place import make_folder
from fedcmr_client.tunnel import obstacles
from fedcmr_client.tunnel.credentials import Credentials, Protocol
from fedcmr_client.tunnel.dial import CONNECT_S, dial
from fedcmr_client.tunnel.doors import LocalStream, admit, listen_on_loopback, listen_on_path
from fedcmr_client.tunnel.loopback import loopback_context
from fedcmr_client.tunnel.relay import Relay, closing
from fedcmr_client.tunnel.route import Route
from fedcmr_shared.errors import ConfigurationError, ConnectionProblem

_log = logging.getLogger("fedcmr.site")


class Tunnel:
    """Carries connections of this machine to the coordinator; a context manager.

    Each connection to one of its doors becomes one mutual-TLS connection to the coordinator, and
    bytes are copied both ways. ``folder`` belongs to this user alone and to this tunnel; it
    receives ``loopback.pem``, ``loopback.key`` and ``governance.sock``.

    Every program of this machine may knock at the fleet's door, and the coordinator's gateway sees
    the site's certificate behind it: the site's node key must prove who speaks. The governance
    door lies in ``folder``, which nobody else may enter.

    Raises (on entering):
        ConfigurationError: the folder, the credentials or the proxy's authority cannot be used.
    """

    def __init__(self, route: Route, credentials: Credentials, folder: Path) -> None:
        self._route = route
        self._credentials = credentials
        self._folder = folder.absolute()
        self._problem: ConnectionProblem | None = None
        self._port: int | None = None
        self._open = ExitStack()

    @property
    def problem(self) -> ConnectionProblem | None:
        """What kept the latest connection from the coordinator; None once it answers again."""
        return self._problem

    @property
    def fleet_address(self) -> str:
        """``127.0.0.1:PORT``, where a SuperNode finds the SuperLink (TLS, HTTP/1.1)."""
        if self._port is None:
            raise ConfigurationError("the tunnel is not open: use it in a with statement")
        return f"127.0.0.1:{self._port}"

    @property
    def fleet_root(self) -> Path:
        """Root certificate of the fleet's door."""
        return self._folder / "loopback.pem"

    @property
    def governance_target(self) -> str:
        """What `grpc.insecure_channel` takes to reach the governance service."""
        return f"unix:{self._socket}"

    @property
    def _socket(self) -> Path:
        return self._folder / "governance.sock"

    def __enter__(self) -> Self:
        self._credentials.tls_context("h2")
        if self._route.proxy is not None and self._route.proxy.tls:
            self._route.proxy.tls_context()
        with ExitStack() as opening:
            _require_private(self._folder)
            tls = loopback_context(self.fleet_root, self._folder / "loopback.key")
            fleet = opening.enter_context(listen_on_loopback())
            governance = opening.enter_context(listen_on_path(self._socket))
            opening.callback(self._socket.unlink, missing_ok=True)
            portal = opening.enter_context(start_blocking_portal(name="fedcmr-tunnel"))
            service = portal.start_task_soon(self._serve, fleet, governance, tls)
            service.add_done_callback(_report)
            opening.callback(service.cancel)
            self._port = fleet.getsockname()[1]
            self._open = opening.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._port = None
        self._open.close()

    async def _serve(
        self, fleet: socket.socket, governance: socket.socket, tls: ssl.SSLContext
    ) -> None:
        async with anyio.create_task_group() as group:

            async def enter_fleet(stream: LocalStream) -> None:
                await self._enter_fleet(stream, tls)

            async def enter_governance(stream: LocalStream) -> None:
                await self._carry(stream, "h2")

            group.start_soon(admit, fleet, enter_fleet, group)
            group.start_soon(admit, governance, enter_governance, group)

    async def _enter_fleet(self, stream: LocalStream, tls: ssl.SSLContext) -> None:
        async with closing(stream):
            try:
                with anyio.fail_after(CONNECT_S):
                    inner = await TLSStream.wrap(stream, server_side=True, ssl_context=tls)
            except (anyio.BrokenResourceError, anyio.EndOfStream, OSError):
                return  # whoever it was is no SuperNode of ours
            await self._carry(inner, "http/1.1")

    async def _carry(self, inner: ByteStream, protocol: Protocol) -> None:
        async with closing(inner):
            try:
                outer = await dial(self._route, self._credentials, protocol)
            except (ConnectionProblem, ConfigurationError) as error:
                self._note(error)
                return
            relay = Relay(inner, outer, self._note_answer)
            async with closing(outer):
                await relay.run()
            if relay.refusal is not None:
                certificate = self._credentials.certificate
                self._note(obstacles.rejected(self._route, certificate, relay.refusal))

    def _note(self, error: ConnectionProblem | ConfigurationError) -> None:
        if isinstance(error, ConfigurationError):
            error = ConnectionProblem("own-certificate", str(error))
        if self._problem is None or str(self._problem) != str(error):
            _log.warning("%s", error)
        self._problem = error

    def _note_answer(self) -> None:
        if self._problem is not None:
            _log.info("%s answers again", self._route.address)
        self._problem = None


def _report(service: Future[None]) -> None:
    """Log the end of a tunnel that nobody has closed: a mistake in this program."""
    if not service.cancelled() and (error := service.exception()) is not None:
        _log.error("the tunnel has broken down; restart the service", exc_info=error)


def _require_private(folder: Path) -> None:
    try:
        make_folder(folder)
        status = folder.stat()
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be made: {error.strerror}") from error
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise ConfigurationError(
            f"{folder} must belong to the user of this service, and to nobody else: chmod 700"
        )
