"""GPUs are lent to one task at a time, and only as many as there are."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fedcmr_client.gpus import Gpus, gpus_of
from fedcmr_client.site_home import SiteHome
from fedcmr_shared.errors import ConfigurationError


@pytest.mark.parametrize(("names", "per_task"), [("012", 1), ("0123", 2), ("01234", 2), ("0", 1)])
def test_no_gpu_is_lent_twice_and_all_are_used(names: str, per_task: int) -> None:
    gpus = Gpus(names, per_task)
    at_once = len(names) // per_task
    together, guard, used = threading.Barrier(at_once), threading.Lock(), set[str]()

    def task(_: int) -> None:
        with gpus.lent() as lent:
            assert len(set(lent)) == per_task
            with guard:
                assert not used & set(lent)
                used.update(lent)
            together.wait(30)  # as many as fit are inside at once
            with guard:
                used.difference_update(lent)

    with ThreadPoolExecutor(3 * at_once) as pool:
        list(pool.map(task, range(6 * at_once)))
    assert not used


def test_a_task_that_fails_gives_its_gpus_back() -> None:
    gpus = Gpus("01", 2)
    with pytest.raises(ValueError, match="broken"), gpus.lent():
        raise ValueError("broken")
    with gpus.lent() as lent:
        assert lent == ("0", "1")


@pytest.mark.parametrize(
    ("names", "per_task", "problem"), [("0", 2, "asks for 2 GPUs"), ("00", 1, "once")]
)
def test_gpus_that_cannot_do_are_refused(names: str, per_task: int, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        Gpus(names, per_task)


@pytest.fixture
def cuda(make_home: Callable[..., SiteHome], monkeypatch: pytest.MonkeyPatch) -> SiteHome:
    """A site whose policy says cuda, on a machine that claims four GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return make_home(device="cuda")


def test_all_visible_gpus_or_the_chosen_ones(
    cuda: SiteHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    def names(chosen: tuple[int, ...] | None) -> tuple[str, ...]:
        gpus = gpus_of(cuda.policy, chosen)
        assert gpus is not None
        return gpus.names

    assert names(None) == ("0", "1", "2", "3")
    assert names((1, 3)) == ("1", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5f,GPU-a0")
    assert names(None) == ("GPU-5f", "GPU-a0")


def test_a_policy_without_cuda_uses_none(cuda: SiteHome) -> None:
    policy = cuda.policy.model_copy(update={"device": "cpu"})
    assert gpus_of(policy, (0,)) is None


def test_cuda_without_a_gpu_is_named(cuda: SiteHome, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigurationError, match="finds no GPU"):
        gpus_of(cuda.policy, None)
