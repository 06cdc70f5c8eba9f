"""Keys that two sites agree on, and boxes that one seals for the other.

X25519 (RFC 7748), HKDF-SHA256 (RFC 5869) and AES-256-GCM; with the post-quantum option also
ML-KEM-768 (FIPS 203), and then whoever wants to read must break both. A key pair grows from one
32-byte root, so that sharing the root shares the pair.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import (
    MLKEM768PrivateKey,
    MLKEM768PublicKey,
)
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import BaseModel, ConfigDict, Field

from fedcmr_shared.schemas.canonical import canonical_json
from fedcmr_shared.schemas.ledger import Hash
from fedcmr_shared.secagg.faults import ProtocolError

ROOT_BYTES: Final = 32
_NONCE_BYTES: Final = 12
_TAG_BYTES: Final = 16
_ENCAPSULATION_BYTES: Final = 1088
_KEM_KEY_BYTES: Final = 1184
_FIELD: Final = 2**255 - 19


class PublicKey(BaseModel):
    """Public half of a key pair, hexadecimal; ``mlkem768`` with the post-quantum option only."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    x25519: Hash
    mlkem768: Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * _KEM_KEY_BYTES}}}$")] | None = None


def derive(secret: bytes, *purpose: str | int, length: int = 32) -> bytes:
    """Return ``length`` bytes that ``secret`` determines for ``purpose`` and nothing else."""
    info = b"fedcmr secure aggregation 1\n" + canonical_json(list(purpose))
    return HKDF(algorithm=SHA256(), length=length, salt=None, info=info).derive(secret)


@dataclass(frozen=True)
class KeyPair:
    """The pair that grows from ``root`` (32 bytes)."""

    root: bytes = field(repr=False)
    post_quantum: bool

    @classmethod
    def draw(cls, post_quantum: bool) -> KeyPair:
        """Return a fresh pair."""
        return cls(os.urandom(ROOT_BYTES), post_quantum)

    @cached_property
    def _x25519(self) -> X25519PrivateKey:
        return X25519PrivateKey.from_private_bytes(derive(self.root, "x25519"))

    @cached_property
    def _mlkem(self) -> MLKEM768PrivateKey:
        return MLKEM768PrivateKey.from_seed_bytes(derive(self.root, "ml-kem-768", length=64))

    @cached_property
    def public(self) -> PublicKey:
        """The public half."""
        mlkem = self._mlkem.public_key().public_bytes_raw().hex() if self.post_quantum else None
        x25519 = self._x25519.public_key().public_bytes_raw().hex()
        return PublicKey(x25519=x25519, mlkem768=mlkem)

    def agree(self, peer: PublicKey) -> bytes:
        """Return the X25519 secret that both sides compute.

        Raises:
            ProtocolError: the peer's key has small order.
        """
        try:
            return self._x25519.exchange(
                X25519PublicKey.from_public_bytes(bytes.fromhex(peer.x25519))
            )
        except ValueError as error:
            raise ProtocolError("keys", "a peer's X25519 key cannot be used") from error

    def seal(self, receiver: PublicKey, content: bytes, *purpose: str | int) -> bytes:
        """Return ``content`` sealed for ``receiver``, who opens it for the same purpose only.

        Raises:
            ProtocolError: the receiver's key cannot be used.
        """
        secret, box = self.agree(receiver), b""
        if self.post_quantum:
            shared, box = _kem_key(receiver).encapsulate()
            secret += shared
        nonce = os.urandom(_NONCE_BYTES)
        keys = (self.public.x25519, receiver.x25519)
        cipher = AESGCM(derive(secret, "seal", *keys, *purpose))
        return box + nonce + cipher.encrypt(nonce, content, canonical_json(list(purpose)))

    def open(self, sender: PublicKey, sealed: bytes, *purpose: str | int) -> bytes:
        """Return what ``sender`` sealed for this pair.

        Raises:
            ProtocolError: it was sealed by or for somebody else, for another purpose, or changed.
        """
        secret, start = self.agree(sender), 0
        if self.post_quantum:
            start = _ENCAPSULATION_BYTES
        if len(sealed) < start + _NONCE_BYTES + _TAG_BYTES:
            raise ProtocolError("share", "a sealed share is cut short")
        if self.post_quantum:
            secret += self._mlkem.decapsulate(sealed[:start])
        body = start + _NONCE_BYTES
        keys = (sender.x25519, self.public.x25519)
        cipher = AESGCM(derive(secret, "seal", *keys, *purpose))
        try:
            return cipher.decrypt(sealed[start:body], sealed[body:], canonical_json(list(purpose)))
        except InvalidTag as error:
            raise ProtocolError("share", "a sealed share was changed or is not ours") from error


def check_usable(key: PublicKey) -> None:
    """Return if every site can agree on a secret with the owner of ``key``.

    Raises:
        ProtocolError: a half has small order, is no key, or is another key's second spelling.
    """
    if int.from_bytes(bytes.fromhex(key.x25519), "little") >= _FIELD:
        raise ProtocolError("keys", "an X25519 key is not written in its one canonical way")
    _ANYBODY.agree(key)
    if key.mlkem768 is not None:
        _kem_key(key)


_ANYBODY: Final = KeyPair(bytes(ROOT_BYTES), post_quantum=False)


def _kem_key(key: PublicKey) -> MLKEM768PublicKey:
    if key.mlkem768 is None:
        raise ProtocolError("keys", "a peer's key lacks its post-quantum half")
    try:
        return MLKEM768PublicKey.from_public_bytes(bytes.fromhex(key.mlkem768))
    except ValueError as error:
        raise ProtocolError("keys", "a peer's ML-KEM-768 key cannot be used") from error
