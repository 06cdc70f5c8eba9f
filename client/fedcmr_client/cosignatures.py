"""Files about cosignatures, in the ledger's folder.

::

    cosigned.json       the newest head of each other site that this one cosigned
    cosignatures.json   what other sites cosigned of this site's ledger; evidence carries it
    forks/              signed heads of a site, of which none was shown to continue the other
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from fedcmr_client.ledger.place import make_folder, write_durably
from fedcmr_shared.errors import LedgerError
from fedcmr_shared.schemas.ledger import Checkpoint, Hash

_FROZEN: Final = ConfigDict(frozen=True, extra="forbid")

_File = TypeVar("_File", bound=BaseModel)


class CosignedHead(BaseModel):
    """The newest head of a site that was cosigned, and the site's key."""

    model_config = _FROZEN

    key: Hash
    checkpoint: Checkpoint


class Cosigned(BaseModel):
    """Heads by site. A head is kept before its cosignature leaves: no other is signed after it."""

    model_config = _FROZEN

    heads: dict[str, CosignedHead] = {}

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the file, or nothing if there is none; LedgerError when it is damaged."""
        return _read(cls, folder / "cosigned.json")

    def keep(self, folder: Path, site: str, key: str, checkpoint: Checkpoint) -> Self:
        """Return, and write to last, the heads with a newer one; LedgerError when that fails."""
        bare = checkpoint.model_copy(update={"cosignatures": {}})
        head = CosignedHead(key=key, checkpoint=bare)
        newer = self.model_copy(update={"heads": {**self.heads, site: head}})
        _write(folder / "cosigned.json", newer.model_dump(mode="json"))
        return newer


class Cosignatures(BaseModel):
    """Cosignatures (public key to signature) by the root of the head of this site's ledger."""

    model_config = _FROZEN

    by_root: dict[Hash, dict[str, str]] = {}

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the file, or nothing if there is none; LedgerError when it is damaged."""
        return _read(cls, folder / "cosignatures.json")

    def keep(self, folder: Path, found: Mapping[str, Mapping[str, str]]) -> None:
        """Add what was ``found``, to last; LedgerError when that fails."""
        merged = {
            root: {**self.by_root.get(root, {}), **found.get(root, {})}
            for root in {**self.by_root, **found}
        }
        if merged != self.by_root:
            _write(folder / "cosignatures.json", {"by_root": merged})

    def on(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return ``checkpoint`` with its cosignatures."""
        return checkpoint.model_copy(update={"cosignatures": self.by_root.get(checkpoint.root, {})})


def keep_fork(folder: Path, heads: tuple[Checkpoint, Checkpoint]) -> Path:
    """Keep two signed heads of one site that contradict each other; return the file."""
    content = {"site": heads[0].site, "heads": [head.model_dump(mode="json") for head in heads]}
    name = hashlib.sha256("".join(sorted(head.root for head in heads)).encode()).hexdigest()[:16]
    path = folder / "forks" / f"{name}.json"
    _write(path, content)
    return path


def _read(kind: type[_File], path: Path) -> _File:
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return kind()
    except OSError as error:
        raise LedgerError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise LedgerError(f"{path} was changed: restore it from backup") from error


def _write(path: Path, content: Any) -> None:
    try:
        make_folder(path.parent)
        write_durably(path, json.dumps(content, indent=1).encode() + b"\n")
    except OSError as error:
        raise LedgerError(f"{path} cannot be written: {error.strerror}") from error
