"""Steps that several processes share."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from fedcmr_shared.privacy.distributed import NoiseShare
from fedcmr_shared.privacy.mechanism import BackwardEngine, Mechanism
from fedcmr_shared.privacy.ranks import ALONE, joined

_spec = importlib.util.spec_from_file_location(
    "privacy_networks", Path(__file__).with_name("privacy_networks.py")
)
assert _spec is not None
assert _spec.loader is not None
networks: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(networks)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with networks.RankPair(tmp_path_factory.mktemp("ranks")) as running:
        yield running


def test_two_ranks_sum_what_one_does(pair: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    patients = [
        [torch.randn(2, 8, 8, dtype=torch.float64, generator=generator) for _ in range(count)]
        for count in (2, 1, 0, 3, 1)
    ]
    mechanism = Mechanism(clip_norm=0.1, noise_multiplier=1e-30, expected_patients=3.0)
    found = pair.ask(
        "summed", name="Plain", dtype=torch.float64, patients=patients, mechanism=mechanism
    )
    module, parameters, loss_of = networks.network("Plain", torch.float64)
    engine = BackwardEngine(parameters, loss_of(module))
    expected = engine.clipped_sum(patients, mechanism).vector
    for vector in found:
        assert float((vector - expected).norm()) <= 1e-12 * float(expected.norm())


def test_noise_is_added_once_and_all_ranks_get_the_same(pair: Any) -> None:
    count = 1_000_000
    mechanism = Mechanism(clip_norm=2.0, noise_multiplier=3.0, expected_patients=1.0)
    answers = pair.ask("stepped", cohort=0, rate=0.5, coordinates=count, mechanism=mechanism)
    first, second = (gradient for gradient, _, _ in answers)
    assert torch.equal(first, second)
    assert float(first.square().mean()) == pytest.approx(36.0, rel=6 * (2 / count) ** 0.5)


def test_a_share_of_noise_is_added_once_to_the_integers_of_all_ranks(pair: Any) -> None:
    count = 1_000_000
    mechanism = Mechanism(1.0, 1.0, 1.0, levels=2**20)
    share = NoiseShare(variance=2500.0, limit=10**9)
    first, second = pair.ask(
        "shared_integers", cohort=5, coordinates=count, mechanism=mechanism, share=share
    )
    assert first.dtype == torch.int64
    assert torch.equal(first, second)
    # Five patients on two ranks; each value of the gradient is 1 / 1000 of its norm.
    noise = (first - 5 * round(mechanism.grid_scale(count) / 1000)).double()
    assert float(noise.mean()) == pytest.approx(0, abs=6 * 50 / count**0.5)
    assert float(noise.square().mean()) == pytest.approx(2500.0, rel=6 * (2 / count) ** 0.5)


def test_rank_zero_alone_draws_and_each_patient_is_dealt_once(pair: Any) -> None:
    mechanism = Mechanism(clip_norm=1.0, noise_multiplier=1.0, expected_patients=1.0)
    # Rank 1 would fail if it drew patients or noise itself.
    answers = pair.ask("stepped", cohort=1001, rate=0.3, coordinates=1, mechanism=mechanism)
    first, second = (loaded for _, loaded, _ in answers)
    assert not set(first) & set(second)
    assert 0 <= len(first) - len(second) <= 1
    drawn = sorted(first + second)
    assert len(set(drawn)) == len(drawn)
    assert first == drawn[0::2]
    assert stats.binomtest(len(drawn), 1001, 0.3).pvalue > 1e-7
    for _, _, counts in answers:
        assert counts.drawn == len(drawn)
        assert (counts.clipped, counts.non_finite) == (0, 0)


def test_counts_are_those_of_all_ranks(pair: Any) -> None:
    mechanism = Mechanism(clip_norm=1.0, noise_multiplier=1.0, expected_patients=1.0)
    answers = pair.ask("stepped", cohort=7, rate=1.0, coordinates=4, mechanism=mechanism)
    for _, _, counts in answers:
        assert (counts.drawn, counts.clipped, counts.non_finite) == (7, 7, 0)


def test_without_torchrun_a_site_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined(torch.device("cpu")) as ranks:
        assert ranks is ALONE
        assert (ranks.index, ranks.count) == (0, 1)
    assert not torch.distributed.is_initialized()
