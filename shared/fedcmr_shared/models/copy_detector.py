"""A network that recognises a clip again after it was mirrored, turned, shifted or blurred.

After Dar et al., *Unconditional latent diffusion models memorize patient imaging data* (Nature
Biomedical Engineering 2025, arXiv 2402.01054), written from its description: a convolutional
encoder maps a clip to 32 numbers, and a contrastive loss pulls a clip and its altered self together
and pushes different clips apart. Two clips are then compared by the Pearson correlation of their
numbers.

A detector is a function of the patients that it was trained on, and no noise protects it: it is
trained where they are, used there, and forgotten. It must see training clips alone. Had it seen the
held-out ones too, it would hold those further from the training clips than any new clip, and every
generator would look like a copier.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedcmr_shared.errors import ConfigurationError, DataError

SIZE: Final = (8, 32, 32)
"""Frames, rows and columns that the network sees of every clip."""

_MIRRORS: Final = ((), (-2,), (-1,), (-2, -1))
_TURNS: Final = tuple(math.radians(degrees) for degrees in (-8, 0, 8))
_HIDDEN: Final = 128
_GROUPS: Final = 4
_BATCH: Final = 64

_TURN: Final = math.radians(20)
_PLAIN_TURN: Final = math.radians(8)
_ZOOM: Final = 0.06
_SHIFT: Final = 0.08  # of the field of view
_GAMMA: Final = 0.2
_NOISE: Final = 0.1


@dataclass(frozen=True)
class CopyDetectorConfig:
    """The network's first width and its outputs, and how it is trained.

    ``batch`` counts clips, each of which enters twice.
    """

    width: int = 16
    embedding: int = 32
    steps: int = 300
    batch: int = 32
    learning_rate: float = 2e-3
    temperature: float = 0.1

    def __post_init__(self) -> None:
        least = {"width": _GROUPS, "embedding": 2, "steps": 1, "batch": 2}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in least and value < least[field.name]:
                raise ConfigurationError(
                    f"{field.name} {value} must be at least {least[field.name]}"
                )
            if not 0 < value < math.inf:
                raise ConfigurationError(f"{field.name} {value} must be positive")
        if self.width % _GROUPS:
            raise ConfigurationError(f"width {self.width} is not a multiple of {_GROUPS}")


class CopyDetector(nn.Module):
    """Encoder of clips ``[n, 1, frames, rows, columns]``; no layer meets two clips at once.

    Time is a circle: the first frame follows the last, and where a beat begins hardly matters.
    """

    def __init__(self, config: CopyDetectorConfig) -> None:
        super().__init__()
        width = config.width
        self.features = nn.Sequential(
            _Layer(1, width, (1, 2, 2)),
            _Layer(width, 2 * width, (2, 2, 2)),
            _Layer(2 * width, 4 * width, (1, 2, 2)),
        )
        places = (SIZE[1] // 8) * (SIZE[2] // 8)
        self.head = nn.Sequential(
            nn.Linear(4 * width * places, _HIDDEN), nn.SiLU(), nn.Linear(_HIDDEN, config.embedding)
        )

    def forward(self, views: Tensor) -> Tensor:
        """Return embeddings ``[n, embedding]`` of what :func:`viewed` returned."""
        means = views.mean((1, 2, 3, 4), keepdim=True)
        deviations = views.std((1, 2, 3, 4), keepdim=True).clamp_min(1e-6)
        found: Tensor = self.head(self.features((views - means) / deviations).mean(2).flatten(1))
        return found

    @torch.inference_mode()
    def embed(self, clips: Tensor) -> Tensor:
        """Return embeddings ``[n, embedding]``, the same for a clip and its mirror images.

        They are means over these and over three turns by a few degrees.
        """
        return torch.cat([self._mean(some) for some in torch.split(viewed(clips), _BATCH)])

    def _mean(self, views: Tensor) -> Tensor:
        turned = [_moved(views, _turn(torch.full((len(views),), turn))) for turn in _TURNS]
        shown = [each.flip(axes) for each in turned for axes in _MIRRORS]
        return torch.stack([self(each) for each in shown]).mean(0)


class _Layer(nn.Module):
    """Convolution that wraps around in time, group norm, activation."""

    def __init__(self, inputs: int, outputs: int, stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.convolution = nn.Conv3d(inputs, outputs, 3, stride=stride, padding=(0, 1, 1))
        self.norm = nn.GroupNorm(_GROUPS, outputs)

    def forward(self, x: Tensor) -> Tensor:
        around = F.pad(x, (0, 0, 0, 0, 1, 1), mode="circular")
        return F.silu(self.norm(self.convolution(around)))


def viewed(clips: Tensor) -> Tensor:
    """Return clips ``[n, 1, frames, rows, columns]`` at the size that the network sees."""
    return F.adaptive_avg_pool3d(clips, SIZE)


def correlations(first: Tensor, second: Tensor) -> Tensor:
    """Return Pearson's correlation ``[n, m]`` of each row of one with each row of the other."""
    centred = [each - each.mean(1, keepdim=True) for each in (first, second)]
    one, other = (F.normalize(each, dim=1) for each in centred)
    return one @ other.T


def altered(views: Tensor, generator: torch.Generator) -> Tensor:
    """Return each clip ``[n, 1, frames, rows, columns]`` in [-1, 1] as a copy might show it.

    Mirrored along either axis of the image, turned by up to 20 degrees, shifted and zoomed a
    little, begun at another phase of the beat, with other contrast, blurred and with noise: the
    last three are what a generator's decoder does.
    """
    count = len(views)

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(count, *shape, generator=generator) - 1

    moved = _begun_later(_moved(views, _maps(uniform(6))), generator)
    each = (1, 1, 1, 1)
    bright = ((moved + 1) / 2).clamp(0, 1) ** torch.exp(_GAMMA * uniform(*each))
    blurred = F.avg_pool3d(bright, (1, 3, 3), 1, (0, 1, 1), count_include_pad=False)
    mixed = torch.lerp(bright, blurred, uniform(*each).abs())
    noise = torch.randn(views.shape, generator=generator)
    return 2 * mixed - 1 + _NOISE * uniform(*each).abs() * noise


def plainly_copied(clips: Tensor, generator: torch.Generator) -> Tensor:
    """Return what a detector must find: each clip ``[n, 1, frames, rows, columns]``, hardly altered.

    Mirrored or not, turned by up to 8 degrees, begun at another phase of the beat, and noisy.
    """
    views = viewed(clips)
    turn, *mirrors = 2 * torch.rand(3, len(views), generator=generator) - 1
    maps = _turn(_PLAIN_TURN * turn)
    maps[:, :, :2] *= torch.stack(mirrors, 1)[:, None].sign()
    moved = _begun_later(_moved(views, maps), generator)
    noise = torch.randn(views.shape, generator=generator)
    return (moved + _NOISE * noise).clamp(-1, 1)


def _begun_later(views: Tensor, generator: torch.Generator) -> Tensor:
    count, _, frames = views.shape[:3]
    starts = torch.randint(frames, (count,), generator=generator)
    order = (starts[:, None] + torch.arange(frames)) % frames
    return views[torch.arange(count)[:, None], :, order].transpose(1, 2)


def _maps(draws: Tensor) -> Tensor:
    """Affine maps ``[n, 2, 3]`` of the image plane from draws ``[n, 6]`` in [-1, 1]."""
    maps = _turn(_TURN * draws[:, 0]) * (1 + _ZOOM * draws[:, 1, None, None])
    maps[:, :, :2] *= draws[:, 2:4, None].sign()
    maps[:, :, 2] = 2 * _SHIFT * draws[:, 4:6]
    return maps


def _turn(angles: Tensor) -> Tensor:
    """Affine maps ``[n, 2, 3]`` that turn the image plane by ``angles [n]`` in radians."""
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    return torch.stack([cos, -sin, zero, sin, cos, zero], 1).reshape(-1, 2, 3)


def _moved(views: Tensor, maps: Tensor) -> Tensor:
    """Return each clip with all its frames moved by its map; the edge goes on outside."""
    count, _, frames = views.shape[:3]
    images = views.transpose(1, 2).flatten(0, 1)
    grid = F.affine_grid(maps.repeat_interleave(frames, 0), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return moved.reshape(count, frames, *images.shape[1:]).transpose(1, 2)


def contrastive_loss(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Return NT-Xent (Chen et al., ICML 2020) of two embeddings ``[n, embedding]`` of n clips."""
    both = torch.cat([first, second])
    likeness = correlations(both, both) / temperature
    likeness = likeness.masked_fill(torch.eye(len(both), dtype=torch.bool), -math.inf)
    partners = torch.arange(len(both)).roll(len(first))
    return F.cross_entropy(likeness, partners)


def train_detector(
    clips: Tensor, config: CopyDetectorConfig, generator: torch.Generator
) -> CopyDetector:
    """Train on clips ``[n, 1, frames, rows, columns]`` in [-1, 1], one of each patient.

    Equal arguments give equal weights: all that is random comes from ``generator``.

    Raises:
        DataError: there are fewer than two clips.
    """
    if len(clips) < 2:
        raise DataError(f"{len(clips)} clips teach no difference: give at least 2")
    views = viewed(clips)
    seed = int(torch.randint(2**31, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the layers' first weights come from the global generator
        model = CopyDetector(config)
    optimiser = torch.optim.Adam(model.parameters(), config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.steps)
    for _ in range(config.steps):
        some = views[torch.randperm(len(views), generator=generator)[: config.batch]]
        first, second = (model(altered(some, generator)) for _ in range(2))
        optimiser.zero_grad()
        loss = contrastive_loss(first, second, config.temperature)
        loss.backward()  # type: ignore[no-untyped-call]  # torch is partly untyped
        optimiser.step()
        schedule.step()
    return model.eval()
