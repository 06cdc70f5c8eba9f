"""Undersampling masks: published factors, invariants and refusals."""

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.kspace.masks import (
    RADIAL_PATTERNS,
    RANDOM_PATTERNS,
    Sampling,
    acs_mask,
    acs_region,
    make_mask,
    realised_acceleration,
)
from fedcmr_shared.schemas.job import Pattern

PATTERNS = get_args(Pattern)
CARTESIAN = [pattern for pattern in PATTERNS if pattern not in RADIAL_PATTERNS]


def _mask(pattern, acceleration=8.0, acs=8, phase=48, readout=40, frames=3, seed=0):
    sampling = Sampling(pattern, acceleration, acs)
    return make_mask(sampling, phase_encodes=phase, readout=readout, frames=frames, seed=seed)


@pytest.mark.parametrize(
    ("phase", "realised"),
    [
        (128, [2.7, 3.9, 4.4, 4.7, 5.1]),
        (162, [2.9, 4.3, 5.1, 5.4, 6.2]),
        (204, [3.1, 4.6, 5.8, 6.4, 7.3]),
        (246, [3.2, 5.0, 6.3, 7.0, 8.2]),
    ],
)
def test_realised_acceleration_of_uniform_masks(phase, realised):
    for nominal, expected in zip((4, 8, 12, 16, 24), realised, strict=True):
        mask = _mask("uniform", nominal, acs=20, phase=phase, readout=4)
        assert realised_acceleration(mask) == pytest.approx(expected, abs=0.0501)


@settings(max_examples=60)
@given(
    st.sampled_from(PATTERNS),
    st.floats(1, 30),
    st.integers(1, 12),
    st.integers(12, 40),
    st.integers(12, 40),
    st.integers(0, 2**32 - 1),
)
def test_invariants(pattern, acceleration, acs, phase, readout, seed):
    arguments = {"acs": acs, "phase": phase, "readout": readout, "seed": seed}
    mask = _mask(pattern, acceleration, **arguments)
    assert mask.dtype == np.bool_
    assert mask.shape == (3, phase, readout)
    assert mask[:, acs_mask(Sampling(pattern, acceleration, acs), phase, readout)].all()
    assert np.array_equal(mask, _mask(pattern, acceleration, **arguments))
    if pattern not in RADIAL_PATTERNS:
        assert (mask == mask[:, :, :1]).all()
    if pattern not in RANDOM_PATTERNS:
        assert np.array_equal(mask, _mask(pattern, acceleration, **arguments | {"seed": seed + 1}))


@pytest.mark.parametrize("pattern", sorted(RANDOM_PATTERNS))
def test_seeds_matter(pattern):
    masks = [_mask(pattern, seed=seed, phase=96).tobytes() for seed in range(8)]
    assert len(set(masks)) == 8


@pytest.mark.parametrize("pattern", ["uniform", "random", "radial"])
def test_training_patterns_and_uniform_repeat_over_frames(pattern):
    mask = _mask(pattern)
    assert (mask == mask[:1]).all()


@pytest.mark.parametrize("pattern", ["kt-uniform", "kt-gaussian", "kt-radial"])
def test_kt_patterns_change_from_frame_to_frame(pattern):
    mask = _mask(pattern)
    assert not np.array_equal(mask[0], mask[1])


def test_uniform_lines_by_hand():
    lines = _mask("uniform", 4, acs=2, phase=12)[0, :, 0]
    assert np.flatnonzero(lines).tolist() == [0, 4, 5, 6, 8]


def test_kt_uniform_shifts_by_one_line_per_frame():
    lines = _mask("kt-uniform", 4, acs=1, phase=12, frames=5)[:, :, 0]
    found = [set(np.flatnonzero(frame)) - {6} for frame in lines]
    assert found == [{0, 4, 8}, {1, 5, 9}, {2, 10}, {3, 7, 11}, {0, 4, 8}]


@pytest.mark.parametrize("acceleration", [4, 8, 24])
def test_kt_gaussian_draws_a_fixed_number_of_distinct_lines(acceleration):
    phase, drawn = 204, round(204 / acceleration)
    # One calibration line is hit or not; so the union has as many lines, or one more.
    counts = _mask("kt-gaussian", acceleration, acs=1, phase=phase, frames=20)[:, :, 0].sum(1)
    assert set(counts.tolist()) <= {drawn, drawn + 1}


def test_kt_gaussian_favours_the_centre():
    lines = _mask("kt-gaussian", 8, acs=1, phase=200, frames=400)[:, :, 0]
    density = np.exp(-(((np.arange(200) - 100) / 40) ** 2)) * 0.25 + 0.1
    expected = 25 * density / density.sum()
    # Displaced duplicates flatten the density a little.
    assert lines[:, 110:130].mean() == pytest.approx(expected[110:130].mean(), rel=0.12)
    assert lines[:, :20].mean() == pytest.approx(expected[:20].mean(), rel=0.2)


def test_random_density_is_the_nominal_factor():
    lines = np.concatenate(
        [_mask("random", 8, acs=1, phase=400, readout=1, seed=seed)[0, :, 0] for seed in range(40)]
    )
    assert lines.mean() == pytest.approx(1 / 8, abs=0.012)


def test_radial_spokes_cross_the_centre_and_span_k_space():
    mask = _mask("kt-radial", 30, acs=1, phase=41, readout=41, frames=1)[0]
    # 180 / (0.6 x 30) = 10 beams, the first along the readout.
    assert mask[20].all()
    assert mask[:, 20].all()
    assert realised_acceleration(mask) == pytest.approx(41 / 10, rel=0.15)
    assert np.array_equal(mask, mask[::-1, ::-1])


def test_acs_regions():
    assert acs_region(Sampling("uniform", 8, 20), 162, 200) == (slice(71, 91), slice(0, 200))
    assert acs_region(Sampling("radial", 8, 20), 162, 200) == (slice(71, 91), slice(90, 110))


def test_odd_and_even_regions_hold_the_centre():
    for size in (15, 16):
        for width in (1, 4, 5):
            region = acs_region(Sampling("uniform", 4, width), size, 1)[0]
            assert size // 2 in range(size)[region]


@pytest.mark.parametrize(
    "arguments",
    [("spiral", 4, 8), ("uniform", 0.5, 8), ("uniform", float("nan"), 8), ("uniform", 4, 0)],
)
def test_bad_sampling_is_refused(arguments):
    with pytest.raises(ConfigurationError):
        Sampling(*arguments)


@pytest.mark.parametrize(
    ("pattern", "change", "word"),
    [
        ("uniform", {"acs": 49}, "acs_lines 49 exceeds phase_encodes 48"),
        ("radial", {"acs": 41}, "acs_lines 41 exceeds readout 40"),
        ("uniform", {"frames": 0}, "frames"),
        ("uniform", {"readout": 0}, "readout"),
        ("uniform", {"phase": 0}, "phase_encodes"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(pattern, change, word):
    with pytest.raises(ConfigurationError, match=word):
        _mask(pattern, **change)


def test_calibration_as_wide_as_the_readout_is_allowed_for_lines():
    assert _mask("uniform", acs=41).any()


def test_empty_mask_has_no_acceleration():
    with pytest.raises(ConfigurationError, match="no sample"):
        realised_acceleration(np.zeros((1, 4, 4), dtype=bool))
