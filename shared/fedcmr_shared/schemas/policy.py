"""A site's policy: what it lets jobs do, whatever they ask for.

The rules here only restrict, and what is not allowed by name is refused: an empty list allows
nobody. Reading the file and its folders is `fedcmr_client.policy`.
"""

from __future__ import annotations

import hashlib
import re
from datetime import date, time
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from fedcmr_shared.schemas.canonical import canonical_json
from fedcmr_shared.schemas.job import FEWEST_SITES, Aggregation
from fedcmr_shared.schemas.privacy import Metric

_STRICT = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
_QUIET: Final = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")

CohortAttribute = Literal["modalities", "views", "vendors", "acquired_from", "acquired_until"]


def _no_flag(value: object) -> object:
    # YAML reads `yes` as true, which would count as the number 1.
    if value is True or value is False:
        raise ValueError("a number is needed, not yes or no")
    return value


def _full_path(value: object) -> object:
    if str(value) == "" or str(value).startswith("~"):
        raise ValueError(f"{str(value)!r} is no path: write it in full, ~ is not understood")
    return value


def _hours(text: str) -> tuple[time, time]:
    match = _QUIET.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not HH:MM-HH:MM, such as 22:00-06:00")
    hour, minute, end_hour, end_minute = map(int, match.groups())
    return time(hour, minute), time(end_hour, end_minute)


def _check_hours(text: str) -> str:
    start, end = _hours(text)
    if start == end:
        raise ValueError(f"{text!r} is empty: for the whole day write 00:00-12:00 and 12:00-00:00")
    return text


Folder = Annotated[Path, BeforeValidator(_full_path)]
File = Folder
Flag = Annotated[bool, Field(strict=True)]
Real = Annotated[float, BeforeValidator(_no_flag)]
Whole = Annotated[int, BeforeValidator(_no_flag)]
SiteName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
Name = Annotated[str, StringConstraints(min_length=1)]
Delta = Annotated[Real, Field(ge=1e-12, lt=1)]
ModelName = Annotated[str, StringConstraints(pattern=r"^[^\s/]+(/(tiny|small|paper))?$")]
QuietHours = Annotated[str, AfterValidator(_check_hours)]


class LedgerPolicy(BaseModel):
    """Where the privacy ledger lies."""

    model_config = _STRICT

    folder: Folder = Field(
        description="Folder of the ledger: its log, the site's signing key and stored results."
    )
    second_place: Folder = Field(
        description="Folder on another disk or share, in no backup together with the ledger. The "
        "newest signed head of the log is kept there, so that a restored old ledger is noticed. "
        "It is never made: it would hide a share that is not mounted."
    )
    database_url: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="Null keeps the log in SQLite in the folder. For PostgreSQL: "
        "postgresql+psycopg://USER@HOST/DATABASE, without a password (use PGPASSWORD or .pgpass).",
    )
    checkpoint_hours: Annotated[Real, Field(ge=0.001, le=8760)] = Field(
        default=6.0,
        description="A checkpoint of the log is due for others every so many hours. Fixed when the "
        "ledger is made.",
    )
    checkpoint_entries: Annotated[Whole, Field(ge=1, le=1_000_000)] = Field(
        default=128,
        description="Each checkpoint covers so many entries more, padding included, whatever the "
        "site did. Fixed when the ledger is made.",
    )


class BudgetPolicy(BaseModel):
    """What one patient may cost in total, over all jobs, models and years.

    The ledger takes these numbers when it is made and keeps them for ever.
    """

    model_config = _STRICT

    epsilon: Annotated[Real, Field(gt=0)] = Field(
        default=8.0, description="Largest epsilon of any one patient, over all jobs together."
    )
    delta: Delta = Field(
        default=1e-5,
        description="Delta of that epsilon; far below one divided by the number of patients.",
    )
    order: Annotated[Whole, Field(ge=2)] | None = Field(
        default=None,
        description="Order of the Renyi filter that counts the budget. "
        "Null takes the one that admits most training.",
    )


class CohortPolicy(BaseModel):
    """Whose scans jobs may use at all, and what they may ask about."""

    model_config = _STRICT

    require_consent: Flag = Field(
        default=True, description="Use only scans of patients whose consent is recorded."
    )
    attributes: tuple[CohortAttribute, ...] = Field(
        default=("modalities",),
        description="Attributes that a job's cohort query may restrict: modalities, views, "
        "vendors, acquired_from, acquired_until. A query on any other one is refused.",
    )
    modalities: tuple[Name, ...] | None = Field(
        default=None, description="Modalities that jobs may use; null for all in the store."
    )
    acquired_from: date | None = Field(
        default=None, description="Use no scan acquired before this day (YYYY-MM-DD); null for all."
    )
    acquired_until: date | None = Field(
        default=None, description="Use no scan acquired after this day (YYYY-MM-DD); null for all."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.acquired_from and self.acquired_until and self.acquired_from > self.acquired_until:
            raise ValueError("acquired_from is later than acquired_until: no scan fits")
        return self


class EvaluationPolicy(BaseModel):
    """How scores on this site's held-out patients may leave."""

    model_config = _STRICT

    metrics: tuple[Metric, ...] = Field(
        default=("psnr", "ssim", "nmse"),
        description="Scores that may leave the site, as sums over its patients; empty for none. "
        "Generators need memorisation: one bit, whether the site's gate passed, which leaves "
        "without noise inside a secure sum only.",
    )
    allow_unnoised: Flag = Field(
        default=False,
        description="Let these sums leave without noise when a job asks for it, inside a secure "
        "sum only. They then have no epsilon, and every claim about the job says so.",
    )


class EnergyPolicy(BaseModel):
    """How this site measures the energy of jobs; the figures are its own."""

    model_config = _STRICT

    country: Annotated[str, Field(pattern=r"^[A-Z]{3}$")] = Field(
        description="Country of the grid, in three letters of ISO 3166 such as DEU: emissions per "
        "kWh follow from it."
    )
    pue: Annotated[Real, Field(ge=1)] = Field(
        default=1.0, description="Energy of the whole machine room per energy of its machines."
    )
    watts_per_thread: Annotated[Real, Field(gt=0)] = Field(
        default=4.0, description="Power of one busy thread in watts, for a second estimate."
    )
    report_total: Flag = Field(
        default=False,
        description="Add the energy that a job took to the sum of all sites when the job asks for "
        "it, without noise, rounded up to one digit and at least 0.1 kWh. Otherwise 0 leaves.",
    )


class SitePolicy(BaseModel):
    """What a site lets jobs do; nothing in a job or message can weaken it."""

    model_config = _STRICT

    site: SiteName = Field(description="Public name of the site: letters, digits, dot, dash.")
    store: Folder = Field(
        description="Folder of the site store, as `fedcmr data --store` takes it."
    )
    ledger: LedgerPolicy = Field(description="Where the privacy ledger lies.")
    device: Literal["cpu", "cuda"] = Field(
        default="cpu", description="Where training runs: cpu or cuda. Changes speed only."
    )
    processes: Annotated[Whole, Field(ge=1)] = Field(
        default=1,
        description="Training processes, one for each GPU, started by torchrun. Speed only.",
    )
    budget: BudgetPolicy = Field(
        default=BudgetPolicy(),
        description="What one patient may cost in total, over all jobs, models and years. "
        "The ledger took these numbers when it was made; changing them here alone is refused.",
    )
    max_epsilon_per_job: Annotated[Real, Field(gt=0)] = Field(
        default=4.0,
        description="Largest epsilon that one job may cost a patient, spare rounds included.",
    )
    max_delta: Delta = Field(
        default=1e-5,
        description="Largest delta that a job may declare; max_epsilon_per_job is meant at it.",
    )
    noise_multiplier: Annotated[Real, Field(gt=0)] = Field(
        default=0.5,
        description="Least noise multiplier of a job, in training and in noised evaluation.",
    )
    minimum_sites: Annotated[Whole, Field(ge=1)] = Field(
        default=3,
        description="A job must wait for at least this many sites in every round. At least 3 with "
        "the secure modes; the roster's threshold must not be below it.",
    )
    aggregation: Annotated[tuple[Aggregation, ...], Field(min_length=1)] = Field(
        default=("secure_sum",),
        description="Ways of aggregation that jobs may use. secure_sum: the coordinator opens one "
        "sum of all sites. secure_groups: it opens the sums of groups of at least three sites. "
        "plain_with_local_dp: it sees this site's updates, noised before they leave.",
    )
    roster: File | None = Field(
        default=None,
        description="File with the names and public keys of the federation's sites, which the "
        "secure modes need. Compare its fingerprint with the other sites, not with the coordinator.",
    )
    allow_distributed_noise: Flag = Field(
        default=False,
        description="Let jobs draw only each site's share of the noise. The guarantee then rests "
        "on secure aggregation and on a number of honest sites, not on this site alone.",
    )
    coordinators: tuple[Name, ...] = Field(
        default=(), description="Names of the coordinators that this site works for."
    )
    jobs: tuple[Name, ...] = Field(
        default=(),
        description="Names of allowed jobs; * and ? stand for any text and any character.",
    )
    models: tuple[ModelName, ...] = Field(
        default=(), description="Allowed models: NAME for all sizes, or NAME/SIZE."
    )
    cohort: CohortPolicy = Field(
        default=CohortPolicy(),
        description="Whose scans jobs may use at all, and what they may ask about.",
    )
    quiet_hours: tuple[QuietHours, ...] = Field(
        default=(),
        description="Times of day, as HH:MM-HH:MM in the site's local time, in which no job is "
        "accepted and no round starts; one that runs waits after its step. 22:00-06:00 goes over "
        "midnight.",
    )
    max_device_hours: Annotated[Real, Field(ge=0)] = Field(
        default=24.0,
        description="Most hours of computing that one job may ask for; two GPUs for one hour are "
        "two hours.",
    )
    max_energy_kwh: Annotated[Real, Field(ge=0)] = Field(
        default=10.0, description="Most energy in kWh that one job may ask for."
    )
    device_watts: Annotated[Real, Field(gt=0)] = Field(
        default=300.0,
        description="Power in watts of one device at work, from which energy is estimated.",
    )
    evaluation: EvaluationPolicy = Field(
        default=EvaluationPolicy(),
        description="How scores on this site's held-out patients may leave.",
    )
    energy: EnergyPolicy | None = Field(
        default=None,
        exclude_if=lambda block: block is None,  # policies of before keep their hash
        description="How energy is measured; null for not at all. Figures stay in the site's own "
        "report, `fedcmr site energy`.",
    )
    reply_tick_s: Annotated[Real, Field(gt=0, le=3600)] = Field(
        default=60.0,
        description="Replies leave at multiples of this many seconds, so that their time tells "
        "nothing about the data.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        folder, second = self.ledger.folder, self.ledger.second_place
        if folder == second or folder in second.parents:
            raise ValueError(
                "ledger.second_place lies in ledger.folder: choose a folder on another disk, or "
                "a backup would restore both together"
            )
        secure = [mode for mode in self.aggregation if mode != "plain_with_local_dp"]
        if secure and self.minimum_sites < FEWEST_SITES:
            raise ValueError(
                f"minimum_sites is {self.minimum_sites}, but aggregation lists {secure[0]}: write "
                f"at least {FEWEST_SITES}, since a sum of fewer hides nothing"
            )
        return self

    @property
    def sha256(self) -> str:
        """SHA-256 (hexadecimal) of the canonical JSON of all rules.

        Paths, device and processes are left out: an auditor gets the same value elsewhere.
        """
        places = {"store", "ledger", "roster", "device", "processes"}
        rules = self.model_dump(mode="json", exclude=places)
        return hashlib.sha256(canonical_json(rules)).hexdigest()

    def is_quiet(self, at: time) -> bool:
        """Whether ``at`` (local time of day) lies in the quiet hours, their end excluded."""
        clock = at.replace(tzinfo=None)
        for start, end in map(_hours, self.quiet_hours):
            inside = start <= clock < end if start < end else clock >= start or clock < end
            if inside:
                return True
        return False

    def energy_kwh(self, device_hours: float) -> float:
        """Estimate of the energy that ``device_hours`` take."""
        return device_hours * self.device_watts / 1000
