"""Weights that a run starts from."""

from pathlib import Path

import pytest
import torch

from fedcmr_server.run_folder import RunFolder
from fedcmr_shared.errors import ModelError
from fedcmr_shared.models.bundle import load_bundle, save_bundle
from fedcmr_shared.models.registry import build_model
from fedcmr_shared.schemas.job import JobSpec, ModelSpec, TrainingSpec
from fedcmr_simulations.config import load_config
from fedcmr_simulations.pretraining import default_start
from fedcmr_simulations.starting import starting_state, trained_counts


def test_packaged_weights_start_the_job() -> None:
    state = starting_state("packaged", JobSpec())
    assert state is not None
    packaged = load_bundle(default_start()).model.state_dict()
    assert all(torch.equal(state[name], packaged[name]) for name in packaged)


def test_no_start_leaves_the_weights_to_the_seed() -> None:
    assert starting_state(None, JobSpec()) is None


def test_plain_weights_start_a_job_of_low_rank_updates() -> None:
    job = JobSpec(model=ModelSpec(lora_rank=2), training=TrainingSpec(part="lora"))
    state = starting_state("packaged", job)
    assert state is not None
    model = build_model(job.model)
    model.load_state_dict(dict(state))
    counts = trained_counts(job)
    factors = [name for name in state if name.endswith("factor")]
    assert counts["trainable"] == sum(state[name].numel() for name in factors)
    assert all(not bool(state[name].any()) for name in factors)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    spec = ModelSpec(text_encoder="hashed")
    path = tmp_path / "other.safetensors"
    save_bundle(path, build_model(spec).state_dict(), spec, {})
    with pytest.raises(ModelError, match="do not fit"):
        starting_state(str(path), JobSpec())
    with pytest.raises(ModelError, match="does not exist"):
        starting_state(str(tmp_path / "none.safetensors"), JobSpec())


def test_a_run_folder_keeps_the_start_as_round_0(tmp_path: Path) -> None:
    state = starting_state("packaged", JobSpec())
    folder = RunFolder.create(tmp_path / "run", JobSpec(), state)
    latest = folder.latest()
    assert latest is not None
    assert latest.round == 0
    assert state is not None
    assert all(torch.equal(latest.state[name], state[name]) for name in state)


def test_a_start_beside_the_configuration_is_found(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("start: weights/my.safetensors\n")
    assert load_config(path).start == str(tmp_path / "weights" / "my.safetensors")


@pytest.mark.parametrize("part", ["full", "decoder", "adapters", "prompts"])
def test_parts_count_what_they_train(part: str) -> None:
    job = JobSpec.model_validate({"training": {"part": part}})
    counts = trained_counts(job)
    assert counts["trainable"] + counts["frozen"] == counts["total"]
    assert (counts["trainable"] == 211_222) == (part == "full")
