"""Low-rank updates of linear and convolution layers, for training with noise.

A layer's weight becomes W + B·A, reshaped. W keeps the starting weights. A is random, public and
never trained; B starts at zero and is all that is trained. After Sun et al., Improving LoRA in
privacy-preserving federated learning (arXiv 2403.12313): with A fixed, the mean of the sites' B is
the mean of their updates, and noise enters the weights linearly instead of through a product of
two noisy factors.

The rows of A are orthonormal, so that an update of the weight is as long as that of B: clipping
norm and noise mean the same as in full training, in fewer dimensions.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar, Final

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedcmr_shared.errors import ModelError

_LAYERS: Final = (nn.Linear, nn.Conv2d, nn.Conv3d)
# What torch calls the parts of a parametrised weight in a state.
_ORIGINAL: Final = "parametrizations.weight.original"
_UPDATE: Final = "parametrizations.weight.0."


class LowRankUpdate(nn.Module):
    """Adds ``factor @ basis`` to a weight [out, ...]: factor [out, rank], basis [rank, inputs]."""

    public_constants: ClassVar[frozenset[str]] = frozenset({"basis"})
    basis: Tensor  # a buffer, which mypy cannot see

    def __init__(self, weight: Tensor, rank: int, name: str) -> None:
        super().__init__()
        inputs = weight[0].numel()
        # Full rank at the latest with one row for each input.
        basis = _orthonormal_rows(min(rank, inputs), inputs, name)
        self.register_buffer("basis", basis.to(weight))
        self.factor = nn.Parameter(weight.new_zeros(len(weight), len(basis)))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the updated weight."""
        return weight + (self.factor @ self.basis).reshape(weight.shape)


def add_lora(
    model: nn.Module, rank: int, belongs: Callable[[str], bool] = lambda name: True
) -> None:
    """Give linear and convolution layers a low-rank update; only these remain trainable.

    All of them, or those for whose name ``belongs`` is true.

    Outputs stay the same until an update is trained. The bases depend on ``rank`` and the layers'
    names only, not on torch's random state, and are part of the model's state.

    Raises:
        ModelError: the model has no such layer, or has low-rank updates already.
    """
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, _LAYERS) and belongs(name)
    ]
    if not layers or has_lora(model):
        reason = "has low-rank updates already" if layers else "has no linear or convolution layer"
        raise ModelError(f"model.lora_rank {rank}: the model {reason}")
    model.requires_grad_(False)
    for name, layer in layers:
        update = LowRankUpdate(layer.weight.detach(), rank, name)
        parametrize.register_parametrization(layer, "weight", update)


def has_lora(model: nn.Module) -> bool:
    """Whether any layer of ``model`` has a low-rank update."""
    return any(True for _ in _updated_layers(model))


def is_factor(name: str) -> bool:
    """Whether a parameter of this name is the trained factor of a low-rank update."""
    return name.endswith(f"{_UPDATE}factor")


def merge_lora(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` with all updates added into plain weights; outputs are equal."""
    merged = copy.deepcopy(model)
    for layer in list(_updated_layers(merged)):
        weight = layer.weight.detach().clone()
        # torch's own removal also changes the class, which copies of a layer share.
        layer.__class__ = type(layer).__bases__[0]
        del layer.parametrizations
        layer.weight = nn.Parameter(weight)
    return merged


def adopt(model: nn.Module, plain_state: Mapping[str, Tensor]) -> None:
    """Load the state of a plain model into ``model``; if that has updates, they become zero.

    Raises:
        ModelError: names or shapes of the state do not fit. The model is unchanged then.
    """
    places = {_plain_name(name): name for name in model.state_dict() if _UPDATE not in name}
    expected = model.state_dict()
    for name in sorted(places.keys() ^ plain_state.keys()):
        problem = "missing" if name in places else "unknown"
        raise ModelError(f"weights do not fit the model: {name} is {problem}")
    for name, place in places.items():
        if plain_state[name].shape != expected[place].shape:
            found, wanted = list(plain_state[name].shape), list(expected[place].shape)
            raise ModelError(f"weights do not fit the model: {name} is {found}, not {wanted}")
    model.load_state_dict({places[name]: t for name, t in plain_state.items()}, strict=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_factor(name):
                parameter.zero_()


def _updated_layers(model: nn.Module) -> Iterator[nn.Linear | nn.Conv2d | nn.Conv3d]:
    for module in model.modules():
        if isinstance(module, _LAYERS) and parametrize.is_parametrized(module, "weight"):
            yield module


def _plain_name(name: str) -> str:
    return name.removesuffix(_ORIGINAL) + "weight" if name.endswith(_ORIGINAL) else name


def _orthonormal_rows(rows: int, columns: int, name: str) -> Tensor:
    """Return a random float64 [rows, columns] that depends on the arguments only."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
    generator = torch.Generator().manual_seed(seed - (1 << 63))
    # Drawn on the CPU, whatever device torch prefers now, so that everybody gets the same.
    normal = torch.randn(columns, rows, generator=generator, dtype=torch.float64, device="cpu")
    orthonormal: Tensor = torch.linalg.qr(normal).Q
    return orthonormal.T.contiguous()
