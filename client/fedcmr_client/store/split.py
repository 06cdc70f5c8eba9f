"""Training, validation and test parts, drawn per patient by a keyed hash.

A patient's place depends on nothing but the site secret and the patient. It stays when other
patients arrive, and all scans of a patient are in the same part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

from fedcmr_client.store.pseudonyms import keyed_hash
from fedcmr_shared.errors import ConfigurationError

Split = Literal["train", "validation", "test"]
SPLITS: Final[tuple[Split, ...]] = ("train", "validation", "test")


@dataclass(frozen=True)
class SplitFractions:
    """Expected share of the patients in each part; ConfigurationError unless they add up to 1."""

    train: float = 0.7
    validation: float = 0.1
    test: float = 0.2

    def __post_init__(self) -> None:
        for name in SPLITS:
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigurationError(f"split fraction {name} is {value}: choose 0 to 1")
        total = self.train + self.validation + self.test
        if not math.isclose(total, 1, abs_tol=1e-6):
            raise ConfigurationError(f"split fractions add up to {total:g}: they must add up to 1")


def split_position(secret: bytes, pseudonym: str) -> float:
    """Place of a patient in [0, 1), uniform over patients."""
    # 53 bits are what a float holds exactly, so the result cannot round up to 1.
    return (int.from_bytes(keyed_hash(secret, "split", pseudonym)[:8]) >> 11) / 2**53


def split_of(position: float, fractions: SplitFractions) -> Split:
    """Part that holds ``position``: train first, then validation, then test."""
    if position < fractions.train:
        return "train"
    # Rounding may leave a sliver below 1, which must not open a part of size zero.
    if position < fractions.train + fractions.validation or fractions.test == 0:
        return "validation" if fractions.validation > 0 else "train"
    return "test"
