"""Keeps Flower's SuperNode running beside the agent.

The SuperNode carries messages between the site's tunnel and the `Runner`; it never sees a policy,
a ledger or a scan. It keeps everything in memory, so every start is a fresh one, with another port
and another secret for whoever may fetch tasks from it. What it writes becomes lines of the log
`fedcmr.supernode`.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from fedcmr_client.ledger.place import make_folder, write_durably
from fedcmr_client.supernode_process import MEMORY_VARIABLE
from fedcmr_shared.cli import FLOWER_SILENCE
from fedcmr_shared.errors import ConfigurationError

STEADY_S: Final = 60.0
"""After so long a run, the next end counts as the first; Flower holds a node online as long."""

_EXIT_CODE: Final = re.compile(r"Exit Code: (\d+)")
_CONNECTED: Final = re.compile(r"SuperNode ID: (\d+)")
_STRANDED: Final = re.compile(r"is not in `RUNNING` status\. Ignoring message ")
_LEVEL: Final = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL)\s*:\s*(.*)")
_ESCAPES: Final = re.compile(r"\x1b\[[0-9;]*m")
_PROXIES: Final = ("http_proxy", "https_proxy", "all_proxy")
_KEPT_LINES: Final = 40

_log = logging.getLogger("fedcmr.supernode")


@dataclass(frozen=True)
class RuntimeAddress:
    """Where a SuperNode hands out tasks, and the secret that it asks for."""

    address: str
    secret: bytes


@dataclass(frozen=True)
class SuperNodeSettings:
    """How to start a SuperNode.

    ``superlink`` is HOST:PORT of the tunnel's Fleet end, whose certificate ``root_certificates``
    has signed. ``private_key`` is the site's node key: ECDSA P-384 in OpenSSH format. ``folder``
    becomes private to the SuperNode. ``memory_mib`` bounds what a bundle or message from outside
    can make it allocate.
    """

    superlink: str
    root_certificates: Path
    private_key: Path
    folder: Path
    memory_mib: int | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r".+:\d{1,5}", self.superlink):
            raise ConfigurationError(f"superlink is {self.superlink!r}: write HOST:PORT")
        for name in ("root_certificates", "private_key"):
            path: Path = getattr(self, name)
            if not path.is_file():
                raise ConfigurationError(f"{name}: {path} is no file: enrol the site first")
        if self.memory_mib is not None and self.memory_mib < 512:
            raise ConfigurationError(
                f"memory_mib is {self.memory_mib}: a SuperNode needs at least 512"
            )


@dataclass(frozen=True)
class Patience:
    """Seconds between two starts.

    A node that was killed is not let in again until Flower has missed it for a minute (exit code
    305): it tries every ``refused_s``. After other ends the time doubles up to ``most_s``.
    """

    refused_s: float = 5.0
    first_s: float = 1.0
    most_s: float = 60.0

    def before_next(self, code: int | None, ends: int) -> float:
        """Return how long to wait after the ``ends``-th end in a row, with Flower's ``code``."""
        if code == 305:
            return self.refused_s
        if code == 302:  # only a person can mend the key
            return self.most_s
        return min(self.first_s * 2.0 ** min(ends - 1, 16), self.most_s)


class SuperNode:
    """A SuperNode process that is started again whenever it ends, until `stop`."""

    def __init__(self, settings: SuperNodeSettings, patience: Patience | None = None) -> None:
        self._settings = settings
        self._patience = patience or Patience()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep_running, name="supernode", daemon=True)
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._runtime: RuntimeAddress | None = None
        self._node_id: int | None = None
        self._problem: str | None = None

    def start(self) -> None:
        """Begin to keep a SuperNode running; returns before it is connected."""
        self._thread.start()

    def stop(self, patience_s: float = 15.0) -> None:
        """End the SuperNode: it signs off at the coordinator, or is killed after ``patience_s``."""
        self._stopping.set()
        self._end(signal.SIGTERM)
        self._thread.join(patience_s)
        while self._thread.is_alive():
            self._end(signal.SIGKILL)
            self._thread.join(0.5)

    def restart(self) -> None:
        """End the process; another one takes its place."""
        self._end(signal.SIGTERM)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def runtime(self) -> RuntimeAddress | None:
        """Where to fetch tasks; None while no SuperNode was let in by the coordinator."""
        return self._runtime if self._node_id is not None else None

    @property
    def node_id(self) -> int | None:
        """The node's number at the coordinator; None until the running process was let in."""
        return self._node_id

    @property
    def problem(self) -> str | None:
        """Why there is no connection, as far as the newest log line tells; None if there is."""
        return self._problem

    @property
    def process_id(self) -> int | None:
        """The process that runs now."""
        process = self._process
        return None if process is None else process.pid

    def _keep_running(self) -> None:
        ends = 0
        while not self._stopping.is_set():
            began = time.monotonic()
            code = self._run_once()
            ends = 1 if time.monotonic() - began > STEADY_S else ends + 1
            self._stopping.wait(self._patience.before_next(code, ends))

    def _run_once(self) -> int | None:
        """Run a process to its end; return Flower's exit code, if it wrote one."""
        try:
            process = self._launch()
        except OSError as error:
            self._problem = f"the SuperNode cannot be started ({error}): check {self._folder}"
            _log.error("%s", self._problem)
            return None
        with process:
            lines = self._follow(process)
        with self._lock:
            self._process, self._runtime, self._node_id = None, None, None
        if self._stopping.is_set():
            return None
        code, self._problem = _explain(lines, process.returncode)
        _log.warning("%s", self._problem)
        return code

    def _launch(self) -> subprocess.Popen[bytes]:
        make_folder(self._folder)
        secret = secrets.token_bytes(32)
        write_durably(self._folder / "runtime.secret", secret)
        port = _free_port()
        with self._lock:
            process = subprocess.Popen(
                self._command(port),
                stdin=subprocess.PIPE,  # held open: it ends when this process does
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                start_new_session=True,
            )
            self._process = process
            self._runtime = RuntimeAddress(f"127.0.0.1:{port}", secret)
        if self._stopping.is_set():  # `stop` may have come before there was a process
            self._end(signal.SIGTERM)
        return process

    def _follow(self, process: subprocess.Popen[bytes]) -> list[str]:
        """Log what the process writes until it ends; return the last lines."""
        newest: deque[str] = deque(maxlen=_KEPT_LINES)
        assert process.stdout is not None
        for raw in process.stdout:
            level, line = _parse(raw)
            if not line:
                continue
            newest.append(line)
            _log.log(level, "%s", line)
            self._notice(line)
        process.wait()
        return list(newest)

    def _notice(self, line: str) -> None:
        if connected := _CONNECTED.search(line):
            self._node_id, self._problem = int(connected[1]), None
        elif line.startswith("Connection attempt failed"):
            self._problem = "the coordinator cannot be reached; it is tried again"
        elif line.startswith("Connection successful"):
            self._problem = None
        elif _STRANDED.search(line):
            # Its task is kept all the same, and answered. From then on Flower would send each
            # answer only once the next question has come: too late for all that follow.
            self.restart()

    def _command(self, port: int) -> list[str]:
        settings = self._settings
        options = {
            "--superlink": settings.superlink,
            "--root-certificates": settings.root_certificates.absolute(),
            "--auth-supernode-private-key": settings.private_key.absolute(),
            "--isolation": "process",
            "--host": "127.0.0.1",
            "--port": port,
            "--superexec-auth-secret-file": self._folder / "runtime.secret",
        }
        command = [sys.executable, "-P", "-m", "fedcmr_client.supernode_process"]
        return command + [str(part) for option in options.items() for part in option]

    def _environment(self) -> Mapping[str, str]:
        # The tunnel alone knows the hospital's proxy; the SuperNode speaks to it on loopback.
        kept = {name: value for name, value in os.environ.items() if name.lower() not in _PROXIES}
        kept |= {**FLOWER_SILENCE, "FLWR_HOME": str(self._folder), "PYTHONUNBUFFERED": "1"}
        if self._settings.memory_mib is not None:
            kept[MEMORY_VARIABLE] = str(self._settings.memory_mib << 20)
        return kept

    def _end(self, number: signal.Signals) -> None:
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(self._process.pid, number)

    @property
    def _folder(self) -> Path:
        return self._settings.folder.absolute()


def _parse(raw: bytes) -> tuple[int, str]:
    """Return the level and text of a line that Flower logged."""
    text = _ESCAPES.sub("", raw.decode(errors="replace")).strip()
    levelled = _LEVEL.fullmatch(text)
    if levelled is None:
        return logging.INFO, text
    return logging.getLevelNamesMapping()[levelled[1]], levelled[2]


def _explain(lines: list[str], returncode: int) -> tuple[int | None, str]:
    """Return Flower's exit code, if there is one, and what an operator should know."""
    text = "\n".join(lines)
    found = _EXIT_CODE.findall(text)
    code = int(found[-1]) if found else None
    if code == 302:
        return code, "the SuperNode cannot use the node key: enrol the site again (Flower 302)"
    if code == 305:
        reason = text.rpartition("Failed to initialize the connection")[2].splitlines()[1:2]
        return code, (
            f"the coordinator does not let the node in ({' '.join(reason).strip() or 'no reason'}): "
            "after a crash this lasts about a minute; if it lasts, ask the coordinator whether the "
            "site's node key is registered; it is tried again (Flower 305)"
        )
    if code is not None:
        return code, f"the SuperNode ended with Flower's exit code {code}: read the log above"
    if returncode == 0:
        return code, (
            "the coordinator does not accept the node any more: it was removed there, or this "
            "machine's clock is wrong"
        )
    return code, f"the SuperNode ended unexpectedly (exit {returncode}); it is started again"


def _free_port() -> int:
    # Whoever takes the port before the SuperNode does makes it fail, and the next start draws anew.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
