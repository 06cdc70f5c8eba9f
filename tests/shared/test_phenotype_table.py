"""The table of 82 phenotypes, and the identities that eight of them obey."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedcmr_shared.errors import DataError
from fedcmr_shared.metrics.phenotypes.identities import derive, project
from fedcmr_shared.metrics.phenotypes.table import (
    AHA_SEGMENTS,
    CAVITIES,
    NAMES,
    PHENOTYPES,
    VESSELS,
    PhenotypeTable,
    implausible,
    phenotype,
)

CAVITY_NAMES = tuple(name for cavity in CAVITIES for name in cavity)


def healthy(hearts: int, seed: int = 0) -> PhenotypeTable:
    """Hearts around the prior means that break the identities."""
    mean, deviation = np.array([p.prior for p in PHENOTYPES]).T
    noise = 0.25 * np.random.default_rng(seed).normal(size=(hearts, len(NAMES)))
    return PhenotypeTable(NAMES, mean + deviation * noise)


def test_82_phenotypes_in_the_groups_of_the_biobank() -> None:
    assert len(PHENOTYPES) == len(set(NAMES)) == 82
    assert [p.field_id for p in PHENOTYPES] == list(range(24100, 24182))
    assert Counter(p.group for p in PHENOTYPES) == {
        "LV": 6,
        "RV": 4,
        "LA": 4,
        "RA": 4,
        "ascending aorta": 3,
        "descending aorta": 3,
        "wall thickness": 17,
        "circumferential strain": 17,
        "radial strain": 17,
        "longitudinal strain": 7,
    }
    assert len(AHA_SEGMENTS) == 16


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("RAV max", 24114),
        ("WT_AHA_10", 24133),
        ("WT Global", 24140),
        ("Ecc_AHA_2", 24142),
        ("Ecc Global", 24157),
        ("Err_AHA_16", 24173),
        ("Err Global", 24174),
        ("Ell Global", 24181),
    ],
)
def test_field_ids_that_public_code_names(name: str, field: int) -> None:
    assert phenotype(name).field_id == field


def test_short_axis_cine_gives_61_and_eight_follow_from_others() -> None:
    assert sum(p.views == ("short-axis",) for p in PHENOTYPES) == 61
    derived = {p.name: p.derived_from for p in PHENOTYPES if p.derived_from}
    assert len(derived) == 8
    assert derived["RVEF"] == ("RVEDV", "RVESV")


def test_priors_are_plausible_and_nearly_obey_the_identities() -> None:
    means = {p.name: p.prior[0] for p in PHENOTYPES}
    assert implausible(means) == {}
    for cavity in CAVITIES:
        largest, smallest, stroke, fraction = (means[name] for name in cavity)
        assert stroke == pytest.approx(largest - smallest, abs=1)
        assert fraction == pytest.approx(100 * stroke / largest, abs=1)


def test_implausible_values_are_named_with_their_range() -> None:
    found = implausible({"LVEF": 95.0, "LVEDV": 150.0})
    assert list(found) == ["LVEF"]
    assert (found["LVEF"].low, found["LVEF"].high, found["LVEF"].source) == (11, 82, "ACDC")


def test_tables_find_columns_by_name_and_keep_what_is_missing() -> None:
    table = PhenotypeTable.of([{"LVEF": 60.0, "HR": 70.0}, {"LVM": 90.0}])
    assert table.names == NAMES
    assert table.rows() == [{"LVEF": 60.0}, {"LVM": 90.0}]
    swapped = table.select(("LVM", "LVEF"))
    assert np.array_equal(swapped.column("LVEF"), table.column("LVEF"), equal_nan=True)


@pytest.mark.parametrize(
    ("names", "shape", "message"),
    [
        (("LVEF", "LVXX"), (1, 2), "'LVXX' is unknown"),
        (("LVEF", "LVEF"), (1, 2), "two columns"),
        (("LVEF", "LVM"), (1, 3), r"\(1, 3\) do not fit 2 names"),
        (("LVEF", "LVM"), (2,), r"\(2,\) do not fit 2 names"),
    ],
)
def test_tables_that_lie_about_their_columns_are_refused(
    names: tuple[str, ...], shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        PhenotypeTable(names, np.zeros(shape))


def test_a_missing_column_is_refused() -> None:
    with pytest.raises(DataError, match="no phenotype 'LVM': it has LVEF"):
        PhenotypeTable.of([{}], ("LVEF",)).select(("LVM",))


def obeys(table: PhenotypeTable) -> None:
    for cavity in CAVITIES:
        largest, smallest, stroke, fraction = (table.column(name) for name in cavity)
        assert (largest > smallest).all()
        assert (smallest > 0).all()
        assert stroke == pytest.approx(largest - smallest)
        assert fraction == pytest.approx(100 * stroke / largest)


@settings(max_examples=40)
@given(arrays(np.float64, (4, 16), elements=st.floats(-400, 400)))
def test_projection_obeys_the_identities_and_is_idempotent(values: np.ndarray) -> None:
    once = project(PhenotypeTable(CAVITY_NAMES, values))
    obeys(once)
    assert project(once).values == pytest.approx(once.values, rel=1e-6, abs=1e-6)


def test_projection_is_nearer_than_any_derived_table() -> None:
    table = healthy(200)
    projected = project(table)
    obeys(projected)
    derived = derive(table)
    obeys(derived)
    scale = np.array([phenotype(name).prior[1] for name in NAMES])
    near, far = (
        (((t.values - table.values) / scale) ** 2).sum(axis=1) for t in (projected, derived)
    )
    assert (near <= far + 1e-9).all()
    cavities = derived.select(CAVITY_NAMES)
    assert project(cavities).values == pytest.approx(cavities.values)


def test_two_numbers_of_a_cavity_fix_the_others() -> None:
    table = PhenotypeTable.of([{"LVEDV": 150.0, "LVEF": 60.0}, {"LVSV": 90.0, "LVESV": 60.0}, {}])
    first, second, nothing = project(table).rows()
    expected = {"LVEDV": 150, "LVESV": 60, "LVSV": 90, "LVEF": 60}
    assert first == pytest.approx(expected, rel=1e-6)
    assert second == pytest.approx(expected, rel=1e-6)
    assert nothing == {}


def test_only_one_number_stays_as_it_is() -> None:
    assert project(PhenotypeTable.of([{"LVEF": 60.0}])).rows() == [{"LVEF": 60.0}]


def test_an_aorta_that_shrinks_in_systole_gets_its_mean() -> None:
    (largest, smallest), _ = VESSELS
    row = {largest: 700.0, smallest: 800.0, "DAo max area": 500.0, "DAo min area": 440.0}
    fixed = {largest: 750.0, smallest: 750.0, "DAo max area": 500.0, "DAo min area": 440.0}
    assert project(PhenotypeTable.of([row])).rows() == [fixed]
