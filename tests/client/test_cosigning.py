"""Sites cosign what continues what they cosigned before: two histories do not stay unseen."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from governance_parties import Coordinator, History, coordinator, draw_identity

from fedcmr_client.cosignatures import Cosigned
from fedcmr_client.cosigning import (
    Fork,
    cosign_site,
    keep_cosignatures,
    newest_head,
    publish,
    publish_and_cosign,
)
from fedcmr_client.evidence import build
from fedcmr_client.governance import Governance, PublishedCheckpoint, SiteCheckpoints
from fedcmr_client.ledger import CheckpointSchedule, Ledger, LedgerPlace
from fedcmr_client.site_home import SiteHome
from fedcmr_server.governance.checkpoints import CheckpointBoard
from fedcmr_server.store import Checkpoints, Members
from fedcmr_shared.audit.cosignature import cosign, verify_cosignature
from fedcmr_shared.audit.evidence import Evidence
from fedcmr_shared.audit.report import write_report
from fedcmr_shared.audit.verify import Cosigner, Findings, verify, verify_origin
from fedcmr_shared.errors import FederationError, LedgerError
from fedcmr_shared.identity.keys import SiteKey, verify_signature
from fedcmr_shared.schemas.ledger import Checkpoint

HOUR = 3_600_000


class Clock:
    """Time that the test sets; UTC milliseconds."""

    def __init__(self) -> None:
        self.now = 1_790_000_000_000

    def __call__(self) -> int:
        return self.now


@dataclass
class Peer:
    """A site with a real ledger and a place at a coordinator."""

    ledger: Ledger
    identity: SiteKey
    governance: Governance

    @property
    def folder(self) -> Path:
        return self.ledger.place.folder

    def publish(self) -> list[Checkpoint]:
        return publish(self.governance, self.ledger)

    def cosign(self, site: str, key: str) -> Checkpoint | None:
        return cosign_site(self.governance, self.folder, self.identity, site, key)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def running(stack: ExitStack) -> Coordinator:
    return stack.enter_context(coordinator())


@pytest.fixture
def clock() -> Clock:
    return Clock()


NewPeer = Callable[..., Peer]


@pytest.fixture
def new_peer(stack: ExitStack, running: Coordinator, clock: Clock, tmp_path: Path) -> NewPeer:
    """Return a function that makes a site with a checkpoint over four entries each hour."""

    def make(name: str, at: Coordinator | None = None, like: Peer | None = None) -> Peer:
        """``like`` is a site whose key this one has too."""
        at = at or running
        folder = tmp_path / f"{name}{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        if like is not None:
            (folder / "site.key").write_bytes(like.ledger.place.key.read_bytes())
        ledger = stack.enter_context(
            Ledger.create(
                LedgerPlace(folder, folder / "head.json"),
                site=name,
                secret=b"s" * 32,
                epsilon=8.0,
                delta=1e-5,
                schedule=CheckpointSchedule(every_s=3600, leaves=4),
                clock=clock,
            )
        )
        identity = SiteKey.load(folder / "site.key")
        party = at.join(name, identity=identity)
        return Peer(ledger, identity, stack.enter_context(at.as_member(party)))

    return make


@pytest.fixture
def north(new_peer: NewPeer) -> Peer:
    return new_peer("north")


@pytest.fixture
def south(new_peer: NewPeer) -> Peer:
    return new_peer("south")


def key_of(peer: Peer) -> str:
    return peer.identity.public_key


def test_due_checkpoints_are_published_and_cosigned(north: Peer, south: Peer, clock: Clock) -> None:
    for _ in range(3):
        north.publish()
        head = south.cosign("north", key_of(north))
        assert head is not None
        assert head.size == north.ledger.checkpoint().size  # padded, never the inner head
        clock.now += HOUR
    published = south.governance.checkpoints("north").published
    assert [each.checkpoint.size for each in published] == [4, 8, 12]
    for each in published:
        signature = each.checkpoint.cosignatures[key_of(south)]
        verify_cosignature(key_of(south), each.checkpoint, signature)


def test_missed_intervals_are_published_at_once(north: Peer, south: Peer, clock: Clock) -> None:
    north.publish()
    clock.now += 5 * HOUR
    north.publish()
    north.publish()  # nothing new
    published = south.governance.checkpoints("north").published
    assert [each.checkpoint.size for each in published] == [4, 24]
    head = south.cosign("north", key_of(north))
    assert head is not None
    assert head.size == 24


def test_a_site_that_published_nothing_is_not_cosigned(north: Peer, south: Peer) -> None:
    assert south.cosign("north", key_of(north)) is None
    assert Cosigned.read(south.folder).heads == {}


def test_a_lost_cosignature_is_handed_in_again(
    running: Coordinator, north: Peer, south: Peer
) -> None:
    north.publish()

    def lose(*_: object) -> None:
        raise OSError("power cut")

    put, south.governance.put_cosignature = south.governance.put_cosignature, lose  # type: ignore[method-assign]
    with pytest.raises(OSError, match="power cut"):
        south.cosign("north", key_of(north))
    # What was to be signed is on disk already: no other head is signed instead.
    assert Cosigned.read(south.folder).heads["north"].checkpoint.size == 4
    south.governance.put_cosignature = put  # type: ignore[method-assign]
    south.cosign("north", key_of(north))
    (head,) = Checkpoints(running.store).of("north")
    assert set(head.cosignatures) == {key_of(south)}


def forked(new_peer: NewPeer, north: Peer, at: Coordinator) -> Peer:
    """A second ledger under the key of ``north`` whose entries are others."""
    twin = new_peer("north", at, north)
    twin.ledger.refuse("ab" * 32, "declined", "other")
    return twin


def test_two_histories_for_two_peers_are_found(
    stack: ExitStack, new_peer: NewPeer, north: Peer, south: Peer, clock: Clock, tmp_path: Path
) -> None:
    """North and the coordinator work together: each peer sees one of two histories."""
    other_face = stack.enter_context(coordinator())
    twin, west = forked(new_peer, north, other_face), new_peer("west", other_face)
    north.publish()
    twin.publish()
    south.cosign("north", key_of(north))
    west.cosign("north", key_of(north))
    clock.now += HOUR
    north.publish()
    # The coordinator shows west what south was shown: it no longer fits what west signed.
    shown = south.governance.checkpoints("north")
    with pytest.raises(Fork, match="site north signed two histories of 4 entries"):
        newest_head(
            "north", key_of(north), Cosigned.read(west.folder).heads["north"].checkpoint, shown
        )
    # And as it happens on the way: the message names the site, and both heads are kept.
    west.governance.checkpoints = south.governance.checkpoints  # type: ignore[method-assign]
    with pytest.raises(LedgerError, match="site north signed two histories"):
        west.cosign("north", key_of(north))
    (proof,) = (west.folder / "forks").iterdir()
    heads = [Checkpoint.model_validate(each) for each in json.loads(proof.read_text())["heads"]]
    assert (heads[0].size, heads[0].site) == (heads[1].size, heads[1].site)
    assert heads[0].root != heads[1].root
    for head in heads:
        verify_signature(key_of(north), head.signature, head.signed_bytes())


def test_without_cosigning_two_histories_pass_unseen(
    stack: ExitStack, new_peer: NewPeer, north: Peer, south: Peer
) -> None:
    """Positive control: each bundle alone is in order; only cosignatures tell them apart."""
    other_face = stack.enter_context(coordinator())
    twin = forked(new_peer, north, other_face)
    trusted = {"north": key_of(north), "south": key_of(south)}
    for face in (north, twin):
        findings = verify(build(face.ledger), trusted)
        assert findings.failed is None
        assert findings.cosigners == (Cosigner("south", None),)
    # With it, south's signature stands under one of them, and never comes under the other.
    north.publish()
    south.cosign("north", key_of(north))
    collect(north, south)
    collect(twin, south)
    assert verify(build(north.ledger), trusted).cosigners == (Cosigner("south", 4),)
    assert verify(build(twin.ledger), trusted).cosigners == (Cosigner("south", None),)


def collect(peer: Peer, *others: Peer) -> None:
    """Fetch the cosignatures of ``others`` for the site's evidence."""
    keep_cosignatures(peer.folder, peer.publish(), [key_of(other) for other in others])


def test_what_an_honest_coordinator_refused_reaches_the_peers(
    new_peer: NewPeer, running: Coordinator, north: Peer, south: Peer
) -> None:
    north.publish()
    other = History("north", north.identity, "other").head(4)
    with pytest.raises(FederationError, match="two histories"):
        north.governance.put_checkpoint(other, 0, [])
    with pytest.raises(LedgerError, match="site north signed two histories of 4 entries"):
        south.cosign("north", key_of(north))
    assert len(list((south.folder / "forks").iterdir())) == 1
    (head, *_) = [c for c in Checkpoints(running.store).of("north") if c.root != other.root]
    assert head.cosignatures == {}


def test_a_head_that_is_hidden_later_is_missed(
    monkeypatch: pytest.MonkeyPatch, north: Peer, south: Peer
) -> None:
    north.publish()
    south.cosign("north", key_of(north))
    monkeypatch.setattr(CheckpointBoard, "published", lambda *_: [])
    with pytest.raises(LedgerError, match="no longer shows the head of site north over 4"):
        south.cosign("north", key_of(north))


def test_a_site_with_a_new_key_is_cosigned_from_its_beginning(
    running: Coordinator, south: Peer
) -> None:
    for word in ("old", "new"):
        log = History("north", draw_identity(), word)
        party = running.join("north", identity=log.identity, node_key=word)
        with running.as_member(party) as governance:
            governance.put_checkpoint(log.head(8), 0, [])
        head = south.cosign("north", log.identity.public_key)
        assert head is not None
        assert head.root == log.head(8).root
        Members(running.store).end("north", "revoked", "test")


def listed(*heads: Checkpoint, proofs: Any = None) -> SiteCheckpoints:
    proofs = proofs or [()] * len(heads)
    pairs = zip(heads, proofs, strict=True)
    return SiteCheckpoints(tuple(PublishedCheckpoint(*pair) for pair in pairs), ())


def test_only_a_proven_continuation_is_cosigned() -> None:
    log = History("north", draw_identity())
    other = History("north", log.identity, "other")
    key, last = log.identity.public_key, log.head(8)
    proof = tuple(log.proof(8, 16))
    good = listed(last, log.head(16), proofs=[(), proof])
    newest = newest_head("north", key, last, good)
    assert newest == log.head(16)
    for heads, proofs in (
        ((last, other.head(16)), [(), tuple(other.proof(8, 16))]),
        ((last, log.head(16)), [(), ()]),
        ((other.head(8), other.head(16)), [(), tuple(other.proof(8, 16))]),
    ):
        with pytest.raises(Fork):
            newest_head("north", key, last, listed(*heads, proofs=proofs))
    for heads in ((), (log.head(16),)):
        with pytest.raises(LedgerError, match="no longer shows"):
            newest_head("north", key, last, listed(*heads))


def test_heads_that_the_site_did_not_sign_are_no_heads() -> None:
    log = History("north", draw_identity())
    foreign = History("south", log.identity).head(8)
    forged = History("north", draw_identity()).head(8)
    for head in (foreign, forged):
        with pytest.raises(LedgerError, match="that the coordinator shows for site north"):
            newest_head("north", log.identity.public_key, None, listed(head))


def test_another_copy_of_the_ledger_is_noticed(running: Coordinator, north: Peer) -> None:
    north.publish()
    # As if another machine had published with the same key.
    Checkpoints(running.store).keep(History("north", north.identity).head(64))
    with pytest.raises(LedgerError, match="another copy of the ledger is in use"):
        north.publish()


# Evidence


def evidence(north: Peer, clock: Clock, *peers: Peer) -> Evidence:
    """A bundle over two checkpoints, of which the peers cosigned the first."""
    north.publish()
    for peer in peers:
        peer.cosign("north", key_of(north))
    clock.now += HOUR
    collect(north, *peers)
    return build(north.ledger)


def named(findings: Findings) -> str:
    return next(step.text for step in findings.steps if step.name == "cosigned")


def test_a_bundle_says_who_cosigned(
    new_peer: NewPeer, north: Peer, south: Peer, clock: Clock, tmp_path: Path
) -> None:
    west = new_peer("west")
    bundle = evidence(north, clock, south, west)
    path = tmp_path / "bundle.json"
    bundle.write(path)
    trusted = {
        "north": key_of(north),
        "south": key_of(south),
        "west": key_of(west),
        "east": draw_identity().public_key,
    }
    findings = verify(Evidence.read(path), trusted)
    assert findings.failed is None
    assert findings.cosigners == (
        Cosigner("east", None),
        Cosigner("south", 4),
        Cosigner("west", 4),
    )
    assert named(findings) == (
        "cosigned by 2 of 3 other sites: south up to leaf 4, west up to leaf 4"
    )
    page = write_report(findings, tmp_path / "page.html").read_text()
    assert "cosigned by 2 of 3 other sites" in page


def test_a_bundle_without_cosignatures_passes_and_says_so(north: Peer, south: Peer) -> None:
    bundle = build(north.ledger)
    alone = verify(bundle, {"north": key_of(north)})
    assert alone.failed is None
    assert "no other site is trusted" in named(alone)
    findings = verify(bundle, {"north": key_of(north), "south": key_of(south)})
    assert findings.failed is None
    assert named(findings).startswith("cosigned by 0 of 1 other site:")


def test_keys_that_nobody_trusts_count_for_nothing(north: Peer, south: Peer, clock: Clock) -> None:
    bundle = evidence(north, clock, south)
    stranger = draw_identity()
    head = bundle.checkpoint
    padded = head.model_copy(update={"cosignatures": {stranger.public_key: cosign(stranger, head)}})
    changed = bundle.model_copy(update={"checkpoint": padded})
    findings = verify(changed, {"north": key_of(north), "west": "ab" * 32})
    assert findings.failed is None
    assert findings.cosigners == (Cosigner("west", None),)


def test_the_site_s_own_signature_is_no_cosignature(north: Peer) -> None:
    bundle = build(north.ledger)
    head = bundle.checkpoint
    own = head.model_copy(update={"cosignatures": {key_of(north): cosign(north.identity, head)}})
    findings = verify(bundle.model_copy(update={"checkpoint": own}), {"north": key_of(north)})
    assert findings.cosigners == ()


@pytest.mark.parametrize("place", ["newest", "earlier"])
@pytest.mark.parametrize("signature", ["other head", "no signature"])
def test_a_false_cosignature_fails(
    north: Peer, south: Peer, clock: Clock, place: str, signature: str
) -> None:
    bundle = evidence(north, clock, south)
    false = {key_of(south): "zz" if signature == "no signature" else south.identity.sign(b"other")}
    if place == "newest":
        head = bundle.checkpoint.model_copy(update={"cosignatures": false})
        bundle = bundle.model_copy(update={"checkpoint": head})
    else:
        (old,) = bundle.earlier
        head = old.checkpoint.model_copy(update={"cosignatures": false})
        old = old.model_copy(update={"checkpoint": head})
        bundle = bundle.model_copy(update={"earlier": (old,)})
    findings = verify(bundle, {"north": key_of(north), "south": key_of(south)})
    assert findings.failed is not None
    assert findings.failed.name == "cosigned"
    assert findings.account is None


def test_false_cosignatures_do_not_get_into_evidence(
    running: Coordinator, north: Peer, south: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    north.publish()
    (head,) = Checkpoints(running.store).of("north")
    Checkpoints(running.store).cosign(head, "south", key_of(south), "00" * 64)
    collect(north, south)
    assert "cosignature under the head of 4 entries" in caplog.text
    assert build(north.ledger).checkpoint.cosignatures == {}


def test_the_origin_alone_is_checked_before_evidence_is_kept(north: Peer) -> None:
    bundle = build(north.ledger)
    verify_origin(bundle, {"north": key_of(north)})
    with pytest.raises(LedgerError, match="step 2, trust"):
        verify_origin(bundle, {"north": "ab" * 32})


def test_damaged_files_are_named(north: Peer, south: Peer) -> None:
    (south.folder / "cosigned.json").write_text("{}x")
    with pytest.raises(LedgerError, match=r"cosigned\.json was changed"):
        south.cosign("north", key_of(north))


# All of it


def test_sites_publish_and_cosign_each_other(
    stack: ExitStack,
    running: Coordinator,
    make_home: Callable[..., SiteHome],
    make_site: Callable[..., Path],
) -> None:
    homes = {name: make_home(make_site(name, 2)) for name in ("north", "south", "west")}
    parties = {name: running.join(name, identity=home.identity()) for name, home in homes.items()}
    keys = {name: home.identity().public_key for name, home in homes.items()}
    members = {
        name: stack.enter_context(running.as_member(party)) for name, party in parties.items()
    }
    for _ in range(2):
        for name, home in homes.items():
            publish_and_cosign(members[name], home, keys)
    for home in homes.values():
        publish_and_cosign(members[home.policy.site], home, keys)
    for name, home in homes.items():
        with closing(home.open_ledger()) as ledger:
            findings = verify(build(ledger), keys)
        assert findings.failed is None
        assert {each.site for each in findings.cosigners if each.size} == set(homes) - {name}


def test_one_forked_site_keeps_no_other_back(
    stack: ExitStack,
    running: Coordinator,
    make_home: Callable[..., SiteHome],
    make_site: Callable[..., Path],
) -> None:
    home = make_home(make_site("south", 2))
    member = stack.enter_context(running.as_member(running.join("south", identity=home.identity())))
    logs = {name: History(name, draw_identity()) for name in ("north", "west")}
    for name, log in logs.items():
        party = running.join(name, identity=log.identity)
        with running.as_member(party) as governance:
            governance.put_checkpoint(log.head(8), 0, [])
            if name == "north":
                other = History(name, log.identity, "other").head(8)
                with pytest.raises(FederationError, match="two histories"):
                    governance.put_checkpoint(other, 0, [])
    keys = {name: log.identity.public_key for name, log in logs.items()}
    keys["nobody"] = "ab" * 32
    with pytest.raises(LedgerError, match=r"no site is called nobody; site north signed two"):
        publish_and_cosign(member, home, keys)
    (west,) = Checkpoints(running.store).of("west")
    assert set(west.cosignatures) == {home.identity().public_key}
