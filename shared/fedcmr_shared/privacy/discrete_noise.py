"""Discrete Gaussian noise from the operating system's entropy, exact and without a seed.

The probability of a whole number y is in proportion to exp(-y² / 2s²) (Canonne, Kamath and
Steinke, arXiv 2004.00010), up to 16 standard deviations s, where it ends: the rest would have a
probability below 10^-55. It is drawn by rejection. Whole numbers |y| are cut into blocks of equal
length; block v has the whole weight W_v, at least K times exp(-y² / 2s²) at its first y. A block is
drawn in proportion to its weight, a y in it and a sign uniformly, and y is kept with probability
K exp(-y² / 2s²) / W_v. Weights are whole numbers of 64 bits, so the first draws are exact whatever
the weights are. The last one compares a uniform number with a float64 whose error is below 2^-48;
within 2^-40 of each other, both are computed again to 50 digits.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal, localcontext
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.privacy.noise import words
from fedcmr_shared.schemas.privacy import LEAST_SHARE, MOST_SHARE

_REACH: Final = 16  # standard deviations
_BLOCKS_PER_DEVIATION: Final = 8  # at least; about 5 % of the draws are rejected
_PASS: Final = 1 << 14  # values at once: the working set stays in the processor's cache
_DOUBT: Final = 2.0**-40
_DIGITS: Final = 50
_MORE_BITS: Final = 192


def discrete_gaussian(count: int, variance: float) -> NDArray[np.int64]:
    """Return ``count`` independent whole numbers of the discrete Gaussian distribution.

    Raises:
        ConfigurationError: the standard deviation is not in [16, 2^40].
    """
    sampler = _sampler(variance)
    values = np.empty(count, np.int64)
    filled = 0
    while filled < count:
        wanted = min(count - filled, _PASS)
        drawn = sampler.draw(wanted + wanted // 8)[:wanted]
        values[filled : filled + len(drawn)] = drawn
        filled += len(drawn)
    return values


def reach(variance: float) -> int:
    """Return the largest absolute value of the noise, 16 to 16.2 standard deviations.

    Raises:
        ConfigurationError: the standard deviation is not in [16, 2^40].
    """
    return _sampler(variance).reach


@dataclass(frozen=True)
class _Sampler:
    """Blocks of 2^``bits`` numbers with their weights; ``scale`` is K."""

    variance: float
    bits: int
    scale: Decimal
    weights: tuple[int, ...]
    ends: NDArray[np.uint64]  # cumulative weights
    heights: NDArray[np.float64]  # chance to keep the first number of each block

    @property
    def reach(self) -> int:
        """Largest absolute value."""
        return (len(self.weights) << self.bits) - 1

    def draw(self, proposals: int) -> NDArray[np.int64]:
        """Return what is kept of ``proposals`` numbers."""
        which, place, coins = words(3 * proposals).reshape(3, proposals)
        block = np.searchsorted(self.ends, which, side="right")
        inside = block < len(self.weights)  # the weights add up to a little less than 2^64
        block[~inside] = 0
        offset = (place & np.uint64((1 << self.bits) - 1)).astype(np.int64)
        negative = place >> np.uint64(63) == 1
        start = block << self.bits
        size = start + offset
        # (start + offset)² - start²
        excess = offset.astype(np.float64) * (start + size)
        chance = self.heights[block] * np.exp(excess * (-0.5 / self.variance))
        uniform = coins.astype(np.float64) * 2.0**-64
        kept = uniform < chance
        for index in np.flatnonzero(np.abs(uniform - chance) <= _DOUBT):
            kept[index] = self._keeps(int(coins[index]), int(size[index]), int(block[index]))
        kept &= inside & ~(negative & (size == 0))  # zero has one sign
        return np.where(negative, -size, size)[kept]

    def _keeps(self, coin: int, size: int, block: int) -> bool:
        """Repeat the comparison of ``coin`` / 2^64 with 192 bits more, and 50 digits."""
        more = int.from_bytes(os.urandom(_MORE_BITS // 8))
        with localcontext(prec=_DIGITS):
            chance = self.scale * _density(size, self.variance) / self.weights[block]
            return Decimal(coin << _MORE_BITS | more) < chance * (1 << 64 + _MORE_BITS)


@lru_cache(maxsize=16)
def _sampler(variance: float) -> _Sampler:
    deviation = math.sqrt(variance) if variance > 0 else 0.0
    if not LEAST_SHARE <= deviation <= MOST_SHARE:
        raise ConfigurationError(
            f"discrete noise has a standard deviation of {deviation:.4g} grid steps: it must be "
            f"between {LEAST_SHARE:g} and 2^40"
        )
    bits = math.floor(math.log2(deviation / _BLOCKS_PER_DEVIATION))
    blocks = math.floor(_REACH * deviation / 2**bits) + 1
    with localcontext(prec=_DIGITS):
        densities = [_density(block << bits, variance) for block in range(blocks)]
        # Rounding up adds less than one to each weight.
        scale = (2**64 - 1 - blocks) / sum(densities, start=Decimal(0))
        exact = [scale * density for density in densities]
        weights = tuple(int(value.to_integral_value(ROUND_CEILING)) for value in exact)
        heights = [float(value / weight) for value, weight in zip(exact, weights, strict=True)]
    ends = np.cumsum(np.array(weights, np.uint64), dtype=np.uint64)
    return _Sampler(variance, bits, scale, weights, ends, np.array(heights))


def _density(size: int, variance: float) -> Decimal:
    """Return exp(-size² / 2s²) to the digits of the context."""
    return (Decimal(-size * size) / (2 * Decimal(variance))).exp()
