"""Typed contents of the Flower messages of secure aggregation.

The actions are ``train.<step>`` and ``evaluate.<step>`` with the steps keys, shares, update,
consistency and unmask. A content is one JSON record; the model travels beside the question
``update``, the masked vector beside its answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, TypeVar

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from pydantic import Field

from fedcmr_shared.errors import FederationError
from fedcmr_shared.identity.roster import MOST_SITES
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.ledger import Hash
from fedcmr_shared.schemas.policy import SiteName
from fedcmr_shared.schemas.signed_job import JobAuthorisation
from fedcmr_shared.secagg.messages import Confirmation, Delivery, Frozen, Keys, Step, Unmasking
from fedcmr_shared.secagg.session import Session

_SECURE: Final = "secure"
_VECTOR: Final = "vector"
_BYTES: Final = "fedcmr.bytes"  # the bytes as they are: nothing in them is parsed
_AT_MOST: Final = Field(max_length=MOST_SITES)

Record = TypeVar("Record", bound=Frozen)


class Question(Frozen):
    """What the server asks in a step of ``session``."""

    session: Session


class KeysQuestion(Question):
    """Asks for fresh keys; the only question that carries the job."""

    job: JobSpec
    authorisation: JobAuthorisation | None = None


class SharesQuestion(Question):
    """Asks for sealed shares; ``model`` is the SHA-256 of the model that `update` will bring."""

    model: Hash
    keys: Annotated[tuple[Keys, ...], _AT_MOST]


class UpdateQuestion(Question):
    """Asks for the masked vector; travels beside a `fedcmr_shared.federation.messages.Task`."""

    deliveries: Annotated[tuple[Delivery, ...], _AT_MOST]


class ConsistencyQuestion(Question):
    """Asks for a signature of the survivors."""

    survivors: Annotated[tuple[SiteName, ...], _AT_MOST]


class UnmaskQuestion(Question):
    """Asks for the shares, with the signatures of at least t survivors."""

    confirmations: Annotated[tuple[Confirmation, ...], _AT_MOST]


QUESTIONS: Final[Mapping[Step, type[Question]]] = {
    "keys": KeysQuestion,
    "shares": SharesQuestion,
    "update": UpdateQuestion,
    "consistency": ConsistencyQuestion,
    "unmask": UnmaskQuestion,
}
"""What each step asks."""


class UnmaskAnswer(Frozen):
    """Shares, and the keys of the session that follows, which saves an exchange."""

    unmasking: Unmasking
    next_keys: Keys | None = None


def add_record(content: RecordDict, record: Frozen) -> RecordDict:
    """Put ``record`` into ``content`` and return it."""
    content.config_records[_SECURE] = ConfigRecord({"json": record.encode()})
    return content


def pack_record(record: Frozen) -> RecordDict:
    """Return a message's content with ``record`` alone."""
    return add_record(RecordDict(), record)


def read_record(content: RecordDict, kind: type[Record]) -> Record:
    """Read the record of a message.

    Raises:
        ProtocolError: there is none, or it is malformed.
    """
    record = content.config_records.get(_SECURE)
    return kind.decode(str(record.get("json", "")) if record is not None else "")


def add_vector(content: RecordDict, vector: bytes | bytearray) -> RecordDict:
    """Put a masked vector into ``content`` and return it."""
    array = Array(dtype="uint8", shape=(len(vector),), stype=_BYTES, data=bytes(vector))
    content.array_records[_VECTOR] = ArrayRecord({_VECTOR: array})
    return content


def read_vector(content: RecordDict) -> memoryview:
    """Return the masked vector of a message, without copying it.

    Raises:
        FederationError: there is none.
    """
    arrays = content.array_records.get(_VECTOR)
    if arrays is None or _VECTOR not in arrays or arrays[_VECTOR].stype != _BYTES:
        raise FederationError("the message carries no masked vector")
    return memoryview(arrays[_VECTOR].data)
