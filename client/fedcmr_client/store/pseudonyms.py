"""Keyed pseudonyms: the same patient always gets the same name, and only the site can tell whose.

The key is the site secret, 32 random bytes in a file that never leaves the site. Whoever holds it
can test a guessed patient name against a pseudonym, so it deserves the care of a password.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import secrets
import unicodedata
from pathlib import Path
from typing import Final

from fedcmr_shared.errors import DataError

SECRET_BYTES: Final = 32


def create_secret(path: Path, secret: bytes | None = None) -> bytes:
    """Store ``secret``, or a fresh one, in a new file that only its owner may read.

    Raises DataError when the file exists or when a given secret has not 32 bytes.
    """
    secret = secrets.token_bytes(SECRET_BYTES) if secret is None else secret
    if len(secret) != SECRET_BYTES:
        raise DataError(f"{path}: a site secret has {SECRET_BYTES} bytes, not {len(secret)}")
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise DataError(f"{path} exists: a site keeps its secret; choose another folder") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(secret)
        file.flush()
        os.fsync(file.fileno())
    return secret


def read_secret(path: Path) -> bytes:
    """Return the site secret; DataError when it is absent or has not 32 bytes."""
    try:
        secret = path.read_bytes()
    except OSError as error:
        message = f"{path}: cannot read the site secret ({error.strerror}): restore it from backup"
        raise DataError(message) from error
    if len(secret) != SECRET_BYTES:
        message = f"the site secret has {len(secret)} bytes instead of {SECRET_BYTES}"
        raise DataError(f"{path}: {message}: restore it from backup")
    return secret


def keyed_hash(secret: bytes, purpose: str, text: str) -> bytes:
    """HMAC-SHA256 of ``text`` under the site secret, apart for each purpose."""
    # File names can hold bytes that are not valid text; Python keeps those as surrogates.
    message = f"{purpose}:{text}".encode("utf-8", "surrogatepass")
    return hmac.new(secret, message, hashlib.sha256).digest()


def pseudonym(secret: bytes, patient: str) -> str:
    """Return ``p-`` and 26 lower-case base32 characters (128 bits) for a patient's name.

    Surrounding white space and the Unicode form (NFC or NFD) of the name do not matter; case does.
    Raises DataError when the name is empty.
    """
    name = unicodedata.normalize("NFC", patient.strip())
    if not name:
        raise DataError("the patient name is empty: give one with --patient or --patient-map")
    code = base64.b32encode(keyed_hash(secret, "patient", name)[:16]).decode("ascii")
    return f"p-{code.rstrip('=').lower()}"


def fingerprint(secret: bytes) -> str:
    """Public check value (hexadecimal) that tells two secrets apart without revealing either."""
    return keyed_hash(secret, "fingerprint", "").hex()
