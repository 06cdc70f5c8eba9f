"""Measures the energy of a round, without ever standing in its way.

The meter is codecarbon, offline and for the whole machine: its mode for single processes is
unreliable where no power interface can be read. It looks at the machine for seconds before it runs.
It does so in a thread beside the work, and only for work that lasts longer than `GRACE_S`; the
seconds before are counted at the mean power of those after. Whatever goes wrong with it, the work
goes on, and the report says that it was not measured. The end of the work waits for one last reading.
"""

from __future__ import annotations

import logging
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Protocol, Self, TypeVar

from fedcmr_client.energy import (
    Circumstances,
    Energy,
    EnergyLog,
    EnergySettings,
    Intensity,
    JobEnergy,
)
from fedcmr_shared.errors import DataError, LedgerError

if TYPE_CHECKING:
    from codecarbon import OfflineEmissionsTracker

GRACE_S: Final = 5.0
"""Work that is over by then starts no meter: rounds of a few seconds are not slowed."""

LEAST_S: Final = 1.0
"""Work over which the meter ran for less is not measured: it reads loads once a second."""

_log = logging.getLogger("fedcmr.site")

Result = TypeVar("Result")


class Running(Protocol):
    """A power meter that runs."""

    def stop(self) -> Energy:
        """Stop it and return the energy since its start; CPU-seconds are left out."""


class CodeCarbon:
    """codecarbon, running. The only place that knows it; `start` takes seconds the first time."""

    def __init__(
        self, tracker: OfflineEmissionsTracker, settings: EnergySettings, intensity: Intensity
    ) -> None:
        self._tracker = tracker
        self._settings = settings
        self._intensity = intensity

    @classmethod
    def start(cls, settings: EnergySettings, intensity: Intensity | None = None) -> Self:
        """Start it, by default with the country's intensity."""
        # It logs to standard error, also while it is imported.
        logging.getLogger("codecarbon").disabled = True
        from codecarbon import OfflineEmissionsTracker

        intensity = intensity or Intensity.of(settings.country)
        tracker = OfflineEmissionsTracker(
            country_iso_code=settings.country,
            pue=settings.pue,
            force_carbon_intensity_g_co2e_kwh=intensity.g_per_kwh,
            **_fixed(),
        )
        tracker.start()
        return cls(tracker, settings, intensity)

    def stop(self) -> Energy:
        """Stop it and return its figures.

        Raises:
            DataError: it has none, which it only logs, or none of a processor or of GPUs that it
                was to read.
        """
        self._tracker.stop()
        data = getattr(self._tracker, "final_emissions_data", None)
        if data is None or data.energy_consumed <= 0:
            raise DataError("codecarbon gave no figure")
        if self._reads_rapl and data.cpu_energy <= 0:
            raise DataError("codecarbon read nothing from RAPL: may the agent read energy_uj?")
        on_gpus = self._settings.device == "cuda"
        if on_gpus and data.gpu_energy <= 0:
            raise DataError("codecarbon read no GPU, and without those its figure means little")
        gpu_kwh = data.gpu_energy if on_gpus else 0.0
        counted = data.cpu_energy + data.ram_energy + gpu_kwh
        return Energy(
            circumstances=self._circumstances(data, gpu_kwh),
            seconds=data.duration,
            cpu_seconds=0.0,
            processor_kwh=data.cpu_energy,
            gpu_kwh=gpu_kwh,
            memory_kwh=data.ram_energy,
            kg_co2e=data.emissions * counted / data.energy_consumed,
        )

    @property
    def _reads_rapl(self) -> bool:
        """Whether this tracker reads RAPL; it keeps for a process's life what it chose at first."""
        return any(getattr(each, "_mode", None) == "intel_rapl" for each in self._tracker._hardware)

    def _circumstances(self, data: Any, gpu_kwh: float) -> Circumstances:
        from codecarbon.core.gpu import PYNVML_AVAILABLE

        hardware = f"{data.cpu_model}, {data.cpu_count} threads, {data.ram_total_size:.0f} GiB"
        interfaces = ["RAPL"] if self._reads_rapl else []
        if gpu_kwh:
            hardware += f", {data.gpu_model}"
            interfaces.append("NVML" if PYNVML_AVAILABLE else "AMD SMI")
        return Circumstances(
            country=self._settings.country,
            g_per_kwh=self._intensity.g_per_kwh,
            intensity_year=self._intensity.year,
            pue=self._settings.pue,
            watts_per_thread=self._settings.watts_per_thread,
            hardware=hardware,
            interfaces=tuple(interfaces),
            tool=f"codecarbon {data.codecarbon_version}",
        )


def _fixed() -> dict[str, Any]:
    """What codecarbon would else take from its own configuration files or the environment.

    Files in the home and working folder could make it report to a server.
    """
    return {
        "tracking_mode": "machine",
        "output_methods": [],
        "output_handlers": [],
        "output_dir": ".",
        "emissions_endpoint": None,
        "electricitymaps_api_token": None,
        "api_call_interval": -1,
        "allow_multiple_runs": True,
        "cloud_provider": None,
        "cloud_region": None,
        "region": None,
        "country_2letter_iso_code": None,
        "force_cpu_power": None,
        "force_ram_power": None,
        "force_mode_cpu_load": False,
        "rapl_include_dram": False,
        "rapl_prefer_psys": False,
        "gpu_ids": None,  # those of CUDA_VISIBLE_DEVICES
        "wue": 0.0,
        "measure_power_secs": 15.0,
        "log_level": "critical",
        "logger_preamble": "",
    }


class EnergyMeter:
    """Measures a piece of work between `start` and `stop`; neither raises.

    ``begin`` starts a power meter, in a thread of its own: `start` does not wait for it. `stop` waits
    for the last reading of a meter that runs, and not for one that is about to.
    """

    def __init__(
        self,
        settings: EnergySettings,
        begin: Callable[[EnergySettings], Running] = CodeCarbon.start,
    ) -> None:
        self._settings = settings
        self._begin = begin
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._running: Running | None = None
        self._started = 0.0
        self._cpu = 0.0

    def start(self) -> None:
        """The work begins."""
        self._started, self._cpu = time.monotonic(), used_cpu_seconds()
        thread = threading.Thread(target=self._run, name="energy", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            _log.warning("energy is not measured: %s", error)

    def stop(self) -> JobEnergy:
        """The work is over: return its energy, or that it was not measured."""
        seconds, cpu = time.monotonic() - self._started, used_cpu_seconds() - self._cpu
        with self._lock:
            self._over.set()
            running = self._running
        energy = None if running is None else _attempt(running.stop)
        if energy is None or energy.seconds < LEAST_S:
            return JobEnergy(unmeasured_pieces=1, unmeasured_seconds=seconds)
        return JobEnergy(measured=(_stretched(energy, seconds, cpu),))

    def _run(self) -> None:
        if self._over.wait(GRACE_S):
            return
        running = _attempt(lambda: self._begin(self._settings))
        with self._lock:
            if not self._over.is_set():
                self._running = running
                return
        if running is not None:
            _attempt(running.stop)


def _attempt(step: Callable[[], Result]) -> Result | None:
    """Return what ``step`` of a meter gives, or None when it fails.

    Nothing narrower will do: codecarbon and the drivers below it name no errors, and patients' budget
    is already spent on the round that an error would end.
    """
    try:
        return step()
    except Exception:  # noqa: BLE001  # see above
        _log.warning("energy is not measured", exc_info=True)
        return None


def _stretched(energy: Energy, seconds: float, cpu_seconds: float) -> Energy:
    """Count the seconds before the meter ran at the mean power of those after."""
    factor = max(1.0, seconds / energy.seconds)
    amounts = ("processor_kwh", "gpu_kwh", "memory_kwh", "kg_co2e")
    stretched = {name: getattr(energy, name) * factor for name in amounts}
    return energy.model_copy(
        update={**stretched, "seconds": seconds, "cpu_seconds": max(0.0, cpu_seconds)}
    )


def used_cpu_seconds() -> float:
    """Return the CPU-seconds of this process so far and of its children that have ended."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


@contextmanager
def metered(settings: EnergySettings | None, log: EnergyLog, job: str) -> Iterator[None]:
    """Count the energy of the work inside for ``job``; without settings, do nothing.

    What goes wrong with that is logged and raises nothing.
    """
    if settings is None:
        yield
        return
    meter = EnergyMeter(settings)
    meter.start()
    try:
        yield
    finally:
        try:
            log.add(job, meter.stop())
        except LedgerError as error:
            _log.warning("energy of job %s is lost: %s", job, error)
