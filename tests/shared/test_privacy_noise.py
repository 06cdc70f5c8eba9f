"""Noise: the right distribution, never repeated, and out of reach of any seed."""

from __future__ import annotations

import inspect
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from fedcmr_shared.privacy import (
    discrete_noise,
    distributed,
    engines,
    evaluation,
    mechanism,
    noise,
    ranks,
    sampling,
    step,
)
from fedcmr_shared.privacy.mechanism import BackwardEngine, ClippedSum, Mechanism, release
from fedcmr_shared.privacy.noise import gaussian, uniforms, words
from fedcmr_shared.privacy.step import private_gradient

# .4 % of the variance is 5.7 standard errors, so that chance fails no test.
COUNT = 4_000_000


def require_normal(values: np.ndarray, deviation: float) -> None:
    assert values.mean() == pytest.approx(0, abs=6 * deviation / np.sqrt(values.size))
    assert np.mean(values**2) == pytest.approx(deviation**2, rel=0.004)


def test_variance_shape_and_tails() -> None:
    values = gaussian(COUNT)
    require_normal(values, 1.0)
    assert stats.kurtosis(values) == pytest.approx(0, abs=6 * np.sqrt(24 / COUNT))
    assert stats.skew(values) == pytest.approx(0, abs=6 * np.sqrt(6 / COUNT))
    assert stats.kstest(values[:100_000], "norm").pvalue > 1e-7
    beyond_four = int((np.abs(values) > 4).sum())
    assert stats.binomtest(beyond_four, COUNT, 2 * stats.norm.sf(4)).pvalue > 1e-7


@pytest.mark.parametrize("count", [0, 1, 2, 3, 8191, 8193, 16383, 16384, 16385, 32769])
def test_any_count_is_filled(count: int) -> None:
    values = gaussian(count)
    assert values.shape == (count,)
    assert len(np.unique(values)) == count
    assert np.isfinite(values).all()


def test_values_that_share_a_radius_are_independent() -> None:
    """Both results of Box-Muller are used; neither they nor their squares may be correlated."""
    blocks = gaussian(COUNT // 16384 * 16384).reshape(-1, 2, 8192)
    cosine, sine = blocks[:, 0].ravel(), blocks[:, 1].ravel()
    limit = 6 / np.sqrt(cosine.size)
    for power in (1, 2):
        assert abs(np.corrcoef(cosine**power, sine**power)[0, 1]) < limit
        assert abs(np.corrcoef(cosine[1:] ** power, cosine[:-1] ** power)[0, 1]) < limit


def test_a_value_is_the_half_sum_of_four_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = np.random.default_rng(0).uniform(size=(2, 4, 5))
    monkeypatch.setattr(noise._KeyStream, "uniforms", lambda _, count: numbers.ravel())
    radius = np.sqrt(-2 * np.log(numbers[0]))
    angle = 2 * np.pi * numbers[1]
    four = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    np.testing.assert_allclose(gaussian(10), four.sum(0) / 2, rtol=1e-12)


def test_uniform_numbers_have_53_bits_and_are_never_zero() -> None:
    values = uniforms(1_000_000)
    assert values.min() > 0
    assert values.max() <= 1
    steps = values * 2.0**53
    assert (steps == np.floor(steps)).all()
    assert set(np.unique(steps[:10_000] % 2)) == {0, 1}
    assert stats.kstest(values[:100_000], "uniform").pvalue > 1e-7


def test_words_have_64_bits() -> None:
    bits = np.unpackbits(words(100_000).view(np.uint8)).reshape(-1, 64)
    # Six standard errors of a mean of fair coins.
    assert abs(bits.mean(0) - 0.5).max() < 3 / np.sqrt(len(bits))


def test_extreme_words_stay_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    for word in (bytes(8), b"\xff" * 8):
        monkeypatch.setattr(
            noise.Cipher, "encryptor", lambda _, word=word: _Constant(word), raising=True
        )
        assert np.isfinite(gaussian(10)).all()


class _Constant:
    def __init__(self, word: bytes) -> None:
        self.word = word

    def update(self, data: bytes) -> bytes:
        return self.word * (len(data) // 8)


def test_released_noise_has_the_declared_deviation_per_real_component() -> None:
    parameters = [
        nn.Parameter(torch.empty(COUNT)),
        nn.Parameter(torch.empty(COUNT, dtype=torch.complex64)),
    ]
    public = Mechanism(clip_norm=0.5, noise_multiplier=3.0, expected_patients=2.0)
    real, pairs = release(ClippedSum.zero(parameters), public)
    require_normal(real.numpy(), 0.75)
    require_normal(pairs[:, 0].numpy(), 0.75)
    require_normal(pairs[:, 1].numpy(), 0.75)
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 6 / np.sqrt(COUNT)


def step_of(cohort: list[int]) -> np.ndarray:
    weight = nn.Parameter(torch.zeros(COUNT))
    engine = BackwardEngine([weight], lambda examples: weight.sum().expand(len(examples)))
    public = Mechanism(clip_norm=1.0, noise_multiplier=2.0, expected_patients=4.0)
    return private_gradient(engine, cohort, lambda i: [i], public, 1.0).gradients[0].numpy()


def test_noise_is_there_when_nobody_is_drawn_and_new_in_each_step() -> None:
    first, second = step_of([]), step_of([])
    require_normal(first, 0.5)
    require_normal(second, 0.5)
    assert abs(np.corrcoef(first, second)[0, 1]) < 6 / np.sqrt(COUNT)


def test_noise_is_added_once_however_many_are_drawn() -> None:
    values = step_of([0, 1, 2])
    require_normal(values - values.mean(), 0.5)


def test_seeds_change_nothing() -> None:
    found = []
    for _ in range(2):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        draws = (gaussian(4), uniforms(4), words(4), discrete_noise.discrete_gaussian(4, 2.0**60))
        found.append([values.tolist() for values in draws])
    for first, second in zip(*found, strict=True):
        assert first != second


def test_noise_leaves_the_random_states_of_others_alone() -> None:
    before = (random.getstate(), torch.random.get_rng_state())
    gaussian(10)
    assert random.getstate() == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])


def test_fresh_processes_draw_different_noise() -> None:
    code = "from fedcmr_shared.privacy.noise import gaussian; print(gaussian(3).tolist())"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    }
    assert len(outputs) == 2


@pytest.mark.parametrize(
    "module",
    [noise, discrete_noise, distributed, sampling, mechanism, step, ranks, evaluation, engines],
    ids=lambda m: m.__name__,
)
def test_no_public_function_takes_a_seed(module: object) -> None:
    checked = 0
    for name, value in inspect.getmembers(module, callable):
        if name.startswith("_") or not getattr(value, "__module__", "").startswith(
            "fedcmr_shared.privacy"
        ):
            continue
        members = [value, *(f for _, f in inspect.getmembers(value, inspect.isfunction))]
        for member in members:
            names = set(inspect.signature(member).parameters)
            assert not names & {"seed", "generator", "rng", "random_state"}, f"{name}: {names}"
            checked += 1
    assert checked
