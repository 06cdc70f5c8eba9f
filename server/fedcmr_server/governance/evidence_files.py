"""Evidence bundles that sites handed in: files below the coordinator's folder.

::

    evidence/<site>/<sha256>.json         the bundle, as it came
    evidence/<site>/<sha256>.about.json   what it is; without it there is no bundle
"""

from __future__ import annotations

import hashlib
import tempfile
import threading
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationError

from fedcmr_server.governance.admission import Caller
from fedcmr_server.governance.gatekeeper import NotFound
from fedcmr_server.home import write_private
from fedcmr_shared.audit.evidence import Evidence
from fedcmr_shared.audit.verify import verify_origin
from fedcmr_shared.errors import DataError, FederationError, LedgerError
from fedcmr_shared.schemas.ledger import Hash

LARGEST: Final = 64 * 2**20
"""Bytes of a bundle."""

MOST_BUNDLES: Final = 64
"""Of one site. The coordinator moves older ones away."""

CHUNK: Final = 256 * 1024


class About(BaseModel):
    """One bundle: whose it is, how many leaves its checkpoint covers, and its file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    site: str
    job: Hash | None
    leaves: int
    sha256: Hash
    bytes: int
    received_at: int


class EvidenceFiles:
    """The bundles in ``folder``, which is made when the first one comes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()  # large bundles take much memory: one at a time

    def put(self, caller: Caller, chunks: Iterable[bytes]) -> str:
        """Keep the caller's bundle once format, key and signatures are right; return its SHA-256.

        Raises:
            LedgerError: it is too large, no bundle, or another site's.
            FederationError: the site has handed in too many.
        """
        self._folder.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryFile(dir=self._folder) as received:
            for chunk in chunks:
                received.write(chunk)
                if received.tell() > LARGEST:
                    raise LedgerError(f"the bundle is larger than {LARGEST} bytes")
            received.seek(0)
            with self._lock:
                return self._keep(caller, received.read())

    def all(self) -> list[About]:
        """Return what is here, the first first."""
        paths = self._folder.glob("*/*.about.json")
        entries = [About.model_validate_json(path.read_bytes()) for path in paths]
        return sorted(entries, key=lambda about: (about.received_at, about.sha256))

    def read(self, site: str, sha256: str) -> Iterator[bytes]:
        """Yield a bundle in chunks; NotFound if there is none."""
        # Names from outside are compared, and never become part of a path.
        about = next((a for a in self.all() if (a.site, a.sha256) == (site, sha256)), None)
        if about is None:
            raise NotFound("no such evidence bundle is here")
        with self._path(about).open("rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk

    def _keep(self, caller: Caller, content: bytes) -> str:
        try:
            evidence = Evidence.model_validate_json(content)
        except ValidationError as error:
            raise LedgerError("step 1, format, failed: this is no evidence bundle") from error
        verify_origin(evidence, {caller.name: caller.identity})
        about = About(
            site=caller.name,
            job=evidence.job,
            leaves=evidence.checkpoint.size,
            sha256=hashlib.sha256(content).hexdigest(),
            bytes=len(content),
            received_at=round(datetime.now(UTC).timestamp() * 1000),
        )
        own = [each for each in self.all() if each.site == caller.name]
        if about.sha256 in {each.sha256 for each in own}:
            return about.sha256
        if len(own) >= MOST_BUNDLES:
            raise FederationError(
                f"{len(own)} bundles of {caller.name} are here: ask the coordinator to move some"
            )
        try:
            self._path(about).parent.mkdir(mode=0o700, exist_ok=True)
            write_private(self._path(about), content)
            write_private(self._path(about, "about.json"), about.model_dump_json().encode())
        except OSError as error:
            raise DataError("the coordinator cannot write the bundle: tell its operator") from error
        return about.sha256

    def _path(self, about: About, ending: str = "json") -> Path:
        return self._folder / about.site / f"{about.sha256}.{ending}"
