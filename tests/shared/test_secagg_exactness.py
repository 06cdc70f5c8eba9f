"""The opened sum is the exact sum over the survivors, whoever drops out when, or nothing opens."""

from __future__ import annotations

import random
from itertools import chain, pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from secagg_parties import BOUND, draw_values, record, total, whole_numbers

from fedcmr_shared.errors import FederationError
from fedcmr_shared.secagg.encoding import WORD_BITS, Encoding, Segment
from fedcmr_shared.secagg.messages import STEPS, Step
from fedcmr_shared.secagg.server import TooFewSites
from fedcmr_simulations.rehearsal import (
    Lost,
    Schedule,
    Setting,
    draw_sites,
    foreseen,
    new_setting,
    random_schedule,
    rehearse,
)

SCHEDULES = {3: 200, 4: 250, 5: 250, 10: 100, 25: 10, 50: 3}
"""Drawn schedules for each number of sites; more than 800 in all."""

WAYS: tuple[Lost, ...] = ("question", "answer")
SITES = {count: draw_sites(count) for count in SCHEDULES}


def setting_of(count: int) -> Setting:
    return new_setting(SITES[count], whole_numbers(count))


def require_exact_or_nothing(setting: Setting, schedule: Schedule) -> None:
    sites, drawn = SITES[len(setting.roster.sites)], draw_values(setting)
    outcome = foreseen(setting, schedule)
    if isinstance(outcome, str):
        with pytest.raises(TooFewSites) as caught:
            rehearse(setting, sites, drawn, schedule)
        assert caught.value.step == outcome
    else:
        opened = rehearse(setting, sites, drawn, schedule)
        assert opened.survivors == outcome
        assert opened.weight == len(outcome)
        assert torch.equal(opened.sums["x"], total(drawn, outcome))


@st.composite
def schedules(draw: st.DrawFn, setting: Setting) -> Schedule:
    """Lose messages in any steps: at most one site more than a step can do without."""
    roster = setting.roster
    names = st.lists(
        st.sampled_from(roster.names),
        max_size=len(roster.names) - roster.threshold + 1,
        unique=True,
    )
    steps = draw(st.sets(st.sampled_from(STEPS)))
    lost = [(name, step) for step in sorted(steps) for name in draw(names)]
    return {place: draw(st.sampled_from(WAYS)) for place in lost}


def test_more_than_800_schedules_are_drawn() -> None:
    assert sum(SCHEDULES.values()) > 800


@pytest.mark.parametrize("count", SCHEDULES)
def test_every_drawn_schedule_opens_the_exact_sum_or_nothing(count: int) -> None:
    setting, runs = setting_of(count), []

    @settings(
        max_examples=SCHEDULES[count],
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(schedules(setting))
    def run(schedule: Schedule) -> None:
        runs.append(schedule)
        require_exact_or_nothing(setting, schedule)

    run()
    assert len(runs) >= SCHEDULES[count]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("count", [3, 4, 5, 10])
def test_each_step_can_do_without_all_but_the_threshold(count: int, step: Step, way: Lost) -> None:
    setting = setting_of(count)
    spare = count - setting.roster.threshold
    for lost in (spare, spare + 1):
        schedule = {(name, step): way for name in setting.roster.names[:lost]}
        outcome = foreseen(setting, schedule)
        assert (outcome == step) == (lost > spare)
        require_exact_or_nothing(setting, schedule)


@pytest.mark.parametrize("steps", list(pairwise(STEPS)), ids="-".join)
def test_a_site_may_be_lost_in_each_of_two_steps(steps: tuple[Step, Step]) -> None:
    setting = setting_of(5)
    spare = setting.roster.names[-1]
    both: Schedule = {(spare, steps[0]): "answer", (spare, steps[1]): "question"}
    two: Schedule = {("site-001", steps[0]): "answer", ("site-002", steps[1]): "question"}
    assert isinstance(foreseen(setting, both), tuple)
    for schedule in (both, two):
        require_exact_or_nothing(setting, schedule)


def test_schedules_for_large_numbers_of_runs_are_of_all_kinds() -> None:
    """`random_schedule`, of which the benchmark runs 10,000."""
    setting, source = setting_of(4), random.Random(0)
    drawn = [random_schedule(setting.roster.names, source) for _ in range(60)]
    outcomes = {foreseen(setting, schedule) for schedule in drawn}
    assert set(chain.from_iterable(schedule.values() for schedule in drawn)) == set(WAYS)
    assert {outcome for outcome in outcomes if isinstance(outcome, str)} == set(STEPS)
    assert setting.roster.names in outcomes
    for schedule in drawn:
        require_exact_or_nothing(setting, schedule)


@pytest.mark.parametrize("post_quantum", [False, True], ids=["classical", "post-quantum"])
@pytest.mark.parametrize("word_bits", WORD_BITS)
@pytest.mark.parametrize("lost", [(), ("site-001",), ("site-003",), ("site-005",)])
def test_words_of_every_size_add_up(
    word_bits: int, post_quantum: bool, lost: tuple[str, ...]
) -> None:
    """Odd sizes over several tensors, whole and real numbers, weights 1, 2 and 4."""
    sites = SITES[5]
    weights = dict(zip(sites, (1, 2, 4, 1, 2), strict=True))
    segments = (
        Segment("whole", (3, 5), BOUND, integer=True),
        Segment("real", (2, 7), 1.5),
        Segment("empty", (0,), 1.0),
        Segment("number", (), 1.0),
    )
    encoding = Encoding(segments, word_bits, sum(weights.values()))
    setting = new_setting(sites, encoding, weights, post_quantum=post_quantum)
    values = {
        site: {
            "whole": torch.randint(-BOUND, BOUND + 1, (3, 5)),
            "real": 3 * torch.rand(2, 7) - 1.5,
            "empty": torch.empty(0),
            "number": torch.rand(()),
        }
        for site in sites
    }
    opened = rehearse(setting, sites, values, {(name, "update"): "answer" for name in lost})
    left = [site for site in sites if site not in lost]
    assert opened.weight == sum(weights[site] for site in left)
    for segment in segments:
        exact = sum(weights[site] * values[site][segment.name].double() for site in left)
        error = (opened.sums[segment.name] - exact).abs()
        assert (error <= encoding.error_bound(segment, opened.weight)).all()
    assert opened.sums["whole"].dtype == torch.int64


def test_ten_million_words_add_up() -> None:
    size = 10**7
    setting = new_setting(SITES[3], whole_numbers(3, size))
    values = draw_values(setting)
    opened = rehearse(setting, SITES[3], values, {})
    assert torch.equal(opened.sums["x"], total(values, setting.roster.names))


def test_shares_that_come_late_still_open_the_sum() -> None:
    """After a first request with too few answers, the second one has them all."""
    said = record(4, lost=[2])
    server = said.server(before="unmask")
    first, *others = said.unmaskings.values()
    for answers in ([], [first], [first, others[0]]):
        with pytest.raises(TooFewSites):
            server.open(answers)
    assert set(server.losses) == {"site-002", "site-004"}
    opened = server.open([first, *others])
    assert torch.equal(opened.sums["x"], total(said.values, said.survivors))
    assert set(server.losses) == {"site-002"}


def test_a_mask_that_is_left_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positive control: were a mask left in a sum, these tests would fail."""
    monkeypatch.setattr("fedcmr_shared.secagg.server.Aggregation._removed", lambda *_: [])
    with pytest.raises(FederationError, match="masks remain"):
        require_exact_or_nothing(setting_of(4), {("site-001", "update"): "answer"})
