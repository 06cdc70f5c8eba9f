"""Training of CPGG's starting weights, and whether the packaged ones draw the hearts asked for."""

from __future__ import annotations

import hashlib
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from generator_parts import VIDEO, discs

from fedcmr_shared.cli import cli
from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.metrics.phenotypes.table import PhenotypeTable
from fedcmr_shared.models.bundle import load_bundle, state_sha256
from fedcmr_shared.models.cpgg import CPGG
from fedcmr_shared.models.registry import build_model
from fedcmr_shared.models.segmenter import load_segmenter
from fedcmr_shared.models.video_vae import VideoVAE
from fedcmr_shared.schemas.job import ModelSpec
from fedcmr_simulations.generator_training import (
    PLAN,
    GeneratorTraining,
    agreement,
    asked_fac,
    default_generator,
    draw_clips,
    make_generator,
    measure_clips,
    train_autoencoder,
    view,
)
from fedcmr_simulations.hearts import draw_heart
from fedcmr_simulations.progress import SilentProgress

REQUESTS = 12
WORDS = ["--patients", "4", "--held-out", "3", "--autoencoder-steps", "2", "--generator-steps", "3"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A bundle of the command with almost no training, and what the command said of it."""
    out = tmp_path_factory.mktemp("generator") / "tiny.safetensors"
    threads = torch.get_num_threads()
    try:
        words = ["simulate", "generator-weights", "--out", str(out), *WORDS, "--json"]
        result = CliRunner().invoke(cli, words)
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    return out, json.loads(result.stdout)


def test_the_command_writes_a_bundle_and_its_origin(trained: tuple[Path, dict[str, Any]]) -> None:
    out, said = trained
    bundle = load_bundle(out)
    assert isinstance(bundle.model, CPGG)
    beside = json.loads(out.with_suffix(".json").read_text())
    assert beside == {key: value for key, value in said.items() if key != "out"}
    assert bundle.sha256 == beside["sha256"] == state_sha256(bundle.model.state_dict())
    assert bundle.extra["privacy"].startswith("none")
    assert beside["command"] == " ".join(
        ["fedcmr simulate generator-weights --out tiny.safetensors --seed 0", *WORDS]
    )
    assert str(out.parent) not in repr(bundle.extra) + repr(beside)
    assert {path.name for path in out.parent.iterdir()} == {"tiny.safetensors", "tiny.json"}


def test_both_parts_are_trained(trained: tuple[Path, dict[str, Any]]) -> None:
    state = load_bundle(trained[0]).model.state_dict()
    torch.manual_seed(0)
    untrained = build_model(ModelSpec(name="cpgg", size="tiny")).state_dict()
    for part in ("autoencoder", "generator"):
        weights = [name for name in state if name.startswith(part) and name.endswith("weight")]
        changed = [name for name in weights if not torch.equal(state[name], untrained[name])]
        assert len(changed) > 0.9 * len(weights) > 0


def test_what_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    config = GeneratorTraining()
    with pytest.raises(ConfigurationError, match="folder does not exist"):
        make_generator(config, tmp_path / "no" / "tiny.safetensors", "", SilentProgress())
    with pytest.raises(ConfigurationError, match=r"end in \.safetensors"):
        make_generator(config, tmp_path / "tiny.json", "", SilentProgress())


def test_views_are_shifts_of_the_clip() -> None:
    clips = torch.rand(1, 3, 12, 12) - 0.9
    places = set()
    for seed in range(40):
        (seen,) = view(clips, np.random.default_rng(seed))[:, 0]
        matches = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if torch.corrcoef(torch.stack([seen, clips[0, :, y : y + 8, x : x + 8]]).flatten(1))[
                0, 1
            ]
            > 0.999
        ]
        assert len(matches) == 1
        places.update(matches)
    assert len(places) > 15


def test_the_autoencoder_learns_and_is_frozen_again() -> None:
    clips = discs(16, (VIDEO.clip[0], VIDEO.clip[1] + 4, VIDEO.clip[2] + 4))[0][:, 0]
    errors = []
    for steps in (1, 120):
        torch.manual_seed(0)
        network = VideoVAE(VIDEO)
        config = GeneratorTraining(autoencoder_steps=steps, autoencoder_rate=1e-2)
        train_autoencoder(network, clips, config, SilentProgress())
        assert not any(parameter.requires_grad for parameter in network.parameters())
        middle = clips[:, None, :, 2:-2, 2:-2]
        errors.append(float((network.decode(network.encode(middle).mean) - middle).abs().mean()))
    assert errors[1] < 0.5 * errors[0]


def test_agreement_leaves_out_what_was_not_asked_or_not_measured() -> None:
    asked = np.array([10.0, 20.0, 30.0, math.nan, 50.0])
    measured = np.array([11.0, 21.0, 31.0, 40.0, math.nan])
    found = agreement(asked, measured)
    assert found is not None
    assert (found.samples, found.mae, found.bias) == (3, 1.0, 1.0)
    assert agreement(asked[1:], measured[1:]) is None


@cache
def packaged() -> CPGG:
    model = load_bundle(default_generator()).model
    assert isinstance(model, CPGG)
    return model


@cache
def answers() -> tuple[np.ndarray, np.ndarray]:
    """Area change asked for by patients never trained on, and measured on what was drawn."""
    rng = np.random.default_rng(99)
    patients = [draw_heart(str(number), rng) for number in range(REQUESTS)]
    table = PhenotypeTable.of(
        [patient.heart.volumes.phenotypes(patient.heart_rate_bpm) for patient in patients]
    )
    phenotypes = torch.from_numpy(table.values).float()
    model = packaged()
    clips = draw_clips(model, phenotypes, PLAN, 7)
    measured = measure_clips(clips.numpy(), model.config.pixel_mm, load_segmenter().model)
    return asked_fac(model, phenotypes), measured["LVFAC"]


def test_packaged_weights_are_those_of_their_description() -> None:
    path = default_generator()
    said = json.loads(path.with_suffix(".json").read_text())
    bundle = load_bundle(path)
    assert bundle.sha256 == said["sha256"]
    content = path.read_bytes()
    assert len(content) == said["bytes"] <= 8_000_000
    assert hashlib.sha256(content).hexdigest() == said["file_sha256"]
    assert said["origin"] == bundle.extra["origin"] == "simulated"
    digest = bundle.sha256
    readme = (path.parent / "README.md").read_text()
    assert digest in readme
    assert said["command"] in readme
    for name, row in said["held_out"].items():
        if name != "patients":
            figures = (
                f"{row['r2']:.3f} | {row['mae']:.2f} | {row['bias']:+.2f} | {row['samples']} |"
            )
            assert figures in readme, name


def test_packaged_weights_draw_the_hearts_asked_for() -> None:
    asked, found = answers()
    assert np.isfinite(found).sum() >= REQUESTS - 1
    there = np.isfinite(found)
    assert np.corrcoef(asked[there], found[there])[0, 1] > 0.8


def test_other_requests_do_not_explain_what_was_drawn() -> None:
    """Positive control: shuffled requests give no such correlation."""
    asked, found = answers()
    there = np.isfinite(found)
    shuffled = np.roll(asked, 5)[there]
    assert np.corrcoef(shuffled, found[there])[0, 1] < 0.5
