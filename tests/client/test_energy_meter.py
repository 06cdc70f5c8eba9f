"""The meter around a round: what it counts, and that it disturbs neither the round nor the net."""

import logging
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from energy_parts import CIRCUMSTANCES

from fedcmr_client.energy import Energy, EnergyLog, EnergySettings, Intensity
from fedcmr_client.energy_meter import CodeCarbon, EnergyMeter, metered
from fedcmr_shared.errors import DataError

GERMANY = EnergySettings("DEU")
JOB = "a" * 64


class FakeMeter:
    """A power meter that ran for ``seconds`` at 360 W."""

    def __init__(self, seconds: float = 2.0, error: Exception | None = None) -> None:
        self.seconds, self.error = seconds, error
        self.stopped = threading.Event()

    def stop(self) -> Energy:
        self.stopped.set()
        if self.error is not None:
            raise self.error
        return Energy(
            circumstances=CIRCUMSTANCES,
            seconds=self.seconds,
            cpu_seconds=0.0,
            processor_kwh=self.seconds * 1e-4,
            gpu_kwh=0.0,
            memory_kwh=0.0,
            kg_co2e=self.seconds * 4e-5,
        )


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Forbid connections and look-ups; return those that were tried."""
    tried: list[object] = []

    def refuse(*arguments: object, **_: object) -> None:
        tried.append(arguments)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tried


@pytest.fixture
def own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of codecarbon's own that would change figures and send them away."""
    settings = {
        "emissions_endpoint": "http://127.0.0.1:9/",
        "output_methods": "api,csv",
        "electricitymaps_api_token": "token",
        "force_carbon_intensity_g_co2e_kwh": 5000,
        "country_iso_code": "POL",
        "pue": 9,
        "force_ram_power": 70000,
        "force_cpu_power": 70000,
        "api_call_interval": 1,
        "tracking_mode": "process",
    }
    lines = [f"{name} = {value}" for name, value in settings.items()]
    content = "\n".join(["[codecarbon]", *lines])
    (tmp_path / ".codecarbon.config").write_text(content)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CODECARBON_WUE", "7")
    monkeypatch.chdir(tmp_path)


def measured(settings: EnergySettings, intensity: Intensity | None = None) -> Energy:
    """What codecarbon says about a moment of waiting."""
    meter = CodeCarbon.start(settings, intensity)
    time.sleep(0.3)
    return meter.stop()


RAPL = SimpleNamespace(_mode="intel_rapl")


def read(processor: object, settings: EnergySettings = GERMANY, **amounts: float) -> Energy:
    """What we make of a tracker's figures: 1 kWh of memory, 3 of a processor, at 400 g/kWh."""
    energy = {"ram_energy": 1.0, "cpu_energy": 3.0, "gpu_energy": 0.0, **amounts}
    consumed = sum(energy.values())
    about: dict[str, Any] = {"cpu_model": "a CPU", "cpu_count": 2, "gpu_model": "a GPU"}
    figures = SimpleNamespace(
        **energy,
        energy_consumed=consumed,
        emissions=0.4 * consumed,
        duration=60.0,
        ram_total_size=8.0,
        codecarbon_version="0",
        **about,
    )
    tracker: Any = SimpleNamespace(
        stop=lambda: None, final_emissions_data=figures, _hardware=[object(), processor]
    )
    return CodeCarbon(tracker, settings, Intensity(400.0, 2023)).stop()


class TestCodeCarbon:
    def test_a_given_intensity_comes_out_exactly(self) -> None:
        found = measured(GERMANY, Intensity(100.0, 2020))
        assert found.kwh > 0
        assert found.kg_co2e == pytest.approx(0.1 * found.kwh, rel=1e-9)

    def test_the_table_is_that_which_codecarbon_uses(self) -> None:
        """Not forced, codecarbon comes to the intensity that we read from its file."""
        from codecarbon.core.emissions import Emissions
        from codecarbon.core.units import Energy as Units
        from codecarbon.external.geography import GeoMetadata
        from codecarbon.input import DataSource

        emissions = Emissions(DataSource())  # type: ignore[no-untyped-call]  # codecarbon's
        for country in ("SWE", "DEU", "POL", "USA"):
            geo = GeoMetadata(country_iso_code=country)
            kg = emissions.get_private_infra_emissions(Units(kWh=1.0), geo)
            assert 1000 * kg == pytest.approx(Intensity.of(country).g_per_kwh)

    def test_it_works_without_a_network_and_its_own_settings_do_not_count(
        self, no_network: list[object], own_settings: None, tmp_path: Path
    ) -> None:
        found = measured(EnergySettings("SWE", pue=1.0))
        assert no_network == []
        assert found.circumstances.country == "SWE"
        assert found.kg_co2e == pytest.approx(Intensity.of("SWE").g_per_kwh / 1000 * found.kwh)
        assert 3.6e6 * found.memory_kwh / found.seconds < 1000  # watts
        assert [path.name for path in tmp_path.iterdir()] == [".codecarbon.config"]

    def test_control_its_own_settings_would_count(
        self, no_network: list[object], own_settings: None
    ) -> None:
        """Positive control: left to itself, codecarbon takes them and turns to the network."""
        from codecarbon import OfflineEmissionsTracker

        tracker = OfflineEmissionsTracker(log_level="critical")
        tracker.start()
        time.sleep(0.3)
        tracker.stop()
        assert tracker.final_emissions_data.pue == 9
        assert no_network

    def test_pue_multiplies(self) -> None:
        plain, double = measured(GERMANY), measured(EnergySettings("DEU", pue=2.0))
        watts = [3.6e6 * each.memory_kwh / each.seconds for each in (plain, double)]
        assert watts[1] == pytest.approx(2 * watts[0], rel=0.2)

    def test_without_a_power_interface_it_is_modelled(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from codecarbon.core import cpu

        if cpu.is_rapl_available():
            pytest.skip("this machine has a power interface")
        assert measured(GERMANY).circumstances.method == "modelled, order of magnitude"
        # Allowed later: codecarbon keeps what it found first, and the figure is a model's.
        monkeypatch.setattr(cpu, "is_rapl_available", lambda: True)
        assert measured(GERMANY).circumstances.method == "modelled, order of magnitude"

    def test_what_was_read_is_named(self) -> None:
        modelled = read(SimpleNamespace(_mode="cpu_load"))
        assert modelled.circumstances.method == "modelled, order of magnitude"
        assert read(RAPL).circumstances.method == "measured (RAPL)"
        on_gpus = read(RAPL, EnergySettings("DEU", device="cuda"), gpu_energy=2.0)
        assert on_gpus.circumstances.interfaces[0] == "RAPL"
        assert len(on_gpus.circumstances.interfaces) == 2
        assert on_gpus.circumstances.hardware.endswith(", a GPU")

    def test_gpus_that_the_job_does_not_use_do_not_count(self) -> None:
        found = read(RAPL, gpu_energy=2.0)
        assert (found.gpu_kwh, found.kwh) == (0.0, 4.0)
        assert found.kg_co2e == pytest.approx(0.4 * 4.0)

    def test_a_power_interface_that_reads_nothing_gives_no_figure(self) -> None:
        with pytest.raises(DataError, match="nothing from RAPL"):
            read(RAPL, cpu_energy=0.0)

    def test_a_job_on_gpus_that_cannot_be_read_has_no_figure(self) -> None:
        from codecarbon.core.gpu import is_nvidia_system, is_rocm_system

        if is_nvidia_system() or is_rocm_system():
            pytest.skip("this machine's GPU can be read")
        with pytest.raises(DataError, match="no GPU"):
            measured(EnergySettings("DEU", device="cuda"))

    def test_a_tracker_that_hides_its_failure_has_no_figure(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from codecarbon.emissions_tracker import BaseEmissionsTracker

        monkeypatch.setattr(BaseEmissionsTracker, "_ensure_hardware_ready", lambda _: 1 / 0)
        with pytest.raises(DataError, match="gave no figure"):
            measured(GERMANY)

    def test_a_tracker_that_fails_half_way_has_no_figure(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from codecarbon.emissions_tracker import BaseEmissionsTracker

        meter = CodeCarbon.start(GERMANY)
        monkeypatch.setattr(BaseEmissionsTracker, "_do_measurements", lambda _: 1 / 0)
        time.sleep(0.1)
        with pytest.raises(DataError, match="gave no figure"):
            meter.stop()

    @pytest.mark.parametrize("silenced", [True, False])
    def test_it_prints_nothing(self, silenced: bool) -> None:
        """In a fresh process; the control shows what codecarbon would print."""
        ours = """
from fedcmr_client.energy import EnergySettings
from fedcmr_client.energy_meter import CodeCarbon
CodeCarbon.start(EnergySettings("DEU")).stop()
"""
        theirs = """
from codecarbon import OfflineEmissionsTracker
OfflineEmissionsTracker(country_iso_code="DEU", log_level="info", allow_multiple_runs=True)
"""
        code = ours if silenced else theirs
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        assert (done.stdout + done.stderr == b"") is silenced


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedcmr_client.energy_meter.GRACE_S", 0.0)


@pytest.mark.usefixtures("at_once")
class TestMeter:
    def test_seconds_before_it_runs_count_at_the_mean_power(self) -> None:
        meter = EnergyMeter(GERMANY, lambda _: FakeMeter(seconds=1.0))
        meter.start()
        time.sleep(1.25)
        (found,) = meter.stop().measured
        assert found.seconds > 1.2
        assert 3.6e6 * found.kwh / found.seconds == pytest.approx(360.0)
        assert found.kg_co2e == pytest.approx(0.4 * found.kwh)

    def test_cpu_seconds_are_those_of_the_work(self) -> None:
        meter = EnergyMeter(GERMANY, lambda _: FakeMeter())
        meter.start()
        end = time.process_time() + 0.3
        while time.process_time() < end:
            pass
        (found,) = meter.stop().measured
        assert 0.3 <= found.cpu_seconds < 1.0

    def test_a_start_that_hangs_delays_nothing(self) -> None:
        go, late = threading.Event(), FakeMeter()

        def begin(_: EnergySettings) -> FakeMeter:
            go.wait(10)
            return late

        meter = EnergyMeter(GERMANY, begin)
        began = time.monotonic()
        meter.start()
        found = meter.stop()
        assert time.monotonic() - began < 1.0
        assert (found.measured, found.unmeasured_pieces) == ((), 1)
        assert not late.stopped.is_set()
        go.set()
        assert late.stopped.wait(10)  # nothing goes on measuring afterwards

    @pytest.mark.parametrize("where", ["begin", "stop", "too short"])
    def test_without_a_figure_it_says_so(
        self, where: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        def begin(_: EnergySettings) -> FakeMeter:
            if where == "begin":
                raise RuntimeError("broken")
            return FakeMeter(0.2, RuntimeError("broken") if where == "stop" else None)

        meter = EnergyMeter(GERMANY, begin)
        with caplog.at_level(logging.WARNING):
            meter.start()
            time.sleep(0.05)
            found = meter.stop()
        assert (found.measured, found.unmeasured_pieces) == ((), 1)
        assert found.unmeasured_seconds >= 0.05
        assert ("not measured" in caplog.text) is (where != "too short")


def test_short_work_starts_no_meter() -> None:
    began: list[EnergySettings] = []

    def begin(settings: EnergySettings) -> FakeMeter:
        began.append(settings)
        return FakeMeter()

    before = set(threading.enumerate())
    meter = EnergyMeter(GERMANY, begin)
    meter.start()
    (thread,) = (each for each in set(threading.enumerate()) - before if each.name == "energy")
    assert meter.stop().unmeasured_pieces == 1
    thread.join(10)
    assert not thread.is_alive()
    assert began == []


@pytest.mark.usefixtures("at_once")
class TestMetered:
    """What happens around a round."""

    @pytest.fixture
    def log(self, tmp_path: Path) -> EnergyLog:
        return EnergyLog.beside(tmp_path / "ledger")

    @pytest.fixture
    def broken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "codecarbon", None)  # importing it fails

    def test_work_is_counted_for_its_job(
        self, log: EnergyLog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        CodeCarbon.start(GERMANY).stop()  # so that it starts at once
        # On a busy machine that still takes some of the 1.2 seconds.
        monkeypatch.setattr("fedcmr_client.energy_meter.LEAST_S", 0.01)
        with metered(GERMANY, log, JOB):
            time.sleep(1.2)
        with metered(GERMANY, log, JOB):
            time.sleep(1.2)
        (found,) = log.read(JOB).measured
        assert found.seconds == pytest.approx(2.4, rel=0.2)
        assert found.circumstances.country == "DEU"
        assert found.kwh > 0

    def test_without_settings_nothing_is_kept(self, log: EnergyLog) -> None:
        with metered(None, log, JOB):
            pass
        assert not log.folder.exists()

    def test_a_broken_meter_does_not_break_the_work(self, log: EnergyLog, broken: None) -> None:
        done = []
        with metered(GERMANY, log, JOB):
            time.sleep(0.05)
            done.append("work")
        assert done == ["work"]
        assert log.read(JOB).unmeasured_pieces == 1

    def test_a_failure_of_the_work_is_the_work_s(self, log: EnergyLog, broken: None) -> None:
        with pytest.raises(ZeroDivisionError), metered(GERMANY, log, JOB):
            _ = 1 / 0
        assert log.read(JOB).unmeasured_pieces == 1

    def test_a_damaged_log_does_not_break_the_work(
        self, log: EnergyLog, broken: None, caplog: pytest.LogCaptureFixture
    ) -> None:
        log.folder.mkdir(parents=True)
        (log.folder / f"{JOB}.json").write_text("{")
        with metered(GERMANY, log, JOB):
            pass
        assert "is lost" in caplog.text
