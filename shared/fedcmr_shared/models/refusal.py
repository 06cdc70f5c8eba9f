"""Refused releases: a coordinator's signed statement that a gate kept a model back.

It can be kept and checked without the coordinator's database. It says what the coordinator opened
and concluded; what each site answered stays inside the sum.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, field_validator

from fedcmr_shared.errors import LedgerError
from fedcmr_shared.identity.keys import SiteKey, verify_signature
from fedcmr_shared.models.card import GateResult
from fedcmr_shared.schemas.canonical import canonical_json
from fedcmr_shared.schemas.ledger import Hash
from fedcmr_shared.schemas.policy import SiteName


class ReleaseRefusal(BaseModel):
    """That ``gate`` did not let the model ``model_sha256`` of ``job_sha256`` leave.

    ``federation_sha256`` is the SHA-256 of the authority's certificate, ``model_sha256`` that of the
    weights (`fedcmr_shared.models.bundle`), which is what a model card calls the end of its lineage.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal["1"] = "1"
    federation: SiteName
    federation_sha256: Hash
    job_sha256: Hash
    model_sha256: Hash
    gate: GateResult
    refused_at: AwareDatetime
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]

    @field_validator("gate")
    @classmethod
    def _did_not_pass(cls, gate: GateResult) -> GateResult:
        if gate.passed:
            raise ValueError(f"{gate.gate} passed, so it refuses nothing")
        return gate

    @classmethod
    def sign(
        cls,
        federation: tuple[str, str],
        refused: tuple[str, str],
        gate: GateResult,
        now: datetime,
        key: SiteKey,
    ) -> Self:
        """Return the refusal by ``gate``, signed by the coordinator.

        ``federation`` is its name and the SHA-256 of its authority's certificate, ``refused`` the
        SHA-256 of the job and of its model.

        Raises:
            ValueError: the gate passed, or ``now`` has no time zone.
        """
        unsigned = cls(
            federation=federation[0],
            federation_sha256=federation[1],
            job_sha256=refused[0],
            model_sha256=refused[1],
            gate=gate,
            refused_at=now,
            signature="0" * 128,
        )
        return unsigned.model_copy(update={"signature": key.sign(unsigned.signed_bytes())})

    def signed_bytes(self) -> bytes:
        """What the coordinator signs."""
        content = self.model_dump(mode="json", exclude={"signature"})
        return b"fedcmr release refusal 1\n" + canonical_json(content)

    def verify(self, pinned: tuple[str, str]) -> None:
        """Return if the coordinator of the pinned federation signed it.

        ``pinned`` holds the SHA-256 of the federation's authority and the coordinator's public key.

        Raises:
            LedgerError: it is of another federation, somebody else signed it, or it was changed.
        """
        federation, coordinator_key = pinned
        if self.federation_sha256 != federation:
            raise LedgerError("the refusal is of another federation")
        verify_signature(coordinator_key, self.signature, self.signed_bytes())
