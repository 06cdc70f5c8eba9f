"""What is wrong with a file that does not fit its schema, in one line."""

from __future__ import annotations

from pydantic import ValidationError


def problems(error: ValidationError) -> str:
    """Return every wrong field with the reason, joined by semicolons."""
    return "; ".join(
        f"{'.'.join(map(str, item['loc'])) or 'the file'}: {item['msg']}" for item in error.errors()
    )
