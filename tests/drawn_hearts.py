"""Drawn hearts: clips in which the packaged segmenter finds a ventricle whose motion is known."""

import math

import numpy as np

PIXEL_MM = 3.0


def drawn_heart(
    radius_mm: float = 24.0, shortening: float = 0.2, frames: int = 8, seed: int = 0
) -> np.ndarray:
    """A clip ``[frames, 48, 48]`` in [-1, 1]; the cavity's radius shrinks by ``shortening``."""
    y, x = (np.mgrid[:48, :48] - 23.5) * PIXEL_MM
    wall_mm = 9.0
    grain = np.random.default_rng(seed).normal(0, 0.02, x.shape)
    clip = np.empty((frames, *x.shape), np.float32)
    for frame in range(frames):
        inner = radius_mm * (1 - shortening * math.sin(math.pi * frame / frames) ** 2)
        outer = math.sqrt(inner**2 + (radius_mm + wall_mm) ** 2 - radius_mm**2)
        image = np.full_like(x, 0.3)
        for brightness, distance in (
            (0.9, np.hypot(x + inner + wall_mm, y) - 1.2 * radius_mm),
            (0.2, np.hypot(x, y) - outer),
            (1.0, np.hypot(x, y) - inner),
        ):
            inside = 1 / (1 + np.exp(distance / 1.2))
            image = image * (1 - inside) + brightness * inside
        clip[frame] = 2 * (image + grain) - 1
    return clip.clip(-1, 1)


def drawn_hearts(count: int, seed: int, frames: int = 8) -> list[np.ndarray]:
    """Hearts of different size and motion."""
    rng = np.random.default_rng(seed)
    return [
        drawn_heart(rng.uniform(20, 30), rng.uniform(0.1, 0.3), frames, seed=1000 * seed + index)
        for index in range(count)
    ]
