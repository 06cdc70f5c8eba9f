"""One agent for a site: a lock on a file that the system releases when the agent ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from fedcmr_client.ledger.place import make_folder
from fedcmr_shared.errors import ConfigurationError

FILE: Final = "agent.lock"
"""Name of the lock file, in `SiteHome.run`."""


@contextmanager
def only_agent(path: Path) -> Iterator[None]:
    """Be the only process inside for the lock file ``path``.

    Raises:
        ConfigurationError: another one is, or the file cannot be made.
    """
    descriptor = _open(path)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 20, 0).decode(errors="replace").strip() or "unknown"
            raise ConfigurationError(
                f"another agent runs for this site already (process {holder}): two would spend "
                "the site's budget on the same rounds; stop that one first"
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)  # and with it the lock


def agent_process(path: Path) -> int | None:
    """Return the process that holds the lock file ``path``, or None when none does."""
    if not path.exists():
        return None
    descriptor = _open(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        digits = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
        return int(digits) if digits.isdecimal() else 0
    finally:
        os.close(descriptor)
    return None


def _open(path: Path) -> int:
    try:
        make_folder(path.parent)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be opened: {error.strerror}") from error
