"""Token diffusion: its schedule, what its loss teaches, and its samplers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from generator_parts import moved, seeded
from torch import Tensor

from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.models.token_diffusion import (
    Method,
    Noised,
    TokenDiffusion,
    TokenDiffusionConfig,
    schedule,
)

CONFIG = TokenDiffusionConfig(width=16, blocks=2, steps=100)
METHODS: tuple[Method, ...] = ("ancestral", "ddim", "dpm")


def network(config: TokenDiffusionConfig = CONFIG, token: int = 3, context: int = 5):
    torch.manual_seed(0)
    return TokenDiffusion(config, token, context).double()


def normals(shape: tuple[int, ...], seed: int = 0) -> Callable[[], Tensor]:
    (generator,) = seeded(seed)
    return lambda: torch.randn(shape, generator=generator, dtype=torch.float64)


# The schedule


def test_published_schedule_destroys_the_signal_step_by_step() -> None:
    line = schedule(1000)
    kept = [step.kept for step in line]
    assert len(line) == 1000
    assert kept == sorted(kept, reverse=True)
    # Half of the amplitude is gone in the middle: cos(pi / 4)^2 = 1/2, up to the small offset.
    assert kept[499] == pytest.approx(0.5, abs=0.02)
    assert kept[-1] < 1e-8
    assert max(step.beta for step in line) == pytest.approx(0.999)


@pytest.mark.parametrize("used", [1, 7, 10, 100, 900])
def test_respaced_steps_are_the_same_process(used: int) -> None:
    full, line = schedule(1000), schedule(1000, used)
    assert len(line) == used
    assert len({step.time for step in line}) == used
    for step in line:
        assert step.kept == full[step.time].kept
    assert line[0].kept_before == 1.0
    assert math.prod(1 - step.beta for step in line) == pytest.approx(line[-1].kept)


def test_weights_of_the_posterior_are_those_of_bayes_rule() -> None:
    for step in schedule(1000, 10)[1:]:
        # Precision-weighted mean of the prior N(sqrt(kept_before) x, 1 - kept_before) and the step.
        precision = 1 / (1 - step.kept_before) + (1 - step.beta) / step.beta
        assert step.posterior_variance == pytest.approx(1 / precision)
        prior = math.sqrt(step.kept_before) / (1 - step.kept_before) / precision
        likelihood = math.sqrt(1 - step.beta) / step.beta / precision
        assert step.clean_weight == pytest.approx(prior)
        assert step.noisy_weight == pytest.approx(likelihood)


@pytest.mark.parametrize("used", [0, 99])
def test_impossible_numbers_of_steps_are_refused(used: int) -> None:
    with pytest.raises(ConfigurationError, match=f"{used} of 100 diffusion steps: use 1 to 98"):
        schedule(100, used)


@pytest.mark.parametrize("field", ["width", "blocks", "steps"])
def test_empty_networks_are_refused(field: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{field} 0 must be at least"):
        TokenDiffusionConfig(**{field: 0})
    with pytest.raises(ConfigurationError, match="predicts 'token': use noise or velocity"):
        TokenDiffusionConfig(predicts="token")  # type: ignore[arg-type]


# The network


def test_untrained_network_predicts_zero_noise_and_the_middle_variance() -> None:
    noise, share = network()(
        torch.randn(2, 4, 3).double(), torch.randint(100, (2, 4)), torch.randn(2, 4, 5).double()
    )
    assert not noise.any()
    assert (share == 0.5).all()


def test_tokens_do_not_meet() -> None:
    model = moved(network())
    noisy, context = torch.randn(2, 4, 3).double(), torch.randn(2, 4, 5).double()
    time = torch.randint(100, (2, 4))
    together, _ = model(noisy, time, context)
    alone, _ = model(noisy[1, 2], time[1, 2], context[1, 2])
    torch.testing.assert_close(together[1, 2], alone)


def test_loss_is_the_squared_error_plus_a_bound_that_no_mean_learns_from() -> None:
    """The bound equals the KL divergence of two normal distributions, computed by torch."""
    model = moved(network())
    line = schedule(100)
    tokens, context = torch.randn(1, 6, 3).double(), torch.randn(1, 6, 5).double()
    noised = Noised(torch.tensor([[1, 5, 20, 50, 80, 95]]), torch.randn(1, 6, 3).double())
    found = model.loss(tokens, context, noised)
    for index, time in enumerate(noised.time[0].tolist()):
        step = line[time]
        clean, eps = tokens[0, index], noised.noise[0, index]
        noisy = math.sqrt(step.kept) * clean + math.sqrt(1 - step.kept) * eps
        predicted, share = model(noisy, torch.tensor(time), context[0, index])
        guess = (noisy - math.sqrt(1 - step.kept) * predicted) / math.sqrt(step.kept)
        low, high = math.log(step.posterior_variance), math.log(step.beta)
        truth = torch.distributions.Normal(
            step.clean_weight * clean + step.noisy_weight * noisy,
            math.sqrt(step.posterior_variance),
        )
        belief = torch.distributions.Normal(
            step.clean_weight * guess + step.noisy_weight * noisy,
            torch.exp((low + share * (high - low)) / 2),
        )
        divergence = torch.distributions.kl_divergence(truth, belief).mean() / math.log(2)
        expected = (predicted - eps).square().mean() + divergence
        torch.testing.assert_close(found[0, index], expected)


def test_no_step_outweighs_the_others() -> None:
    model, generator = network(TokenDiffusionConfig(width=4, blocks=1), 4, 2), seeded(0)[0]
    time = torch.arange(1000)[None]
    noise = torch.randn(1, 1000, 4, generator=generator, dtype=torch.float64)
    losses = model.loss(
        torch.zeros_like(noise), torch.zeros(1, 1000, 2).double(), Noised(time, noise)
    )
    assert losses.max() < 12
    assert losses.min() > 0


def test_velocity_is_another_name_for_the_noise() -> None:
    """Its loss is the squared error of the velocity; the bound stays that of the noise."""
    torch.manual_seed(0)
    model = TokenDiffusion(replace(CONFIG, predicts="velocity"), 3, 5)
    moved(model)
    tokens, context = torch.randn(1, 4, 3).double(), torch.randn(1, 4, 5).double()
    noised = Noised(torch.tensor([[1, 30, 70, 98]]), torch.randn(1, 4, 3).double())
    kept = torch.tensor([schedule(100)[t].kept for t in noised.time[0]]).double()[:, None]
    noisy = kept.sqrt() * tokens + (1 - kept).sqrt() * noised.noise
    noise, _ = model(noisy, noised.time, context)
    velocity = (noise - (1 - kept).sqrt() * noisy) / kept.sqrt()
    truth = kept.sqrt() * noised.noise - (1 - kept).sqrt() * tokens
    extra = model.loss(tokens, context, noised) - (velocity - truth).square().mean(-1)
    plain = TokenDiffusion(CONFIG, 3, 5).double()
    plain.forward = model.forward  # type: ignore[method-assign]
    bound = plain.loss(tokens, context, noised) - (noise - noised.noise).square().mean(-1)
    torch.testing.assert_close(extra, bound)


@pytest.mark.parametrize("method", METHODS)
def test_untrained_velocity_does_not_explode(method: Method) -> None:
    model = TokenDiffusion(TokenDiffusionConfig(8, 1, predicts="velocity"), 3, 5).double()
    tokens = model.sample(
        torch.zeros(1, 500, 5).double(), normals((1, 500, 3)), steps=20, method=method
    )
    assert float(tokens.detach().std()) < 2


# Sampling

MEAN, DEVIATION = 1.0, 0.5


class Exact(TokenDiffusion):
    """Predicts the noise that is expected when tokens are normal with MEAN and DEVIATION."""

    def forward(self, noisy: Tensor, time: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        kept = torch.tensor([s.kept for s in schedule(self.config.steps)]).to(noisy)[time][
            ..., None
        ]
        mean = MEAN * context[..., :1]
        variance = kept * DEVIATION**2 + 1 - kept
        noise = (1 - kept).sqrt() * (noisy - kept.sqrt() * mean) / variance
        return noise, torch.zeros_like(noisy)


def drawn(method: Method, steps: int, seed: int = 0, **options) -> Tensor:
    model = Exact(TokenDiffusionConfig(width=1, blocks=1), 1, 1)
    context = torch.ones(1, 20_000, 1, dtype=torch.float64)
    return model.sample(
        context, normals((1, 20_000, 1), seed), steps=steps, method=method, **options
    )


@pytest.mark.parametrize("method", METHODS)
def test_an_exact_network_gives_the_distribution(method: Method) -> None:
    tokens = drawn(method, 100)
    assert float(tokens.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(tokens.std()) == pytest.approx(DEVIATION, rel=0.05)


def test_fewer_steps_cost_little_with_the_second_order_method() -> None:
    """Walks without new noise scale the first noise: that is the truth for normal tokens."""
    noise = normals((1, 20_000, 1))()
    model = Exact(TokenDiffusionConfig(width=1, blocks=1), 1, 1)

    def error(method: Method, steps: int) -> float:
        found = model.sample(torch.zeros_like(noise), lambda: noise, steps=steps, method=method)
        return float((found - DEVIATION * noise).abs().mean())

    assert error("ddim", 10) > error("ddim", 20) > error("ddim", 50)
    for steps in (10, 20, 50):
        assert error("dpm", steps) < min(error("ddim", steps) / 2, 0.01)


def test_any_number_of_steps_gives_as_many_different_ones() -> None:
    for used in range(1, 99):
        line = schedule(100, used)
        assert [step.time for step in line] == sorted({step.time for step in line})
        assert len(line) == used
        assert line[-1].kept >= 4e-4


def test_only_ancestral_steps_draw_again_and_temperature_shrinks_their_noise() -> None:
    counts = {}
    for method in METHODS:
        draw, calls = normals((1, 4, 3)), []

        def counted(draw=draw, calls=calls) -> Tensor:
            calls.append(1)
            return draw()

        network().sample(torch.zeros(1, 4, 5).double(), counted, steps=7, method=method)
        counts[method] = len(calls)
    assert counts == {"ancestral": 7, "ddim": 1, "dpm": 1}
    cold = drawn("ancestral", 50, temperature=0.5)
    assert float(cold.std()) < 0.8 * DEVIATION


@pytest.mark.parametrize("method", METHODS)
def test_guidance_one_follows_the_context_and_zero_the_plain_one(method: Method) -> None:
    model = moved(network())
    told, untold = torch.randn(2, 2, 4, 5, generator=seeded(1)[0]).double()

    def sample(context: Tensor, plain: Tensor | None, guidance: float) -> Tensor:
        return model.sample(
            context, normals((2, 4, 3)), plain=plain, guidance=guidance, steps=5, method=method
        )

    torch.testing.assert_close(sample(told, untold, 1.0), sample(told, None, 1.0))
    # The means are those of the plain contexts; `ancestral` takes its variance from the told ones.
    if method != "ancestral":
        torch.testing.assert_close(sample(told, untold, 0.0), sample(untold, None, 1.0))
    assert not torch.allclose(sample(told, untold, 3.0), sample(told, None, 1.0), rtol=1e-3)


def test_guidance_moves_the_mean_beyond_the_condition() -> None:
    """With contexts 1 and 0 a guidance of 2 is expected at about twice the mean."""
    model = Exact(TokenDiffusionConfig(width=1, blocks=1), 1, 1)
    context = torch.ones(1, 2000, 1, dtype=torch.float64)
    tokens = model.sample(
        context,
        normals((1, 2000, 1)),
        plain=torch.zeros_like(context),
        guidance=2.0,
        steps=50,
        method="dpm",
    )
    assert float(tokens.mean()) == pytest.approx(2 * MEAN, rel=0.05)


def test_learns_which_token_belongs_to_a_context() -> None:
    torch.manual_seed(1)
    model = TokenDiffusion(TokenDiffusionConfig(width=48, blocks=2, steps=100), 2, 4)
    contexts = torch.eye(4)
    wanted = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    (generator,) = seeded(2)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(250):
        which = torch.randint(4, (1, 256), generator=generator)
        noised = Noised(
            torch.randint(100, (1, 256), generator=generator),
            torch.randn(1, 256, 2, generator=generator),
        )
        optimiser.zero_grad()
        model.loss(wanted[which], contexts[which], noised).mean().backward()
        optimiser.step()
    with torch.no_grad():
        tokens = model.sample(
            contexts.repeat(1, 16, 1),
            lambda: torch.randn(1, 64, 2, generator=generator),
            steps=25,
            method="ancestral",
        )
    assert float((tokens - wanted.repeat(16, 1)).abs().mean()) < 0.25
