"""Certificates, servers and proxies for tests of connections: real sockets and real TLS."""

from __future__ import annotations

import base64
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Self

import anyio
from anyio.abc import ByteStream, SocketListener
from anyio.from_thread import start_blocking_portal
from anyio.streams.tls import TLSListener

from fedcmr_client.tunnel import Credentials
from fedcmr_shared.identity.certificates import (
    Authority,
    Member,
    PrivateKey,
    certificate_pem,
    certificate_request,
    issue_member,
    issue_server,
    key_pem,
    new_authority,
    new_key,
)

HERE = ("localhost", "127.0.0.1")
LONG_S = 60.0
"""Nothing in these tests takes so long; a wait that does has failed."""

_ENDED = (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError, OSError)


@dataclass(frozen=True)
class Federation:
    """An authority, and the files that it gives to members and servers."""

    folder: Path
    authority: Authority

    @classmethod
    def make(cls, folder: Path, name: str = "hearts") -> Self:
        folder.mkdir(parents=True, exist_ok=True)
        authority = new_authority(name)
        (folder / "authority.pem").write_text(certificate_pem(authority.certificate))
        return cls(folder, authority)

    @property
    def root(self) -> Path:
        return self.folder / "authority.pem"

    def credentials(self, name: str = "north", now: datetime | None = None) -> Credentials:
        """Write a new key and certificate of site ``name``, over those it has."""
        key, member = new_key(), Member("site", name)
        certificate = issue_member(self.authority, certificate_request(key, member), member, now)
        return Credentials(self.root, *self._write(name, key, certificate_pem(certificate)))

    def server_files(
        self, *hosts: str, name: str = "server", now: datetime | None = None
    ) -> tuple[Path, Path]:
        """Write certificate and key of a server under ``hosts``, this machine by default."""
        key = new_key()
        certificate = issue_server(self.authority, key, hosts or HERE, now)
        return self._write(name, key, certificate_pem(certificate))

    def server_context(self, *hosts: str, now: datetime | None = None) -> ssl.SSLContext:
        """Return the context of a server that asks nobody for a certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.server_files(*hosts, now=now))
        return context

    def mutual_context(self, *hosts: str, now: datetime | None = None) -> ssl.SSLContext:
        """Return the context of a coordinator: only members' certificates are taken."""
        context = self.server_context(*hosts, now=now)
        context.load_verify_locations(self.root)
        context.verify_mode = ssl.CERT_REQUIRED
        context.set_alpn_protocols(["h2", "http/1.1"])
        return context

    def _write(self, name: str, key: PrivateKey, certificate: str) -> tuple[Path, Path]:
        files = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        files[0].write_text(certificate)
        files[1].write_bytes(key_pem(key))
        return files


class Server(socketserver.ThreadingTCPServer):
    """Gives each connection to ``answer`` in a thread, after a TLS handshake with ``context``."""

    allow_reuse_address = True

    def __init__(
        self,
        answer: Callable[[socket.socket], None],
        context: ssl.SSLContext | None = None,
        port: int = 0,
    ) -> None:
        super().__init__(("127.0.0.1", port), socketserver.BaseRequestHandler)
        self.handshakes = 0
        self._answer = answer
        self._context = context
        self._connections: set[socket.socket] = set()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,))

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def finish_request(self, request: object, client_address: object) -> None:
        assert isinstance(request, socket.socket)
        self._connections.add(request)
        with suppress(OSError):
            if self._context is not None:
                plain = request
                request = self._context.wrap_socket(plain, server_side=True)
                self._connections.add(request)
                self._connections.discard(plain)
                self.handshakes += 1
            with request:
                self._answer(request)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        for connection in list(self._connections):
            with suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
        self.server_close()  # waits for the answers' threads


def echo(connection: socket.socket) -> None:
    while data := connection.recv(65536):
        connection.sendall(data)


@dataclass
class Recorder:
    """An answer that keeps all bytes it receives, and the certificates shown to it."""

    received: bytearray = field(default_factory=bytearray)
    certificates: list[object] = field(default_factory=list)

    def __call__(self, connection: socket.socket) -> None:
        if isinstance(connection, ssl.SSLSocket):
            self.certificates.append(connection.getpeercert())
        while data := connection.recv(65536):
            self.received += data
            connection.sendall(data)


@dataclass
class ProxyLog:
    """Where a proxy listens, and what it was asked to connect to."""

    port: int
    targets: list[str] = field(default_factory=list)


@contextmanager
def connect_proxy(
    *,
    password: str | None = None,
    context: ssl.SSLContext | None = None,
    status: str = "200 Connection established",
    names: dict[str, str] | None = None,
) -> Iterator[ProxyLog]:
    """Run an HTTP proxy that answers CONNECT with ``status``, and carries bytes after a 200.

    ``password`` (``user:password``) is then required. ``names`` says what the proxy resolves.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    log = ProxyLog(listener.getsockname()[1])

    async def handle(stream: ByteStream) -> None:
        with suppress(*_ENDED):
            async with stream:
                await serve(stream)

    async def serve(stream: ByteStream) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += await stream.receive()
        request, *headers = head.decode().split("\r\n")
        method, target, _ = request.split(" ")
        assert method == "CONNECT"
        log.targets.append(target)
        if password is not None:
            secret = base64.b64encode(password.encode()).decode()
            if f"Proxy-Authorization: Basic {secret}" not in headers:
                await stream.send(b"HTTP/1.1 407 No\r\nProxy-Authenticate: Basic\r\n\r\n")
                return
        await stream.send(f"HTTP/1.1 {status}\r\n\r\n".encode())
        if status.startswith("200"):
            host, _, port = target.rpartition(":")
            async with await anyio.connect_tcp((names or {}).get(host, host), int(port)) as on:
                await _join(stream, on)

    async def run() -> None:
        inner = await SocketListener.from_socket(listener)
        if context is None:
            await inner.serve(handle)
        else:
            await TLSListener(inner, context, standard_compatible=False).serve(handle)

    with listener, start_blocking_portal(name="test-proxy") as portal:
        service = portal.start_task_soon(run)
        try:
            yield log
        finally:
            service.cancel()


async def _join(one: ByteStream, other: ByteStream) -> None:
    async def copy(source: ByteStream, sink: ByteStream, group: anyio.abc.TaskGroup) -> None:
        with suppress(*_ENDED):
            while True:
                await sink.send(await source.receive())
        group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(copy, one, other, group)
        group.start_soon(copy, other, one, group)


def free_port() -> int:
    """Return a port of this machine on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
