"""Tensors as words that can be summed modulo a power of two, and sums of words as tensors.

A real value x, clipped to [-B, B], becomes one of L + 1 levels: an integer q in [0, L] that stands
for -B + q · 2B / L. Rounding is stochastic, up with the probability of the fraction, so that the
mean of q is the value itself (to less than 2^-18 of a step, the precision of float64). An integer x
becomes q = x + B without rounding. A site of weight w sends w · q. L is the largest integer for
which the total weight W of all sites keeps the sum below the modulus,

    L = floor((2^bits - 1) / W),

so that no sum over any of the sites can overflow. The step 2B / L is the *unit* of the sum: a sum
over sites of total weight w lies at most w units, and the error of float64, from the exact sum of
the clipped values.

Words are packed without gaps: word i is bits b · i to b · i + b - 1 of the vector read as one
little-endian number, which makes 4, 3 or 2 bytes for b = 32, 24 or 16 and 5 bytes for two words of
20. Nothing here is secret or random: :mod:`fedcmr_shared.secagg.masking` brings the keys.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedcmr_shared.errors import ConfigurationError, FederationError
from fedcmr_shared.schemas.canonical import canonical_json

Words = NDArray[np.uint32]
WORD: Final = np.dtype("<u4")
WORD_BITS: Final = (32, 24, 20, 16)
BLOCK: Final = 1 << 15
"""Words handled at once, an even number: the buffers of one block stay in the processor's cache."""

_LEAST_STEPS: Final = 256
_BOUNDS: Final = (1e-30, 1e30)  # the products of float64 values stay finite and normal
_FORMAT: Final = "fedcmr-secagg-encoding-1"
_REAL: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGER: Final = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_ITEM_BYTES: Final = {24: 3, 20: 5}  # one word, or two
_FRACTION: Final = 32  # bits below the point when a value is rounded


@dataclass(frozen=True)
class Segment:
    """One tensor of the vector.

    ``bound`` is public: values beyond [-bound, bound] are clipped. An ``integer`` segment has a
    whole bound and its values travel exactly.

    Raises:
        ConfigurationError: a field cannot be used.
    """

    name: str
    shape: tuple[int, ...]
    bound: float
    integer: bool = False

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigurationError("a segment has no name: give each tensor its name")
        if not all(type(length) is int and length >= 0 for length in self.shape):
            raise ConfigurationError(f"segment {self.name}: {self.shape} is not a tensor's shape")
        low, high = _BOUNDS
        if not low <= self.bound <= high:
            raise ConfigurationError(
                f"segment {self.name}: bound {self.bound} is not between {low} and {high}"
            )
        if self.integer and not float(self.bound).is_integer():
            raise ConfigurationError(
                f"segment {self.name}: bound {self.bound} of an integer segment is not whole"
            )

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Encoding:
    """How the tensors of one update become words; all sites and the coordinator share it.

    ``word_bits`` is 32, 24, 20 or 16; ``total_weight`` the sum of the public integer weights of
    all sites of the roster, dropped out or not.

    Raises:
        ConfigurationError: names repeat, a number cannot be used, or the words are too short for
            the total weight or for an integer segment.
    """

    segments: tuple[Segment, ...]
    word_bits: int
    total_weight: int

    def __post_init__(self) -> None:
        if self.word_bits not in WORD_BITS:
            raise ConfigurationError(f"word_bits is {self.word_bits}: use one of {WORD_BITS}")
        if type(self.total_weight) is not int or self.total_weight < 1:
            raise ConfigurationError(f"total_weight is {self.total_weight}: use 1 or more")
        if not self.segments:
            raise ConfigurationError("an encoding needs at least one segment")
        seen: set[str] = set()
        for segment in self.segments:
            if segment.name in seen:
                raise ConfigurationError(f"segment {segment.name} is there twice")
            seen.add(segment.name)
            self._require_room(segment)

    def _require_room(self, segment: Segment) -> None:
        needed = 2 * int(segment.bound) if segment.integer else _LEAST_STEPS
        if self.steps < needed:
            cure = "a smaller bound" if segment.integer else "smaller weights"
            raise ConfigurationError(
                f"segment {segment.name}: {self.word_bits}-bit words leave {self.steps} steps "
                f"at total weight {self.total_weight}, {needed} are needed: use larger words "
                f"or {cure}"
            )

    @property
    def steps(self) -> int:
        """L: a site's word before weighting lies in [0, L]."""
        return ((1 << self.word_bits) - 1) // self.total_weight

    @property
    def size(self) -> int:
        """Number of words."""
        return sum(segment.size for segment in self.segments)

    @property
    def nbytes(self) -> int:
        """Bytes of one packed vector."""
        return packed_size(self.size, self.word_bits)

    @property
    def sha256(self) -> str:
        """Digest of all of it, 64 hexadecimal digits."""
        content = {
            "format": _FORMAT,
            "segments": [
                [segment.name, list(segment.shape), float(segment.bound), segment.integer]
                for segment in self.segments
            ],
            "total_weight": self.total_weight,
            "word_bits": self.word_bits,
        }
        return hashlib.sha256(canonical_json(content)).hexdigest()

    def unit(self, segment: Segment) -> float:
        """Return the value of one unit of a word of ``segment``."""
        return 1.0 if segment.integer else 2 * segment.bound / self.steps

    def error_bound(self, segment: Segment, weight: int) -> float:
        """Return the largest distance of a decoded sum from the sum of the clipped values.

        ``weight`` is the total weight of the summed sites. The distance comes from rounding (less
        than one unit for each weight) and from float64 arithmetic.
        """
        if segment.integer:
            return 0.0
        return weight * (self.unit(segment) + segment.bound * 2.0**-49)


class Encoder:
    """The words of one site's tensors, block after block.

    Raises:
        FederationError: ``values`` are not the tensors of the encoding: a name, shape or type
            (float16, bfloat16, float32 or float64; integers for an integer segment) differs.
    """

    def __init__(self, encoding: Encoding, values: Mapping[str, Tensor]) -> None:
        _require_fit(encoding, values)
        self._steps = encoding.steps
        self._parts = iter([(segment, values[segment.name]) for segment in encoding.segments])
        self._segment = encoding.segments[0]
        self._rest = torch.empty(0)
        self._real = torch.empty(BLOCK, dtype=torch.float64)
        self._integer = torch.empty(BLOCK, dtype=torch.int64)
        self._fixed = np.empty(BLOCK, np.uint64)
        self._words = np.empty(BLOCK, WORD)

    def words(self, draws: Words) -> Words:
        """Return the next ``len(draws)`` words, at most ``BLOCK``, in a buffer used again.

        Value i is rounded up if its fraction exceeds 1 - draw / 2^32; ``draws`` are uniform over
        all 32-bit numbers.

        Raises:
            FederationError: a value is NaN or infinite.
        """
        words = self._words[: len(draws)]
        filled = 0
        while filled < len(words):
            part = self._take(len(words) - filled)
            window = slice(filled, filled + len(part))
            if self._segment.integer:
                self._encode_integer(part, words[window])
            else:
                self._encode_real(part, draws[window], words[window])
            filled = window.stop
        return words

    def _take(self, limit: int) -> Tensor:
        """Return the next values of one segment, at most ``limit``."""
        while not len(self._rest):
            self._segment, tensor = next(self._parts)
            self._rest = tensor.detach().reshape(-1)
        part, self._rest = self._rest[:limit], self._rest[limit:]
        return part

    def _encode_real(self, part: Tensor, draws: Words, words: Words) -> None:
        values = self._real[: len(part)].copy_(part).numpy()
        if not np.isfinite(values).all():
            raise FederationError(
                f"tensor {self._segment.name} holds NaN or infinity: it cannot be aggregated"
            )
        middle = self._steps / 2
        with np.errstate(over="ignore"):  # what overflows is clipped in the next line
            values *= math.ldexp(_scale(self._segment.bound, middle), _FRACTION)
            values += math.ldexp(middle, _FRACTION)
        np.clip(values, 0, math.ldexp(self._steps, _FRACTION), out=values)
        # Steps and 32 bits of fraction in 64 bits: adding 32 random bits rounds stochastically.
        # Never above L: at L the fraction is 0, and no draw carries.
        fixed = self._fixed[: len(part)]
        np.copyto(fixed, values, casting="unsafe")
        fixed += draws
        fixed >>= np.uint64(_FRACTION)
        np.copyto(words, fixed, casting="unsafe")

    def _encode_integer(self, part: Tensor, words: Words) -> None:
        bound = int(self._segment.bound)
        values = self._integer[: len(part)].copy_(part).numpy()
        np.clip(values, -bound, bound, out=values)
        values += bound
        np.copyto(words, values, casting="unsafe")


def decode(encoding: Encoding, words: Words, weight: int) -> dict[str, Tensor]:
    """Return the weighted sums that ``words``, reduced modulo 2^bits, stand for.

    ``weight`` is the total weight of the summed sites. Sums are float64, int64 for an integer
    segment.

    Raises:
        FederationError: ``weight`` is not that of any sites, or a word exceeds what sites of this
            weight can send.
    """
    require_weight(encoding, weight)
    sums = {}
    start = 0
    for segment in encoding.segments:
        part = words[start : start + segment.size]
        start += segment.size
        largest = weight * (2 * int(segment.bound) if segment.integer else encoding.steps)
        if part.max(initial=0) > largest:
            raise FederationError(
                f"the sum of {segment.name} exceeds what sites of weight {weight} can send: masks "
                "remain in it, or the survivors are others"
            )
        sums[segment.name] = _decode_segment(encoding, segment, part, weight)
    return sums


def require_weight(encoding: Encoding, weight: int) -> None:
    """Return if ``weight`` can be that of one or more sites.

    Raises:
        FederationError: it cannot.
    """
    if type(weight) is not int or not 1 <= weight <= encoding.total_weight:
        raise FederationError(f"weight {weight} is not a number from 1 to {encoding.total_weight}")


def packed_size(count: int, word_bits: int) -> int:
    """Return the bytes that ``count`` words take; an odd last word of 20 bits is padded to 5."""
    return 5 * ((count + 1) // 2) if word_bits == 20 else count * (word_bits // 8)


def pack(words: Words, word_bits: int, out: NDArray[np.uint8]) -> None:
    """Write the lower ``word_bits`` bits of each word into ``out`` of :func:`packed_size` bytes."""
    if word_bits in (16, 32):
        np.copyto(out.view(f"<u{word_bits // 8}"), words, casting="unsafe")
        return
    items = _paired(words) if word_bits == 20 else words
    source = items.view(np.uint8).reshape(-1, items.itemsize)
    width = _ITEM_BYTES[word_bits]
    target = out.reshape(-1, width)
    for byte in range(width):
        target[:, byte] = source[:, byte]


def unpack(data: NDArray[np.uint8], word_bits: int, words: Words) -> None:
    """Write the packed words of ``data`` into ``words``, contiguous, which gives their number."""
    if word_bits in (16, 32):
        np.copyto(words, data.view(f"<u{word_bits // 8}"))
        return
    pairs = word_bits == 20
    items = np.empty((len(words) + 1) // 2, "<u8") if pairs else words
    items.fill(0)
    target = items.view(np.uint8).reshape(-1, items.itemsize)
    width = _ITEM_BYTES[word_bits]
    source = data.reshape(-1, width)
    for byte in range(width):
        target[:, byte] = source[:, byte]
    if pairs:
        words[0::2] = items & np.uint64(0xFFFFF)
        words[1::2] = items[: len(words) // 2] >> np.uint64(20)


def _paired(words: Words) -> NDArray[np.uint64]:
    """Return two words of 20 bits in each number, the first one lowest."""
    lower = (words[0::2] & np.uint32(0xFFFFF)).astype("<u8")
    upper = (words[1::2] & np.uint32(0xFFFFF)).astype("<u8")
    lower[: len(upper)] |= upper << np.uint64(20)
    return lower


def _scale(bound: float, middle: float) -> float:
    """Return the steps of one unit of value, rounded so that ``bound`` reaches the last step."""
    scale = middle / bound
    while bound * scale < middle:
        scale = math.nextafter(scale, math.inf)
    return scale


def _decode_segment(encoding: Encoding, segment: Segment, words: Words, weight: int) -> Tensor:
    if segment.integer:
        whole = np.empty(segment.shape, np.int64)
        np.subtract(words, weight * int(segment.bound), out=whole.reshape(-1), dtype=np.int64)
        return torch.from_numpy(whole)
    total = np.empty(segment.shape)
    values = total.reshape(-1)
    # Exact: words are whole, half the steps a multiple of one half, both far below 2^53.
    np.subtract(words, weight * encoding.steps / 2, out=values)
    values *= encoding.unit(segment)
    return torch.from_numpy(total)


def _require_fit(encoding: Encoding, values: Mapping[str, Tensor]) -> None:
    names = {segment.name for segment in encoding.segments}
    if names != values.keys():
        odd = min(names ^ values.keys())
        place = "not among the values" if odd in names else "not a segment of the encoding"
        raise FederationError(f"tensor {odd} is {place}: both name the same tensors")
    for segment in encoding.segments:
        value = values[segment.name]
        if tuple(value.shape) != tuple(segment.shape):
            raise FederationError(
                f"tensor {segment.name} has shape {tuple(value.shape)}, the encoding "
                f"{tuple(segment.shape)}"
            )
        if value.dtype not in (_INTEGER if segment.integer else _REAL):
            kind = "integers" if segment.integer else "real floating-point numbers"
            raise FederationError(
                f"tensor {segment.name} is {value.dtype}: its segment is for {kind}"
            )
