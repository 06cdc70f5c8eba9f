"""Attacks on the secure sum: each fails, and succeeds when the one check against it is taken away.

The attacker is the server, with some sites on its side where a test says so. It sees and changes
every message. *Success* is another site's vector read exactly, a sum over fewer sites than the
threshold, two sums, or a wrong sum that nobody notices.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations, cycle, product
from unittest import mock

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError
from scipy import stats
from secagg_parties import (
    Record,
    continue_record,
    deliver,
    draw_values,
    masks_of,
    read_sum,
    record,
    total,
    whole_numbers,
)
from torch import Tensor

from fedcmr_shared.identity.keys import SiteKey
from fedcmr_shared.identity.roster import Roster, least_threshold, new_roster
from fedcmr_shared.secagg import messages, server, site
from fedcmr_shared.secagg.agreement import KeyPair
from fedcmr_shared.secagg.encoding import Encoding, Segment
from fedcmr_shared.secagg.faults import Fault, ProtocolError
from fedcmr_shared.secagg.messages import (
    STEPS,
    Confirmation,
    Delivery,
    Keys,
    Signed,
    Step,
    Unmasking,
    Vector,
)
from fedcmr_shared.secagg.server import Aggregation
from fedcmr_shared.secagg.session import Header
from fedcmr_shared.secagg.shamir import SHARE_BYTES, combine
from fedcmr_shared.secagg.site import (
    Secrets,
    SiteState,
    accept_shares,
    commitment,
    confirm_survivors,
    masks,
    reveal_shares,
    share_secrets,
)
from fedcmr_simulations import rehearsal
from fedcmr_simulations.rehearsal import RehearsalSite, Setting, draw_sites, new_setting, rehearse

CHANCE = 1e-9
"""Probability that a statistical test here fails by chance."""

UNSIGNED = "0" * 128


def refused(action: Callable[[], object]) -> Fault:
    """Return the fault with which ``action`` is refused."""
    with pytest.raises(ProtocolError) as caught:
        action()
    return caught.value.fault


def secret_of(roster: Roster, shares: Mapping[str, str]) -> bytes:
    """Put t shares by site together."""
    chosen = sorted(shares)[: roster.threshold]
    return combine({roster.index(name): bytes.fromhex(shares[name]) for name in chosen})


# --- keys: substitution and another roster -----------------------------------------------------


@dataclass(frozen=True)
class Puppet:
    """A site that the server plays, with secrets of its own."""

    name: str
    identity: SiteKey
    transport: KeyPair
    mask: KeyPair

    @classmethod
    def draw(cls, name: str) -> Puppet:
        identity = SiteKey(Ed25519PrivateKey.generate())
        return cls(name, identity, KeyPair.draw(False), KeyPair.draw(False))

    def keys(self, header: Header) -> Keys:
        transport, mask = self.transport.public, self.mask.public
        message = Keys(
            site=self.name,
            header=header.digest(),
            transport=transport,
            mask=mask,
            commitment="c" * 64,
        )
        return message.signed(self.identity)


def read_through_puppets(
    victim: RehearsalSite, setting: Setting, puppets: Collection[Puppet], values: Tensor
) -> Tensor:
    """Surround ``victim`` by puppets, open all its shares, take its masks off its vector."""
    own = victim.keys(setting)
    keys = {own.site: own} | {puppet.name: puppet.keys(setting.header) for puppet in puppets}
    message = victim.shares(setting.model_sha256, keys.values())
    header = setting.header.with_model(setting.model_sha256)
    seeds, roots, deliveries = {}, {}, []
    for puppet in puppets:
        route = ("shares", header.digest(), victim.name, puppet.name)
        sealed = bytes.fromhex(message.sealed[puppet.name])
        content = puppet.transport.open(own.transport, sealed, *route).hex()
        seeds[puppet.name] = content[: 2 * SHARE_BYTES]
        roots[puppet.name] = content[2 * SHARE_BYTES :]
        back = ("shares", header.digest(), puppet.name, victim.name)
        box = puppet.transport.seal(own.transport, bytes(2 * SHARE_BYTES), *back).hex()
        deliveries.append(Delivery(sender=puppet.name, header=header.digest(), sealed=box))
    _, vector = victim.vector(setting, {"x": values}, deliveries)
    seed, root = secret_of(setting.roster, seeds), secret_of(setting.roster, roots)
    return read_sum(setting, [vector], masks_of(header, setting, victim.name, seed, root, keys))


@pytest.fixture
def four() -> tuple[dict[str, RehearsalSite], Setting]:
    sites = draw_sites(4)
    return sites, new_setting(sites, whole_numbers(4))


def test_keys_of_the_server_are_refused(four: tuple[dict[str, RehearsalSite], Setting]) -> None:
    sites, setting = four
    victim, *others = sites.values()
    puppets = [Puppet.draw(other.name) for other in others]
    values = draw_values(setting)[victim.name]["x"]
    fault = refused(lambda: read_through_puppets(victim, setting, puppets, values))
    assert fault == "signature"


def test_without_signatures_keys_of_the_server_read_a_vector(
    four: tuple[dict[str, RehearsalSite], Setting], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(messages, "verify_signature", lambda *_: None)
    sites, setting = four
    victim, *others = sites.values()
    puppets = [Puppet.draw(other.name) for other in others]
    values = draw_values(setting)[victim.name]["x"]
    assert torch.equal(read_through_puppets(victim, setting, puppets, values), values)


def swapped(four: tuple[dict[str, RehearsalSite], Setting]) -> tuple[Setting, list[Puppet]]:
    """The roster as the server would like it: the victim's key, and puppets'."""
    sites, setting = four
    victim, *others = sites.values()
    puppets = [Puppet.draw(other.name) for other in others]
    roster = new_roster(
        {victim.name: victim.identity.public_key}
        | {puppet.name: puppet.identity.public_key for puppet in puppets}
    )
    header = setting.header.model_copy(update={"roster": roster.sha256})
    return replace(setting, roster=roster, header=header), puppets


def test_another_roster_is_refused(four: tuple[dict[str, RehearsalSite], Setting]) -> None:
    sites, setting = four
    victim = next(iter(sites.values()))
    other, puppets = swapped(four)
    pinned = replace(other, roster=setting.roster)
    values = draw_values(setting)[victim.name]["x"]
    assert refused(lambda: read_through_puppets(victim, pinned, puppets, values)) == "foreign"
    # The header of the pinned roster, and the puppets' signatures for theirs.
    own = victim.keys(setting)
    keys = [own, *[puppet.keys(other.header) for puppet in puppets]]
    assert refused(lambda: victim.shares(setting.model_sha256, keys)) == "foreign"


def test_a_roster_from_the_server_reads_a_vector(
    four: tuple[dict[str, RehearsalSite], Setting],
) -> None:
    """Positive control: a site that takes its roster from the server."""
    sites, setting = four
    victim = next(iter(sites.values()))
    other, puppets = swapped(four)
    values = draw_values(setting)[victim.name]["x"]
    assert torch.equal(read_through_puppets(victim, other, puppets, values), values)


# --- both shares -------------------------------------------------------------------------------


def both_shares(said: Record, victim: str, forgetful: bool) -> Tensor:
    """Open all sites, then all but the victim; ``forgetful`` sites do not keep their state."""
    everybody = tuple(sorted(said.sites))
    rest = tuple(name for name in everybody if name != victim)
    unmaskings: list[Mapping[str, Unmasking]] = []
    for name, one in said.sites.items():
        one.state = said.states["update"][name]
    for chosen in (everybody, rest):
        if forgetful:
            for name, one in said.sites.items():
                one.state = said.states["update"][name]
        signed = [said.sites[name].confirmation(chosen) for name in chosen]
        unmaskings.append({name: said.sites[name].unmasking(signed) for name in chosen})
    roster = said.setting.roster
    seed = secret_of(roster, {n: m.seeds[victim] for n, m in unmaskings[0].items()})
    root = secret_of(roster, {n: m.keys[victim] for n, m in unmaskings[1].items()})
    found = masks_of(said.header, said.setting, victim, seed, root, said.keys)
    return read_sum(said.setting, [said.vectors[victim][1]], found)


def test_a_site_does_not_reveal_both_shares() -> None:
    said = record(4)
    assert refused(lambda: both_shares(said, "site-002", forgetful=False)) == "repeated"


def test_a_site_without_memory_reveals_both_shares() -> None:
    said = record(4)
    found = both_shares(said, "site-002", forgetful=True)
    assert torch.equal(found, said.values["site-002"]["x"])


def test_no_request_lists_a_peer_as_alive_and_lost() -> None:
    """Confirmations of two sets, each signed by enough sites, are not mixed."""
    said, sites = record(4), []
    everybody, rest = tuple(sorted(said.sites)), tuple(sorted(said.sites))[1:]
    for chosen in (everybody, rest):
        for name in rest:
            state, identity = said.states["update"][name], said.sites[name].identity
            sites.append(confirm_survivors(state, identity, chosen)[1])
    last = rest[-1]
    state, identity = said.states["consistency"][last], said.sites[last].identity
    assert refused(lambda: reveal_shares(state, identity, sites)) == "survivors"
    _, message = reveal_shares(state, identity, sites[:3])
    assert not set(message.seeds) & set(message.keys)


# --- survivors that differ between sites -------------------------------------------------------

# Seven sites with t = 5, of which the last two lie. Whom each honest site is told to be lost:
SPLIT = {1: (3, 4), 2: (3, 5), 3: (4, 5), 4: (3, 5), 5: (4,)}


def split_views(said: Record, without_consistency: bool) -> Tensor:
    """Tell each site other survivors; return what is read: the sum over the first two sites."""
    names, roster = sorted(said.sites), said.setting.roster
    liars = names[5:]
    seeds: dict[str, dict[str, str]] = {name: {} for name in names}
    roots: dict[str, dict[str, str]] = {name: {} for name in names}
    for liar in liars:
        for peer, received in said.states["update"][liar].received.items():
            seeds[peer][liar], roots[peer][liar] = received.seed, received.mask
    for number, lost in SPLIT.items():
        name = names[number - 1]
        chosen = [other for at, other in enumerate(names, 1) if at not in lost]
        identity = said.sites[name].identity
        state, own = confirm_survivors(said.states["update"][name], identity, chosen)
        signed = [own] + [
            confirm_survivors(said.states["update"][liar], said.sites[liar].identity, chosen)[1]
            for liar in liars
        ]
        if without_consistency:
            state = state.model_copy(update={"roster": threshold_of(roster, 0)})
        _, message = reveal_shares(state, identity, signed)
        for peer, share in message.seeds.items():
            seeds[peer][name] = share
        for peer, share in message.keys.items():
            roots[peer][name] = share
    first, second, *lost_sites = names[:5]
    lost_sites += liars
    removed = [
        site.self_mask(secret_of(roster, seeds[name]), said.header, name)
        for name in (first, second)
    ]
    of_liars = {liar: said.states["update"][liar].secrets for liar in liars}
    for name in lost_sites:
        known = of_liars.get(name)
        root = bytes.fromhex(known.mask) if known else secret_of(roster, roots[name])
        pair = KeyPair(root, post_quantum=False)
        for alive in (first, second):
            agreed = pair.agree(said.keys[alive].mask)
            removed.append(site.pair_mask(agreed, said.header, roster, alive, name))
    return read_sum(said.setting, [said.vectors[n][1] for n in (first, second)], removed)


def threshold_of(roster: Roster, threshold: int) -> Roster:
    """A roster that no site would read: its threshold is whatever the attacker wants."""
    return Roster.model_construct(sites=roster.sites, threshold=threshold)


def test_sites_that_are_told_other_survivors_reveal_nothing() -> None:
    said = record(7)
    assert refused(lambda: split_views(said, without_consistency=False)) == "threshold"


def test_without_the_consistency_step_a_sum_of_too_few_sites_opens() -> None:
    """Two honest sites' sum; with t = 5 and two liars, at least three are promised."""
    said = record(7)
    found = split_views(said, without_consistency=True)
    assert torch.equal(found, total(said.values, ["site-001", "site-002"]))


# --- thresholds --------------------------------------------------------------------------------


def read_with_one_share(said: Record, victim: str, liar: str) -> Tensor:
    """A single site's shares of the victim's secrets, before anything is opened."""
    received = said.states["update"][liar].received[victim]
    at = said.setting.roster.index(liar)
    seed = combine({at: bytes.fromhex(received.seed)})
    root = combine({at: bytes.fromhex(received.mask)})
    found = masks_of(said.header, said.setting, victim, seed, root, said.keys)
    return read_sum(said.setting, [said.vectors[victim][1]], found)


def test_one_share_reads_nothing() -> None:
    said = record(4)
    assert refused(lambda: read_with_one_share(said, "site-001", "site-004")) == "share"


def test_with_threshold_one_a_share_reads_a_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Header, "with_model", with_any_model)
    monkeypatch.setattr(site, "SiteState", SiteState.model_construct)
    sites = draw_sites(4)
    setting = new_setting(sites, whole_numbers(4))
    roster = threshold_of(setting.roster, 1)
    changes = {"threshold": 1, "least_survivors": 1, "roster": roster.sha256}
    header = Header.model_construct(**{**dict(setting.header), **changes})
    low = replace(setting, roster=roster, header=header)
    said = continue_record(sites, low)
    found = read_with_one_share(said, "site-001", "site-004")
    assert torch.equal(found, said.values["site-001"]["x"])


def with_any_model(header: Header, model_sha256: str) -> Header:
    """`Header.with_model` without the header's own rules."""
    return header.model_copy(update={"model": model_sha256})


@pytest.mark.parametrize("threshold", [-1, 0, 1, 2, 5])
def test_no_roster_has_another_threshold(threshold: int) -> None:
    roster = new_setting(draw_sites(4), whole_numbers(4)).roster
    with pytest.raises(ValidationError, match="threshold"):
        Roster(sites=roster.sites, threshold=threshold)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"threshold": 4}, "foreign"),
        ({"threshold": 1}, "foreign"),
        ({"least_survivors": 1}, "threshold"),
        ({"least_survivors": 2}, "threshold"),
        ({"roster": "b" * 64}, "foreign"),
    ],
)
def test_the_server_sets_no_threshold(
    four: tuple[dict[str, RehearsalSite], Setting], changes: dict[str, object], fault: Fault
) -> None:
    sites, setting = four
    lower = replace(setting, header=setting.header.model_copy(update=changes))
    assert refused(lambda: sites["site-001"].keys(lower)) == fault


def test_peers_with_another_threshold_are_foreign(
    four: tuple[dict[str, RehearsalSite], Setting],
) -> None:
    sites, setting = four
    everybody = Roster(sites=setting.roster.sites, threshold=4)
    changes = {"threshold": 4, "least_survivors": 4, "roster": everybody.sha256}
    higher = replace(setting, roster=everybody, header=setting.header.model_copy(update=changes))
    keys = [one.keys(setting) for one in sites.values()]
    keys[-1] = sites["site-004"].keys(higher)
    assert refused(lambda: sites["site-001"].shares(setting.model_sha256, keys)) == "foreign"


# --- fewer than three sites --------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2])
def test_fewer_than_three_sites_are_no_federation(count: int) -> None:
    roster = new_setting(draw_sites(3), whole_numbers(3)).roster
    sites = dict(list(roster.sites.items())[:count])
    with pytest.raises(ValidationError, match="sites"):
        Roster(sites=sites, threshold=count)


def test_of_two_sites_each_reads_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positive control: two sites, the sum opened by the book, and one of them curious."""
    monkeypatch.setattr(Header, "with_model", with_any_model)
    sites = dict(list(draw_sites(3).items())[:2])
    setting = new_setting(draw_sites(3), whole_numbers(2))
    keys = {name: one.identity.public_key for name, one in sites.items()}
    roster = Roster.model_construct(sites=keys, threshold=2)
    changes = {"roster": roster.sha256, "threshold": 2, "least_survivors": 2}
    header = Header.model_construct(**{**dict(setting.header), **changes})
    pair = Setting(roster, header, setting.encoding, dict.fromkeys(sites, 1), "a" * 64)
    values = draw_values(pair)
    opened = rehearse(pair, sites, values, {})
    other = opened.sums["x"] - values["site-001"]["x"]
    assert torch.equal(other, values["site-002"]["x"])


# --- signatures and replay ---------------------------------------------------------------------

CONSUMERS: dict[str, Step] = {
    "server, keys": "keys",
    "site, keys": "keys",
    "server, shares": "shares",
    "server, update": "update",
    "server, consistency": "consistency",
    "site, consistency": "consistency",
    "server, unmask": "unmask",
}
SENDER = "site-002"
RECEIVER = "site-001"


def messages_of(said: Record, step: Step) -> Mapping[str, Signed]:
    vectors = {name: message for name, (message, _) in said.vectors.items()}
    found: dict[Step, Mapping[str, Signed]] = {
        "keys": said.keys,
        "shares": said.shares,
        "update": vectors,
        "consistency": said.confirmations,
        "unmask": said.unmaskings,
    }
    return found[step]


def take(said: Record, consumer: str, forged: Signed, content: bytes = b"") -> Fault | None:
    """Give ``forged`` to a site or to the server among honest messages; return its fault."""
    step = CONSUMERS[consumer]
    given = list({**messages_of(said, step), SENDER: forged}.values())
    server, one = said.server(before=step), said.sites[RECEIVER]
    model, before = (
        said.setting.model_sha256,
        said.states["keys" if step == "keys" else "consistency"],
    )
    actions: dict[str, Callable[..., object]] = {
        "server, keys": lambda given: server.keys(given, model),
        "site, keys": lambda given: share_secrets(before[RECEIVER], one.identity, model, given),
        "server, shares": server.shares,
        "server, update": lambda _: server.vector(*with_vector(said, forged, content)),
        "server, consistency": server.confirmations,
        "site, consistency": lambda given: reveal_shares(before[RECEIVER], one.identity, given),
        "server, unmask": server.open,
    }
    try:
        actions[consumer](given)
    except ProtocolError as error:
        return error.fault
    return server.losses[SENDER].fault if SENDER in server.losses else None


def with_vector(said: Record, message: Signed, content: bytes) -> tuple[Vector, bytes]:
    assert isinstance(message, Vector)
    return message, content or bytes(said.vectors[SENDER][1])


@pytest.fixture(scope="module")
def said() -> Record:
    return record(4)


def altered(said: Record, step: Step) -> Signed:
    """The sender's message with another content under the old signature."""
    message = messages_of(said, step)[SENDER]
    first = said.setting.roster.names[0]
    changes: dict[Step, dict[str, object]] = {
        "keys": {"commitment": "d" * 64},
        "shares": {"sealed": {**said.shares[SENDER].sealed, first: "00" * 160}},
        "update": {"blake3": "d" * 64},
        "consistency": {"survivors": said.survivors[:3]},
        "unmask": {"seeds": {**said.unmaskings[SENDER].seeds, first: "00" * SHARE_BYTES}},
    }
    return message.model_copy(update=changes[step])


def forgeries(said: Record, step: Step) -> dict[str, Signed]:
    message = messages_of(said, step)[SENDER]
    other_step = STEPS[STEPS.index(step) - 1]
    others = {
        "missing": UNSIGNED,
        "of another site": message.signed(said.sites["site-003"].identity).signature,
        "of another step": messages_of(said, other_step)[SENDER].signature,
        "of another header": message.model_copy(update={"header": "b" * 64})
        .signed(said.sites[SENDER].identity)
        .signature,
        "of the key of nobody": message.signed(Puppet.draw(SENDER).identity).signature,
    }
    copies = {name: message.model_copy(update={"signature": s}) for name, s in others.items()}
    return {**copies, "of another content": altered(said, step)}


FORGED = [
    "missing",
    "of another site",
    "of another step",
    "of another header",
    "of the key of nobody",
]


@pytest.mark.parametrize("forgery", [*FORGED, "of another content"])
@pytest.mark.parametrize("consumer", CONSUMERS)
def test_a_signature_is_checked(said: Record, consumer: str, forgery: str) -> None:
    assert take(said, consumer, messages_of(said, CONSUMERS[consumer])[SENDER]) is None
    assert take(said, consumer, forgeries(said, CONSUMERS[consumer])[forgery]) == "signature"


@pytest.mark.parametrize("forgery", FORGED)
@pytest.mark.parametrize("consumer", CONSUMERS)
def test_without_the_check_a_forged_message_counts(
    said: Record, monkeypatch: pytest.MonkeyPatch, consumer: str, forgery: str
) -> None:
    monkeypatch.setattr(messages, "verify_signature", lambda *_: None)
    assert take(said, consumer, forgeries(said, CONSUMERS[consumer])[forgery]) is None


@pytest.fixture(scope="module")
def again(said: Record) -> Record:
    """The second attempt of the same sites."""
    return continue_record(said.sites, new_setting(said.sites, whole_numbers(4), attempt=2))


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_a_message_of_the_attempt_before_is_refused(
    said: Record, again: Record, consumer: str
) -> None:
    step = CONSUMERS[consumer]
    fault = take(again, consumer, messages_of(said, step)[SENDER], bytes(said.vectors[SENDER][1]))
    assert fault == ("foreign" if step == "keys" else "model")


@pytest.mark.parametrize("consumer", [name for name in CONSUMERS if name != "server, unmask"])
def test_with_one_header_for_all_attempts_a_replay_counts(
    monkeypatch: pytest.MonkeyPatch, consumer: str
) -> None:
    """But for revealed shares, which fit no other attempt's secrets."""
    monkeypatch.setattr(Header, "digest", lambda _: "0" * 64)
    said = record(4)
    again = continue_record(said.sites, new_setting(said.sites, whole_numbers(4), attempt=2))
    old = messages_of(said, CONSUMERS[consumer])[SENDER]
    assert take(again, consumer, old, bytes(said.vectors[SENDER][1])) is None


def test_boxes_of_the_attempt_before_stay_closed(said: Record, again: Record) -> None:
    header = again.header.digest()
    state = again.states["shares"][RECEIVER]
    old, renamed = deliver(said.shares, RECEIVER), deliver(said.shares, RECEIVER, header)
    assert refused(lambda: accept_shares(state, old)) == "model"
    assert refused(lambda: accept_shares(state, renamed)) == "share"


@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize("field", ["job", "phase", "round"])
def test_a_message_of_another_round_is_refused(said: Record, consumer: str, field: str) -> None:
    other = {"job": "b" * 64, "phase": "evaluate", "round": 2}[field]
    session = said.setting.header.session.model_copy(update={field: other})
    header = said.setting.header.model_copy(update={"session": session})
    step = CONSUMERS[consumer]
    digest = (header if step == "keys" else header.with_model(said.setting.model_sha256)).digest()
    message = messages_of(said, step)[SENDER].model_copy(update={"header": digest})
    fault = take(said, consumer, message.signed(said.sites[SENDER].identity))
    assert fault == ("foreign" if step == "keys" else "model")


def difference_of_attempts(
    monkeypatch: pytest.MonkeyPatch, same_secrets: bool, bound: bool
) -> bool:
    """Whether two masked vectors of one site give away the difference of its two updates."""
    if same_secrets:
        drawn = cycle([Secrets.draw() for _ in range(4)])
        monkeypatch.setattr(Secrets, "draw", lambda: next(drawn))
    if not bound:
        digest = Header.digest
        monkeypatch.setattr(Header, "digest", lambda one: digest(first_attempt(one)))
    first = record(4, size=16)
    setting = new_setting(first.sites, whole_numbers(4, 16), attempt=2)
    second = continue_record(first.sites, setting)
    one, other = first.vectors[RECEIVER][1], second.vectors[RECEIVER][1]
    found = read_sum(setting, [one], []) - read_sum(setting, [other], [])
    exact = first.values[RECEIVER]["x"] - second.values[RECEIVER]["x"]
    return torch.equal(found % 2**32, exact % 2**32)


def first_attempt(header: Header) -> Header:
    session = header.session.model_copy(update={"attempt": 1})
    return header.model_copy(update={"session": session})


@pytest.mark.parametrize(
    ("same_secrets", "bound", "leaks"),
    [(False, True, False), (True, True, False), (False, False, False), (True, False, True)],
)
def test_masks_serve_one_attempt(
    monkeypatch: pytest.MonkeyPatch, same_secrets: bool, bound: bool, leaks: bool
) -> None:
    """Fresh secrets and the header in each derivation; only without both are masks used twice."""
    assert difference_of_attempts(monkeypatch, same_secrets, bound) == leaks


# --- two models --------------------------------------------------------------------------------


def two_models(victim: str, lie: bool = False) -> Tensor:
    """Give all but the victim a dead model, whose updates are zero, and open the sum."""
    sites = draw_sites(4)
    setting = new_setting(sites, whole_numbers(4))
    models = {name: ("a" if name == victim else "d") * 64 for name in sites}
    values = draw_values(setting)
    for name in sites.keys() - {victim}:
        values[name]["x"].zero_()
    keys = [one.keys(setting) for one in sites.values()]
    shares = {name: one.shares(models[name], keys) for name, one in sites.items()}
    vectors = {}
    for name, one in sites.items():
        claimed = one.state.header.digest() if lie else None
        vectors[name] = one.vector(setting, values[name], deliver(shares, name, claimed))
    server = Aggregation(setting.roster, setting.header, setting.encoding, setting.weights)
    server.keys(keys, models[victim])
    server.shares(shares.values())
    for message, content in vectors.values():
        server.vector(message, content)
    survivors = server.vectors_complete()
    signed = server.confirmations([one.confirmation(survivors) for one in sites.values()])
    opened = server.open([one.unmasking(signed) for one in sites.values()])
    assert not torch.equal(values[victim]["x"], torch.zeros(6, dtype=torch.int64))
    return opened.sums["x"] - values[victim]["x"]


@pytest.mark.parametrize(("lie", "fault"), [(False, "model"), (True, "share")])
def test_sites_with_another_model_go_no_further(lie: bool, fault: Fault) -> None:
    assert refused(lambda: two_models("site-003", lie)) == fault


def test_without_the_model_in_the_header_a_dead_model_reads_an_update(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_model = Header.with_model
    monkeypatch.setattr(Header, "with_model", lambda header, _: with_model(header, "0" * 64))
    assert not two_models("site-003").any()


# --- shares that are not what they should be ---------------------------------------------------


def unmask_with(said: Record, changes: Mapping[str, Mapping[str, object]]) -> Tensor:
    """Open with the messages of some sites changed, and signed by them."""
    server, answers = said.server(before="unmask"), []
    for name, message in said.unmaskings.items():
        lied = message.model_copy(update=changes.get(name, {}))
        answers.append(lied.signed(said.sites[name].identity))
    return server.open(answers).sums["x"]


@pytest.fixture(scope="module")
def short() -> Record:
    """Four sites, of which the last is lost after its vector: all three answers are needed."""
    return record(4, lost=[4])


WRONG_SHARES: dict[str, Callable[[Unmasking], dict[str, object]]] = {
    "a seed's": lambda m: {"seeds": {**m.seeds, RECEIVER: one_more(m.seeds[RECEIVER])}},
    "a mask key's": lambda m: {"keys": {"site-004": one_more(m.keys["site-004"])}},
    "a seed's of another": lambda m: {"seeds": {**m.seeds, RECEIVER: m.seeds[SENDER]}},
    "too large": lambda m: {"seeds": {**m.seeds, RECEIVER: "ff" * SHARE_BYTES}},
    "a seed's missing": lambda m: {"seeds": {SENDER: m.seeds[SENDER]}},
    "a mask key's missing": lambda m: {"keys": {}},
    "exchanged": lambda m: {"seeds": {**m.seeds, "site-004": m.keys["site-004"]}, "keys": {}},
}


def one_more(share: str) -> str:
    return f"{int(share, 16) + 1:0{len(share)}x}"


@pytest.mark.parametrize("case", WRONG_SHARES)
def test_a_wrong_share_opens_nothing(short: Record, case: str) -> None:
    changes = {SENDER: WRONG_SHARES[case](short.unmaskings[SENDER])}
    assert refused(lambda: unmask_with(short, changes)) == "share"
    assert torch.equal(unmask_with(short, {}), total(short.values, short.survivors))


def test_a_share_that_is_cut_is_malformed(short: Record) -> None:
    message = short.unmaskings[SENDER]
    text = message.encode().replace(message.seeds[RECEIVER], message.seeds[RECEIVER][:-2])
    assert refused(lambda: Unmasking.decode(text)) == "malformed"


def open_with_a_wrong_share() -> tuple[Tensor, Tensor]:
    """Return the sum of real numbers that opens after one site lied, and the right one."""
    sites = draw_sites(3)
    setting = new_setting(sites, Encoding((Segment("x", (6,), 1.0),), 32, 3))
    said = continue_record(sites, setting)
    changes = {SENDER: WRONG_SHARES["a seed's"](said.unmaskings[SENDER])}
    return unmask_with(said, changes), total(said.values, said.survivors)


def test_the_commitment_finds_a_wrong_share() -> None:
    assert refused(open_with_a_wrong_share) == "share"


def test_without_the_commitment_a_wrong_share_makes_a_wrong_sum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And nobody notices: of real numbers every word is possible."""
    monkeypatch.setattr(server, "commitment", lambda _: mock.ANY)
    found, exact = open_with_a_wrong_share()
    assert ((found - exact).abs() > 0.01).any()


# --- vectors: replaced, or late ----------------------------------------------------------------


def open_with_a_replaced_vector(said: Record) -> Tensor:
    """Somebody between site and server exchanges a vector."""
    server = said.server(before="update")
    for name, (message, content) in said.vectors.items():
        server.vector(message, bytes(len(content)) if name == SENDER else content)
    server.vectors_complete()
    server.confirmations(said.confirmations.values())
    return server.open(said.unmaskings.values()).sums["x"]


def test_a_replaced_vector_is_refused(said: Record) -> None:
    assert refused(lambda: open_with_a_replaced_vector(said)) == "vector"


def test_without_its_digest_a_replaced_vector_makes_a_wrong_sum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "vector_digest", lambda _: mock.ANY)
    sites = draw_sites(3)
    setting = new_setting(sites, Encoding((Segment("x", (6,), 1.0),), 32, 3))
    said = continue_record(sites, setting)
    exact = total(said.values, said.survivors)
    assert ((open_with_a_replaced_vector(said) - exact).abs() > 0.01).any()


def read_late_vector(said: Record, late: str) -> Tensor:
    """Keep a vector back until its site's mask key is out, and take the pairs' masks off."""
    shares = {name: message.keys[late] for name, message in said.unmaskings.items()}
    root = secret_of(said.setting.roster, shares)
    found = masks_of(said.header, said.setting, late, bytes(32), root, said.keys)
    return read_sum(said.setting, [said.vectors[late][1]], found[1:])


def test_a_late_vector_is_refused(short: Record) -> None:
    server = short.server(before="unmask")
    server.open(short.unmaskings.values())
    assert refused(lambda: server.vector(*short.vectors["site-004"])) == "order"


def test_a_late_vector_keeps_its_own_mask() -> None:
    said = record(4, lost=[4], size=SAMPLES)
    assert uniform(read_late_vector(said, "site-004"))


def test_without_a_mask_of_its_own_a_late_vector_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "masks", lambda state: masks(state)[1:])
    said = record(4, lost=[4])
    late = read_late_vector(said, "site-004")
    assert torch.equal(late, said.values["site-004"]["x"])


# --- coalitions --------------------------------------------------------------------------------

SAMPLES = 1 << 16


def uniform(words: Tensor) -> bool:
    """Chi-square of each byte of the words, and of the differences of neighbours."""
    raw = (words + 100).numpy().astype(np.uint32)
    found = []
    for one in (raw, np.diff(raw)):
        for column in one.view(np.uint8).reshape(-1, 4).T:
            found.append(stats.chisquare(np.bincount(column, minlength=256)).pvalue)
    return bool(min(found) > CHANCE / len(found))


def coalition_view(said: Record, members: Collection[str], victim: str) -> Tensor:
    """The victim's vector without every mask that ``members`` and the server know together.

    Before unmasking: they have their own secrets and the shares that the victim gave them.
    """
    roster, state = said.setting.roster, said.states["update"]
    shares = {name: state[name].received[victim] for name in members}
    try:
        seed = secret_of(roster, {name: one.seed for name, one in shares.items()})
        root = secret_of(roster, {name: one.mask for name, one in shares.items()})
    except ProtocolError:
        seed = root = bytes(32)
    known = []
    if commitment(seed) == said.keys[victim].commitment:
        known = masks_of(said.header, said.setting, victim, seed, root, said.keys)
    else:
        for name in members:
            secrets = state[name].secrets
            assert secrets is not None
            pair = KeyPair(bytes.fromhex(secrets.mask), post_quantum=False)
            agreed = pair.agree(said.keys[victim].mask)
            known.append(site.pair_mask(agreed, said.header, roster, victim, name))
    return read_sum(said.setting, [said.vectors[victim][1]], known)


@pytest.fixture(scope="module")
def seven() -> Record:
    return record(7, size=SAMPLES)


def test_one_site_less_than_the_threshold_sees_uniform_words(seven: Record) -> None:
    """Of 7 sites, 4 and the server: the words say nothing, be they all the same or random."""
    members = sorted(seven.sites)[3:]
    assert len(members) == seven.setting.roster.threshold - 1
    assert uniform(coalition_view(seven, members, "site-001"))


def test_the_threshold_reads_a_vector(seven: Record) -> None:
    """Positive control: 5 of 7 sites and the server, with another honest site beside."""
    members = sorted(seven.sites)[2:]
    found = coalition_view(seven, members, "site-001")
    assert torch.equal(found, seven.values["site-001"]["x"])
    assert not uniform(found)


def test_what_is_left_after_known_masks_does_not_depend_on_the_values(seven: Record) -> None:
    """Positive control of the statistic: one mask short of none is uniform, none is not."""
    values = seven.values["site-001"]["x"]
    assert not uniform(values)
    assert not uniform(torch.zeros(SAMPLES, dtype=torch.int64))
    seed = seven.states["update"]["site-001"].secrets
    assert seed is not None
    own = site.self_mask(bytes.fromhex(seed.seed), seven.header, "site-001")
    whole = [mask for mask in masks(seven.states["update"]["site-001"]) if mask.key != own.key]
    assert uniform(read_sum(seven.setting, [seven.vectors["site-001"][1]], whole))


# --- the bound on sites that lie ---------------------------------------------------------------


class SplitViews:
    """An honest site is shown one set of survivors, or none; liars sign and reveal everything."""

    def __init__(self, count: int, liars: int) -> None:
        self.said = record(count)
        names = self.said.setting.roster.names
        self.honest, self.liars = names[: count - liars], names[count - liars :]
        self.threshold = self.said.setting.roster.threshold
        self._answers: dict[tuple[str, tuple[str, ...], tuple[str, ...]], Unmasking | None] = {}

    def sets(self) -> list[tuple[str, ...]]:
        names = self.said.setting.roster.names
        sizes = range(self.threshold, len(names) + 1)
        return [chosen for size in sizes for chosen in combinations(names, size)]

    def schedules(self) -> Iterator[dict[str, tuple[str, ...]]]:
        """Yield every way to show sets of survivors to the honest sites."""
        choices: list[list[tuple[str, ...]]] = [
            [(), *[chosen for chosen in self.sets() if name in chosen]] for name in self.honest
        ]
        for shown in product(*choices):
            yield {name: one for name, one in zip(self.honest, shown, strict=True) if one}

    def _confirmed(self, name: str, chosen: tuple[str, ...]) -> tuple[SiteState, Confirmation]:
        state, identity = self.said.states["update"][name], self.said.sites[name].identity
        return confirm_survivors(state, identity, chosen)

    def _answer(
        self, name: str, chosen: tuple[str, ...], signers: tuple[str, ...]
    ) -> Unmasking | None:
        """What an honest site reveals, given these signatures; None when it refuses."""
        place = (name, chosen, signers)
        if place not in self._answers:
            state, _ = self._confirmed(name, chosen)
            signed = [self._confirmed(signer, chosen)[1] for signer in signers]
            try:
                answer = reveal_shares(state, self.said.sites[name].identity, signed)[1]
                self._answers[place] = answer
            except ProtocolError:
                self._answers[place] = None
        return self._answers[place]

    def shares(
        self, victim: str, shown: Mapping[str, tuple[str, ...]]
    ) -> tuple[dict[str, str], dict[str, str]]:
        """Return the shares of the victim's seed and of its mask key that come out."""
        states = self.said.states["update"]
        seeds = {name: states[name].received[victim].seed for name in self.liars}
        roots = {name: states[name].received[victim].mask for name in self.liars}
        for name, chosen in shown.items():
            signers = [one for one in self.honest if shown.get(one) == chosen]
            signers += [liar for liar in self.liars if liar in chosen]
            answer = self._answer(name, chosen, tuple(signers))
            if answer is None:
                continue
            if victim in answer.seeds:
                seeds[name] = answer.seeds[victim]
            if victim in answer.keys:
                roots[name] = answer.keys[victim]
        return seeds, roots

    def readable(self) -> Iterator[tuple[str, dict[str, str], dict[str, str]]]:
        """Yield honest sites of which some schedule gives away both secrets."""
        for shown in self.schedules():
            for victim in self.honest:
                seeds, roots = self.shares(victim, shown)
                if min(len(seeds), len(roots)) >= self.threshold:
                    yield victim, seeds, roots


@pytest.mark.parametrize(("count", "liars"), [(3, 2), (4, 0), (4, 1), (5, 1), (5, 2), (6, 3)])
def test_up_to_the_bound_no_schedule_gives_away_both_secrets(count: int, liars: int) -> None:
    """Every way to show survivors to the honest sites, while 2 t - n - 1 sites lie, or fewer."""
    views = SplitViews(count, liars)
    assert liars <= 2 * views.threshold - count - 1
    assert sum(1 for _ in views.schedules()) >= 2
    assert not list(views.readable())


@pytest.mark.parametrize(("count", "liars"), [(4, 2), (5, 3), (6, 4)])
def test_above_the_bound_a_vector_is_read(count: int, liars: int) -> None:
    """Positive control: with one liar more, some schedule does, and the vector is read."""
    views = SplitViews(count, liars)
    assert liars == 2 * views.threshold - count
    victim, seeds, roots = next(views.readable())
    said, roster = views.said, views.said.setting.roster
    seed, root = secret_of(roster, seeds), secret_of(roster, roots)
    found = masks_of(said.header, said.setting, victim, seed, root, said.keys)
    vector = said.vectors[victim][1]
    assert torch.equal(read_sum(said.setting, [vector], found), said.values[victim]["x"])


@pytest.mark.parametrize("count", range(3, 101))
def test_the_bound_by_counting(count: int) -> None:
    """Two sets need t revealing sites each; an honest site serves one of them."""
    threshold = least_threshold(count)
    for liars in range(count):
        honest = count - liars
        first = max(threshold - liars, 0)
        assert (2 * first <= honest) == (liars >= 2 * threshold - count)
