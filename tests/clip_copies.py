"""Clips of beating rings, each before a chest of its own, and what copies of them may look like."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

FRAMES, SIDE = 12, 32


def different_hearts(count: int, seed: int = 0) -> Tensor:
    """Clips ``[count, 1, FRAMES, SIDE, SIDE]`` in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)

    def between(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(count, generator=generator))[:, None, None, None]

    phase = torch.sin(torch.pi * torch.arange(FRAMES) / FRAMES) ** 2
    cavity = between(0.25, 0.45) * (1 - between(0.15, 0.45) * phase[:, None, None])
    y, x = torch.linspace(-1, 1, SIDE)[:, None], torch.linspace(-1, 1, SIDE)
    distance = ((y - between(-0.1, 0.1)) ** 2 + (x - between(-0.1, 0.1)) ** 2).sqrt()
    blood = torch.sigmoid((cavity - distance) * 25)
    wall = torch.sigmoid((cavity + between(0.1, 0.2) - distance) * 25)
    coarse = torch.rand(count, 1, 6, 6, generator=generator)
    chest = F.interpolate(coarse, (SIDE, SIDE), mode="bicubic", align_corners=False)
    image = (0.8 * chest * (1 - wall) + 0.15 * (wall - blood) + 0.9 * blood).clamp(0, 1)
    return (2 * image - 1)[:, None]


def turned(clips: Tensor, degrees: float) -> Tensor:
    """Clips turned in the image plane; outside, the edge goes on."""
    count, _, frames = clips.shape[:3]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = torch.tensor([[cos, -sin, 0], [sin, cos, 0]]).expand(count * frames, 2, 3)
    images = clips.reshape(count * frames, 1, *clips.shape[3:])
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return moved.reshape(clips.shape)


def noisy(clips: Tensor, deviation: float, seed: int = 0) -> Tensor:
    noise = torch.randn(clips.shape, generator=torch.Generator().manual_seed(seed))
    return (clips + deviation * noise).clamp(-1, 1)
