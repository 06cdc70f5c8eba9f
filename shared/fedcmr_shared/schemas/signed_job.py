"""A coordinator's signature under a job, without which deployed sites do nothing for it.

It names the federation and a last day: a job signed for one federation says nothing in another,
and a job that was withdrawn cannot be brought back for ever. Within its time a job that a site
has closed stays closed, since the site's ledger admits a job once.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Final, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from fedcmr_shared.errors import JobRefused, LedgerError
from fedcmr_shared.identity.keys import SiteKey, verify_signature
from fedcmr_shared.schemas.canonical import canonical_json
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.ledger import Hash

LONGEST_DAYS: Final = 366
"""No authorisation lasts longer."""


class JobAuthorisation(BaseModel):
    """That the coordinator of ``federation`` wants ``job`` until ``not_after``.

    ``federation`` is the SHA-256 of the authority's certificate, ``job`` that of the job.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["fedcmr-job-1"] = "fedcmr-job-1"
    federation: Hash
    job: Hash
    not_before: AwareDatetime
    not_after: AwareDatetime
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]

    @classmethod
    def sign(
        cls,
        job: JobSpec,
        federation: str,
        period: tuple[datetime, datetime],
        key: SiteKey,
    ) -> Self:
        """Return the authorisation of ``job`` for ``period`` (first and last moment)."""
        unsigned = cls(
            federation=federation,
            job=job.sha256,
            not_before=period[0],
            not_after=period[1],
            signature="0" * 128,
        )
        return unsigned.model_copy(update={"signature": key.sign(unsigned.signed_bytes())})

    def signed_bytes(self) -> bytes:
        """What the coordinator signs."""
        content = self.model_dump(mode="json", exclude={"signature"})
        return b"fedcmr job authorisation 1\n" + canonical_json(content)


def require_signed(
    job: JobSpec,
    authorisation: JobAuthorisation | None,
    pinned: tuple[str, str],
    now: datetime,
) -> None:
    """Return if the coordinator signed ``job`` and its time has come and not passed.

    ``pinned`` holds the SHA-256 of the federation's authority and the coordinator's public key.

    Raises:
        JobRefused: it is not signed, or for another job, federation or time.
    """
    federation, coordinator_key = pinned
    if authorisation is None:
        raise _refused("the job is not signed")
    if authorisation.job != job.sha256:
        raise _refused("the signature is under another job: somebody changed the job")
    if authorisation.federation != federation:
        raise _refused("the job was signed for another federation")
    try:
        verify_signature(coordinator_key, authorisation.signature, authorisation.signed_bytes())
    except LedgerError as error:
        raise _refused(str(error)) from error
    if (authorisation.not_after - authorisation.not_before).days > LONGEST_DAYS:
        raise _refused(f"the signature is valid for more than {LONGEST_DAYS} days")
    if not authorisation.not_before <= now <= authorisation.not_after:
        raise _refused(
            f"the signature is valid from {authorisation.not_before} to "
            f"{authorisation.not_after}: the coordinator signs again, or this clock is wrong"
        )


def _refused(reason: str) -> JobRefused:
    return JobRefused("signature", "signature", reason)
