"""The Flower app bundle: one project file without code, the same bytes for server and sites.

Flower wants every message to come with an app. Ours names two objects of the installed packages
and holds nothing else, so that a site can compare a bundle byte by byte with the one that it makes
itself. The entries are stored, not compressed: what a compressor writes depends on its version.
"""

from __future__ import annotations

import zipfile
from hashlib import sha256
from io import BytesIO
from typing import Final

from fedcmr_shared import __version__

PROJECT_ENTRY: Final = "pyproject.toml"
CONTENT_ENTRY: Final = ".info/CONTENT"

# As Flower writes `deploy/flower-app/pyproject.toml` into a bundle: without its comments.
APP_PROJECT: Final = f"""\
[build-system]
requires = [
    "hatchling",
]
build-backend = "hatchling.build"

[project]
name = "fedcmr-app"
version = "{__version__}"
description = "Code-free Flower app of FedCMR"
license = "Apache-2.0"
dependencies = [
    "flwr==1.41.0",
]

[tool.flwr.app]
publisher = "fedcmr"

[tool.flwr.app.components]
serverapp = "fedcmr_server.app:app"
clientapp = "fedcmr_client.app:app"

[tool.flwr.app.config]
job = ""
"""
"""The app's project file; the run configuration names the coordinator's job by its id."""

_DATE: Final = (1980, 1, 1, 0, 0, 0)


def app_bundle() -> bytes:
    """Return the app as a Flower App Bundle; the same bytes on every machine.

    Flower's own ``flwr build`` gives a bundle of the same entries, but compressed.
    """
    project = APP_PROJECT.encode()
    listing = f"{PROJECT_ENTRY},{sha256(project).hexdigest()},{8 * len(project)}"
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as bundle:
        for name, content in ((PROJECT_ENTRY, project), (CONTENT_ENTRY, listing.encode())):
            entry = zipfile.ZipInfo(name, date_time=_DATE)
            entry.create_system = 3  # else the machine's
            bundle.writestr(entry, content)
    return buffer.getvalue()
