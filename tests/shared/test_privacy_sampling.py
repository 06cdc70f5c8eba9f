"""Poisson sampling of patients."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedcmr_shared.privacy.sampling import draw_patients


def inclusions(patients: int, rate: float, draws: int) -> np.ndarray:
    """0/1 matrix [draws, patients]."""
    table = np.zeros((draws, patients), dtype=int)
    for row in table:
        row[draw_patients(range(patients), rate)] = 1
    return table


def test_each_patient_is_drawn_at_the_rate() -> None:
    rate, draws = 0.05, 2000
    counts = inclusions(300, rate, draws).sum(0)
    assert stats.binomtest(int(counts.sum()), 300 * draws, rate).pvalue > 1e-7
    spread = ((counts - draws * rate) ** 2 / (draws * rate * (1 - rate))).sum()
    assert 1e-7 < stats.chi2.cdf(spread, 300) < 1 - 1e-7


def test_patients_and_steps_are_independent() -> None:
    table = inclusions(40, 0.3, 5000).astype(float)
    sizes = table.sum(1)
    expected = 40 * 0.3 * 0.7  # a fixed number per step would have variance zero
    assert sizes.var() == pytest.approx(expected, rel=6 * np.sqrt(2 / 5000))
    correlation = np.corrcoef(table.T) - np.eye(40)
    assert np.abs(correlation).max() < 6.5 / np.sqrt(5000)
    assert abs(np.corrcoef(sizes[1:], sizes[:-1])[0, 1]) < 6 / np.sqrt(5000)


def test_often_nobody_is_drawn() -> None:
    empty = int((inclusions(5, 0.1, 2000).sum(1) == 0).sum())
    assert stats.binomtest(empty, 2000, 0.9**5).pvalue > 1e-7


def test_tiny_rates_draw_almost_nobody() -> None:
    assert draw_patients(range(1000), 1e-300) == []
    drawn = sum(len(draw_patients(range(100_000), 1e-4)) for _ in range(20))
    assert stats.poisson.cdf(drawn, 200) == pytest.approx(0.5, abs=0.5 - 1e-7)


@settings(max_examples=30)
@given(
    st.lists(st.text(max_size=3), max_size=20),
    st.floats(min_value=0, max_value=1, exclude_min=True),
)
def test_drawn_patients_keep_their_order(patients: list[str], rate: float) -> None:
    drawn = draw_patients(patients, rate)
    rest = iter(patients)
    assert all(patient in rest for patient in drawn)
    assert draw_patients(patients, 1.0) == patients
