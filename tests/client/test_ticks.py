"""Replies leave at multiples of the tick, whenever the work was done."""

import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcmr_client.ticks import hold_until_tick, next_tick
from fedcmr_shared.errors import ConfigurationError

instants = st.floats(0, 4e9)
tick_lengths = st.sampled_from([0.05, 0.1, 1.0, 7.5, 60.0, 3600.0])


@settings(max_examples=300)
@given(instants, tick_lengths)
def test_is_the_first_multiple_that_is_not_past(now: float, tick: float) -> None:
    found = next_tick(now, tick)
    count = round(found / tick)
    assert found == count * tick
    assert found >= now
    assert (count - 1) * tick < now


@settings(max_examples=100)
@given(instants, tick_lengths)
def test_a_tick_is_its_own_next(now: float, tick: float) -> None:
    found = next_tick(now, tick)
    assert next_tick(found, tick) == found


def test_work_of_any_length_within_a_tick_ends_at_the_same_time() -> None:
    assert {next_tick(1_800_000_000 + late, 60.0) for late in (0.001, 17.0, 59.9, 60.0)} == {
        1_800_000_060
    }
    assert next_tick(1_800_000_060.001, 60.0) == 1_800_000_120


@pytest.mark.parametrize("tick", [0.0, -1.0, math.inf, math.nan])
def test_a_tick_must_be_positive(tick: float) -> None:
    with pytest.raises(ConfigurationError, match="the tick is"):
        next_tick(0.0, tick)
    with pytest.raises(ConfigurationError, match="the tick is"):
        hold_until_tick(tick)


def test_holding_ends_at_the_tick() -> None:
    before = time.time()
    tick = hold_until_tick(0.2)
    after = time.time()
    assert tick == next_tick(before, 0.2) or tick == next_tick(before, 0.2) + 0.2
    # The wall clock may be slewed against the one that sleeps, by far less than this.
    assert tick - 0.01 <= after < tick + 1.0
