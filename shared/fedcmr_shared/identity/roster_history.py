"""How a federation's roster came to be: a signed version for each change.

The coordinator proposes; each site compares the newest fingerprint with the other sites before it
pins the roster. The chain shows whether a key was replaced, when and why.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from fedcmr_shared.errors import ConfigurationError, LedgerError
from fedcmr_shared.identity.keys import SiteKey, verify_signature
from fedcmr_shared.identity.roster import Roster
from fedcmr_shared.schemas.canonical import canonical_json
from fedcmr_shared.schemas.ledger import Hash


class RosterVersion(BaseModel):
    """One version; ``previous`` is the SHA-256 of the version before, null in the first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: Annotated[int, Field(ge=1)]
    previous: Hash | None
    roster: Roster
    reason: Annotated[str, Field(min_length=1, max_length=500)]
    at: AwareDatetime
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]

    def signed_bytes(self) -> bytes:
        """What the coordinator signs."""
        content = self.model_dump(mode="json", exclude={"signature"})
        return b"fedcmr roster version 1\n" + canonical_json(content)

    @property
    def sha256(self) -> str:
        """SHA-256 (hexadecimal) of all of it, signature included."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json"))).hexdigest()


def next_version(
    history: Sequence[RosterVersion],
    roster: Roster,
    reason: str,
    key: SiteKey,
    now: datetime | None = None,
) -> RosterVersion:
    """Return the version that makes ``roster`` the newest, signed with the coordinator's key."""
    last = history[-1] if history else None
    version = RosterVersion(
        number=len(history) + 1,
        previous=last.sha256 if last else None,
        roster=roster,
        reason=reason,
        at=now or datetime.now(UTC),
        signature="0" * 128,
    )
    return version.model_copy(update={"signature": key.sign(version.signed_bytes())})


def verify_history(history: Sequence[RosterVersion], coordinator_key: str) -> None:
    """Return if ``history`` is one chain from its first version on, all of it signed.

    Raises:
        ConfigurationError: a version is missing, altered, or signed by somebody else.
    """
    previous: RosterVersion | None = None
    for number, version in enumerate(history, start=1):
        expected = previous.sha256 if previous else None
        if (version.number, version.previous) != (number, expected):
            raise ConfigurationError(f"roster version {number} does not follow the one before")
        try:
            verify_signature(coordinator_key, version.signature, version.signed_bytes())
        except LedgerError as error:
            raise ConfigurationError(f"roster version {number}: {error}") from error
        previous = version


def changes(old: Roster | None, new: Roster) -> list[str]:
    """Return what differs, one line a site, for people to read."""
    before = old.sites if old else {}
    lines = [f"{name} joins" for name in sorted(new.sites.keys() - before.keys())]
    lines += [f"{name} leaves" for name in sorted(before.keys() - new.sites.keys())]
    lines += [
        f"{name} has another key"
        for name in sorted(before.keys() & new.sites.keys())
        if before[name] != new.sites[name]
    ]
    if old is not None and old.threshold != new.threshold:
        lines.append(f"the threshold changes from {old.threshold} to {new.threshold}")
    return lines
