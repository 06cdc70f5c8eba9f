"""What one secure sum is about; bound into every key, seal and signature of it."""

from __future__ import annotations

import hashlib
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from fedcmr_shared.schemas.canonical import canonical_json
from fedcmr_shared.schemas.ledger import Hash, Phase

_FROZEN = ConfigDict(frozen=True, extra="forbid")


class Session(BaseModel):
    """One attempt to sum one phase of one round of a job."""

    model_config = _FROZEN

    job: Hash
    phase: Phase
    round: Annotated[int, Field(ge=1, le=10_000)]
    attempt: Annotated[int, Field(ge=1, le=10_000)]

    def __str__(self) -> str:
        return f"{self.phase} round {self.round}, attempt {self.attempt}"


class Header(BaseModel):
    """Everything that the sites of a session must agree on.

    ``threshold`` sites open a sum together, and ``least_survivors`` is the fewest that it may be
    over. ``model`` is null in the key messages alone: they may be sent before the round's model
    exists.
    """

    model_config = _FROZEN

    session: Session
    roster: Hash
    threshold: Annotated[int, Field(ge=3)]
    least_survivors: Annotated[int, Field(ge=3)]
    encoding: Hash
    post_quantum: bool = False
    model: Hash | None = None

    def with_model(self, model_sha256: str) -> Header:
        """Return the header of all steps after the keys."""
        return Header.model_validate({**self.model_dump(), "model": model_sha256})

    def digest(self) -> str:
        """SHA-256 (hexadecimal) of the header under this protocol's name and version."""
        content = b"fedcmr secure aggregation 1\n" + canonical_json(self.model_dump(mode="json"))
        return hashlib.sha256(content).hexdigest()
