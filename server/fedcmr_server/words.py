"""Numbers and times as people read them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

NOTHING: Final = "–"
"""Stands where there is no figure."""

_MINUTE, _HOUR, _DAY = 60, 3600, 86_400


@dataclass(frozen=True)
class Score:
    """A score as people read it; ``digits`` are those behind the point."""

    name: str
    unit: str
    digits: int

    @property
    def head(self) -> str:
        """Name and unit, for the head of a column."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    def number(self, value: float) -> str:
        """Return a value without its unit."""
        return f"{value:.{self.digits}f}" if math.isfinite(value) else NOTHING

    def text(self, value: float) -> str:
        """Return a value with its unit."""
        unit = f" {self.unit}" if self.unit and math.isfinite(value) else ""
        return self.number(value) + unit


METRICS: Final[Mapping[str, Score]] = {
    "psnr": Score("PSNR", "dB", 2),
    "ssim": Score("SSIM", "", 4),
    "nmse": Score("NMSE", "", 4),
}
"""The scores that may leave a site, by their name in events and jobs."""

PHASES: Final[Mapping[str, str]] = {"train": "training", "evaluate": "scoring"}
"""What the sites are at."""


def plural(count: int, one: str, many: str | None = None) -> str:
    """Return a count with its noun, such as ``1 site`` or ``4 sites``."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def bytes_text(count: float) -> str:
    """Return a size in decimal units, such as ``4.1 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def seconds_text(seconds: float) -> str:
    """Return a duration with its two largest units, such as ``1 min 15 s``."""
    if not math.isfinite(seconds):
        return NOTHING
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < _MINUTE:
        return f"{whole} s"
    for size, unit, part, below in (
        (_DAY, "d", _HOUR, "h"),
        (_HOUR, "h", _MINUTE, "min"),
        (_MINUTE, "min", 1, "s"),
    ):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit}" + (f" {rest} {below}" if rest else "")
    raise AssertionError("a minute or more has a unit")


def ago(at: datetime, now: datetime) -> str:
    """Return how long ago a moment was, roughly; ``in …`` when it lies ahead."""
    seconds = (now - at).total_seconds()
    if abs(seconds) < 5:
        return "just now"
    text = _rough(abs(seconds))
    return f"{text} ago" if seconds > 0 else f"in {text}"


def utc(at: datetime) -> str:
    """Return a moment in UTC, to the minute."""
    return at.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def short_utc(at: datetime) -> str:
    """Return a moment in UTC for a column whose head says so."""
    return at.astimezone(UTC).strftime("%Y-%m-%d %H:%M")


def machine(at: datetime) -> str:
    """Return a moment as the attribute ``datetime`` of HTML takes it."""
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _rough(seconds: float) -> str:
    for size, unit in ((_DAY, "day"), (_HOUR, "hour"), (_MINUTE, "minute")):
        if seconds >= size:
            return plural(int(seconds // size), unit)
    return plural(int(seconds), "second")
