"""The transition table decides; each refusal has its fault and changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any, get_args

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import ValidationError
from secagg_parties import Record, draw_values, record, total, whole_numbers

from fedcmr_shared.secagg.agreement import KeyPair, PublicKey
from fedcmr_shared.secagg.faults import Fault, ProtocolError
from fedcmr_shared.secagg.messages import STEPS, Confirmation, Keys, Shares, Step
from fedcmr_shared.secagg.server import Aggregation, TooFewSites
from fedcmr_shared.secagg.session import Header, Session
from fedcmr_shared.secagg.site import (
    TRANSITIONS,
    SiteState,
    accept_shares,
    announce_vector,
    confirm_survivors,
    masks,
    offer_keys,
    pair_mask,
    reveal_shares,
    rounding_key,
    self_mask,
    share_secrets,
)
from fedcmr_simulations.rehearsal import Schedule, draw_sites, new_setting, rehearse

FIRST, SECOND, THIRD, FOURTH = (f"site-{n:03d}" for n in range(1, 5))
BOTH = pytest.mark.parametrize("post_quantum", [False, True], ids=["classical", "post-quantum"])


@pytest.fixture(scope="module")
def said() -> Record:
    """Four sites, of which the second is lost after its shares."""
    return record(4, lost=[2])


@pytest.fixture(scope="module")
def quantum() -> Record:
    return record(4, lost=[2], post_quantum=True)


def ask(said: Record, state: SiteState, step: Step) -> SiteState:
    """Ask the first site, in ``state``, for ``step`` with what an honest server sends."""
    identity = said.sites[FIRST].identity
    match step:
        case "keys":
            return offer_keys(FIRST, identity, said.setting.roster, said.setting.header)[0]
        case "shares":
            model, keys = said.setting.model_sha256, tuple(said.keys.values())
            return share_secrets(state, identity, model, keys)[0]
        case "update":
            return accept_shares(state, said.deliveries[FIRST])
        case "consistency":
            return confirm_survivors(state, identity, said.survivors)[0]
        case "unmask":
            return reveal_shares(state, identity, tuple(said.confirmations.values()))[0]


# --- state machine -----------------------------------------------------------------------------


ASKED: list[Step] = ["shares", "update", "consistency", "unmask"]


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("answered", STEPS)
def test_the_table_decides_every_state_and_step(said: Record, answered: Step, asked: Step) -> None:
    state = said.states[answered][FIRST]
    before = state.model_dump()
    if (answered, asked) in TRANSITIONS:
        assert ask(said, state, asked).answered == asked
    else:
        with pytest.raises(ProtocolError) as caught:
            ask(said, state, asked)
        late = STEPS.index(asked) <= STEPS.index(answered)
        assert caught.value.fault == ("repeated" if late else "order")
    assert state.model_dump() == before


def test_the_table_is_the_line_of_steps() -> None:
    assert frozenset(pairwise(STEPS)) == TRANSITIONS


def test_keys_begin_another_session_with_other_secrets(said: Record) -> None:
    """Who calls keeps one state per session; here nothing is remembered."""
    one, other = (ask(said, said.states["keys"][FIRST], "keys") for _ in range(2))
    assert one.secrets != other.secrets


@pytest.mark.parametrize("answered", STEPS)
def test_a_vector_is_masked_and_signed_in_its_step_alone(said: Record, answered: Step) -> None:
    state, identity = said.states[answered][FIRST], said.sites[FIRST].identity
    actions: list[Callable[[], object]] = [
        lambda: masks(state),
        lambda: rounding_key(state),
        lambda: announce_vector(state, identity, b"vector"),
    ]
    for action in actions:
        if answered == "update":
            action()
        else:
            with pytest.raises(ProtocolError, match=f"after step {answered}") as caught:
                action()
            assert caught.value.fault == "order"


@pytest.mark.parametrize("answered", STEPS)
@BOTH
def test_a_state_survives_a_disk(
    said: Record, quantum: Record, answered: Step, post_quantum: bool
) -> None:
    for state in (quantum if post_quantum else said).states[answered].values():
        assert SiteState.model_validate_json(state.model_dump_json()) == state


def test_after_its_last_answer_a_site_has_no_secret(said: Record) -> None:
    before, after = said.states["consistency"][FIRST], said.states["unmask"][FIRST]
    assert (after.secrets, after.received) == (None, {})
    text = after.model_dump_json()
    assert before.secrets is not None
    for secret in before.secrets.model_dump().values():
        assert secret in before.model_dump_json()
        assert secret not in text
    for received in before.received.values():
        assert received.seed not in text
        assert received.mask not in text


@pytest.mark.parametrize("answered", STEPS)
def test_secrets_do_not_show(quantum: Record, answered: Step) -> None:
    state = quantum.states[answered][FIRST]
    shown = [state, state.secrets, *state.received.values()]
    for secret in [*(state.secrets or state).model_dump().values()]:
        if isinstance(secret, str) and len(secret) == 64:
            assert not any(secret in repr(one) or secret in str(one) for one in shown)
    for received in state.received.values():
        for share in filter(None, received.model_dump().values()):
            assert not any(share in repr(one) for one in shown)


def test_a_damaged_state_does_not_show_in_its_error(said: Record) -> None:
    state = said.states["keys"][FIRST]
    assert state.secrets is not None
    damaged = state.model_dump_json().replace('"rounding"', '"rouding"')
    with pytest.raises(ValidationError) as caught:
        SiteState.model_validate_json(damaged)
    assert state.secrets.rounding[:8] not in str(caught.value)


@BOTH
def test_a_site_reveals_one_share_of_each_peer(
    said: Record, quantum: Record, post_quantum: bool
) -> None:
    for message in (quantum if post_quantum else said).unmaskings.values():
        assert set(message.seeds) == {FIRST, THIRD, FOURTH}
        assert set(message.keys) == {SECOND}


def test_a_site_that_shared_with_nobody_is_not_masked_against() -> None:
    """A site lost at `shares` has no part in masks, shares or the sum."""
    sites = draw_sites(4)
    setting = new_setting(sites, whole_numbers(4))
    server = Aggregation(setting.roster, setting.header, setting.encoding, setting.weights)
    keys = server.keys([site.keys(setting) for site in sites.values()], setting.model_sha256)
    answers = [sites[n].shares(setting.model_sha256, keys) for n in (FIRST, SECOND, THIRD)]
    deliveries = server.shares(answers)
    assert set(deliveries) == {FIRST, SECOND, THIRD}
    state = accept_shares(sites[FIRST].state, deliveries[FIRST])
    assert set(state.received) == {FIRST, SECOND, THIRD}
    assert len(masks(state)) == 3


@BOTH
def test_masks_of_a_pair_are_one_key_with_two_signs(
    said: Record, quantum: Record, post_quantum: bool
) -> None:
    said = quantum if post_quantum else said
    found = [masks(said.states["update"][name]) for name in sorted(said.sites)]
    assert [len(one) for one in found] == [4, 4, 4, 4]
    assert all(one[0].sign == 1 for one in found)
    keys = [mask.key for one in found for mask in one]
    signs = {key: sorted(m.sign for one in found for m in one if m.key == key) for key in keys}
    assert sorted(signs.values()) == [[-1, 1]] * 6 + [[1]] * 4


def test_the_post_quantum_part_changes_the_masks(quantum: Record) -> None:
    """Whoever breaks X25519 alone knows no pair's mask."""
    state = quantum.states["update"][FIRST]
    assert state.secrets is not None
    classical = state.model_copy(
        update={"header": state.header.model_copy(update={"post_quantum": False})}
    )
    honest = {mask.key for mask in masks(state)}
    assert honest.isdisjoint(mask.key for mask in masks(classical))


def test_masks_are_for_one_header_and_one_pair(said: Record) -> None:
    """Whatever the secret: two sessions, or two pairs, never have one mask."""
    header, roster, secret = said.header, said.setting.roster, bytes(32)
    other = header.model_copy(update={"model": "b" * 64})
    pairs = list(combinations(roster.names, 2))
    found = [pair_mask(secret, h, roster, *pair).key for h in (header, other) for pair in pairs]
    found += [self_mask(secret, h, site).key for h in (header, other) for site in roster.names]
    assert len(set(found)) == 2 * (6 + 4)
    one, back = (pair_mask(secret, header, roster, *pair) for pair in (pairs[0], pairs[0][::-1]))
    assert (one.key, one.sign) == (back.key, -back.sign)


def test_what_is_signed_is_the_documented_bytes(said: Record) -> None:
    for step, message in {
        "keys": said.keys[FIRST],
        "shares": said.shares[FIRST],
        "update": said.vectors[FIRST][0],
        "consistency": said.confirmations[FIRST],
        "unmask": said.unmaskings[FIRST],
    }.items():
        content = json.loads(message.encode())
        signature = bytes.fromhex(content.pop("signature"))
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(said.setting.roster.sites[FIRST]))
        key.verify(signature, f"fedcmr secure aggregation 1 {step}\n{text}".encode())


# --- headers and sessions ----------------------------------------------------------------------


def test_every_field_of_a_header_is_in_its_digest(said: Record) -> None:
    header = said.header
    session = header.session
    changes: list[dict[str, Any]] = [
        {"session": session.model_copy(update={"job": "b" * 64})},
        {"session": session.model_copy(update={"phase": "evaluate"})},
        {"session": session.model_copy(update={"round": 2})},
        {"session": session.model_copy(update={"attempt": 2})},
        {"roster": "b" * 64},
        {"threshold": 4},
        {"least_survivors": 4},
        {"encoding": "b" * 64},
        {"post_quantum": True},
        {"model": None},
        {"model": "b" * 64},
    ]
    assert {name for change in changes for name in change} == set(Header.model_fields)
    digests = {header.model_copy(update=change).digest() for change in changes}
    assert len(digests | {header.digest()}) == len(changes) + 1


@pytest.mark.parametrize(
    "change",
    [
        {"job": "A" * 64},
        {"job": "a" * 63},
        {"phase": "test"},
        {"round": 0},
        {"round": 10_001},
        {"attempt": 0},
        {"attempt": 10_001},
        {"extra": 1},
    ],
)
def test_what_is_no_session_is_refused(change: dict[str, Any]) -> None:
    good = {"job": "a" * 64, "phase": "train", "round": 1, "attempt": 1}
    assert str(Session.model_validate(good)) == "train round 1, attempt 1"
    with pytest.raises(ValidationError):
        Session.model_validate({**good, **change})


@pytest.mark.parametrize("field", ["threshold", "least_survivors"])
def test_a_header_is_of_three_sites_or_more(said: Record, field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        Header.model_validate({**said.header.model_dump(), field: 2})


# --- faults ------------------------------------------------------------------------------------


def signed_keys(said: Record, name: str, **changes: object) -> Keys:
    return said.keys[name].model_copy(update=changes).signed(said.sites[name].identity)


def shared_with(said: Record, *keys: Keys) -> None:
    """The first site gets all honest keys, but ``keys`` in place of those of the same sites."""
    given = {**said.keys, **{message.site: message for message in keys}}
    site, state = said.sites[FIRST], said.states["keys"][FIRST]
    share_secrets(state, site.identity, said.setting.model_sha256, tuple(given.values()))


def with_keys(said: Record, *keys: Keys) -> None:
    site, state = said.sites[FIRST], said.states["keys"][FIRST]
    share_secrets(state, site.identity, said.setting.model_sha256, keys)


def confirmed(said: Record, *survivors: str) -> None:
    site, state = said.sites[FIRST], said.states["update"][FIRST]
    confirm_survivors(state, site.identity, survivors)


def revealed(said: Record, *confirmations: Confirmation) -> None:
    site, state = said.sites[FIRST], said.states["consistency"][FIRST]
    reveal_shares(state, site.identity, confirmations)


def delivered(said: Record, at: int = 0, **changes: object) -> None:
    """The first site gets all honest shares, one of them changed."""
    deliveries = list(said.deliveries[FIRST])
    deliveries[at] = deliveries[at].model_copy(update=changes)
    accept_shares(said.states["shares"][FIRST], deliveries)


def offered(said: Record, **changes: object) -> None:
    header = said.setting.header.model_copy(update=changes)
    offer_keys(FIRST, said.sites[FIRST].identity, said.setting.roster, header)


def sealed_by_second(said: Record, content: bytes, field: str = "sealed") -> None:
    """The second site lies: what it sealed is not what the protocol says."""
    state = said.states["shares"][SECOND]
    assert state.secrets is not None
    transport = field == "sealed"
    root = state.secrets.transport if transport else state.secrets.mask
    pair = KeyPair(bytes.fromhex(root), said.header.post_quantum)
    keys = said.keys[THIRD]
    receiver, purpose = (keys.transport, "shares") if transport else (keys.mask, "pair")
    box = pair.seal(receiver, content, purpose, said.header.digest(), SECOND, THIRD).hex()
    deliveries = [
        d.model_copy(update={field: box}) if d.sender == SECOND else d
        for d in said.deliveries[THIRD]
    ]
    accept_shares(said.states["shares"][THIRD], deliveries)


def other_pairs(said: Record) -> PublicKey:
    return KeyPair.draw(said.header.post_quantum).public


def stranger() -> Keys:
    """Good keys of a site that no other roster knows."""
    other = record(3)
    return other.keys[THIRD].model_copy(update={"site": "stranger"})


def elsewhere(said: Record, **changes: object) -> str:
    return said.setting.header.model_copy(update=changes).digest()


def vectors_of(said: Record, name: str, content: bytes) -> None:
    said.server(before="update").vector(said.vectors[name][0], content)


def too_long(said: Record) -> None:
    site = said.sites[FIRST]
    vector = bytes(said.setting.encoding.nbytes + 4)
    said.server(before="update").vector(
        announce_vector(said.states["update"][FIRST], site.identity, vector), vector
    )


REFUSALS: dict[str, tuple[Fault, str, Callable[[Record], object]]] = {
    "no JSON": ("malformed", "Keys message", lambda said: Keys.decode("{")),
    "too long": ("malformed", "too long", lambda said: Shares.decode(" " * 2_000_000)),
    "step skipped": (
        "order",
        "update",
        lambda said: ask(said, said.states["keys"][FIRST], "update"),
    ),
    "step again": (
        "repeated",
        "answered before",
        lambda said: ask(said, said.states["unmask"][FIRST], "unmask"),
    ),
    "another roster": ("foreign", "another roster", lambda said: offered(said, roster="b" * 64)),
    "another threshold": ("foreign", "another roster", lambda said: offered(said, threshold=4)),
    "another attempt": (
        "foreign",
        "another job, round",
        lambda said: shared_with(
            said,
            signed_keys(
                said,
                SECOND,
                header=elsewhere(
                    said, session=said.header.session.model_copy(update={"attempt": 2})
                ),
            ),
        ),
    ),
    "another model": ("model", "another model", lambda said: delivered(said, header="b" * 64)),
    "confirmed for another model": (
        "model",
        "another model",
        lambda said: revealed(
            said,
            *said.confirmations.values(),
            said.confirmations[THIRD].model_copy(update={"header": "b" * 64}),
        ),
    ),
    "site with another's key": (
        "roster",
        "with its own key",
        lambda said: offer_keys(
            FIRST, said.sites[SECOND].identity, said.setting.roster, said.setting.header
        ),
    ),
    "site not on the roster": (
        "roster",
        "not on the roster",
        lambda said: with_keys(said, *said.keys.values(), stranger()),
    ),
    "keys twice": (
        "roster",
        "come twice",
        lambda said: with_keys(said, *said.keys.values(), said.keys[SECOND]),
    ),
    "shares twice": (
        "roster",
        "come twice",
        lambda said: delivered(said, 1, sender=SECOND),
    ),
    "own shares": ("roster", "come twice", lambda said: delivered(said, sender=FIRST)),
    "shares of a stranger": (
        "roster",
        "without accepted keys",
        lambda said: delivered(said, sender="stranger"),
    ),
    "confirmed twice": (
        "roster",
        "confirms twice",
        lambda said: revealed(said, *said.confirmations.values(), said.confirmations[THIRD]),
    ),
    "confirmed by a lost site": (
        "roster",
        "did not survive",
        lambda said: revealed(
            said,
            *said.confirmations.values(),
            Confirmation(site=SECOND, header=said.header.digest(), survivors=said.survivors).signed(
                said.sites[SECOND].identity
            ),
        ),
    ),
    "unsigned": (
        "signature",
        "did not sign",
        lambda said: shared_with(
            said, said.keys[SECOND].model_copy(update={"signature": "0" * 128})
        ),
    ),
    "key of small order": (
        "keys",
        "cannot be used",
        lambda said: shared_with(said, signed_keys(said, SECOND, mask=PublicKey(x25519="00" * 32))),
    ),
    "key used twice": (
        "keys",
        "used twice",
        lambda said: shared_with(said, signed_keys(said, SECOND, mask=said.keys[THIRD].mask)),
    ),
    "one key for both": (
        "keys",
        "used twice",
        lambda said: shared_with(said, signed_keys(said, SECOND, mask=said.keys[SECOND].transport)),
    ),
    "own keys changed": (
        "keys",
        "missing or changed",
        lambda said: shared_with(said, signed_keys(said, FIRST, transport=other_pairs(said))),
    ),
    "own keys missing": (
        "keys",
        "missing or changed",
        lambda said: with_keys(said, *list(said.keys.values())[1:]),
    ),
    "too few keys": (
        "threshold",
        "2 of 4 sites sent keys; 3",
        lambda said: with_keys(said, *list(said.keys.values())[:2]),
    ),
    "too few shares": (
        "threshold",
        "2 of 4 sites shared",
        lambda said: accept_shares(said.states["shares"][FIRST], said.deliveries[FIRST][:1]),
    ),
    "too few survivors": (
        "threshold",
        "2 sites survived; 3",
        lambda said: confirmed(said, FIRST, THIRD),
    ),
    "too few confirmations": (
        "threshold",
        "2 of 4 sites confirmed",
        lambda said: revealed(said, *list(said.confirmations.values())[:2]),
    ),
    "fewer survivors than the threshold": (
        "threshold",
        "2 survivors do not fit",
        lambda said: offered(said, least_survivors=2),
    ),
    "more survivors than sites": (
        "threshold",
        "5 survivors do not fit",
        lambda said: offered(said, least_survivors=5),
    ),
    "changed box": (
        "share",
        "changed or is not ours",
        lambda said: delivered(said, sealed="00" * (len(said.deliveries[FIRST][0].sealed) // 2)),
    ),
    "box of another sender": (
        "share",
        "changed or is not ours",
        lambda said: delivered(said, sealed=said.deliveries[FIRST][1].sealed),
    ),
    "box cut": (
        "share",
        "changed or is not ours",
        lambda said: delivered(said, sealed=said.deliveries[FIRST][0].sealed[:-2]),
    ),
    "box empty": ("share", "cut short|not ours", lambda said: delivered(said, sealed="00" * 28)),
    "shares cut by their sender": (
        "share",
        "cut short",
        lambda said: sealed_by_second(said, bytes(131)),
    ),
    "a third share added by its sender": (
        "share",
        "cut short",
        lambda said: sealed_by_second(said, bytes(198)),
    ),
    "survivors not sorted": (
        "survivors",
        "not a sorted set",
        lambda said: confirmed(said, FIRST, FOURTH, THIRD),
    ),
    "survivor twice": (
        "survivors",
        "not a sorted set",
        lambda said: confirmed(said, FIRST, FIRST, THIRD, FOURTH),
    ),
    "survivor without shares": (
        "survivors",
        "not a sorted set",
        lambda said: confirmed(said, FIRST, THIRD, FOURTH, "stranger"),
    ),
    "survivor whose shares did not come": (
        "survivors",
        "whose shares this site holds",
        lambda said: confirm_survivors(
            accept_shares(said.states["shares"][FIRST], said.deliveries[FIRST][:2]),
            said.sites[FIRST].identity,
            [FIRST, SECOND, FOURTH],
        ),
    ),
    "without this site": (
        "survivors",
        "do not include this site",
        lambda said: confirmed(said, SECOND, THIRD, FOURTH),
    ),
    "confirmed another set": (
        "survivors",
        "another set",
        lambda said: revealed(
            said,
            *[said.confirmations[name] for name in (FIRST, THIRD)],
            said.confirmations[FOURTH]
            .model_copy(update={"survivors": tuple(said.sites)})
            .signed(said.sites[FOURTH].identity),
        ),
    ),
    "vector replaced": (
        "vector",
        "not the signed one",
        lambda said: vectors_of(said, FIRST, bytes(said.setting.encoding.nbytes)),
    ),
    "vector cut": (
        "vector",
        "not the signed one",
        lambda said: vectors_of(said, FIRST, bytes(said.vectors[FIRST][1][:-1])),
    ),
    "vector too long": ("vector", "28 bytes, the encoding 24", too_long),
}

NOT_RAISED: frozenset[Fault] = frozenset({"silent", "refused"})
"""Noted by the server when nothing, or a public code, came instead of a message."""


@pytest.mark.parametrize("case", REFUSALS)
def test_each_refusal_has_its_fault_and_changes_nothing(said: Record, case: str) -> None:
    fault, message, action = REFUSALS[case]
    before = {
        step: {n: s.model_dump() for n, s in each.items()} for step, each in said.states.items()
    }
    with pytest.raises(ProtocolError, match=message) as caught:
        action(said)
    assert caught.value.fault == fault
    after = {
        step: {n: s.model_dump() for n, s in each.items()} for step, each in said.states.items()
    }
    assert after == before


def test_every_fault_is_produced() -> None:
    assert {fault for fault, *_ in REFUSALS.values()} == set(get_args(Fault)) - NOT_RAISED


@pytest.mark.parametrize(
    ("message", "action"),
    [
        (
            "post-quantum setting",
            lambda s: shared_with(s, signed_keys(s, SECOND, mask=KeyPair.draw(False).public)),
        ),
        (
            "post-quantum setting",
            lambda s: shared_with(s, signed_keys(s, SECOND, transport=KeyPair.draw(False).public)),
        ),
        (
            "missing or not asked for",
            lambda s: accept_shares(
                s.states["shares"][FOURTH],
                [d.model_copy(update={"pair": None}) for d in s.deliveries[FOURTH]],
            ),
        ),
        ("missing or not asked for", lambda s: delivered(s, pair=s.deliveries[FOURTH][0].pair)),
        ("cut short", lambda s: sealed_by_second(s, bytes(31), "pair")),
        ("cut short", lambda s: sealed_by_second(s, bytes(33), "pair")),
    ],
)
def test_the_post_quantum_half_is_there_and_whole(
    quantum: Record, message: str, action: Callable[[Record], object]
) -> None:
    with pytest.raises(ProtocolError, match=message):
        action(quantum)


def test_a_post_quantum_key_is_not_asked_for_without_the_option(said: Record) -> None:
    with pytest.raises(ProtocolError, match="post-quantum setting"):
        shared_with(said, signed_keys(said, SECOND, mask=KeyPair.draw(True).public))


# --- server ------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS)
def test_the_server_takes_each_step_once_and_in_order(said: Record, step: Step) -> None:
    actions: dict[Step, Callable[[Aggregation], object]] = {
        "keys": lambda s: s.keys(said.keys.values(), said.setting.model_sha256),
        "shares": lambda s: s.shares(said.shares.values()),
        "update": lambda s: s.vectors_complete(),
        "consistency": lambda s: s.confirmations(said.confirmations.values()),
        "unmask": lambda s: s.open(said.unmaskings.values()),
    }
    server = said.server(before=step)
    for other in STEPS:
        if other != step:
            with pytest.raises(ProtocolError, match="is not due") as caught:
                actions[other](server)
            assert caught.value.fault == "order"
    if step == "update":
        for name in said.survivors:
            server.vector(*said.vectors[name])
    actions[step](server)
    with pytest.raises(ProtocolError, match="is not due"):
        actions[step](server)


@pytest.mark.parametrize("step", [step for step in STEPS if step != "update"])
def test_a_vector_out_of_its_step_is_refused(said: Record, step: Step) -> None:
    with pytest.raises(ProtocolError, match="out of its step") as caught:
        said.server(before=step).vector(*said.vectors[FIRST])
    assert caught.value.fault == "order"


def test_a_vector_counts_once(said: Record) -> None:
    server = said.server(before="update")
    server.vector(*said.vectors[FIRST])
    with pytest.raises(ProtocolError, match="not expected") as caught:
        server.vector(*said.vectors[FIRST])
    assert caught.value.fault == "roster"


def test_a_refused_vector_leaves_the_sum_as_it_was(said: Record) -> None:
    server = said.server(before="update")
    for name in said.survivors:
        message, content = said.vectors[name]
        for wrong in (bytes(len(content)), content[:-1], b"", bytes(4 * len(content))):
            with pytest.raises(ProtocolError):
                server.vector(message, wrong)
        server.vector(message, content)
    server.vectors_complete()
    server.confirmations(said.confirmations.values())
    opened = server.open(said.unmaskings.values())
    assert torch.equal(opened.sums["x"], total(said.values, said.survivors))


def test_the_server_says_who_takes_part(said: Record) -> None:
    everybody = tuple(said.sites)
    assert said.server(before="keys").taking_part == ()
    assert said.server(before="shares").taking_part == everybody
    assert said.server(before="update").taking_part == everybody
    assert said.server(before="consistency").taking_part == (FIRST, THIRD, FOURTH)


def test_a_site_that_says_nothing_is_a_silent_loss(said: Record) -> None:
    server = said.server(before="shares")
    server.shares([said.shares[name] for name in (FIRST, SECOND, THIRD)])
    loss = server.losses[FOURTH]
    assert (loss.site, loss.step, loss.fault) == (FOURTH, "shares", "silent")


def lost(server: Aggregation) -> dict[str, tuple[Step, Fault]]:
    return {loss.site: (loss.step, loss.fault) for loss in server.losses.values()}


BAD_KEYS: dict[str, tuple[Fault, Callable[[Record], Keys]]] = {
    "unsigned": ("signature", lambda s: s.keys[FOURTH].model_copy(update={"signature": "0" * 128})),
    "foreign": ("foreign", lambda s: signed_keys(s, FOURTH, header="b" * 64)),
    "unusable": ("keys", lambda s: signed_keys(s, FOURTH, mask=PublicKey(x25519="00" * 32))),
    "copied": ("keys", lambda s: signed_keys(s, FOURTH, mask=s.keys[FIRST].mask)),
}


@pytest.mark.parametrize("case", BAD_KEYS)
def test_bad_keys_cost_their_sender_alone(said: Record, case: str) -> None:
    fault, make = BAD_KEYS[case]
    server = said.server(before="keys")
    answers = [*[said.keys[name] for name in (FIRST, SECOND, THIRD)], make(said)]
    accepted = server.keys(answers, said.setting.model_sha256)
    assert [keys.site for keys in accepted] == [FIRST, SECOND, THIRD]
    assert lost(server) == {FOURTH: ("keys", fault)}


def test_a_second_message_of_a_site_does_not_count(said: Record) -> None:
    """Neither a forged one before the real one, nor the same one again."""
    server = said.server(before="keys")
    forged = said.keys[FIRST].model_copy(update={"signature": "0" * 128})
    accepted = server.keys(
        [forged, *said.keys.values(), said.keys[FIRST]], said.setting.model_sha256
    )
    assert [keys.site for keys in accepted] == list(said.sites)
    assert lost(server) == {}
    server.shares([*said.shares.values(), said.shares[FIRST]])
    assert lost(server) == {}


def test_of_two_signed_messages_of_a_site_the_first_counts(said: Record) -> None:
    message = said.shares[FIRST]
    other = resigned(said, message, sealed={**message.sealed, SECOND: message.sealed[THIRD]})
    server = said.server(before="shares")
    deliveries = server.shares([*said.shares.values(), other])
    assert deliveries[SECOND] == said.deliveries[SECOND]


def test_a_site_that_was_lost_does_not_come_back(said: Record) -> None:
    """Its signed confirmation of the right survivors is not asked for."""
    late = said.confirmations[FIRST].model_copy(update={"site": SECOND})
    server = said.server(before="consistency")
    signed = server.confirmations(
        [late.signed(said.sites[SECOND].identity), *said.confirmations.values()]
    )
    assert [confirmation.site for confirmation in signed] == [FIRST, THIRD, FOURTH]
    assert lost(server) == {SECOND: ("update", "silent")}


def test_a_stranger_is_noted_and_left_out(said: Record) -> None:
    server = said.server(before="keys")
    server.keys([*said.keys.values(), stranger()], said.setting.model_sha256)
    assert lost(server) == {"stranger": ("keys", "roster")}


def resigned(said: Record, message: Shares, **changes: object) -> Shares:
    return message.model_copy(update=changes).signed(said.sites[message.site].identity)


@pytest.mark.parametrize("change", ["one missing", "one for itself", "a pair too many"])
def test_shares_are_for_all_the_others(said: Record, change: str) -> None:
    message = said.shares[FOURTH]
    sealed = dict(message.sealed)
    pairs = {FIRST: sealed[FIRST]} if change == "a pair too many" else {}
    if change == "one missing":
        del sealed[FIRST]
    if change == "one for itself":
        sealed[FOURTH] = sealed[FIRST]
    server = said.server(before="shares")
    others = [said.shares[name] for name in (FIRST, SECOND, THIRD)]
    server.shares([*others, resigned(said, message, sealed=sealed, pairs=pairs)])
    assert lost(server) == {FOURTH: ("shares", "share")}


def test_pairs_go_to_the_sites_above(quantum: Record) -> None:
    assert [set(quantum.shares[name].pairs) for name in sorted(quantum.sites)] == [
        {SECOND, THIRD, FOURTH},
        {THIRD, FOURTH},
        {FOURTH},
        set(),
    ]
    message = quantum.shares[SECOND]
    server = quantum.server(before="shares")
    pairs = {FOURTH: message.pairs[FOURTH]}
    answers = [quantum.shares[n] for n in (FIRST, THIRD, FOURTH)]
    server.shares([*answers, resigned(quantum, message, pairs=pairs)])
    assert lost(server) == {SECOND: ("shares", "share")}


@pytest.mark.parametrize("lost", [(), (1,), (2,), (5,), (1, 5), (2, 3)])
@BOTH
def test_a_lost_sites_masks_come_off_whatever_its_place(
    lost: tuple[int, ...], post_quantum: bool
) -> None:
    """Of a pair's post-quantum secret, the lost site may be the one that drew it, or the other."""
    said = record(7, lost=lost, post_quantum=post_quantum)
    opened = said.server(before="unmask").open(said.unmaskings.values())
    assert torch.equal(opened.sums["x"], total(said.values, said.survivors))


def test_whoever_confirms_another_set_is_lost() -> None:
    said = record(4)
    wrong = (
        said.confirmations[FOURTH]
        .model_copy(update={"survivors": (FIRST, SECOND, FOURTH)})
        .signed(said.sites[FOURTH].identity)
    )
    server = said.server(before="consistency")
    signed = server.confirmations([*[said.confirmations[n] for n in (FIRST, SECOND, THIRD)], wrong])
    assert [confirmation.site for confirmation in signed] == [FIRST, SECOND, THIRD]
    assert lost(server) == {FOURTH: ("consistency", "survivors")}


def test_the_least_survivors_of_a_job_count() -> None:
    """Three of four would do for the threshold, but not for this job."""
    sites = draw_sites(4)
    setting = new_setting(sites, whole_numbers(4))
    strict = replace(setting, header=setting.header.model_copy(update={"least_survivors": 4}))
    values = draw_values(setting)
    lost: Schedule = {(SECOND, "update"): "answer"}
    assert rehearse(setting, sites, values, lost).survivors == (FIRST, THIRD, FOURTH)
    with pytest.raises(TooFewSites, match="3 sites answered step update; 4 are needed"):
        rehearse(strict, sites, values, lost)
    with pytest.raises(ProtocolError, match="3 sites survived; 4 are needed"):
        sites[FIRST].confirmation((FIRST, THIRD, FOURTH))
    assert rehearse(strict, sites, values, {}).survivors == tuple(sites)


@pytest.mark.parametrize("step", ["keys", "shares", "update", "consistency"])
def test_an_attempt_of_too_few_sites_is_over(said: Record, step: Step) -> None:
    server = said.server(before=step)
    two = [FIRST, THIRD]
    actions: dict[Step, Callable[[], object]] = {
        "keys": lambda: server.keys([said.keys[n] for n in two], "a" * 64),
        "shares": lambda: server.shares([said.shares[n] for n in two]),
        "update": server.vectors_complete,
        "consistency": lambda: server.confirmations([said.confirmations[n] for n in two]),
        "unmask": lambda: server.open(said.unmaskings.values()),
    }
    if step == "update":
        for name in two:
            server.vector(*said.vectors[name])
    with pytest.raises(TooFewSites, match="2 sites answered") as caught:
        actions[step]()
    assert (caught.value.step, caught.value.fault) == (step, "threshold")
    for action in actions.values():
        with pytest.raises(ProtocolError, match="not due, but nothing"):
            action()
