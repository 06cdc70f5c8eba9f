"""Secure sums rehearsed in memory: sites that follow the protocol, and messages that get lost.

There is no network, model or ledger here, only `fedcmr_shared.secagg`: a page on which a reviewer
can follow an attempt from the keys to the opened sum, and by which drop-outs of any kind are tried
in large numbers. Every message passes through its JSON, as between machines.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor

from fedcmr_shared.identity.keys import SiteKey
from fedcmr_shared.identity.roster import Roster, new_roster
from fedcmr_shared.secagg.encoding import Encoding
from fedcmr_shared.secagg.masking import masked_vector
from fedcmr_shared.secagg.messages import (
    STEPS,
    Confirmation,
    Delivery,
    Frozen,
    Keys,
    Shares,
    Step,
    Unmasking,
    Vector,
)
from fedcmr_shared.secagg.server import Aggregation, Opened
from fedcmr_shared.secagg.session import Header, Session
from fedcmr_shared.secagg.site import (
    SiteState,
    accept_shares,
    announce_vector,
    confirm_survivors,
    masks,
    offer_keys,
    reveal_shares,
    rounding_key,
    share_secrets,
)

Lost = Literal["question", "answer"]
Schedule = Mapping[tuple[str, Step], Lost]
"""What gets lost: the question to a site, which then does nothing, or the answer that it gave."""

_RATES: Final = (0.0, 0.02, 0.1, 0.3)

Message = TypeVar("Message", bound=Frozen)


@dataclass(frozen=True)
class Setting:
    """What is summed, and by whom; ``header`` is that of the key messages."""

    roster: Roster
    header: Header
    encoding: Encoding
    weights: Mapping[str, int]
    model_sha256: str


@dataclass
class RehearsalSite:
    """One site, with its state in memory where a hospital has a disk."""

    name: str
    identity: SiteKey
    state: SiteState = field(init=False, repr=False)

    def keys(self, setting: Setting) -> Keys:
        """Answer step `keys`."""
        self.state, message = offer_keys(self.name, self.identity, setting.roster, setting.header)
        return message

    def shares(self, model_sha256: str, keys: Collection[Keys]) -> Shares:
        """Answer step `shares`."""
        self.state, message = share_secrets(self.state, self.identity, model_sha256, tuple(keys))
        return message

    def vector(
        self, setting: Setting, values: Mapping[str, Tensor], deliveries: Collection[Delivery]
    ) -> tuple[Vector, bytearray]:
        """Answer step `update`."""
        self.state = accept_shares(self.state, tuple(deliveries))
        weight, keys = setting.weights[self.name], masks(self.state)
        vector = masked_vector(setting.encoding, values, weight, rounding_key(self.state), keys)
        return announce_vector(self.state, self.identity, vector), vector

    def confirmation(self, survivors: Collection[str]) -> Confirmation:
        """Answer step `consistency`."""
        self.state, message = confirm_survivors(self.state, self.identity, tuple(survivors))
        return message

    def unmasking(self, confirmations: Collection[Confirmation]) -> Unmasking:
        """Answer step `unmask`."""
        self.state, message = reveal_shares(self.state, self.identity, tuple(confirmations))
        return message


def draw_sites(count: int) -> dict[str, RehearsalSite]:
    """Return ``count`` sites with fresh keys, by name."""
    names = [f"site-{number:03d}" for number in range(1, count + 1)]
    return {name: RehearsalSite(name, SiteKey(Ed25519PrivateKey.generate())) for name in names}


def new_setting(
    sites: Mapping[str, RehearsalSite],
    encoding: Encoding,
    weights: Mapping[str, int] | None = None,
    *,
    attempt: int = 1,
    post_quantum: bool = False,
) -> Setting:
    """Return the setting of ``sites`` with the default threshold, and weights 1 unless given."""
    roster = new_roster({name: site.identity.public_key for name, site in sites.items()})
    header = Header(
        session=Session(job=_digest("job"), phase="train", round=1, attempt=attempt),
        roster=roster.sha256,
        threshold=roster.threshold,
        least_survivors=roster.threshold,
        encoding=encoding.sha256,
        post_quantum=post_quantum,
    )
    return Setting(roster, header, encoding, weights or dict.fromkeys(sites, 1), _digest("model"))


def rehearse(
    setting: Setting,
    sites: Mapping[str, RehearsalSite],
    values: Mapping[str, Mapping[str, Tensor]],
    schedule: Schedule,
) -> Opened:
    """Run one attempt to sum ``values`` (tensors by site), losing messages as ``schedule`` says.

    Raises:
        TooFewSites: the attempt ended.
    """
    server = Aggregation(setting.roster, setting.header, setting.encoding, setting.weights)

    def ask(step: Step, asked: Iterable[str], answer: Callable[[str], Message]) -> list[Message]:
        answers = []
        for name in asked:
            lost = schedule.get((name, step))
            if lost == "question":
                continue
            message = answer(name)
            if lost is None:
                answers.append(type(message).decode(message.encode()))
        return answers

    def vector(name: str) -> Vector:
        announced, content = sites[name].vector(setting, values[name], deliveries[name])
        vectors[name] = content
        return announced

    vectors: dict[str, bytearray] = {}
    keys = server.keys(
        ask("keys", sites, lambda name: sites[name].keys(setting)), setting.model_sha256
    )
    deliveries = server.shares(
        ask("shares", _sites(keys), lambda name: sites[name].shares(setting.model_sha256, keys))
    )
    for message in ask("update", deliveries, vector):
        server.vector(message, vectors.pop(message.site))
    survivors = server.vectors_complete()
    signed = server.confirmations(
        ask("consistency", survivors, lambda name: sites[name].confirmation(survivors))
    )
    return server.open(ask("unmask", _sites(signed), lambda name: sites[name].unmasking(signed)))


def foreseen(setting: Setting, schedule: Schedule) -> tuple[str, ...] | Step:
    """Return whose sum ``schedule`` leaves to open, or the step at which the attempt ends."""
    left = survivors = setting.roster.names
    for step in STEPS:
        left = tuple(name for name in left if (name, step) not in schedule)
        needed = setting.header.threshold
        if step == "update":
            survivors, needed = left, setting.header.least_survivors
        if len(left) < needed:
            return step
    return survivors


def random_schedule(names: Collection[str], source: random.Random) -> Schedule:
    """Draw a schedule: each message of a site is lost at a rate drawn for the whole attempt."""
    rate = source.choice(_RATES)
    places = [(name, step) for name in sorted(names) for step in STEPS]
    ways: tuple[Lost, ...] = ("question", "answer")
    return {place: source.choice(ways) for place in places if source.random() < rate}


def _digest(what: str) -> str:
    return hashlib.sha256(f"rehearsed {what}".encode()).hexdigest()


def _sites(messages: Iterable[Keys | Confirmation]) -> list[str]:
    return [message.site for message in messages]
