"""Eight of the phenotypes follow from others; how to complete and to repair tables by that.

With V the largest and v the smallest volume of a cavity, SV = V − v and EF = 100 (V − v) / V. Of the
aorta only max ≥ min is known. Cardiac output and distensibility also need the heart rate and the
pulse pressure, so they are free numbers here.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedcmr_shared.metrics.phenotypes.table import (
    CAVITIES,
    VESSELS,
    Cavity,
    PhenotypeTable,
    phenotype,
)

Floats = NDArray[np.float64]
_STEPS: Final = 60
_LOGIT_LIMIT: Final = 7.0  # smallest over largest volume between 0.1 and 99.9 %
_RATIO_LIMIT: Final = 1 / (1 + np.exp(_LOGIT_LIMIT))
_LEAST_ML: Final = 1.0
_FEWEST: Final = 2  # two numbers of a cavity fix the other two


def derive(table: PhenotypeTable) -> PhenotypeTable:
    """Compute stroke volumes and ejection fractions anew where both volumes are there.

    Values that generators gave for the derived columns are discarded; the free ones stay.
    """
    values = table.values.copy()
    for cavity in CAVITIES:
        if cavity.largest in table.names and cavity.smallest in table.names:
            largest, smallest = table.column(cavity.largest), table.column(cavity.smallest)
            known = np.isfinite(largest) & np.isfinite(smallest)
            consistent = _four(largest, smallest)
            for name, column in zip(cavity[2:], consistent.T[2:], strict=True):
                if name in table.names:
                    values[known, table.names.index(name)] = column[known]
    return PhenotypeTable(table.names, values)


def project(table: PhenotypeTable) -> PhenotypeTable:
    """Return the nearest table that obeys the identities, in units of the prior deviations.

    Every cavity of which a heart has two numbers gets all its numbers that the table has columns
    for; with less it stays as it is. Consistent hearts do not change. Volumes come out with
    0 < smallest < largest and largest >= 1 mL. A vessel whose minimum exceeds its maximum gets their mean for both.
    """
    values = table.values.copy()
    for cavity in CAVITIES:
        columns = [table.names.index(name) for name in cavity if name in table.names]
        present = [name in table.names for name in cavity]
        given = np.full((len(values), len(cavity)), np.nan)
        given[:, present] = values[:, columns]
        enough = np.isfinite(given).sum(axis=1) >= _FEWEST
        if enough.any():
            fitted = _nearest(given[enough], cavity)[:, present]
            values[np.flatnonzero(enough)[:, None], columns] = fitted
    for names in VESSELS:
        if set(names) <= set(table.names):
            columns = [table.names.index(name) for name in names]
            pair = values[:, columns]
            wrong = pair[:, 0] < pair[:, 1]
            rows = np.flatnonzero(wrong)[:, None]
            values[rows, columns] = pair[wrong].mean(axis=1, keepdims=True)
    return PhenotypeTable(table.names, values)


def _four(largest: Floats, smallest: Floats) -> Floats:
    """Numbers [heart, 4] of a cavity in the order of `Cavity`."""
    stroke = largest - smallest
    return np.stack([largest, smallest, stroke, 100 * stroke / largest], axis=1)


def _nearest(given: Floats, cavity: Cavity) -> Floats:
    """Weighted least squares over (log largest, logit of smallest/largest): always 0 < v < V.

    Levenberg-Marquardt with one damping per heart; missing numbers weigh nothing.
    """
    scale = np.array([phenotype(name).prior[1] for name in cavity])
    weight = np.where(np.isfinite(given), 1 / scale, 0.0)
    target = np.nan_to_num(given)
    point = _start(given, cavity)
    damping = np.full(len(given), 1e-3)
    cost = _cost(point, target, weight)
    for _ in range(_STEPS):
        value, slope = _model(point)
        jacobian = slope * weight[..., None]
        residual = (value - target) * weight
        normal = np.einsum("nki,nkj->nij", jacobian, jacobian)
        normal += damping[:, None, None] * (np.eye(2) + normal * np.eye(2))
        gradient = np.einsum("nki,nk->ni", jacobian, residual)
        proposal = point - np.linalg.solve(normal, gradient[..., None])[..., 0]
        proposal[:, 0] = np.maximum(proposal[:, 0], np.log(_LEAST_ML))
        proposal[:, 1] = np.clip(proposal[:, 1], -_LOGIT_LIMIT, _LOGIT_LIMIT)
        new_cost = _cost(proposal, target, weight)
        better = new_cost <= cost
        point[better], cost = proposal[better], np.where(better, new_cost, cost)
        damping = np.clip(np.where(better, damping / 4, damping * 8), 1e-12, 1e12)
    return _model(point)[0]


def _start(given: Floats, cavity: Cavity) -> Floats:
    """A guess from whichever two numbers a heart has; a consistent heart is its own guess."""
    largest, smallest, stroke, percent = given.T
    share = np.clip(1 - percent / 100, _RATIO_LIMIT, 1 - _RATIO_LIMIT)
    guesses = (largest, smallest + stroke, smallest / share, stroke / (1 - share))
    volume = np.maximum(_first(guesses, phenotype(cavity.largest).prior[0]), _LEAST_ML)
    ratio = _first((share, smallest / volume, 1 - stroke / volume), 0.5)
    ratio = np.clip(ratio, _RATIO_LIMIT, 1 - _RATIO_LIMIT)
    return np.stack([np.log(volume), np.log(ratio / (1 - ratio))], axis=1)


def _first(guesses: tuple[Floats, ...], otherwise: float) -> Floats:
    result = np.full_like(guesses[0], np.nan)
    for guess in guesses:
        usable = np.isnan(result) & np.isfinite(guess) & (guess > 0)
        result = np.where(usable, guess, result)
    return np.where(np.isnan(result), otherwise, result)


def _model(point: Floats) -> tuple[Floats, Floats]:
    """Numbers [heart, 4] of a cavity and their slopes [heart, 4, 2]."""
    volume, ratio = np.exp(point[:, 0]), 1 / (1 + np.exp(-point[:, 1]))
    turn = ratio * (1 - ratio)
    zero = np.zeros_like(volume)
    value = _four(volume, volume * ratio)
    by_volume = np.stack([volume, volume * ratio, volume * (1 - ratio), zero], axis=1)
    by_ratio = np.stack([zero, volume * turn, -volume * turn, -100 * turn], axis=1)
    return value, np.stack([by_volume, by_ratio], axis=2)


def _cost(point: Floats, target: Floats, weight: Floats) -> Floats:
    value, _ = _model(point)
    return np.asarray((((value - target) * weight) ** 2).sum(axis=1))
