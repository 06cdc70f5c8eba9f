"""Energy and emissions of each job at this site: the site's own report.

A figure of energy tells how long a round took and so, roughly, how many patients it had. Figures
therefore stay in the ledger's folder. What may leave is `rounded_total` of a job, and only as a
term of a secure sum. Figures come from `fedcmr_client.energy_meter`, grid intensities from the table
that codecarbon ships.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from functools import cache
from importlib.metadata import distribution
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedcmr_client.ledger.place import make_folder, write_durably
from fedcmr_shared.errors import ConfigurationError, LedgerError
from fedcmr_shared.schemas.policy import SitePolicy

FOLDER: Final = "energy"
"""Name of the folder of figures, in the ledger's folder."""

LEAST_KWH: Final = 0.1
"""Smallest total that leaves a site."""

DISAGREE: Final = 2.0
"""Two estimates that differ by more than this factor are flagged."""

J_PER_KWH: Final = 3.6e6
_FROZEN = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

Amount = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class Intensity:
    """Emissions of a grid in g CO2e per kWh, as a mean of ``year``."""

    g_per_kwh: float
    year: int

    @classmethod
    def of(cls, country: str) -> Self:
        """Return that of ``country`` (ISO 3166, three letters) in codecarbon's table.

        Raises:
            ConfigurationError: the table has no such country.
        """
        known = _countries()
        if country not in known:
            raise ConfigurationError(
                f"energy.country {country!r} is none of the {len(known)} countries whose grid "
                "intensity is known: write its three letters by ISO 3166, such as DEU"
            )
        return cls(known[country]["carbon_intensity"], known[country]["year"])


@cache
def _countries() -> dict[str, dict[str, Any]]:
    # Read without importing codecarbon, which looks at the machine when it is imported.
    table = "codecarbon/data/private_infra/global_energy_mix.json"
    path = Path(str(distribution("codecarbon").locate_file(table)))
    countries: dict[str, dict[str, Any]] = json.loads(path.read_text())
    # No grid emits nothing: a zero there is a gap.
    return {code: row for code, row in countries.items() if row["carbon_intensity"] > 0}


@dataclass(frozen=True)
class EnergySettings:
    """How a site counts energy; it has no default country, since intensities differ 60-fold.

    ``pue`` is what the data centre uses in all over what its computers use. ``watts_per_thread`` is
    the power of one busy processor thread, for the second estimate. GPUs count where ``device`` is
    *cuda*: those that this process may see.

    Raises:
        ConfigurationError: the country is unknown, or a number is out of its range.
    """

    country: str
    pue: float = 1.0
    watts_per_thread: float = 4.0
    device: Literal["cpu", "cuda"] = "cpu"

    def __post_init__(self) -> None:
        Intensity.of(self.country)
        if not 1 <= self.pue < math.inf:
            raise ConfigurationError(f"energy.pue is {self.pue}: write 1 or more")
        if not 0 < self.watts_per_thread < math.inf:
            raise ConfigurationError(
                f"energy.watts_per_thread is {self.watts_per_thread}: write a power in watts"
            )

    @classmethod
    def of(cls, policy: SitePolicy) -> Self | None:
        """Return what ``policy`` says, or None where it has no energy counted."""
        block = policy.energy
        if block is None:
            return None
        return cls(block.country, block.pue, block.watts_per_thread, policy.device)


class Circumstances(BaseModel):
    """What a figure rests on. ``interfaces`` are power meters that were read; without one it is
    modelled."""

    model_config = _FROZEN

    country: str
    g_per_kwh: Amount
    intensity_year: int
    pue: Annotated[float, Field(ge=1)]
    watts_per_thread: Amount
    hardware: str
    interfaces: tuple[str, ...]
    tool: str

    @property
    def method(self) -> str:
        """*measured*, and by what, or *modelled, order of magnitude*."""
        if not self.interfaces:
            return "modelled, order of magnitude"
        return f"measured ({', '.join(self.interfaces)})"


class Energy(BaseModel):
    """Energy of some work under the same circumstances, in kWh and PUE included.

    ``memory_kwh`` is always modelled: a constant power for the machine's memory. So is
    ``processor_kwh`` unless RAPL is among the interfaces. ``seconds`` are those of the work,
    ``cpu_seconds`` those of its processes.
    """

    model_config = _FROZEN

    circumstances: Circumstances
    seconds: Amount
    cpu_seconds: Amount
    processor_kwh: Amount
    gpu_kwh: Amount
    memory_kwh: Amount
    kg_co2e: Amount

    @property
    def kwh(self) -> float:
        """All parts together."""
        return self.processor_kwh + self.gpu_kwh + self.memory_kwh

    @property
    def second_kwh(self) -> float:
        """The second estimate: CPU-seconds times watts per thread times PUE, and GPUs as read."""
        under = self.circumstances
        joules = self.cpu_seconds * under.watts_per_thread * under.pue
        return joules / J_PER_KWH + self.gpu_kwh

    @property
    def disagrees(self) -> bool:
        """Whether the two estimates differ by more than `DISAGREE`."""
        low, high = sorted((self.kwh, self.second_kwh))
        return high > DISAGREE * low

    def __add__(self, other: Energy) -> Energy:
        """Return both together; ValueError if their circumstances differ."""
        if self.circumstances != other.circumstances:
            raise ValueError("energy under different circumstances does not add up")
        amounts = set(type(self).model_fields) - {"circumstances"}
        sums = {name: getattr(self, name) + getattr(other, name) for name in amounts}
        return self.model_copy(update=sums)


class JobEnergy(BaseModel):
    """What is known about a job: measured work by circumstances, and work that was not measured."""

    model_config = _FROZEN

    measured: tuple[Energy, ...] = ()
    unmeasured_pieces: Annotated[int, Field(ge=0)] = 0
    unmeasured_seconds: Amount = 0.0

    def __add__(self, other: JobEnergy) -> JobEnergy:
        """Return both together."""
        by = {energy.circumstances: energy for energy in self.measured}
        for energy in other.measured:
            known = by.get(energy.circumstances)
            by[energy.circumstances] = energy if known is None else known + energy
        return JobEnergy(
            measured=tuple(by.values()),
            unmeasured_pieces=self.unmeasured_pieces + other.unmeasured_pieces,
            unmeasured_seconds=self.unmeasured_seconds + other.unmeasured_seconds,
        )

    @property
    def kwh(self) -> float:
        """Energy of all measured work."""
        return math.fsum(energy.kwh for energy in self.measured)


def rounded_total(kwh: float) -> float:
    """Round ``kwh`` up to one significant digit, and to `LEAST_KWH` at least.

    This may leave a site as a term of a secure sum. Whoever subtracts all other terms learns the
    energy to within 11 % (a nine) to 50 % (a two), and nothing below `LEAST_KWH`. A term is at most
    twice too much. Work without a figure and next to no work look alike.

    Raises:
        ValueError: ``kwh`` is negative or no number.
    """
    if not 0 <= kwh < math.inf:
        raise ValueError(f"{kwh} kWh is no energy")
    exact = Decimal(repr(float(max(kwh, LEAST_KWH))))
    step = Decimal(1).scaleb(exact.adjusted())
    return float((exact / step).to_integral_value(ROUND_CEILING) * step)


@dataclass(frozen=True)
class EnergyLog:
    """Figures by job: one file a job, in ``folder``, which lies in the ledger's folder.

    One process at a time may add to a job. Raises LedgerError when a file cannot be read or
    written.
    """

    folder: Path

    @classmethod
    def beside(cls, ledger: Path) -> Self:
        """Return the log of the site whose ledger's folder is ``ledger``."""
        return cls(ledger / FOLDER)

    def add(self, job: str, energy: JobEnergy) -> None:
        """Count ``energy`` for the job of that SHA-256."""
        total = self.read(job) + energy
        path = self._path(job)
        try:
            make_folder(self.folder)
            write_durably(path, total.model_dump_json(indent=1).encode())
        except OSError as error:
            raise LedgerError(f"{path}: cannot be written: {error.strerror}") from error

    def read(self, job: str) -> JobEnergy:
        """Return what is known about a job; nothing is known about one without a file."""
        path = self._path(job)
        try:
            return JobEnergy.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return JobEnergy()
        except OSError as error:
            raise LedgerError(f"{path}: cannot be read: {error.strerror}") from error
        except ValidationError as error:
            raise LedgerError(
                f"{path}: cannot be read: delete it to start the job's figures anew"
            ) from error

    def jobs(self) -> list[str]:
        """Return the SHA-256 of every job with a file, sorted."""
        return sorted(path.stem for path in self.folder.glob("*.json"))

    def _path(self, job: str) -> Path:
        return self.folder / f"{job}.json"
