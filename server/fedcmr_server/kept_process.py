"""Keeps a program running beside the supervisor, and takes down what it says."""

from __future__ import annotations

import logging
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from fedcmr_server.process_leash import PATIENCE_VARIABLE

STEADY_S: Final = 60.0
"""After so long a run, the next end counts as the first."""

_ESCAPES: Final = re.compile(r"\x1b\[[0-9;]*m")
_KEPT_LINES: Final = 20
_LONGEST_LINE: Final = 4000

_log = logging.getLogger("fedcmr.supervisor")


@dataclass(frozen=True)
class Program:
    """A command, where it runs, and who takes its lines; it gets ``patience_s`` to end by itself.

    The lines are those of its standard output and error, without colours. A lock on the descriptor
    ``lock`` lasts until the program, and all that it started, has ended.
    """

    name: str
    command: Sequence[str]
    folder: Path
    environment: Mapping[str, str]
    take_line: Callable[[str], None]
    patience_s: float = 10.0
    lock: int | None = None


@dataclass(frozen=True)
class Backoff:
    """Seconds between two starts: they double from end to end."""

    first_s: float = 1.0
    most_s: float = 60.0

    def before_next(self, ends: int) -> float:
        """Return how long to wait after the ``ends``-th end in a row."""
        return min(self.first_s * 2.0 ** min(ends - 1, 16), self.most_s)


class KeptProcess:
    """A program that is started again whenever it ends, until `stop`.

    It and all that it starts end with this process, however that ends; see
    :mod:`fedcmr_server.process_leash`.
    """

    def __init__(self, program: Program, backoff: Backoff | None = None) -> None:
        self._program = program
        self._backoff = backoff or Backoff()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=program.name, daemon=True)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._problem: str | None = None
        self._starts = 0

    def start(self) -> None:
        """Begin to keep the program running."""
        self._thread.start()

    def stop(self) -> None:
        """End the program and all that it started."""
        self._stopping.set()
        self._signal(signal.SIGTERM)
        if self._thread.is_alive():
            self._thread.join()  # the leash kills what does not end

    def reload(self) -> None:
        """Let the program read its settings again (SIGHUP)."""
        self._signal(signal.SIGHUP)

    def restart(self) -> None:
        """End the program; another one takes its place."""
        self._signal(signal.SIGTERM)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def problem(self) -> str | None:
        """How the newest run ended, unless that was asked for; None before the first end."""
        return self._problem

    @property
    def starts(self) -> int:
        """How often it was started."""
        return self._starts

    @property
    def process_id(self) -> int | None:
        """The leash of the program that runs now."""
        process = self._process
        return None if process is None else process.pid

    def _keep(self) -> None:
        ends = 0
        while not self._stopping.is_set():
            began = time.monotonic()
            self._run_once()
            ends = 1 if time.monotonic() - began > STEADY_S else ends + 1
            self._stopping.wait(self._backoff.before_next(ends))

    def _run_once(self) -> None:
        program = self._program
        newest: deque[str] = deque(maxlen=_KEPT_LINES)
        try:
            process = self._launch()
        except OSError as error:
            self._problem = f"{program.name} cannot be started: {error.strerror}"
            _log.error("%s", self._problem)
            return
        with process:
            assert process.stdout is not None
            for raw in process.stdout:
                line = _ESCAPES.sub("", raw.decode(errors="replace")).rstrip()[:_LONGEST_LINE]
                newest.append(line)
                program.take_line(line)
            process.wait()
        with self._lock:
            self._process = None
        if not self._stopping.is_set():
            last = " / ".join(line for line in list(newest)[-3:] if line)
            self._problem = f"{program.name} ended with code {process.returncode}: {last}"
            _log.error("%s", self._problem)

    def _launch(self) -> subprocess.Popen[bytes]:
        program = self._program
        with self._lock:
            process = subprocess.Popen(
                [sys.executable, "-m", "fedcmr_server.process_leash", *program.command],
                cwd=program.folder,
                env={**program.environment, PATIENCE_VARIABLE: str(program.patience_s)},
                stdin=subprocess.PIPE,  # held open: the leash ends when this process does
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=() if program.lock is None else (program.lock,),
                start_new_session=True,  # Ctrl-C reaches the supervisor alone
            )
            self._process = process
            self._starts += 1
        if self._stopping.is_set():  # `stop` may have come before there was a process
            self._signal(signal.SIGTERM)
        return process

    def _signal(self, number: signal.Signals) -> None:
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                with suppress(ProcessLookupError):
                    self._process.send_signal(number)
