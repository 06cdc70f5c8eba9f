"""Who may join with which keys, what ends a membership, and the roster that follows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from coordinator_parties import Party, new_home

from fedcmr_server.authoriser import fleet_refusal
from fedcmr_server.home import CoordinatorHome
from fedcmr_server.members import dashboard_link, end_membership, propose_roster, standings
from fedcmr_server.store import Certificates, Members, Rosters, Store, Tokens
from fedcmr_shared.errors import FederationError
from fedcmr_shared.identity.certificates import (
    Member,
    certificate_request,
    fingerprint,
    new_key,
    read_certificate,
)
from fedcmr_shared.identity.enrolment import EnrolmentRequest
from fedcmr_shared.identity.keys import SiteKey
from fedcmr_shared.identity.roster_history import verify_history


@pytest.fixture
def home(tmp_path: Path) -> CoordinatorHome:
    return new_home(tmp_path / "c")


@pytest.fixture
def store(home: CoordinatorHome) -> Iterator[Store]:
    with home.store() as opened:
        yield opened


@pytest.fixture
def alder(tmp_path: Path) -> Party:
    return Party.make(tmp_path / "alder", "alder")


def others(folder: Path, *names: str) -> list[Party]:
    return [Party.make(folder / name, name) for name in names]


def again(party: Party, folder: Path) -> Party:
    """The same member with all keys drawn anew."""
    return Party.make(folder / f"{party.name}-again", party.name, party.request.role)


def test_who_joins_gets_a_certificate_that_counts(
    home: CoordinatorHome, store: Store, alder: Party
) -> None:
    kit = alder.join(home, store).kit
    assert kit.member == Member("site", "alder")
    found = Certificates(store).holder(fingerprint(read_certificate(kit.certificate)))
    assert found is not None
    assert found[0].identity == alder.request.identity


def test_the_same_request_again_needs_a_reason(
    home: CoordinatorHome, store: Store, alder: Party
) -> None:
    first = alder.join(home, store).kit
    with pytest.raises(FederationError, match="a member already"):
        alder.join(home, store)
    second = alder.join(home, store, "the certificate had expired").kit
    holder = Certificates(store).holder
    assert holder(fingerprint(read_certificate(first.certificate))) is None
    assert holder(fingerprint(read_certificate(second.certificate))) is not None
    assert len(Members(store).all()) == 1, "it is the same membership"


def test_an_enrolment_that_was_cut_off_goes_on(
    home: CoordinatorHome, store: Store, alder: Party
) -> None:
    Members(store).add(alder.request.member, alder.request.identity, alder.request.node_key)
    assert alder.join(home, store).kit.member.name == "alder"


def test_a_taken_name_with_other_keys_needs_a_reason_and_then_the_old_keys_are_over(
    home: CoordinatorHome, store: Store, alder: Party, tmp_path: Path
) -> None:
    old = alder.join(home, store).kit
    new = again(alder, tmp_path)
    with pytest.raises(FederationError, match="with other keys"):
        new.join(home, store)
    assert Certificates(store).holder(fingerprint(read_certificate(old.certificate))) is not None
    new.join(home, store, "the server was stolen")
    assert Certificates(store).holder(fingerprint(read_certificate(old.certificate))) is None
    states = {row.identity: row.state for row in Members(store).all()}
    assert states == {alder.request.identity: "revoked", new.request.identity: "active"}
    with pytest.raises(FederationError, match="such keys never come back"):
        alder.join(home, store, "we found it again")


def test_who_was_thrown_out_comes_back_with_new_keys_and_a_reason_alone(
    home: CoordinatorHome, store: Store, alder: Party, tmp_path: Path
) -> None:
    alder.join(home, store)
    end_membership(home, store, "alder", "revoked", "a test")
    with pytest.raises(FederationError, match="such keys never come back"):
        alder.join(home, store, "please")
    new = again(alder, tmp_path)
    with pytest.raises(FederationError, match="was a member before"):
        new.join(home, store)
    new.join(home, store, "the audit is over")
    assert [row.state for row in Members(store).all()] == ["revoked", "active"]


def test_who_left_comes_back_with_its_keys_and_a_reason(
    home: CoordinatorHome, store: Store, alder: Party
) -> None:
    old = alder.join(home, store).kit
    end_membership(home, store, "alder", "left", "its study ended")
    with pytest.raises(FederationError, match=r"\(left\) and comes with the same keys"):
        alder.join(home, store)
    kit = alder.join(home, store, "another study").kit
    holder = Certificates(store).holder
    assert holder(fingerprint(read_certificate(old.certificate))) is None
    found = holder(fingerprint(read_certificate(kit.certificate)))
    assert found is not None
    assert found[0].identity == alder.request.identity
    assert [row.state for row in Members(store).all()] == ["active"]


def test_who_left_with_keys_that_were_replaced_since_does_not_come_back_with_them(
    home: CoordinatorHome, store: Store, alder: Party, tmp_path: Path
) -> None:
    alder.join(home, store)
    end_membership(home, store, "alder", "left", "its study ended")
    again(alder, tmp_path).join(home, store, "a new server")
    end_membership(home, store, "alder", "left", "that one, too")
    with pytest.raises(FederationError, match="such keys never come back"):
        alder.join(home, store, "the old server")


def test_nobody_is_brought_back_who_did_not_leave(
    home: CoordinatorHome, store: Store, alder: Party
) -> None:
    with pytest.raises(FederationError, match="did not leave"):
        Members(store).bring_back("alder")
    alder.join(home, store)
    with pytest.raises(FederationError, match="did not leave"):
        Members(store).bring_back("alder")


@pytest.mark.parametrize("what", ["identity", "node key", "node key with a comment"])
def test_two_members_never_share_a_key(
    home: CoordinatorHome, store: Store, alder: Party, tmp_path: Path, what: str
) -> None:
    alder.join(home, store)
    identity = alder.folder if what == "identity" else tmp_path / "birch"
    if what != "identity":
        identity.mkdir()
        SiteKey.create(identity / "identity.pem")
    node_key = alder.request.node_key
    if what == "identity":
        node_key = Party.make(tmp_path / "spare", "spare").request.node_key
    elif "comment" in what:
        node_key = f"{node_key} root@birch"
    member = Member("site", "birch")
    request = EnrolmentRequest.sign(
        member,
        SiteKey.load(identity / "identity.pem"),
        certificate_request(new_key(), member),
        node_key,
    )
    with pytest.raises(FederationError, match=f"{what.partition(' with')[0]}.* of alder"):
        Party(tmp_path, request).join(home, store, "with a reason too")
    end_membership(home, store, "alder", "left", "a test")
    with pytest.raises(FederationError, match="is or was that of alder"):
        Party(tmp_path, request).join(home, store)


def test_a_name_keeps_its_role_and_the_coordinator_its_own(
    home: CoordinatorHome, store: Store, alder: Party, tmp_path: Path
) -> None:
    alder.join(home, store)
    with pytest.raises(FederationError, match="is site already"):
        Party.make(tmp_path / "a", "alder", "auditor").join(home, store, "a reason")
    with pytest.raises(FederationError, match="no site or auditor"):
        Party.make(tmp_path / "b", "coordinator").join(home, store)
    with pytest.raises(FederationError, match="no site or auditor"):
        Party.make(tmp_path / "d", "desk", "coordinator").join(home, store)


def test_three_sites_form_a_roster_that_follows_every_change(
    home: CoordinatorHome, store: Store, alder: Party, tmp_path: Path
) -> None:
    birch, cedar, dogwood = others(tmp_path, "birch", "cedar", "dogwood")
    auditor = Party.make(tmp_path / "eye", "eye", "auditor")
    assert [party.join(home, store).roster for party in (alder, auditor, birch)] == [None] * 3
    first = cedar.join(home, store).roster
    assert first is not None
    assert first.roster.names == ("alder", "birch", "cedar")
    dogwood.join(home, store)
    new = again(alder, tmp_path)
    new.join(home, store, "a new server")
    end_membership(home, store, "dogwood", "left", "its study ended")
    assert end_membership(home, store, "eye", "left", "done") is None
    assert end_membership(home, store, "birch", "revoked", "a test") is None, "two are no roster"
    history = Rosters(store).history()
    verify_history(history, home.identity().public_key)
    assert [version.reason for version in history] == [
        "alder joins; birch joins; cedar joins",
        "dogwood joins",
        "alder has another key: a new server",
        "dogwood leaves: its study ended",
    ]
    assert history[-1].roster.sites["alder"] == new.request.identity


def test_a_roster_is_proposed_only_when_it_differs(
    home: CoordinatorHome, store: Store, alder: Party, tmp_path: Path
) -> None:
    for party in (alder, *others(tmp_path, "birch", "cedar")):
        party.join(home, store)
    assert propose_roster(home, store, "again") is None
    alder.join(home, store, "a new certificate, the same keys")
    assert len(Rosters(store).history()) == 1


def test_certificates_are_announced_30_days_before_they_end(
    home: CoordinatorHome, store: Store, alder: Party
) -> None:
    alder.join(home, store)
    (standing,) = standings(store)
    now = datetime.now(UTC)
    assert standing.warning(now + timedelta(days=334)) is None
    assert "expires in 29 days" in str(standing.warning(now + timedelta(days=336)))
    assert "has expired" in str(standing.warning(now + timedelta(days=366)))
    without = dataclasses.replace(standing, certificate=None)
    assert "no certificate" in str(without.warning(now))
    end_membership(home, store, "alder", "left", "done")
    assert standings(store)[0].warning(now) is None


def test_a_link_opens_the_dashboard_once(home: CoordinatorHome, store: Store) -> None:
    link = dashboard_link(home, store, "the board")
    address, token = link.split("/login?token=")
    assert address == home.address
    assert Tokens(store).use(token) == "the board"
    assert Tokens(store).use(token) is None


def test_the_authoriser_says_why_not(home: CoordinatorHome, store: Store, alder: Party) -> None:
    certificate = alder.join(home, store).kit.certificate
    assert "not a certificate" in str(fleet_refusal(store, "", ""))
    assert "not its own" in str(fleet_refusal(store, certificate, "QUJD"))
    assert "malformed" in str(fleet_refusal(store, certificate, "\x00"))
    end_membership(home, store, "alder", "revoked", "a test")
    assert "revoked" in str(fleet_refusal(store, certificate, ""))
