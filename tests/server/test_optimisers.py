"""Laws of averaging and of the server optimisers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedcmr_server.optimisers import ServerOptimiser, weighted_mean
from fedcmr_shared.errors import FederationError
from fedcmr_shared.schemas.job import ServerOptimiserSpec

NAMES = ("fedavg", "fedavgm", "fedadam", "fedyogi")


def update(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(3, 2, generator=generator), "b": torch.randn((), generator=generator)}


@settings(max_examples=25)
@given(
    seeds=st.lists(st.integers(0, 2**31), min_size=1, max_size=6, unique=True),
    weights=st.lists(st.sampled_from([1.0, 2.0, 4.0]), min_size=6, max_size=6),
    order=st.randoms(use_true_random=False),
)
def test_weighted_mean_is_exact_and_independent_of_order(
    seeds: list[int], weights: list[float], order: object
) -> None:
    updates = {f"site-{seed}": update(seed) for seed in seeds}
    by_site = dict(zip(sorted(updates), weights, strict=False))
    shuffled = list(updates)
    order.shuffle(shuffled)  # type: ignore[attr-defined]  # hypothesis gives a random.Random
    mean = weighted_mean(updates, by_site)
    again = weighted_mean({site: updates[site] for site in shuffled}, by_site)
    total = sum(by_site.values())
    for name in ("a", "b"):
        direct = torch.stack([updates[s][name].double() * by_site[s] for s in by_site]).sum(0)
        torch.testing.assert_close(mean[name], direct / total, rtol=1e-12, atol=1e-12)
        assert torch.equal(mean[name], again[name])


def test_equal_updates_average_to_themselves() -> None:
    mean = weighted_mean({"x": update(1), "y": update(1)}, {"x": 1.0, "y": 4.0})
    torch.testing.assert_close(mean["a"].float(), update(1)["a"])


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        ({}, "no updates"),
        ({"x": {"a": torch.ones(2)}, "y": {"b": torch.ones(2)}}, "other parameters"),
        ({"x": {"a": torch.ones(2)}, "y": {"a": torch.ones(3)}}, "shape"),
        ({"x": {"a": torch.tensor([1.0, float("nan")])}}, "not finite in a"),
    ],
)
def test_bad_updates_are_refused(updates: dict[str, dict[str, Tensor]], message: str) -> None:
    with pytest.raises(FederationError, match=message):
        weighted_mean(updates, dict.fromkeys(updates, 1.0))


def test_fedavg_adds_the_mean_update() -> None:
    start = update(0)
    optimiser = ServerOptimiser(ServerOptimiserSpec(), start)
    optimiser.apply(update(1))
    torch.testing.assert_close(optimiser.parameters["a"], start["a"] + update(1)["a"])


def test_fedavgm_accumulates_momentum() -> None:
    spec = ServerOptimiserSpec(name="fedavgm", momentum=0.5)
    optimiser = ServerOptimiser(spec, {"a": torch.zeros(2)})
    for _ in range(2):
        optimiser.apply({"a": torch.ones(2)})
    torch.testing.assert_close(optimiser.parameters["a"], torch.full((2,), 1 + 1.5))


def test_fedyogi_follows_algorithm_2_of_reddi_et_al() -> None:
    spec = ServerOptimiserSpec(name="fedyogi", learning_rate=0.1, momentum=0.9, beta2=0.99)
    optimiser = ServerOptimiser(spec, {"a": torch.zeros(4)})
    x = torch.zeros(4)
    m, v = torch.zeros(4), torch.full((4,), spec.tau**2)
    for seed in range(5):
        delta = torch.randn(4, generator=torch.Generator().manual_seed(seed))
        optimiser.apply({"a": delta})
        m = 0.9 * m + 0.1 * delta
        v = v - 0.01 * delta**2 * torch.sign(v - delta**2)
        x = x + 0.1 * m / (v.sqrt() + spec.tau)
    torch.testing.assert_close(optimiser.parameters["a"], x)


@pytest.mark.parametrize("name", NAMES)
def test_restored_optimiser_continues_as_if_never_stopped(name: str) -> None:
    spec = ServerOptimiserSpec(name=name, learning_rate=0.3)  # type: ignore[arg-type]
    # the parametrised string is one of the literals
    whole = ServerOptimiser(spec, update(0))
    for seed in (1, 2, 3, 4):
        whole.apply(update(seed))

    first = ServerOptimiser(spec, update(0))
    for seed in (1, 2):
        first.apply(update(seed))
    second = ServerOptimiser(spec, first.parameters)
    second.restore(first.state())
    for seed in (3, 4):
        second.apply(update(seed))
    for key, value in whole.parameters.items():
        assert torch.equal(value, second.parameters[key]), name


@pytest.mark.parametrize("name", NAMES)
def test_every_optimiser_moves_along_a_constant_update(name: str) -> None:
    spec = ServerOptimiserSpec(name=name, learning_rate=0.1)  # type: ignore[arg-type]
    # the parametrised string is one of the literals
    optimiser = ServerOptimiser(spec, {"a": torch.zeros(3)})
    direction = torch.tensor([1.0, -2.0, 0.5])
    for _ in range(5):
        optimiser.apply({"a": direction})
    assert torch.equal(optimiser.parameters["a"].sign(), direction.sign())


def test_foreign_layouts_are_refused() -> None:
    optimiser = ServerOptimiser(ServerOptimiserSpec(name="fedadam"), update(0))
    with pytest.raises(FederationError, match="other parameters"):
        optimiser.apply({"a": torch.ones(3, 2)})
    with pytest.raises(FederationError, match="unknown parameter"):
        optimiser.restore({"c/exp_avg": torch.ones(2)})
