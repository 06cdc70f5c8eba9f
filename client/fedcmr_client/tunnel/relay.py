"""Copies bytes both ways between two streams, and looks at none of them."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final

import anyio
from anyio.abc import ByteStream

from fedcmr_client.tunnel.obstacles import refusal

IDLE_S: Final = 600.0
"""A connection on which nothing moves for so long is closed; HTTP clients open another."""

LINGER_S: Final = 5.0
"""What is left of that once one side has ended."""

_CLOSE_S: Final = 2.0

# anyio does not send two things at once on one TLS stream: a key update may meet a message.
_ENDED: Final = (
    anyio.EndOfStream,
    anyio.BrokenResourceError,
    anyio.ClosedResourceError,
    anyio.BusyResourceError,
    OSError,
)


@dataclass
class Relay:
    """Joins a local stream to the one that leads to the coordinator.

    Sending waits until the other side takes the bytes, so a slow reader slows its writer and
    nothing piles up here.
    """

    inner: ByteStream
    outer: ByteStream
    on_answer: Callable[[], None]
    """Called at the coordinator's first byte."""

    refusal: str | None = None
    """After `run`: how the coordinator ended a connection to which it gave no answer."""

    _asked: bool = False
    _answered: bool = False
    _sending: bool = True

    async def run(self) -> None:
        """Copy until the coordinator ends, or nothing has moved for a while; closes neither."""
        with anyio.move_on_after(IDLE_S) as patience:
            async with anyio.create_task_group() as group:
                group.start_soon(self._send, patience)
                await self._receive(patience)
                group.cancel_scope.cancel()

    async def _send(self, patience: anyio.CancelScope) -> None:
        while True:
            try:
                data = await self.inner.receive()
            except _ENDED:
                break
            self._asked = True
            try:
                await self.outer.send(data)
            except _ENDED:
                break  # `_receive` meets the reason, if the coordinator gave one
            self._moved(patience)
        # TLS here cannot be half-closed: what is still on its way back gets a little time.
        self._sending = False
        self._moved(patience)

    async def _receive(self, patience: anyio.CancelScope) -> None:
        while True:
            try:
                data = await self.outer.receive()
            except _ENDED as error:
                self._note_end(error)
                return
            if not self._answered:
                self._answered = True
                self.on_answer()
            try:
                await self.inner.send(data)
            except _ENDED:
                return
            self._moved(patience)

    def _moved(self, patience: anyio.CancelScope) -> None:
        patience.deadline = anyio.current_time() + (IDLE_S if self._sending else LINGER_S)

    def _note_end(self, error: Exception) -> None:
        if not self._answered and (self._asked or isinstance(error, ssl.SSLError)):
            self.refusal = refusal(error)


@asynccontextmanager
async def closing(stream: ByteStream) -> AsyncIterator[None]:
    """Close ``stream`` at the end, with a goodbye if the other side takes it at once."""
    try:
        yield
    finally:
        with anyio.move_on_after(_CLOSE_S), suppress(*_ENDED):
            await stream.aclose()
