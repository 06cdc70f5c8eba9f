"""Low-rank updates of layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedcmr_shared.errors import ModelError
from fedcmr_shared.models.bundle import load_bundle, save_bundle, state_sha256
from fedcmr_shared.models.lora import add_lora, adopt, has_lora, is_factor, merge_lora
from fedcmr_shared.models.registry import build_model
from fedcmr_shared.schemas.job import ModelSpec


def layers() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv3d(1, 3, 2),
            nn.Flatten(2),
            nn.Unflatten(2, (2, 4)),
            nn.Conv2d(3, 4, 2, stride=2, groups=1),
            nn.PReLU(),
            nn.Flatten(),
            nn.Linear(8, 5),
        ).double()


def volume() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, 1, 3, 3, 3, dtype=torch.float64, generator=generator)


def factors(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if is_factor(name)]


def train(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for factor in factors(model):
            factor.copy_(torch.randn(factor.shape, dtype=factor.dtype, generator=generator))


def updated(rank: int = 2, seed: int | None = None) -> nn.Sequential:
    model = layers()
    add_lora(model, rank)
    if seed is not None:
        train(model, seed)
    return model


def test_updates_start_at_zero_and_only_factors_train() -> None:
    model = updated()
    torch.testing.assert_close(model(volume()), layers()(volume()), rtol=0, atol=0)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 3
    assert all(map(is_factor, trainable))
    assert [tuple(f.shape) for f in factors(model)] == [(3, 2), (4, 2), (5, 2)]
    assert has_lora(model)
    assert not has_lora(layers())


def test_an_update_is_factor_times_basis() -> None:
    model, plain = updated(seed=3), layers()
    for number in (0, 3, 6):
        update = model[number].parametrizations.weight[0]
        expected = plain[number].weight + (update.factor @ update.basis).view_as(
            plain[number].weight
        )
        torch.testing.assert_close(model[number].weight, expected)


def test_an_update_is_as_long_as_its_factor() -> None:
    model, plain = updated(seed=3), layers()
    for number in (0, 3, 6):
        change = model[number].weight - plain[number].weight
        factor = model[number].parametrizations.weight[0].factor
        torch.testing.assert_close(change.norm(), factor.norm())


def test_gradient_of_a_factor_is_that_of_the_weight_seen_by_the_basis() -> None:
    model, plain = updated(), layers()
    model(volume()).square().sum().backward()
    plain(volume()).square().sum().backward()
    for number in (0, 3, 6):
        update = model[number].parametrizations.weight[0]
        expected = plain[number].weight.grad.flatten(1) @ update.basis.T
        torch.testing.assert_close(update.factor.grad, expected)


def test_mean_of_factors_is_the_mean_of_updates() -> None:
    north, south, mean = updated(seed=4), updated(seed=5), updated()
    with torch.no_grad():
        for parts in zip(*map(factors, (mean, north, south)), strict=True):
            parts[0].copy_((parts[1] + parts[2]) / 2)
    for number in (0, 3, 6):
        expected = (north[number].weight + south[number].weight) / 2
        torch.testing.assert_close(mean[number].weight, expected)


def test_bases_depend_on_the_names_and_not_on_random_states() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = updated()
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    second = updated()
    bases = [[m[n].parametrizations.weight[0].basis for n in (0, 3, 6)] for m in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*bases, strict=True))
    twins = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    add_lora(twins, 2)
    first_basis, second_basis = (layer.parametrizations.weight[0].basis for layer in twins)
    assert not torch.allclose(first_basis, second_basis)


def test_rank_is_at_most_the_number_of_inputs() -> None:
    model = updated(rank=100)
    ranks = [model[n].parametrizations.weight[0].basis.shape[0] for n in (0, 3, 6)]
    assert ranks == [8, 12, 8]


def test_a_merged_model_is_plain_and_computes_the_same() -> None:
    model = updated(seed=6)
    merged = merge_lora(model)
    assert merged.state_dict().keys() == layers().state_dict().keys()
    torch.testing.assert_close(merged(volume()), model(volume()))
    assert not torch.allclose(merged(volume()), layers()(volume()))
    assert [type(layer) for layer in merged] == [type(layer) for layer in layers()]
    # The model itself is as it was, and can be merged again.
    assert has_lora(model)
    train(model, 7)
    torch.testing.assert_close(merge_lora(model)(volume()), model(volume()))
    assert not torch.allclose(merged(volume()), model(volume()))


@pytest.mark.parametrize("variant", ["SM", "MM"])
def test_cardiomm_starts_from_the_same_weights_with_and_without(variant: str) -> None:
    spec = ModelSpec(variant=variant, text_encoder="hashed")
    models = []
    for rank in (0, 2):
        torch.manual_seed(0)
        models.append(build_model(spec.model_copy(update={"lora_rank": rank})))
    plain, lora = models
    assert state_sha256(merge_lora(lora).state_dict()) == state_sha256(plain.state_dict())
    train(lora, 1)
    changed = merge_lora(lora).state_dict()
    same = [
        name for name, tensor in plain.state_dict().items() if torch.equal(tensor, changed[name])
    ]
    weights = {name for name, m in plain.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert set(same) == plain.state_dict().keys() - {f"{name}.weight" for name in weights}


def test_bundles_carry_factors_and_bases(tmp_path: Path) -> None:
    spec = ModelSpec(text_encoder="hashed", lora_rank=3)
    model = build_model(spec)
    train(model, 2)
    save_bundle(tmp_path / "lora.fedcmr", model.state_dict(), spec, {})
    bundle = load_bundle(tmp_path / "lora.fedcmr")
    assert bundle.spec == spec
    assert bundle.sha256 == state_sha256(model.state_dict())
    assert has_lora(bundle.model)
    found, expected = (merge_lora(m).state_dict() for m in (bundle.model, model))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_plain_weights_are_adopted_and_updates_begin_anew() -> None:
    state = {name: tensor + 1 for name, tensor in layers().state_dict().items()}
    plain, lora = layers(), updated(seed=7)
    adopt(plain, state)
    adopt(lora, state)
    assert all(torch.equal(plain.state_dict()[name], state[name]) for name in state)
    torch.testing.assert_close(lora(volume()), plain(volume()), rtol=0, atol=0)
    assert all(bool((factor == 0).all()) for factor in factors(lora))
    # Values are copied, not shared.
    assert torch.equal(plain[6].bias, layers()[6].bias + 1)


@pytest.mark.parametrize("model", [layers, updated])
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"6.bias": None}, "6.bias is missing"),
        ({"7.bias": torch.zeros(1)}, "7.bias is unknown"),
        ({"6.weight": torch.zeros(5, 7)}, r"6.weight is \[5, 7\], not \[5, 8\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused(model, change, problem) -> None:
    state = {k: v for k, v in {**layers().state_dict(), **change}.items() if v is not None}
    target = model()
    before = state_sha256(target.state_dict())
    with pytest.raises(ModelError, match=f"weights do not fit the model: {problem}"):
        adopt(target, state)
    assert state_sha256(target.state_dict()) == before


def test_models_that_cannot_have_updates_are_refused() -> None:
    with pytest.raises(ModelError, match=r"lora_rank 2: the model has low-rank updates already"):
        add_lora(updated(), 2)
    with pytest.raises(ModelError, match="has no linear or convolution layer"):
        add_lora(nn.Sequential(nn.PReLU()), 2)
