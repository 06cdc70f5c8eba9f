"""The evidence bundle: what a site hands to an auditor, as one JSON file.

A bundle discloses leaves of the site's Merkle log (RFC 6962) and proves that they belong to one
signed checkpoint. It makes no claim of its own: an auditor computes every figure from the leaves.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedcmr_shared.errors import LedgerError
from fedcmr_shared.privacy.merkle import leaf_hash
from fedcmr_shared.schemas.ledger import Checkpoint, Hash, Leaf

_FROZEN = ConfigDict(frozen=True, extra="forbid")

Scope = Literal["ledger", "job"]


class Disclosed(BaseModel):
    """One leaf, its place in the log and its inclusion proof.

    ``content`` is the text that the log hashes, so that no verifier has to write numbers as we do.
    A bundle of the whole ledger needs no inclusion proofs: its root follows from all leaves.
    """

    model_config = _FROZEN

    index: Annotated[int, Field(ge=0, description="place in the log, from 0 on")]
    content: Annotated[str, Field(description="canonical JSON of the leaf: entry and salt")]
    proof: Annotated[
        tuple[Hash, ...], Field(description="hashes from the leaf's sibling up to the root")
    ] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        # Otherwise two readers could see two entries behind one hash, by a key given twice.
        if self.leaf.content() != self.content.encode():
            raise ValueError("the leaf is not written in canonical JSON")
        return self

    @cached_property
    def leaf(self) -> Leaf:
        """The entry with its salt."""
        return Leaf.model_validate_json(self.content)

    @property
    def hash(self) -> bytes:
        """RFC 6962 hash of the leaf."""
        return leaf_hash(self.content.encode())


class EarlierCheckpoint(BaseModel):
    """A checkpoint that the site signed before, and the proof that the log only grew since."""

    model_config = _FROZEN

    checkpoint: Checkpoint
    proof: Annotated[
        tuple[Hash, ...], Field(description="consistency proof to the bundle's checkpoint")
    ]


class EmpiricalBound(BaseModel):
    """A lower bound on epsilon that an attack reached; below the claim it proves nothing."""

    model_config = _FROZEN

    job: Hash
    epsilon: Annotated[float, Field(ge=0)]
    delta: Annotated[float, Field(ge=0, lt=1)]
    confidence: Annotated[float, Field(gt=0, lt=1)]
    method: str
    canaries: Annotated[int, Field(ge=1)]
    canary_type: str
    threat_model: Annotated[str, Field(description="what the attacker saw: updates or final model")]


class Evidence(BaseModel):
    """Leaves of one site's ledger and the proofs that they are what the site signed.

    Scope *ledger* discloses every leaf below the checkpoint. Scope *job* discloses the first leaf,
    those of one job, and clock corrections, without which the times of the others make no sense.
    """

    model_config = _FROZEN

    format: Literal["fedcmr-evidence-1"] = "fedcmr-evidence-1"
    scope: Scope
    job: Annotated[Hash | None, Field(description="SHA-256 of the job, in scope job")] = None
    site: Annotated[str, Field(min_length=1)]
    public_key: Annotated[
        str,
        Field(pattern=r"^[0-9a-f]{64}$", description="Ed25519; compare with what you trust"),
    ]
    software: Annotated[str, Field(description="what wrote the bundle, with its version")]
    checkpoint: Checkpoint
    leaves: Annotated[tuple[Disclosed, ...], Field(min_length=1)]
    earlier: tuple[EarlierCheckpoint, ...] = ()
    empirical: tuple[EmpiricalBound, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.scope == "job") != (self.job is not None):
            raise ValueError("scope job names a job, scope ledger none")
        indices = [disclosed.index for disclosed in self.leaves]
        if indices != sorted(set(indices)):
            raise ValueError("leaves must come in the order of their index, each once")
        return self

    def write(self, path: Path) -> None:
        """Write the bundle as JSON.

        Raises:
            LedgerError: the file cannot be written.
        """
        text = json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False)
        try:
            path.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise LedgerError(f"{path}: cannot write the bundle ({error.strerror})") from error

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a bundle.

        Raises:
            LedgerError: the file cannot be read or breaks the schema: the step *format* failed.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise LedgerError(f"{path}: cannot read the bundle ({error.strerror})") from error
        except ValidationError as error:
            raise LedgerError(f"{path}: step 1, format, failed: {_first(error)}") from error


def _first(error: ValidationError) -> str:
    problem: Any = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in problem["loc"]) or "bundle"
    return f"{place}: {problem['msg']}"
