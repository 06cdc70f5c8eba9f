"""Where programs of this machine enter the tunnel."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final

import anyio
from anyio.abc import ByteStream, TaskGroup

from fedcmr_shared.errors import ConfigurationError

_log = logging.getLogger("fedcmr.site")

_LONGEST_PATH: Final = 107  # bytes of a Unix socket's path (sockaddr_un of Linux)
_WAITING: Final = 128
_AGAIN_S: Final = 1.0


class LocalStream(ByteStream):
    """A connection of this machine, which is read only when somebody asks for its bytes.

    anyio reads what it accepts into memory without limit until it is first asked. Here bytes wait
    in the socket, and so does their writer.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._loop = asyncio.get_running_loop()

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """Return the next bytes; EndOfStream after the last, BrokenResourceError if it broke."""
        try:
            data = await self._loop.sock_recv(self._socket, max_bytes)
        except OSError as error:
            raise anyio.BrokenResourceError from error
        if not data:
            raise anyio.EndOfStream
        return data

    async def send(self, item: bytes) -> None:
        """Return once the socket holds all of ``item``; BrokenResourceError if it broke."""
        try:
            await self._loop.sock_sendall(self._socket, item)
        except OSError as error:
            raise anyio.BrokenResourceError from error

    async def send_eof(self) -> None:
        """Say that nothing more comes; BrokenResourceError if nobody is there."""
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            raise anyio.BrokenResourceError from error

    async def aclose(self) -> None:
        """Close the socket; what was sent still arrives."""
        self._socket.close()


def listen_on_loopback() -> socket.socket:
    """Return a listener on a free port of 127.0.0.1."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=_WAITING)
    listener.setblocking(False)
    return listener


def listen_on_path(path: Path) -> socket.socket:
    """Return a listener on a Unix socket, in place of one that a killed tunnel left.

    Raises:
        ConfigurationError: the path is longer than the system allows.
    """
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise ConfigurationError(
            f"{path} is too long for a socket (more than {_LONGEST_PATH} bytes): choose a shorter "
            "folder"
        )
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(os.fspath(path))
    listener.listen(_WAITING)
    listener.setblocking(False)
    return listener


async def admit(
    listener: socket.socket,
    handle: Callable[[LocalStream], Coroutine[Any, Any, None]],
    group: TaskGroup,
) -> None:
    """Start ``handle`` in ``group`` for each connection, for ever."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            connection, _ = await loop.sock_accept(listener)
        except OSError as error:
            # Mostly too many open files; connections that end make room again.
            _log.warning("the tunnel cannot accept a connection: %s", error)
            await anyio.sleep(_AGAIN_S)
        else:
            group.start_soon(handle, LocalStream(connection))
