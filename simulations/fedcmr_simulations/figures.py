"""Figures of the report: images as PNG data, curves and dots as coordinates for SVG."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from matplotlib.image import imsave
from numpy.typing import NDArray

from fedcmr_shared.metrics.image_quality import normalise

ERROR_GAIN: Final = 5

Points = Sequence[tuple[float, float]]


def magnitude_png(image: NDArray[np.floating]) -> str:
    """Return a grey image [y, x] as base64 PNG, black at 0 and white at its 99.5 percentile."""
    return _png(normalise(image), "gray")


def error_png(reference: NDArray[np.floating], image: NDArray[np.floating]) -> str:
    """Return the absolute difference of the normalised images, times `ERROR_GAIN`."""
    return _png(ERROR_GAIN * np.abs(normalise(reference) - normalise(image)), "inferno")


def _png(values: NDArray[np.floating], colours: str) -> str:
    buffer = io.BytesIO()
    imsave(buffer, values, vmin=0, vmax=1, cmap=colours, format="png")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


@dataclass(frozen=True)
class Tick:
    """A tick of an axis: pixel position and label."""

    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """One curve: name, style number, polyline points and marker positions in pixels."""

    name: str
    style: int
    points: str
    markers: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Chart:
    """Curves over rounds, ready to draw in a box of ``width`` x ``height`` pixels."""

    title: str
    unit: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    width: int = 440
    height: int = 240
    left: int = 52
    right: int = 14
    top: int = 12
    bottom: int = 40


def line_chart(title: str, unit: str, curves: Mapping[str, Points], styles: Sequence[str]) -> Chart:
    """Lay out ``curves`` (name to (round, value) points); non-finite points are left out.

    A curve's style number is its position in ``styles``, so that a site looks the same in
    every chart.
    """
    frame = Chart(title, unit, (), (), ())
    finite = {
        name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in curves.items()
    }
    xs = [x for points in finite.values() for x, _ in points]
    ys = [y for points in finite.values() for _, y in points]
    if not xs:
        return frame
    y_values = nice_ticks(min(ys), max(ys))
    x_values = _round_ticks(int(min(xs)), int(max(xs)))
    across = _Scale(min(xs), max(xs), frame.left + 8, frame.width - frame.right - 8)
    up = _Scale(y_values[0], y_values[-1], frame.height - frame.bottom, frame.top)
    lines = []
    for name, points in finite.items():
        markers = tuple((across(x), up(y)) for x, y in points)
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in markers)
        lines.append(Line(name, list(styles).index(name), path, markers))
    return Chart(
        title,
        unit,
        tuple(Tick(across(x), f"{x}") for x in x_values),
        tuple(Tick(up(y), _label(y, y_values)) for y in y_values),
        tuple(lines),
    )


@dataclass(frozen=True)
class DotRow:
    """One site of a dot chart: baseline and (method, x, value) dots in pixels."""

    name: str
    y: float
    start: float
    end: float
    dots: tuple[tuple[str, float, float], ...]


@dataclass(frozen=True)
class DotChart:
    """One row of dots per site on a common axis."""

    rows: tuple[DotRow, ...]
    x_ticks: tuple[Tick, ...]
    width: int = 900
    height: int = 0
    left: int = 190
    right: int = 30
    row_height: int = 46


def dot_chart(values: Mapping[str, Mapping[str, float]]) -> DotChart:
    """Lay out ``values[site][method]``; needs at least one value."""
    frame = DotChart((), ())
    everything = [value for row in values.values() for value in row.values()]
    ticks = nice_ticks(min(everything), max(everything))
    across = _Scale(ticks[0], ticks[-1], frame.left, frame.width - frame.right)
    rows = []
    for index, (name, row) in enumerate(values.items()):
        dots = tuple((method, across(value), value) for method, value in row.items())
        positions = [x for _, x, _ in dots] or [frame.left]
        y = (index + 0.5) * frame.row_height + 8
        rows.append(DotRow(name, y, min(positions), max(positions), dots))
    height = len(rows) * frame.row_height + 56
    x_ticks = tuple(Tick(across(x), _label(x, ticks)) for x in ticks)
    return DotChart(tuple(rows), x_ticks, height=height)


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        share = 0.5 if span == 0 else (value - self.low) / span
        return self.start + share * (self.end - self.start)


def nice_ticks(low: float, high: float, target: int = 5) -> list[float]:
    """Return about ``target`` round numbers that enclose [low, high]; at least two."""
    span = high - low or max(abs(high), 1.0) * 0.1
    power = 10.0 ** math.floor(math.log10(span / target))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m * target >= span)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    return [index * step for index in range(first, last + 1)]


def _round_ticks(first: int, last: int) -> list[int]:
    step = max(1, math.ceil((last - first) / 8))
    return list(range(first, last + 1, step))


def _label(value: float, ticks: Sequence[float]) -> str:
    step = ticks[1] - ticks[0]
    decimals = 0
    while decimals < 6 and abs(step * 10**decimals - round(step * 10**decimals)) > 1e-6:
        decimals += 1
    return f"{value:.{decimals}f}"
