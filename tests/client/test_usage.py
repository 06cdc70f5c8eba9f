"""What jobs have used: every worker's share counts, and limits hold."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedcmr_client.site_home import SiteHome
from fedcmr_client.store.site_store import SiteStore
from fedcmr_client.usage import Usage
from fedcmr_shared.errors import JobRefused, LedgerError
from fedcmr_shared.schemas.job import JobSpec, ResourceSpec

TIMES, WORKERS = 25, 4


def job(number: int = 0, resources: dict[str, float] | None = None) -> JobSpec:
    spec = ResourceSpec.model_validate(resources or {})
    return JobSpec(name=f"job-{number}", resources=spec)


@pytest.fixture
def usage(make_home: Callable[..., SiteHome], tmp_path: Path) -> Usage:
    store = tmp_path / "north"
    SiteStore.create(store).close()
    policy = make_home(store, device_watts=1000.0).policy
    return Usage(policy, policy.ledger.folder)


def test_workers_of_several_jobs_count_at_the_same_time(usage: Usage) -> None:
    def work(number: int) -> None:
        for _ in range(TIMES):
            usage.add(job(number % 2), 2.0)

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(work, range(WORKERS)))
    assert [usage.seconds(job(number)) for number in (0, 1, 2)] == [100.0, 100.0, 0.0]


@pytest.mark.parametrize(
    ("resources", "code"),
    [({"device_hours": 2.0, "energy_kwh": 9.0}, "device-hours"), ({"energy_kwh": 2.0}, "energy")],
)
def test_a_job_that_used_up_what_it_declared_is_refused(
    usage: Usage, resources: dict[str, float], code: str
) -> None:
    """At 1000 W an hour is a kWh."""
    short = job(resources=resources)
    usage.add(short, 7199.0)
    usage.require_left(short)
    usage.add(short, 1.0)
    with pytest.raises(JobRefused) as refusal:
        usage.require_left(short)
    assert refusal.value.code == code


def test_a_damaged_file_is_named(usage: Usage) -> None:
    (usage.folder / "usage.json").write_text("{")
    with pytest.raises(LedgerError, match=r"usage\.json: cannot be read"):
        usage.seconds(job())
