"""Known damage to clips: what a distance between sets of clips must notice, and what it means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import numpy as np
from scipy.ndimage import gaussian_filter

from fedcmr_shared.metrics.generation import Clip


def _blurred(clip: Clip, _: np.random.Generator) -> Clip:
    return gaussian_filter(clip, (0, 1, 1))


def _noisy(clip: Clip, rng: np.random.Generator) -> Clip:
    return clip + rng.normal(0, 0.2, clip.shape)


def _frozen(clip: Clip, _: np.random.Generator) -> Clip:
    return np.repeat(clip[:1], len(clip), axis=0)


def _shuffled(clip: Clip, rng: np.random.Generator) -> Clip:
    return clip[[0, *rng.permutation(np.arange(1, len(clip)))]]


def _mirrored(clip: Clip, _: np.random.Generator) -> Clip:
    return clip[:, :, ::-1]


DAMAGES: Final[Mapping[str, Callable[[Clip, np.random.Generator], Clip]]] = MappingProxyType(
    {
        "blurred": _blurred,
        "noisy": _noisy,
        "frozen": _frozen,
        "shuffled": _shuffled,
        "mirrored": _mirrored,
    }
)
"""Damage by name; each takes a clip ``[frame, y, x]`` in [-1, 1] and the source of its draws.

Noise has the deviation 0.2; shuffled frames keep end diastole in its place.
"""
