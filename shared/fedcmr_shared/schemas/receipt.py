"""A site's signed statement that it started a round.

It says what took part and nothing of how: no duration, energy or count of anything.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from fedcmr_shared.identity.keys import SiteKey, verify_signature
from fedcmr_shared.schemas.canonical import canonical_json
from fedcmr_shared.schemas.ledger import Hash, Phase, Started
from fedcmr_shared.schemas.policy import SiteName


class Receipt(BaseModel):
    """That ``site`` started ``attempt`` of ``round`` of ``job`` (SHA-256), and was charged."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["fedcmr-receipt-1"] = "fedcmr-receipt-1"
    site: SiteName
    job: Hash
    phase: Phase
    round: Annotated[int, Field(ge=1)]
    attempt: Annotated[int, Field(ge=1)]
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]

    @classmethod
    def sign(cls, site: str, started: Started, identity: SiteKey) -> Self:
        """Return the receipt of a ledger's entry."""
        unsigned = cls(
            site=site,
            job=started.job,
            phase=started.phase,
            round=started.round,
            attempt=started.attempt,
            signature="0" * 128,
        )
        return unsigned.model_copy(update={"signature": identity.sign(unsigned.signed_bytes())})

    def signed_bytes(self) -> bytes:
        """What the site signs."""
        content = self.model_dump(mode="json", exclude={"signature"})
        return b"fedcmr receipt 1\n" + canonical_json(content)

    def verify(self, identity: str) -> None:
        """Return if the site with this public key signed it; LedgerError if not."""
        verify_signature(identity, self.signature, self.signed_bytes())
