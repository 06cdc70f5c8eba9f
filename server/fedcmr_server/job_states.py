"""What may happen to a job, to its rounds and to the attempts at a secure sum: rules without IO.

A job is carried by Flower runs, one at a time. Several processes start runs and report about them,
and each report names its run: nothing that an older run says counts any more::

    submitted  →  running  →  finished
                  running  ⇄  pausing  →  paused  →  running
                  running  →  failed  →  running

and, until it has finished, to cancelled. A job that is ``running`` without a run waits for the next
one: after `resume`, and after `run_lost`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from fedcmr_shared.errors import FederationError

JobState = Literal["submitted", "running", "pausing", "paused", "finished", "failed", "cancelled"]
JobEvent = Literal["start", "run_lost", "pause", "paused", "resume", "cancel", "finish", "fail"]
RoundState = Literal["started", "committed", "closed"]
RoundEvent = Literal["start", "commit", "close"]

TRANSITIONS: Final[Mapping[tuple[JobState, JobEvent], JobState]] = {
    ("submitted", "start"): "running",
    ("submitted", "pause"): "paused",
    ("submitted", "cancel"): "cancelled",
    ("submitted", "fail"): "failed",
    ("running", "start"): "running",
    ("running", "run_lost"): "running",
    ("running", "pause"): "pausing",
    # Resumed before the run had ended, which it does all the same.
    ("running", "paused"): "running",
    ("running", "cancel"): "cancelled",
    ("running", "finish"): "finished",
    ("running", "fail"): "failed",
    ("pausing", "start"): "pausing",
    ("pausing", "run_lost"): "paused",
    ("pausing", "paused"): "paused",
    ("pausing", "resume"): "running",
    ("pausing", "cancel"): "cancelled",
    ("pausing", "finish"): "finished",
    ("pausing", "fail"): "failed",
    ("paused", "resume"): "running",
    ("paused", "cancel"): "cancelled",
    ("failed", "resume"): "running",
    ("failed", "cancel"): "cancelled",
}
"""(state, event) to the next state; `after` adds what depends on the run."""

ROUND_TRANSITIONS: Final[Mapping[tuple[RoundState | None, RoundEvent], RoundState]] = {
    (None, "start"): "started",
    # Cut off by a crash, a round is done again from the model before it.
    ("started", "start"): "started",
    ("started", "commit"): "committed",
    ("started", "close"): "closed",
}
"""A round closes when its sum cannot be opened any more: it is over, and the model stays."""

CARRIED: Final[tuple[JobState, ...]] = ("running", "pausing")
"""States in which a run may work on the job."""

CANCELLED: Final[tuple[JobState, ...]] = ("cancelled",)
"""States in which none ever will again, although one may not know that yet."""

MOST_LOSSES: Final = 10
"""So many runs in a row may be lost without a new round before the job fails."""

ATTEMPT_EVENTS: Final = ("attempt_started", "unmask_asked", "attempt")

_FIRST_PAUSE_S: Final = 10.0
_LONGEST_PAUSE_S: Final = 3600.0


class TransitionRefused(FederationError):
    """What is asked for does not fit the state that the job, round or attempt is in."""


@dataclass(frozen=True)
class Standing:
    """Where a job stands: its state, the run that carries it, and runs lost since the last round.

    ``reason`` says why a job failed, or why its last run was lost.
    """

    state: JobState = "submitted"
    run: str | None = None
    losses: int = 0
    reason: str | None = None

    @property
    def waits_for_run(self) -> bool:
        """Whether a run should be started."""
        return self.state == "submitted" or (self.state == "running" and self.run is None)


def after(
    standing: Standing, event: JobEvent, run: str | None = None, reason: str | None = None
) -> Standing:
    """Return where a job stands once ``event`` happened; ``run`` is who reports it.

    `start` may be reported twice by the same run: by who started it and by the run itself.

    Raises:
        TransitionRefused: the event does not fit the state, or another run carries the job.
    """
    state = TRANSITIONS.get((standing.state, event))
    if state is None:
        raise TransitionRefused(
            f"a job that is {standing.state} takes no `{event}`: {_allowed(standing.state)}"
        )
    if event == "start":
        return _started(standing, state, run)
    if event in ("run_lost", "paused", "finish", "fail"):
        _require_same_run(standing, event, run)
    if event == "pause":
        # Without a run nobody is there to stop.
        return replace(standing, state=state if standing.run else "paused")
    if event == "run_lost":
        return _lost(standing, state, reason)
    if event == "resume":
        return replace(standing, state=state, losses=0, reason=None)
    if event == "cancel":
        return replace(standing, state=state, run=None, reason=reason)
    return replace(standing, state=state, run=None, losses=0, reason=reason)


def after_round(standing: Standing) -> Standing:
    """Return where a job stands once a new round is committed or closed."""
    return replace(standing, losses=0, reason=None)


def round_after(state: RoundState | None, event: RoundEvent) -> RoundState:
    """Return the next state of a round; TransitionRefused when ``event`` does not fit."""
    following = ROUND_TRANSITIONS.get((state, event))
    if following is None:
        raise TransitionRefused(f"a round that is {state or 'not started'} takes no `{event}`")
    return following


def check_attempt(before: Sequence[Mapping[str, Any]], event: str, attempt: int) -> None:
    """Return if ``event`` may follow what was recorded ``before`` of the same phase and round.

    An attempt's number is used once, and once shares were asked for no other attempt follows.

    Raises:
        TransitionRefused: it may not.
    """
    last = before[-1] if before else None
    if event == "attempt_started":
        asked = any(each["event"] == "unmask_asked" for each in before)
        used = max((each["attempt"] for each in before), default=0)
        if asked or attempt <= used:
            why = "shares of its round were asked for" if asked else "its number was used before"
            raise TransitionRefused(f"attempt {attempt} may not start: {why}")
        return
    expected = ("attempt_started",) if event == "unmask_asked" else ATTEMPT_EVENTS[:2]
    if last is None or last["attempt"] != attempt or last["event"] not in expected:
        raise TransitionRefused(f"`{event}` does not follow what is recorded of attempt {attempt}")


def attempts_at(
    events: Iterable[Mapping[str, Any]], phase: str, number: int
) -> list[Mapping[str, Any]]:
    """Return the events of attempts at ``phase`` of round ``number``, in their order."""
    return [
        event
        for event in events
        if event["event"] in ATTEMPT_EVENTS and (event["phase"], event["round"]) == (phase, number)
    ]


def summed_sites(
    events: Iterable[Mapping[str, Any]], phase: str, number: int | None = None
) -> set[str]:
    """Return the sites in the opened secure sums of ``phase``, of round ``number`` or of all."""
    return {
        site
        for event in events
        if event["event"] == "attempt"
        and (event.get("phase"), event.get("outcome")) == (phase, "opened")
        and number in (None, event.get("round"))
        for site in event.get("survivors", ())
    }


def restart_pause_s(losses: int) -> float:
    """Return the seconds to wait before the next run after ``losses`` lost ones in a row."""
    return min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 3.0 ** (losses - 1)) if losses else 0.0


def _started(standing: Standing, state: JobState, run: str | None) -> Standing:
    if run is None:
        raise TransitionRefused("a job is started by a run, which must be named")
    if standing.run not in (None, run):
        raise TransitionRefused(f"the job is carried by run {standing.run}, not by {run}")
    return replace(standing, state=state, run=run)


def _lost(standing: Standing, state: JobState, reason: str | None) -> Standing:
    losses = standing.losses + 1
    if state == "running" and losses >= MOST_LOSSES:
        text = f"{losses} runs in a row were lost without a new round; the last one: "
        return replace(standing, state="failed", run=None, losses=losses, reason=text + str(reason))
    return replace(standing, state=state, run=None, losses=losses, reason=reason)


def _require_same_run(standing: Standing, event: JobEvent, run: str | None) -> None:
    # A job that nobody carries can fail all the same, such as when no run can be started for it.
    if run != standing.run or (run is None and event != "fail"):
        carrier = f"run {standing.run}" if standing.run else "no run"
        raise TransitionRefused(
            f"`{event}` comes from {f'run {run}' if run else 'no run'}, and the job is carried by "
            f"{carrier}"
        )


def _allowed(state: JobState) -> str:
    events = sorted(event for before, event in TRANSITIONS if before == state)
    return f"it takes {', '.join(events)}" if events else "it is over"
