"""A site's side of the protocol: what it answers to each step, and what it refuses.

Bonawitz et al. (Practical secure aggregation for privacy-preserving machine learning, CCS 2017),
the variant against active adversaries. Every function takes a state and returns the next one with
the answer; it has no other effect. Who calls it writes the new state to disk before the answer
leaves. A refusal raises and leaves the state as it was::

    answered so far     asked for       answered then
    -                   keys            keys
    keys                shares          shares
    shares              update          update
    update              consistency     consistency
    consistency         unmask          unmask: the secrets are gone

Everything else is out of order or repeated.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

from fedcmr_shared.identity.keys import SiteKey
from fedcmr_shared.identity.roster import Roster
from fedcmr_shared.schemas.ledger import Hash
from fedcmr_shared.schemas.policy import SiteName
from fedcmr_shared.secagg.agreement import ROOT_BYTES, KeyPair, check_usable, derive
from fedcmr_shared.secagg.faults import ProtocolError
from fedcmr_shared.secagg.masking import Mask
from fedcmr_shared.secagg.messages import (
    STEPS,
    Confirmation,
    Delivery,
    Keys,
    Share,
    Shares,
    Step,
    Unmasking,
    Vector,
    vector_digest,
)
from fedcmr_shared.secagg.session import Header
from fedcmr_shared.secagg.shamir import SHARE_BYTES, split

TRANSITIONS: Final[frozenset[tuple[Step, Step]]] = frozenset(
    {("keys", "shares"), ("shares", "update"), ("update", "consistency"), ("consistency", "unmask")}
)
"""(last step answered, step that may be answered next)."""

# Errors do not show what they were given: it may be a secret.
_FROZEN: Final = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class Secrets(BaseModel):
    """What a site draws for one session, hexadecimal; nobody else ever sees all of it."""

    model_config = _FROZEN

    transport: Annotated[Hash, Field(repr=False)]
    mask: Annotated[Hash, Field(repr=False)]
    seed: Annotated[Hash, Field(repr=False)]
    rounding: Annotated[Hash, Field(repr=False)]

    @classmethod
    def draw(cls) -> Secrets:
        """Return fresh secrets from the operating system's entropy."""
        transport, mask, seed, rounding = (os.urandom(ROOT_BYTES).hex() for _ in range(4))
        return cls(transport=transport, mask=mask, seed=seed, rounding=rounding)


class Received(BaseModel):
    """A peer's shares for this site, and its part of the pair's secret (post-quantum only)."""

    model_config = _FROZEN

    seed: Annotated[Share, Field(repr=False)]
    mask: Annotated[Share, Field(repr=False)]
    pair: Annotated[Hash | None, Field(repr=False)] = None


class SiteState(BaseModel):
    """Where a site stands in one session. Holds secrets: encrypt it at rest, never send it.

    ``answered`` is the last step; ``peers`` are the sites whose keys were accepted, this one
    included, ``received`` those whose shares were, and ``survivors`` the set it confirmed.
    """

    model_config = _FROZEN

    answered: Step
    site: SiteName
    roster: Roster
    header: Header
    secrets: Annotated[Secrets | None, Field(repr=False)]
    peers: dict[SiteName, Keys] = {}
    received: Annotated[dict[SiteName, Received], Field(repr=False)] = {}
    survivors: tuple[SiteName, ...] = ()

    def after(self, step: Step, **values: object) -> SiteState:
        """Return the state that has answered ``step``."""
        return self.model_copy(update={"answered": step, **values})


def offer_keys(
    site: str, identity: SiteKey, roster: Roster, header: Header
) -> tuple[SiteState, Keys]:
    """Begin a session with fresh keys.

    Raises:
        ProtocolError: the header is not of this roster or does not fit its threshold, or the
            roster has another key of the site.
    """
    if (header.roster, header.threshold) != (roster.sha256, roster.threshold):
        raise ProtocolError("foreign", "the session's header is of another roster")
    if not roster.threshold <= header.least_survivors <= len(roster.sites):
        text = f"{header.least_survivors} survivors do not fit a roster of {len(roster.sites)}"
        raise ProtocolError("threshold", f"{text} sites with threshold {roster.threshold}")
    if roster.sites.get(site) != identity.public_key:
        raise ProtocolError("roster", f"the roster does not list site {site} with its own key")
    secrets = Secrets.draw()
    message = Keys(
        site=site,
        header=header.digest(),
        transport=_transport(secrets, header).public,
        mask=_mask(secrets, header).public,
        commitment=commitment(bytes.fromhex(secrets.seed)),
    )
    state = SiteState(answered="keys", site=site, roster=roster, header=header, secrets=secrets)
    signed = message.signed(identity)
    return state.model_copy(update={"peers": {site: signed}}), signed


def share_secrets(
    state: SiteState, identity: SiteKey, model_sha256: str, keys: Sequence[Keys]
) -> tuple[SiteState, Shares]:
    """Seal shares of both secrets for every site whose keys are in ``keys``.

    Raises:
        ProtocolError: a key message is unsigned, foreign or doubled, a key is used twice, ours is
            missing or changed, or there are fewer sites than the threshold.
    """
    secrets = _expect(state, "shares")
    peers = _accepted_keys(state, keys)
    header = state.header.with_model(model_sha256)
    roster, threshold = state.roster, state.roster.threshold
    indices = {roster.index(site): site for site in peers}
    seeds = split(bytes.fromhex(secrets.seed), threshold, indices)
    masks = split(bytes.fromhex(secrets.mask), threshold, indices)
    transport, mask = _transport(secrets, header), _mask(secrets, header)
    sealed, pairs = {}, {}
    for index, peer in indices.items():
        if peer == state.site:
            continue
        route = (header.digest(), state.site, peer)
        content = seeds[index] + masks[index]
        sealed[peer] = transport.seal(peers[peer].transport, content, "shares", *route).hex()
        if header.post_quantum and roster.index(state.site) < index:
            part = pair_part(mask.root, peer)
            pairs[peer] = mask.seal(peers[peer].mask, part, "pair", *route).hex()
    message = Shares(site=state.site, header=header.digest(), sealed=sealed, pairs=pairs)
    index = roster.index(state.site)
    own = Received(seed=seeds[index].hex(), mask=masks[index].hex())
    after = state.after("shares", header=header, peers=peers, received={state.site: own})
    return after, message.signed(identity)


def accept_shares(state: SiteState, deliveries: Sequence[Delivery]) -> SiteState:
    """Open the peers' shares; from here on `masks` are fixed and the vector may be made.

    Raises:
        ProtocolError: a share is foreign, doubled or does not open, its sender works on another
            model or sent no keys, or there are fewer sites than the threshold.
    """
    secrets = _expect(state, "update")
    received = dict(state.received)
    for delivery in deliveries:
        if delivery.sender not in state.peers or delivery.sender in received:
            message = f"shares of {delivery.sender} come twice or without accepted keys"
            raise ProtocolError("roster", message)
        if delivery.header != state.header.digest():
            message = f"site {delivery.sender} works on another model than this site"
            raise ProtocolError("model", message)
        received[delivery.sender] = _opened(state, secrets, delivery)
    if len(received) < state.roster.threshold:
        raise _too_few(len(received), state.roster, "shared their secrets")
    return state.after("update", received=received)


def masks(state: SiteState) -> list[Mask]:
    """Return the masks of this site's vector: its own, and one for each peer that sent shares.

    Raises:
        ProtocolError: shares were not accepted yet, or the survivors were confirmed already.
    """
    secrets = _masking(state)
    own = _mask(secrets, state.header)
    found = [self_mask(bytes.fromhex(secrets.seed), state.header, state.site)]
    for peer in sorted(state.received):
        if peer == state.site:
            continue
        if state.roster.index(state.site) < state.roster.index(peer):
            part = pair_part(own.root, peer) if state.header.post_quantum else b""
        else:
            part = bytes.fromhex(state.received[peer].pair or "")
        secret = own.agree(state.peers[peer].mask) + part
        found.append(pair_mask(secret, state.header, state.roster, state.site, peer))
    return found


def rounding_key(state: SiteState) -> bytes:
    """Return the key of this session's stochastic rounding (32 bytes).

    Raises:
        ProtocolError: as in `masks`.
    """
    return bytes.fromhex(_masking(state).rounding)


def announce_vector(state: SiteState, identity: SiteKey, vector: bytes | bytearray) -> Vector:
    """Sign the masked vector.

    Raises:
        ProtocolError: as in `masks`.
    """
    _masking(state)
    digest = vector_digest(vector)
    message = Vector(site=state.site, header=state.header.digest(), blake3=digest)
    return message.signed(identity)


def confirm_survivors(
    state: SiteState, identity: SiteKey, survivors: Sequence[str]
) -> tuple[SiteState, Confirmation]:
    """Agree to open the sum over ``survivors``, and over no other set.

    Raises:
        ProtocolError: the set is too small, not sorted, lacks this site or names one that sent no
            shares.
    """
    _expect(state, "consistency")
    chosen = tuple(survivors)
    if list(chosen) != sorted(set(chosen)) or not set(chosen) <= set(state.received):
        text = "the survivors are not a sorted set of sites whose shares this site holds"
        raise ProtocolError("survivors", text)
    if state.site not in chosen:
        raise ProtocolError("survivors", "the survivors do not include this site")
    least = state.header.least_survivors
    if len(chosen) < least:
        raise ProtocolError("threshold", f"{len(chosen)} sites survived; {least} are needed")
    message = Confirmation(site=state.site, header=state.header.digest(), survivors=chosen)
    return state.after("consistency", survivors=chosen), message.signed(identity)


def reveal_shares(
    state: SiteState, identity: SiteKey, confirmations: Sequence[Confirmation]
) -> tuple[SiteState, Unmasking]:
    """Reveal one share per peer, once at least t sites signed the same survivors; then forget.

    Raises:
        ProtocolError: a signature is missing, doubled, foreign or for another set.
    """
    _expect(state, "unmask")
    signers = set()
    for confirmation in confirmations:
        confirmation.verify(state.roster, state.header)
        if confirmation.survivors != state.survivors:
            text = f"site {confirmation.site} confirmed another set of survivors"
            raise ProtocolError("survivors", text)
        if confirmation.site in signers or confirmation.site not in state.survivors:
            text = f"site {confirmation.site} confirms twice or did not survive"
            raise ProtocolError("roster", text)
        signers.add(confirmation.site)
    if len(signers) < state.roster.threshold:
        raise _too_few(len(signers), state.roster, "confirmed the survivors")
    message = Unmasking(
        site=state.site,
        header=state.header.digest(),
        seeds={peer: state.received[peer].seed for peer in state.survivors},
        keys={p: r.mask for p, r in state.received.items() if p not in state.survivors},
    )
    return state.after("unmask", secrets=None, received={}), message.signed(identity)


def commitment(seed: bytes) -> str:
    """Return the SHA-256 that commits to the self mask's seed."""
    return hashlib.sha256(b"fedcmr secure aggregation 1 seed\n" + seed).hexdigest()


def pair_part(mask_root: bytes, peer: str) -> bytes:
    """Return what the lower-indexed site adds to the pair's secret (post-quantum only)."""
    return derive(mask_root, "pair part", peer)


def self_mask(seed: bytes, header: Header, site: str) -> Mask:
    """Return the mask that only ``site`` adds."""
    return Mask(derive(seed, "self mask", header.digest(), site), 1)


def pair_mask(secret: bytes, header: Header, roster: Roster, site: str, peer: str) -> Mask:
    """Return the mask that ``site`` adds; ``peer`` adds the same one with the other sign."""
    lower, higher = sorted((site, peer), key=roster.index)
    key = derive(secret, "pair mask", header.digest(), lower, higher)
    return Mask(key, 1 if site == lower else -1)


def check_distinct(keys: Sequence[Keys]) -> None:
    """Raise a ProtocolError when a site or one of its public keys occurs twice."""
    sites = [message.site for message in keys]
    publics = [key.x25519 for message in keys for key in (message.transport, message.mask)]
    if len(set(sites)) < len(sites):
        raise ProtocolError("roster", "a site's keys come twice")
    if len(set(publics)) < len(publics):
        raise ProtocolError("keys", "a public key is used twice")


def check_complete(message: Keys, header: Header) -> None:
    """Raise a ProtocolError unless the keys have the halves that the header asks for, and work."""
    for key in (message.transport, message.mask):
        if (key.mlkem768 is not None) != header.post_quantum:
            text = f"the keys of {message.site} do not fit the session's post-quantum setting"
            raise ProtocolError("keys", text)
        check_usable(key)


def _masking(state: SiteState) -> Secrets:
    """Return the secrets of a site whose step is `update`, the only one with a vector."""
    if state.answered != "update" or state.secrets is None:
        raise ProtocolError("order", f"no vector may be masked after step {state.answered}")
    return state.secrets


def _expect(state: SiteState, step: Step) -> Secrets:
    if STEPS.index(step) <= STEPS.index(state.answered):
        raise ProtocolError("repeated", f"step {step} of this session was answered before")
    if (state.answered, step) not in TRANSITIONS or state.secrets is None:
        raise ProtocolError("order", f"step {step} does not follow step {state.answered}")
    return state.secrets


def _accepted_keys(state: SiteState, keys: Sequence[Keys]) -> dict[str, Keys]:
    for message in keys:
        message.verify(state.roster, state.header)
        check_complete(message, state.header)
    check_distinct(keys)
    peers = {message.site: message for message in keys}
    if peers.get(state.site) != state.peers[state.site]:
        raise ProtocolError("keys", "the keys that this site sent are missing or changed")
    if len(peers) < state.roster.threshold:
        raise _too_few(len(peers), state.roster, "sent keys")
    return peers


def _opened(state: SiteState, secrets: Secrets, delivery: Delivery) -> Received:
    sender, header = delivery.sender, state.header
    keys, route = state.peers[sender], (header.digest(), sender, state.site)
    sealed = bytes.fromhex(delivery.sealed)
    content = _transport(secrets, header).open(keys.transport, sealed, "shares", *route)
    if len(content) != 2 * SHARE_BYTES:
        raise ProtocolError("share", f"the shares of {sender} are cut short")
    expected = header.post_quantum and state.roster.index(sender) < state.roster.index(state.site)
    if expected != (delivery.pair is not None):
        raise ProtocolError("share", f"the pair secret of {sender} is missing or not asked for")
    pair = None
    if delivery.pair is not None:
        part = bytes.fromhex(delivery.pair)
        pair = _mask(secrets, header).open(keys.mask, part, "pair", *route).hex()
        if len(pair) != 2 * ROOT_BYTES:
            raise ProtocolError("share", f"the pair secret of {sender} is cut short")
    return Received(seed=content[:SHARE_BYTES].hex(), mask=content[SHARE_BYTES:].hex(), pair=pair)


def _too_few(count: int, roster: Roster, what: str) -> ProtocolError:
    return ProtocolError(
        "threshold", f"{count} of {len(roster.sites)} sites {what}; {roster.threshold} are needed"
    )


def _transport(secrets: Secrets, header: Header) -> KeyPair:
    return KeyPair(bytes.fromhex(secrets.transport), header.post_quantum)


def _mask(secrets: Secrets, header: Header) -> KeyPair:
    return KeyPair(bytes.fromhex(secrets.mask), header.post_quantum)
