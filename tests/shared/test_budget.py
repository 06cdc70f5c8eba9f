from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedcmr_shared.errors import JobRefused, LedgerError
from fedcmr_shared.privacy import budget as rules
from fedcmr_shared.privacy.accounting import epsilon_from_rdp, rdp, rdp_limit
from fedcmr_shared.privacy.budget import (
    Budget,
    memberships,
    patient_committed,
    patient_rdp,
    patient_reserved,
    patient_spent,
    phases_of,
    replay,
)
from fedcmr_shared.schemas.job import JobSpec, TrainingSpec
from fedcmr_shared.schemas.ledger import (
    Admitted,
    ClockSet,
    Closed,
    Entry,
    Leaf,
    Masked,
    Opened,
    Padding,
    Refused,
    Release,
    Reservation,
    Started,
    Stored,
    Unmasked,
    Withdrawn,
)
from fedcmr_shared.schemas.privacy import EvaluationSpec, PrivacySpec

JOB, OTHER = "a" * 64, "b" * 64
COHORT, HELD_OUT = "c" * 64, "d" * 64
TRAIN = Release(sampling_rate=0.1, noise_multiplier=2.0, steps=10)
SCORE = Release(sampling_rate=1.0, noise_multiplier=8.0, steps=1)
BARE = Release(sampling_rate=1.0, noise_multiplier=None, steps=1)
ORDER = 8


def opened(**changes: Any) -> Opened:
    values = {
        "at": 0,
        "site": "north",
        "site_key": "e" * 64,
        "secret_fingerprint": "f" * 64,
        "epsilon": 8.0,
        "delta": 1e-5,
        "order": ORDER,
    }
    return Opened.model_validate(values | changes)


def admitted(job: str = JOB, *, starts: int = 3, score: Release = SCORE, at: int = 0) -> Admitted:
    return Admitted(
        at=at,
        job=job,
        sequence=0,
        name="job",
        coordinator="coordinator",
        model="cardiomm",
        part="full",
        rounds=2,
        spare_rounds=1,
        clip_norm=1.0,
        clipping="flat",
        delta=1e-5,
        policy="0" * 64,
        phases={
            "train": Reservation(cohort=COHORT, release=TRAIN, starts=starts),
            "evaluate": Reservation(cohort=HELD_OUT, release=score, starts=2),
        },
    )


def started(sequence: int, round: int = 1, attempt: int = 1, **changes: Any) -> Started:
    values = {"at": 0, "job": JOB, "sequence": sequence, "phase": "train"}
    return Started.model_validate(values | {"round": round, "attempt": attempt} | changes)


def stored(sequence: int, round: int = 1, attempt: int = 1, **changes: Any) -> Stored:
    values = {"at": 0, "job": JOB, "sequence": sequence, "phase": "train", "sha256": "1" * 64}
    return Stored.model_validate(values | {"round": round, "attempt": attempt} | changes)


def masked(sequence: int, attempt: int = 1, **changes: Any) -> Masked:
    values = {"at": 0, "job": JOB, "sequence": sequence, "phase": "train", "header": "4" * 64}
    return Masked.model_validate(values | {"round": 1, "attempt": attempt} | changes)


def unmasked(sequence: int, attempt: int = 1, **changes: Any) -> Unmasked:
    values = {"at": 0, "job": JOB, "sequence": sequence, "phase": "train", "answer": "5" * 64}
    values["survivors"] = ("east", "north", "south")
    return Unmasked.model_validate(values | {"round": 1, "attempt": attempt} | changes)


def closed(sequence: int, job: str = JOB) -> Closed:
    return Closed(at=0, job=job, sequence=sequence, outcome="finished")


LIFE: list[Entry] = [
    opened(),
    admitted(),
    started(1),
    stored(2),
    Padding(at=0),
    started(3, round=2),
    started(4, round=2, attempt=2),
    stored(5, round=2, attempt=2),
    started(6, phase="evaluate"),
    closed(7),
]


SUMMED: list[Entry] = [*LIFE[:4], masked(3), masked(4, attempt=3), unmasked(5, attempt=3)]


def test_a_life_adds_up() -> None:
    budget = replay(LIFE)
    state = budget.jobs[JOB]
    assert (budget.size, budget.opened.site, budget.status(JOB)) == (10, "north", "closed")
    assert state.starts == {"train": 3, "evaluate": 1}
    assert state.attempts == {("train", 1): 1, ("train", 2): 2, ("evaluate", 1): 1}
    assert set(state.stored) == {("train", 1), ("train", 2)}
    assert (state.closed, state.next_sequence) == ("finished", 8)
    assert budget.spent(COHORT) == {TRAIN: 3}
    assert budget.spent(HELD_OUT) == {SCORE: 1}
    assert budget.reserved(COHORT) == budget.reserved(HELD_OUT) == {}
    assert budget.cohorts() == {COHORT, HELD_OUT}


def test_what_is_reserved_becomes_spent_at_the_start_and_free_at_the_end() -> None:
    prices = [replay(LIFE[:size]).committed_rdp(COHORT) for size in range(2, 10)]
    assert prices == [3 * rdp(TRAIN, ORDER)] * 8
    counts = [
        (replay(LIFE[:size]).spent(COHORT), replay(LIFE[:size]).reserved(COHORT))
        for size in (2, 3, 6, 7)
    ]
    assert counts == [
        ({}, {TRAIN: 3}),
        ({TRAIN: 1}, {TRAIN: 2}),
        ({TRAIN: 2}, {TRAIN: 1}),
        ({TRAIN: 3}, {}),
    ]
    cancelled = replay([*LIFE[:3], closed(2)])
    assert cancelled.committed_rdp(COHORT) == rdp(TRAIN, ORDER)
    assert cancelled.committed_rdp(HELD_OUT) == 0


def test_a_patient_pays_for_every_cohort() -> None:
    budget = replay(LIFE[:3])
    both = [COHORT, HELD_OUT]
    assert patient_spent(budget, both) == {TRAIN: 1}
    assert patient_reserved(budget, both) == {TRAIN: 2, SCORE: 2}
    assert patient_committed(budget, both) == {TRAIN: 3, SCORE: 2}
    price = 3 * rdp(TRAIN, ORDER) + 2 * rdp(SCORE, ORDER)
    assert patient_rdp(budget, both) == pytest.approx(price, rel=1e-15)
    assert patient_rdp(budget, []) == 0


def test_releases_without_noise_are_counted_but_not_summed() -> None:
    budget = replay([opened(), admitted(score=BARE)])
    assert budget.reserved(HELD_OUT) == {BARE: 2}
    assert budget.committed_rdp(HELD_OUT) == 0


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ([Padding(at=0)], r"entry 0 \(padding\) .*begins with its opening entry"),
        ([opened(), opened()], r"entry 1 \(opened\) .*has no other one"),
        ([opened(at=5), Padding(at=4)], r"entry 1 \(padding\) .*time is before"),
        ([*LIFE[:2], admitted()], r"entry 2 \(admitted\) .*is open, not unknown"),
        ([*LIFE, admitted()], r"entry 10 \(admitted\) .*is closed, not unknown"),
        ([*LIFE, started(8)], r"entry 10 \(started\) .*is closed, not open"),
        ([*LIFE, closed(8)], r"entry 10 \(closed\) .*is closed, not open"),
        ([opened(), started(0)], r"entry 1 \(started\) .*is unknown, not open"),
        ([opened(), stored(0)], r"entry 1 \(stored\) .*is unknown, not open"),
        ([opened(), closed(0)], r"entry 1 \(closed\) .*is unknown, not open"),
        ([*LIFE[:2], started(2)], "sequence is 2 instead of 1"),
        ([*LIFE[:3], stored(1)], "sequence is 1 instead of 2"),
        ([opened(), admitted().model_copy(update={"sequence": 1})], "sequence is 1 instead of 0"),
        ([*LIFE[:2], started(1, round=3)], "the job has no round 3 to train"),
        ([*LIFE[:2], started(1, attempt=2)], "attempt is 2 instead of 1"),
        ([*LIFE[:3], started(2)], "attempt is 1 instead of 2"),
        ([*LIFE[:4], started(3, attempt=2)], "result of round 1 .train. is stored already"),
        ([*LIFE[:4], stored(3)], "result of round 1 .train. is stored already"),
        ([*LIFE[:2], stored(1)], "attempt 1 of round 1 was never started"),
        ([*LIFE[:3], stored(2, attempt=2)], "attempt 2 of round 1 was never started"),
        ([*LIFE[:7], started(5, round=2, attempt=3)], "all reserved starts to train are used up"),
        ([opened(), masked(0)], r"entry 1 \(masked\) .*is unknown, not open or closed"),
        ([opened(), unmasked(0)], r"entry 1 \(unmasked\) .*is unknown, not open or closed"),
        ([*LIFE[:3], masked(2)], r"round 1 \(train\) has no stored result to mask"),
        ([*LIFE[:4], masked(3, round=2)], r"round 2 \(train\) has no stored result to mask"),
        ([*LIFE[:4], masked(3, phase="evaluate")], "evaluate. has no stored result to mask"),
        ([*SUMMED[:5], masked(4)], "attempt 1 of round 1 .train. does not follow attempt 1"),
        ([*SUMMED[:6], masked(5, attempt=2)], "attempt 2 .* does not follow attempt 3"),
        ([*SUMMED, masked(6, attempt=4)], "share of round 1 .train. left: no further attempt"),
        ([*LIFE[:4], unmasked(3)], "attempt 1 .* cannot be opened: nothing was masked"),
        ([*SUMMED[:6], unmasked(5)], "attempt 1 .* cannot be opened: attempt 3 was masked"),
        ([*SUMMED[:6], unmasked(5, attempt=4)], "cannot be opened: attempt 3 was masked"),
        ([*SUMMED, unmasked(6, attempt=3)], "share of round 1 .train. left before"),
        ([*SUMMED[:6], masked(6, attempt=4)], "sequence is 6 instead of 5"),
        ([opened(), Withdrawn(at=0, patient="2" * 64)] * 2, r"entry 2 \(opened\)"),
        ([opened(), *[Withdrawn(at=0, patient="2" * 64)] * 2], "was withdrawn before"),
    ],
)
def test_impossible_entries_are_named(entries: list[Entry], why: str) -> None:
    with pytest.raises(LedgerError, match=why):
        replay(entries)


def test_secure_sums_are_counted_by_round_and_cost_nothing() -> None:
    budget = replay(SUMMED)
    state = budget.jobs[JOB]
    assert state.masked == {("train", 1): 3}
    assert state.unmasked == {("train", 1): SUMMED[-1]}
    assert state.next_sequence == 6
    assert budget.committed_rdp(COHORT) == replay(SUMMED[:4]).committed_rdp(COHORT)


def test_the_last_rounds_sum_is_opened_after_the_job_was_closed() -> None:
    last = [*LIFE, masked(8, round=2), unmasked(9, round=2)]
    budget = replay(last)
    assert budget.status(JOB) == "closed"
    assert budget.jobs[JOB].unmasked.keys() == {("train", 2)}
    assert budget.committed_rdp(COHORT) == replay(LIFE).committed_rdp(COHORT)


@settings(max_examples=100)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 2), st.integers(1, 6)), max_size=30))
def test_attempts_increase_and_a_round_is_opened_once(
    deeds: list[tuple[bool, int, int]],
) -> None:
    """Whatever is tried: what the rules let through is masked…, unmasked, and then nothing."""
    budget = replay(LIFE)
    done: dict[int, list[tuple[bool, int]]] = {1: [], 2: []}
    for opens, number, attempt in deeds:
        entry = (unmasked if opens else masked)(
            budget.jobs[JOB].next_sequence, attempt, round=number
        )
        try:
            budget = budget.apply(entry)
        except LedgerError:
            continue
        done[number].append((opens, attempt))
    for trace in done.values():
        attempts = [attempt for opens, attempt in trace if not opens]
        assert attempts == sorted(set(attempts))
        openings = [place for place, (opens, _) in enumerate(trace) if opens]
        assert openings in ([], [len(trace) - 1])
        if openings:
            assert trace[-1] == (True, attempts[-1])


def test_that_property_fails_without_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positive control: a site without them opens S and then S without one of its sites."""
    monkeypatch.setattr(rules, "masking_problem", lambda *_: None)
    monkeypatch.setattr(rules, "unmasking_problem", lambda *_: None)
    fewer = ("east", "north", "west")
    again = [masked(6, attempt=4), unmasked(7, attempt=4, survivors=fewer)]
    assert replay([*SUMMED, *again]).jobs[JOB].unmasked["train", 1].survivors == fewer


@pytest.mark.parametrize(
    "survivors",
    [(), ("east", "north"), ("north", "east", "south"), ("east", "east", "north", "south")],
)
def test_survivors_are_at_least_three_names_in_order(survivors: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError, match="survivors"):
        unmasked(5, survivors=survivors)


def test_a_job_without_training_or_evaluation() -> None:
    phases = admitted().phases
    only = {"phases": {"evaluate": phases["evaluate"]}}
    with pytest.raises(LedgerError, match="reserves no training"):
        replay([opened(), admitted().model_copy(update=only)])
    train = admitted().model_copy(update={"phases": {"train": phases["train"]}})
    with pytest.raises(LedgerError, match="the job has no round 1 to evaluate"):
        replay([opened(), train, started(1, phase="evaluate")])


def test_a_refused_entry_leaves_the_budget_as_it_was() -> None:
    budget = replay(LIFE[:3])
    before = (budget, dict(budget.jobs), budget.jobs[JOB])
    with pytest.raises(LedgerError):
        budget.apply(started(7))
    after = budget.apply(stored(2))
    assert (budget, dict(budget.jobs), budget.jobs[JOB]) == before
    assert after != budget


def test_an_empty_log_has_no_opening() -> None:
    with pytest.raises(LedgerError, match="the log is empty"):
        _ = Budget().opened


def test_an_operator_may_set_the_clock_back() -> None:
    budget = replay([opened(at=9), ClockSet(at=3), Padding(at=4)])
    assert budget.clock == 4
    with pytest.raises(LedgerError, match="time is before"):
        budget.apply(Padding(at=3))


def test_refusals_and_withdrawals_cost_nothing() -> None:
    refusal = Refused(at=0, job=OTHER, code="declined", rule="budget")
    gone = Withdrawn(at=0, patient="2" * 64)
    budget = replay([*LIFE[:3], refusal, gone, Padding(at=0)])
    assert budget.committed_rdp(COHORT) == replay(LIFE[:3]).committed_rdp(COHORT)
    assert budget.withdrawn == {"2" * 64}
    assert budget.status(OTHER) == "unknown"


def test_entries_come_back_from_their_json() -> None:
    for life in (LIFE, SUMMED):
        leaves = [Leaf(entry=entry, salt="3" * 64) for entry in life]
        again = [Leaf.model_validate_json(leaf.content()) for leaf in leaves]
        assert again == leaves
        assert replay(leaf.entry for leaf in again) == replay(life)


def job(**privacy: Any) -> JobSpec:
    training = TrainingSpec(local_steps=7)
    return JobSpec(rounds=4, training=training, privacy=PrivacySpec(**privacy))


def test_a_jobs_phases_come_from_its_privacy() -> None:
    values = {"sampling_rate": 0.2, "noise_multiplier": 1.5, "spare_rounds": 2}
    train = Release(sampling_rate=0.2, noise_multiplier=1.5, steps=7)
    score = Release(sampling_rate=1.0, noise_multiplier=8.0, steps=1)
    last = EvaluationSpec(rounds="last", noise_multiplier=8.0)
    phases = phases_of(job(**values, evaluation=last))
    assert phases == {"train": (train, 6), "evaluate": (score, 3)}
    always = EvaluationSpec(rounds="all", noise_multiplier=None)
    bare = Release(sampling_rate=1.0, noise_multiplier=None, steps=1)
    assert phases_of(job(**values, evaluation=always))["evaluate"] == (bare, 6)
    never = EvaluationSpec(rounds="none")
    assert phases_of(job(**values, evaluation=never)) == {"train": (train, 6)}


def test_a_job_without_privacy_has_no_phases() -> None:
    with pytest.raises(JobRefused, match="declares no privacy") as refused:
        phases_of(JobSpec())
    assert (refused.value.code, refused.value.rule) == ("privacy-missing", "privacy-missing")


def test_memberships_are_the_distinct_sets_of_cohorts() -> None:
    cohorts = {"x": {"ann", "bob", "cid"}, "y": {"bob", "cid", "dan"}, "z": {"bob"}, "empty": set()}
    expected = {frozenset("x"), frozenset("xyz"), frozenset("xy"), frozenset("y")}
    assert memberships(cohorts) == expected
    assert memberships(cohorts, {"ann", "dan", "eve"}) == {frozenset("x"), frozenset("y")}
    assert memberships({}) == memberships(cohorts, ()) == set()


# Any mixture of jobs, each admitted only if its cohorts can pay, in any order of events.

PATIENTS = range(6)
Event = tuple[str, int, frozenset[int], float, int]
events: st.SearchStrategy[list[Event]] = st.lists(
    st.tuples(
        st.sampled_from(["admit", "admit", "start", "start", "start", "store", "close"]),
        st.integers(0, 5),
        st.frozensets(st.sampled_from(PATIENTS), min_size=1),
        st.sampled_from([0.7, 1.0, 2.0, 6.0]),
        st.integers(1, 6),
    ),
    max_size=40,
)


class Site:
    """Plays events on the rules alone, with the admission that a ledger makes."""

    def __init__(self) -> None:
        self.budget = replay([opened()])
        self.limit = rdp_limit(8.0, 1e-5, ORDER)
        self.members: dict[str, frozenset[int]] = {}
        self.really_started: dict[int, float] = dict.fromkeys(PATIENTS, 0.0)

    def price(self, patient: int, budget: Budget | None = None) -> float:
        mine = [cohort for cohort, members in self.members.items() if patient in members]
        return patient_rdp(budget or self.budget, mine)

    def play(self, event: Event) -> None:
        what, number, patients, sigma, starts = event
        name = f"{number:064x}"
        actions: dict[str, Callable[[], Iterator[Entry]]] = {
            "admit": lambda: self._admission(name, patients, sigma, starts),
            "start": lambda: self._start(name),
            "store": lambda: self._store(name),
            "close": lambda: iter([closed(self.budget.jobs[name].next_sequence, name)]),
        }
        if what != "admit" and self.budget.status(name) != "open":
            return
        for entry in actions[what]():
            self.budget = self.budget.apply(entry)

    def _admission(
        self, name: str, patients: frozenset[int], sigma: float, starts: int
    ) -> Iterator[Entry]:
        if self.budget.status(name) != "unknown":
            return
        cohort = f"{sum(1 << patient for patient in patients):064x}"
        self.members[cohort] = patients
        release = Release(sampling_rate=0.3, noise_multiplier=sigma, steps=20)
        phases = {"train": Reservation(cohort=cohort, release=release, starts=starts)}
        entry = admitted(name).model_copy(update={"phases": phases})
        after = self.budget.apply(entry)
        if all(self.price(patient, after) <= self.limit for patient in patients):
            yield entry

    def _start(self, name: str) -> Iterator[Entry]:
        state = self.budget.jobs[name]
        if state.left("train"):
            attempt = state.attempts.get(("train", 1), 0) + 1
            if ("train", 1) not in state.stored:
                reservation = state.admitted.phases["train"]
                for patient in self.members[reservation.cohort]:
                    self.really_started[patient] += rdp(reservation.release, ORDER)
                yield started(state.next_sequence, attempt=attempt, job=name)

    def _store(self, name: str) -> Iterator[Entry]:
        state = self.budget.jobs[name]
        attempts = state.attempts.get(("train", 1), 0)
        if attempts and ("train", 1) not in state.stored:
            yield stored(state.next_sequence, attempt=attempts, job=name)


@given(events)
@settings(max_examples=60)
def test_no_patient_ever_exceeds_the_budget_and_no_start_is_forgotten(events: list[Event]) -> None:
    site = Site()
    for event in events:
        before = {patient: site.price(patient) for patient in PATIENTS}
        site.play(event)
        for patient in PATIENTS:
            price = site.price(patient)
            assert price <= site.limit
            assert epsilon_from_rdp(price, ORDER, 1e-5) <= 8.0
            assert price >= site.really_started[patient] * (1 - 1e-12)
            if event[0] in ("start", "store"):
                assert price == before[patient]
            elif event[0] == "close":
                assert price <= before[patient]


@given(events)
@settings(max_examples=30)
def test_closing_everything_leaves_exactly_what_was_started(events: list[Event]) -> None:
    site = Site()
    for event in events:
        site.play(event)
    for number in range(6):
        site.play(("close", number, frozenset([0]), 1.0, 1))
    for patient in PATIENTS:
        assert site.price(patient) == pytest.approx(site.really_started[patient], rel=1e-12)


def test_the_property_test_does_fill_budgets() -> None:
    """Positive control: without the admission rule the same events exceed the limit."""
    site = Site()
    site.limit = float("inf")
    for number in range(6):
        site.play(("admit", number, frozenset([0]), 0.7, 6))
    assert site.price(0) > rdp_limit(8.0, 1e-5, ORDER)
