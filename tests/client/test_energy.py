"""Figures of energy: settings, sums, what is kept at the site and what may leave it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from energy_parts import CIRCUMSTANCES
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter

from fedcmr_client.energy import (
    LEAST_KWH,
    Energy,
    EnergyLog,
    EnergySettings,
    Intensity,
    JobEnergy,
    rounded_total,
)
from fedcmr_client.site_home import SiteHome
from fedcmr_shared.audit.evidence import Evidence
from fedcmr_shared.errors import ConfigurationError, LedgerError
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.ledger import Checkpoint, Leaf
from fedcmr_shared.schemas.receipt import Receipt

JOB, OTHER = "a" * 64, "b" * 64


def energy(kwh: float = 1.0, **changes: Any) -> Energy:
    """Energy of an hour's work."""
    values = {"seconds": 3600.0, "cpu_seconds": 7200.0, "gpu_kwh": 0.0, "memory_kwh": 0.0}
    more = {"circumstances": CIRCUMSTANCES, "processor_kwh": kwh, "kg_co2e": 0.4 * kwh}
    return Energy.model_validate(values | more | changes)


class TestSettings:
    @pytest.mark.parametrize("country", ["", "DE", "deu", "XXX", "Germany", "CAF"])
    def test_an_unknown_country_is_refused(self, country: str) -> None:
        """The Central African Republic is in the table, with an intensity of zero."""
        with pytest.raises(ConfigurationError, match=r"energy\.country .* such as DEU"):
            EnergySettings(country)

    def test_the_country_is_required(self) -> None:
        with pytest.raises(TypeError, match="country"):
            EnergySettings()  # type: ignore[call-arg]  # that is the test

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("pue", 0.9),
            ("pue", math.inf),
            ("watts_per_thread", 0.0),
            ("watts_per_thread", math.nan),
        ],
    )
    def test_a_number_out_of_range_is_refused(self, field: str, value: float) -> None:
        with pytest.raises(ConfigurationError, match=rf"energy\.{field} is"):
            EnergySettings("DEU", **{field: value})  # type: ignore[arg-type]  # by name

    def test_they_come_from_the_policy(self, make_home: Callable[..., SiteHome]) -> None:
        block = {"country": "POL", "pue": 1.4, "watts_per_thread": 6.0}
        policy = make_home(energy=block).policy
        assert EnergySettings.of(policy) == EnergySettings("POL", 1.4, 6.0, "cpu")
        assert EnergySettings.of(policy.model_copy(update={"energy": None})) is None

    def test_countries_differ_as_much_as_is_said(self) -> None:
        low, high = Intensity.of("SWE"), Intensity.of("POL")
        assert high.g_per_kwh > 10 * low.g_per_kwh
        assert low.year >= 2020


class TestLog:
    def test_jobs_are_apart(self, tmp_path: Path) -> None:
        log = EnergyLog(tmp_path / "energy")
        log.add(JOB, JobEnergy(measured=(energy(1.0),)))
        log.add(OTHER, JobEnergy(measured=(energy(5.0),)))
        log.add(JOB, JobEnergy(measured=(energy(2.0),)))
        assert (log.read(JOB).kwh, log.read(OTHER).kwh) == (3.0, 5.0)
        assert log.jobs() == [JOB, OTHER]
        assert log.read("c" * 64) == JobEnergy()

    def test_a_torn_write_leaves_what_was_there(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        log = EnergyLog(tmp_path / "energy")
        log.add(JOB, JobEnergy(measured=(energy(1.0),)))

        def tear(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("os.replace", tear)
            with pytest.raises(LedgerError, match="No space left"):
                log.add(JOB, JobEnergy(measured=(energy(2.0),)))
        assert log.read(JOB).kwh == 1.0
        assert log.jobs() == [JOB]
        log.add(JOB, JobEnergy(measured=(energy(2.0),)))
        assert log.read(JOB).kwh == 3.0

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"measured": [{}]}', '{"more": 1}'])
    def test_a_damaged_file_is_named(self, tmp_path: Path, content: str) -> None:
        log = EnergyLog(tmp_path)
        (tmp_path / f"{JOB}.json").write_text(content)
        with pytest.raises(LedgerError, match=rf"{JOB}\.json: cannot be read: delete it"):
            log.read(JOB)

    def test_a_file_that_cannot_be_opened_is_not_to_be_deleted(self, tmp_path: Path) -> None:
        (tmp_path / f"{JOB}.json").mkdir()
        with pytest.raises(LedgerError, match=r"cannot be read: Is a directory$"):
            EnergyLog(tmp_path).read(JOB)

    def test_only_the_owner_may_read(self, tmp_path: Path) -> None:
        log = EnergyLog(tmp_path / "energy")
        log.add(JOB, JobEnergy(unmeasured_pieces=1))
        assert log.folder.stat().st_mode & 0o077 == 0
        assert (log.folder / f"{JOB}.json").stat().st_mode & 0o077 == 0


class TestSums:
    def test_equal_circumstances_add_up_and_others_stay_apart(self) -> None:
        moved = CIRCUMSTANCES.model_copy(update={"country": "POL", "g_per_kwh": 660.0})
        pieces = [energy(1.0), energy(2.0, circumstances=moved, kg_co2e=9.0), energy(4.0)]
        total = JobEnergy()
        for piece in pieces:
            total += JobEnergy(measured=(piece,))
        assert [each.kwh for each in total.measured] == [5.0, 2.0]
        assert [each.kg_co2e for each in total.measured] == [2.0, 9.0]
        assert total.kwh == 7.0
        with pytest.raises(ValueError, match="does not add up"):
            _ = pieces[0] + pieces[1]

    def test_the_second_estimate_is_cpu_time_times_power(self) -> None:
        found = energy(cpu_seconds=7200.0, gpu_kwh=0.25)
        assert found.second_kwh == pytest.approx(2 * 4.0 * 1.5 / 1000 + 0.25)

    @pytest.mark.parametrize(
        ("factor", "disagrees"),
        [(0.45, True), (0.55, False), (1.0, False), (1.9, False), (2.1, True)],
    )
    def test_estimates_that_differ_by_more_than_twice_are_flagged(
        self, factor: float, disagrees: bool
    ) -> None:
        second = energy().second_kwh
        assert energy(factor * second).disagrees is disagrees


class TestWhatMayLeave:
    @given(st.floats(0, 1e9))
    def test_a_total_is_one_digit_and_never_too_little(self, kwh: float) -> None:
        total = rounded_total(kwh)
        assert max(kwh, LEAST_KWH) <= total <= max(2 * kwh, LEAST_KWH)
        assert float(f"{total:.0e}") == total
        assert rounded_total(total) == total

    @given(st.floats(0, 1e6), st.floats(0, 1e6))
    def test_more_energy_is_no_smaller_total(self, first: float, second: float) -> None:
        low, high = sorted((first, second))
        assert rounded_total(low) <= rounded_total(high)

    @pytest.mark.parametrize(
        ("kwh", "total"), [(0, 0.1), (0.01, 0.1), (0.3, 0.3), (0.31, 0.4), (37.4, 40), (99, 100)]
    )
    def test_examples(self, kwh: float, total: float) -> None:
        assert rounded_total(kwh) == total

    @pytest.mark.parametrize("kwh", [-0.1, math.inf, math.nan])
    def test_what_is_no_energy_is_refused(self, kwh: float) -> None:
        with pytest.raises(ValueError, match="is no energy"):
            rounded_total(kwh)

    @pytest.mark.parametrize("schema", [Receipt, Leaf, Checkpoint, Evidence])
    def test_receipts_ledger_and_evidence_hold_neither_energy_nor_duration(
        self, schema: type[BaseModel]
    ) -> None:
        assert telling(schema) == set()

    def test_control_such_fields_are_found(self) -> None:
        assert {"processor_kwh", "seconds", "kg_co2e"} <= telling(JobEnergy)
        assert {"energy_kwh", "device_hours"} <= telling(JobSpec)


def telling(schema: type[BaseModel]) -> set[str]:
    """Fields anywhere in ``schema`` whose name speaks of energy or duration."""
    words = ("energy", "kwh", "watt", "joule", "carbon", "co2", "hours", "seconds", "duration")
    found: set[str] = set()

    def walk(node: object) -> None:
        if isinstance(node, dict):
            found.update(node.get("properties", {}))
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(TypeAdapter(schema).json_schema())
    assert found
    return {name for name in found if any(word in name for word in words)}
