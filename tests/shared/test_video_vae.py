"""The autoencoder of clips."""

from __future__ import annotations

import pytest
import torch
from generator_parts import VIDEO, discs, moved, seeded
from torch import nn

from fedcmr_shared.errors import ConfigurationError, ModelError
from fedcmr_shared.models.video_vae import Posterior, VideoVAE, VideoVAEConfig


def network(config: VideoVAEConfig = VIDEO, **options: bool) -> VideoVAE:
    torch.manual_seed(0)
    model = VideoVAE(config, **options)
    moved(model, 0.05)
    return model


def clips(count: int = 2) -> torch.Tensor:
    return discs(count, VIDEO.clip)[0].double()


def test_paper_size_has_the_published_latents() -> None:
    config = VideoVAEConfig()
    assert config.clip == (50, 96, 96)
    assert config.latent_shape == (16, 25, 12, 12)
    with torch.device("meta"):
        model = VideoVAE(config)
        posterior = model.encode(torch.empty(1, 1, 50, 96, 96))
        assert posterior.mean.shape == (1, 16, 25, 12, 12)
        assert model.decode(posterior.mean).shape == (1, 1, 50, 96, 96)


def test_layers_know_one_clip_at_a_time_and_keep_nothing() -> None:
    model = network()
    assert not list(model.buffers())
    for module in model.modules():
        if list(module.parameters(recurse=False)):
            assert isinstance(module, nn.Conv3d | nn.GroupNorm)
    together = model.decode(model.encode(clips(3)).mean)
    for index in range(3):
        alone = model.decode(model.encode(clips(3)[index : index + 1]).mean)
        torch.testing.assert_close(alone, together[index : index + 1])


def test_posterior_is_a_normal_distribution() -> None:
    mean, log_variance = torch.randn(2, 1, 2, 3, 3), torch.randn(2, 1, 2, 3, 3)
    posterior = Posterior(mean, log_variance)
    normal = torch.distributions.Normal(mean, torch.exp(log_variance / 2))
    standard = torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(normal, standard).flatten(1).sum(1)
    torch.testing.assert_close(posterior.divergence(), expected)
    (generator,) = seeded(0)
    drawn = torch.stack([posterior.sample(generator) for _ in range(4000)])
    torch.testing.assert_close(drawn.mean(0), mean, atol=0.15, rtol=0)
    torch.testing.assert_close(drawn.std(0), normal.stddev, rtol=0.06, atol=0)


def test_loss_is_error_plus_divergence_of_each_clip() -> None:
    model = network(VideoVAEConfig(**{**vars(VIDEO), "kl_weight": 0.5}))
    posterior = model.encode(clips())
    (generator,) = seeded(4)
    decoded = model.decode(posterior.sample(generator))
    expected = (decoded - clips()).abs().mean((1, 2, 3, 4)) + posterior.divergence() / 2
    torch.testing.assert_close(model.loss(clips(), seeded(4)[0]), expected)


def test_recomputing_changes_no_gradient() -> None:
    plain, thrifty = network(), network(recompute=True)
    for model in (plain, thrifty):
        model.loss(clips(), seeded(1)[0]).mean().backward()
    for one, other in zip(plain.parameters(), thrifty.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_learns_clips_by_heart() -> None:
    torch.manual_seed(0)
    model = VideoVAE(VideoVAEConfig(**{**vars(VIDEO), "widths": (8, 16), "latents": 4}))
    shown, _ = discs(4, VIDEO.clip)
    (generator,) = seeded(0)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(120):
        optimiser.zero_grad()
        model.loss(shown, generator).mean().backward()
        optimiser.step()
    with torch.no_grad():
        error = (model.decode(model.encode(shown).mean) - shown).abs().mean()
    flat = (shown.mean() - shown).abs().mean()
    assert float(error / flat) < 0.15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strides": ()}, "0 strides for 2 widths: give one less"),
        ({"widths": (4, 9)}, "width 9 is not a multiple of 2 groups"),
        ({"clip": (5, 16, 16)}, "clip: 5 frames are not a multiple of 2"),
        ({"blocks": 0}, "blocks and latents must be at least 1"),
    ],
)
def test_impossible_configurations_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        VideoVAEConfig(**{**vars(VIDEO), **change})


def test_other_clips_are_refused() -> None:
    with pytest.raises(ModelError, match=r"clips of shape \[1, 4, 16, 8\]: give \[1, 4, 16, 16\]"):
        network().encode(clips()[..., :8])
