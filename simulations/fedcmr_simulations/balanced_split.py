"""Secrets of virtual sites that split the site's patients as evenly as their number allows."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from itertools import count

from fedcmr_client.store.pseudonyms import pseudonym
from fedcmr_client.store.split import SPLITS, SplitFractions, split_of, split_position
from fedcmr_shared.errors import DataError


def balanced_secret(label: str, patients: Sequence[str], fractions: SplitFractions) -> bytes:
    """Return the first secret derived from ``label`` whose split of ``patients`` is balanced.

    Each part then has at least one patient and, as far as that allows, differs from its expected
    number by less than one, or by less than 1 % of the patients. Only virtual sites may choose
    their secret so: a hospital's is random.

    Raises:
        DataError: there are fewer patients than parts, or a part has no share of them.
    """
    if len(patients) < len(SPLITS):
        raise DataError(
            f"a virtual site needs {len(SPLITS)} patients, one for each part of its split, "
            f"not {len(patients)}: use fewer sites or more patients"
        )
    empty = [part for part in SPLITS if getattr(fractions, part) <= 0]
    if empty:
        raise DataError(
            f"the part {empty[0]} of a virtual site's patients is empty: give it a share"
        )
    secrets = (
        hashlib.sha256(f"fedcmr virtual site {label} {attempt}".encode()).digest()
        for attempt in count()
    )
    return next(secret for secret in secrets if _is_balanced(secret, patients, fractions))


def _is_balanced(secret: bytes, patients: Sequence[str], fractions: SplitFractions) -> bool:
    places = (split_position(secret, pseudonym(secret, patient)) for patient in patients)
    counts = Counter(split_of(place, fractions) for place in places)
    tolerance = max(1.0, len(patients) / 100)
    most = len(patients) - len(SPLITS) + 1  # leaves one patient for each other part
    for part in SPLITS:
        wanted = min(max(len(patients) * getattr(fractions, part), 1.0), most)
        if counts[part] < 1 or abs(counts[part] - wanted) >= tolerance:
            return False
    return True
