"""Records and vectors survive Flower's messages; what cannot be read is refused, never parsed."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from secagg_parties import Record, record

from fedcmr_shared.errors import FederationError
from fedcmr_shared.federation.secure_messages import (
    QUESTIONS,
    ConsistencyQuestion,
    KeysQuestion,
    Question,
    SharesQuestion,
    UnmaskAnswer,
    UnmaskQuestion,
    UpdateQuestion,
    add_record,
    add_vector,
    pack_record,
    read_record,
    read_vector,
)
from fedcmr_shared.identity.roster import MOST_SITES
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.secagg.agreement import PublicKey
from fedcmr_shared.secagg.faults import ProtocolError
from fedcmr_shared.secagg.messages import (
    MOST_BYTES,
    STEPS,
    Confirmation,
    Delivery,
    Frozen,
    Keys,
    Shares,
    Step,
    Unmasking,
)
from fedcmr_shared.secagg.session import Session


@pytest.fixture(scope="module")
def said() -> Record:
    return record(4, lost=[2])


def questions(said: Record) -> list[Question]:
    session = said.header.session
    first = min(said.sites)
    return [
        KeysQuestion(session=session, job=JobSpec()),
        SharesQuestion(session=session, model="a" * 64, keys=tuple(said.keys.values())),
        UpdateQuestion(session=session, deliveries=said.deliveries[first]),
        ConsistencyQuestion(session=session, survivors=said.survivors),
        UnmaskQuestion(session=session, confirmations=tuple(said.confirmations.values())),
    ]


def answers(said: Record) -> list[Frozen]:
    first = min(said.sites)
    return [
        said.keys[first],
        said.shares[first],
        said.vectors[first][0],
        said.confirmations[first],
        UnmaskAnswer(unmasking=said.unmaskings[first]),
        UnmaskAnswer(unmasking=said.unmaskings[first], next_keys=said.keys[first]),
    ]


def test_every_step_has_its_question(said: Record) -> None:
    assert tuple(QUESTIONS) == STEPS
    assert [type(question) for question in questions(said)] == list(QUESTIONS.values())


def test_records_survive_the_trip(said: Record) -> None:
    for one in [*questions(said), *answers(said)]:
        assert read_record(pack_record(one), type(one)) == one


def test_a_record_joins_what_is_there(said: Record) -> None:
    content = RecordDict({"task": ConfigRecord({"round": 1})})
    assert add_record(content, said.confirmations[min(said.sites)]) is content
    assert set(content) == {"task", "secure"}


@pytest.mark.parametrize("step", STEPS)
def test_no_question_is_taken_for_another(said: Record, step: Step) -> None:
    for other, question in zip(STEPS, questions(said), strict=True):
        if other == step:
            continue
        with pytest.raises(ProtocolError) as caught:
            read_record(pack_record(question), QUESTIONS[step])
        assert caught.value.fault == "malformed"


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"secure": ConfigRecord({})}),
        RecordDict({"secure": ConfigRecord({"json": ""})}),
        RecordDict({"secure": ConfigRecord({"json": 7})}),
        RecordDict({"secure": ConfigRecord({"json": b"{}"})}),
        RecordDict({"secure": ConfigRecord({"json": ["{}"]})}),
        RecordDict({"other": ConfigRecord({"json": "{}"})}),
    ],
)
def test_a_message_without_record_is_malformed(content: RecordDict) -> None:
    with pytest.raises(ProtocolError, match="cannot be read") as caught:
        read_record(content, ConsistencyQuestion)
    assert caught.value.fault == "malformed"


@given(st.binary(max_size=300), st.sampled_from([bytes, bytearray]))
def test_a_vector_survives_the_trip(
    vector: bytes, kind: Callable[[bytes], bytes | bytearray]
) -> None:
    content = add_vector(RecordDict(), kind(vector))
    assert bytes(read_vector(content)) == vector


def test_a_vector_survives_flowers_own_encoding() -> None:
    """Flower cuts arrays into chunks and puts them together again."""
    vector = np.random.default_rng(0).bytes(3_000_000)
    content = add_vector(RecordDict(), vector)
    array = content.array_records["vector"]["vector"]
    again = Array.inflate(array.deflate(), dict(array.children))
    assert again.stype == array.stype
    assert bytes(again.data) == vector


def test_nothing_but_the_bytes_goes_out() -> None:
    content = add_vector(RecordDict(), bytes(1000))
    assert len(content.array_records["vector"]["vector"].data) == 1000


def saved(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def carrying(data: bytes, stype: str = "numpy.ndarray") -> RecordDict:
    array = Array("uint8", (3,), stype, data)
    return RecordDict({"vector": ArrayRecord({"vector": array})})


def header(text: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


NUMPY_FILES = {
    "good": saved(np.arange(3, dtype=np.uint8)),
    "pickle": b"\x80\x04N.",
    "zip": b"PK\x03\x04" + bytes(20),
    "python": header(b"{" * 117 + b"\n"),
    "terabyte": header(b"{'descr': '|u1', 'fortran_order': False, 'shape': (10**13,), }\n"),
}


@pytest.mark.parametrize("data", NUMPY_FILES.values(), ids=NUMPY_FILES)
def test_a_vector_in_another_form_is_not_parsed(data: bytes) -> None:
    with pytest.raises(FederationError, match="no masked vector"):
        read_vector(carrying(data))


def test_a_parsed_file_could_stop_the_server() -> None:
    """Positive control: NumPy meets such files with errors that no message handler foresees."""
    array = carrying(NUMPY_FILES["zip"]).array_records["vector"]["vector"]
    with pytest.raises(Exception, match="not a zip file") as caught:
        array.numpy()
    assert not isinstance(caught.value, (FederationError, ValueError, TypeError, EOFError))


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"vector": ArrayRecord()}),
        RecordDict({"vector": ConfigRecord({"vector": b"x"})}),
        RecordDict({"arrays": ArrayRecord({"vector": Array(np.zeros(3))})}),
    ],
)
def test_a_missing_vector_is_noticed(content: RecordDict) -> None:
    with pytest.raises(FederationError, match="no masked vector"):
        read_vector(content)


@given(st.binary(max_size=200), st.text(max_size=20).filter(lambda text: text != "fedcmr.bytes"))
def test_no_other_form_is_a_vector(data: bytes, stype: str) -> None:
    content = carrying(data, stype)
    with pytest.raises(FederationError, match="no masked vector"):
        read_vector(content)


def largest() -> list[Frozen]:
    """Messages to and from 100 sites with the longest names and the post-quantum option."""
    names = tuple(f"{n:063d}" for n in range(MOST_SITES))
    session = Session(job="a" * 64, phase="evaluate", round=10_000, attempt=10_000)
    public = PublicKey(x25519="a" * 64, mlkem768="a" * 2368)
    signed = {"header": "a" * 64, "signature": "a" * 128}
    box, part = "a" * 2 * (1088 + 12 + 132 + 16), "a" * 2 * (1088 + 12 + 32 + 16)
    keys = [
        Keys(site=name, transport=public, mask=public, commitment="a" * 64, **signed)
        for name in names
    ]
    signatures = [Confirmation(site=name, survivors=names, **signed) for name in names]
    deliveries = [Delivery(sender=n, header="a" * 64, sealed=box, pair=part) for n in names]
    shares = dict.fromkeys(names, "a" * 132)
    unmasking = Unmasking(site=names[0], seeds=shares, keys=shares, **signed)
    boxes, parts = dict.fromkeys(names, box), dict.fromkeys(names, part)
    return [
        SharesQuestion(session=session, model="a" * 64, keys=tuple(keys)),
        UpdateQuestion(session=session, deliveries=tuple(deliveries)),
        ConsistencyQuestion(session=session, survivors=names),
        UnmaskQuestion(session=session, confirmations=tuple(signatures)),
        UnmaskAnswer(unmasking=unmasking, next_keys=keys[0]),
        Shares(site=names[0], sealed=boxes, pairs=parts, **signed),
    ]


@pytest.mark.parametrize("message", largest(), ids=lambda message: type(message).__name__)
def test_the_largest_federation_fits_the_size_limit(message: Frozen) -> None:
    text = message.encode()
    assert len(text) < MOST_BYTES
    assert type(message).decode(text) == message
