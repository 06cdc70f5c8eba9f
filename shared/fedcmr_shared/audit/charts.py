"""Charts of the report as coordinates for SVG: epsilon over time, and bars of jobs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from fedcmr_shared.audit.account import Account
from fedcmr_shared.audit.timeline import Moment

_LAST_DATE: Final = 253_402_300_799_999  # end of the year 9999 in milliseconds
_DAY: Final = 86_400_000
_TIME_TICKS: Final = 5
_ABOVE_BUDGET: Final = 1.5  # how much of the bound over all cohorts is drawn, in budgets


@dataclass(frozen=True)
class Tick:
    """A tick of an axis: pixel position and label."""

    at: float
    label: str


@dataclass(frozen=True)
class TimeChart:
    """Step curves over time as SVG paths, in a box of ``width`` x ``height`` pixels.

    ``everything`` is empty when there is but one cohort; ``cut`` says that it leaves the chart.
    """

    started: str
    charged: str
    pld: str
    everything: str
    cut: bool
    budget: float
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    width: int = 900
    height: int = 300
    left: int = 48
    right: int = 16
    top: int = 16
    bottom: int = 34


@dataclass(frozen=True)
class Bar:
    """One job: lengths in pixels of its filter's and its PLD figure, if it has one."""

    y: float
    filter: float
    pld: float | None


@dataclass(frozen=True)
class BarChart:
    """One bar for each job on a common axis of epsilon from 0 on."""

    bars: tuple[Bar, ...]
    ticks: tuple[Tick, ...]
    height: float
    width: int = 900
    left: int = 300
    row: int = 44


def utc(at: int) -> str:
    """Return a time in milliseconds since 1970 as text; the number itself beyond year 9999."""
    if at > _LAST_DATE:
        return f"{at} ms"
    return datetime.fromtimestamp(at // 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def time_chart(moments: Sequence[Moment], budget: float) -> TimeChart:
    """Lay out ``moments`` (at least one), equally spaced, below the budget's line."""
    frame = TimeChart("", "", "", "", False, 0.0, (), ())
    peak = max(budget, *(moment.charged for moment in moments))
    everything = max(moment.everything for moment in moments)
    several = any(not math.isclose(m.everything, m.charged, rel_tol=1e-9) for m in moments)
    ticks = _ticks(max(peak, min(everything, _ABOVE_BUDGET * budget)))
    # Jobs come in bursts with months between them, so the axis counts entries, not hours.
    across = _scale(0, len(moments), frame.left, frame.width - frame.right)
    up = _scale(0, ticks[-1], frame.height - frame.bottom, frame.top)

    def curve(values: Iterable[float | None]) -> str:
        points = [(across(i), up(v)) for i, v in enumerate(values) if v is not None]
        return _steps(points, across(len(moments))) if points else ""

    started = curve(m.started for m in moments)
    span = max(m.at for m in moments) - moments[0].at
    shown = sorted({(len(moments) - 1) * part // _TIME_TICKS for part in range(_TIME_TICKS + 1)})
    return TimeChart(
        started=f"{started}V{up(0):.1f}H{across(0):.1f}Z",
        charged=curve(m.charged for m in moments),
        pld=curve(m.pld for m in moments),
        everything=curve(m.everything for m in moments) if several else "",
        cut=several and everything > ticks[-1],
        budget=up(budget),
        x_ticks=tuple(Tick(across(i), _clock(moments[i].at, span)) for i in shown),
        y_ticks=tuple(Tick(up(value), f"{value:g}") for value in ticks),
    )


def bar_chart(account: Account) -> BarChart:
    """Lay out the jobs of ``account``, in the order of their admission."""
    frame = BarChart((), (), 0.0)
    ticks = _ticks(max((job.figures.filter_epsilon for job in account.jobs), default=1.0))
    along = _scale(0, ticks[-1], 0, frame.width - frame.left - 70)
    bars = tuple(
        Bar(
            index * frame.row,
            along(job.figures.filter_epsilon),
            None if job.figures.pld_epsilon is None else along(job.figures.pld_epsilon),
        )
        for index, job in enumerate(account.jobs)
    )
    marks = tuple(Tick(frame.left + along(value), f"{value:g}") for value in ticks)
    return BarChart(bars, marks, len(bars) * frame.row)


def _steps(points: Sequence[tuple[float, float]], end: float) -> str:
    (x, y), *rest = points
    return f"M{x:.1f} {y:.1f}" + "".join(f"H{x:.1f}V{y:.1f}" for x, y in rest) + f"H{end:.1f}"


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = high - low

    def position(value: float) -> float:
        return start + (end - start) * ((value - low) / span if span else 0.0)

    return position


def _ticks(peak: float, target: int = 4) -> list[float]:
    """Return about ``target`` + 1 round numbers from 0 to ``peak`` or just above it."""
    if peak <= 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(peak / target))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m * target >= peak)
    return [step * index for index in range(math.ceil(peak / step - 1e-9) + 1)]


def _clock(at: int, span: int) -> str:
    text = utc(at)
    if span > 2 * _DAY or at > _LAST_DATE:
        return text[:10]
    return text[11:16] if span > _DAY / 12 else text[11:19]
