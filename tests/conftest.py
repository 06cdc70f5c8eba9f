"""Small sites with smooth random images seen by a few coils, and with policy and ledger."""

import os
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from small_scans import small_store

from fedcmr_client.policy import policy_text
from fedcmr_client.site_home import SiteHome
from fedcmr_client.store.split import SplitFractions
from fedcmr_shared.schemas.policy import SitePolicy

SiteFactory = Callable[..., Path]
HALVES = SplitFractions(0.5, 0.25, 0.25)


# Machines of a busy moment are slow; no law depends on how long an example takes.
settings.register_profile("fedcmr", deadline=None)
settings.load_profile("fedcmr")

LONGEST = {
    "simulations/test_runner.py": 360,
    "system/test_faults.py": 325,
    "system/test_federation.py": 170,
    "system/test_generator_run.py": 110,
    "system/test_real_images.py": 70,
    "server/test_job_run_crash.py": 55,
    "server/test_supervisor.py": 50,
    "system/test_supernode.py": 50,
}
"""Files whose tests take longest, and about how many seconds on two cores."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Deal the longest files to the workers, who begin with them, so that all end together.

    With worksteal each worker gets one stretch of the list, all of about the same length.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    files: dict[str, list[pytest.Item]] = {name: [] for name in LONGEST}
    others: list[pytest.Item] = []
    for item in items:
        files.get("/".join(item.path.parts[-2:]), others).append(item)
    hands: list[list[pytest.Item]] = [[] for _ in range(workers)]
    seconds = [0] * workers
    for name, took in LONGEST.items():
        least = seconds.index(min(seconds))
        hands[least] += files[name]
        seconds[least] += took
    rest, count = iter(others), len(items)
    for number, hand in enumerate(hands):
        size = count * (number + 1) // workers - count * number // workers
        hand += islice(rest, max(0, size - len(hand)))
    items[:] = [*chain.from_iterable(hands), *rest]


@pytest.fixture
def make_site(tmp_path: Path) -> SiteFactory:
    """Return a function that makes a site store below ``tmp_path / "sites"``."""

    def make(
        name: str = "north",
        patients: int = 8,
        *,
        fractions: SplitFractions = HALVES,
        **options: int,
    ) -> Path:
        return small_store(tmp_path / "sites" / name, patients, fractions, **options)

    return make


HomeFactory = Callable[..., SiteHome]


@pytest.fixture
def make_home(tmp_path: Path, make_site: SiteFactory) -> HomeFactory:
    """Return a function that gives a store a policy and a ledger below ``tmp_path / "homes"``."""

    def make(store: Path | None = None, **changes: Any) -> SiteHome:
        store = store or make_site()
        folder = tmp_path / "homes" / store.name
        (folder / "second-place").mkdir(parents=True)
        rules = {
            "site": store.name,
            "store": store,
            "ledger": {"folder": folder / "ledger", "second_place": folder / "second-place"},
            "max_epsilon_per_job": 8.0,
            "minimum_sites": 1,
            "aggregation": ["plain_with_local_dp"],
            "coordinators": ["coordinator"],
            "jobs": ["*"],
            "models": ["cardiomm"],
            "cohort": {"require_consent": False},
            "reply_tick_s": 0.01,
        }
        path = folder / "policy.yaml"
        path.write_text(policy_text(SitePolicy.model_validate({**rules, **changes})))
        home = SiteHome.open(path)
        home.create_ledger().close()
        return home

    return make
