"""The server's side of the protocol: it passes messages on and opens one sum.

It needs no secret, and nothing here is trusted for privacy: the sites check what they get. A site
whose message is missing or wrong is lost for this attempt, and the losses say why. Steps::

    keys → shares → update (each vector as it arrives) → consistency → unmask → opened

With fewer than t sites at any step the attempt ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from torch import Tensor

from fedcmr_shared.errors import FederationError
from fedcmr_shared.identity.roster import Roster
from fedcmr_shared.secagg.agreement import KeyPair
from fedcmr_shared.secagg.encoding import Encoding
from fedcmr_shared.secagg.faults import Fault, ProtocolError
from fedcmr_shared.secagg.masking import Mask, MaskedSum
from fedcmr_shared.secagg.messages import (
    STEPS,
    Confirmation,
    Delivery,
    Keys,
    Shares,
    Signed,
    Step,
    Unmasking,
    Vector,
    vector_digest,
)
from fedcmr_shared.secagg.session import Header
from fedcmr_shared.secagg.shamir import combine
from fedcmr_shared.secagg.site import (
    check_complete,
    check_distinct,
    commitment,
    pair_mask,
    pair_part,
    self_mask,
)

Message = TypeVar("Message", bound=Signed)
T = TypeVar("T")

SILENT: Final = "no answer in time"


@dataclass(frozen=True)
class Loss:
    """A site that an attempt goes on without, from ``step`` on."""

    site: str
    step: Step
    fault: Fault
    reason: str


class TooFewSites(ProtocolError):
    """The attempt ended: fewer than t sites answered ``step``."""

    def __init__(self, step: Step, left: int, threshold: int) -> None:
        message = f"{left} sites answered step {step}; {threshold} are needed"
        super().__init__("threshold", message)
        self.step = step


@dataclass(frozen=True)
class Opened:
    """Weighted sums over ``survivors``, whose weights add up to ``weight``."""

    sums: Mapping[str, Tensor]
    survivors: tuple[str, ...]
    weight: int


class Aggregation:
    """One attempt to open one sum; a step's method is called once, in the order of the steps.

    ``weights`` are the public weights of all sites of the roster. The methods take what the sites
    answered and return what is sent to them next; each raises `TooFewSites` when the attempt is
    over, and ProtocolError when another step is due.
    """

    def __init__(
        self, roster: Roster, header: Header, encoding: Encoding, weights: Mapping[str, int]
    ) -> None:
        self._roster = roster
        self._header = header
        self._weights = weights
        self._due: Step | None = "keys"
        self._keys: dict[str, Keys] = {}
        self._shares: dict[str, Shares] = {}
        self._survivors: tuple[str, ...] = ()
        self._sum = MaskedSum(encoding)
        self.losses: dict[str, Loss] = {}

    @property
    def taking_part(self) -> tuple[str, ...]:
        """Sites that answered the last step, sorted."""
        if self._survivors:
            return self._survivors
        return tuple(sorted(self._shares or self._keys))

    def keys(self, answers: Iterable[Keys], model_sha256: str) -> tuple[Keys, ...]:
        """Take the sites' keys; return those of all, which go to each with the model's hash."""
        self._begin("keys")
        found: dict[str, Keys] = {}
        for message in answers:
            try:
                message.verify(self._roster, self._header)
                check_complete(message, self._header)
                check_distinct([*found.values(), message])
            except ProtocolError as error:
                self._lose(message.site, "keys", error)
            else:
                found[message.site] = message
        self._keys = self._enough("keys", found, self._roster.names)
        self._header = self._header.with_model(model_sha256)
        return tuple(self._keys[site] for site in sorted(self._keys))

    def shares(self, answers: Iterable[Shares]) -> dict[str, tuple[Delivery, ...]]:
        """Take the sealed shares; return what each site gets of the others'."""
        self._begin("shares")
        found = self._verified("shares", answers, self._keys)
        for site in list(found):
            others = set(self._keys) - {site}
            if (set(found[site].sealed), set(found[site].pairs)) != (others, self._above(site)):
                reason = "its shares are not for all the others"
                self._lose(site, "shares", ProtocolError("share", reason))
                del found[site]
        self._shares = self._enough("shares", found, self._keys)
        return {site: self._deliveries(site) for site in sorted(self._shares)}

    def vector(self, message: Vector, content: bytes | bytearray | memoryview) -> None:
        """Add one site's masked vector to the sum as soon as it arrives.

        Raises:
            ProtocolError: it is late, doubled, unsigned, not the announced one or of wrong length;
                the sum is as before.
        """
        if self._due != "update":
            raise ProtocolError("order", f"a vector of {message.site} came out of its step")
        if message.site not in self._shares or message.site in self._survivors:
            raise ProtocolError("roster", f"a vector of {message.site} is not expected")
        message.verify(self._roster, self._header)
        if vector_digest(content) != message.blake3:
            raise ProtocolError("vector", f"the vector of {message.site} is not the signed one")
        try:
            self._sum.add(content)
        except FederationError as error:
            raise ProtocolError("vector", f"site {message.site}: {error}") from error
        self._survivors = tuple(sorted((*self._survivors, message.site)))

    def vectors_complete(self) -> tuple[str, ...]:
        """Return the survivors, which go to each of them."""
        self._begin("update")
        found = dict.fromkeys(self._survivors)
        self._enough("update", found, self._shares)
        if len(found) < self._header.least_survivors:
            self._due = None
            raise TooFewSites("update", len(found), self._header.least_survivors)
        return self._survivors

    def confirmations(self, answers: Iterable[Confirmation]) -> tuple[Confirmation, ...]:
        """Take the signed survivors; return those that go to each site that signed."""
        self._begin("consistency")
        found = self._verified("consistency", answers, self._survivors)
        for site in list(found):
            if found[site].survivors != self._survivors:
                reason = "it confirmed other survivors"
                self._lose(site, "consistency", ProtocolError("survivors", reason))
                del found[site]
        found = self._enough("consistency", found, self._survivors)
        return tuple(found[site] for site in sorted(found))

    def open(self, answers: Iterable[Unmasking]) -> Opened:
        """Take the revealed shares, remove all masks and return the sum.

        Raises:
            TooFewSites: fewer than t sites revealed shares; their answers may still come, and this
                step may be tried again with all of them.
            ProtocolError: shares do not give the secrets that the sites committed to.
        """
        self._begin("unmask", last=True)
        try:
            found = self._verified("unmask", answers, self._survivors)
            found = self._enough("unmask", found, self._survivors)
            removed = self._removed(found)
        except ProtocolError:
            self._due = "unmask"
            raise
        self._sum.remove(removed)
        weight = sum(self._weights[site] for site in self._survivors)
        return Opened(self._sum.decode(weight), self._survivors, weight)

    def _begin(self, step: Step, *, last: bool = False) -> None:
        if self._due != step:
            raise ProtocolError("order", f"step {step} is not due, but {self._due or 'nothing'}")
        self._due = None if last else STEPS[STEPS.index(step) + 1]

    def _verified(
        self, step: Step, answers: Iterable[Message], expected: Iterable[str]
    ) -> dict[str, Message]:
        sites, found = set(expected), {}
        for message in answers:
            try:
                if message.site not in sites or message.site in found:
                    reason = f"site {message.site} answers twice or was not asked"
                    raise ProtocolError("roster", reason)
                message.verify(self._roster, self._header)
            except ProtocolError as error:
                self._lose(message.site, step, error)
            else:
                found[message.site] = message
        return found

    def _enough(self, step: Step, found: dict[str, T], expected: Iterable[str]) -> dict[str, T]:
        for site in expected:
            if site in found:
                self.losses.pop(site, None)  # a second request was answered
            elif site not in self.losses:
                self.losses[site] = Loss(site, step, "silent", SILENT)
        if len(found) < self._roster.threshold:
            self._due = None
            raise TooFewSites(step, len(found), self._roster.threshold)
        return found

    def _lose(self, site: str, step: Step, error: ProtocolError) -> None:
        self.losses.setdefault(site, Loss(site, step, error.fault, str(error)))

    def _above(self, site: str) -> set[str]:
        """Peers for whom ``site`` seals its part of the pair's secret."""
        if not self._header.post_quantum:
            return set()
        index = self._roster.index
        return {peer for peer in self._keys if index(peer) > index(site)}

    def _deliveries(self, receiver: str) -> tuple[Delivery, ...]:
        return tuple(
            Delivery(
                sender=sender,
                header=shares.header,
                sealed=shares.sealed[receiver],
                pair=shares.pairs.get(receiver),
            )
            for sender, shares in sorted(self._shares.items())
            if sender != receiver
        )

    def _removed(self, answers: Mapping[str, Unmasking]) -> list[Mask]:
        """Masks that do not cancel: the survivors' own, and the lost sites' with each of them."""
        helpers = sorted(answers, key=self._roster.index)[: self._roster.threshold]
        masks = []
        for site in sorted(self._shares):
            survived = site in self._survivors
            shares = {}
            for helper in helpers:
                revealed = answers[helper].seeds if survived else answers[helper].keys
                if site not in revealed:
                    reason = f"site {helper} revealed no share of {site}"
                    raise ProtocolError("share", reason)
                shares[self._roster.index(helper)] = bytes.fromhex(revealed[site])
            secret = combine(shares)
            masks += [self._seed_mask(site, secret)] if survived else self._pairs(site, secret)
        return masks

    def _seed_mask(self, site: str, seed: bytes) -> Mask:
        if commitment(seed) != self._keys[site].commitment:
            raise ProtocolError("share", f"the shares of {site} do not give its seed")
        return self_mask(seed, self._header, site)

    def _pairs(self, lost: str, root: bytes) -> list[Mask]:
        """Masks that the survivors added for their pairs with a lost site."""
        pair_key = KeyPair(root, self._header.post_quantum)
        if pair_key.public != self._keys[lost].mask:
            raise ProtocolError("share", f"the shares of {lost} do not give its mask key")
        found = []
        for site in self._survivors:
            secret = pair_key.agree(self._keys[site].mask) + self._part(pair_key, lost, site)
            found.append(pair_mask(secret, self._header, self._roster, site, lost))
        return found

    def _part(self, pair_key: KeyPair, lost: str, site: str) -> bytes:
        if not self._header.post_quantum:
            return b""
        if self._roster.index(lost) < self._roster.index(site):
            return pair_part(pair_key.root, site)
        sealed = bytes.fromhex(self._shares[site].pairs[lost])
        route = (self._header.digest(), site, lost)
        return pair_key.open(self._keys[site].mask, sealed, "pair", *route)
