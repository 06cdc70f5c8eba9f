"""Another site's signature under a checkpoint: that this is the history it was shown.

A site that shows two histories finds nobody who cosigns both: whoever cosigned one keeps it, and
cosigns only what continues it.
"""

from __future__ import annotations

from fedcmr_shared.identity.keys import SiteKey, verify_signature
from fedcmr_shared.schemas.ledger import Checkpoint


def cosign(identity: SiteKey, checkpoint: Checkpoint) -> str:
    """Return ``identity``'s cosignature (hexadecimal) under ``checkpoint``."""
    return identity.sign(_cosigned_bytes(checkpoint))


def verify_cosignature(public_key: str, checkpoint: Checkpoint, signature: str) -> None:
    """Return if ``public_key`` cosigned ``checkpoint``.

    Raises:
        LedgerError: it did not, or the key or signature is not one.
    """
    verify_signature(public_key, signature, _cosigned_bytes(checkpoint))


def _cosigned_bytes(checkpoint: Checkpoint) -> bytes:
    return b"fedcmr cosignature 1\n" + checkpoint.signed_bytes()
