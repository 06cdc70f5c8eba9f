"""Events of a job as lines for people: in the dashboard and on the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from fedcmr_server.losses import Loss
from fedcmr_server.words import METRICS, PHASES, plural, seconds_text

_Values = Mapping[str, Any]


def event_text(name: str, values: _Values) -> str | None:
    """Return one line about an event; None for those that another event tells better.

    What an older version did not write is left out. The values of an event that is unknown here
    are not shown: nobody knows whether they are public.
    """
    if name in _SILENT:
        return None
    text = _TEXTS.get(name)
    return name.replace("_", " ") if text is None else text(values)


def _round(values: _Values) -> str:
    number = values.get("round")
    if values.get("closed"):
        return f"round {number} closed without an update"
    left_out = f", {values['left_out']} left out" if values.get("left_out") else ""
    seconds = values.get("seconds")
    took = f" in {seconds_text(seconds)}" if isinstance(seconds, (int, float)) else ""
    return (
        f"round {number} committed with {plural(values.get('sites') or 0, 'site')}{left_out}{took}"
    )


def _evaluation(values: _Values) -> str:
    number = values.get("round")
    if values.get("closed"):
        return f"round {number} scored: the sum could not be opened"
    if isinstance(values.get("gates_passed"), int):
        passed, sites = values["gates_passed"], plural(values.get("sites") or 0, "site")
        return f"memorisation gates after round {number}: passed at {passed} of {sites}"
    found = [
        f"{score.name} {score.text(values[name])}"
        for name, score in METRICS.items()
        if isinstance(values.get(name), (int, float))
    ]
    return f"round {number} scored: {', '.join(found) or 'no figure'}"


def _attempt(values: _Values) -> str | None:
    losses = values.get("losses")
    found = sorted({Loss.read(each) for each in losses} if isinstance(losses, list) else ())
    outcome = values.get("outcome")
    if outcome == "opened" and not found:
        return None  # the round or evaluation says as much
    phase = PHASES.get(str(values.get("phase")), "an unknown phase")
    where = f"round {values.get('round')}, {phase}, attempt {values.get('attempt')}"
    lost = ", ".join(f"{loss.site} ({loss.meaning})" for loss in found)
    return _because(f"{where} {outcome}")(values) + (f", without {lost}" if lost else "")


def _because(text: str) -> Callable[[_Values], str]:
    return lambda values: f"{text}: {values['reason']}" if values.get("reason") else text


_SILENT: Final = frozenset({"attempt_started", "unmask_asked"})
_TEXTS: Final[Mapping[str, Callable[[_Values], str | None]]] = {
    "submit": lambda values: "submitted" + (", from a bundle" if "start" in values else ""),
    "authorise": lambda values: f"signed anew, until {values.get('not_after')}",
    "start": lambda values: f"run {values.get('run')} carries it",
    "run_lost": _because("lost its run"),
    "pause": _because("is to pause after this round"),
    "cancel": _because("cancelled"),
    "finish": lambda _: "finished",
    "fail": _because("failed"),
    "resume": lambda _: "resumed",
    "round": _round,
    "evaluation": _evaluation,
    "attempt": _attempt,
    "release": lambda values: f"released as {values.get('path')}",
    "release_refused": lambda values: f"not released: {values.get('gate')}: {values.get('text')}",
}
