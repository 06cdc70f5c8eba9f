"""A member folder: complete or not there, one federation for ever, and only one's own kit."""

import json
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)

from fedcmr_client import membership as module
from fedcmr_client.membership import Membership
from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.identity.certificates import (
    MEMBER_DAYS,
    Authority,
    Member,
    certificate_pem,
    certificate_request,
    fingerprint,
    issue_member,
    issue_server,
    key_pem,
    new_authority,
    new_key,
)
from fedcmr_shared.identity.enrolment import EnrolmentRequest, StartupKit
from fedcmr_shared.identity.keys import SiteKey

ALDER = Member("site", "alder")
COORDINATOR_KEY = "c" * 64


@pytest.fixture
def identity(tmp_path: Path) -> SiteKey:
    return SiteKey.create(tmp_path / "identity.pem")


@pytest.fixture(scope="module")
def authority() -> Authority:
    return new_authority("hearts")


def kit_for(request: EnrolmentRequest, authority: Authority, **changes: Any) -> StartupKit:
    """Return the kit with which the coordinator of ``authority`` answers ``request``."""
    member, now = changes.pop("member", request.member), changes.pop("now", None)
    certificate = issue_member(authority, request.certificate_request, member, now)
    values = {
        "federation": "hearts",
        "coordinator": "heart-net",
        "coordinator_key": COORDINATOR_KEY,
        "host": "fl.example.org",
        "port": 8443,
        "authority": certificate_pem(authority.certificate),
        "certificate": certificate_pem(certificate),
    }
    return StartupKit.model_validate({**values, **changes})


@pytest.fixture
def site(tmp_path: Path, identity: SiteKey) -> Membership:
    """A site that has asked."""
    Membership.create(tmp_path / "federation", ALDER, identity, with_node_key=True)
    return Membership(tmp_path / "federation")


@pytest.fixture
def joined(site: Membership, authority: Authority) -> Membership:
    site.join(kit_for(site.request, authority))
    return site


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class TestCreate:
    def test_keys_are_private_and_the_request_holds_their_public_halves(
        self, site: Membership, identity: SiteKey
    ) -> None:
        assert stat.S_IMODE(site.folder.stat().st_mode) == 0o700
        assert {path.name for path in site.folder.iterdir()} == {
            "tls.key",
            "node.key",
            "request.json",
        }
        for path in (site.key_path, site.node_key_path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        request = site.request
        assert (request.member, request.identity) == (ALDER, identity.public_key)
        node = load_ssh_private_key(site.node_key_path.read_bytes(), password=None)
        assert isinstance(node, ec.EllipticCurvePrivateKey)
        assert node.curve.name == "secp384r1"
        assert request.node_key is not None
        assert load_ssh_public_key(request.node_key.encode()) == node.public_key()
        key = load_pem_private_key(site.key_path.read_bytes(), password=None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        assert key.private_numbers() == site.key.private_numbers()
        text = site.request_path.read_text()
        assert "PRIVATE" not in text

    def test_an_auditor_has_no_node_key(self, tmp_path: Path, identity: SiteKey) -> None:
        auditor = Member("auditor", "eve")
        request = Membership.create(tmp_path / "audit", auditor, identity, with_node_key=False)
        assert request.node_key is None
        assert not Membership(tmp_path / "audit").node_key_path.exists()

    def test_a_second_request_is_refused_and_changes_nothing(
        self, site: Membership, identity: SiteKey
    ) -> None:
        before = contents(site.folder)
        with pytest.raises(ConfigurationError, match=r"holds a request already: send .*request"):
            Membership.create(site.folder, ALDER, identity, with_node_key=True)
        assert contents(site.folder) == before

    def test_wherever_it_breaks_off_it_can_be_begun_again(
        self, tmp_path: Path, identity: SiteKey, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / "federation"
        written = 0

        def breaking(at: int) -> Callable[[Path, bytes], None]:
            def write(path: Path, content: bytes) -> None:
                nonlocal written
                if written == at:
                    raise OSError(28, "No space left on device")
                written += 1
                path.write_bytes(content)

            return write

        for at in range(3):
            written = 0
            monkeypatch.setattr(module, "write_durably", breaking(at))
            with pytest.raises(ConfigurationError, match="cannot be written: No space left"):
                Membership.create(folder, ALDER, identity, with_node_key=True)
            assert Membership(folder).state == "absent"
        monkeypatch.undo()
        request = Membership.create(folder, ALDER, identity, with_node_key=True)
        assert Membership(folder).request == request

    def test_there_is_no_request_before(self, tmp_path: Path) -> None:
        absent = Membership(tmp_path / "federation")
        assert absent.state == "absent"
        with pytest.raises(ConfigurationError, match="fedcmr site request"):
            _ = absent.member


class TestJoin:
    def test_a_kit_is_pinned(self, site: Membership, authority: Authority) -> None:
        assert site.state == "asked"
        kit = kit_for(site.request, authority)
        site.join(kit)
        assert (site.state, site.kit) == ("joined", kit)
        assert site.pinned == (fingerprint(authority.certificate), COORDINATOR_KEY)
        assert site.authority_path.read_text() == kit.authority
        assert certificate_pem(site.certificate) == kit.certificate
        site.require_joined()
        credentials, route = site.credentials(), site.route(None)
        assert (credentials.key, credentials.certificate) == (site.key_path, site.certificate_path)
        assert route.address == "fl.example.org:8443"
        for protocol in ("http/1.1", "h2"):
            credentials.tls_context(protocol)

    def test_nothing_of_a_federation_is_known_before(self, site: Membership) -> None:
        for ask in (lambda: site.kit, lambda: site.pinned, site.require_joined, site.credentials):
            with pytest.raises(ConfigurationError, match=r"not joined yet: send request\.json"):
                ask()

    @pytest.mark.parametrize("member", [Member("site", "birch"), Member("auditor", "alder")])
    def test_a_kit_of_another_member_is_refused(
        self, site: Membership, authority: Authority, member: Member
    ) -> None:
        with pytest.raises(ConfigurationError, match=f"is for {member.role} {member.name}, but"):
            site.join(kit_for(site.request, authority, member=member))
        assert site.state == "asked"

    def test_a_kit_for_another_key_is_refused(self, site: Membership, authority: Authority) -> None:
        """As when the folder was made anew after the request had been sent."""
        certificate = issue_member(authority, certificate_request(new_key(), ALDER), ALDER)
        kit = kit_for(site.request, authority, certificate=certificate_pem(certificate))
        with pytest.raises(ConfigurationError, match=r"not for the key in .*tls\.key"):
            site.join(kit)
        assert {path.name for path in site.folder.iterdir()} == {
            "tls.key",
            "node.key",
            "request.json",
        }

    def test_an_expired_kit_is_refused(self, site: Membership, authority: Authority) -> None:
        past = datetime.now(UTC) - timedelta(days=MEMBER_DAYS + 1)
        kit = kit_for(site.request, authority, now=past)
        with pytest.raises(ConfigurationError, match=r"the kit expired on \d{4}-\d\d-\d\d: ask"):
            site.join(kit)

    def test_a_second_federation_is_refused(self, joined: Membership) -> None:
        before = contents(joined.folder)
        other = new_authority("livers")
        for kit in (
            kit_for(joined.request, other, federation="livers"),
            kit_for(joined.request, other),  # the same name
        ):
            with pytest.raises(ConfigurationError, match="belongs to federation hearts"):
                joined.join(kit)
        assert contents(joined.folder) == before

    def test_another_coordinator_key_is_refused(
        self, joined: Membership, authority: Authority
    ) -> None:
        """Or whoever holds the authority could sign jobs with a key of their own."""
        with pytest.raises(ConfigurationError, match="another authority or coordinator key"):
            joined.join(kit_for(joined.request, authority, coordinator_key="d" * 64))

    def test_a_later_kit_may_bring_another_address_and_certificate(
        self, joined: Membership, authority: Authority
    ) -> None:
        kit = kit_for(joined.request, authority, host="moved.example.org", port=443)
        joined.join(kit)
        assert joined.route(None).address == "moved.example.org:443"
        assert certificate_pem(joined.certificate) == kit.certificate

    def test_half_a_join_is_none(
        self, site: Membership, authority: Authority, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kit = kit_for(site.request, authority)

        def write(path: Path, content: bytes) -> None:
            if path.name == "kit.json":
                raise OSError(5, "Input/output error")
            path.write_bytes(content)

        monkeypatch.setattr(module, "write_durably", write)
        with pytest.raises(ConfigurationError, match=r"kit\.json cannot be written"):
            site.join(kit)
        assert site.state == "asked"
        with pytest.raises(ConfigurationError, match="not joined yet"):
            site.credentials()
        monkeypatch.undo()
        site.join(kit)
        site.require_joined()


class TestRenewal:
    def renewed(self, member: Membership, authority: Authority, days: float = 1) -> str:
        now = datetime.now(UTC) + timedelta(days=days)
        return certificate_pem(
            issue_member(authority, member.renewal_request(), member.member, now)
        )

    def test_a_renewed_certificate_is_shown_from_then_on(
        self, joined: Membership, authority: Authority
    ) -> None:
        kit, key = joined.kit, joined.key_path.read_bytes()
        pem = self.renewed(joined, authority)
        joined.replace_certificate(pem)
        assert certificate_pem(joined.certificate) == pem
        assert (joined.kit, joined.key_path.read_bytes()) == (kit, key)

    def test_what_does_not_fit_is_refused_and_the_old_one_stays(
        self, joined: Membership, authority: Authority
    ) -> None:
        before = contents(joined.folder)
        birch = Member("site", "birch")
        stranger = certificate_request(new_key(), ALDER)
        request = joined.renewal_request()
        soon = datetime.now(UTC) + timedelta(days=1)
        refused = {
            "did not sign it": issue_member(new_authority("hearts"), request, ALDER, soon),
            "not for the key": issue_member(authority, stranger, ALDER, soon),
            "another member": issue_member(authority, request, birch, soon),
            "no member": issue_server(authority, joined.key, ["fl.example.org"], soon),
            "ends before": issue_member(authority, request, ALDER, soon - timedelta(days=9)),
        }
        for reason, certificate in refused.items():
            with pytest.raises(ConfigurationError, match=reason):
                joined.replace_certificate(certificate_pem(certificate))
        with pytest.raises(ConfigurationError, match="not a certificate"):
            joined.replace_certificate("certificate")
        assert contents(joined.folder) == before


class TestNewKey:
    """The new key takes its place together with its certificate, whatever happens in between."""

    def issue(self, member: Membership, authority: Authority) -> str:
        request = member.renewal_request(new_key=True)
        return certificate_pem(issue_member(authority, request, member.member))

    def test_key_and_certificate_change_together(
        self, joined: Membership, authority: Authority
    ) -> None:
        before = joined.key_path.read_bytes()
        pem = self.issue(joined, authority)
        assert joined.changing_key
        assert joined.key_path.read_bytes() == before
        joined.credentials().tls_context("h2")  # the old ones still go together
        joined.replace_certificate(pem)
        assert not joined.changing_key
        assert joined.key_path.read_bytes() != before
        assert stat.S_IMODE(joined.key_path.stat().st_mode) == 0o600
        assert certificate_pem(joined.certificate) == pem
        joined.credentials().tls_context("h2")

    def test_a_later_kit_for_the_request_fits_the_new_key(
        self, joined: Membership, authority: Authority, identity: SiteKey
    ) -> None:
        old = joined.request
        joined.replace_certificate(self.issue(joined, authority))
        stale = issue_member(authority, old.certificate_request, joined.member)
        with pytest.raises(ConfigurationError, match="not for the key"):
            joined.replace_certificate(certificate_pem(stale))
        joined.write_request(identity)
        asked = EnrolmentRequest.read(joined.request_path)
        assert (asked.identity, asked.node_key) == (old.identity, old.node_key)
        fresh = issue_member(authority, asked.certificate_request, joined.member)
        joined.replace_certificate(certificate_pem(fresh))

    def test_a_crash_between_the_two_is_mended_at_the_next_look(
        self, joined: Membership, authority: Authority, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pem = self.issue(joined, authority)

        def killed(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(module.os, "replace", killed)
        monkeypatch.setattr(
            module, "write_durably", lambda path, content: path.write_bytes(content)
        )
        with pytest.raises(KeyboardInterrupt):
            joined.replace_certificate(pem)
        monkeypatch.undo()
        joined.require_joined()
        joined.credentials().tls_context("h2")
        assert not joined.changing_key

    def test_a_certificate_for_the_old_key_keeps_that(
        self, joined: Membership, authority: Authority
    ) -> None:
        before = joined.key_path.read_bytes()
        joined.renewal_request(new_key=True)
        request = joined.renewal_request()
        later = datetime.now(UTC) + timedelta(days=1)
        joined.replace_certificate(
            certificate_pem(issue_member(authority, request, joined.member, later))
        )
        assert joined.key_path.read_bytes() == before
        assert joined.changing_key


class TestExpiryAndLeave:
    def test_an_expired_certificate_says_what_to_do(self, joined: Membership) -> None:
        later = datetime.now(UTC) + timedelta(days=MEMBER_DAYS + 1)
        with pytest.raises(ConfigurationError, match="ask the coordinator for a new kit") as found:
            joined.require_joined(later)
        assert f"expired on {joined.certificate.not_valid_after_utc:%Y-%m-%d}" in str(found.value)
        assert "set this machine's clock" in str(found.value)

    def test_who_left_does_not_take_part_until_a_new_kit(
        self, joined: Membership, authority: Authority
    ) -> None:
        keys = joined.key_path.read_bytes(), joined.node_key_path.read_bytes()
        joined.leave(datetime(2027, 3, 1, 12, tzinfo=UTC))
        assert (joined.state, joined.left_at) == ("left", datetime(2027, 3, 1, 12, tzinfo=UTC))
        with pytest.raises(ConfigurationError, match="left the federation on 2027-03-01"):
            joined.require_joined()
        assert (joined.key_path.read_bytes(), joined.node_key_path.read_bytes()) == keys
        joined.join(kit_for(joined.request, authority))
        assert joined.state == "joined"
        joined.require_joined()

    def test_a_damaged_mark_still_counts(self, joined: Membership) -> None:
        joined.leave()
        (joined.folder / "left.json").write_text("{")
        with pytest.raises(ConfigurationError, match=r"left\.json is damaged"):
            joined.require_joined()


class TestDamage:
    def test_a_lost_or_foreign_key_is_named(self, joined: Membership) -> None:
        joined.key_path.unlink()
        with pytest.raises(ConfigurationError, match=r"tls\.key cannot be read .*backup"):
            joined.credentials()
        joined.key_path.write_text("no key")
        with pytest.raises(ConfigurationError, match=r"tls\.key: not a private key"):
            joined.require_joined()
        joined.key_path.write_bytes(key_pem(new_key()))
        with pytest.raises(ConfigurationError, match="is not for the key"):
            joined.credentials()

    def test_an_edited_kit_or_request_is_refused(self, joined: Membership) -> None:
        kit = json.loads((joined.folder / "kit.json").read_text())
        kit["authority"] = certificate_pem(new_authority("hearts").certificate)
        (joined.folder / "kit.json").write_text(json.dumps(kit))
        with pytest.raises(ConfigurationError, match=r"kit\.json"):
            _ = joined.pinned
        request = json.loads(joined.request_path.read_text())
        joined.request_path.write_text(json.dumps({**request, "name": "birch"}))
        with pytest.raises(ConfigurationError, match=r"request\.json"):
            _ = joined.member

    def test_a_replaced_certificate_file_is_refused(
        self, joined: Membership, authority: Authority
    ) -> None:
        stranger = issue_member(authority, certificate_request(new_key(), ALDER), ALDER)
        joined.certificate_path.write_text(certificate_pem(stranger))
        with pytest.raises(ConfigurationError, match="not for the key"):
            joined.credentials()
        joined.certificate_path.unlink()
        with pytest.raises(ConfigurationError, match="join with the kit again"):
            joined.credentials()
