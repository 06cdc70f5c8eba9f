"""After the rounds of a generator: gates, release, and what an interrupt leaves behind."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from html_page import Page

from fedcmr_server.run_folder import Checkpoint, RunFolder
from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.identity.keys import SiteKey
from fedcmr_shared.identity.roster import new_roster
from fedcmr_shared.models.bundle import load_bundle, state_sha256
from fedcmr_shared.models.card import ModelCard
from fedcmr_shared.models.refusal import ReleaseRefusal
from fedcmr_shared.models.release import ReleaseBundle
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_simulations import generator_run
from fedcmr_simulations.config import SimulationConfig, load_config
from fedcmr_simulations.generator_run import finish_generator
from fedcmr_simulations.generator_training import default_generator
from fedcmr_simulations.progress import SilentProgress
from fedcmr_simulations.report import generator_statement, write_report
from fedcmr_simulations.runner import SimulationRequest, simulate

DEMO = Path(__file__).parents[2] / "simulations/fedcmr_simulations/jobs/demo-generator.yaml"
SITES = ("alder", "birch", "cedar")


@cache
def weights() -> dict[str, Any]:
    return dict(load_bundle(default_generator()).model.state_dict())


def demo_job() -> JobSpec:
    return load_config(DEMO).job.model_copy(update={"rounds": 1})


def finished(root: Path, passed: int = 3) -> RunFolder:
    """A run whose only round is done, and whose gates passed at so many of three sites."""
    roster = new_roster({name: SiteKey.create(root / f"{name}.pem").public_key for name in SITES})
    folder = RunFolder.create(root / "run", demo_job(), weights(), roster)
    digest = state_sha256(weights())
    folder.commit(Checkpoint(1, weights(), {}), sites=3, closed=False, model_sha256=digest)
    folder.record("evaluation", round=1, sites=3, gates_passed=passed, model_sha256=digest)
    return folder


def card_of(folder: RunFolder, found: dict[str, Any]) -> ModelCard:
    path = folder.root / found["release"]["path"]
    released = ReleaseBundle.verify(path, found["release"]["key"])
    assert released.sha256 == found["release"]["sha256"]
    return released.card


def test_the_card_says_which_weights_the_run_began_with(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    found = next(finish_generator(folder, "packaged", SilentProgress()))
    card = card_of(folder, found)
    assert card.lineage.start.origin == "bundle"
    assert card.lineage.start.notes["origin"] == "simulated"
    assert card.lineage.start.model_sha256 == load_bundle(folder.bundle_path(0)).sha256
    assert card.lineage.roster_sha256 == folder.roster.sha256
    assert card.gates[0].passed
    assert not (folder.root / "refusal.json").exists()


def test_a_run_without_starting_weights_began_with_the_seed(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    start = card_of(folder, next(finish_generator(folder, None, SilentProgress()))).lineage.start
    assert (start.origin, start.notes) == ("seed", {})


def test_one_gate_that_did_not_pass_refuses_the_release(tmp_path: Path) -> None:
    folder = finished(tmp_path, passed=2)
    found = next(finish_generator(folder, "packaged", SilentProgress()))
    assert found["release"] is None
    assert not (folder.root / "release.zip").exists()
    assert folder.events()[-1]["event"] == "release_refused"
    assert "passed at 2 of 3 sites" in folder.events()[-1]["text"]
    refusal = ReleaseRefusal.model_validate_json((folder.root / "refusal.json").read_bytes())
    key = SiteKey.load(folder.root / "coordinator.pem").public_key
    refusal.verify((refusal.federation_sha256, key))
    assert refusal.gate.model_dump() == found["gates"][0]
    assert refusal.model_sha256 == state_sha256(weights())


def test_an_interrupt_leaves_what_was_found_before_in_summary_and_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generator_run, "REQUESTS", 4)
    monkeypatch.setattr(generator_run, "_draw_hearts", interrupted)
    folder = finished(tmp_path)
    summary: dict[str, Any] = {"status": "interrupted", "model": {"name": "cpgg"}}
    parts = finish_generator(folder, "packaged", SilentProgress())
    summary |= next(parts) | next(parts)
    with pytest.raises(KeyboardInterrupt):
        next(parts)
    assert set(summary) == {"status", "model", "gates", "release", "adherence"}
    assert summary["adherence"]["start"] == summary["adherence"]["federated"]
    assert summary["adherence"]["start"]["samples"] == 4
    (folder.root / "summary.json").write_text(json.dumps(summary))
    page = write_report(folder.root).read_text(encoding="utf-8")
    assert "The generator was released." in page
    assert summary["release"]["sha256"] in page
    assert "No heart was drawn." in page


@pytest.mark.parametrize(
    ("start", "end", "words"),
    [
        (0.912, 0.9, "R² 0.91 with the starting weights, R² 0.90 after private training"),
        (0.912, None, "R² 0.91 with the starting weights, no heart after private training"),
        (None, 0.5, "no heart with the starting weights, R² 0.50 after private training"),
        (None, None, "It draws no hearts, and its starting weights drew none"),
    ],
)
def test_the_statement_says_which_model_draws_hearts(
    start: float | None, end: float | None, words: str
) -> None:
    summary = {"adherence": {"start": {"r2": start}, "federated": {"r2": end}}, "release": None}
    assert words in generator_statement(summary)
    assert "was not released" in generator_statement(summary)


def test_the_report_rounds_epsilon_up_and_shows_every_start(tmp_path: Path) -> None:
    spent = {"alder": [3.861, 4.642, 5.423], "birch": [3.861, 4.642, 5.423, 6.201]}
    sites = {
        name: {
            "rounds": values,
            "train": {"starts": len(values), "epsilon": values[-1], "epsilon_if_fixed": None},
            "evaluate": {"starts": 0, "epsilon": 0.0, "epsilon_if_fixed": 0.0},
        }
        for name, values in spent.items()
    }
    privacy = demo_job().privacy
    assert privacy is not None
    budget = {"epsilon": 8.0, "delta": 1e-5}
    told = {**privacy.model_dump(), "steps": 3, "budget": budget, "sites": sites}
    model = {"name": "cpgg", "trainable": 10752}
    summary = {"status": "running", "model": model, "privacy": told}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    rows = Page(write_report(tmp_path).read_text(encoding="utf-8")).rows
    assert ["site", "start 1", "start 2", "start 3", "start 4"] in rows
    assert ["alder", "3.87", "4.65", "5.43", "–"] in rows
    assert ["birch", "3.87", "4.65", "5.43", "6.21"] in rows


@pytest.mark.parametrize("name", ["phenotype-vae", "phenotype-gaussian"])
def test_models_that_no_simulated_run_evaluates_are_refused_before_any_work(
    tmp_path: Path, name: str
) -> None:
    job = demo_job()
    model = job.model.model_copy(update={"name": name})
    config = SimulationConfig(job=job.model_copy(update={"model": model}))
    with pytest.raises(ConfigurationError, match=f"job.model.name {name}: simulated runs evaluate"):
        simulate(SimulationRequest(config, 3, tmp_path / "run"), SilentProgress())
    assert not (tmp_path / "run").exists()


def test_without_privacy_no_generator_is_trained(tmp_path: Path) -> None:
    request = SimulationRequest(load_config(DEMO), 3, tmp_path / "run", private=False)
    with pytest.raises(ConfigurationError, match="--no-privacy: cpgg is trained privately only"):
        simulate(request, SilentProgress())
    assert not (tmp_path / "run").exists()
