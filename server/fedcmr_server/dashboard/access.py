"""Who may read: members by certificate, and whoever opened a session with a one-time token.

The gateway has verified the certificate's signature and that its holder has the key; here it must
be one that the federation still counts. The gateway always overwrites the ``x-fedcmr-`` headers,
and nobody else can reach the app's socket, so that they are the gateway's word.

Tokens and session identifiers are kept as SHA-256 and looked up by it: how long a comparison of
hashes takes tells nothing about the secret.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from threading import Lock
from typing import Final, Literal
from urllib.parse import unquote

from fedcmr_server.store import AccessLog, Certificates, Store, Tokens
from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.identity.certificates import fingerprint, read_certificate

SESSION: Final = "__Host-fedcmr"
"""Name of the cookie. The prefix makes browsers keep it for this host, path / and TLS alone."""

SESSION_LIFE: Final = timedelta(hours=8)
MOST_SESSIONS: Final = 256
MOST_FAILURES: Final = 10
FAILURE_WINDOW: Final = timedelta(minutes=1)
"""After `MOST_FAILURES` from one address within this time, no token from there is looked at."""

_MOST_ADDRESSES: Final = 1024
_LONGEST_CERTIFICATE: Final = 16_384  # characters, URL-escaped


@dataclass(frozen=True)
class Viewer:
    """Who reads: a member by certificate, or the label of a token."""

    name: str
    by: Literal["certificate", "token"]


class TooManyFailures(Exception):
    """An address may not try another token yet."""


class Sessions:
    """Open sessions, in memory: a restart ends them all. The oldest makes room for a new one."""

    def __init__(self, most: int = MOST_SESSIONS, life: timedelta = SESSION_LIFE) -> None:
        self._most, self._life = most, life
        self._open: OrderedDict[str, tuple[Viewer, datetime]] = OrderedDict()
        self._lock = Lock()

    def open(self, viewer: Viewer, now: datetime) -> str:
        """Open a session and return its identifier, 256 random bits."""
        identifier = secrets.token_urlsafe(32)
        with self._lock:
            self._open[_hash(identifier)] = (viewer, now + self._life)
            while len(self._open) > self._most:
                self._open.popitem(last=False)
        return identifier

    def find(self, identifier: str, now: datetime) -> Viewer | None:
        """Return whose session it is; None when it is unknown or over."""
        key = _hash(identifier)
        with self._lock:
            viewer, until = self._open.get(key, (None, now))
            if viewer is not None and until <= now:
                del self._open[key]
                return None
        return viewer


class Failures:
    """Failed logins by address, of the last minute. The oldest address makes room for a new one."""

    def __init__(self, most: int = MOST_FAILURES, window: timedelta = FAILURE_WINDOW) -> None:
        self._most, self._window = most, window
        self._at: OrderedDict[str, deque[datetime]] = OrderedDict()
        self._lock = Lock()

    def add(self, address: str, now: datetime) -> None:
        """Count a failure."""
        with self._lock:
            times = self._at.setdefault(address, deque(maxlen=self._most))
            times.append(now)
            self._at.move_to_end(address)
            while len(self._at) > _MOST_ADDRESSES:
                self._at.popitem(last=False)

    def full(self, address: str, now: datetime) -> bool:
        """Whether the address has to wait."""
        with self._lock:
            times = self._at.get(address)
            return times is not None and len(times) == self._most and now - times[0] < self._window


class Door:
    """Lets members and opened sessions in, and notes who was turned away."""

    def __init__(self, store: Store) -> None:
        self._certificates = Certificates(store)
        self._tokens = Tokens(store)
        self._log = AccessLog(store)
        self._sessions = Sessions()
        self._failures = Failures()

    def viewer(
        self, headers: Mapping[str, str], cookies: Mapping[str, str], now: datetime
    ) -> Viewer | None:
        """Return who asks, or None. ``headers`` are the gateway's, ``cookies`` the browser's.

        Raises:
            FederationError: the database does not answer.
        """
        if headers.get("x-fedcmr-verified") == "SUCCESS":
            viewer = self._by_certificate(headers, now)
            if viewer is not None:
                return viewer
        identifier = cookies.get(SESSION)
        return None if identifier is None else self._sessions.find(identifier, now)

    def log_in(self, token: str, address: str, now: datetime) -> str | None:
        """Use a token up and return the identifier of a new session; None for a bad one.

        Raises:
            TooManyFailures: the address has to wait; the token was not looked at.
            FederationError: the database does not answer.
        """
        if self._failures.full(address, now):
            raise TooManyFailures
        label = self._tokens.use(token, now)
        if label is None:
            self._turn_away(address, now, "token is unknown, used or too old")
            return None
        self._log.write(label, "dashboard login", True, f"token, from {address}")
        return self._sessions.open(Viewer(label, "token"), now)

    def _by_certificate(self, headers: Mapping[str, str], now: datetime) -> Viewer | None:
        pem = unquote(headers.get("x-fedcmr-certificate", "")[:_LONGEST_CERTIFICATE])
        try:
            digest = fingerprint(read_certificate(pem))
        except ConfigurationError:
            return None
        # Each role may read: what is shown is no secret among members.
        found = self._certificates.holder(digest, now)
        if found is not None:
            return Viewer(found[0].name, "certificate")
        # The issuing authority vouches for it, and the federation no longer does.
        address = address_of(headers)
        if not self._failures.full(address, now):
            self._turn_away(address, now, f"certificate {digest[:16]} is not active")
        return None

    def _turn_away(self, address: str, now: datetime, why: str) -> None:
        self._failures.add(address, now)
        self._log.write(None, "dashboard login", False, f"{why}, from {address}")


def address_of(headers: Mapping[str, str]) -> str:
    """Return the client's address as the gateway saw it; one for all when it says none."""
    return headers.get("x-fedcmr-address") or "unknown"


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
