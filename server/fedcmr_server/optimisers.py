"""Server optimisers: a torch optimiser applied to the pseudo-gradient.

With the weighted mean update D of a round, the pseudo-gradient is -D (Reddi et al., Adaptive
Federated Optimization, arXiv 2003.00295, algorithm 2). FedAvg is SGD with learning rate 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from fedcmr_shared.errors import FederationError
from fedcmr_shared.schemas.job import ServerOptimiserSpec


class Yogi(Optimizer):
    """Yogi as FedYogi uses it: Adam whose second moment changes additively.

    m = beta1 m + (1 - beta1) g;  v = v - (1 - beta2) g² sign(v - g²);  x = x - lr m / (√v + tau).
    As in algorithm 2 of arXiv 2003.00295, v starts at tau² and nothing is bias-corrected.
    """

    def __init__(
        self, parameters: Iterable[Tensor], lr: float, betas: tuple[float, float], tau: float
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "tau": tau})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        # The base class allows a returned loss; a server step has none.
        """Apply one step to every parameter with a gradient."""
        if closure is not None:
            raise TypeError("Yogi takes no closure: the pseudo-gradient is already known")
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state: dict[str, Any] = self.state[parameter]
                if not state:
                    state["first"] = torch.zeros_like(parameter)
                    state["second"] = torch.full_like(parameter, group["tau"] ** 2)
                square = parameter.grad**2
                state["first"].lerp_(parameter.grad, 1 - beta1)
                state["second"].sub_((1 - beta2) * square * (state["second"] - square).sign())
                parameter.sub_(
                    group["lr"] * state["first"] / (state["second"].sqrt() + group["tau"])
                )


def _build(spec: ServerOptimiserSpec, parameters: list[Tensor]) -> Optimizer:
    betas = (spec.momentum, spec.beta2)
    builders: Final[dict[str, Callable[[], Optimizer]]] = {
        "fedavg": lambda: SGD(parameters, lr=spec.learning_rate),
        "fedavgm": lambda: SGD(parameters, lr=spec.learning_rate, momentum=spec.momentum),
        "fedadam": lambda: Adam(parameters, lr=spec.learning_rate, betas=betas, eps=spec.tau),
        "fedyogi": lambda: Yogi(parameters, spec.learning_rate, betas, spec.tau),
    }
    return builders[spec.name]()


class ServerOptimiser:
    """Holds the trainable parameters by name and moves them by each round's mean update."""

    def __init__(self, spec: ServerOptimiserSpec, trainable: Mapping[str, Tensor]) -> None:
        self._parameters = {
            name: tensor.detach().clone() for name, tensor in sorted(trainable.items())
        }
        self._optimiser = _build(spec, list(self._parameters.values()))

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Current values by name (live tensors: copy before changing)."""
        return self._parameters

    def apply(self, mean_update: Mapping[str, Tensor]) -> None:
        """Take one step along ``mean_update``.

        Raises:
            FederationError: the names or shapes are not those of the trainable parameters.
        """
        check_same_layout(self._parameters, mean_update, "the mean update")
        for name, parameter in self._parameters.items():
            parameter.grad = -mean_update[name].to(parameter.dtype)
        self._optimiser.step()

    def state(self) -> dict[str, Tensor]:
        """Optimiser state as flat tensors, for a checkpoint."""
        flat: dict[str, Tensor] = {}
        names = list(self._parameters)
        for index, values in self._optimiser.state_dict()["state"].items():
            for key, value in values.items():
                if value is not None:
                    flat[f"{names[index]}/{key}"] = torch.as_tensor(value)
        return flat

    def restore(self, flat: Mapping[str, Tensor]) -> None:
        """Load what :meth:`state` returned.

        Raises:
            FederationError: the state belongs to other parameters.
        """
        names = {name: index for index, name in enumerate(self._parameters)}
        state: dict[int, dict[str, Tensor]] = {}
        for path, value in flat.items():
            name, _, key = path.rpartition("/")
            if name not in names:
                raise FederationError(f"optimiser state holds unknown parameter {name!r}")
            state.setdefault(names[name], {})[key] = value.clone()
        groups = self._optimiser.state_dict()["param_groups"]
        self._optimiser.load_state_dict({"state": state, "param_groups": groups})


def weighted_mean(
    updates: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, float]
) -> dict[str, Tensor]:
    """Mean of the sites' updates by public weights, accumulated in float64 in order of site name.

    Args:
        updates: parameter updates by site name; all with the same names and shapes.
        weights: positive weight by site name.

    Raises:
        FederationError: no updates, differing layouts, or a non-finite value.
    """
    check_updates(updates)
    sites = sorted(updates)
    total = sum(weights[site] for site in sites)
    return {
        name: sum(
            (updates[site][name].double() * (weights[site] / total) for site in sites),
            start=torch.zeros((), dtype=torch.float64),
        )
        for name in updates[sites[0]]
    }


def check_updates(updates: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Return if there are updates, all finite and with the same names and shapes.

    Raises:
        FederationError: it is not so; the message names the site or group.
    """
    if not updates:
        raise FederationError("there are no updates to average")
    first = min(updates)
    for source in sorted(updates):
        check_same_layout(updates[first], updates[source], f"the update of {source}")
        for name, tensor in updates[source].items():
            if not torch.isfinite(tensor).all():
                raise FederationError(f"the update of {source} is not finite in {name}")


def check_same_layout(
    expected: Mapping[str, Tensor], actual: Mapping[str, Tensor], what: str
) -> None:
    """Raise a FederationError unless names and shapes agree."""
    if expected.keys() != actual.keys():
        odd = sorted(expected.keys() ^ actual.keys())
        raise FederationError(f"{what} has other parameters than the model: {', '.join(odd[:3])}")
    for name, tensor in expected.items():
        if tensor.shape != actual[name].shape:
            raise FederationError(
                f"{what} has shape {tuple(actual[name].shape)} for {name}, "
                f"not {tuple(tensor.shape)}"
            )
