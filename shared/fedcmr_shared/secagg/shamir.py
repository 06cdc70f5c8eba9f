"""Shamir's secret sharing (1979) of 32-byte secrets over the field of 2^521 - 1 elements.

Any t shares give the secret, fewer give nothing: with t - 1 of them every secret is equally likely.
The field is a Mersenne prime that holds every 32-byte secret (2^255 - 19 does not). Big-integer
arithmetic is not constant-time; shares are made and combined once per session, of secrets that
are used once.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Final

from fedcmr_shared.secagg.faults import ProtocolError

PRIME: Final = 2**521 - 1
SECRET_BYTES: Final = 32
SHARE_BYTES: Final = 66


def split(secret: bytes, threshold: int, indices: Collection[int]) -> dict[int, bytes]:
    """Return one share for each of ``indices`` (positive and distinct).

    Raises:
        ValueError: the secret is not 32 bytes, an index cannot be used, or there are fewer
            indices than the threshold.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret of {len(secret)} bytes; {SECRET_BYTES} are shared")
    if not 1 <= threshold <= len(set(indices)) or min(indices) < 1:
        raise ValueError(f"threshold {threshold} does not fit the indices {sorted(indices)}")
    coefficients = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    coefficients.append(int.from_bytes(secret))
    return {index: _value(coefficients, index).to_bytes(SHARE_BYTES) for index in indices}


def combine(shares: Mapping[int, bytes]) -> bytes:
    """Return the secret behind ``shares``, exactly as many as the threshold.

    Raises:
        ProtocolError: a share is no element of the field, or together they are no secret.
    """
    values = [int.from_bytes(share) for share in shares.values()]
    if any(len(share) != SHARE_BYTES for share in shares.values()) or max(values) >= PRIME:
        raise ProtocolError("share", "a share has the wrong length or is too large")
    weights = _weights_at_zero(tuple(shares))
    secret = sum(value * weight for value, weight in zip(values, weights, strict=True)) % PRIME
    try:
        return secret.to_bytes(SECRET_BYTES)
    except OverflowError as error:
        raise ProtocolError("share", "the shares do not belong together") from error


def _value(coefficients: list[int], at: int) -> int:
    """Value of the polynomial, highest power first (Horner)."""
    value = 0
    for coefficient in coefficients:
        value = (value * at + coefficient) % PRIME
    return value


@lru_cache(maxsize=8)
def _weights_at_zero(indices: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's weights of the values at ``indices`` for the value at zero; public numbers."""
    weights = []
    for own in indices:
        above = below = 1
        for other in indices:
            if other != own:
                above = above * other % PRIME
                below = below * (other - own) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(weights)
