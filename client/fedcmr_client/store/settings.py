"""``site.toml``: the format of a site store and where its catalogue is kept."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Final

from sqlalchemy.engine import URL

from fedcmr_client.store import catalogue
from fedcmr_client.store.scan_file import sync
from fedcmr_shared.errors import DataError

CATALOGUE_URL_VARIABLE: Final = "FEDCMR_CATALOGUE_URL"
"""Environment variable that overrides the stored catalogue URL, password included."""

_SETTINGS: Final = "site.toml"
_CATALOGUE: Final = "catalogue.sqlite"
_FORMAT: Final = "1"


def is_store(root: Path) -> bool:
    """Whether the folder ``root`` holds the settings of a store."""
    return (root / _SETTINGS).exists()


def catalogue_file(root: Path) -> Path:
    """File of the catalogue unless it is kept elsewhere."""
    return root / _CATALOGUE


def default_url(root: Path) -> URL:
    """URL of `catalogue_file`."""
    return URL.create("sqlite", database=str(catalogue_file(root)))


def catalogue_url(root: Path, named: str | None) -> URL:
    """URL from the environment, else ``named``, else the default; DataError when it is no use."""
    text = os.environ.get(CATALOGUE_URL_VARIABLE) or named
    return catalogue.parse_url(text) if text else default_url(root)


def read(root: Path) -> dict[str, str]:
    """Settings of the store in ``root``; DataError when there are none or they are damaged."""
    path = root / _SETTINGS
    if not path.is_file():
        message = "`fedcmr data import` makes one"
        raise DataError(f"{root} is not a site store (no {_SETTINGS}): {message}")
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # text and TOML errors are ValueErrors
        raise DataError(f"{path}: cannot be read: {error}") from error
    if settings.get("format") != _FORMAT or not all(isinstance(v, str) for v in settings.values()):
        raise DataError(f'{path}: not the settings of a site store (format = "{_FORMAT}")')
    return settings


def write(root: Path, url: URL) -> None:
    """Make ``root`` a store with its catalogue at ``url``, whose password is not stored."""
    lines = [f'format = "{_FORMAT}"']
    if url != default_url(root):
        stored = _without_password(url).render_as_string(hide_password=False)
        # A JSON string is also a TOML string.
        lines.append(f"database_url = {json.dumps(stored)}")
    path = root / _SETTINGS
    with path.open("x", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
        file.flush()
        os.fsync(file.fileno())
    sync(root)


def _without_password(url: URL) -> URL:
    # URL.set takes None for "as it is".
    return URL.create(
        url.drivername,
        username=url.username,
        host=url.host,
        port=url.port,
        database=url.database,
        query=url.difference_update_query(["password"]).query,
    )
