"""A federation as hospitals meet it: hosts of their own, TLS, PostgreSQL, from enrolment to leave.

Its models are those of a simulation with the same hospitals, once the draws are known.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from databases import create_database, postgresql
from deployment import SITES, Federation, missing_programs, short_folder
from network_namespaces import NO_NAMESPACES
from small_scans import small_store

from fedcmr_client.store.split import SplitFractions
from fedcmr_server.run_folder import RunFolder
from fedcmr_shared.identity.roster import read_roster
from fedcmr_shared.schemas.job_files import read_job
from fedcmr_simulations.flower_engine import flower_process

__all__ = ["create_database", "postgresql", "short_folder"]

pytestmark = [
    pytest.mark.skipif(bool(missing_programs()), reason=missing_programs()),
    # Says that hosts share the loopback; everything else is tested all the same.
    pytest.mark.filterwarnings("default:network namespaces"),
]


KNOWN_DRAWS = {"PYTHONPATH": str(Path(__file__).parents[1] / "plugins" / "known_draws")}
"""Sampling, noise and rounding follow from the work, so that two runs can be compared exactly."""

PARTS = SplitFractions(0.5, 0.25, 0.25)


def test_four_hospitals_train_release_and_leave(
    short_folder: Path, postgresql: str, create_database: Callable[[], str]
) -> None:
    url = f"postgresql+psycopg://fedcmr@/{create_database()}?host={postgresql}"
    folder = short_folder
    with Federation.open(folder, database_url=url) as federation:
        if not federation.network.isolated:
            warnings.warn(NO_NAMESPACES, stacklevel=1)
        federation.start()
        for name in SITES:
            store = small_store(folder / "hospitals" / name / name, 24, PARTS)
            federation.add_site(name, store, environment=KNOWN_DRAWS).join()
        for site in federation.sites.values():
            site.pin_roster()
        copies = _copies(federation, folder / "copies")
        for site in federation.sites.values():
            site.start()
        federation.wait_connected()
        job = federation.submit(rounds=2)
        found = federation.wait_for(job, "finished", 240)
        _require_trained(federation, found)
        _release(federation, job)
        _leave(federation)
        deployed = [each["model_sha256"] for each in found["events"] if each["event"] == "round"]
        assert _simulated(federation, copies) == deployed


def _copies(federation: Federation, folder: Path) -> list[Path]:
    """Copy the hospitals before they have done anything; return the copies' policies."""
    policies = []
    for site in federation.sites.values():
        copy = folder / site.name
        shutil.copytree(site.home, copy)
        policy = copy / "site" / "policy.yaml"
        policy.write_text(policy.read_text().replace(str(site.home), str(copy)))
        policies.append(policy)
    return policies


def _simulated(federation: Federation, policies: list[Path]) -> list[str]:
    """Run the same job over the copies in Flower's simulation; return each round's model."""
    roster = read_roster(federation.sites["alder"].folder / "roster.yaml")
    folder = RunFolder.create(
        federation.folder / "run", read_job(federation.job_file), None, roster
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KNOWN_DRAWS.items():
            patch.setenv(name, value)
        with flower_process(folder.root, policies, workers=2) as process:
            assert process.wait(180) == 0, (folder.root / "flower.log").read_text()[-3000:]
    return [each["model_sha256"] for each in folder.events() if each["event"] == "round"]


def _require_trained(federation: Federation, found: dict[str, Any]) -> None:
    """Both rounds and the evaluation summed all four, and each ledger charged what was done."""
    attempts = [event for event in found["events"] if event["event"] == "attempt"]
    assert [each["outcome"] for each in attempts] == ["opened"] * 3
    assert {tuple(each["survivors"]) for each in attempts} == {SITES}
    assert [event["sites"] for event in found["events"] if event["event"] == "round"] == [4, 4]
    for site in federation.sites.values():
        status = site.fedcmr("site", "status", "--policy", str(site.policy))
        (charged,) = status["jobs"]
        assert charged["job"] == found["id"]
        assert charged["started"] == {"train": 2, "evaluate": 1}
        assert charged["outcome"] == "finished"


def _release(federation: Federation, job: str) -> None:
    """The model leaves signed, and a hospital verifies it with what it pinned."""
    released = federation.fedcmr("models", "release", job)
    kit = federation.sites["alder"].folder / "federation" / "kit.json"
    verified = federation.sites["alder"].fedcmr(
        "models", "verify", released["path"], "--kit", str(kit)
    )
    assert verified["card"]["lineage"]["rounds"][-1]["number"] == 2


def _leave(federation: Federation) -> None:
    """SIGTERM is a clean leave of the connection, `leave` one of the federation."""
    dogwood = federation.sites["dogwood"]
    dogwood.fedcmr("site", "leave", "--yes", "--policy", str(dogwood.policy))
    assert dogwood.service is not None
    assert dogwood.service.process.wait(60) == 0
    states = {row["name"]: row["state"] for row in federation.fedcmr("coordinator", "members")}
    assert states == {"alder": "active", "birch": "active", "cedar": "active", "dogwood": "left"}
    for site in federation.sites.values():
        assert site.service is not None
        assert site.service.stop() == 0
    assert federation.coordinator is not None
    assert federation.coordinator.stop() == 0
