"""What the agent tells this machine about itself: a file, and a page on the loopback.

Nothing of it leaves the site, and nothing in it depends on data.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

from fedcmr_client.ledger.place import write_durably
from fedcmr_shared.errors import ConfigurationError

FILE: Final = "health.json"
"""Name of the report's file, in `SiteHome.run`."""

STALE_S: Final = 120.0
"""A report that is so old comes from an agent that hangs."""

_log = logging.getLogger("fedcmr.site")


@dataclass(frozen=True)
class Problem:
    """What is wrong: a code for programs and a sentence for people."""

    code: str
    message: str


@dataclass(frozen=True)
class Health:
    """How the agent is; ``connected`` means that the coordinator can hand it tasks."""

    site: str
    process: int
    at: datetime
    connected: bool
    paused: str | None
    certificate_days: float
    problem: Problem | None
    roster_news: str | None = None

    @property
    def ready(self) -> bool:
        """Whether tasks would be taken up now."""
        return self.connected and self.paused is None

    def differs(self, other: Health) -> bool:
        """Whether anything but the time is another."""
        return replace(self, at=other.at) != other

    def values(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {**asdict(self), "at": self.at.isoformat(timespec="seconds"), "ready": self.ready}

    def write(self, path: Path) -> None:
        """Leave the report in a file, for `fedcmr site status`; a full disk is logged only."""
        try:
            write_durably(path, json.dumps(self.values()).encode())
        except OSError as error:
            _log.warning("%s: cannot be written: %s", path, error.strerror)


def read_health(path: Path, now: datetime | None = None) -> dict[str, Any] | None:
    """Return the newest report in ``path``, with its age in seconds; None when there is none."""
    try:
        values = json.loads(path.read_bytes())
        age = (now or datetime.now(UTC)) - datetime.fromisoformat(values["at"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return {**values, "age_s": age.total_seconds()}


@contextmanager
def health_page(port: int, health: Callable[[], Health]) -> Iterator[int]:
    """Serve ``/healthz`` and ``/readyz`` on 127.0.0.1 while inside; yield the port.

    ``/healthz`` answers 200 while the agent looks after its parts, else 503; ``/readyz`` answers
    200 or 503 with the report. Port 0 takes a free one.

    Raises:
        ConfigurationError: the port is taken.
    """
    try:
        server = _Server(("127.0.0.1", port), _Page)
    except OSError as error:
        raise ConfigurationError(
            f"health_port: {port} cannot be opened ({error.strerror}): choose another one"
        ) from error
    with server:
        server.health = health
        thread = threading.Thread(target=server.serve_forever, name="health", daemon=True)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    health: Callable[[], Health]


class _Page(BaseHTTPRequestHandler):
    server: _Server
    timeout = 10  # seconds; a caller that says nothing is let go

    def do_GET(self) -> None:  # http.server's name
        health = self.server.health()
        if self.path == "/healthz":
            age = (datetime.now(UTC) - health.at).total_seconds()
            self._answer(age < STALE_S, {"live": age < STALE_S, "age_s": round(age, 1)})
        elif self.path == "/readyz":
            self._answer(health.ready, health.values())
        else:
            self.send_error(404)

    def _answer(self, well: bool, values: dict[str, Any]) -> None:
        content = json.dumps(values).encode()
        self.send_response(200 if well else 503)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        # A line for each look of a monitor would bury the others.
        _log.debug(format, *args)
