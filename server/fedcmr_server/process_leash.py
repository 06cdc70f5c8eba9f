"""Runs a command that never outlives the coordinator: `python -m` this, then the command.

Standard input is held open by the supervisor. When it closes, whatever killed the supervisor, the
command is ended, and so is everything that it started: orphans come to this process, which waits
for them (Linux, `PR_SET_CHILD_SUBREAPER`). Should this process itself be killed, the kernel ends
the command. SIGTERM ends the command in good order, SIGHUP is passed on.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

PATIENCE_VARIABLE: Final = "FEDCMR_STOP_PATIENCE"
"""Names the environment variable with the seconds that the command gets to end by itself."""

_PARENT_DEATH_SIGNAL: Final = 1  # of prctl(2)
_CHILD_SUBREAPER: Final = 36
_POLL_S: Final = 0.1


def main(command: Sequence[str]) -> int:
    """Run ``command`` to its end and return its exit code."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(_CHILD_SUBREAPER, 1, 0, 0, 0)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            preexec_fn=_dies_with(os.getpid(), prctl),  # noqa: PLW1509  # no other thread yet
        )
    except OSError as error:
        print(f"{command[0]} cannot be started: {error.strerror}", file=sys.stderr)
        return 127
    signal.signal(signal.SIGHUP, lambda *_: child.send_signal(signal.SIGHUP))
    threading.Thread(target=_watch, args=(stop,), daemon=True).start()
    code = _wait(child, stop)
    _end_all()
    return code if code >= 0 else 128 - code


def _wait(child: subprocess.Popen[bytes], stop: threading.Event) -> int:
    patience = float(os.environ.get(PATIENCE_VARIABLE, "10"))
    deadline: float | None = None
    while (code := child.poll()) is None:
        if stop.is_set() and deadline is None:
            child.terminate()
            deadline = time.monotonic() + patience
        if deadline is not None and time.monotonic() > deadline:
            child.kill()
        time.sleep(_POLL_S)
    return code


def _watch(stop: threading.Event) -> None:
    while os.read(0, 1024):
        pass
    stop.set()


def _end_all() -> None:
    """Kill what the command left behind; each kill brings its children here."""
    while children := _children():
        for process in children:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for process in children:
            with suppress(ChildProcessError):
                os.waitpid(process, 0)


def _children() -> list[int]:
    text = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return [int(process) for process in text.split()]


def _dies_with(parent: int, prctl: Callable[..., int]) -> Callable[[], None]:
    def prepare() -> None:
        prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM, 0, 0, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        if os.getppid() != parent:  # it was killed before the kernel knew
            os._exit(1)

    return prepare


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
