"""Networks that would carry one patient's data past the mechanism are refused.

Clipping and noise protect what gradients say. Whatever a forward pass writes into a network by
itself gets neither: running statistics of batch norms, codebooks that follow a moving average,
scalers fitted to the first batch. It leaves with the weights, and it makes the next patient's
gradient depend on this one's, so that leaving one patient out moves the sum by more than the
clip norm.

Two checks: :func:`refuse_carriers` looks at the network's layers and buffers before training, and
:class:`IsolatedEngine` compares its whole state before and after each private sum. Neither looks at
data, so a refusal tells nothing about patients.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, TypeVar

import torch
from torch import Tensor, nn

from fedcmr_shared.errors import JobRefused
from fedcmr_shared.privacy.mechanism import ClippedSum, Engine, Mechanism

Example = TypeVar("Example")

CONSTANTS: Final = "public_constants"
"""Attribute of a module's class: names of its buffers that never depend on data."""

_Fingerprint = tuple[object, ...]


def carriers(module: nn.Module) -> list[str]:
    """Return reasons, one line each, why ``module`` may carry data between patients; empty: none.

    A buffer is no carrier where the class of its module lists it in ``public_constants``.
    """
    return [
        f"{name or 'the module'} {reason}"
        for name, layer in module.named_modules()
        for reason in _reasons(layer)
    ]


def meets_patients(layer: nn.Module) -> bool:
    """Whether a layer of torch computes statistics over a batch or keeps them."""
    norms = nn.modules.batchnorm
    return isinstance(layer, norms._BatchNorm) or (
        isinstance(layer, norms._NormBase) and layer.track_running_stats
    )


def refuse_carriers(module: nn.Module) -> None:
    """Check the structure of a network before it sees patients.

    Raises:
        JobRefused: there is a carrier (code ``model``).
    """
    for reason in carriers(module):
        raise _refusal(f"{reason}: use a layer that treats each patient by itself")


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Let nothing inside the context change parameters, buffers or other numbers of ``module``.

    Raises:
        JobRefused: something did (code ``model``); the error comes when the context ends.
    """
    before = _fingerprints(module)
    yield
    after = _fingerprints(module)
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            raise _refusal(
                f"{name} changes while gradients are computed, past clipping and noise: train it "
                "by gradients, or freeze it after training on public data"
            )


class IsolatedEngine(Engine[Example]):
    """Another engine whose sums are refused if computing them changed the network's state.

    Args:
        engine: computes the sums.
        module: the network whose gradients they are.

    Raises:
        JobRefused: the network's structure carries data between patients (code ``model``).
    """

    def __init__(self, engine: Engine[Example], module: nn.Module) -> None:
        refuse_carriers(module)
        self.engine = engine
        self._module = module

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """See :class:`~fedcmr_shared.privacy.mechanism.Engine`."""
        return self.engine.parameters

    def clipped_sum(
        self, patients: Iterable[Sequence[Example]], mechanism: Mechanism
    ) -> ClippedSum:
        """See :class:`~fedcmr_shared.privacy.mechanism.Engine`.

        Raises:
            JobRefused: a pass changed the network's state.
        """
        with unchanged(self._module):
            return self.engine.clipped_sum(patients, mechanism)


def _reasons(layer: nn.Module) -> Iterator[str]:
    if meets_patients(layer):
        yield "computes statistics over several patients"
        return
    constants: frozenset[str] = getattr(type(layer), CONSTANTS, frozenset())
    for name, _ in layer.named_buffers(recurse=False):
        if name not in constants:
            yield (
                f"({type(layer).__name__}) keeps buffer {name}, which may hold what patients "
                f"taught it; if it is a public constant, list it in {CONSTANTS}"
            )


def _fingerprints(module: nn.Module) -> dict[str, _Fingerprint]:
    """Return a checksum of every tensor and the value of every number, by name."""
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    numbers: dict[str, _Fingerprint] = {}
    for path, layer in module.named_modules():
        for name, value in vars(layer).items():
            label = f"{path}.{name}" if path else name
            if isinstance(value, Tensor):
                tensors[label] = value
            elif isinstance(value, int | float) and not isinstance(value, bool):
                numbers[label] = (repr(value),)
    for label, tensor in tensors.items():
        numbers[label] = (tensor.shape, tensor.dtype, _checksum(tensor))
    return numbers


def _checksum(tensor: Tensor) -> int:
    """Return the sum of a tensor's bits, taken as integers: equal for equal tensors."""
    bits = tensor.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8)
    if len(bits) % 4 == 0:
        bits = bits.view(torch.int32)
    return int(bits.sum(dtype=torch.int64))


def _refusal(reason: str) -> JobRefused:
    return JobRefused("model", "isolation", reason)
