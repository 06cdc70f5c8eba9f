"""CPGG as a whole: phenotypes in, clips out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from generator_parts import MICRO, SCALE, discs, generator_config, micro, seeded
from torch import Tensor, nn

from fedcmr_shared.errors import ConfigurationError, ModelError
from fedcmr_shared.models.bundle import load_bundle, save_bundle
from fedcmr_shared.models.cpgg import CONFIGS, CPGG, CPGGConfig
from fedcmr_shared.models.masked_generator import SamplingPlan, draw
from fedcmr_shared.models.registry import build_model
from fedcmr_shared.models.standardisation import Standardisation
from fedcmr_shared.models.token_diffusion import TokenDiffusionConfig
from fedcmr_shared.schemas.job import ModelSpec

PLAN = SamplingPlan(steps=2, diffusion_steps=3, method="dpm")


def test_published_sizes_fit_one_another() -> None:
    paper = CONFIGS["paper"]
    assert paper.video.latent_shape == paper.generator.latent_shape == (16, 25, 12, 12)
    assert len(paper.standardisation) == paper.generator.conditions == 82
    assert (paper.generator.tokens, paper.generator.token_width) == (180, 320)
    assert CONFIGS["small"].generator.tokens == 180
    assert CONFIGS["tiny"].generator.tokens == 18


def test_loss_is_that_of_the_generator_on_frozen_latents() -> None:
    model = micro()
    clips, phenotypes = discs(2, MICRO.video.clip)
    clips = clips.double()
    (generator,) = seeded(1)
    latents = model.autoencoder.encode(clips).sample(generator)
    draws = draw(MICRO.generator, 2, generator)
    expected = model.generator.loss(latents, SCALE.apply(phenotypes), draws)
    found = model.loss(clips, phenotypes, seeded(1)[0])
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert all(p.grad is None for p in model.autoencoder.parameters())
    assert all(p.grad is not None for p in model.generator.parameters())


def test_missing_phenotypes_count_as_the_priors_means() -> None:
    model = micro().eval()
    _, phenotypes = discs(2, MICRO.video.clip)
    phenotypes[:, 1] = math.nan
    filled = phenotypes.nan_to_num(SCALE.centres[1])
    first, second = (model.sample(rows, seeded(1, 2), PLAN) for rows in (phenotypes, filled))
    assert torch.equal(first, second)
    assert torch.isfinite(first).all()


def test_samples_are_clips_of_values_between_minus_one_and_one() -> None:
    model = micro().eval()
    with torch.no_grad():
        model.autoencoder.tail[-1].bias.fill_(1.0)
    clips = model.sample(discs(2, MICRO.video.clip)[1], seeded(1, 2), PLAN)
    assert clips.shape == (2, 1, *MICRO.video.clip)
    assert clips.max() == 1
    assert clips.min() >= -1


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="are not the generator's"):
        replace(MICRO, generator=generator_config(latent_shape=(2, 4, 8, 8), patch=(1, 4, 4)))
    with pytest.raises(ConfigurationError, match="82 phenotypes for a generator with 3 conditions"):
        replace(MICRO, standardisation=Standardisation.of_priors())


def test_weights_for_other_phenotypes_are_refused() -> None:
    other = CPGG(
        replace(MICRO, standardisation=Standardisation.of_priors(("RVEF", "LVM", "WT_AHA_1")))
    )
    with pytest.raises(ModelError, match=r"scale\.digest: the weights were trained with other"):
        other.load_state_dict(micro().state_dict())


@pytest.mark.parametrize("name", ["cpgg", "phenotype-vae"])
@pytest.mark.parametrize("rank", [0, 2])
def test_bundles_come_back_whole(tmp_path: Path, name: str, rank: int) -> None:
    spec = ModelSpec(name=name, lora_rank=rank)
    model = build_model(spec)
    save_bundle(tmp_path / "model.safetensors", model.state_dict(), spec, {})
    loaded = load_bundle(tmp_path / "model.safetensors")
    assert loaded.spec == spec
    for (key, value), (other, found) in zip(
        model.state_dict().items(), loaded.model.state_dict().items(), strict=True
    ):
        assert key == other
        assert torch.equal(value, found)


def test_a_missing_weight_is_refused() -> None:
    state = micro().state_dict()
    del state["generator.unknown.weight"]
    with pytest.raises(RuntimeError, match=r"generator\.unknown\.weight"):
        micro().load_state_dict(state)


def radius(clips: torch.Tensor) -> torch.Tensor:
    """Radius of the disc in the first frame, in half images."""
    lit = (clips[:, 0, 0] + 1) / 2
    return (lit.mean((1, 2)) * 4 / math.pi).sqrt()


def small() -> CPGG:
    """A network that learns discs in seconds."""
    video = replace(MICRO.video, widths=(8, 16))
    generator = generator_config(
        latent_shape=video.latent_shape,
        patch=(1, 4, 4),
        width=32,
        encoder_blocks=1,
        decoder_blocks=1,
        condition_tokens=2,
        diffusion=TokenDiffusionConfig(width=96, blocks=1, steps=200, predicts="velocity"),
        noises=4,
        latent_scale=0.55,
    )
    torch.manual_seed(0)
    return CPGG(CPGGConfig(video, generator, SCALE))


def train(
    parameters: list[nn.Parameter], rate: float, steps: int, loss: Callable[[Tensor], Tensor]
) -> None:
    """Train on random sixteen of 48 patients, whose numbers ``loss`` gets."""
    optimiser = torch.optim.AdamW(parameters, rate)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    (generator,) = seeded(0)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(torch.randint(48, (16,), generator=generator)).mean().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        decay.step()


def test_learns_to_draw_the_heart_that_the_phenotypes_ask_for() -> None:
    """Autoencoder first, then the generator: the measured size follows the one asked for."""
    model = small()
    clips, phenotypes = discs(48, model.config.video.clip)
    phenotypes = phenotypes.float()
    (generator,) = seeded(1)
    autoencoder = model.autoencoder.requires_grad_(True)
    train(
        list(autoencoder.parameters()), 1e-2, 100, lambda some: autoencoder(clips[some], generator)
    )
    autoencoder.requires_grad_(False)
    train(
        list(model.generator.parameters()),
        6e-3,
        250,
        lambda some: model.loss(clips[some], phenotypes[some], generator),
    )
    # All hearts, and guided: the order of sums, which differs with the number of threads, moves the
    # correlation of a few unguided draws by 0.25.
    plan = SamplingPlan(steps=4, diffusion_steps=20, guidance=3.0)
    drawn = model.eval().sample(phenotypes, seeded(*range(48)), plan)
    sizes = torch.stack([radius(clips), radius(drawn)])
    assert float(torch.corrcoef(sizes)[0, 1]) > 0.6
