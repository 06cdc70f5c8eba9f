"""Flower's SuperNode in a process of its own that never outlives its agent: `python -m` this.

Flower alone would live on in three cases; each ends the process here, so that `SuperNode` sees it
and starts another:

- the agent is gone, whatever killed it: the other end of standard input closes;
- a thread died, for example the one of the heartbeats: the node would look offline for ever; or
  the main thread, without which its web server's would still keep the process;
- the connection's loop ended with an error: Flower logs it and waits for its web server.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
import sys
import threading
from types import TracebackType

from flwr.supernode.cli.flower_supernode import flower_supernode

MEMORY_VARIABLE = "FEDCMR_SUPERNODE_MEMORY"
"""Names the environment variable with the most bytes that the process may allocate."""

_log = logging.getLogger("fedcmr.site")


def main() -> None:
    """Run a SuperNode with the arguments of `flower-supernode` until standard input ends."""
    memory = os.environ.get(MEMORY_VARIABLE)
    if memory is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (int(memory), int(memory)))
    threading.excepthook = _end
    sys.excepthook = _end_at_once
    threading.Thread(target=_end_with_the_agent, daemon=True).start()
    flower_supernode()
    os._exit(1)


def _end_with_the_agent() -> None:
    while os.read(0, 1 << 10):
        pass
    _stop()


def _end(failure: threading.ExceptHookArgs, /) -> None:
    name = failure.thread.name if failure.thread else "a thread"
    _log.error("%s ended: %s", name, failure.exc_value)
    _stop()


def _end_at_once(
    kind: type[BaseException], failure: BaseException, trace: TracebackType | None
) -> None:
    sys.__excepthook__(kind, failure, trace)
    sys.stderr.flush()
    os._exit(1)


def _stop() -> None:
    # By a signal, so that Flower's handler takes the node off the coordinator's list first.
    with contextlib.suppress(ProcessLookupError):
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
