"""Transformer blocks over a sequence that becomes known piece by piece.

Attention is torch's ``scaled_dot_product_attention``. In *ordered* attention an element reads what
comes before it, so that keys and values of known elements never change and can be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the blocks, and who reads whom.

    The first ``ahead`` elements of a sequence read one another. Without ``ordered`` every element
    reads all that may be read.
    """

    width: int
    heads: int
    dropout: float
    ahead: int
    ordered: bool


class Elements(NamedTuple):
    """Elements of a sequence: condition tokens, then tokens in the order of becoming known."""

    place: Tensor
    """Places in the sequence ``[n]``."""
    readable: Tensor
    """Which may be read by others ``[batch or 1, n]``."""

    def after(self, other: Elements) -> Elements:
        """Return the elements of ``other``, then these."""
        return Elements(
            torch.cat([other.place, self.place]), torch.cat([other.readable, self.readable], 1)
        )


class _Kept:
    """Keys and values of a block for elements already seen; each pass returns and adds to them."""

    def __init__(self) -> None:
        self._pair: tuple[Tensor, Tensor] | None = None

    def with_new(self, keys: Tensor, values: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        """Return all keys and values, and keep the first ``keep`` of the new ones."""
        if self._pair is not None:
            keep += self._pair[0].shape[2]
            keys, values = (torch.cat(p, 2) for p in zip(self._pair, (keys, values), strict=True))
        self._pair = keys[:, :, :keep], values[:, :, :keep]
        return keys, values


class Memory:
    """What a transformer keeps between passes: keys and values of elements already seen."""

    def __init__(self, blocks: int) -> None:
        self.elements: Elements | None = None
        self.blocks = [_Kept() for _ in range(blocks)]


class Transformer(nn.Module):
    """``blocks`` pre-norm transformer blocks and a last norm."""

    def __init__(self, config: TransformerConfig, blocks: int) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(_Block(config) for _ in range(blocks))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor, elements: Elements, memory: Memory | None = None) -> Tensor:
        """Return features ``[batch, n, width]``.

        Args:
            x: inputs ``[batch, n, width]``; with a memory, those of new elements only.
            elements: what ``x`` stands for; with a memory, unreadable elements come last.
            memory: keeps keys and values of readable elements, which the next pass then reads.
        """
        keys, keep = elements, 0
        kept: Sequence[_Kept | None] = [None] * len(self.blocks)
        if memory is not None:
            kept, keep = memory.blocks, int(elements.readable[0].sum())
            keys = elements if memory.elements is None else elements.after(memory.elements)
            count = len(keys.place) - len(elements.place) + keep
            memory.elements = Elements(keys.place[:count], keys.readable[:, :count])
        mask = self._mask(elements, keys)
        for block, pair in zip(self.blocks, kept, strict=True):
            x = block(x, mask, pair, keep)
        normed: Tensor = self.norm(x)
        return normed

    def _mask(self, queries: Elements, keys: Elements) -> Tensor | None:
        """Return what may read what, bool ``[batch or 1, 1, queries, keys]``; None for all."""
        allowed = keys.readable[:, None]
        if self.config.ordered:
            # The condition tokens read one another.
            reach = queries.place.clamp(min=self.config.ahead - 1)
            allowed = allowed & (keys.place <= reach[:, None])
        elif bool(keys.readable.all()):
            return None
        return (allowed | (keys.place == queries.place[:, None]))[:, None]


class _Block(nn.Module):
    """Self-attention and a multilayer perceptron, each added to its input."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.width
        self.heads, self.dropout = config.heads, config.dropout
        self.attention_norm = nn.LayerNorm(width, eps=1e-6)
        self.attention = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.widening_norm = nn.LayerNorm(width, eps=1e-6)
        self.widening = nn.Linear(width, 4 * width)
        self.narrowing = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None, kept: _Kept | None, keep: int) -> Tensor:
        x = x + self._dropped(self._attend(self.attention_norm(x), mask, kept, keep))
        hidden = F.gelu(self.widening(self.widening_norm(x)))
        return x + self._dropped(self.narrowing(hidden))

    def _attend(self, x: Tensor, mask: Tensor | None, kept: _Kept | None, keep: int) -> Tensor:
        split = self.attention(x).unflatten(-1, (3, self.heads, -1))
        query, keys, values = split.permute(2, 0, 3, 1, 4)
        if kept is not None:
            keys, values = kept.with_new(keys, values, keep)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, keys, values, mask, dropout)
        out: Tensor = self.attention_out(mixed.transpose(1, 2).flatten(2))
        return out

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)
