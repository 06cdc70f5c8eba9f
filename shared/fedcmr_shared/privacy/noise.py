"""Gaussian noise and coin tosses from the operating system's entropy, never from a seed.

An AES-256-CTR key stream under a fresh key gives 53-bit uniform numbers, Box-Muller turns them
into normal ones in float64. Each returned value is the sum of four such numbers divided by two
(Holohan and Braghin, Secure random sampling in differential privacy, arXiv 2107.10138):
whoever inverts the floating-point values of one draw learns nothing about the others. There
is no way to pass a seed; a test that needs known noise replaces :func:`os.urandom`.
"""

from __future__ import annotations

import os
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

_DRAWS: Final = 4
_BLOCK: Final = 1 << 14  # values at once: the working set stays in the processor's cache


def uniforms(count: int) -> NDArray[np.float64]:
    """Return ``count`` independent uniform numbers in (0, 1], multiples of 2^-53."""
    return _KeyStream().uniforms(count)


def words(count: int) -> NDArray[np.uint64]:
    """Return ``count`` independent uniform numbers of 64 bits."""
    return _KeyStream().words(count)


def gaussian(count: int) -> NDArray[np.float64]:
    """Return ``count`` independent standard normal numbers."""
    stream = _KeyStream()
    values = np.empty(count)
    for start in range(0, count, _BLOCK):
        block = values[start : start + _BLOCK]
        block[:] = _normals(stream, -(-len(block) // 2))[: len(block)]
    return values


class _KeyStream:
    """AES-256 in counter mode under a key that nobody knows."""

    def __init__(self) -> None:
        cipher = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(bytes(16)))
        self._encryptor = cipher.encryptor()

    def words(self, count: int) -> NDArray[np.uint64]:
        """Return the next ``count`` uniform numbers of 64 bits; read-only."""
        return np.frombuffer(self._encryptor.update(bytes(8 * count)), dtype="<u8")

    def uniforms(self, count: int) -> NDArray[np.float64]:
        """Return the next ``count`` uniform numbers in (0, 1]."""
        # The upper 53 bits, plus one, so that the logarithm of the result is finite.
        upper: NDArray[np.uint64] = (self.words(count) >> np.uint64(11)) + np.uint64(1)
        return upper.astype(np.float64) * 2.0**-53


def _normals(stream: _KeyStream, pairs: int) -> NDArray[np.float64]:
    """Return 2 · ``pairs`` normal numbers, each the sum of four over two (Box-Muller)."""
    radius, turn = stream.uniforms(2 * _DRAWS * pairs).reshape(2, _DRAWS, pairs)
    radius = np.sqrt(-0.5 * np.log(radius))  # sqrt(-2 log u), halved
    # Cosine and sine of the angle 2 pi u from the tangent of its half: one function, not two.
    tangent = np.tan(np.pi * turn)
    square = tangent * tangent
    radius /= 1 + square
    return np.concatenate([((1 - square) * radius).sum(0), (2 * tangent * radius).sum(0)])
