"""Named parts of models."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn

from fedcmr_shared.errors import ConfigurationError, ModelError
from fedcmr_shared.models.registry import available_models, build_model, model_entry
from fedcmr_shared.privacy.parts import freeze, trainable_names
from fedcmr_shared.schemas.job import ModelSpec, Part

SIZES = get_args(ModelSpec.model_fields["size"].annotation)
VARIANTS = get_args(ModelSpec.model_fields["variant"].annotation)
PARTS = get_args(Part)


def network(part: Part, **choice: str) -> tuple[ModelSpec, nn.Module]:
    rank = 4 if part == "lora" else 0
    spec = ModelSpec.model_validate({"text_encoder": "hashed", "lora_rank": rank, **choice})
    with torch.device("meta"):
        return spec, build_model(spec)


def names(part: Part, **choice: str) -> list[str]:
    return trainable_names(*network(part, **choice), part)


def count(model: nn.Module, chosen: list[str]) -> int:
    return sum(p.numel() for p in freeze(model, chosen))


@pytest.mark.parametrize("model", sorted(available_models()))
@pytest.mark.parametrize("size", SIZES)
def test_every_part_is_smaller_than_the_whole_and_not_empty(model: str, size: str) -> None:
    spec, plain = network("full", name=model, size=size)
    full = count(plain, trainable_names(spec, plain, "full"))
    parts = {*model_entry(model).parts} - {"full"}
    layers = any(isinstance(layer, nn.Linear) for layer in plain.modules())
    for part in parts | ({"lora"} if layers else set()):
        choice = network("lora", name=model, size=size) if part == "lora" else (spec, plain)
        assert 0 < count(choice[1], trainable_names(*choice, part)) < full, part


@pytest.mark.parametrize("variant", VARIANTS)
def test_full_is_what_the_model_itself_trains(variant: str) -> None:
    _, model = network("full", variant=variant)
    expected = sorted(name for name, p in model.named_parameters() if p.requires_grad)
    assert names("full", variant=variant) == expected


@pytest.mark.parametrize("model", sorted(available_models()))
def test_full_is_what_other_models_train_too(model: str) -> None:
    spec, plain = network("full", name=model)
    expected = sorted(name for name, p in plain.named_parameters() if p.requires_grad)
    assert trainable_names(spec, plain, "full") == expected


def test_nothing_of_a_frozen_autoencoder_is_trained() -> None:
    for part in PARTS:
        found = names(part, name="cpgg")
        assert found
        assert all(name.startswith("generator.") for name in found)


def test_adapters_and_prompts_of_the_published_generator_are_few() -> None:
    """Noise grows with their number: between 30,000 and 300,000 where patients are few."""
    _, model = network("full", name="cpgg", size="paper")
    for part in ("adapters", "prompts"):
        assert 30_000 < count(model, names(part, name="cpgg", size="paper")) < 300_000


@pytest.mark.parametrize("variant", VARIANTS)
def test_parts_lie_within_the_whole_and_are_sorted(variant: str) -> None:
    full = set(names("full", variant=variant))
    for part in ("decoder", "adapters"):
        found = names(part, variant=variant)
        assert found == sorted(found)
        assert set(found) < full


def test_decoder_is_that_of_the_cascades() -> None:
    tops = {name.split(".unet.")[1].split(".")[0] for name in names("decoder")}
    assert tops == {"decoder", "tail"}
    assert {name.split(".")[0] for name in names("decoder")} == {"cascades"}


def test_adapters_modulate_and_are_few() -> None:
    found = names("adapters")
    ends = {".".join(name.split(".")[-2:]) for name in found}
    assert ends == {
        "gate.weight",
        "gate.bias",
        "adapter.scale",
        "adapter.shift",
        "squeeze.weight",
        "excite.weight",
        "activation.weight",
        "tail.bias",
        *(f"{i}.consistency_weight" for i in range(5)),
    }
    assert 1000 < count(network("adapters")[1], found) < 10_000


def test_prompts_are_those_of_the_variant() -> None:
    assert {name.split(".")[0] for name in names("prompts", variant="UT")} == {
        "sampling_head",
        "sensitivity",
        "cascades",
    }
    assert all(name.startswith("metadata_head.") for name in names("prompts", variant="MT"))
    assert not any(name.endswith("bank") for name in names("prompts"))


def test_a_part_that_the_variant_has_nothing_of_is_refused() -> None:
    with pytest.raises(
        ConfigurationError, match=r"training\.part prompts: cardiomm SM has nothing"
    ):
        names("prompts", variant="SM")


def test_lora_and_rank_belong_together() -> None:
    spec, model = network("full")
    with pytest.raises(ConfigurationError, match=r"training\.part lora .* model\.lora_rank 0"):
        trainable_names(spec, model, "lora")
    spec, model = network("lora")
    with pytest.raises(ConfigurationError, match=r"training\.part full .* model\.lora_rank 4"):
        trainable_names(spec, model, "full")


def test_freezing_leaves_exactly_the_named_parameters_trainable() -> None:
    spec, model = network("decoder")
    # A part can follow another one on the same model.
    freeze(model, trainable_names(spec, model, "adapters"))
    chosen = trainable_names(spec, model, "decoder")
    parameters = freeze(model, list(reversed(chosen)))
    named = dict(model.named_parameters())
    assert [id(p) for p in parameters] == [id(named[name]) for name in chosen]
    assert {name for name, p in named.items() if p.requires_grad} == set(chosen)


def test_unknown_names_are_refused_before_anything_changes() -> None:
    _, model = network("full")
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ModelError, match=r"the model has no parameter cascades\.9\.gain"):
        freeze(model, ["cascades.0.consistency_weight", "cascades.9.gain"])
    assert [p.requires_grad for p in model.parameters()] == before
