"""A federation that trains a generator: from scans to the gate, which refuses when it cannot decide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from real_data import NO_SUNNYBROOK, SUNNYBROOK

from fedcmr_client.cine import read_heart
from fedcmr_client.importers import ImportOptions, import_path
from fedcmr_client.store.site_store import SiteStore
from fedcmr_client.synthetic_export import NOT_RELEASED
from fedcmr_server.run_folder import RunFolder
from fedcmr_shared.identity.keys import SiteKey
from fedcmr_shared.models.bundle import load_bundle
from fedcmr_shared.models.clips import clip_grid
from fedcmr_shared.models.cpgg import CONFIGS
from fedcmr_shared.models.refusal import ReleaseRefusal
from fedcmr_simulations import generator_run
from fedcmr_simulations.config import PhantomSpec, SimulationConfig, load_config
from fedcmr_simulations.partition import partition
from fedcmr_simulations.progress import SilentProgress
from fedcmr_simulations.runner import SimulationRequest, simulate

DEMO = Path(__file__).parents[2] / "simulations/fedcmr_simulations/jobs/demo-generator.yaml"
PIXEL_MM = 1.35 * 256 / 192  # of the repacked images on the grid that was acquired


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> SimulationConfig:
    """The demonstration with one round and few patients; little is asked of its models."""
    monkeypatch.setattr(generator_run, "REQUESTS", 4)
    demo = load_config(DEMO)
    few = PhantomSpec(patients=6, detail="clip", train=0.5, validation=0.34, test=0.16)
    return demo.model_copy(
        update={"job": demo.job.model_copy(update={"rounds": 1}), "phantom": few}
    )


def ran(request: SimulationRequest) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    simulate(request, SilentProgress())
    summary = json.loads((request.out / "summary.json").read_text())
    return summary, RunFolder(request.out).events()


def require_undecided(
    summary: dict[str, Any], events: list[dict[str, Any]], out: Path, sites: int
) -> None:
    """All sites said that they cannot decide, so nothing was released, and that is written down."""
    assert summary["status"] == "finished"
    scored = [event for event in events if event["event"] == "evaluation"]
    assert [(event["gates_passed"], event["sites"]) for event in scored] == [(0, sites)]
    # What the gates said stays in the sites' logs, which are this file in a simulation; Ray writes
    # lines that are the same only once.
    assert (out / "flower.log").read_text().count("the memorisation gate cannot decide") > 0
    refused = [event for event in events if event["event"] == "release_refused"]
    assert [event["gate"] for event in refused] == ["memorisation"]
    assert summary["release"] is None
    assert not (out / "release.zip").exists()
    require_signed_refusal(out, summary["gates"][0])
    assert f"passed at 0 of {sites} sites" in summary["gates"][0]["text"]
    # Latents of patients are gone with the job.
    assert list(out.rglob("*.latents")) == []


def require_signed_refusal(out: Path, gate: dict[str, Any]) -> None:
    """What the gate kept back is signed by the run's coordinator: it is about these weights."""
    refusal = ReleaseRefusal.model_validate_json((out / "refusal.json").read_bytes())
    key = SiteKey.load(out / "coordinator.pem").public_key
    refusal.verify((refusal.federation_sha256, key))
    folder = RunFolder(out)
    assert refusal.job_sha256 == folder.job.sha256
    assert refusal.model_sha256 == load_bundle(folder.bundle_path(folder.job.rounds)).sha256
    assert refusal.gate.model_dump() == gate


def test_three_sites_with_few_patients_release_nothing(
    config: SimulationConfig, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    summary, events = ran(SimulationRequest(config, 3, out))
    require_undecided(summary, events, out, 3)
    sites = summary["privacy"]["sites"]
    assert len(sites) == 3
    assert all(0 < site["train"]["epsilon"] < config.budget.epsilon for site in sites.values())
    assert summary["adherence"]["requests"] == 4
    assert "pattern" not in summary  # nothing is undersampled
    assert len(summary["hearts"]) == 6
    assert (out / "hearts.gif").stat().st_size > 10_000
    assert (out / "hearts.png").stat().st_size > 10_000
    labelled = json.loads((out / "hearts" / "provenance.json").read_text())
    assert labelled["synthetic"] is True
    assert labelled["release_card_sha256"] == NOT_RELEASED
    report = (out / "report.html").read_text()
    for text in ("refuses the release", "Nothing was released", "a picture may show a patient"):
        assert text in report


@pytest.mark.skipif(not SUNNYBROOK.is_dir(), reason=NO_SUNNYBROOK)
def test_real_hearts_are_too_few_to_decide(config: SimulationConfig, tmp_path: Path) -> None:
    options = ImportOptions(
        coils=2, metadata={"pixel_spacing_mm": (PIXEL_MM, PIXEL_MM), "view": "short-axis"}
    )
    with SiteStore.create(tmp_path / "store") as store:
        found = import_path(store, SUNNYBROOK / "contoured_png8", options=options)
        assert found.imported == 30
    partition(tmp_path / "store", tmp_path / "sites", 3, 0, lambda _: None)
    with SiteStore.open(
        tmp_path / "sites" / min(p.name for p in (tmp_path / "sites").iterdir())
    ) as site:
        heart = read_heart(site.scans("train")[:1], clip_grid(CONFIGS["tiny"]))
    assert np.ptp(heart.clip) > 1
    assert 5 < heart.phenotypes["LVEF"] < 85
    out = tmp_path / "run"
    summary, events = ran(SimulationRequest(config, 3, out, tmp_path / "sites"))
    require_undecided(summary, events, out, 3)
    assert summary["data_origin"] == "synthesised"
