"""Small files that are encrypted on a site's disk (AES-256-GCM) and erased when they are over.

A file is complete or not there at all, and its name is bound to its content.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedcmr_client.ledger.place import write_durably
from fedcmr_shared.errors import LedgerError

KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12


class SealBroken(LedgerError):
    """A sealed file is damaged, or was written with another key or under another name."""


def read_sealed(path: Path, key: bytes, consequence: str) -> bytes | None:
    """Return what `write_sealed` wrote with the same key; None where there is no file.

    Raises:
        SealBroken: it was not written so; ``consequence`` says what removing it means.
        LedgerError: the disk does not give it.
    """
    try:
        sealed = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LedgerError(f"{path}: cannot be read: {error.strerror}") from error
    nonce, body = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
    try:
        return AESGCM(key).decrypt(nonce, body, path.name.encode())
    except (InvalidTag, ValueError) as error:
        message = f"was changed or is another site's: remove it, {consequence}"
        raise SealBroken(f"{path}: {message}") from error


def write_sealed(path: Path, key: bytes, content: bytes) -> None:
    """Write ``content`` to last; LedgerError when the file cannot be written."""
    nonce = os.urandom(_NONCE_BYTES)
    try:
        write_durably(path, nonce + AESGCM(key).encrypt(nonce, content, path.name.encode()))
    except OSError as error:
        raise LedgerError(f"{path}: cannot be written: {error.strerror}") from error


def erase(path: Path) -> None:
    """Overwrite a file with zeros and remove it, if there is one; LedgerError when it stays."""
    try:
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))
            file.flush()
            os.fsync(file.fileno())
        path.unlink()
    except FileNotFoundError:
        return
    except OSError as error:
        raise LedgerError(f"{path}: cannot be erased: {error.strerror}") from error
