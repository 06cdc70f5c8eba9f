"""Curves over rounds as coordinates for SVG. Templates draw them; nothing here knows HTML.

The box is small, so that its text stays legible where a chart is as wide as a telephone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

Points = Sequence[tuple[int, float]]
"""(round, value) in the order of the rounds."""

WIDTH: Final = 360
HEIGHT: Final = 216
LEFT: Final = 50
RIGHT: Final = 12
TOP: Final = 14
BOTTOM: Final = 40

_INSET: Final = 8  # between the frame and the first and last round
_MOST_MARKS: Final = 40  # of more rounds, each mark would hide its neighbours
_MOST_TICKS: Final = 6
_SAME: Final = 1e-6  # labels could not tell values apart that are so close


@dataclass(frozen=True)
class Tick:
    """A tick of an axis: pixel position and label."""

    at: float
    label: str


@dataclass(frozen=True)
class Mark:
    """A point with the text that says what it is."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Curve:
    """A curve: its name, style (1, 2, …), SVG path, and marks where there is room for them."""

    name: str
    style: int
    path: str
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Chart:
    """Curves with their axes. ``summary`` says in words what they show."""

    key: str
    title: str
    unit: str
    summary: str
    curves: tuple[Curve, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]

    @property
    def axis(self) -> str:
        """Label of the vertical axis."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


def chart(
    key: str,
    title: str,
    unit: str,
    curves: Mapping[str, Points],
    *,
    from_zero: bool = False,
) -> Chart | None:
    """Lay out ``curves`` by name; values that are not finite leave a gap. None without any value.

    ``key`` is unique on the page.
    """
    finite = {name: _finite(points) for name, points in curves.items()}
    every = [point for points in finite.values() for point in points]
    if not every:
        return None
    rounds, values = [number for number, _ in every], [value for _, value in every]
    heights = ticks(min([0.0, *values] if from_zero else values), max(values))
    across = scale(min(rounds), max(rounds), LEFT + _INSET, WIDTH - RIGHT - _INSET)
    up = scale(heights[0], heights[-1], HEIGHT - BOTTOM, TOP)
    drawn = tuple(
        Curve(
            name,
            style,
            _path(points, finite[name], across, up),
            _marks(name if len(curves) > 1 else title, unit, finite[name], across, up),
        )
        for style, (name, points) in enumerate(curves.items(), start=1)
    )
    return Chart(
        key=key,
        title=title,
        unit=unit,
        summary=_summary(finite, unit),
        curves=drawn,
        x_ticks=tuple(Tick(across(n), f"{n}") for n in round_ticks(min(rounds), max(rounds))),
        y_ticks=tuple(Tick(up(value), label(value, heights)) for value in heights),
    )


def scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Return the line that maps ``low`` to ``start`` and ``high`` to ``end``; the middle if equal."""
    span = high - low

    def position(value: float) -> float:
        return start + (end - start) * ((value - low) / span if span else 0.5)

    return position


def ticks(low: float, high: float, target: int = 4) -> list[float]:
    """Return about ``target`` + 1 round numbers that enclose [``low``, ``high``]."""
    size = max(abs(low), abs(high))
    if high - low <= _SAME * max(1.0, size):
        room = 0.05 * size if size > _SAME else 1.0
        low, high = low - room, high + room
    power = 10.0 ** math.floor(math.log10((high - low) / target))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m * target >= high - low)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * index for index in range(first, last + 1)]


def round_ticks(first: int, last: int) -> list[int]:
    """Return at most six whole numbers from ``first`` to ``last``, evenly apart."""
    step = max(1, math.ceil((last - first) / (_MOST_TICKS - 1)))
    return list(range(first, last + 1, step))


def label(value: float, among: Sequence[float]) -> str:
    """Return a tick's label with as many digits as its neighbours need."""
    step = among[1] - among[0]
    # Half a digit is allowed for: 2.5 needs one digit, 0.25 two.
    digits = next((d for d in range(8) if math.isclose(step * 10**d, round(step * 10**d))), 8)
    return f"{value + 0.0:,.{digits}f}"


def _finite(points: Points) -> list[tuple[int, float]]:
    return [(number, value) for number, value in points if math.isfinite(value)]


def _path(
    points: Points,
    finite: Points,
    across: Callable[[float], float],
    up: Callable[[float], float],
) -> str:
    if len(finite) < 2:
        return ""
    path, pen = "", "M"
    for number, value in points:
        if not math.isfinite(value):
            pen = "M"
            continue
        path += f"{pen}{across(number):.1f} {up(value):.1f}"
        pen = "L"
    return path


def _marks(
    name: str,
    unit: str,
    points: Points,
    across: Callable[[float], float],
    up: Callable[[float], float],
) -> tuple[Mark, ...]:
    shown = points if len(points) <= _MOST_MARKS else points[-1:]
    return tuple(
        Mark(
            round(across(number), 1),
            round(up(value), 1),
            f"round {number}: {name} {_figure(value, unit)}",
        )
        for number, value in shown
    )


def _summary(curves: Mapping[str, Points], unit: str) -> str:
    parts = []
    for name, points in curves.items():
        if not points:
            continue
        (first, start), (last, end) = points[0], points[-1]
        text = f"{name}: {_figure(end, unit)} in round {last}"
        parts.append(text if first == last else f"{text}, {_figure(start, unit)} in round {first}")
    return "; ".join(parts) + "."


def _figure(value: float, unit: str) -> str:
    return f"{value:.4g}{' ' + unit if unit else ''}"
