"""Whatever arrives is read or refused; a changed bit never makes a wrong sum that nobody notices."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TypeVar

import pytest
from flwr.app import ConfigRecord, RecordDict
from hypothesis import example, given
from hypothesis import strategies as st
from secagg_parties import Record, record

from fedcmr_shared.federation.secure_messages import (
    ConsistencyQuestion,
    KeysQuestion,
    SharesQuestion,
    UnmaskAnswer,
    UnmaskQuestion,
    UpdateQuestion,
    read_record,
)
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.secagg.faults import ProtocolError
from fedcmr_shared.secagg.messages import (
    MOST_BYTES,
    Confirmation,
    Delivery,
    Frozen,
    Keys,
    Shares,
    Signed,
    Unmasking,
    Vector,
)
from fedcmr_shared.secagg.site import (
    accept_shares,
    confirm_survivors,
    reveal_shares,
    share_secrets,
)

KINDS: list[type[Frozen]] = [
    Keys,
    Shares,
    Vector,
    Confirmation,
    Unmasking,
    Delivery,
    KeysQuestion,
    SharesQuestion,
    UpdateQuestion,
    ConsistencyQuestion,
    UnmaskQuestion,
    UnmaskAnswer,
]
EVERY_KIND = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
Message = TypeVar("Message", bound=Frozen)
FIRST, SECOND = "site-001", "site-002"


@pytest.fixture(scope="module")
def said() -> Record:
    return record(3)


@pytest.fixture(scope="module")
def quantum() -> Record:
    return record(3, post_quantum=True)


def examples(said: Record) -> dict[type[Frozen], Frozen]:
    """One message of each kind, to or from the first site."""
    session, survivors = said.header.session, said.survivors
    keys, confirmations = tuple(said.keys.values()), tuple(said.confirmations.values())
    job = JobSpec()
    asked = session.model_copy(update={"job": job.sha256})
    found: list[Frozen] = [
        said.keys[FIRST],
        said.shares[FIRST],
        said.vectors[FIRST][0],
        said.confirmations[FIRST],
        said.unmaskings[FIRST],
        said.deliveries[FIRST][0],
        KeysQuestion(session=asked, job=job),
        SharesQuestion(session=session, model=said.setting.model_sha256, keys=keys),
        UpdateQuestion(session=session, deliveries=said.deliveries[FIRST]),
        ConsistencyQuestion(session=session, survivors=survivors),
        UnmaskQuestion(session=session, confirmations=confirmations),
        UnmaskAnswer(unmasking=said.unmaskings[FIRST], next_keys=said.keys[FIRST]),
    ]
    return {type(one): one for one in found}


# --- decoders ----------------------------------------------------------------------------------


def read_or_refused(kind: type[Message], text: str) -> Message | None:
    """Decode ``text``; nothing but a short ProtocolError may come of it."""
    try:
        return kind.decode(text)
    except ProtocolError as error:
        fault, message = error.fault, str(error)
    assert fault == "malformed"
    assert len(message) < 1000
    assert message.isprintable()
    return None


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@EVERY_KIND
@given(st.text(st.characters()))  # surrogates too
@example("\ud800")
@example("")
@example("\0")
def test_any_text_is_read_or_refused(kind: type[Frozen], text: str) -> None:
    assert read_or_refused(kind, text) is None


@EVERY_KIND
@given(anything)
def test_any_json_is_read_or_refused(kind: type[Frozen], value: object) -> None:
    assert read_or_refused(kind, json.dumps(value)) is None


def places(value: object) -> Iterator[tuple[Any, ...]]:
    """Yield where a value lies in ``value``, at any depth, as keys and indices."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value if isinstance(value, list) else [])
    )
    for key, inner in items:
        yield (key,)
        yield from ((key, *rest) for rest in places(inner))


@EVERY_KIND
@given(data=st.data())
def test_any_field_of_any_type_is_read_or_refused(
    said: Record, kind: type[Frozen], data: st.DataObject
) -> None:
    """A good message in which one value, at any depth, is something else."""
    good = json.loads(examples(said)[kind].encode())
    *route, last = data.draw(st.sampled_from(list(places(good))))
    inner = good
    for key in route:
        inner = inner[key]
    inner[last] = data.draw(anything)
    read_or_refused(kind, json.dumps(good))


@EVERY_KIND
@given(data=st.data())
def test_any_cut_is_refused(said: Record, kind: type[Frozen], data: st.DataObject) -> None:
    text = examples(said)[kind].encode()
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(text))] * 2)))
    cut = text[:start] + text[stop:]
    assert start == stop or read_or_refused(kind, cut) != examples(said)[kind]


NASTY = {
    "deep lists": "[" * 100_000,
    "deep lists, closed": "[" * 100_000 + "]" * 100_000,
    "deep objects": '{"site":' * 100_000,
    "long number": '{"site":' + "9" * 500_000 + "}",
    "large exponent": '{"site":1e999999999}',
    "small exponent": '{"site":1e-999999999}',
    "no number": '{"site":NaN,"header":Infinity}',
    "escaped surrogate": '{"site":"\\ud800"}',
    "long name": '{"' + "x" * 500_000 + '":1}',
    "name with line feeds": '{"\\n\\u001b[31m":1}',
    "many names": "{" + ",".join(f'"{n}":0' for n in range(50_000)) + "}",
    "byte order mark": "\ufeff{}",
    "two values": "{}{}",
}


@EVERY_KIND
@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_what_breaks_other_parsers_is_refused(kind: type[Frozen], text: str) -> None:
    assert read_or_refused(kind, text) is None


@EVERY_KIND
def test_the_size_is_limited(said: Record, kind: type[Frozen]) -> None:
    text = examples(said)[kind].encode()
    assert read_or_refused(kind, text.ljust(MOST_BYTES)) == examples(said)[kind]
    with pytest.raises(ProtocolError, match="too long"):
        kind.decode(text.ljust(MOST_BYTES + 1))


def test_no_list_is_longer_than_a_federation(said: Record) -> None:
    many = {f"site-{n}": "00" * 66 for n in range(101)}
    message = said.unmaskings[FIRST].model_copy(update={"seeds": many})
    with pytest.raises(ProtocolError, match="seeds"):
        Unmasking.decode(message.encode())
    question = {"session": said.header.session.model_dump(), "survivors": list(many)}
    with pytest.raises(ProtocolError, match="survivors"):
        ConsistencyQuestion.decode(json.dumps(question))


def test_a_field_that_is_there_twice_counts_as_it_is_read(said: Record) -> None:
    """The signature is that of the content that was read, not of the text."""
    text = said.keys[FIRST].encode()
    twice = f'{text[:-1]},"commitment":"{"d" * 64}"}}'
    message = Keys.decode(twice)
    assert message.commitment == "d" * 64
    with pytest.raises(ProtocolError, match="did not sign"):
        message.verify(said.setting.roster, said.setting.header)


scalar = st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text() | st.binary() | st.booleans()


@EVERY_KIND
@given(st.dictionaries(st.sampled_from(["json", "other"]), scalar))
def test_any_flower_record_is_read_or_refused(
    kind: type[Frozen], values: dict[str, int | float | str | bytes | bool]
) -> None:
    with pytest.raises(ProtocolError, match="cannot be read"):
        read_record(RecordDict({"secure": ConfigRecord(dict(values))}), kind)


# --- one changed bit ---------------------------------------------------------------------------


def flipped(message: Message, bits: int = 8) -> Iterator[Message]:
    """Yield what can be read of the message's text with one bit changed, and differs from it."""
    raw, kind = message.encode().encode(), type(message)
    for at in range(len(raw)):
        for bit in range(at % 8, at % 8 + bits):
            changed = bytearray(raw)
            changed[at] ^= 1 << bit % 8
            read = read_or_refused(kind, changed.decode("utf-8", "surrogateescape"))
            if read is not None and read != message:
                yield read


@pytest.mark.parametrize("kind", [Keys, Shares, Vector, Confirmation, Unmasking])
def test_a_signed_message_with_a_changed_bit_is_refused(said: Record, kind: type[Signed]) -> None:
    roster, message = said.setting.roster, examples(said)[kind]
    header = said.setting.header if kind is Keys else said.header
    assert isinstance(message, Signed)
    message.verify(roster, header)
    count = 0
    for changed in flipped(message):
        count += 1
        with pytest.raises(ProtocolError):
            changed.verify(roster, header)
    assert count > 100  # many can be read


@pytest.mark.parametrize("kind", [Keys, Shares])
def test_so_is_a_post_quantum_one(quantum: Record, kind: type[Signed]) -> None:
    message = examples(quantum)[kind]
    header = quantum.setting.header if kind is Keys else quantum.header
    assert isinstance(message, Signed)
    for changed in flipped(message, bits=1):
        with pytest.raises(ProtocolError):
            changed.verify(quantum.setting.roster, header)


def test_a_vector_with_a_changed_bit_is_refused(said: Record) -> None:
    server = said.server(before="update")
    message, content = said.vectors[FIRST]
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ProtocolError, match="not the signed one"):
            server.vector(message, changed)
    server.vector(message, content)


def shares_answer(said: Record, question: SharesQuestion) -> Shares:
    site, state = said.sites[FIRST], said.states["keys"][FIRST]
    return share_secrets(state, site.identity, question.model, question.keys)[1]


def test_keys_with_a_changed_bit_are_refused(said: Record) -> None:
    """By the site; or another model is asked for, and then its answer is refused by the server."""
    question = examples(said)[SharesQuestion]
    session = said.header.session
    assert isinstance(question, SharesQuestion)
    models = 0
    for changed in flipped(question):
        if changed.session != session:
            continue  # no such session: a site keeps its states by session
        try:
            answer = shares_answer(said, changed)
        except ProtocolError:
            continue
        models += 1
        assert changed.keys == question.keys
        server = said.server(before="shares")
        with pytest.raises(ProtocolError):
            server.shares([answer, said.shares[SECOND], said.shares["site-003"]])
        assert server.losses[FIRST].fault == "model"
    assert 64 < models < 8 * 64


def test_shares_with_a_changed_bit_are_refused(said: Record) -> None:
    question, state = examples(said)[UpdateQuestion], said.states["shares"][FIRST]
    assert isinstance(question, UpdateQuestion)
    assert accept_shares(state, question.deliveries) == said.states["update"][FIRST]
    count = 0
    for changed in flipped(question):
        if changed.session == question.session:
            count += 1
            with pytest.raises(ProtocolError):
                accept_shares(state, changed.deliveries)
    assert count > 500


def test_survivors_with_a_changed_bit_open_nothing_else() -> None:
    """The site refuses, or signs another set, and then the server goes on without it."""
    said = record(4, lost=[2])
    question, state = examples(said)[ConsistencyQuestion], said.states["update"][FIRST]
    identity = said.sites[FIRST].identity
    assert isinstance(question, ConsistencyQuestion)
    others = []
    for changed in flipped(question):
        if changed.session != question.session:
            continue
        try:
            answer = confirm_survivors(state, identity, changed.survivors)[1]
        except ProtocolError:
            continue
        others.append(changed.survivors)
        server = said.server(before="consistency")
        with pytest.raises(ProtocolError):
            server.confirmations([answer, *list(said.confirmations.values())[1:]])
        assert server.losses[FIRST].fault == "survivors"
    assert others == [(FIRST, SECOND, "site-004")]


def test_confirmations_with_a_changed_bit_are_refused(said: Record) -> None:
    question, state = examples(said)[UnmaskQuestion], said.states["consistency"][FIRST]
    identity = said.sites[FIRST].identity
    assert isinstance(question, UnmaskQuestion)
    assert reveal_shares(state, identity, question.confirmations)[1] == said.unmaskings[FIRST]
    for changed in flipped(question):
        if changed.session == question.session:
            with pytest.raises(ProtocolError):
                reveal_shares(state, identity, changed.confirmations)


def test_a_job_with_a_changed_bit_is_not_the_sessions(said: Record) -> None:
    question = examples(said)[KeysQuestion]
    assert isinstance(question, KeysQuestion)
    assert question.job.sha256 == question.session.job
    for changed in flipped(question):
        same_job = changed.job.sha256 == changed.session.job
        assert not same_job or changed.session != question.session
