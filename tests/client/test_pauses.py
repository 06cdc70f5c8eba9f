"""A pause and quiet hours delay training; they change nothing in it."""

import hashlib
import os
import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcmr_client import pauses, private_trainer
from fedcmr_client.job_records import job_records
from fedcmr_client.pauses import PauseSwitch, held_by, wait_while_held
from fedcmr_client.private_round import train_round
from fedcmr_client.site_home import SiteHome
from fedcmr_client.task_model import task_model
from fedcmr_client.usage import Usage
from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.federation.messages import Task
from fedcmr_shared.models.registry import build_model
from fedcmr_shared.privacy import step as step_module
from fedcmr_shared.schemas.job import JobSpec, ModelSpec, SamplingSpec, TrainingSpec
from fedcmr_shared.schemas.privacy import PrivacySpec

STEPS = 3
JOB = JobSpec(
    rounds=1,
    model=ModelSpec(text_encoder="hashed"),
    sampling=SamplingSpec(accelerations=(4,), acs_lines=8),
    training=TrainingSpec(local_steps=STEPS, part="adapters", warmup_steps=0),
    privacy=PrivacySpec(cohort_size=10, sampling_rate=0.5, noise_multiplier=1.0, clip_norm=0.1),
)


@pytest.fixture
def home(make_home: Callable[..., SiteHome]) -> SiteHome:
    return make_home()


class Clock:
    """Time that passes while somebody sleeps; ``on_sleep`` is called each time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.on_sleep: Callable[[], None] = lambda: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.on_sleep()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pauses, "time", clock)
    return clock


@pytest.fixture
def known_entropy(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function that begins the same stream of "random" bytes anew."""
    count = 0

    def urandom(size: int) -> bytes:
        nonlocal count
        count += 1
        return hashlib.shake_256(str(count).encode()).digest(size)

    def begin() -> None:
        nonlocal count
        count = 0
        monkeypatch.setattr(os, "urandom", urandom)

    return begin


def train(home: SiteHome) -> dict[str, Tensor]:
    torch.manual_seed(0)
    state = {name: tensor.clone() for name, tensor in build_model(JOB.model).state_dict().items()}
    task = Task(JOB, 1, state)
    with home.open_store() as store:
        records = job_records(store, JOB, home.policy, "train")
    return train_round(task, task_model(task), records, home)


def test_the_update_is_the_same_with_and_without_a_pause(
    home: SiteHome,
    clock: Clock,
    known_entropy: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Paused after the first step, resumed after five looks; the steps in between wait."""
    known_entropy()
    expected = train(home)
    assert any(bool(delta.any()) for delta in expected.values())

    steps: list[float] = []  # when each began
    sleeps = 0
    step = step_module.private_gradient

    def watched(*arguments: Any, **options: Any) -> Any:
        steps.append(clock.now)
        result = step(*arguments, **options)
        if len(steps) == 1:
            home.pause.pause("maintenance")
        return result

    def look() -> None:
        nonlocal sleeps
        sleeps += 1
        if sleeps == 5:
            home.pause.resume()

    monkeypatch.setattr(private_trainer, "private_gradient", watched)
    clock.on_sleep = look
    known_entropy()
    found = train(home)
    waited = 5 * pauses.POLL_S
    assert steps == [0.0, waited, waited]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # What the agent then counts as the round's time holds the wait, which this takes back.
    assert Usage(home.policy, home.policy.ledger.folder).seconds(JOB) == -waited


def test_other_entropy_gives_another_update(
    home: SiteHome, known_entropy: Callable[[], None]
) -> None:
    """Or the test above would show nothing."""
    known_entropy()
    first = train(home)
    second = train(home)  # the stream goes on
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_a_pause_before_the_first_step_holds_that_too(
    home: SiteHome, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded_at: list[float] = []

    def load(self: object, patient: str) -> list[Any]:
        loaded_at.append(clock.now)
        return []

    monkeypatch.setattr(private_trainer.PrivateTrainer, "_load", load)
    monkeypatch.setattr(private_trainer, "private_gradient", _everybody)

    def resume() -> None:
        home.pause.resume()

    clock.on_sleep = resume
    home.pause.pause()
    train(home)
    assert loaded_at
    assert min(loaded_at) == pauses.POLL_S


def _everybody(
    engine: Any, cohort: Any, load: Any, mechanism: Any, rate: float, **more: Any
) -> Any:
    return step_module.private_gradient(engine, cohort, load, mechanism, 1.0, **more)


class TestHeldBy:
    def test_by_nobody_by_the_operator_and_by_quiet_hours(
        self, make_home: Callable[..., SiteHome]
    ) -> None:
        home = make_home(quiet_hours=["22:00-06:00"])
        night, noon = datetime(2027, 1, 1, 23), datetime(2027, 1, 1, 12)
        assert held_by(home, noon) is None
        assert held_by(home, night) == "quiet hours"
        home.pause.pause("scanner upgrade")
        assert held_by(home, noon) == "paused by the operator (scanner upgrade)"
        home.pause.resume()
        assert held_by(home, noon) is None

    def test_training_waits_through_quiet_hours(
        self, home: SiteHome, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            type(home.policy), "is_quiet", lambda self, at: clock.now < 3 * pauses.POLL_S
        )
        assert wait_while_held(home) == 3 * pauses.POLL_S


class TestSwitch:
    @pytest.fixture
    def switch(self, tmp_path: Path) -> PauseSwitch:
        return PauseSwitch(tmp_path / "ledger" / "paused.json")

    def test_is_off_on_and_off_again(self, switch: PauseSwitch) -> None:
        assert (switch.on, switch.read(), switch.resume()) == (False, None, False)
        pause = switch.pause("moving")
        assert switch.on
        found = PauseSwitch(switch.path).read()
        assert found is not None
        assert found.reason == "moving"
        assert abs((found.since - pause.since).total_seconds()) < 1
        assert (switch.resume(), switch.on) == (True, False)

    def test_a_second_pause_keeps_the_first(self, switch: PauseSwitch) -> None:
        switch.pause("moving")
        assert switch.pause("later").reason == "moving"

    def test_a_damaged_file_is_a_pause(self, switch: PauseSwitch) -> None:
        switch.pause()
        switch.path.write_text("{")
        found = switch.read()
        assert switch.on
        assert found is not None
        assert "cannot be read" in str(found.reason)

    def test_a_disk_that_does_not_obey_is_named(
        self, switch: PauseSwitch, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(path: Path, content: bytes) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(pauses, "write_durably", full)
        with pytest.raises(ConfigurationError, match=r"paused\.json: cannot be written: No space"):
            switch.pause()
        switch.path.mkdir()
        assert switch.on
        with pytest.raises(ConfigurationError, match=r"paused\.json: cannot be removed"):
            switch.resume()


class _Pair:
    """Two ranks that are threads of this process."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=30)
        self.value: Tensor | None = None

    def rank(self, index: int) -> Any:
        pair = self

        class Rank:
            count = 2

            def __init__(self) -> None:
                self.index = index

            def add_up(self, tensor: Tensor) -> None:
                raise AssertionError("nothing is added up while waiting")

            def spread(self, tensor: Tensor) -> None:
                if index == 0:
                    pair.value = tensor.clone()
                pair.barrier.wait()
                assert pair.value is not None
                tensor.copy_(pair.value)
                pair.barrier.wait()

        return Rank()


def test_all_ranks_wait_and_go_on_together(home: SiteHome) -> None:
    """Rank 1 never looks at the file itself: the ranks would part at the edge of a pause."""
    pair, looks = _Pair(), 0

    class Counting(PauseSwitch):
        def read(self) -> Any:
            nonlocal looks
            looks += 1
            if looks == 4:
                self.resume()
            return super().read()

    class Home:
        policy = home.policy
        pause = Counting(home.pause.path)

    home.pause.pause()
    waited: dict[int, float] = {}

    def wait(index: int) -> None:
        waited[index] = wait_while_held(Home(), pair.rank(index), poll_s=0.001)  # type: ignore[arg-type]

    threads = [threading.Thread(target=wait, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert set(waited) == {0, 1}
    assert all(seconds > 0 for seconds in waited.values())
    assert looks == 4
