"""Entries of a site's privacy ledger: what was allowed, started, stored, masked, refused, closed.

An entry is written before the deed that it names. The budget is what the entries add up to
(:mod:`fedcmr_shared.privacy.budget`); nothing else is stored about it, so that the site and an
auditor compute it from the same lines.

Entries never name a patient: a cohort is a keyed hash of its members' pseudonyms. The leaf of the
Merkle log is the canonical JSON of entry and a salt of 256 bits, so that nobody can guess the
entry behind a neighbour's leaf hash.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from fedcmr_shared.schemas.canonical import canonical_json
from fedcmr_shared.schemas.job import FEWEST_SITES
from fedcmr_shared.schemas.privacy import Clipping, NoiseShares

_FROZEN = ConfigDict(frozen=True, extra="forbid")

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Phase = Literal["train", "evaluate"]
Outcome = Literal["finished", "cancelled"]
PHASES: Final[tuple[Phase, ...]] = ("train", "evaluate")


def _in_order(names: tuple[str, ...]) -> tuple[str, ...]:
    if list(names) != sorted(set(names)):
        raise ValueError("the names must come sorted, each once")
    return names


class Release(BaseModel):
    """What one started round of a phase releases: ``steps`` Poisson-subsampled Gaussians.

    ``noise_multiplier`` null is a release without noise, which the policy had to allow; it has no
    finite cost and is named in every claim instead. With ``distributed`` the noise multiplier is
    that of a sum over several sites, and every claim says what that presumes.
    """

    model_config = _FROZEN

    sampling_rate: Annotated[float, Field(gt=0, le=1)]
    noise_multiplier: Annotated[float, Field(gt=0)] | None
    steps: Annotated[int, Field(ge=1)]
    # Left out when null: leaves from before this field keep their bytes.
    distributed: NoiseShares | None = Field(default=None, exclude_if=lambda value: value is None)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.distributed is None:
            return self
        if self.steps != 1:
            raise ValueError(f"distributed noise is for one step a round, not {self.steps}")
        problem = self.distributed.problem(self.noise_multiplier)
        if problem:
            raise ValueError(problem)
        return self


class Reservation(BaseModel):
    """One phase of an admitted job: at most ``starts`` rounds of it on one cohort of patients.

    ``starts`` counts the job's own rounds and its spare ones.
    """

    model_config = _FROZEN

    cohort: Hash
    release: Release
    starts: Annotated[int, Field(ge=1)]


class _Entry(BaseModel):
    model_config = _FROZEN

    at: Annotated[int, Field(ge=0, description="UTC, milliseconds since 1970")]


class Opened(_Entry):
    """The first entry. The filter's order never changes; the budget is per patient, for ever.

    Outward checkpoints are due every ``checkpoint_interval_ms`` from ``at`` on; the n-th of them,
    from 0, covers ``checkpoint_leaves`` * (n + 1) leaves, whatever the site did.
    """

    kind: Literal["opened"] = "opened"
    format: Literal["1"] = "1"
    site: str
    site_key: Annotated[Hash, Field(description="Ed25519 public key, hexadecimal")]
    secret_fingerprint: Hash
    epsilon: Annotated[float, Field(gt=0)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    order: Annotated[int, Field(ge=2)]
    checkpoint_interval_ms: Annotated[int, Field(ge=1)] = 6 * 3_600_000
    checkpoint_leaves: Annotated[int, Field(ge=1)] = 128


class _JobEntry(_Entry):
    job: Hash
    sequence: Annotated[int, Field(ge=0, description="place among the entries of this job")]


class Admitted(_JobEntry):
    """A job got its reservation; a job is admitted once."""

    kind: Literal["admitted"] = "admitted"
    name: str
    coordinator: str
    model: str
    part: str
    rounds: Annotated[int, Field(ge=1)]
    spare_rounds: Annotated[int, Field(ge=0)]
    clip_norm: Annotated[float, Field(gt=0)]
    clipping: Clipping
    delta: Annotated[float, Field(gt=0, lt=1)]
    policy: Hash
    phases: dict[Phase, Reservation]


class Started(_JobEntry):
    """A round of a phase counts as spent from here on; written before its first gradient."""

    kind: Literal["started"] = "started"
    phase: Phase
    round: Annotated[int, Field(ge=1)]
    attempt: Annotated[int, Field(ge=1)]


class Stored(_JobEntry):
    """The result of a started round lies on disk and may be sent, as often as asked for."""

    kind: Literal["stored"] = "stored"
    phase: Phase
    round: Annotated[int, Field(ge=1)]
    attempt: Annotated[int, Field(ge=1)]
    sha256: Hash


class Masked(_JobEntry):
    """A stored result may go into an attempt of the secure sum, under masks of its own.

    Written before the masked vector leaves. ``attempt`` counts those of the sum, not of the
    training; ``header`` is the SHA-256 of what the sites of the attempt agree on.
    """

    kind: Literal["masked"] = "masked"
    phase: Phase
    round: Annotated[int, Field(ge=1)]
    attempt: Annotated[int, Field(ge=1)]
    header: Hash


class Unmasked(_JobEntry):
    """This site helps to open the sum of ``survivors``: no other sum of the round will be opened.

    Written before the unmasking shares leave; ``answer`` is the SHA-256 of the message with them.
    """

    kind: Literal["unmasked"] = "unmasked"
    phase: Phase
    round: Annotated[int, Field(ge=1)]
    attempt: Annotated[int, Field(ge=1)]
    survivors: Annotated[tuple[str, ...], Field(min_length=FEWEST_SITES), AfterValidator(_in_order)]
    answer: Hash


class Closed(_JobEntry):
    """A job is over; what it never started is released."""

    kind: Literal["closed"] = "closed"
    outcome: Outcome


class Refused(_Entry):
    """A job or task that the site did not take part in, and the rule that it broke."""

    kind: Literal["refused"] = "refused"
    job: Hash
    code: str
    rule: str


class Withdrawn(_Entry):
    """A patient's scans were erased; the charges stay."""

    kind: Literal["withdrawn"] = "withdrawn"
    patient: Hash


class ClockSet(_Entry):
    """The site's operator declares that the clock was ahead before and is right now."""

    kind: Literal["clock-set"] = "clock-set"


class Padding(_Entry):
    """Nothing; hides how many entries the others are."""

    kind: Literal["padding"] = "padding"


Entry = Annotated[
    Opened
    | Admitted
    | Started
    | Stored
    | Masked
    | Unmasked
    | Closed
    | Refused
    | Withdrawn
    | ClockSet
    | Padding,
    Field(discriminator="kind"),
]

JobEntry = Admitted | Started | Stored | Masked | Unmasked | Closed
"""Entries that carry the number of their place among those of one job."""


class Leaf(BaseModel):
    """An entry with its salt (32 random bytes, hexadecimal)."""

    model_config = _FROZEN

    entry: Entry
    salt: Hash

    def content(self) -> bytes:
        """Return the bytes that the Merkle log hashes."""
        return canonical_json(self.model_dump(mode="json"))


class Checkpoint(BaseModel):
    """A signed head of the log: its first ``size`` leaves have the Merkle root ``root``.

    ``cosignatures`` (public key to signature) is room for other sites that saw this head.
    """

    model_config = _FROZEN

    site: str
    size: Annotated[int, Field(ge=1)]
    root: Hash
    at: Annotated[int, Field(ge=0)]
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
    cosignatures: dict[str, str] = Field(default_factory=dict)

    def signed_bytes(self) -> bytes:
        """Return what the signature covers."""
        body = {"at": self.at, "root": self.root, "site": self.site, "size": self.size}
        return b"fedcmr checkpoint 1\n" + canonical_json(body)
