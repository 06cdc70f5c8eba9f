"""`fedcmr site energy`: the site's own report of its jobs' energy."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from energy_parts import CIRCUMSTANCES

from fedcmr_client.commands.site_energy import energy as command
from fedcmr_client.energy import Circumstances, Energy, EnergyLog, JobEnergy
from fedcmr_client.site_home import SiteHome
from fedcmr_client.store.site_store import SiteStore
from fedcmr_shared.errors import LedgerError
from fedcmr_shared.schemas.job import JobSpec, TrainingSpec
from fedcmr_shared.schemas.privacy import PrivacySpec

Run = Callable[..., str]
JOB = JobSpec(
    name="cine-night",
    coordinator="coordinator",
    rounds=2,
    training=TrainingSpec(local_steps=10),
    privacy=PrivacySpec(sampling_rate=0.1, noise_multiplier=2.0),
)
MODELLED = CIRCUMSTANCES.model_copy(
    update={
        "g_per_kwh": 381.0,
        "pue": 1.2,
        "hardware": "Some CPU, 8 threads, 64 GiB",
        "tool": "codecarbon 3.3.2",
    }
)
MEASURED = MODELLED.model_copy(update={"interfaces": ("RAPL", "NVML"), "hardware": "Other CPU"})


def figure(circumstances: Circumstances = MODELLED, **changes: float) -> Energy:
    """An hour that used 0.05 kWh, by the second estimate 0.0096."""
    amounts = {"seconds": 3600, "cpu_seconds": 7200, "processor_kwh": 0.03, "gpu_kwh": 0.0}
    values: dict[str, Any] = {**amounts, "memory_kwh": 0.02, "kg_co2e": 0.01905, **changes}
    return Energy(circumstances=circumstances, **values)


@pytest.fixture
def home(make_home: Callable[..., SiteHome], tmp_path: Path) -> SiteHome:
    store = tmp_path / "north"
    SiteStore.create(store).close()
    return make_home(store)


@pytest.fixture
def log(home: SiteHome) -> EnergyLog:
    return EnergyLog.beside(home.policy.ledger.folder)


@pytest.fixture
def run(home: SiteHome, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs the command and gives what it prints."""

    def run(*arguments: str) -> str:
        command.main(["--policy", str(home.path), *arguments], standalone_mode=False)
        return capsys.readouterr().out

    return run


def words(text: str) -> str:
    """``text`` without line breaks."""
    return " ".join(text.split())


def test_without_figures_it_says_how_to_get_some(run: Run) -> None:
    assert "energy: {country: DEU}" in run()
    assert json.loads(run("--json")) == {"site": "north", "jobs": []}


def test_a_job_is_shown_with_all_that_its_figure_rests_on(
    run: Run, home: SiteHome, log: EnergyLog
) -> None:
    with home.open_ledger() as ledger:
        ledger.admit(JOB, policy_sha256="0" * 64, training={"p-1"}, evaluation=set())
    log.add(JOB.sha256, JobEnergy(measured=(figure(),)))
    text = words(run())
    for part in ("cine-night", JOB.sha256[:12], "0.05", "0.01905", "0.0096", "modelled"):
        assert part in text
    assert "Some CPU, 8 threads, 64 GiB: DEU, 381 g CO2e/kWh (2023), PUE 1.2" in text
    assert "codecarbon 3.3.2" in text

    (job,) = json.loads(run("--json"))["jobs"]
    assert (job["job"], job["name"], job["kwh"]) == (JOB.sha256, "cine-night", 0.05)
    (shown,) = job["measured"]
    assert shown["method"] == "modelled, order of magnitude"
    assert (shown["kg_co2e"], shown["seconds"], shown["cpu_seconds"]) == (0.01905, 3600, 7200)
    assert shown["second_kwh"] == pytest.approx(2 * 4 * 1.2 / 1000)
    assert shown["circumstances"] == MODELLED.model_dump(mode="json")


def test_measured_and_modelled_work_are_apart(run: Run, log: EnergyLog) -> None:
    log.add("a" * 64, JobEnergy(measured=(figure(), figure(MEASURED))))
    text = words(run())
    assert "modelled" in text
    assert "measured (RAPL, NVML)" in text
    assert "Other CPU: DEU" in text


@pytest.mark.parametrize(("cpu_seconds", "flagged"), [(7200, True), (36000, False)])
def test_estimates_that_disagree_are_flagged(
    run: Run, log: EnergyLog, cpu_seconds: float, flagged: bool
) -> None:
    log.add("a" * 64, JobEnergy(measured=(figure(cpu_seconds=cpu_seconds),)))
    assert ("order of magnitude." in words(run())) is flagged
    assert json.loads(run("--json"))["jobs"][0]["measured"][0]["disagrees"] is flagged


def test_work_that_was_not_measured_is_shown(run: Run, log: EnergyLog) -> None:
    log.add("a" * 64, JobEnergy(unmeasured_pieces=3, unmeasured_seconds=7200.0))
    text = words(run())
    assert "not measured" in text
    assert "3 pieces" in text
    assert json.loads(run("--json"))["jobs"][0]["unmeasured_seconds"] == 7200.0


def test_a_damaged_file_is_named(run: Run, log: EnergyLog) -> None:
    log.add("a" * 64, JobEnergy(unmeasured_pieces=1))
    (log.folder / f"{'a' * 64}.json").write_text("{")
    with pytest.raises(LedgerError, match="cannot be read"):
        run()
