"""Events of a job as lines for people; see `fedcmr_server.dashboard` for the pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from fedcmr_shared.privacy.evaluation import SCORE_RANGES
from fedcmr_shared.schemas.refusals import REFUSAL_CODES

_Values = Mapping[str, Any]


def event_text(name: str, values: _Values) -> str | None:
    """Return one line about an event; None for those that another event tells better."""
    if name in _SILENT:
        return None
    text = _TEXTS.get(name)
    return f"{name}: {_plain(values)}" if text is None else text(values)


def _submitted(values: _Values) -> str:
    return "submitted, from a bundle" if "start" in values else "submitted, from its seed"


def _round(values: _Values) -> str:
    number = values["round"]
    if values.get("closed"):
        return f"round {number}: closed, its sum could not be opened; the model stays"
    left_out = f", {values['left_out']} left out" if values.get("left_out") else ""
    seconds = f" in {values['seconds']:.0f} s" if "seconds" in values else ""
    return f"round {number}: {_sites(values)}{left_out}{seconds}"


def _evaluation(values: _Values) -> str:
    number = values["round"]
    if values.get("closed"):
        return f"evaluation after round {number}: closed, its sum could not be opened"
    means = [f"{name} {values[name]:.4g}" for name in SCORE_RANGES if name in values]
    return f"evaluation after round {number}: {', '.join(means) or 'none'}, {_sites(values)}"


def _attempt(values: _Values) -> str | None:
    losses = values.get("losses") or ()
    lost = ", ".join(_loss(loss) for loss in losses)
    if values.get("outcome") == "opened" and not lost:
        return None  # the round or evaluation says as much
    where = f"{values['phase']}, round {values['round']}, attempt {values['attempt']}"
    reason = f": {values['reason']}" if values.get("reason") else ""
    return f"{where} {values.get('outcome')}{reason}{f'; lost {lost}' if lost else ''}"


def _loss(loss: _Values) -> str:
    code = loss.get("code") or loss.get("fault")
    meaning = REFUSAL_CODES.get(code) if code else None
    return f"{loss.get('site')} ({meaning or code})"


def _sites(values: _Values) -> str:
    count = values.get("sites", 0)
    return "1 site" if count == 1 else f"{count} sites"


def _because(text: str) -> Callable[[_Values], str]:
    return lambda values: f"{text}: {values['reason']}" if values.get("reason") else text


def _plain(values: _Values) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(values.items()))


_SILENT: Final = frozenset({"attempt_started", "unmask_asked"})
_TEXTS: Final[Mapping[str, Callable[[_Values], str | None]]] = {
    "submit": _submitted,
    "authorise": lambda values: f"signed anew, until {values['not_after']}",
    "start": lambda values: f"run {values['run']} carries it",
    "run_lost": _because("its run was lost"),
    "pause": _because("asked to pause"),
    "paused": _because("paused"),
    "resume": _because("resumed"),
    "cancel": _because("cancelled"),
    "finish": _because("finished"),
    "fail": _because("failed"),
    "round": _round,
    "evaluation": _evaluation,
    "attempt": _attempt,
    "release": lambda values: f"released as {values['path']}",
    "release_refused": lambda values: f"not released: {values['gate']}: {values['text']}",
}
