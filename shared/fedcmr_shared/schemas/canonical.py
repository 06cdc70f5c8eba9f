"""One byte string for one value: what is hashed and signed."""

from __future__ import annotations

import json


def canonical_json(value: object) -> bytes:
    """Return ``value`` as UTF-8 JSON with sorted keys, no white space and finite numbers only.

    Numbers are written as Python's :mod:`json` writes them, which reads back exactly.

    Raises:
        ValueError: a number is not finite.
        TypeError: something is no JSON value.
    """
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()
