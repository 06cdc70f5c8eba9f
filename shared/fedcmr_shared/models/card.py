"""Cards of released models: where one comes from, what it cost patients, what it is for."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from typing import Annotated, Final, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from fedcmr_shared.errors import ConfigurationError, JobRefused
from fedcmr_shared.privacy.job_claim import JobClaim, claim_of
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.ledger import Hash
from fedcmr_shared.schemas.policy import SiteName
from fedcmr_shared.schemas.privacy import Metric
from fedcmr_shared.schemas.signed_job import JobAuthorisation

_FROZEN = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
_PACKAGES: Final = ("fedcmr", "torch", "flwr", "opacus", "dp-accounting")

Text = Annotated[str, Field(min_length=1, max_length=2000)]


class Start(BaseModel):
    """The model before round 1: from the job's seed, or from a bundle, whose notes are kept."""

    model_config = _FROZEN

    origin: Literal["seed", "bundle"]
    model_sha256: Hash
    notes: dict[str, str] = Field(default_factory=dict)


class LineageRound(BaseModel):
    """One round: how many sites were summed, and the model after it.

    A closed round could not be opened: nobody was summed and the model stayed.
    """

    model_config = _FROZEN

    number: Annotated[int, Field(ge=1)]
    sites: Annotated[int, Field(ge=0)]
    closed: bool
    model_sha256: Hash


class Lineage(BaseModel):
    """Which model came from which; hashes are those of `fedcmr_shared.models.bundle`."""

    model_config = _FROZEN

    start: Start
    rounds: Annotated[tuple[LineageRound, ...], Field(min_length=1, max_length=10_000)]
    roster_sha256: Hash | None = Field(
        description="roster of a job that aggregates securely; null when it does not"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if [one.number for one in self.rounds] != list(range(1, len(self.rounds) + 1)):
            raise ValueError("rounds: they must be numbered 1, 2, … without a gap")
        before = (self.start.model_sha256, *(one.model_sha256 for one in self.rounds))
        for one, (old, new) in zip(self.rounds, pairwise(before), strict=True):
            if one.closed and (one.sites or old != new):
                raise ValueError(f"rounds: round {one.number} is closed, yet the model changed")
        return self

    @property
    def model_sha256(self) -> str:
        """The released model."""
        return self.rounds[-1].model_sha256


class Evaluation(BaseModel):
    """Means over the held-out patients of ``sites`` sites, after ``round``."""

    model_config = _FROZEN

    round: Annotated[int, Field(ge=1)]
    sites: Annotated[int, Field(ge=1)]
    means: Annotated[dict[Metric, float], Field(min_length=1)]


class GateResult(BaseModel):
    """What a release gate found."""

    model_config = _FROZEN

    gate: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
    passed: bool
    text: Text


class ModelCard(BaseModel):
    """The card of a released model, as the coordinator of ``federation`` signs it.

    ``federation_sha256`` is the SHA-256 of the authority's certificate. ``job_sha256`` is the
    identity of ``job``, ``privacy`` what it costs a patient, recomputed by whoever verifies.
    ``energy_kwh`` is what the sites' rounded terms add up to, where the job asks for them.
    """

    model_config = _FROZEN

    schema_version: Literal["1"] = "1"
    federation: SiteName
    federation_sha256: Hash
    job_sha256: Hash
    job: JobSpec
    authorisation: JobAuthorisation
    lineage: Lineage
    privacy: JobClaim
    evaluation: tuple[Evaluation, ...]
    gates: Annotated[tuple[GateResult, ...], Field(max_length=100)]
    software: dict[str, str]
    energy_kwh: Annotated[float, Field(ge=0)] | None = Field(
        default=None, exclude_if=lambda value: value is None
    )
    intended_use: Text
    limits: Annotated[tuple[Text, ...], Field(min_length=1, max_length=50)]
    created_at: AwareDatetime

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.job_sha256 == self.job.sha256 == self.authorisation.job:
            raise ValueError("job_sha256 and authorisation must be those of job")
        if self.authorisation.federation != self.federation_sha256:
            raise ValueError("authorisation: it is of another federation")
        _check_claim(self.job, self.privacy)
        _check_rounds(self.job, self.lineage)
        _check_evaluation(self.job, self.evaluation)
        _check_gates(self.job, self.gates)
        if self.energy_kwh is not None and not self.asks_energy:
            raise ValueError("energy_kwh: the job asks the sites for no energy")
        return self

    @property
    def asks_energy(self) -> bool:
        """Whether the sites could let the energy of the job out, with an evaluation."""
        privacy = self.job.privacy
        asked = privacy is not None and privacy.evaluation.energy_total
        return asked and bool(self.job.evaluated_rounds())


def _check_claim(job: JobSpec, claim: JobClaim) -> None:
    try:
        expected = claim_of(job)
    except (ConfigurationError, JobRefused) as error:
        raise ValueError(f"privacy: {error}") from error
    if not claim.agrees_with(expected):
        raise ValueError(
            f"privacy: the claim (ε = {claim.epsilon:.6g}) is not the one that follows from the "
            f"job (ε = {expected.epsilon:.6g})"
        )


def _check_rounds(job: JobSpec, lineage: Lineage) -> None:
    if len(lineage.rounds) != job.rounds:
        raise ValueError(f"lineage: {len(lineage.rounds)} rounds, the job has {job.rounds}")
    if (job.aggregation == "plain_with_local_dp") != (lineage.roster_sha256 is None):
        raise ValueError("lineage.roster_sha256: a job that aggregates securely has a roster")
    for one in lineage.rounds:
        if not one.closed and one.sites < job.minimum_sites:
            raise ValueError(
                f"lineage: round {one.number} is over {one.sites} sites, the job asks for at "
                f"least {job.minimum_sites}"
            )


def _check_evaluation(job: JobSpec, evaluation: tuple[Evaluation, ...]) -> None:
    rounds = [found.round for found in evaluation]
    if rounds != sorted(set(rounds)) or set(rounds) - set(job.evaluated_rounds()):
        raise ValueError("evaluation: other rounds than those that the job evaluates, or no order")
    asked = job.privacy.evaluation if job.privacy else None
    if evaluation and asked is not None and asked.memorisation:
        raise ValueError("evaluation: the job asks for its gates' word, which has no means")
    metrics = set(asked.metrics) if asked else set()
    for found in evaluation:
        if set(found.means) - metrics:
            raise ValueError(f"evaluation: round {found.round} has metrics that the job asks not")


def _check_gates(job: JobSpec, gates: tuple[GateResult, ...]) -> None:
    failed = [found.gate for found in gates if not found.passed]
    if failed:
        raise ValueError(f"gates: {failed[0]} did not pass, so the model cannot be released")
    needed = PURPOSES[job.model.name].gates if job.model.name in PURPOSES else ()
    for gate in needed:
        if gate not in {found.gate for found in gates}:
            raise ValueError(
                f"gates: {gate} is missing, and no {job.model.name} is released without it"
            )


@dataclass(frozen=True)
class Purpose:
    """What models of a family are for, and what a card says against them.

    ``gates`` are those without which no model of the family is released.
    """

    use: str
    limits: tuple[str, ...]
    gates: tuple[str, ...] = ()


_PRIVACY_LIMIT: Final = (
    "The privacy figure holds if each site ran the mechanism as its log says; it bounds this job "
    "alone. What other jobs cost the same patients adds to it, and so do other hospitals that know "
    "them."
)
_MEANS_LIMIT: Final = (
    "Figures are means over the patients of all sites; how the model does at one site, on one "
    "scanner or in one group of patients was not measured and may be far worse."
)
_SYNTHETIC: Final = (
    "Research on methods that need many examples. Not a medical device: no diagnosis, treatment or "
    "statement about a population may rest on what it draws, and everything that it draws is to be "
    "marked as synthetic."
)

_INVENTED: Final = (
    "Reconstructions can look convincing and be wrong: small structures may be missing or made up."
)
_IMPOSSIBLE: Final = (
    "Hearts can look convincing and be impossible; rare diseases may be missing, and how well a "
    "clip has the phenotypes that were asked for differs from one to the next."
)
_COPIES: Final = (
    "That the sites' gates found no copies does not mean that there are none: a gate sees as many "
    "samples as the site has validation patients, and only copies that its detector knows. The ε "
    "does not cover what the gates let out."
)
_NOISY: Final = (
    "Vectors follow the patients of the sites, as far as the noise left anything of them, and no "
    "other population."
)

PURPOSES: Final[Mapping[str, Purpose]] = {
    "cardiomm": Purpose(
        "Research on the reconstruction of undersampled cardiac MR images acquired as the job "
        "describes. Not a medical device: no diagnosis or treatment may rest on its output.",
        (_MEANS_LIMIT, _INVENTED, _PRIVACY_LIMIT),
    ),
    "cpgg": Purpose(_SYNTHETIC, (_IMPOSSIBLE, _COPIES, _PRIVACY_LIMIT), gates=("memorisation",)),
    "phenotype-gaussian": Purpose(_SYNTHETIC, (_NOISY, _PRIVACY_LIMIT)),
    "phenotype-vae": Purpose(_SYNTHETIC, (_NOISY, _PRIVACY_LIMIT)),
}
"""Purposes by the model's name; every model that sites train has one."""


def software() -> dict[str, str]:
    """Return the versions of what trained and released the model."""
    return {**{name: version(name) for name in _PACKAGES}, "python": platform.python_version()}


def bounded_notes(extra: Mapping[str, str]) -> dict[str, str]:
    """Return what a bundle says of itself, its longest texts cut."""
    return {name: text if len(text) <= 2000 else f"{text[:1999]}…" for name, text in extra.items()}
