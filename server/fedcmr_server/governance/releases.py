"""Released models as files to download, and the refusals of others."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from fedcmr_server.governance.gatekeeper import NotFound
from fedcmr_server.store import Events, Releases, Store
from fedcmr_server.store.tables import ReleaseRow
from fedcmr_shared.errors import ConfigurationError

CHUNK: Final = 256 * 1024

_log = logging.getLogger("fedcmr.governance")


class ReleaseFiles:
    """The releases that the store lists, below ``folder``."""

    def __init__(self, store: Store, folder: Path) -> None:
        self._releases = Releases(store)
        self._events = Events(store)
        self._folder = folder

    def all(self) -> list[ReleaseRow]:
        """Return the releases, the first first."""
        return self._releases.all()

    def refusals(self) -> list[str]:
        """Return the signed refusals (JSON), the first first.

        Coordinators of an older version refused without signing: those are not listed.
        """
        refused = self._events.named("release_refused")
        return [
            json.dumps(event.content["refusal"]) for event in refused if "refusal" in event.content
        ]

    def find(self, job: str, sha256: str) -> ReleaseRow:
        """Return the newest release of ``job``, or the one with ``sha256``; NotFound if none."""
        rows = [row for row in self.all() if row.job == job and sha256 in ("", row.sha256)]
        if not rows:
            raise NotFound("no such release: list them first")
        return rows[-1]

    def read(self, release: ReleaseRow, offset: int) -> Iterator[bytes]:
        """Yield the file from ``offset`` on in chunks.

        Raises:
            NotFound: the file is not where it belongs.
            ConfigurationError: it has not so many bytes.
        """
        if offset > release.size:
            raise ConfigurationError(f"offset: the file has {release.size} bytes")
        with self._path(release).open("rb") as file:
            file.seek(offset)
            while chunk := file.read(CHUNK):
                yield chunk

    def _path(self, release: ReleaseRow) -> Path:
        path = (self._folder / release.path).resolve()
        inside = path.is_relative_to(self._folder.resolve())
        if not inside or not path.is_file() or path.stat().st_size != release.size:
            _log.error("release %s is not in %s as it was released", release.path, self._folder)
            raise NotFound("the file of this release is missing: tell the coordinator's operator")
        return path
