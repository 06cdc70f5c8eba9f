"""Diffusion of single tokens, each told by a context vector what it should be.

After Li et al., Autoregressive image generation without vector quantization (arXiv 2406.11838): a
small multilayer perceptron with adaptive layer norms predicts the noise of one token. Cosine
schedule and learned variance are those of Nichol and Dhariwal (arXiv 2102.09672), deterministic
steps those of Song et al. (DDIM, arXiv 2010.02502) and of Lu et al. (DPM-Solver++ of second order
with two steps of memory, arXiv 2211.01095).

Tokens keep their batch axis in all layers, as gradients of single patients need.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Final, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fedcmr_shared.errors import ConfigurationError

Method = Literal["ancestral", "ddim", "dpm"]
"""How to take a step back: with new noise, or one of two without."""

Prediction = Literal["noise", "velocity"]
"""What the last layer gives: the noise, as published, or sqrt(kept) · noise − spread · token."""

_TIME_FEATURES: Final = 256
_LONGEST_PERIOD: Final = 10_000.0
_OFFSET: Final = 0.008  # of the cosine schedule
_MOST_NOISE: Final = 0.999  # of one step
_LEAST_KEPT: Final = 4e-4  # share of the signal's variance where sampling begins
_MOST_GAIN: Final = 4.0  # reached by the last step alone


@dataclass(frozen=True)
class TokenDiffusionConfig:
    """Width and number of the residual blocks, the steps of the schedule, and what is predicted.

    A network that predicts *velocity* (Salimans and Ho, arXiv 2202.00512) need not pass a noisy
    token on to its output. That suits small networks and short training: where noise prevails,
    errors of the noise would become far larger ones of the token, those of the velocity do not.
    """

    width: int = 1024
    blocks: int = 3
    steps: int = 1000
    predicts: Prediction = "noise"

    def __post_init__(self) -> None:
        for name, least in (("width", 1), ("blocks", 1), ("steps", 2)):
            if getattr(self, name) < least:
                raise ConfigurationError(f"{name} {getattr(self, name)} must be at least {least}")
        if self.predicts not in get_args(Prediction):
            raise ConfigurationError(f"predicts {self.predicts!r}: use noise or velocity")


class Step(NamedTuple):
    """One step of a schedule; ``kept`` is the share of the signal's variance after it."""

    time: int
    kept: float
    kept_before: float

    @property
    def beta(self) -> float:
        """Variance of the noise that the step adds."""
        return 1 - self.kept / self.kept_before

    @property
    def posterior_variance(self) -> float:
        """Variance of the token before the step, given those after it and without any noise."""
        return self.beta * (1 - self.kept_before) / (1 - self.kept)

    @property
    def clean_weight(self) -> float:
        """Weight of the token without noise in the mean of that distribution."""
        return math.sqrt(self.kept_before) * self.beta / (1 - self.kept)

    @property
    def noisy_weight(self) -> float:
        """Weight of the token after the step in that mean."""
        return math.sqrt(1 - self.beta) * (1 - self.kept_before) / (1 - self.kept)


@lru_cache(maxsize=8)
def schedule(steps: int, used: int | None = None) -> tuple[Step, ...]:
    """Return the cosine schedule of ``steps`` steps, or ``used`` of them as longer steps.

    The used ones are evenly spaced, from half a space to where a fiftieth of the signal's
    amplitude is left. Beyond that, small errors of the network become huge ones of tokens, and
    there is no signal to gain.

    Raises:
        ConfigurationError: there are not so many steps before that place.
    """
    angles = (np.arange(steps + 1) / steps + _OFFSET) / (1 + _OFFSET) * np.pi / 2
    ideal = np.cos(angles) ** 2
    betas = np.minimum(1 - ideal[1:] / ideal[:-1], _MOST_NOISE)
    kept = np.cumprod(1 - betas)
    times = np.arange(steps)
    if used is not None:
        most = int((kept >= _LEAST_KEPT).sum())
        if not 1 <= used <= most:
            raise ConfigurationError(f"{used} of {steps} diffusion steps: use 1 to {most}")
        times = np.linspace(most - 1, (most - 1) / (2 * used), used)[::-1].round().astype(int)
    before = [1.0, *kept[times[:-1]].tolist()]
    return tuple(map(Step, times.tolist(), kept[times].tolist(), before))


class Noised(NamedTuple):
    """Public randomness of a loss: the time of each token ``[batch, n]`` and its noise."""

    time: Tensor
    noise: Tensor


class TokenDiffusion(nn.Module):
    """Noise predictor for tokens of ``token_width`` numbers under contexts of ``context_width``.

    Without training it predicts zero noise (or velocity), and a variance in the middle of its range.
    """

    def __init__(self, config: TokenDiffusionConfig, token_width: int, context_width: int) -> None:
        super().__init__()
        self.config = config
        self.token_width = token_width
        width = config.width
        self.time = nn.Sequential(
            nn.Linear(_TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.context = nn.Linear(context_width, width)
        self.token = nn.Linear(token_width, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = _zero(nn.Linear(width, 2 * width))
        self.out = _zero(nn.Linear(width, 2 * token_width))

    def forward(self, noisy: Tensor, time: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the noise in tokens, and where in its range the log-variance lies.

        Args:
            noisy: ``[..., token_width]``.
            time: number of the schedule's step, ``[...]``.
            context: ``[..., context_width]``.

        Returns:
            Two tensors like ``noisy``; the second is 0 at the least variance and 1 at the largest.
        """
        features = _time_features(time).to(noisy.dtype)
        told = F.silu(self.time(features) + self.context(context))
        x = self.token(noisy)
        for block in self.blocks:
            x = block(x, told)
        shift, scale = self.modulation(told).chunk(2, -1)
        noise, share = self.out(self.norm(x) * (1 + scale) + shift).chunk(2, -1)
        if self.config.predicts == "velocity":
            signal, spread = _columns(self.config.steps, time, noisy)[:2]
            noise = spread * noisy + signal * noise
        return noise, (share + 1) / 2

    def loss(self, tokens: Tensor, context: Tensor, noised: Noised) -> Tensor:
        """Return each token's squared error of the prediction plus its variational bound in bits.

        Both are means over a token's numbers. Only the variance learns from the bound. Of the first
        step the bound takes the second one's variance, which is not zero; in the last one, where
        the cut schedule would weigh the error a thousandfold, the weight is cut as well.

        Args:
            tokens: ``[batch, n, token_width]``.
            context: ``[batch, n, context_width]``.
            noised: times ``[batch, n]`` and noise like ``tokens``.
        """
        signal, spread, lowest, highest, gain = _columns(self.config.steps, noised.time, tokens)
        noise, share = self(signal * tokens + spread * noised.noise, noised.time, context)
        error = (noise - noised.noise).square()
        log_variance = lowest + share * (highest - lowest)
        bound = (
            log_variance - lowest + torch.exp(lowest - log_variance) - 1
        ) + gain * error.detach() * torch.exp(-log_variance)
        if self.config.predicts == "velocity":
            error = error / signal.square()
        each: Tensor = (error + bound / (2 * math.log(2))).mean(-1)
        return each

    def sample(
        self,
        context: Tensor,
        draw: Callable[[], Tensor],
        *,
        plain: Tensor | None = None,
        guidance: float = 1.0,
        steps: int = 100,
        method: Method = "ancestral",
        temperature: float = 1.0,
    ) -> Tensor:
        """Return one token for each context.

        Args:
            context: ``[batch, n, context_width]``.
            draw: returns new standard normal numbers ``[batch, n, token_width]``.
            plain: contexts that know no condition, like ``context``; None for no guidance.
            guidance: 1 follows ``context``, more moves further from ``plain``.
            steps: of the schedule's steps this many are taken.
            method: `ancestral` draws noise in each step but the last, the others never again.
            temperature: factor on the noise that `ancestral` steps draw.
        """

        def predict(x: Tensor, time: int) -> tuple[Tensor, Tensor]:
            if plain is None:
                return self.forward(x, _times(x, time), context)
            both = torch.cat([x, x])
            noise, share = self.forward(both, _times(both, time), torch.cat([context, plain]))
            told, untold = noise.chunk(2)
            return untold + guidance * (told - untold), share[: len(x)]

        x = draw()
        back = _back(method, draw, temperature)
        for step in reversed(schedule(self.config.steps, steps)):
            x = back(step, x, *predict(x, step.time))
        return x


class _Block(nn.Module):
    """Residual block with adaptive layer norm; the identity until its modulation is trained."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.modulation = _zero(nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(told).chunk(3, -1)
        hidden = F.silu(self.first(self.norm(x) * (1 + scale) + shift))
        correction: Tensor = gate * self.second(hidden)
        return x + correction


_Back = Callable[[Step, Tensor, Tensor, Tensor], Tensor]
"""Takes a step, the token after it, the predicted noise and variance; returns the token before."""


def _back(method: Method, draw: Callable[[], Tensor], temperature: float) -> _Back:
    if method == "ancestral":
        return partial(_ancestral, draw=draw, temperature=temperature)
    return _ddim if method == "ddim" else _Dpm()


def _ancestral(
    step: Step,
    x: Tensor,
    noise: Tensor,
    share: Tensor,
    draw: Callable[[], Tensor],
    temperature: float,
) -> Tensor:
    mean = step.clean_weight * _clean(step, x, noise) + step.noisy_weight * x
    if step.kept_before == 1:
        return mean
    low, high = math.log(step.posterior_variance), math.log(step.beta)
    deviation = torch.exp((low + share * (high - low)) / 2)
    return mean + temperature * deviation * draw()


def _ddim(step: Step, x: Tensor, noise: Tensor, share: Tensor) -> Tensor:
    signal, spread = math.sqrt(step.kept_before), math.sqrt(1 - step.kept_before)
    return signal * _clean(step, x, noise) + spread * noise


class _Dpm:
    """Extrapolates the clean token from the last two steps, linearly in log(signal / noise)."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, float] | None = None

    def __call__(self, step: Step, x: Tensor, noise: Tensor, share: Tensor) -> Tensor:
        clean = _clean(step, x, noise)
        if step.kept_before == 1:
            return clean
        here, there = _log_ratio(step.kept), _log_ratio(step.kept_before)
        ahead = clean
        if self._last is not None:
            earlier, before = self._last
            ahead = clean + (there - here) / (2 * (here - before)) * (clean - earlier)
        self._last = clean, here
        signal = math.sqrt(step.kept_before)
        shrink = math.sqrt((1 - step.kept_before) / (1 - step.kept))
        return shrink * x - signal * math.expm1(here - there) * ahead


def _clean(step: Step, x: Tensor, noise: Tensor) -> Tensor:
    return (x - math.sqrt(1 - step.kept) * noise) / math.sqrt(step.kept)


def _log_ratio(kept: float) -> float:
    return (math.log(kept) - math.log1p(-kept)) / 2


def _columns(steps: int, time: Tensor, like: Tensor) -> list[Tensor]:
    """Return the columns of the table at each ``time [...]``, as ``[..., 1]``."""
    return [torch.from_numpy(column).to(like)[time][..., None] for column in _table(steps)]


@lru_cache(maxsize=8)
def _table(steps: int) -> tuple[NDArray[np.float64], ...]:
    """Columns by time: signal, spread, least and largest log-variance, error of mean per noise."""
    line = schedule(steps)
    kept = np.array([step.kept for step in line])
    beta = np.array([step.beta for step in line])
    variance = np.array([step.posterior_variance for step in line])
    variance[0] = variance[1]
    weight = np.array([step.clean_weight for step in line])
    gain = np.minimum(weight**2 * (1 - kept) / kept, _MOST_GAIN)
    return np.sqrt(kept), np.sqrt(1 - kept), np.log(variance), np.log(beta), gain


def _times(x: Tensor, time: int) -> Tensor:
    return torch.full(x.shape[:-1], time, device=x.device)


def _time_features(time: Tensor) -> Tensor:
    """Return sines and cosines ``[..., 256]`` of geometric frequencies, as in Vaswani et al."""
    half = _TIME_FEATURES // 2
    powers = torch.arange(half, dtype=torch.float64, device=time.device) / half
    angles = time[..., None] * torch.exp(-math.log(_LONGEST_PERIOD) * powers)
    return torch.cat([angles.cos(), angles.sin()], -1)


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
