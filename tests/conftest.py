"""Small sites with smooth random images seen by a few coils, and with policy and ledger."""

from collections.abc import Callable
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

LONGEST = (
    "test_faults.py",
    "test_federation.py",
    "test_runner.py",
    "test_real_images.py",
    "test_generator_run.py",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest tests, so that no worker ends long after the others."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


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
