"""Masked autoregressive transformer over latents of cine clips: CPGG's generator.

Written from the descriptions in arXiv 2505.03426 and 2406.11838. Latents are cut into tokens; an
encoder sees the known tokens and the condition, a decoder gives each unknown token a context, and a
small diffusion network draws the token from it. At paper size 180 tokens of 320 numbers are drawn
in 16 steps.

Every random number of the loss is drawn for each patient by itself: how much is masked, in which
order, whether the condition is dropped, and the noise.

With ``attention`` *full* everything reads everything, as published. With *ordered* a known token
reads only the condition and the tokens known before it, and an unknown one what is known: then keys
and values of known tokens never change, are kept between decoding steps, and each step computes new
tokens only. Both have the same parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedcmr_shared.errors import ConfigurationError, ModelError
from fedcmr_shared.models.token_diffusion import (
    Method,
    Noised,
    TokenDiffusion,
    TokenDiffusionConfig,
)
from fedcmr_shared.models.token_transformer import Elements, Memory, Transformer, TransformerConfig

Attention = Literal["full", "ordered"]
Order = Literal["random", "raster"]
"""In which order tokens are decoded: drawn for each clip, or row by row."""

_MASK_MEAN: Final = 1.0  # of the normal distribution of the masked share, cut at 1
_MASK_DEVIATION: Final = 0.25
_INITIAL_DEVIATION: Final = 0.02


@dataclass(frozen=True)
class MaskedGeneratorConfig:
    """Everything that changes what the generator computes.

    ``latent_shape`` is (channels, frames, rows, columns), ``patch`` (frames, rows, columns).
    ``latent_scale`` multiplies latents: a public constant, 1 as published. ``least_masked`` is the
    least masked share in training; ``noises`` the draws of time and noise for each token.
    """

    latent_shape: tuple[int, int, int, int] = (16, 25, 12, 12)
    patch: tuple[int, int, int] = (5, 2, 2)
    conditions: int = 82
    width: int = 768
    heads: int = 12
    encoder_blocks: int = 12
    decoder_blocks: int = 12
    condition_tokens: int = 64
    dropout: float = 0.1
    diffusion: TokenDiffusionConfig = field(default_factory=TokenDiffusionConfig)
    attention: Attention = "full"
    latent_scale: float = 1.0
    least_masked: float = 0.7
    condition_drop: float = 0.1
    noises: int = 4

    def __post_init__(self) -> None:
        names = ("conditions", "encoder_blocks", "decoder_blocks", "condition_tokens", "noises")
        for name in names:
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} {getattr(self, name)} must be at least 1")
        if self.heads < 1 or self.width % self.heads:
            raise ConfigurationError(f"width {self.width} is not a multiple of {self.heads} heads")
        for size, part in zip(self.latent_shape[1:], self.patch, strict=True):
            if part < 1 or size % part:
                raise ConfigurationError(
                    f"latents of {size} are not a multiple of patches of {part}"
                )
        for name in ("dropout", "least_masked", "condition_drop"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigurationError(f"{name} {getattr(self, name)} must lie in [0, 1)")
        if self.attention not in get_args(Attention):
            raise ConfigurationError(f"attention {self.attention!r}: use full or ordered")
        if not self.latent_scale > 0:
            raise ConfigurationError(f"latent_scale {self.latent_scale} must be positive")

    @property
    def transformer(self) -> TransformerConfig:
        """Configuration of encoder and decoder, but for their depth."""
        ordered = self.attention == "ordered"
        return TransformerConfig(
            self.width, self.heads, self.dropout, self.condition_tokens, ordered
        )

    @property
    def grid(self) -> tuple[int, int, int]:
        """Number of tokens along frames, rows and columns."""
        frames, rows, columns = (
            size // part for size, part in zip(self.latent_shape[1:], self.patch, strict=True)
        )
        return frames, rows, columns

    @property
    def tokens(self) -> int:
        """Number of tokens of a clip."""
        return math.prod(self.grid)

    @property
    def token_width(self) -> int:
        """Numbers in a token."""
        return self.latent_shape[0] * math.prod(self.patch)


@dataclass(frozen=True)
class SamplingPlan:
    """How clips are drawn: it changes results, but needs no other weights.

    ``steps`` are decoding steps, ``diffusion_steps`` those of each token. ``guidance`` 1 follows
    the condition, 0 ignores it, more exaggerates it. ``reuse`` keeps keys and values where the
    network's attention is *ordered*; results are the same.

    Raises:
        ConfigurationError: a field is out of its range, or unknown.
    """

    steps: int = 16
    diffusion_steps: int = 100
    guidance: float = 3.0
    temperature: float = 1.0
    method: Method = "ancestral"
    order: Order = "random"
    reuse: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "diffusion_steps"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} {getattr(self, name)} must be at least 1")
        for name, kinds in (("method", Method), ("order", Order)):
            if getattr(self, name) not in get_args(kinds):
                known = ", ".join(get_args(kinds))
                raise ConfigurationError(f"{name} {getattr(self, name)!r} is unknown: use {known}")
        # Guidance below 0 would draw the opposite of what is asked for.
        for name in ("guidance", "temperature"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigurationError(
                    f"{name} {getattr(self, name):g} must be finite and not negative"
                )


PUBLISHED: Final = SamplingPlan()
"""16 decoding steps, 100 diffusion steps, guidance 3."""


class Draws(NamedTuple):
    """Public randomness of a loss: one row for each patient."""

    order: Tensor
    """Order in which tokens become known, ``[batch, tokens]``."""
    visible: Tensor
    """How many are known, ``[batch]``."""
    dropped: Tensor
    """Whose condition is dropped, bool ``[batch]``."""
    noised: Noised
    """Times ``[batch, noises, tokens]`` and noise with ``token_width`` more, in that order."""

    def to(self, like: Tensor) -> Draws:
        """Return the draws on the device of ``like``, the noise with its type."""
        device, (time, noise) = like.device, self.noised
        return Draws(
            self.order.to(device),
            self.visible.to(device),
            self.dropped.to(device),
            Noised(time.to(device), noise.to(like)),
        )


def draw(config: MaskedGeneratorConfig, batch: int, generator: torch.Generator) -> Draws:
    """Return new draws for ``batch`` patients, on the generator's device.

    The masked share has a normal distribution around 1, cut to [least_masked, 1].
    """
    device, tokens = generator.device, config.tokens

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64, device=device)

    order = uniform(batch, tokens).argsort(1)
    least = (config.least_masked - _MASK_MEAN) / _MASK_DEVIATION
    lowest = math.erf(least / math.sqrt(2))
    share = _MASK_MEAN + _MASK_DEVIATION * math.sqrt(2) * torch.erfinv(lowest * uniform(batch))
    masked = torch.ceil(tokens * share).long().clamp(1, tokens)
    dropped = uniform(batch) < config.condition_drop
    shape = (batch, config.noises, tokens)
    time = torch.randint(config.diffusion.steps, shape, generator=generator, device=device)
    noise = torch.randn(*shape, config.token_width, generator=generator, device=device)
    return Draws(order, tokens - masked, dropped, Noised(time, noise))


def patchify(latents: Tensor, patch: Sequence[int]) -> Tensor:
    """Cut latents ``[batch, channels, t, y, x]`` into tokens ``[batch, tokens, numbers]``.

    Tokens run over frames, rows and columns, the last one fastest.
    """
    batch, channels, *sizes = latents.shape
    t, y, x = (size // part for size, part in zip(sizes, patch, strict=True))
    cut = latents.reshape(batch, channels, t, patch[0], y, patch[1], x, patch[2])
    return cut.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, t * y * x, -1)


def unpatchify(tokens: Tensor, shape: Sequence[int], patch: Sequence[int]) -> Tensor:
    """Put tokens together to latents ``[batch, *shape]``; undoes :func:`patchify`."""
    grid = [size // part for size, part in zip(shape[1:], patch, strict=True)]
    cut = tokens.reshape(len(tokens), *grid, shape[0], *patch)
    return cut.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(len(tokens), *shape)


def known_counts(tokens: int, steps: int) -> list[int]:
    """Return how many tokens are known before the first and after each decoding step.

    After step k of K (from 1) floor(tokens · cos(pi k / 2K)) are unknown, but every step decodes at
    least one token and leaves one for each later step.

    Raises:
        ConfigurationError: there are more steps than tokens.
    """
    if not 1 <= steps <= tokens:
        raise ConfigurationError(f"{steps} decoding steps for {tokens} tokens: use 1 to {tokens}")
    counts = [0]
    for step in range(1, steps + 1):
        # Rounded, so that cos(pi / 3) leaves exactly half.
        unknown = math.floor(round(tokens * math.cos(math.pi * step / (2 * steps)), 9))
        counts.append(min(max(tokens - unknown, counts[-1] + 1), tokens - (steps - step)))
    return counts


class MaskedGenerator(nn.Module):
    """Encoder, decoder and token diffusion; conditions are rows of numbers without unit."""

    def __init__(self, config: MaskedGeneratorConfig) -> None:
        super().__init__()
        self.config = config
        width, places = config.width, config.condition_tokens + config.tokens
        self.condition = nn.Linear(config.conditions, width)
        self.no_condition = nn.Embedding(1, width)
        self.token = nn.Linear(config.token_width, width)
        self.token_norm = nn.LayerNorm(width)
        self.encoder_places = nn.Embedding(places, width)
        self.encoder = Transformer(config.transformer, config.encoder_blocks)
        self.between = nn.Linear(width, width)
        self.unknown = nn.Embedding(1, width)
        self.decoder_places = nn.Embedding(places, width)
        self.decoder = Transformer(config.transformer, config.decoder_blocks)
        self.diffusion_places = nn.Embedding(config.tokens, width)
        self.diffusion = TokenDiffusion(config.diffusion, config.token_width, width)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=_INITIAL_DEVIATION)

    def forward(self, latents: Tensor, conditions: Tensor, draws: Draws) -> Tensor:
        """Return :meth:`loss`, for gradient engines that wrap modules."""
        return self.loss(latents, conditions, draws)

    def loss(self, latents: Tensor, conditions: Tensor, draws: Draws) -> Tensor:
        """Return each patient's mean loss over its masked tokens ``[batch]``.

        Args:
            latents: ``[batch, *latent_shape]``.
            conditions: ``[batch, conditions]``.
            draws: see :func:`draw`; on any device.

        Raises:
            ModelError: shapes do not fit the model.
        """
        config = self.config
        self._check(conditions, latents)
        draws = draws.to(latents)
        tokens = patchify(latents * config.latent_scale, config.patch)
        tokens = tokens.gather(1, draws.order[..., None].expand_as(tokens))
        first = int(draws.visible.min())
        contexts = self._contexts(tokens, self._prefix(conditions, draws.dropped), draws, first)
        repeated = tokens[:, first:].repeat(1, config.noises, 1)
        time, noise = draws.noised
        losses = self.diffusion.loss(
            repeated,
            contexts.repeat(1, config.noises, 1),
            Noised(time[:, :, first:].flatten(1, 2), noise[:, :, first:].flatten(1, 2)),
        )
        losses = losses.reshape(len(losses), config.noises, -1).mean(1)
        index = torch.arange(first, config.tokens, device=latents.device)
        masked = index >= draws.visible[:, None]
        return (losses * masked).sum(1) / masked.sum(1)

    @torch.no_grad()
    def sample(
        self,
        conditions: Tensor,
        generators: Sequence[torch.Generator],
        plan: SamplingPlan = PUBLISHED,
    ) -> Tensor:
        """Return latents ``[batch, *latent_shape]``, each clip drawn by its own generator.

        A clip does not depend on the others of its batch. Use the network in evaluation mode. The
        generators are all on one device, of any kind.

        Raises:
            ModelError: there is not one generator for each row of ``conditions``.
        """
        config = self.config
        self._check(conditions)
        if len(generators) != len(conditions):
            raise ModelError(f"{len(generators)} generators for {len(conditions)} conditions")
        order = _orders(config.tokens, plan.order, generators).to(conditions.device)
        dropped = torch.zeros(len(conditions), dtype=torch.bool, device=conditions.device)
        prefixes = [self._prefix(conditions, dropped)]
        if plan.guidance != 1:
            prefixes.append(self._prefix(conditions, ~dropped))
        decoding = _Decoding(self, torch.cat(prefixes), order.repeat(len(prefixes), 1), plan.reuse)
        known = conditions.new_zeros(len(conditions), 0, config.token_width)
        for start, stop in pairwise(known_counts(config.tokens, plan.steps)):
            contexts = decoding.contexts(known.repeat(len(prefixes), 1, 1), stop).chunk(
                len(prefixes)
            )
            new = self.diffusion.sample(
                contexts[0],
                _normals(generators, (stop - start, config.token_width), conditions),
                plain=contexts[1] if len(contexts) > 1 else None,
                guidance=plan.guidance,
                steps=plan.diffusion_steps,
                method=plan.method,
                temperature=plan.temperature,
            )
            known = torch.cat([known, new], 1)
        tokens = torch.empty_like(known).scatter_(1, order[..., None].expand_as(known), known)
        return unpatchify(tokens, config.latent_shape, config.patch) / config.latent_scale

    def _prefix(self, conditions: Tensor, dropped: Tensor) -> Tensor:
        """Return the condition tokens ``[batch, condition_tokens, width]``."""
        none = self.no_condition(torch.zeros_like(dropped, dtype=torch.long))
        told = torch.where(dropped[:, None], none, self.condition(conditions))
        return told[:, None].expand(-1, self.config.condition_tokens, -1)

    def _encoder_input(self, prefix: Tensor, tokens: Tensor, order: Tensor) -> Tensor:
        x = torch.cat([prefix, self.token(tokens)], 1)
        embedded: Tensor = self.token_norm(x + self.encoder_places(self._places(order)))
        return embedded

    def _unknown(self, order: Tensor) -> Tensor:
        """Return decoder inputs of unknown tokens at the places ``order`` of the grid."""
        places = self.decoder_places(self.config.condition_tokens + order)
        inputs: Tensor = self.unknown(torch.zeros_like(order)) + places
        return inputs

    def _places(self, order: Tensor) -> Tensor:
        """Return rows of the tables of places: those of the condition tokens, then the tokens'."""
        count = self.config.condition_tokens
        ahead = torch.arange(count, device=order.device).repeat(len(order), 1)
        return torch.cat([ahead, count + order], 1)

    def _contexts(self, tokens: Tensor, prefix: Tensor, draws: Draws, first: int) -> Tensor:
        """Return contexts of the tokens from place ``first`` of the order on."""
        config, order = self.config, draws.order
        ahead, longest = config.condition_tokens, int(draws.visible.max())
        index = torch.arange(ahead + config.tokens, device=tokens.device)
        known = index < ahead + draws.visible[:, None]
        seen = self._encoder_input(prefix, tokens[:, :longest], order[:, :longest])
        inner = Elements(index[: ahead + longest], known[:, : ahead + longest])
        encoded = self.between(self.encoder(seen, inner))
        encoded = encoded + self.decoder_places(self._places(order[:, :longest]))
        encoded = F.pad(encoded, (0, 0, 0, config.tokens - longest))
        unknown = F.pad(self._unknown(order), (0, 0, ahead, 0))
        readable = known if config.attention == "ordered" else torch.ones_like(known)
        decoded = self.decoder(
            torch.where(known[..., None], encoded, unknown), Elements(index, readable)
        )
        return self._told(decoded[:, ahead + first :], order[:, first:])

    def _told(self, decoded: Tensor, order: Tensor) -> Tensor:
        contexts: Tensor = decoded + self.diffusion_places(order)
        return contexts

    def _check(self, conditions: Tensor, latents: Tensor | None = None) -> None:
        config = self.config
        if conditions.ndim != 2 or conditions.shape[1] != config.conditions:
            raise ModelError(
                f"conditions of shape {list(conditions.shape)}: give rows of {config.conditions}"
            )
        expected = (len(conditions), *config.latent_shape)
        if latents is not None and latents.shape != expected:
            raise ModelError(f"latents of shape {list(latents.shape)}: give {list(expected)}")


class _Decoding:
    """Contexts of a batch's next tokens, step by step."""

    def __init__(self, model: MaskedGenerator, prefix: Tensor, order: Tensor, reuse: bool) -> None:
        self._model, self._prefix, self._order = model, prefix, order
        self._ordered = model.config.attention == "ordered"
        self._memories: tuple[Memory, Memory] | None = None
        if reuse and self._ordered:
            blocks = (model.config.encoder_blocks, model.config.decoder_blocks)
            self._memories = (Memory(blocks[0]), Memory(blocks[1]))
        self._seen = 0

    def contexts(self, known: Tensor, stop: int) -> Tensor:
        """Return contexts of the tokens from ``known [batch, n, token_width]`` to ``stop``."""
        model, order, start = self._model, self._order, known.shape[1]
        ahead = model.config.condition_tokens
        # Elements that the memories hold; none without memories.
        seen, last = self._seen, stop if self._ordered else order.shape[1]
        encoder, decoder = self._memories or (None, None)
        inputs = model._encoder_input(self._prefix, known, order[:, :start])[:, seen:]
        encoded = model.encoder(inputs, self._elements(seen, ahead + start, start), encoder)
        places = model.decoder_places(model._places(order[:, :start]))[:, seen:]
        encoded = model.between(encoded) + places
        inputs = torch.cat([encoded, model._unknown(order[:, start:last])], 1)
        decoded = model.decoder(inputs, self._elements(seen, ahead + last, start), decoder)
        if self._memories is not None:
            self._seen = ahead + start
        first = ahead + start - seen
        return model._told(decoded[:, first : first + stop - start], order[:, start:stop])

    def _elements(self, first: int, last: int, known: int) -> Elements:
        index = torch.arange(first, last, device=self._order.device)
        readable = index < self._model.config.condition_tokens + known
        return Elements(index, (readable if self._ordered else torch.ones_like(readable))[None])


def _orders(tokens: int, order: Order, generators: Sequence[torch.Generator]) -> Tensor:
    if order == "raster":
        return torch.arange(tokens).repeat(len(generators), 1)
    return torch.stack([torch.randperm(tokens, generator=g, device=g.device) for g in generators])


def _normals(
    generators: Sequence[torch.Generator], shape: tuple[int, ...], like: Tensor
) -> Callable[[], Tensor]:
    """Return a function that draws ``[generators, *shape]``, each row by its own generator."""

    def draw() -> Tensor:
        rows = [torch.randn(shape, generator=g, device=g.device) for g in generators]
        return torch.stack(rows).to(like)

    return draw
