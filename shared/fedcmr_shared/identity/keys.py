"""A site's Ed25519 key (RFC 8032): it signs checkpoints; the public half names the site.

Public keys and signatures are written as lower-case hexadecimal.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Self

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from fedcmr_shared.errors import LedgerError


class SiteKey:
    """The private key of a site, kept in a PEM file that only its owner may read."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private

    @classmethod
    def create(cls, path: Path) -> Self:
        """Draw a key and store it in the new file ``path``.

        The file appears complete or not at all, also when the process is killed.

        Raises:
            LedgerError: the file exists or cannot be written.
        """
        private = Ed25519PrivateKey.generate()
        pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        try:
            _write_new(path, pem)
        except FileExistsError as error:
            raise LedgerError(f"{path} exists: a site keeps its key") from error
        except OSError as error:
            raise LedgerError(f"{path}: cannot write the key: {error.strerror}") from error
        return cls(private)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the key in ``path``.

        Raises:
            LedgerError: the file is absent, unreadable or holds no Ed25519 private key.
        """
        try:
            private = load_pem_private_key(path.read_bytes(), password=None)
        except OSError as error:
            message = f"{path}: cannot read the site's key ({error.strerror})"
            raise LedgerError(f"{message}: restore it from backup") from error
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise LedgerError(f"{path}: not a private key: restore it from backup") from error
        if not isinstance(private, Ed25519PrivateKey):
            raise LedgerError(f"{path}: not an Ed25519 key: restore it from backup")
        return cls(private)

    @property
    def public_key(self) -> str:
        """The public half, 64 hexadecimal digits."""
        return self._private.public_key().public_bytes_raw().hex()

    def sign(self, data: bytes) -> str:
        """Return the signature of ``data``, 128 hexadecimal digits."""
        return self._private.sign(data).hex()

    def storage_key(self, purpose: str) -> bytes:
        """Return a 32-byte key for what only this site may read on its own disk (RFC 5869)."""
        info = f"fedcmr storage 1 {purpose}".encode()
        derivation = HKDF(algorithm=SHA256(), length=32, salt=None, info=info)
        return derivation.derive(self._private.private_bytes_raw())


def verify_signature(public_key: str, signature: str, data: bytes) -> None:
    """Return if ``public_key`` signed ``data``.

    Raises:
        LedgerError: it did not, or the key or signature is not one.
    """
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key))
        key.verify(bytes.fromhex(signature), data)
    except ValueError as error:
        raise LedgerError(f"{public_key[:64]!r} is not an Ed25519 public key") from error
    except InvalidSignature as error:
        message = f"the signature is not that of key {public_key[:16]}…"
        raise LedgerError(f"{message}: somebody else signed, or the content was changed") from error


def _write_new(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # A hard link, unlike a rename, never replaces a file.
        os.link(partial, path)
    finally:
        partial.unlink()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
