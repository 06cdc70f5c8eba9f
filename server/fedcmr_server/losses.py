"""Why an attempt at a secure sum went on without a site, in public words.

The events are those of :mod:`fedcmr_server.secure_sums`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from fedcmr_shared.schemas.refusals import REFUSAL_CODES

FAULTS: Final[Mapping[str, str]] = {
    "malformed": "its message cannot be read",
    "order": "its message belongs to another step",
    "repeated": "it answered this step before",
    "foreign": "its message belongs to another job, round, attempt or roster",
    "model": "it works on another model",
    "roster": "it is not on the roster, or came twice",
    "signature": "its message is not signed with the roster's key",
    "keys": "its public key is unusable, or was used before",
    "threshold": "too few sites were left",
    "share": "its share does not fit",
    "survivors": "it confirmed another set of sites",
    "vector": "its masked vector is not the one that it signed",
    "silent": "it did not answer in time",
    "refused": "it answered with a code",
}
"""What the protocol can find wrong with a site's message; see `fedcmr_shared.secagg.faults`."""

_MEANINGS: Final[Mapping[str, str]] = {str(code): text for code, text in REFUSAL_CODES.items()} | {
    **FAULTS
}


@dataclass(frozen=True, order=True)
class Loss:
    """A site that an attempt went on without, and the public code that says why."""

    site: str
    step: str
    code: str

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Loss:
        """Read one of an event's losses; what is absent is empty."""
        site, step, fault, reason = (
            str(values.get(name) or "") for name in ("site", "step", "fault", "reason")
        )
        # The rest of the reason is text that nobody promised to be public.
        code = reason.partition(":")[0] if fault == "refused" else fault
        return cls(site, step, code if code in _MEANINGS else fault)

    @property
    def meaning(self) -> str:
        """What the code means."""
        return _MEANINGS.get(self.code, "a code that this version does not know")
