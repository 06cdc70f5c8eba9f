"""Accepts the one app bundle that holds no code, and no other.

A bundle is accepted only if it is, byte by byte, the one that this version of the software makes.
So nothing of a bundle from outside is unpacked, parsed or imported before it is accepted, and what
two readers of a zip file may see differently does not matter. What is wrong with another bundle is
looked up only to tell it to the site's operator.
"""

from __future__ import annotations

import zipfile
import zlib
from io import BytesIO
from typing import Final, Literal

from fedcmr_shared import __version__
from fedcmr_shared.errors import JobRefused
from fedcmr_shared.federation.flower_app import (
    APP_PROJECT,
    CONTENT_ENTRY,
    PROJECT_ENTRY,
    app_bundle,
)

BundleRule = Literal["size", "archive", "entries", "project", "encoding"]

MOST_BYTES: Final = 64 * 1024
"""A larger bundle is not looked into."""

_EXPECTED: Final = app_bundle()
_ENTRIES: Final = {PROJECT_ENTRY, CONTENT_ENTRY}
_MOST_NAMED: Final = 5
_UNREADABLE: Final = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    LookupError,
    NotImplementedError,  # a compression or feature that zipfile does not have
    OSError,
    RuntimeError,  # encrypted
    ValueError,
)


def check_bundle(content: bytes) -> None:
    """Accept ``content`` if it is the code-free app of this version of the software.

    Raises:
        JobRefused: with the code ``bundle`` and a `BundleRule`; it is any other bundle.
    """
    if content == _EXPECTED:
        return
    rule, what = _difference(content)
    raise JobRefused(
        "bundle",
        rule,
        f"the app that came with the message is not the code-free app of fedcmr {__version__}: "
        f"{what}",
    )


def _difference(content: bytes) -> tuple[BundleRule, str]:
    if len(content) > MOST_BYTES:
        return "size", f"it has {len(content)} bytes, more than {MOST_BYTES}"
    try:
        with zipfile.ZipFile(BytesIO(content)) as bundle:
            entries = bundle.infolist()
            if len(entries) != len(_ENTRIES) or {entry.filename for entry in entries} != _ENTRIES:
                return "entries", f"it holds {_names(entries)}"
            project = _first_bytes(bundle, PROJECT_ENTRY)
    except _UNREADABLE as error:
        return "archive", f"it is no readable zip file ({type(error).__name__})"
    if project != APP_PROJECT.encode():
        return "project", f"its {PROJECT_ENTRY} differs: coordinator and site need the same version"
    return "encoding", "it says the same in other bytes: start runs by fedcmr, not by flwr run"


def _first_bytes(bundle: zipfile.ZipFile, name: str) -> bytes:
    with bundle.open(name) as file:
        return file.read(MOST_BYTES)  # a small entry may unpack to gigabytes


def _names(entries: list[zipfile.ZipInfo]) -> str:
    names = [ascii(entry.filename[:80]) for entry in entries[:_MOST_NAMED]]
    more = len(entries) - len(names)
    return ", ".join(names) + (f" and {more} more" if more > 0 else "") if names else "nothing"
