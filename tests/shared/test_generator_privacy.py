"""Generators under the private step: every trained part moves by at most the clip norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from generator_parts import MICRO, SCALE, discs, generator_config, micro, moved, seeded
from torch import Tensor, nn

from fedcmr_shared.models.lora import add_lora
from fedcmr_shared.models.masked_generator import Draws, MaskedGenerator, draw
from fedcmr_shared.models.phenotype_vae import PhenotypeVAE, PhenotypeVAEConfig
from fedcmr_shared.models.registry import model_entry
from fedcmr_shared.models.token_diffusion import Noised
from fedcmr_shared.privacy.engines import engine_for
from fedcmr_shared.privacy.mechanism import Engine, Mechanism
from fedcmr_shared.privacy.parts import freeze, trainable_names
from fedcmr_shared.privacy.per_example import PerExampleEngine
from fedcmr_shared.schemas.job import ModelSpec, Part

CLIP = 1e-3
PATIENTS = 4
CASES: list[tuple[str, Part]] = [
    *(("cpgg", part) for part in ("full", "decoder", "adapters", "prompts", "lora")),
    *(("phenotype-vae", part) for part in ("full", "decoder", "adapters", "lora")),
]


class Example(NamedTuple):
    clip: Tensor
    phenotypes: Tensor
    seed: int


def examples(count: int) -> list[list[Example]]:
    """Two examples of each patient, with random numbers of their own."""
    clips, phenotypes = discs(2 * count, MICRO.video.clip)
    rows = [Example(*row) for row in zip(clips.double(), phenotypes, range(2 * count), strict=True)]
    return [rows[i : i + 2] for i in range(0, 2 * count, 2)]


def loss_of(module: nn.Module) -> Callable[[Sequence[Example]], Tensor]:
    def loss(some: Sequence[Example]) -> Tensor:
        rows = []
        for clip, phenotypes, seed in some:
            (generator,) = seeded(seed)
            inputs = (phenotypes[None],)
            if hasattr(module, "autoencoder"):
                inputs = (clip[None], *inputs)
            rows.append(module.loss(*inputs, generator))
        return torch.cat(rows)

    return loss


def engine(name: str, part: Part) -> tuple[nn.Module, list[str], Engine[Example]]:
    model: nn.Module = micro()
    if name == "phenotype-vae":
        config = PhenotypeVAEConfig(standardisation=SCALE, hidden=8, latents=2)
        model = moved(PhenotypeVAE(config), 0.3)
    rank = 2 if part == "lora" else 0
    spec = ModelSpec(name=name, lora_rank=rank)
    if rank:
        add_lora(model, rank, model_entry(name).updated)
        model.double()
    names = trainable_names(spec, model, part)
    parameters = freeze(model, names)
    return model, names, engine_for("backward", model, parameters, loss_of, synthetic=list)


@pytest.mark.parametrize(("name", "part"), CASES)
def test_leaving_a_patient_out_moves_the_sum_by_the_clip_norm_at_most(
    name: str, part: Part
) -> None:
    _, _, summing = engine(name, part)
    everybody, mechanism = examples(PATIENTS), Mechanism(CLIP, 1.0, 1.0)
    total = summing.clipped_sum(everybody, mechanism)
    assert (total.patients, total.non_finite) == (PATIENTS, 0)
    for gone in range(PATIENTS):
        others = everybody[:gone] + everybody[gone + 1 :]
        move = (total.vector - summing.clipped_sum(others, mechanism).vector).norm()
        # These patients' gradients are longer than the clip norm: the bound is reached.
        assert float(move) == pytest.approx(CLIP, rel=1e-6)
    assert total.clipped == PATIENTS


@pytest.mark.parametrize(("name", "part"), CASES)
def test_a_private_sum_changes_nothing_and_reaches_the_part_only(name: str, part: Part) -> None:
    model, names, summing = engine(name, part)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    total = summing.clipped_sum(examples(PATIENTS), Mechanism(1e9, 1.0, 1.0))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert len(total.tensors) == len(names)
    idle = [key for key, t in zip(names, total.tensors, strict=True) if not t.any()]
    assert idle == []  # every named parameter learns


def test_conditions_are_dropped_for_each_patient_by_itself() -> None:
    """Of a batch some lose their condition; whether one does depends on nobody else."""
    config = generator_config(condition_drop=0.5)
    dropped = draw(config, 64, seeded(0)[0]).dropped
    assert 16 < int(dropped.sum()) < 48
    model = moved(MaskedGenerator(config)).eval()
    latents = torch.randn(1, *config.latent_shape).double().expand(8, -1, -1, -1, -1)
    draws = draw(config, 1, seeded(1)[0])
    same = Draws(
        *(part.expand(8, *part.shape[1:]) for part in draws[:3]),
        Noised(*(part.expand(8, *part.shape[1:]) for part in draws.noised)),
    )._replace(dropped=torch.arange(8) % 2 == 0)
    losses = model.loss(latents, torch.ones(8, 3).double(), same)
    assert torch.allclose(losses[::2], losses[0])
    assert torch.allclose(losses[1::2], losses[1])
    assert not torch.allclose(losses[0], losses[1])


# Batched gradients of single patients


class Drawn(NamedTuple):
    latents: Tensor
    condition: Tensor
    draws: Draws


def drawn(count: int) -> list[Drawn]:
    config = generator_config()
    (generator,) = seeded(0)
    rows = []
    for _ in range(count):
        latents = torch.randn(config.latent_shape, generator=generator, dtype=torch.float64)
        condition = torch.randn(3, generator=generator, dtype=torch.float64)
        draws = draw(config, 1, generator)
        noised = Noised(draws.noised.time, draws.noised.noise.double())
        rows.append(Drawn(latents, condition, draws._replace(noised=noised)))
    return rows


def batched_loss(module: nn.Module) -> Callable[[Sequence[Drawn]], Tensor]:
    def loss(some: Sequence[Drawn]) -> Tensor:
        draws = [row.draws for row in some]
        parts = [torch.cat(rows) for rows in zip(*(d[:3] for d in draws), strict=True)]
        noised = Noised(*(torch.cat(r) for r in zip(*(d.noised for d in draws), strict=True)))
        return module(
            torch.stack([row.latents for row in some]),
            torch.stack([row.condition for row in some]),
            Draws(*parts, noised),
        )

    return loss


@pytest.mark.parametrize("attention", ["full", "ordered"])
def test_hooks_give_exact_gradients_of_single_patients(attention: str) -> None:
    torch.manual_seed(0)
    model = MaskedGenerator(generator_config(attention))  # type: ignore[arg-type]  # one of both
    some = drawn(4)
    assert len({int(row.draws.visible) for row in some}) > 1
    parameters = list(model.parameters())
    hooks = PerExampleEngine(model, parameters, batched_loss, mode="hooks")
    hooks.check_exact(some)
