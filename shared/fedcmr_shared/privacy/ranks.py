"""The processes that share one site's private step, one for each of its GPUs.

Rank 0 decides everything random: who is drawn and the noise. The others compute gradients.
`torchrun` starts the processes; see :func:`joined`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Protocol

import torch
from torch import Tensor
from torch import distributed as dist


class Ranks(Protocol):
    """The processes that take a step together; all call each method in the same order."""

    @property
    def index(self) -> int:
        """Number of this process, from 0."""

    @property
    def count(self) -> int:
        """Number of processes."""

    def add_up(self, tensor: Tensor) -> None:
        """Replace ``tensor`` by its sum over all ranks."""

    def spread(self, tensor: Tensor) -> None:
        """Replace ``tensor`` by that of rank 0."""


class _Alone:
    index: Final = 0
    count: Final = 1

    def add_up(self, tensor: Tensor) -> None:
        pass

    def spread(self, tensor: Tensor) -> None:
        pass


ALONE: Final[Ranks] = _Alone()
"""A site that computes in one process."""


class TorchRanks:
    """The ranks of torch's default process group, which must exist."""

    @property
    def index(self) -> int:
        """See :class:`Ranks`."""
        return dist.get_rank()

    @property
    def count(self) -> int:
        """See :class:`Ranks`."""
        return dist.get_world_size()

    def add_up(self, tensor: Tensor) -> None:
        """See :class:`Ranks`."""
        dist.all_reduce(tensor)

    def spread(self, tensor: Tensor) -> None:
        """See :class:`Ranks`."""
        dist.broadcast(tensor, src=0)


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Join the processes that `torchrun` started, or be alone when it did not start this one.

    ``device`` is this rank's own; CUDA devices talk by NCCL, all others by Gloo. A rank that fails
    makes `torchrun` end the others, so no half of a step is ever released.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield TorchRanks()
    finally:
        dist.destroy_process_group()
