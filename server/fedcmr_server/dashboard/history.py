"""What a job's events tell: attempts at secure sums, evaluations, rounds, and lost sites.

The events are those of :mod:`fedcmr_server.rounds` and :mod:`fedcmr_server.secure_sums`. An event
that lacks a field, since an older version wrote it, counts as nothing there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

from fedcmr_server.losses import Loss
from fedcmr_server.store.tables import EventRow
from fedcmr_server.words import METRICS

UNDER_WAY: Final = "under way"
CUT_OFF: Final = "cut off"
"""Outcomes of an attempt without one: it may have one yet, or whoever made it is gone."""

_NEXT: Final = frozenset(
    {"attempt_started", "round", "evaluation"}
    | {"start", "run_lost", "paused", "finish", "fail", "cancel"}
)
"""Events after which nothing from before is under way: a job makes one attempt at a time."""


@dataclass(frozen=True)
class Attempt:
    """One attempt at a secure sum. Its outcome is `UNDER_WAY` until it has one, or is `CUT_OFF`."""

    phase: str
    round: int
    number: int
    at: datetime
    outcome: str = UNDER_WAY
    step: str = ""
    survivors: int = 0
    sites: int = 0
    threshold: int = 0
    losses: tuple[Loss, ...] = ()
    seconds: float = math.nan
    bytes_up: int = 0
    bytes_down: int = 0
    unmask_asked: bool = False


@dataclass(frozen=True)
class Evaluation:
    """Means of scores over the patients of all sites, after a round.

    ``gates_passed`` counts sites whose memorisation gate passed, ``energy_kwh`` is what the job took
    at all sites together, where it asks for that.
    """

    round: int
    values: Mapping[str, float]
    sites: int
    seconds: float
    bytes_up: int
    bytes_down: int
    gates_passed: int | None = None
    energy_kwh: float = math.nan


@dataclass(frozen=True)
class Training:
    """What the event of a finished round says."""

    round: int
    sites: int
    closed: bool
    left_out: int
    update_norm: float
    seconds: float
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True)
class History:
    """A job's events by kind, the oldest first."""

    rounds: tuple[Training, ...]
    attempts: tuple[Attempt, ...]
    evaluations: tuple[Evaluation, ...]

    @classmethod
    def of(cls, events: Iterable[EventRow]) -> History:
        """Read the events of one job, in their order."""
        rounds: list[Training] = []
        evaluations: list[Evaluation] = []
        attempts: dict[tuple[str, int, int], Attempt] = {}
        for event in events:
            values = event.content
            if event.name in _NEXT:
                _cut_off(attempts)
            if event.name == "round":
                rounds.append(_training(values))
            elif event.name == "evaluation":
                evaluations.append(_evaluation(values))
            elif event.name in ("attempt_started", "unmask_asked", "attempt"):
                place = (_text(values, "phase"), _count(values, "round"), _count(values, "attempt"))
                attempts[place] = _attempt(event, attempts.get(place))
        return cls(tuple(rounds), tuple(attempts.values()), tuple(evaluations))

    @property
    def drop_outs(self) -> int:
        """How many times a site was lost to a phase of a round, however many attempts it took."""
        return len({(a.phase, a.round, loss.site) for a in self.attempts for loss in a.losses})

    @property
    def bytes(self) -> tuple[int, int]:
        """Bytes up and down. Attempts count what a restart made a round's own event forget."""
        counted: Sequence[Attempt | Training | Evaluation] = self.attempts or (
            *self.rounds,
            *self.evaluations,
        )
        return sum(each.bytes_up for each in counted), sum(each.bytes_down for each in counted)

    def loss_counts(self) -> list[tuple[str, Loss, int]]:
        """Losses by step and code: ``(step, a loss like these, how many)``, the most first."""
        counts = Counter((loss.step, loss.code) for a in self.attempts for loss in a.losses)
        order = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        return [(step, Loss("", step, code), count) for (step, code), count in order]


def _training(values: Mapping[str, Any]) -> Training:
    return Training(
        round=_count(values, "round"),
        sites=_count(values, "sites"),
        closed=bool(values.get("closed")),
        left_out=_count(values, "left_out"),
        update_norm=_number(values, "update_norm"),
        seconds=_number(values, "seconds"),
        bytes_up=_count(values, "bytes_up"),
        bytes_down=_count(values, "bytes_down"),
    )


def _evaluation(values: Mapping[str, Any]) -> Evaluation:
    return Evaluation(
        round=_count(values, "round"),
        values={name: _number(values, name) for name in METRICS if name in values},
        sites=_count(values, "sites"),
        seconds=_number(values, "seconds"),
        bytes_up=_count(values, "bytes_up"),
        bytes_down=_count(values, "bytes_down"),
        gates_passed=_count(values, "gates_passed") if "gates_passed" in values else None,
        energy_kwh=_number(values, "energy_kwh"),
    )


def _cut_off(attempts: dict[tuple[str, int, int], Attempt]) -> None:
    """End the newest attempt if it is under way; those before it have ended."""
    place = next(reversed(attempts), None)
    if place is not None and attempts[place].outcome == UNDER_WAY:
        attempts[place] = replace(attempts[place], outcome=CUT_OFF)


def _attempt(event: EventRow, before: Attempt | None) -> Attempt:
    values = event.content
    phase, number = _text(values, "phase"), _count(values, "round")
    asked = event.name == "unmask_asked" or (before is not None and before.unmask_asked)
    at = before.at if before is not None else event.at
    if event.name != "attempt":
        return Attempt(phase, number, _count(values, "attempt"), at, unmask_asked=asked)
    return Attempt(
        phase=phase,
        round=number,
        number=_count(values, "attempt"),
        at=at,
        outcome=_text(values, "outcome"),
        step=_text(values, "step"),
        survivors=len(_list(values, "survivors")),
        sites=_count(values, "sites"),
        threshold=_count(values, "threshold"),
        losses=tuple(sorted(Loss.read(each) for each in _list(values, "losses"))),
        seconds=_number(values, "seconds"),
        bytes_up=_count(values, "bytes_up"),
        bytes_down=_count(values, "bytes_down"),
        unmask_asked=asked,
    )


def _text(values: Mapping[str, Any], name: str) -> str:
    return str(values.get(name) or "")


def _list(values: Mapping[str, Any], name: str) -> list[Any]:
    found = values.get(name)
    return found if isinstance(found, list) else []


def _number(values: Mapping[str, Any], name: str) -> float:
    found = values.get(name)
    return float(found) if isinstance(found, (int, float)) else math.nan


def _count(values: Mapping[str, Any], name: str) -> int:
    found = _number(values, name)
    return int(found) if math.isfinite(found) else 0
