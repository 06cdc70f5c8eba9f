from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

from fedcmr_client.dataset import all_images
from fedcmr_client.store.site_store import SiteStore
from fedcmr_client.store.split import SplitFractions
from fedcmr_shared.errors import ConfigurationError, DataError, FedcmrError
from fedcmr_shared.kspace.masks import Sampling
from fedcmr_shared.models.bundle import load_bundle
from fedcmr_shared.models.cardiomm import CardioMM
from fedcmr_shared.schemas.acquisition import Origin
from fedcmr_shared.text.encoders import CachedTextEncoder, load_text_encoder
from fedcmr_simulations.centres import PRETRAINING_CENTRES, TRAINING_CENTRES, simulate_centre
from fedcmr_simulations.commands.pretrain import pretrain
from fedcmr_simulations.evaluation import NetworkReconstructor, evaluate, zero_filled
from fedcmr_simulations.phantom.patient import draw_patient
from fedcmr_simulations.phantom.protocol import protocol
from fedcmr_simulations.phantom.scan import Scan
from fedcmr_simulations.pretraining import (
    PRIVACY,
    default_start,
    load_pretraining,
)

PATIENTS = 3


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def quick_config(folder: Path, **changes: Any) -> Path:
    content = {
        "job": {
            "rounds": 1,
            "seed": 4,
            "model": {"size": "tiny", "text_encoder": "hashed"},
            "sampling": {"accelerations": [8], "acs_lines": 12},
            "training": {"local_steps": 12, "learning_rate": 4e-3, "warmup_steps": 2},
        },
        "phantom": [{"patients": PATIENTS, "detail": "small"}],
    }
    for name, value in changes.items():
        section, _, field = name.partition("__")
        content[section] = {**content[section], field: value} if field else value
    path = folder / "quick.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def run(*options: str | Path) -> dict[str, Any]:
    result = CliRunner().invoke(pretrain, [*map(str, options), "--json"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def site_of(folder: Path, origin: Origin) -> Path:
    """Make a sites folder with one site whose scans claim ``origin``."""
    centre = PRETRAINING_CENTRES[0]
    scanner = centre.equipment("small")
    sequence = protocol("T1 weighted", "small", centre.field_strength_t)
    with SiteStore.create(folder / "public", secret=bytes(range(32))) as store:
        store.set_split(SplitFractions(0.5, 0.25, 0.25))
        for number in range(8):
            patient = draw_patient(f"p{number}", "NC", np.random.default_rng(number))
            source = Scan(patient, scanner, sequence, (40.0,), (number,)).source()
            metadata = source.metadata.model_copy(update={"origin": origin})
            store.add(replace(source, metadata=metadata))
        assert all(store.split_counts().values()), "each part needs a patient"
    return folder


def test_training_helps_and_the_bundle_says_where_its_weights_come_from(tmp_path: Path) -> None:
    out = tmp_path / "start.safetensors"
    answer = run("--out", out, "--config", quick_config(tmp_path))
    (score,) = answer["held_out"]
    assert score["patients"] == len(PRETRAINING_CENTRES) * (PATIENTS - 1)
    assert score["psnr_network"] > score["psnr_zero_filled"]
    bundle = load_bundle(out)
    assert bundle.sha256 == answer["sha256"]
    assert out.stat().st_size == answer["bytes"]
    extra = bundle.extra
    assert (extra["origin"], extra["privacy"]) == ("simulated", PRIVACY)
    assert json.loads(extra["centres"]) == sorted(c.name for c in PRETRAINING_CENTRES)
    assert (extra["seed"], extra["steps"]) == ("4", "12")
    assert extra["command"] == (
        "fedcmr simulate pretrain --out start.safetensors --config quick.yaml"
    )
    assert json.loads(extra["held_out"]) == answer["held_out"]
    assert json.loads(extra["configuration"])["phantom"][0]["patients"] == PATIENTS
    assert json.loads(extra["versions"])["torch"] == torch.__version__
    assert str(tmp_path) not in " ".join(extra.values())


def test_the_seed_decides_the_weights_and_options_win_over_the_file(tmp_path: Path) -> None:
    config = quick_config(tmp_path)
    first, again, other = (
        run("--out", tmp_path / name, "--config", config, "--steps", "2", "--seed", seed)
        for name, seed in (("a", "1"), ("b", "1"), ("c", "2"))
    )
    assert first["steps"] == 2
    assert first["sha256"] == again["sha256"] != other["sha256"]


@pytest.mark.parametrize("origin", ["measured", "synthesised"])
def test_data_of_patients_are_refused_unless_public(tmp_path: Path, origin: Origin) -> None:
    sites = site_of(tmp_path / "sites", origin)
    out = tmp_path / "start.safetensors"
    options = ("--out", out, "--config", quick_config(tmp_path), "--data", sites, "--steps", "1")
    with pytest.raises(DataError, match=f"holds {origin} data.*--public"):
        run(*options)
    assert not out.exists()
    answer = run(*options, "--public")
    assert answer["origin"] == f"public {origin}"
    assert answer["command"].endswith("--steps 1 --data sites --public")
    assert load_bundle(out).extra["privacy"] == PRIVACY


def test_a_site_without_held_out_patients_is_refused(tmp_path: Path) -> None:
    sites = site_of(tmp_path / "sites", "simulated")
    with SiteStore.open(sites / "public") as store:
        store.set_split(SplitFractions(1.0, 0.0, 0.0))
    with pytest.raises(DataError, match="no validation or test patient"):
        run("--out", tmp_path / "m", "--config", quick_config(tmp_path), "--data", sites)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"job__rounds": 2}, "job.rounds must be 1"),
        ({"job__privacy": {}}, "job.privacy"),
        ({"job__model": {"size": "huge"}}, "job.model.size"),
        ({"phantom": []}, "phantom"),
        ({"phantom": [{"patients": 2}]}, "phantom.0.patients"),
        ({"epochs": 3}, "epochs"),
    ],
)
def test_wrong_configurations_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        run("--out", tmp_path / "m", "--config", quick_config(tmp_path, **changes))
    assert not (tmp_path / "m").exists()


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    config = quick_config(tmp_path)
    for options in (
        ("--out", tmp_path / "none" / "m", "--config", config),
        ("--out", tmp_path / "m", "--config", tmp_path / "none.yaml"),
        ("--out", tmp_path / "m", "--config", config, "--data", tmp_path / "none"),
    ):
        with pytest.raises(FedcmrError, match="none"):
            run(*options)
    for wrong in ([], ["--out", "m", "--steps", "0"], ["--out", "m", "--seed", "-1"]):
        assert CliRunner().invoke(pretrain, wrong).exit_code == 2


def test_packaged_weights_come_from_the_packaged_configuration() -> None:
    bundle = load_bundle(default_start())
    config = load_pretraining(None)
    assert bundle.spec == config.job.model
    # How jobs aggregate has changed since; pretraining aggregates nothing.
    recorded, current = json.loads(bundle.extra["configuration"]), config.model_dump(mode="json")
    assert recorded["phantom"] == current["phantom"]
    for part in ("seed", "rounds", "model", "sampling", "training", "privacy", "cohort"):
        assert recorded["job"][part] == current["job"][part], part
    assert (bundle.extra["origin"], bundle.extra["privacy"]) == ("simulated", PRIVACY)
    assert json.loads(bundle.extra["centres"]) == sorted(c.name for c in PRETRAINING_CENTRES)
    assert default_start().stat().st_size < 2_000_000
    record = json.loads(default_start().with_suffix(".json").read_text())
    assert record["sha256"] == bundle.sha256
    assert record["command"] == bundle.extra["command"]
    assert record["held_out"] == json.loads(bundle.extra["held_out"])
    for score in record["held_out"]:
        assert score["psnr_network"] > score["psnr_zero_filled"] + 3


@pytest.mark.parametrize("centre", TRAINING_CENTRES, ids=lambda centre: centre.name)
def test_packaged_weights_help_at_every_hospital_though_they_saw_none(
    tmp_path: Path, centre: Any
) -> None:
    model = load_bundle(default_start()).model
    assert isinstance(model, CardioMM)
    encoder = CachedTextEncoder(load_text_encoder("minilm"))
    with simulate_centre(tmp_path / "s", centre, 5, 3, "small") as store:
        images = list(all_images(store.scans()))
    methods = {"zero_filled": zero_filled, "network": NetworkReconstructor(model, encoder)}
    rows = list(evaluate(centre.name, images, [Sampling("uniform", 8.0, 12)], methods, 0))
    mean = {
        name: statistics.fmean(row.psnr for row in rows if row.method == name) for name in methods
    }
    assert mean["network"] > mean["zero_filled"] + 1
