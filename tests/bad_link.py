"""A forward proxy (CONNECT) whose line is slow, late, lossy or cut: a hospital's network at its worst.

It works on the bytes of TCP connections, above the kernel's own retransmission: a lost packet shows
as a stall of the time after which the kernel would have sent it again.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

_CHUNK: Final = 16_384
_PACKET: Final = 1_460  # bytes that an Ethernet frame leaves to TCP
_RETRANSMISSION_S: Final = 0.3


@dataclass(frozen=True)
class Line:
    """How a line is.

    ``delay_s`` is one way; ``loss`` the probability that a packet is lost; ``damage`` that one bit
    flips in a chunk of 16 KiB. While it ``is_cut`` nothing moves, and nothing closes either, as
    when a cable is pulled.
    """

    delay_s: float = 0.0
    loss: float = 0.0
    bytes_per_s: float | None = None
    damage: float = 0.0
    is_cut: bool = False


GOOD: Final = Line()
CUT: Final = Line(is_cut=True)


class BadLink:
    """The proxy; ``url`` is what a site's agent.yaml names.

    ``line`` may be replaced at any time; ``carried`` counts bytes, both ways.
    """

    def __init__(self) -> None:
        self.line = GOOD
        self.carried = 0
        self.url = ""
        self._tasks: set[asyncio.Task[None]] = set()
        self._random = random.Random(7)

    @classmethod
    @contextmanager
    def open(cls) -> Iterator[BadLink]:
        """Serve on a free port of the loopback until the end of the block."""
        link = cls()
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="bad-link")
        thread.start()
        try:
            asyncio.run_coroutine_threadsafe(link._serve(), loop).result(10)
            yield link
        finally:
            asyncio.run_coroutine_threadsafe(link._close(), loop).result(10)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(10)
            loop.close()

    async def _serve(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _close(self) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            head = await reader.readuntil(b"\r\n\r\n")
            host, _, port = head.split(b" ")[1].decode().rpartition(":")
            await self._carry(len(head))
            far_reader, far_writer = await asyncio.open_connection(host.strip("[]"), int(port))
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            await asyncio.gather(self._copy(reader, far_writer), self._copy(far_reader, writer))
        writer.close()

    async def _copy(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        """Copy with the line's delay; chunks overlap, as on a real line."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(256)
        loop = asyncio.get_running_loop()

        async def read() -> None:
            with suppress(OSError):  # a killed process resets its connections
                while data := await source.read(_CHUNK):
                    await self._carry(len(data))
                    await queue.put((loop.time() + self.line.delay_s, self._arriving(data)))
            await queue.put((loop.time() + self.line.delay_s, b""))

        reading = asyncio.create_task(read())
        try:
            while True:
                due, data = await queue.get()
                await asyncio.sleep(max(0.0, due - loop.time()))
                if not data:
                    break
                target.write(data)
                await target.drain()
        finally:
            reading.cancel()
            target.close()

    async def _carry(self, size: int) -> None:
        """Wait as long as ``size`` bytes take."""
        while self.line.is_cut:
            await asyncio.sleep(0.05)
        if self.line.bytes_per_s is not None:
            await asyncio.sleep(size / self.line.bytes_per_s)
        arrives = (1 - self.line.loss) ** -(-size // _PACKET)
        if self._random.random() >= arrives:
            await asyncio.sleep(_RETRANSMISSION_S)
        self.carried += size

    def _arriving(self, data: bytes) -> bytes:
        if self._random.random() >= self.line.damage:
            return data
        place = self._random.randrange(len(data))
        return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
