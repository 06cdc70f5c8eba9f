"""One process at a time in a folder of the coordinator."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedcmr_shared.errors import FederationError


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait until no other process is here, and keep them out; a dead one is here no more.

    Raises:
        FederationError: the folder cannot be opened.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise FederationError(
            f"{folder} cannot be opened: {error.strerror}: restore it from backup"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
