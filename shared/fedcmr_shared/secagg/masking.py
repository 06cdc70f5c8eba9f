"""Masked vectors of the sites and their sum, streamed over flat buffers block by block.

A mask is the key stream of AES-256 in counter mode, from counter zero, under a key that serves
exactly one vector: its bytes 4i to 4i + 3, little-endian, are added to or subtracted from word i,
modulo 2^bits. Two sites that add and subtract the same mask leave their sum unchanged; the sum of a
word and an unknown uniform word is itself uniform and says nothing about the first (a one-time pad
under the assumption that AES-256 is a pseudorandom permutation). Word i is rounded with the same
bytes of the stream of the rounding key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from fedcmr_shared.errors import FederationError
from fedcmr_shared.secagg.encoding import (
    BLOCK,
    WORD,
    Encoder,
    Encoding,
    Words,
    decode,
    pack,
    packed_size,
    require_weight,
    unpack,
)

KEY_BYTES: Final = 32
Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Mask:
    """The key of a mask for exactly one vector, and whether that vector adds or subtracts it.

    Raises:
        FederationError: the key has not 32 bytes, or the sign is neither 1 nor -1.
    """

    key: bytes = field(repr=False)
    sign: Literal[1, -1]

    def __post_init__(self) -> None:
        _require_key(self.key)
        if self.sign not in (1, -1):
            raise FederationError(f"the sign of a mask is {self.sign}, not 1 or -1")


def masked_vector(
    encoding: Encoding,
    values: Mapping[str, Tensor],
    weight: int,
    rounding_key: bytes,
    masks: Sequence[Mask],
) -> bytearray:
    """Return ``values`` clipped, rounded, times ``weight`` and masked, in ``encoding.nbytes`` bytes.

    The result depends on the arguments alone, so that a vector can be made again. Without masks it
    shows the values.

    Raises:
        FederationError: ``values`` do not fit the encoding or hold NaN or infinity, ``weight`` is
            not one of its weights, or two keys are equal or of a wrong length.
    """
    require_weight(encoding, weight)
    _require_key(rounding_key)
    if len({rounding_key, *(mask.key for mask in masks)}) != len(masks) + 1:
        raise FederationError("two keys of a masked vector are equal: each needs its own")
    encoder = Encoder(encoding, values)
    rounding, pads = _KeyStream(rounding_key), _Pads(masks)
    packed = bytearray(encoding.nbytes)
    out = np.frombuffer(packed, np.uint8)
    for words_at, bytes_at in _blocks(encoding):
        words = encoder.words(rounding.words(words_at.stop - words_at.start))
        words *= np.uint32(weight)
        pads.add_to(words)
        pack(words, encoding.word_bits, out[bytes_at])
    return packed


class MaskedSum:
    """The sum of masked vectors; opens when every mask that is left in it has been removed."""

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding
        self._words = np.zeros(encoding.size, WORD)

    def add(self, vector: Buffer) -> None:
        """Add a site's packed vector.

        Raises:
            FederationError: it has not ``encoding.nbytes`` bytes; the sum is unchanged.
        """
        length = memoryview(vector).nbytes
        if length != self._encoding.nbytes:
            raise FederationError(
                f"a masked vector has {length} bytes, the encoding {self._encoding.nbytes}"
            )
        data, buffer = np.frombuffer(vector, np.uint8), np.empty(BLOCK, WORD)
        for words_at, bytes_at in _blocks(self._encoding):
            total = self._words[words_at]
            block = buffer[: len(total)]
            unpack(data[bytes_at], self._encoding.word_bits, block)
            total += block

    def remove(self, masks: Sequence[Mask]) -> None:
        """Undo ``masks``, each given as the site that used it did: ``sign`` times its stream."""
        pads = _Pads(masks, -1)
        for words_at, _ in _blocks(self._encoding):
            pads.add_to(self._words[words_at])

    def decode(self, weight: int) -> dict[str, Tensor]:
        """Return the weighted sums by name, float64 or, for integer segments, int64.

        ``weight`` is the total weight of the sites whose vectors are in the sum.

        Raises:
            FederationError: ``weight`` is not that of any sites, or a word exceeds what sites of
                this weight can send, as when a mask is left.
        """
        self._words &= np.uint32((1 << self._encoding.word_bits) - 1)
        return decode(self._encoding, self._words, weight)


class _KeyStream:
    """AES-256 in counter mode from counter zero, as words."""

    _ZEROS: Final = memoryview(bytes(WORD.itemsize * BLOCK))

    def __init__(self, key: bytes, buffer: Words | None = None) -> None:
        self._encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        self._buffer = np.empty(BLOCK, WORD) if buffer is None else buffer

    def words(self, count: int) -> Words:
        """Return the next ``count`` words, at most ``BLOCK``, in the buffer."""
        words = self._buffer[:count]
        self._encryptor.update_into(self._ZEROS[: words.nbytes], words.view(np.uint8).data)
        return words


class _Pads:
    """The streams of many masks, added to one block after the other; ``-1`` turns all signs."""

    def __init__(self, masks: Sequence[Mask], direction: Literal[1, -1] = 1) -> None:
        buffer = np.empty(BLOCK, WORD)  # one for all: each stream is used up before the next
        self._streams = [
            (np.add if mask.sign == direction else np.subtract, _KeyStream(mask.key, buffer))
            for mask in masks
        ]

    def add_to(self, words: Words) -> None:
        for combine, stream in self._streams:
            combine(words, stream.words(len(words)), out=words)


def _blocks(encoding: Encoding) -> Iterator[tuple[slice, slice]]:
    """Yield where the words and the packed bytes of each block lie."""
    bits = encoding.word_bits
    for start in range(0, encoding.size, BLOCK):
        stop = min(start + BLOCK, encoding.size)
        yield slice(start, stop), slice(packed_size(start, bits), packed_size(stop, bits))


def _require_key(key: bytes) -> None:
    if len(key) != KEY_BYTES:
        raise FederationError(f"a key of a masked vector has {KEY_BYTES} bytes, not {len(key)}")
