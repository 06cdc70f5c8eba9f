"""One contract for the coordinator's database in SQLite and in a real PostgreSQL server."""

import math
import os
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import psycopg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509 import Certificate
from databases import NewDatabase
from sqlalchemy import inspect, text
from sqlalchemy.exc import StatementError

from fedcmr_server.job_states import MOST_LOSSES, TransitionRefused
from fedcmr_server.store import (
    AccessLog,
    Certificates,
    Checkpoints,
    Events,
    Jobs,
    Members,
    Receipts,
    Releases,
    Rosters,
    Rounds,
    Store,
    StoreUnreachable,
    Tokens,
    database,
    open_store,
)
from fedcmr_server.store.members import GRACE
from fedcmr_server.store.tables import Base, ReleaseRow, TokenRow
from fedcmr_shared.errors import ConfigurationError, FederationError
from fedcmr_shared.identity.certificates import (
    Authority,
    Member,
    certificate_request,
    fingerprint,
    issue_member,
    new_authority,
    new_key,
    serial,
)
from fedcmr_shared.identity.keys import SiteKey
from fedcmr_shared.identity.roster import Roster, new_roster
from fedcmr_shared.identity.roster_history import next_version, verify_history
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.ledger import Checkpoint

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
ALDER, BIRCH = Member("site", "alder"), Member("site", "birch")
ROSTER = Roster.model_validate({"sites": {name: 64 * name for name in "abc"}})
JOB = JobSpec()


@pytest.fixture
def url(new_database: NewDatabase) -> str:
    return new_database()


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with open_store(url) as store:
        yield store


@pytest.fixture(scope="module")
def authority() -> Authority:
    return new_authority("test", NOW)


def certificate(authority: Authority, member: Member, now: datetime = NOW) -> Certificate:
    return issue_member(authority, certificate_request(new_key(), member), member, now)


def submit(store: Store, **changes: object) -> str:
    job = JOB.model_copy(update=changes)
    return Jobs(store).submit(job, None, ROSTER).id


def together(work: list[Callable[[], object]]) -> list[int]:
    """Do all of ``work`` at once, each in a process of its own; return the exit codes."""
    ready, ready_in = os.pipe()
    go, go_in = os.pipe()
    children = []
    for each in work:
        child = os.fork()
        if child == 0:
            code = 99
            try:
                os.close(go_in)
                os.write(ready_in, b"r")
                os.read(go, 1)  # ends when the parent closes its end
                code = int(bool(each()))
            finally:
                os._exit(code)
        children.append(child)
    for _ in work:
        os.read(ready, 1)
    os.close(go_in)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    for descriptor in (ready, ready_in, go):
        os.close(descriptor)
    return codes


class TestDatabase:
    def test_migrations_make_the_declared_tables(self, store: Store) -> None:
        with store.engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"compare_server_default": True})
            assert compare_metadata(context, Base.metadata) == []

    def test_migrations_lead_back_and_forth(self, store: Store) -> None:
        config = database.migration_config()
        with store.engine.begin() as connection:
            config.attributes["connection"] = connection
            command.downgrade(config, "base")
        assert inspect(store.engine).get_table_names() == ["alembic_version"]
        url = store.engine.url.render_as_string()
        with open_store(url) as again:
            assert {"jobs", "events"} < set(inspect(again.engine).get_table_names())

    def test_rows_outlive_the_store(self, store: Store, url: str) -> None:
        job = submit(store)
        store.close()
        with open_store(url) as again:
            assert Jobs(again).get(job).name == JOB.name

    def test_several_processes_may_open_an_empty_database(self, url: str) -> None:
        assert together([lambda: open_store(url).close()] * 3) == [0, 0, 0]
        with open_store(url) as store:
            assert Jobs(store).all() == []

    def test_a_newer_database_is_refused(self, store: Store, url: str) -> None:
        with store.engine.begin() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        with pytest.raises(FederationError, match="revision 9999: a newer FedCMR made it"):
            open_store(url)

    def test_what_fails_in_a_transaction_leaves_nothing(self, store: Store) -> None:
        def half() -> None:
            with store.writing() as session:
                session.add(TokenRow(sha256="0" * 64, label="x", expires_at=NOW))
                session.flush()
                raise KeyError

        with pytest.raises(KeyError):
            half()
        assert together([lambda: 0]) == [0]
        with store.reading() as session:
            assert session.get(TokenRow, "0" * 64) is None

    def test_a_statement_that_the_database_refuses_is_one_error(self, store: Store) -> None:
        with (
            pytest.raises(FederationError, match=r"database (refuses|cannot be reached)"),
            store.writing() as session,
        ):
            session.execute(text("SELECT * FROM nowhere"))

    def test_times_come_back_in_utc_and_need_a_zone(self, store: Store) -> None:
        east = NOW.astimezone(timezone(timedelta(hours=5)))
        with store.writing() as session:
            session.add(TokenRow(sha256="1" * 64, label="x", expires_at=east))
        with store.reading() as session:
            row = session.get(TokenRow, "1" * 64)
        assert row is not None
        assert (row.expires_at, row.expires_at.tzinfo) == (NOW, UTC)
        naive = NOW.replace(tzinfo=None)
        with (
            pytest.raises(StatementError, match="has no time zone"),
            store.writing() as session,
        ):
            session.add(TokenRow(sha256="2" * 64, label="x", expires_at=naive))

    def test_a_reader_does_not_wait_for_a_writer(self, store: Store) -> None:
        job = submit(store)
        with store.writing() as session:
            session.add(TokenRow(sha256="3" * 64, label="x", expires_at=NOW))
            session.flush()
            assert Jobs(store).get(job).state == "submitted"


class TestUrl:
    @pytest.mark.parametrize(
        ("url", "message"),
        [
            ("mysql://host/db", "names mysql: use sqlite:///FILE or postgresql"),
            ("not a url", "not a database URL"),
            ("sqlite://", "names no file"),
            ("sqlite:///:memory:", "names no file"),
            ("postgresql+psycopg://me:hush@db/x", "holds a password: remove it, use PGPASSWORD"),
            ("postgresql+psycopg://me@db/x?password=hush", "holds a password"),
        ],
    )
    def test_other_databases_and_passwords_are_refused(self, url: str, message: str) -> None:
        with pytest.raises(ConfigurationError, match=message) as refusal:
            open_store(url)
        assert "hush" not in str(refusal.value)

    @pytest.mark.parametrize(
        "url", ["sqlite:///{}/absent/x.sqlite", "postgresql+psycopg://fedcmr@/x?host={}"]
    )
    def test_an_unreachable_database_is_named(self, tmp_path: Path, url: str) -> None:
        with pytest.raises(StoreUnreachable, match=r"database cannot be reached: .*start it, or"):
            open_store(url.format(tmp_path))


class TestOutage:
    """The server goes away: its socket is moved, and its connections are cut."""

    @pytest.fixture
    def url(self, postgresql: str, create_database: Callable[[], str]) -> str:
        return f"postgresql+psycopg://fedcmr@/{create_database()}?host={postgresql}"

    @pytest.fixture
    def stop(self, postgresql: str, url: str) -> Iterator[Callable[[], None]]:
        socket, away = Path(postgresql, ".s.PGSQL.5432"), Path(postgresql, "away")

        def stop() -> None:
            with psycopg.connect(host=postgresql, user="fedcmr", dbname="postgres") as admin:
                socket.rename(away)
                admin.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
                )

        yield stop
        if away.exists():
            away.rename(socket)

    def test_a_stopped_server_is_named_and_found_again(
        self, store: Store, stop: Callable[[], None], postgresql: str
    ) -> None:
        job = submit(store)
        stop()
        with pytest.raises(StoreUnreachable, match="coordinator's database cannot be reached"):
            Jobs(store).get(job)
        Path(postgresql, "away").rename(Path(postgresql, ".s.PGSQL.5432"))
        assert Jobs(store).get(job).id == job

    def test_patience_waits_for_the_server(
        self,
        url: str,
        stop: Callable[[], None],
        postgresql: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        waited = []

        def come_back(seconds: float) -> None:
            waited.append(seconds)
            Path(postgresql, "away").rename(Path(postgresql, ".s.PGSQL.5432"))

        with open_store(url, patience_s=60) as store:
            job = submit(store)
            stop()
            monkeypatch.setattr("fedcmr_server.store.database.time.sleep", come_back)
            Jobs(store).change(job, "start", run="a")
            assert waited == [1.0]
            assert Jobs(store).get(job).run == "a"

    def test_a_transaction_that_breaks_off_is_not_repeated(
        self, url: str, stop: Callable[[], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            "fedcmr_server.store.database.time.sleep", lambda _: pytest.fail("tried again")
        )

        def break_off(store: Store) -> None:
            with store.writing() as session:
                session.add(TokenRow(sha256="4" * 64, label="x", expires_at=NOW))
                session.flush()
                stop()

        with open_store(url, patience_s=60) as store, pytest.raises(StoreUnreachable):
            break_off(store)


class TestMembers:
    def test_a_member_comes_and_goes(self, store: Store) -> None:
        members = Members(store)
        row = members.add(ALDER, "a" * 64, "node a", NOW)
        assert (row.state, row.since, row.role) == ("active", NOW, "site")
        members.seen("alder", "fedcmr 0.2", NOW)
        found = members.find("alder")
        assert found is not None
        assert (found.seen_at, found.software) == (NOW, "fedcmr 0.2")
        ended = members.end("alder", "left", "the study is over", NOW)
        assert (ended.state, ended.reason) == ("left", "the study is over")
        assert members.find("alder") is None
        assert members.active() == []

    def test_a_name_comes_back_with_other_keys(self, store: Store) -> None:
        members = Members(store)
        members.add(ALDER, "a" * 64, "node a")
        members.end("alder", "revoked", "a lost laptop")
        again = members.add(ALDER, "b" * 64, "node b")
        assert [row.id for row in members.active()] == [again.id]
        assert [row.state for row in members.all()] == ["revoked", "active"]

    @pytest.mark.parametrize(
        ("member", "identity", "node_key"),
        [(ALDER, "b", "node b"), (BIRCH, "a", "node b"), (BIRCH, "b", "node a")],
    )
    def test_a_name_or_key_twice_is_refused(
        self, store: Store, member: Member, identity: str, node_key: str
    ) -> None:
        members = Members(store)
        members.add(ALDER, 64 * "a", "node a")
        with pytest.raises(FederationError, match="name is in use, or one of its keys"):
            members.add(member, 64 * identity, node_key)
        assert len(members.all()) == 1

    def test_keys_of_a_revoked_member_never_come_back(self, store: Store) -> None:
        members = Members(store)
        members.add(ALDER, "a" * 64, "node a")
        members.end("alder", "revoked", "stolen")
        with pytest.raises(FederationError, match="was used before"):
            members.add(BIRCH, "a" * 64, "node b")

    def test_auditors_need_no_node_key(self, store: Store) -> None:
        members = Members(store)
        members.add(Member("auditor", "oak"), "a" * 64, None)
        members.add(Member("auditor", "pine"), "b" * 64, None)
        assert [row.name for row in members.active()] == ["oak", "pine"]

    def test_strangers_are_named(self, store: Store) -> None:
        for ask in (
            lambda: Members(store).end("alder", "left", "x"),
            lambda: Members(store).seen("alder", "x"),
        ):
            with pytest.raises(FederationError, match="no active member is called alder"):
                ask()


class TestCertificates:
    def test_only_an_active_certificate_of_an_active_member_passes(
        self, store: Store, authority: Authority
    ) -> None:
        members, certificates = Members(store), Certificates(store)
        members.add(ALDER, "a" * 64, "node a", NOW)
        first, second = (certificate(authority, ALDER) for _ in range(2))
        certificates.add("alder", first)
        found = certificates.holder(fingerprint(first), NOW)
        assert found is not None
        assert (found[0].name, found[0].node_key) == ("alder", "node a")
        for moment in (NOW - timedelta(days=1), NOW + timedelta(days=366)):
            assert certificates.holder(fingerprint(first), moment) is None
        assert certificates.holder(fingerprint(second), NOW) is None

        certificates.add("alder", second, replaces_others=True, grace=GRACE)
        assert certificates.holder(fingerprint(first), NOW) is not None
        later = datetime.now(UTC) + GRACE + timedelta(minutes=1)
        assert certificates.holder(fingerprint(first), later) is None
        assert certificates.holder(fingerprint(second), later) is not None
        assert sorted(row.state for row in certificates.of("alder")) == ["active", "replaced"]

        members.end("alder", "revoked", "a lost laptop", NOW)
        for issued in (first, second):
            assert certificates.holder(fingerprint(issued), NOW) is None
        assert sorted(row.state for row in certificates.of("alder")) == ["replaced", "revoked"]

    def test_one_certificate_can_be_revoked(self, store: Store, authority: Authority) -> None:
        certificates = Certificates(store)
        Members(store).add(ALDER, "a" * 64, "node a")
        kept = certificate(authority, ALDER)
        row = certificates.add("alder", kept)
        assert row.serial == serial(kept)
        certificates.revoke(row.serial, "key seen elsewhere", NOW)
        assert certificates.holder(fingerprint(kept), NOW) is None
        with pytest.raises(FederationError, match=r"certificate with serial number .* is in use"):
            certificates.revoke(row.serial, "again")

    def test_strangers_and_repetitions_are_refused(
        self, store: Store, authority: Authority
    ) -> None:
        certificates, kept = Certificates(store), certificate(authority, ALDER)
        with pytest.raises(FederationError, match="no active member is called alder"):
            certificates.add("alder", kept)
        Members(store).add(ALDER, "a" * 64, "node a")
        certificates.add("alder", kept)
        with pytest.raises(FederationError, match="kept already"):
            certificates.add("alder", kept, replaces_others=True)
        assert certificates.holder(fingerprint(kept), NOW) is not None

    def test_expiry_is_announced(self, store: Store, authority: Authority) -> None:
        certificates = Certificates(store)
        for member, digit, age in ((ALDER, "a", 350), (BIRCH, "b", 0)):
            Members(store).add(member, digit * 64, f"node {digit}")
            issued = certificate(authority, member, NOW - timedelta(days=age))
            certificates.add(member.name, issued)
        soon = certificates.expiring(NOW + timedelta(days=30))
        assert [member.name for member, _ in soon] == ["alder"]


class TestRosters:
    def test_versions_form_a_signed_chain(self, store: Store) -> None:
        rosters, key = Rosters(store), SiteKey(Ed25519PrivateKey.generate())
        assert rosters.newest() is None
        first = next_version([], ROSTER, "founded", key)
        rosters.add(first)
        bigger = new_roster({**ROSTER.sites, "d": "d" * 64})
        second = next_version(rosters.history(), bigger, "d joins", key)
        rosters.add(second)
        assert rosters.history() == [first, second]
        assert rosters.newest() == second
        verify_history(rosters.history(), key.public_key)

    def test_a_version_that_another_one_overtook_is_refused(self, store: Store) -> None:
        rosters, key = Rosters(store), SiteKey(Ed25519PrivateKey.generate())
        rosters.add(next_version([], ROSTER, "founded", key))
        seen = rosters.history()
        rosters.add(next_version(seen, ROSTER, "one", key))
        with pytest.raises(FederationError, match="version 2 does not follow the newest one"):
            rosters.add(next_version(seen, ROSTER, "other", key))
        assert [version.reason for version in rosters.history()] == ["founded", "one"]


class TestJobs:
    def test_a_job_is_submitted_once(self, store: Store) -> None:
        row = Jobs(store).submit(JOB, None, ROSTER, "GPU 0")
        assert (row.id, row.state, row.device) == (JOB.sha256, "submitted", "GPU 0")
        assert JobSpec.model_validate_json(row.spec) == JOB
        assert Roster.model_validate_json(row.roster or "") == ROSTER
        with pytest.raises(FederationError, match="submitted before: change its name or seed"):
            submit(store)
        assert [event["event"] for event in Events(store).as_values(row.id)] == ["submit"]

    def test_a_secure_job_needs_a_roster(self, store: Store) -> None:
        with pytest.raises(FederationError, match="needs a roster"):
            Jobs(store).submit(JOB, None, None)
        plain = JOB.model_copy(update={"aggregation": "plain_with_local_dp"})
        assert Jobs(store).submit(plain, None, None).roster is None

    def test_jobs_are_found_by_id_or_name(self, store: Store) -> None:
        jobs, first = Jobs(store), submit(store, name="one")
        second = submit(store, name="two")
        submit(store, name="two", seed=1)
        assert jobs.find(first[:8]).id == jobs.find("one").id == jobs.find(first).id == first
        assert jobs.find(second).id == second
        with pytest.raises(FederationError, match="'two' means several jobs"):
            jobs.find("two")
        for unknown in ("", "three", "%", "_" * 64):
            with pytest.raises(FederationError, match="is known"):
                jobs.find(unknown)
        with pytest.raises(FederationError, match="no job x is known"):
            jobs.get("x")
        with pytest.raises(FederationError, match="no job x is known"):
            jobs.change("x", "pause")

    def test_changes_are_kept_and_recorded(self, store: Store) -> None:
        jobs, job = Jobs(store), submit(store)
        jobs.change(job, "start", run="a")
        jobs.change(job, "start", run="a")  # said twice, it happened once
        row = jobs.change(job, "run_lost", run="a", reason="no sites")
        assert (row.state, row.run, row.losses, row.reason) == ("running", None, 1, "no sites")
        assert jobs.get(job) == row
        with pytest.raises(TransitionRefused, match="a job that is running takes no `resume`"):
            jobs.change(job, "resume")
        names = [event["event"] for event in Events(store).as_values(job)]
        assert names == ["submit", "start", "run_lost"]
        jobs.change(job, "cancel", reason="no longer wanted")
        assert jobs.all(("running",)) == []
        assert [row.id for row in jobs.all(("cancelled", "failed"))] == [job]

    def test_runs_are_due_after_growing_pauses(self, store: Store) -> None:
        jobs, job = Jobs(store), submit(store)
        assert [row.id for row in jobs.due()] == [job]
        jobs.change(job, "start", run="a")
        assert jobs.due() == []
        row = jobs.change(job, "run_lost", run="a")
        assert jobs.due(row.changed_at + timedelta(seconds=9)) == []
        assert [row.id for row in jobs.due(row.changed_at + timedelta(seconds=10))] == [job]
        for loss in range(1, MOST_LOSSES):
            jobs.change(job, "start", run=str(loss))
            jobs.change(job, "run_lost", run=str(loss), reason="no sites")
        assert jobs.get(job).state == "failed"
        assert jobs.due(NOW + timedelta(days=3650)) == []

    def test_of_processes_that_want_the_same_one_wins(self, store: Store, url: str) -> None:
        wanted = [submit(store, seed=seed) for seed in range(12)]
        store.close()

        def race(name: str) -> int:
            won = 0
            with open_store(url) as own:
                for job in wanted:
                    try:
                        Jobs(own).change(job, "start", run=name)
                        won += 1
                    except TransitionRefused:
                        pass
            return won > len(wanted)

        racers = ["a", "b", "c"]
        assert together([lambda name=name: race(name) for name in racers]) == [0, 0, 0]  # type: ignore[misc]
        for job in wanted:
            starts = [e for e in Events(store).as_values(job) if e["event"] == "start"]
            assert [event["run"] for event in starts] == [Jobs(store).get(job).run]


class TestEvents:
    def test_events_come_back_in_order_whatever_their_values(self, store: Store) -> None:
        events, job = Events(store), submit(store)
        values = {"loss": math.inf, "text": "naïve \x00 ∑", "list": [1, None, {"a": 0.1}]}
        assert events.record(job, "odd", values) == 2
        assert events.record(job, "next", {}) == 3
        assert events.as_values(job)[1:] == [{"event": "odd", **values}, {"event": "next"}]
        assert [row.number for row in events.of(job, after=1)] == [2, 3]
        assert [row.name for row in events.of(job, limit=1)] == ["submit"]
        events.record(job, "figure", {"mean": math.nan})
        assert math.isnan(events.as_values(job)[-1]["mean"])

    def test_writers_at_once_leave_no_gap(self, store: Store, url: str) -> None:
        job = submit(store)
        store.close()

        def write() -> None:
            with open_store(url) as own:
                for number in range(15):
                    Events(own).record(job, "tick", {"number": number})

        assert together([write] * 3) == [0, 0, 0]
        assert [row.number for row in Events(store).of(job)] == list(range(1, 47))

    def test_a_run_that_was_replaced_writes_nothing(self, store: Store) -> None:
        events, jobs, job = Events(store), Jobs(store), submit(store)
        jobs.change(job, "start", run="a")
        events.record(job, "tick", {}, run="a")
        jobs.change(job, "run_lost", run="a")
        jobs.change(job, "start", run="b")
        with pytest.raises(TransitionRefused, match="run a does not carry job cardiomm any more"):
            events.record(job, "tick", {}, run="a")
        jobs.change(job, "cancel")
        with pytest.raises(TransitionRefused, match="the job is cancelled"):
            events.record(job, "tick", {}, run="b")
        assert [e["event"] for e in events.as_values(job)].count("tick") == 1

    def test_attempts_follow_their_rules_in_the_database_too(self, store: Store) -> None:
        events, job = Events(store), submit(store)
        place = {"phase": "train", "round": 1, "attempt": 1}
        events.record(job, "attempt_started", place)
        with pytest.raises(TransitionRefused, match="its number was used before"):
            events.record(job, "attempt_started", place)
        events.record(job, "unmask_asked", place)
        with pytest.raises(TransitionRefused, match="shares of its round were asked for"):
            events.record(job, "attempt_started", {**place, "attempt": 2})
        events.record(job, "attempt_started", {**place, "phase": "evaluate"})


class TestRounds:
    def test_rounds_come_in_turn_and_only_when_over_they_count(self, store: Store) -> None:
        jobs, rounds, job = Jobs(store), Rounds(store), submit(store)
        hashes = ("1" * 64, "2" * 64)
        jobs.change(job, "start", run="a")
        with pytest.raises(TransitionRefused, match="round 1 may not start"):
            rounds.start(job, 1, "a")
        with pytest.raises(TransitionRefused, match="not started takes no `commit`"):
            rounds.commit(job, 0, hashes, "a", {})
        rounds.start(job, 0, "a")
        assert rounds.latest(job) is None
        rounds.commit(job, 0, hashes, "a", {})
        for _ in range(2):  # done again after a crash
            rounds.start(job, 1, "a")
        jobs.change(job, "run_lost", run="a")
        jobs.change(job, "start", run="b")
        with pytest.raises(TransitionRefused, match="run a does not carry"):
            rounds.commit(job, 1, hashes, "a", {"closed": False})
        rounds.commit(job, 1, hashes, "b", {"closed": False, "sites": 3})
        assert jobs.get(job).losses == 0
        rounds.start(job, 2, "b")
        rounds.commit(job, 2, hashes, "b", {"closed": True})
        with pytest.raises(TransitionRefused, match="a round that is closed"):
            rounds.start(job, 2, "b")
        assert [row.state for row in rounds.of(job)] == ["committed", "committed", "closed"]
        latest = rounds.latest(job)
        assert latest is not None
        assert (latest.number, latest.model_sha256) == (2, "1" * 64)
        found = [e for e in Events(store).as_values(job) if e["event"] == "round"]
        assert found == [
            {"event": "round", "round": 1, "closed": False, "sites": 3},
            {"event": "round", "round": 2, "closed": True},
        ]


def checkpoint(size: int = 10, root: str = "1", at: int = 1_800_000_000_123) -> Checkpoint:
    return Checkpoint(site="alder", size=size, root=root * 64, at=at, signature="0" * 128)


class TestEvidence:
    def test_checkpoints_are_kept_once_with_their_cosignatures(self, store: Store) -> None:
        checkpoints = Checkpoints(store)
        small, large = checkpoint(10), checkpoint(20, "2")
        assert checkpoints.keep(large)
        assert checkpoints.keep(small)
        assert not checkpoints.keep(small)
        assert checkpoints.of("alder") == [small, large]
        assert checkpoints.of("alder", after_size=10) == [large]
        assert checkpoints.cosign(small, "birch", "b" * 64, "f" * 128)
        assert not checkpoints.cosign(small, "birch", "b" * 64, "f" * 128)
        signed = checkpoints.of("alder")[0]
        assert signed.cosignatures == {"b" * 64: "f" * 128}
        assert checkpoints.newest("alder") == large
        assert checkpoints.newest("birch") is None
        assert checkpoints.contradictions("alder") == []
        assert checkpoints.contradicting() == []
        with pytest.raises(FederationError, match="no such checkpoint of alder over 30 leaves"):
            checkpoints.cosign(checkpoint(30), "birch", "b" * 64, "f" * 128)

    def test_two_histories_are_both_kept(self, store: Store) -> None:
        checkpoints = Checkpoints(store)
        one, other = checkpoint(10, "1"), checkpoint(10, "2", at=5)
        for each in (one, checkpoint(10, "1", at=6), other):
            assert checkpoints.keep(each)
        (pair,) = checkpoints.contradictions("alder")
        assert {each.root for each in pair} == {one.root, other.root}
        assert checkpoints.contradicting() == ["alder"]

    def test_a_receipt_cannot_be_replaced(self, store: Store) -> None:
        receipts, job = Receipts(store), submit(store)
        assert receipts.keep((job, "alder", "train", 1, 1), "{}", "0" * 128)
        assert not receipts.keep((job, "alder", "train", 1, 1), "{}", "0" * 128)
        with pytest.raises(FederationError, match="sent another receipt for train round 1 before"):
            receipts.keep((job, "alder", "train", 1, 1), "{ }", "0" * 128)
        with pytest.raises(FederationError, match="no job x is known"):
            receipts.keep(("x", "alder", "train", 1, 1), "{}", "0" * 128)
        assert [row.document for row in receipts.of(job)] == ["{}"]

    def test_a_model_is_released_once(self, store: Store) -> None:
        releases, job = Releases(store), submit(store)

        def release(path: str = "m.safetensors", sha256: str = "a", job: str = job) -> ReleaseRow:
            return ReleaseRow(
                job=job,
                path=path,
                sha256=sha256 * 64,
                size=7,
                signature="0" * 128,
                card="{}",
                at=NOW,
            )

        releases.add(release())
        for again in (release(sha256="b"), release(path="n"), release("n", "b", "x")):
            with pytest.raises(FederationError, match="cannot be released"):
                releases.add(again)
        assert [row.path for row in releases.all()] == ["m.safetensors"]
        found = releases.find("a" * 64)
        assert found is not None
        assert found.at == NOW
        assert releases.find("b" * 64) is None


class TestAccess:
    def test_requests_are_noted_whatever_they_hold(self, store: Store) -> None:
        log = AccessLog(store)
        log.write("alder", "pull-messages", True)
        log.write(None, "GET /\x00\n\x1b[31m" + "x" * 10_000, False, "unknown \ud800 certificate")
        newest, oldest = log.newest()
        assert (oldest.member, oldest.allowed) == ("alder", True)
        assert newest.method.startswith("GET /???[31mxxx")
        assert len(newest.method) == 500
        assert log.newest(refused_only=True) == [newest]
        assert len(log.newest(limit=1)) == 1
        assert log.forget(datetime.now(UTC) + timedelta(seconds=1)) == 2
        assert log.newest() == []

    def test_a_token_opens_once_and_in_time(self, store: Store) -> None:
        tokens, hour = Tokens(store), timedelta(hours=1)
        token = tokens.issue("Ann", hour, NOW)
        assert tokens.use(token + "x", NOW) is None
        assert tokens.use(token, NOW) == "Ann"
        assert tokens.use(token, NOW) is None
        late = tokens.issue("Ben", hour, NOW)
        assert tokens.use(late, NOW + hour) is None
        with store.reading() as session:
            assert session.get(TokenRow, token) is None  # only its hash is there

    def test_of_many_with_the_same_token_one_gets_in(self, store: Store) -> None:
        tokens = Tokens(store)
        token = tokens.issue("Ann", timedelta(hours=1))
        gate, found = threading.Barrier(4), []

        def use() -> None:
            gate.wait(timeout=30)
            found.append(tokens.use(token))

        threads = [threading.Thread(target=use) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert sorted(found, key=str) == ["Ann", None, None, None]
