"""How the charges of a ledger grew, entry by entry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from fedcmr_shared.privacy.accounting import epsilon_from_rdp, figures, total_rdp
from fedcmr_shared.privacy.budget import Budget, noised, patient_committed, patient_spent
from fedcmr_shared.schemas.ledger import Admitted, Closed, Entry, Release, Started

_MOST_MOMENTS: Final = 300
_MOST_PLD: Final = 12  # each takes up to seconds


@dataclass(frozen=True)
class Moment:
    """Epsilon after one entry, in the order of the log; ``at`` in milliseconds since 1970.

    ``started`` and ``charged`` are the filter's figures of the most charged cohort, without and
    with open reservations; ``everything`` is that of all cohorts together. ``pld``, the PLD
    figure of what is charged, is None where it was not computed, and everywhere if one of these
    moments has none.
    """

    at: int
    started: float
    charged: float
    everything: float
    pld: float | None


def timeline(entries: Sequence[Entry]) -> tuple[Moment, ...]:
    """Return moments from the opening entry on, at most about 300, for valid ``entries``."""
    moved = [i for i, entry in enumerate(entries) if isinstance(entry, Admitted | Closed)]
    started = [i for i, entry in enumerate(entries) if isinstance(entry, Started)]
    shown = {0} | _spread(moved, _MOST_MOMENTS // 2) | _spread(started, _MOST_MOMENTS // 2)
    exact = {0} | _spread(moved, _MOST_PLD)
    moments = []
    missing = False
    budget = Budget()
    for index, entry in enumerate(entries):
        budget = budget.apply(entry)
        if index in shown | exact:
            moments.append(_moment(budget, with_pld=index in exact))
            missing |= index in exact and moments[-1].pld is None
    return tuple(replace(moment, pld=None) if missing else moment for moment in moments)


def _moment(budget: Budget, *, with_pld: bool) -> Moment:
    opened, cohorts = budget.opened, sorted(budget.cohorts())

    def epsilon(releases: dict[Release, int]) -> float:
        divergence = total_rdp(dict(noised(releases)), opened.order)
        return epsilon_from_rdp(divergence, opened.order, opened.delta)

    worst = max((patient_committed(budget, [c]) for c in cohorts), key=epsilon, default={})
    pld = figures(dict(noised(worst)), opened.order, opened.delta).pld_epsilon if with_pld else None
    return Moment(
        at=budget.clock,
        started=max((epsilon(patient_spent(budget, [c])) for c in cohorts), default=0.0),
        charged=epsilon(worst),
        everything=epsilon(patient_committed(budget, cohorts)),
        pld=pld,
    )


def _spread(indices: Sequence[int], most: int) -> set[int]:
    """Return at most ``most`` of ``indices``, evenly spread, the last one included."""
    step = max(1, -(-len(indices) // most))
    return set(indices[::-1][::step])
