"""The option that names the coordinator's folder, and what opens it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from fedcmr_server.home import CoordinatorHome
    from fedcmr_server.store import Store

coordinator_option: Callable[[Callable[..., Any]], Callable[..., Any]] = click.option(
    "--coordinator",
    "folder",
    default=Path(),
    envvar="FEDCMR_COORDINATOR",
    show_envvar=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="The coordinator's folder.",
)


@contextmanager
def opened(folder: Path) -> Iterator[tuple[CoordinatorHome, Store]]:
    """Open a coordinator's folder and its database for one command.

    Raises:
        ConfigurationError: it is no coordinator's folder.
        FederationError: the database cannot be used.
    """
    from fedcmr_server.home import CoordinatorHome

    home = CoordinatorHome.open(folder)
    with home.store() as store:
        yield home, store
