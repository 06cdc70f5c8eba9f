"""The five messages of a site, one for each step, and what the server passes on.

A message is JSON. Its signature covers the kind, the header and the canonical JSON of everything
else in it, so that it counts for one step of one session and cannot be mistaken for another::

    "fedcmr secure aggregation 1 <kind>\\n" <canonical JSON without the signature>

The masked vector itself travels beside its message, which holds its BLAKE3 digest.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal, Self, get_args

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedcmr_shared.errors import LedgerError
from fedcmr_shared.identity.keys import SiteKey, verify_signature
from fedcmr_shared.identity.roster import MOST_SITES, Roster
from fedcmr_shared.schemas.canonical import canonical_json
from fedcmr_shared.schemas.ledger import Hash
from fedcmr_shared.schemas.policy import SiteName
from fedcmr_shared.secagg.agreement import PublicKey
from fedcmr_shared.secagg.faults import ProtocolError
from fedcmr_shared.secagg.session import Header
from fedcmr_shared.secagg.shamir import SHARE_BYTES

Step = Literal["keys", "shares", "update", "consistency", "unmask"]
STEPS: Final[tuple[Step, ...]] = get_args(Step)

MOST_BYTES: Final = 1 << 20
"""Longest message, in characters; 100 sites with the post-quantum option need half of it."""

_MOST_NAMED: Final = 200

Share = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * SHARE_BYTES}}}$")]
Sealed = Annotated[str, Field(pattern=r"^([0-9a-f]{2}){28,1400}$")]
Signature = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
_AT_MOST: Final = Field(max_length=MOST_SITES)


def vector_digest(vector: bytes | bytearray | memoryview) -> str:
    """Return the BLAKE3 digest (hexadecimal) of a masked vector.

    Of the collision-resistant hashes the fastest on one core, about four times SHA-256: hashing is
    what a server of many vectors spends most of its time on.
    """
    return blake3(vector).hexdigest()


class Frozen(BaseModel):
    """Base of everything that is decoded from a wire."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def encode(self) -> str:
        """Return the message as JSON."""
        return self.model_dump_json()

    @classmethod
    def decode(cls, text: str) -> Self:
        """Read a message.

        Raises:
            ProtocolError: the text is too long or no such message.
        """
        if len(text) > MOST_BYTES:
            raise ProtocolError("malformed", f"a {cls.__name__} message is too long")
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            fields = ", ".join(".".join(map(str, item["loc"])) for item in error.errors()[:3])
            # Names of fields that do not exist are the sender's: neither long nor unquoted.
            what = repr(fields[:_MOST_NAMED]) if fields else "no JSON"
            message = f"a {cls.__name__} message cannot be read: {what}"
            raise ProtocolError("malformed", message) from error


class Signed(Frozen):
    """A message of ``site`` for the session whose header digest is ``header``."""

    step: ClassVar[Step]

    site: SiteName
    header: Hash
    signature: Signature = "0" * 128

    def signed_bytes(self) -> bytes:
        """Return what the signature covers."""
        content = canonical_json(self.model_dump(mode="json", exclude={"signature"}))
        return f"fedcmr secure aggregation 1 {self.step}\n".encode() + content

    def signed(self, key: SiteKey) -> Self:
        """Return the message with the signature of ``key``."""
        return self.model_copy(update={"signature": key.sign(self.signed_bytes())})

    def verify(self, roster: Roster, header: Header) -> None:
        """Return if a site of the roster signed this message for this session.

        Raises:
            ProtocolError: it did not.
        """
        if self.site not in roster.sites:
            raise ProtocolError("roster", f"site {self.site} is not on the roster")
        if self.header != header.digest():
            # The keys agreed on everything but the model.
            fault: Literal["model", "foreign"] = "foreign" if header.model is None else "model"
            what = "job, round, attempt, roster, threshold or encoding"
            what = what if fault == "foreign" else "model, or for another round or attempt"
            raise ProtocolError(fault, f"the message of {self.site} is for another {what}")
        try:
            verify_signature(roster.sites[self.site], self.signature, self.signed_bytes())
        except LedgerError as error:
            message = f"the roster's key of {self.site} did not sign this {self.step} message"
            raise ProtocolError("signature", message) from error


class Keys(Signed):
    """Fresh public keys; ``commitment`` is the SHA-256 of the self mask's seed."""

    step: ClassVar[Step] = "keys"

    transport: PublicKey
    mask: PublicKey
    commitment: Hash


class Shares(Signed):
    """Sealed shares of both secrets by receiver; ``pairs`` with the post-quantum option only."""

    step: ClassVar[Step] = "shares"

    sealed: Annotated[dict[SiteName, Sealed], _AT_MOST]
    pairs: Annotated[dict[SiteName, Sealed], _AT_MOST] = {}


class Vector(Signed):
    """Announces the masked vector with this BLAKE3 digest."""

    step: ClassVar[Step] = "update"

    blake3: Hash


class Confirmation(Signed):
    """The one set of survivors, sorted, that this site will open."""

    step: ClassVar[Step] = "consistency"

    survivors: Annotated[tuple[SiteName, ...], _AT_MOST]


class Unmasking(Signed):
    """One share for each peer: of a survivor's seed, or of a lost site's mask key; never both."""

    step: ClassVar[Step] = "unmask"

    seeds: Annotated[dict[SiteName, Share], _AT_MOST]
    keys: Annotated[dict[SiteName, Share], _AT_MOST]


class Delivery(Frozen):
    """What the server passes to one site of another one's `Shares`; ``header`` as in there."""

    sender: SiteName
    header: Hash
    sealed: Sealed
    pair: Sealed | None = None
