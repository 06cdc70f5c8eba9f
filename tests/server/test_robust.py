"""Robust rules against hand computations, and what a bad update does to each of them."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedcmr_server.robust import MeanUpdate, combine, euclidean_norm, require_enough, screen
from fedcmr_shared.errors import FederationError
from fedcmr_shared.schemas.job import RobustRule

RULES: tuple[RobustRule, ...] = ("mean", "median", "trimmed-mean", "krum")
ROBUST = RULES[1:]


def update(*values: float, weight: int = 1) -> MeanUpdate:
    """An update of two tensors, the last value a scalar."""
    return MeanUpdate({"a": torch.tensor(values[:-1]), "b": torch.tensor(values[-1])}, weight)


def updates(*rows: tuple[float, ...]) -> dict[str, MeanUpdate]:
    return {f"site-{number}": update(*row) for number, row in enumerate(rows)}


def values(combined: Mapping[str, Tensor]) -> list[float]:
    return [*combined["a"].tolist(), combined["b"].item()]


FIVE = updates((1, 9, 0), (2, 7, 0), (4, 5, 1), (8, 3, 1), (100, -50, 1))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("mean", [23.0, -5.2, 0.6]),
        ("median", [4.0, 5.0, 1.0]),
        ("trimmed-mean", [(2 + 4 + 8) / 3, (7 + 5 + 3) / 3, 2 / 3]),
        # f = 1: squared distances to the 2 nearest are 5 + 26, 5 + 9, 9 + 20, 20 + 53 and far.
        ("krum", [2.0, 7.0, 0.0]),
    ],
)
def test_rules_agree_with_hand_computation(rule: RobustRule, expected: list[float]) -> None:
    combined = combine(rule, FIVE)
    assert values(combined) == pytest.approx(expected, abs=1e-6)
    assert {name: tuple(tensor.shape) for name, tensor in combined.items()} == {"a": (2,), "b": ()}
    assert all(tensor.dtype == torch.float64 for tensor in combined.values())


def test_mean_is_weighted_and_the_other_rules_are_not() -> None:
    light = updates((0, 0, 0), (1, 1, 1), (5, 5, 5))
    heavy = {**light, "site-2": update(5, 5, 5, weight=4)}
    assert values(combine("mean", heavy)) == pytest.approx([21 / 6] * 3)
    for rule in ROBUST:
        assert values(combine(rule, heavy)) == values(combine(rule, light)), rule


@pytest.mark.parametrize("count", [3, 4])
def test_the_trimmed_mean_of_few_updates_trims_one_at_each_end(count: int) -> None:
    rows = [(float(value), 0.0, 0.0) for value in (1, 2, 3, 1000)[4 - count :]]
    middle = {3: 3.0, 4: 2.5}[count]
    assert values(combine("trimmed-mean", updates(*rows)))[0] == pytest.approx(middle)


@given(st.integers(3, 100))
def test_the_trimmed_mean_leaves_out_a_fifth_at_each_end(count: int) -> None:
    rows = [(float(number), 0.0, 0.0) for number in range(count)]
    rows[-1] = (1e9, 0.0, 0.0)
    cut = max(1, count // 5)
    expected = np.mean(np.arange(count)[cut : count - cut])
    assert values(combine("trimmed-mean", updates(*rows)))[0] == pytest.approx(expected)


@pytest.mark.parametrize("rule", RULES)
def test_one_poisoned_update_drags_the_mean_alone(rule: RobustRule) -> None:
    honest = [(1.0, 2.0, 3.0), (1.1, 2.1, 3.1), (0.9, 1.9, 2.9), (1.0, 2.1, 3.0)]
    combined = np.array(values(combine(rule, updates(*honest, (1e6, -1e6, 1e6)))))
    spread = np.array(honest)
    within = ((combined >= spread.min(0) - 1e-6) & (combined <= spread.max(0) + 1e-6)).all()
    assert within == (rule != "mean")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_equal_updates_combine_to_themselves(rule: RobustRule, count: int) -> None:
    combined = combine(rule, updates(*[(1.0, -2.0, 0.5)] * count))
    assert values(combined) == pytest.approx([1.0, -2.0, 0.5])


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_arrival_does_not_matter(rule: RobustRule) -> None:
    forth, back = combine(rule, FIVE), combine(rule, dict(reversed(FIVE.items())))
    assert all(torch.equal(forth[name], back[name]) for name in forth)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (update(1.0, float("nan"), 1.0), "the update of site-9 is not finite in a"),
        (update(1.0, float("inf"), 1.0), "the update of site-9 is not finite in a"),
        (update(1.0, 2.0, 3.0, 1.0), "the update of site-9 has shape"),
        (MeanUpdate({"a": torch.ones(2)}, 1), "other parameters"),
    ],
)
def test_a_wrong_update_is_named(rule: RobustRule, odd: MeanUpdate, message: str) -> None:
    with pytest.raises(FederationError, match=message):
        combine(rule, {**FIVE, "site-9": odd})
    with pytest.raises(FederationError, match="no updates"):
        combine(rule, {})


@pytest.mark.parametrize("rule", RULES)
def test_too_few_updates_for_a_rule_are_refused(rule: RobustRule) -> None:
    least = 1 if rule == "mean" else 3
    require_enough(rule, least)
    with pytest.raises(FederationError, match=f"robust {rule} needs at least {least}"):
        require_enough(rule, least - 1)


def test_the_norm_is_that_of_all_tensors_together() -> None:
    assert euclidean_norm(update(2.0, 3.0, 6.0).delta) == pytest.approx(7.0)
    assert euclidean_norm({}) == 0.0


def test_updates_of_large_norm_are_left_out() -> None:
    found = {"a": update(3, 4, 0), "b": update(3, 4, 1e-3), "c": update(float("nan"), 0, 0)}
    kept, left_out = screen(found, 5.0)
    assert (set(kept), left_out) == ({"a"}, ("b", "c"))
    assert screen(found, 4.9) == ({}, ("a", "b", "c"))
    assert screen(found, None) == (found, ())  # nothing is screened
