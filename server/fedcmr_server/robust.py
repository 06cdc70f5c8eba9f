"""How the coordinator combines the mean updates that it opened.

``mean`` weighs by the public weights. The other rules are Flower's own and take every update as
equal, whatever its weight: a weight could else buy influence. They bound what a minority of the
updates can do; how many of them that is stands beside each rule in `combine`.

An update is one site's (`plain_with_local_dp`) or the mean of a group (`secure_groups`). One bad
site spoils its whole group, so rules over groups stand fewer bad sites than rules over sites.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from flwr.server.strategy.aggregate import (
    aggregate_krum,
    aggregate_median,
    aggregate_trimmed_avg,
)
from numpy.typing import NDArray
from torch import Tensor

from fedcmr_server.optimisers import check_updates, weighted_mean
from fedcmr_shared.errors import FederationError
from fedcmr_shared.schemas.job import RobustRule

TRIMMED_SHARE: Final = 0.2
"""Share of the updates that `trimmed-mean` leaves out at each end of every coordinate."""

_FEWEST: Final[Mapping[RobustRule, int]] = {"mean": 1, "median": 3, "trimmed-mean": 3, "krum": 3}
_Layers = list[NDArray[np.floating]]


@dataclass(frozen=True)
class MeanUpdate:
    """Mean of the updates of sites whose public weights add up to ``weight``."""

    delta: Mapping[str, Tensor]
    weight: int


def screen(
    updates: Mapping[str, MeanUpdate], largest_norm: float | None
) -> tuple[dict[str, MeanUpdate], tuple[str, ...]]:
    """Return the updates whose Euclidean norm is at most ``largest_norm``, and who is left out.

    With None everything passes, as it is. A norm that is not finite is larger than any other.
    """
    if largest_norm is None:
        return dict(updates), ()
    kept = {
        source: update
        for source, update in updates.items()
        if euclidean_norm(update.delta) <= largest_norm
    }
    return kept, tuple(sorted(updates.keys() - kept.keys()))


def combine(rule: RobustRule, updates: Mapping[str, MeanUpdate]) -> dict[str, Tensor]:
    """Return one update from those of ``updates``, by source; deterministic in their names.

    =================  ===========================================================================
    ``mean``           weighted mean; any bad update moves it
    ``median``         of each coordinate; fewer than half of n may be bad
    ``trimmed-mean``   mean of each coordinate without its largest and smallest fifth, rounded
                       down but at least one of three; as many may be bad
    ``krum``           the one update closest to its n - f - 2 nearest (Blanchard et al., NeurIPS
                       2017), f = floor((n - 3) / 2) of n may be bad
    =================  ===========================================================================

    Raises:
        FederationError: there are no updates, their layouts differ, or one is not finite.
    """
    deltas = {source: updates[source].delta for source in sorted(updates)}
    check_updates(deltas)
    first = next(iter(deltas.values()))
    if len(deltas) == 1:
        return {name: tensor.double() for name, tensor in first.items()}
    if rule == "mean":
        return weighted_mean(deltas, {source: updates[source].weight for source in deltas})
    names = sorted(first)
    results = [([_array(delta[name]) for name in names], 1) for delta in deltas.values()]
    combined = _apply(rule, results)
    return {
        name: torch.from_numpy(np.asarray(values, dtype=np.float64))
        for name, values in zip(names, combined, strict=True)
    }


def require_enough(rule: RobustRule, count: int) -> None:
    """Raise a FederationError when ``count`` updates are too few for ``rule`` to mean anything."""
    if count < _FEWEST[rule]:
        raise FederationError(
            f"{count} updates came, and robust {rule} needs at least {_FEWEST[rule]}: raise "
            "minimum_sites in the job, or write robust mean"
        )


def euclidean_norm(update: Mapping[str, Tensor]) -> float:
    """Return the norm of all tensors together."""
    return math.sqrt(sum(float((tensor.double() ** 2).sum()) for tensor in update.values()))


def _apply(rule: RobustRule, results: list[tuple[_Layers, int]]) -> Sequence[NDArray[np.floating]]:
    count = len(results)
    if rule == "median":
        return aggregate_median(results)
    if rule == "trimmed-mean":
        # Of three or four updates a fifth is none: one is left out at each end then.
        share = max(TRIMMED_SHARE, 1 / count) if count >= 3 else 0.0
        return aggregate_trimmed_avg(results, share)
    return aggregate_krum(results, num_malicious=max(0, (count - 3) // 2), to_keep=0)


def _array(tensor: Tensor) -> NDArray[np.floating]:
    values: NDArray[np.floating] = tensor.detach().double().numpy()
    return values
