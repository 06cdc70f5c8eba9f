"""How often a member may call: a token bucket, and how many calls it may have open at once."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import grpc

from fedcmr_server.governance.admission import Refused

PER_SECOND: Final = 20.0
BURST: Final = 200.0
AT_ONCE: Final = 4
"""Open calls of one member, a stream counting as two: each holds one of the server's threads."""


@dataclass(frozen=True)
class Bucket:
    """Calls that a member may still make at time ``at`` (seconds)."""

    tokens: float
    at: float

    def take(self, now: float) -> Bucket | None:
        """Return the bucket after one call at ``now``, or None when it is empty."""
        tokens = min(BURST, self.tokens + (now - self.at) * PER_SECOND)
        return Bucket(tokens - 1, now) if tokens >= 1 else None


class CallLimits:
    """The state behind the limits, of all members; None stands for whoever is no member."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: dict[str | None, Bucket] = {}
        self._empty: set[str | None] = set()
        self._open: Counter[str] = Counter()

    def spend(self, member: str | None) -> None:
        """Count one call; Refused when ``member`` made too many lately.

        The reason is "rate", and "rate-again" until a call passes: a line in the log for each would
        make the log the weakest place.
        """
        with self._lock:
            now = self._clock()
            bucket = self._buckets.get(member, Bucket(BURST, now)).take(now)
            if bucket is None:
                reason = "rate-again" if member in self._empty else "rate"
                self._empty.add(member)
                raise _too_much(reason, f"at most {PER_SECOND:g} calls a second: wait")
            self._empty.discard(member)
            self._buckets[member] = bucket

    @contextmanager
    def running(self, member: str, *, streams: bool = False) -> Iterator[None]:
        """Count an open call while it lasts; Refused when ``member`` has too many."""
        weight = 2 if streams else 1
        with self._lock:
            if self._open[member] + weight > AT_ONCE:
                raise _too_much("at-once", f"at most {AT_ONCE} calls at once: wait")
            self._open[member] += weight
        try:
            yield
        finally:
            with self._lock:
                self._open[member] -= weight


def _too_much(reason: str, message: str) -> Refused:
    return Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, reason, message)
