"""The masked generator: sizes, masks, what its loss sees, and decoding."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from generator_parts import generator_config, moved, seeded
from torch import Tensor, nn

from fedcmr_shared.errors import ConfigurationError, ModelError
from fedcmr_shared.models import masked_generator
from fedcmr_shared.models.masked_generator import (
    Attention,
    Draws,
    MaskedGenerator,
    MaskedGeneratorConfig,
    SamplingPlan,
    draw,
    known_counts,
    patchify,
    unpatchify,
)
from fedcmr_shared.models.token_diffusion import TokenDiffusion, TokenDiffusionConfig

ATTENTIONS: tuple[Attention, ...] = ("full", "ordered")
PLAN = SamplingPlan(steps=5, diffusion_steps=4, guidance=2.0)


def network(attention: Attention = "full", *, weights: float = 0.2, **changes) -> MaskedGenerator:
    torch.manual_seed(0)
    model = MaskedGenerator(generator_config(attention, **changes))
    if weights:
        moved(model, weights)
    return model.double().eval()


def batch(model: MaskedGenerator, size: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Draws]:
    (generator,) = seeded(seed)
    shape = (size, *model.config.latent_shape)
    latents = torch.randn(shape, generator=generator, dtype=torch.float64)
    conditions = torch.randn(
        size, model.config.conditions, generator=generator, dtype=torch.float64
    )
    return latents, conditions, draw(model.config, size, generator)


def row(draws: Draws, index: int) -> Draws:
    one = slice(index, index + 1)
    noised = type(draws.noised)(*(part[one] for part in draws.noised))
    return Draws(*(part[one] for part in draws[:3]), noised)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# Size


def test_paper_size_is_the_published_one() -> None:
    with torch.device("meta"):
        model = MaskedGenerator(MaskedGeneratorConfig())
    assert model.config.grid == (5, 6, 6)
    assert (model.config.tokens, model.config.token_width) == (180, 320)
    assert count(model) == pytest.approx(193.3e6, rel=0.01)
    assert count(model.diffusion) == pytest.approx(20.9e6, rel=0.01)


def test_both_kinds_of_attention_have_the_same_parameters() -> None:
    full, ordered = network("full").state_dict(), network("ordered").state_dict()
    assert {n: t.shape for n, t in full.items()} == {n: t.shape for n, t in ordered.items()}


def test_only_layers_that_give_gradients_of_single_patients_hold_parameters() -> None:
    for module in network().modules():
        if list(module.parameters(recurse=False)):
            assert isinstance(module, nn.Linear | nn.LayerNorm | nn.Embedding)
    assert not list(network().buffers())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "width 16 is not a multiple of 3 heads"),
        ({"patch": (4, 2, 2)}, "latents of 6 are not a multiple of patches of 4"),
        ({"encoder_blocks": 0}, "encoder_blocks 0 must be at least 1"),
        ({"least_masked": 1.0}, r"least_masked 1.0 must lie in \[0, 1\)"),
        ({"attention": "causal"}, "attention 'causal': use full or ordered"),
        ({"latent_scale": 0.0}, "latent_scale 0.0 must be positive"),
    ],
)
def test_impossible_configurations_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        generator_config(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps 0 must be at least 1"),
        ({"method": "euler"}, "method 'euler' is unknown: use ancestral, ddim, dpm"),
        ({"order": "spiral"}, "order 'spiral' is unknown: use random, raster"),
        ({"guidance": math.nan}, "guidance nan must be finite and not negative"),
        ({"guidance": math.inf}, "guidance inf must be finite"),
        ({"guidance": -0.5}, "guidance -0.5 must be finite and not negative"),
        ({"temperature": -1.0}, "temperature -1 must be finite and not negative"),
        ({"temperature": math.inf}, "temperature inf must be finite"),
    ],
)
def test_impossible_plans_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SamplingPlan(**change)


# Tokens


def test_patches_come_back_and_hold_neighbours() -> None:
    shape, patch = (16, 25, 12, 12), (5, 2, 2)
    latents = torch.randn(2, *shape)
    tokens = patchify(latents, patch)
    assert tokens.shape == (2, 180, 320)
    assert torch.equal(unpatchify(tokens, shape, patch), latents)
    # Token 1 * 36 + 2 * 6 + 3 lies at frame 5, row 4, column 6.
    block = latents[:, :, 5:10, 4:6, 6:8].flatten(1)
    assert torch.equal(tokens[:, 51], block)


@pytest.mark.parametrize("steps", [1, 2, 16])
def test_published_share_of_tokens_stays_unknown(steps: int) -> None:
    counts = known_counts(180, steps)
    for step in range(1, steps):
        exact = 180 * math.cos(math.pi / 2 * step / steps)
        assert 180 - counts[step] == math.floor(exact + 1e-9)
    assert (counts[0], counts[-1]) == (0, 180)


@pytest.mark.parametrize("tokens", [1, 12, 180])
def test_every_step_decodes_a_token(tokens: int) -> None:
    for steps in range(1, tokens + 1):
        counts = known_counts(tokens, steps)
        assert len(counts) == steps + 1
        assert counts == sorted(set(counts))
        assert counts[-1] == tokens
    assert known_counts(tokens, tokens) == list(range(tokens + 1))


def test_more_steps_than_tokens_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="13 decoding steps for 12 tokens: use 1 to 12"):
        network().sample(torch.zeros(1, 3).double(), seeded(1), replace(PLAN, steps=13))


# Draws


def test_draws_differ_between_patients_and_follow_the_published_distribution() -> None:
    config = generator_config(latent_shape=(2, 50, 8, 4), patch=(1, 1, 1))  # 1,600 tokens
    config = replace(config, noises=1, width=16)
    draws = draw(config, 400, seeded(0)[0])
    masked = 1 - draws.visible / config.tokens
    assert masked.min() >= 0.7
    assert masked.max() <= 1
    assert len(set(draws.visible.tolist())) > 100
    # Mean of the normal distribution around 1 with deviation 0.25, cut to [0.7, 1].
    density = (1 - math.exp(-0.72)) / math.sqrt(2 * math.pi)
    expected = 1 - 0.25 * density / (math.erf(1.2 / math.sqrt(2)) / 2)
    assert float(masked.mean()) == pytest.approx(expected, abs=0.01)
    assert 20 < int(draws.dropped.sum()) < 65
    assert torch.equal(draws.order.sort(1).values, torch.arange(1600).expand(400, -1))
    assert len({tuple(order[:5].tolist()) for order in draws.order}) == 400
    assert int(draws.noised.time.max()) == config.diffusion.steps - 1


def test_equal_generators_give_equal_draws() -> None:
    first, second = (draw(generator_config(), 4, g) for g in seeded(5, 5))
    for one, other in zip((*first[:3], *first.noised), (*second[:3], *second.noised), strict=True):
        assert torch.equal(one, other)


# Loss


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_patients_loss_does_not_depend_on_the_others(attention: Attention) -> None:
    model = network(attention)
    latents, conditions, draws = batch(model, 4)
    assert len(set(draws.visible.tolist())) > 1
    together = model.loss(latents, conditions, draws)
    alone = [model.loss(latents[i : i + 1], conditions[i : i + 1], row(draws, i)) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_contexts_are_blind_to_masked_tokens(attention: Attention) -> None:
    """The loss moves with the masked tokens only through the tokens' own diffusion."""
    model = network(attention)
    latents, conditions, draws = batch(model, 1)
    tokens = patchify(latents, model.config.patch).requires_grad_()
    ordered = tokens.gather(1, draws.order[..., None].expand_as(tokens))
    visible = int(draws.visible[0])
    prefix = model._prefix(conditions, draws.dropped)
    contexts = model._contexts(ordered, prefix, draws, visible)
    (gradient,) = torch.autograd.grad(contexts.square().sum(), tokens)
    seen = {i for i in range(12) if bool(gradient[0, i].any())}
    assert seen == set(draws.order[0, :visible].tolist())


def test_dropped_condition_has_no_influence() -> None:
    model = network()
    latents, conditions, draws = batch(model, 2)
    draws = draws._replace(dropped=torch.tensor([True, False]))
    before = model.loss(latents, conditions, draws)
    after = model.loss(latents, conditions + 1, draws)
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_noises_are_averaged_within_a_patient() -> None:
    model = network(noises=3)
    latents, conditions, draws = batch(model, 2)
    single = MaskedGenerator(replace(model.config, noises=1)).double().eval()
    single.load_state_dict(model.state_dict())
    each = [
        single.loss(
            latents,
            conditions,
            draws._replace(
                noised=type(draws.noised)(*(part[:, i : i + 1] for part in draws.noised))
            ),
        )
        for i in range(3)
    ]
    torch.testing.assert_close(model.loss(latents, conditions, draws), sum(each) / 3)


def test_dropout_acts_in_training_only() -> None:
    model = network(dropout=0.3)
    inputs = batch(model)
    assert torch.equal(model.loss(*inputs), model.loss(*inputs))
    model.train()
    assert not torch.equal(model.loss(*inputs), model.loss(*inputs))


@pytest.mark.parametrize(
    ("latents", "conditions", "message"),
    [
        ((1, 2, 6, 4, 5), (1, 3), r"latents of shape \[1, 2, 6, 4, 5\]: give \[1, 2, 6, 4, 4\]"),
        ((2, 2, 6, 4, 4), (1, 3), r"latents of shape \[2, .*: give \[1, 2, 6, 4, 4\]"),
        ((1, 2, 6, 4, 4), (1, 4), r"conditions of shape \[1, 4\]: give rows of 3"),
    ],
)
def test_other_shapes_are_refused(latents: tuple, conditions: tuple, message: str) -> None:
    model = network()
    with pytest.raises(ModelError, match=message):
        model.loss(torch.zeros(latents), torch.zeros(conditions), batch(model, 1)[2])


# Decoding


class Recorder:
    """Notes which tokens each decoding step draws, and how often parts of a network run."""

    def __init__(self, model: MaskedGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[int] = []
        self.elements: list[int] = []
        self.evaluations = 0
        sample, forward = TokenDiffusion.sample, TokenDiffusion.forward

        def recorded(diffusion: TokenDiffusion, context: Tensor, *args, **options) -> Tensor:
            self.steps.append(context.shape[1])
            return sample(diffusion, context, *args, **options)

        def counted(diffusion: TokenDiffusion, *args) -> tuple[Tensor, Tensor]:
            self.evaluations += 1
            return forward(diffusion, *args)

        monkeypatch.setattr(TokenDiffusion, "sample", recorded)
        monkeypatch.setattr(TokenDiffusion, "forward", counted)
        model.encoder.register_forward_pre_hook(
            lambda _, inputs: self.elements.append(inputs[0].shape[1])
        )


def conditions(count: int = 2) -> Tensor:
    return torch.linspace(-1, 1, 3 * count, dtype=torch.float64).reshape(count, 3)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("order", ["random", "raster"])
def test_every_token_is_decoded_once_in_the_planned_steps(
    attention: Attention, order: masked_generator.Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(attention)
    recorder = Recorder(model, monkeypatch)
    model.sample(conditions(), seeded(1, 2), replace(PLAN, order=order))
    counts = known_counts(12, 5)
    assert recorder.steps == [after - before for before, after in pairwise(counts)]
    assert sum(recorder.steps) == 12
    assert recorder.evaluations == 5 * 4
    ahead = model.config.condition_tokens
    if attention == "full":  # condition tokens and everything known, each time
        assert recorder.elements == [ahead + known for known in counts[:-1]]
    else:  # what became known since the last time
        assert recorder.elements == [ahead, *recorder.steps[:-1]]


@pytest.mark.parametrize("order", ["random", "raster"])
def test_tokens_land_where_the_order_says(
    order: masked_generator.Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each drawn token is filled with its number in the order of drawing."""
    model, drawn = network(), iter(range(12))

    def numbered(_, context: Tensor, *args, **options) -> Tensor:
        rows = torch.tensor([[next(drawn)] for _ in range(context.shape[1])]).double()
        return rows.expand(len(context), -1, model.config.token_width)

    monkeypatch.setattr(TokenDiffusion, "sample", numbered)
    latents = model.sample(conditions(1), seeded(4), replace(PLAN, order=order))
    tokens = patchify(latents, model.config.patch)
    assert (tokens == tokens[..., :1]).all()
    found = tokens[0, :, 0].long().tolist()
    assert sorted(found) == list(range(12))
    assert (found == list(range(12))) == (order == "raster")


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("method", ["ancestral", "dpm"])
def test_a_clip_is_the_same_in_a_batch_and_alone(attention: Attention, method: str) -> None:
    model = network(attention)
    plan = replace(PLAN, method=method)
    together = model.sample(conditions(3), seeded(1, 2, 3), plan)
    for index in range(3):
        alone = model.sample(conditions(3)[index : index + 1], seeded(index + 1), plan)
        torch.testing.assert_close(together[index : index + 1], alone)
    again = model.sample(conditions(3), seeded(1, 2, 3), plan)
    assert torch.equal(together, again)
    assert not torch.allclose(together, model.sample(conditions(3), seeded(4, 5, 6), plan))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 5, 12])
def test_kept_keys_and_values_change_nothing(guidance: float, steps: int) -> None:
    model = network("ordered")
    plan = replace(PLAN, guidance=guidance, steps=steps)
    kept = model.sample(conditions(), seeded(1, 2), plan)
    anew = model.sample(conditions(), seeded(1, 2), replace(plan, reuse=False))
    torch.testing.assert_close(kept, anew, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_decoding_sees_the_contexts_of_training(attention: Attention) -> None:
    model = network(attention)
    latents, told, draws = batch(model, 2)
    draws = draws._replace(visible=torch.tensor([4, 4]), dropped=torch.zeros(2, dtype=torch.bool))
    tokens = patchify(latents, model.config.patch)
    tokens = tokens.gather(1, draws.order[..., None].expand_as(tokens))
    prefix = model._prefix(told, draws.dropped)
    trained = model._contexts(tokens, prefix, draws, 4)
    decoding = masked_generator._Decoding(model, prefix, draws.order, reuse=True)
    if attention == "ordered":  # what is kept came in two steps
        decoding.contexts(tokens[:, :0], 1)
        decoding.contexts(tokens[:, :1], 4)
    torch.testing.assert_close(decoding.contexts(tokens[:, :4], 12), trained)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_guidance_one_is_the_condition_and_other_guidance_is_not(attention: Attention) -> None:
    model = network(attention)
    plain = model.sample(conditions(), seeded(1, 2), replace(PLAN, guidance=1.0))
    nearly = model.sample(conditions(), seeded(1, 2), replace(PLAN, guidance=1 + 1e-12))
    torch.testing.assert_close(nearly, plain)
    more = model.sample(conditions(), seeded(1, 2), replace(PLAN, guidance=3.0))
    assert not torch.allclose(more, plain, rtol=1e-3)
    none = replace(PLAN, guidance=0.0, method="ddim")
    ignored = model.sample(conditions(), seeded(1, 2), none)
    torch.testing.assert_close(model.sample(conditions() + 1, seeded(1, 2), none), ignored)


def test_one_generator_for_each_clip() -> None:
    with pytest.raises(ModelError, match="1 generators for 2 conditions"):
        network().sample(conditions(2), seeded(1), PLAN)


def test_latent_scale_is_undone() -> None:
    """A network of scale s sees s times the latents and gives 1/s of its tokens."""
    model = network()
    latents, told, draws = batch(model)
    scaled = MaskedGenerator(replace(model.config, latent_scale=4.0)).double().eval()
    scaled.load_state_dict(model.state_dict())
    torch.testing.assert_close(
        scaled.loss(latents / 4, told, draws), model.loss(latents, told, draws)
    )
    torch.testing.assert_close(
        4 * scaled.sample(conditions(), seeded(1, 2), PLAN),
        model.sample(conditions(), seeded(1, 2), PLAN),
    )


# Learning


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_learns_two_clips_by_heart_and_tells_them_by_condition(attention: Attention) -> None:
    torch.manual_seed(0)
    diffusion = TokenDiffusionConfig(width=64, blocks=2, steps=100, predicts="velocity")
    model = MaskedGenerator(generator_config(attention, width=32, noises=4, diffusion=diffusion))
    first, second = seeded(3, 0)
    latents = torch.randn(2, *model.config.latent_shape, generator=first).repeat(6, 1, 1, 1, 1)
    told = torch.tensor([[1.0, 0, 0], [-1, 0, 0]]).repeat(6, 1)
    optimiser = torch.optim.AdamW(model.parameters(), 4e-3)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=220)
    for _ in range(220):
        optimiser.zero_grad()
        model.loss(latents, told, draw(model.config, len(latents), second)).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        decay.step()
    plan = SamplingPlan(steps=6, diffusion_steps=10, guidance=1.0)
    found = model.eval().sample(told[:4], seeded(1, 2, 3, 4), plan)
    other = latents[1] - latents[0]
    error = float((found - latents[:4]).square().mean() / other.square().mean())
    assert error < 0.15
