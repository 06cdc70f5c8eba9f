"""Attempts of the secure sum with all that was said in them, and tools of whoever attacks them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedcmr_shared.secagg.agreement import KeyPair
from fedcmr_shared.secagg.encoding import Encoding, Segment
from fedcmr_shared.secagg.masking import Mask, MaskedSum
from fedcmr_shared.secagg.messages import (
    Confirmation,
    Delivery,
    Keys,
    Shares,
    Step,
    Unmasking,
    Vector,
)
from fedcmr_shared.secagg.server import Aggregation
from fedcmr_shared.secagg.session import Header
from fedcmr_shared.secagg.site import SiteState, pair_mask, self_mask
from fedcmr_simulations.rehearsal import RehearsalSite, Setting, draw_sites, new_setting

BOUND = 100
Values = Mapping[str, Mapping[str, Tensor]]


def whole_numbers(sites: int, size: int = 6, word_bits: int = 32) -> Encoding:
    return Encoding((Segment("x", (size,), BOUND, integer=True),), word_bits, sites)


def draw_values(setting: Setting) -> dict[str, dict[str, Tensor]]:
    """Random values within the bounds, by site."""

    def draw(segment: Segment) -> Tensor:
        if segment.integer:
            bound = int(segment.bound)
            return torch.randint(-bound, bound + 1, segment.shape)
        return (2 * torch.rand(segment.shape) - 1) * segment.bound

    return {
        site: {segment.name: draw(segment) for segment in setting.encoding.segments}
        for site in setting.roster.names
    }


@dataclass(frozen=True)
class Record:
    """One attempt without lies; ``states`` are those after each step, messages are by sender."""

    setting: Setting
    sites: Mapping[str, RehearsalSite]
    values: Values
    states: Mapping[Step, Mapping[str, SiteState]]
    keys: Mapping[str, Keys]
    shares: Mapping[str, Shares]
    deliveries: Mapping[str, tuple[Delivery, ...]]
    vectors: Mapping[str, tuple[Vector, bytearray]]
    survivors: tuple[str, ...]
    confirmations: Mapping[str, Confirmation]
    unmaskings: Mapping[str, Unmasking]

    @property
    def header(self) -> Header:
        """The header from `shares` on."""
        return self.setting.header.with_model(self.setting.model_sha256)

    def server(self, before: Step) -> Aggregation:
        """Return a server to which ``before`` comes next."""
        setting = self.setting
        server = Aggregation(setting.roster, setting.header, setting.encoding, setting.weights)
        if before == "keys":
            return server
        server.keys(self.keys.values(), setting.model_sha256)
        if before == "shares":
            return server
        server.shares(self.shares.values())
        if before == "update":
            return server
        for name in self.survivors:
            server.vector(*self.vectors[name])
        server.vectors_complete()
        if before == "unmask":
            server.confirmations(self.confirmations.values())
        return server


def record(
    count: int, *, lost: Collection[int] = (), size: int = 6, post_quantum: bool = False
) -> Record:
    """Run an attempt of ``count`` sites; the vectors of the sites numbered ``lost`` are lost."""
    sites = draw_sites(count)
    setting = new_setting(sites, whole_numbers(count, size), post_quantum=post_quantum)
    return continue_record(sites, setting, lost)


def continue_record(
    sites: Mapping[str, RehearsalSite], setting: Setting, lost: Collection[int] = ()
) -> Record:
    states: dict[Step, dict[str, SiteState]] = {}

    def remember(step: Step) -> None:
        states[step] = {name: site.state for name, site in sites.items()}

    values = draw_values(setting)
    server = Aggregation(setting.roster, setting.header, setting.encoding, setting.weights)
    keys = {name: site.keys(setting) for name, site in sites.items()}
    remember("keys")
    accepted = server.keys(keys.values(), setting.model_sha256)
    shares = {name: site.shares(setting.model_sha256, accepted) for name, site in sites.items()}
    remember("shares")
    deliveries = server.shares(shares.values())
    vectors = {n: s.vector(setting, values[n], deliveries[n]) for n, s in sites.items()}
    remember("update")
    survivors = tuple(name for at, name in enumerate(sorted(sites), 1) if at not in lost)
    confirmations = {name: sites[name].confirmation(survivors) for name in survivors}
    remember("consistency")
    unmaskings = {name: sites[name].unmasking(confirmations.values()) for name in survivors}
    remember("unmask")
    return Record(
        setting,
        sites,
        values,
        states,
        keys,
        shares,
        deliveries,
        vectors,
        survivors,
        confirmations,
        unmaskings,
    )


def total(values: Values, sites: Collection[str]) -> Tensor:
    return torch.stack([values[site]["x"] for site in sites]).sum(0)


def read_sum(setting: Setting, vectors: Collection[bytearray], masks: Collection[Mask]) -> Tensor:
    """What ``vectors`` add up to without ``masks``: whole numbers, and nonsense if a mask is left.

    Read by hand, since `MaskedSum.decode` refuses nonsense.
    """
    summed = MaskedSum(setting.encoding)
    for vector in vectors:
        summed.add(vector)
    summed.remove(tuple(masks))
    words = torch.from_numpy(summed._words.astype("int64"))
    return words - len(vectors) * BOUND


def masks_of(
    header: Header,
    setting: Setting,
    victim: str,
    seed: bytes,
    root: bytes,
    keys: Mapping[str, Keys],
) -> list[Mask]:
    """All masks of the vector of ``victim``, by whoever has its two secrets."""
    pair = KeyPair(root, post_quantum=False)
    return [self_mask(seed, header, victim)] + [
        pair_mask(pair.agree(keys[peer].mask), header, setting.roster, victim, peer)
        for peer in sorted(keys)
        if peer != victim
    ]


def deliver(
    shares: Mapping[str, Shares], receiver: str, header: str | None = None
) -> tuple[Delivery, ...]:
    """Pass on the shares for ``receiver`` as they are, or under another header."""
    return tuple(
        Delivery(
            sender=sender,
            header=header or message.header,
            sealed=message.sealed[receiver],
            pair=message.pairs.get(receiver),
        )
        for sender, message in sorted(shares.items())
        if sender != receiver
    )
