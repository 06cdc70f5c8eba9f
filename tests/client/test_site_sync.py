"""An agent's side of the governance service, against the real one."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

import pytest
from coordinator_parties import Party, new_home
from flower_parties import wait_for

from fedcmr_client import site_sync
from fedcmr_client.governance import Governance
from fedcmr_client.roster_news import RosterNews
from fedcmr_client.site_home import SiteHome
from fedcmr_client.site_sync import SiteSync
from fedcmr_server.governance import serve
from fedcmr_server.home import CoordinatorHome
from fedcmr_server.members import end_membership, enrol
from fedcmr_server.store import Certificates, Checkpoints, Jobs, Members, Receipts, Rosters, Store
from fedcmr_shared.errors import ConnectionProblem, FederationError
from fedcmr_shared.identity.certificates import (
    MEMBER_DAYS,
    Member,
    certificate_pem,
    days_left,
    issue_member,
    read_certificate,
)
from fedcmr_shared.identity.enrolment import StartupKit
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.privacy import PrivacySpec

WARD = [f"p-{number}" for number in range(6)]


def job_of(name: str) -> JobSpec:
    return JobSpec(
        name=name,
        rounds=2,
        minimum_sites=1,
        aggregation="plain_with_local_dp",
        privacy=PrivacySpec(noise_multiplier=8.0),
    )


@dataclass
class Federation:
    """A coordinator's service on a socket, and one site that has joined."""

    coordinator: CoordinatorHome
    store: Store
    site: SiteHome
    target: str

    def governance(self) -> Governance:
        """Call as the site; the metadata is the gateway's, which is not here."""
        certificate = certificate_pem(self.site.membership.certificate)
        return Governance(self.target, [("x-fedcmr-certificate", quote(certificate, safe=""))])

    def sync(self, **options: Callable[[], bool]) -> None:
        with self.governance() as governance:
            SiteSync(self.site, self.target, 60, **options).once(governance)

    def condition(self) -> str | None:
        member = Members(self.store).find("alder")
        assert member is not None
        return member.condition

    def admit(self, job: JobSpec) -> None:
        with self.site.open_ledger() as ledger:
            ledger.admit(
                job,
                policy_sha256=self.site.policy.sha256,
                training=WARD[:4],
                evaluation=WARD[4:],
            )

    def begin(self, job: JobSpec, number: int) -> None:
        with self.site.open_ledger() as ledger:
            ledger.start(job.sha256, "train", number)

    def receipts(self, job: JobSpec) -> list[tuple[int, int]]:
        return [(row.round, row.attempt) for row in Receipts(self.store).of(job.sha256)]


@pytest.fixture
def federation(
    make_home: Callable[..., SiteHome], make_site: Callable[..., Path], tmp_path: Path
) -> Iterator[Federation]:
    site = make_home(make_site("alder", 1), roster=tmp_path / "roster.yaml")
    membership = site.membership
    asked = membership.create(
        membership.folder, Member("site", "alder"), site.identity(), with_node_key=True
    )
    with TemporaryDirectory(prefix="fedcmr-test-") as short:
        coordinator = new_home(Path(short) / "coordinator")
        with coordinator.store() as store:
            for name in ("birch", "cedar"):
                Party.make(tmp_path / name, name).join(coordinator, store)
            membership.join(enrol(coordinator, store, asked).kit)
            socket = coordinator.run / "governance.sock"
            server = serve(coordinator, store, socket)
            try:
                yield Federation(coordinator, store, site, f"unix:{socket}")
            finally:
                server.stop(None).wait()


def test_one_pass_reports_publishes_and_learns(federation: Federation) -> None:
    federation.sync()
    assert federation.condition() == "ready"
    newest = RosterNews(federation.site).newest
    assert newest is not None
    assert set(newest.roster.sites) == {"alder", "birch", "cedar"}
    published = Checkpoints(federation.store).newest("alder")
    assert published is not None
    with federation.site.open_ledger() as ledger:
        assert published.root == ledger.checkpoint().root
    federation.sync()


def test_tells_how_the_site_is_in_one_word(federation: Federation) -> None:
    federation.sync(attention=lambda: True)
    assert federation.condition() == "attention"
    federation.site.pause.pause("moving")
    federation.sync(attention=lambda: True)
    assert federation.condition() == "paused"


def test_receipts_of_this_coordinators_jobs_arrive_once_and_no_others(
    federation: Federation,
) -> None:
    ours, theirs = job_of("ours"), job_of("theirs")
    Jobs(federation.store).submit(ours, None, None)
    for job in (ours, theirs):
        federation.admit(job)
        federation.begin(job, 1)
    federation.sync()
    assert (federation.receipts(ours), federation.receipts(theirs)) == ([(1, 1)], [])
    federation.begin(ours, 1)  # again, as after a crash
    federation.begin(ours, 2)
    federation.sync()
    federation.sync()
    assert sorted(federation.receipts(ours)) == [(1, 1), (1, 2), (2, 1)]


def test_a_certificate_is_renewed_in_time_and_not_before(federation: Federation) -> None:
    membership, coordinator = federation.site.membership, federation.coordinator
    federation.sync()
    before = membership.certificate
    federation.sync()
    assert membership.certificate == before
    # The same site, of which the coordinator knows an older certificate.
    old = issue_member(
        coordinator.authority(),
        membership.request.certificate_request,
        membership.member,
        datetime.now(UTC) - timedelta(days=MEMBER_DAYS - 20),
    )
    _replace(federation, certificate_pem(old))
    assert 19 < days_left(membership.certificate) < 21
    federation.sync()
    assert days_left(membership.certificate) > MEMBER_DAYS - 1
    federation.sync()  # with the new one


def _replace(federation: Federation, certificate: str) -> None:
    Certificates(federation.store).add("alder", read_certificate(certificate))
    federation.site.membership.certificate_path.write_text(certificate)


def test_a_change_of_the_key_whose_answer_was_lost_is_made_again(
    federation: Federation,
) -> None:
    membership = federation.site.membership
    before = membership.key_path.read_bytes()
    with federation.governance() as governance:
        governance.renew(membership.renewal_request(new_key=True))
    assert membership.changing_key
    federation.sync()
    assert not membership.changing_key
    assert membership.key_path.read_bytes() != before
    federation.sync()


def test_an_announced_job_is_told_once_with_what_speaks_against_it(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    Jobs(federation.store).submit(job_of("ours"), None, None)
    with federation.governance() as governance, caplog.at_level("INFO", "fedcmr.site"):
        sync = SiteSync(federation.site, federation.target, 60)
        sync.once(governance)
        sync.once(governance)
    told = [line for line in caplog.messages if "is announced" in line]
    assert told == ["job ours is announced; against it: signature"]


def test_one_deed_that_fails_stops_no_other(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chain of the roster is broken; checkpoints still arrive, and the error is told."""
    twice = 2 * Rosters(federation.store).history()
    monkeypatch.setattr(Governance, "roster_history", lambda self: twice)
    with pytest.raises(FederationError, match="roster version 2 does not follow"):
        federation.sync()
    assert Checkpoints(federation.store).newest("alder") is not None
    assert RosterNews(federation.site).newest is None


@pytest.mark.parametrize(
    ("ahead_s", "said"),
    [
        (5.0, None),
        (-300.0, None),
        (86_400.0, "clock is 1 day, 0:00:00 ahead of the coordinator's"),
        (-3601.2, "clock is 1:00:01 behind the coordinator's"),
    ],
)
def test_a_site_whose_clock_is_off_is_told_so(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, ahead_s: float, said: str | None
) -> None:
    monkeypatch.setattr(Governance, "report", lambda self, condition: ahead_s)
    sync = SiteSync(federation.site, federation.target, 60)
    with federation.governance() as governance:
        if said is None:
            sync.once(governance)
            assert sync.clock_problem is None
            return
        with pytest.raises(ConnectionProblem, match=said):
            sync.once(governance)
        assert said in str(sync.clock_problem)
        assert Checkpoints(federation.store).newest("alder") is None, "no entry with that time"
        monkeypatch.setattr(Governance, "report", lambda self, condition: 0.0)
        sync.once(governance)
    assert sync.clock_problem is None


def test_who_was_thrown_out_learns_it(federation: Federation) -> None:
    federation.sync()
    end_membership(federation.coordinator, federation.store, "alder", "revoked", "lost key")
    with pytest.raises(ConnectionProblem, match="refuses this member"):
        federation.sync()


def test_a_hurried_sync_learns_at_once_that_the_site_was_revoked(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site_sync, "Governance", lambda target, wait: federation.governance())
    sync = SiteSync(federation.site, federation.target, 3600)
    sync.start()
    try:
        wait_for("the first pass", lambda: Checkpoints(federation.store).newest("alder"))
        assert (sync.problem, sync.rejection) == (None, None)
        end_membership(federation.coordinator, federation.store, "alder", "revoked", "lost key")
        sync.hurry()
        said = wait_for("the refusal", lambda: sync.rejection)
    finally:
        sync.stop()
    assert "revoked: ask the coordinator" in said


def test_the_thread_goes_on_after_failures_and_says_goodbye(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site_sync, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(site_sync, "Governance", lambda target, wait: federation.governance())
    reports: list[str] = []
    real = Governance.report

    def report(self: Governance, condition: str) -> float:
        reports.append(condition)
        if len(reports) < 3:
            raise ConnectionProblem("unreachable", "the service is starting")
        return real(self, condition)  # type: ignore[arg-type]

    monkeypatch.setattr(Governance, "report", report)
    sync = SiteSync(federation.site, federation.target, 60)
    assert sync.problem is None
    sync.start()
    try:
        wait_for("a failure", lambda: sync.problem == "the service is starting" or len(reports) > 2)
        wait_for("a success", lambda: len(reports) > 2 and sync.problem is None)
    finally:
        sync.stop()
    assert reports[-1] == "stopping"
    assert federation.condition() == "stopping"


def test_a_thread_that_broke_down_is_a_problem(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    monkeypatch.setattr(site_sync, "Governance", None)
    sync = SiteSync(federation.site, federation.target, 60)
    sync.start()
    wait_for("the end", lambda: sync.problem)
    assert "restart the agent" in str(sync.problem)
    sync.stop()


def test_a_kit_from_the_real_coordinator_is_pinned(federation: Federation) -> None:
    kit: StartupKit = federation.site.membership.kit
    assert kit.coordinator_key == federation.coordinator.identity().public_key
    assert federation.site.membership.pinned[0] == federation.coordinator.federation_sha256
