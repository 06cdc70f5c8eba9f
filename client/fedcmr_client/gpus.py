"""Which GPUs a task of a site gets: jobs that train side by side share none."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.schemas.policy import SitePolicy


class Gpus:
    """Lends GPUs to tasks, ``per_task`` to each at a time.

    ``names`` are written as in CUDA_VISIBLE_DEVICES.

    Raises:
        ConfigurationError: there are fewer than one task needs, or one is named twice.
    """

    def __init__(self, names: Sequence[str], per_task: int) -> None:
        if len(set(names)) != len(names):
            raise ConfigurationError(f"gpus: {', '.join(names)}: name each GPU once")
        if len(names) < per_task:
            raise ConfigurationError(
                f"processes: the policy asks for {per_task} GPUs and the agent has {len(names)} "
                f"({', '.join(names) or 'none'}): correct `processes` in the policy or `gpus` in "
                "agent.yaml"
            )
        self.names = tuple(names)
        self._per_task = per_task
        self._free = list(names)
        self._changed = threading.Condition()

    @contextmanager
    def lent(self) -> Iterator[tuple[str, ...]]:
        """Wait until enough are free; they are nobody else's while inside."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._free) >= self._per_task)
            taken = tuple(self._free[: self._per_task])
            del self._free[: self._per_task]
        try:
            yield taken
        finally:
            with self._changed:
                self._free = [name for name in self.names if name in {*self._free, *taken}]
                self._changed.notify_all()


def gpus_of(policy: SitePolicy, chosen: Sequence[int] | None) -> Gpus | None:
    """Return the GPUs of a site: the ``chosen`` ones or all that are visible; None on a CPU.

    Raises:
        ConfigurationError: there is none, or there are too few.
    """
    if policy.device == "cpu":
        return None
    import torch

    if not torch.cuda.is_available():
        raise ConfigurationError(
            "device: the policy says cuda, but torch finds no GPU: install the driver or write cpu"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else map(str, range(torch.cuda.device_count()))
    return Gpus(tuple(names if chosen is None else map(str, chosen)), policy.processes)
