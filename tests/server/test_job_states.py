"""The rules of jobs, rounds and attempts: what can follow what, whoever asks."""

from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fedcmr_server.job_states import (
    ATTEMPT_EVENTS,
    CARRIED,
    MOST_LOSSES,
    TRANSITIONS,
    JobEvent,
    JobState,
    Standing,
    TransitionRefused,
    after,
    after_round,
    attempts_at,
    check_attempt,
    restart_pause_s,
    round_after,
)

STATES = get_args(JobState)
EVENTS = get_args(JobEvent)
REPORTS = ("start", "run_lost", "paused", "finish")


def test_every_state_can_be_reached_and_only_two_are_final() -> None:
    reached = {"submitted", *TRANSITIONS.values()}
    assert reached == set(STATES)
    assert {state for state in STATES if not any(s == state for s, _ in TRANSITIONS)} == {
        "finished",
        "cancelled",
    }


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("event", EVENTS)
def test_what_the_table_does_not_list_is_refused_by_name(state: JobState, event: JobEvent) -> None:
    if (state, event) in TRANSITIONS:
        return
    with pytest.raises(TransitionRefused, match=f"a job that is {state} takes no `{event}`"):
        after(Standing(state, "run"), event, "run")


def test_a_refusal_says_what_is_allowed() -> None:
    with pytest.raises(TransitionRefused, match="it takes cancel, resume"):
        after(Standing("paused"), "pause")
    with pytest.raises(TransitionRefused, match="it is over"):
        after(Standing("finished"), "resume")


@pytest.mark.parametrize("event", ["run_lost", "paused", "finish", "fail"])
@pytest.mark.parametrize(("carrier", "reporter"), [("new", "old"), ("new", None), (None, "old")])
def test_nothing_that_another_run_says_counts(
    event: JobEvent, carrier: str | None, reporter: str | None
) -> None:
    with pytest.raises(TransitionRefused, match="carried by"):
        after(Standing("running", carrier), event, reporter)


def test_a_job_has_one_run_which_may_say_so_twice() -> None:
    running = after(Standing(), "start", "a")
    assert running == Standing("running", "a")
    assert after(running, "start", "a") == running
    with pytest.raises(TransitionRefused, match="carried by run a, not by b"):
        after(running, "start", "b")
    with pytest.raises(TransitionRefused, match="must be named"):
        after(Standing(), "start")


def test_pausing_waits_for_the_run_and_can_be_taken_back() -> None:
    pausing = after(Standing("running", "a"), "pause")
    assert pausing == Standing("pausing", "a")
    assert after(pausing, "paused", "a") == Standing("paused")
    assert after(pausing, "run_lost", "a").state == "paused"
    resumed = after(pausing, "resume")
    assert resumed == Standing("running", "a")
    # The run had stopped before it saw that: another one goes on.
    assert after(resumed, "paused", "a").waits_for_run
    assert after(Standing("running"), "pause") == Standing("paused")


def test_lost_runs_are_replaced_until_too_many_in_a_row_brought_no_round() -> None:
    standing = Standing()
    for loss in range(1, MOST_LOSSES + 1):
        assert standing.waits_for_run
        standing = after(after(standing, "start", "a"), "run_lost", "a", "no sites")
        assert standing.losses == loss
    assert standing.state == "failed"
    assert standing.reason is not None
    assert f"{MOST_LOSSES} runs in a row" in standing.reason
    assert "no sites" in standing.reason
    assert after(standing, "resume") == Standing("running")


def test_a_round_forgives_lost_runs() -> None:
    assert after_round(Standing("running", "a", 9, "lost")) == Standing("running", "a")


def test_pauses_grow_between_runs() -> None:
    pauses = [restart_pause_s(losses) for losses in range(MOST_LOSSES)]
    assert pauses[0] == 0
    assert pauses[1:] == sorted(pauses[1:])
    assert all(0 < pause <= 3600 for pause in pauses[1:])


class Federation(RuleBasedStateMachine):
    """Runs that start, die and speak up late, and people who pause, resume and cancel."""

    def __init__(self) -> None:
        super().__init__()
        self.standing = Standing()
        self.ever: list[str] = []

    def see(self, event: JobEvent, run: str | None = None) -> None:
        try:
            standing = after(self.standing, event, run)
        except TransitionRefused:
            return
        if event in REPORTS and event != "start":
            assert run == self.standing.run
        assert (self.standing.state, event) in TRANSITIONS
        self.standing = standing

    @rule()
    def a_new_run_starts(self) -> None:
        carried = self.standing.run
        self.ever.append(f"run-{len(self.ever)}")
        self.see("start", self.ever[-1])
        if carried is not None:
            assert self.standing.run == carried

    @precondition(lambda self: self.ever)
    @rule(data=st.data(), event=st.sampled_from([*REPORTS, "fail"]))
    def a_run_reports(self, data: st.DataObject, event: Any) -> None:
        self.see(event, data.draw(st.sampled_from(self.ever)))

    @rule(event=st.sampled_from(["pause", "resume", "cancel", "fail"]))
    def somebody_decides(self, event: Any) -> None:
        self.see(event)

    @rule()
    def a_round_is_over(self) -> None:
        if self.standing.state in CARRIED:
            self.standing = after_round(self.standing)

    @invariant()
    def only_carried_jobs_have_a_run(self) -> None:
        assert self.standing.run is None or self.standing.state in CARRIED
        assert self.standing.state != "pausing" or self.standing.run is not None

    @invariant()
    def losses_are_bounded(self) -> None:
        assert (
            self.standing.losses < MOST_LOSSES
            or self.standing.state == "failed"
            or (self.standing.state == "paused")
        )


Federation.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestFederation = Federation.TestCase


def test_rounds_start_and_end_once() -> None:
    assert round_after(None, "start") == "started"
    assert round_after("started", "start") == "started"  # done again after a crash
    assert round_after("started", "commit") == "committed"
    assert round_after("started", "close") == "closed"
    for state, event in [(None, "commit"), ("committed", "start"), ("closed", "commit")]:
        with pytest.raises(TransitionRefused, match="takes no"):
            round_after(state, event)  # type: ignore[arg-type]


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(ATTEMPT_EVENTS), st.integers(1, 4)), max_size=12))
def test_whatever_is_asked_a_round_is_opened_once_and_numbers_are_new(
    asked: list[tuple[str, int]],
) -> None:
    recorded: list[dict[str, Any]] = []
    for name, attempt in asked:
        try:
            check_attempt(recorded, name, attempt)
        except TransitionRefused:
            continue
        recorded.append({"event": name, "attempt": attempt, "phase": "train", "round": 1})
    names = [each["event"] for each in recorded]
    assert names.count("unmask_asked") <= 1
    if "unmask_asked" in names:
        assert "attempt_started" not in names[names.index("unmask_asked") :]
    started = [each["attempt"] for each in recorded if each["event"] == "attempt_started"]
    assert started == sorted(set(started))
    assert attempts_at(recorded, "train", 1) == recorded
    assert attempts_at(recorded, "evaluate", 1) == attempts_at(recorded, "train", 2) == []
