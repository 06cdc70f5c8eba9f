"""A site's agent: one at a time, honest about how it is, and gone without a trace when told to go."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flower_parties import free_port, superlink, wait_for
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedcmr_client import agent_lock, site_health, site_service
from fedcmr_client.agent_lock import agent_process, only_agent
from fedcmr_client.agent_settings import AgentSettings
from fedcmr_client.policy import policy_text
from fedcmr_client.site_health import Health, Problem, health_page, read_health
from fedcmr_client.site_home import SiteHome
from fedcmr_client.site_log import agent_log, blot
from fedcmr_client.site_service import SiteService, notify
from fedcmr_shared.errors import ConfigurationError, ConnectionProblem, LedgerError
from fedcmr_shared.identity.certificates import (
    Authority,
    Member,
    certificate_pem,
    issue_member,
    new_authority,
)
from fedcmr_shared.identity.enrolment import StartupKit

DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def authority() -> Authority:
    return new_authority("hearts")


@pytest.fixture
def home(make_home: Callable[..., SiteHome], make_site: Callable[..., Path]) -> Iterator[SiteHome]:
    """A site that has asked, in a folder short enough for a socket."""
    made = make_home(make_site("alder", 1))
    with TemporaryDirectory(prefix="fedcmr-test-") as folder:
        path = Path(folder) / "policy.yaml"
        path.write_text(policy_text(made.policy))
        site = SiteHome.open(path)
        site.membership.create(
            site.membership.folder, Member("site", "alder"), site.identity(), with_node_key=True
        )
        yield site


def join(home: SiteHome, authority: Authority, port: int = 9, now: datetime | None = None) -> None:
    request = home.membership.request
    certificate = issue_member(authority, request.certificate_request, request.member, now)
    home.membership.join(
        StartupKit(
            federation="hearts",
            coordinator="heart-net",
            coordinator_key="c" * 64,
            host="127.0.0.1",
            port=port,
            authority=certificate_pem(authority.certificate),
            certificate=certificate_pem(certificate),
        )
    )


@pytest.fixture
def joined(home: SiteHome, authority: Authority) -> SiteHome:
    join(home, authority)
    return home


def health_of(home: SiteHome, **changes: Any) -> Health:
    values = {
        "site": home.policy.site,
        "process": os.getpid(),
        "at": datetime.now(UTC),
        "connected": True,
        "paused": None,
        "certificate_days": 300.0,
        "problem": None,
    }
    return Health(**{**values, **changes})


class TestBeforeItStarts:
    def test_a_sound_site_may_start(self, joined: SiteHome) -> None:
        service = SiteService(joined, AgentSettings())
        assert not service.health.connected
        assert service.health.problem is not None
        assert service.health.problem.code == "starting"

    def test_a_site_that_has_not_joined_is_told_how(self, home: SiteHome) -> None:
        with pytest.raises(ConfigurationError, match="fedcmr site join KIT"):
            SiteService(home, AgentSettings())

    def test_one_that_left_does_not_start(self, joined: SiteHome) -> None:
        joined.membership.leave()
        with pytest.raises(ConfigurationError, match="left the federation"):
            SiteService(joined, AgentSettings())

    def test_an_expired_certificate_says_since_when_and_what_to_do(
        self, home: SiteHome, authority: Authority
    ) -> None:
        join(home, authority)
        past = datetime.now(UTC) - timedelta(days=400)
        request = home.membership.request
        old = issue_member(authority, request.certificate_request, request.member, past)
        home.membership.certificate_path.write_text(certificate_pem(old))
        with pytest.raises(ConfigurationError) as refusal:
            SiteService(home, AgentSettings())
        assert f"expired on {old.not_valid_after_utc:%Y-%m-%d}" in str(refusal.value)
        assert "ask the coordinator for a new kit" in str(refusal.value)

    def test_a_damaged_ledger_stops_it(self, joined: SiteHome) -> None:
        (joined.policy.ledger.folder / "ledger.sqlite").write_bytes(b"no database")
        with pytest.raises(LedgerError):
            SiteService(joined, AgentSettings())

    def test_a_policy_with_another_name_is_no_member(self, joined: SiteHome) -> None:
        """The ledger would object as well; the membership comes first."""
        renamed = SiteHome(joined.policy.model_copy(update={"site": "birch"}), joined.path)
        with pytest.raises(ConfigurationError, match="another site or ledger key"):
            SiteService(renamed, AgentSettings())

    def test_a_wrong_proxy_is_named(self, joined: SiteHome) -> None:
        with pytest.raises(ConfigurationError, match="proxy: give it as"):
            SiteService(joined, AgentSettings(proxy="ftp://proxy"))


class Parts:
    """The agent's parts, replaced by ones that only note what happens to them."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.problem: ConnectionProblem | None = None
        self.node = SimpleNamespace(node_id=7, problem=None)
        self.sync_problem: str | None = None
        self.clock_problem: str | None = None
        self.rejection: str | None = None
        self.paused: Callable[[], bool] = lambda: False
        self.record_refusal: Callable[[str], None] = lambda _: None
        self.limits: Any = None

    def put_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        parts = self

        class Part:
            name = ""

            def __init__(self, *arguments: Any, **options: Any) -> None:
                pass

            def start(self) -> None:
                parts.events.append(f"{self.name} starts")

            def stop(self, *patience: float) -> None:
                parts.events.append(f"{self.name} stops{''.join(map(' {:g}'.format, patience))}")

        class Tunnel(Part):
            name = "tunnel"
            fleet_address, governance_target = "127.0.0.1:1", "unix:nowhere"

            def __init__(self, *arguments: Any) -> None:
                self.fleet_root = arguments[1].authority

            def __enter__(self) -> Any:
                self.start()
                return self

            def __exit__(self, *_: object) -> None:
                self.stop()

            @property
            def problem(self) -> ConnectionProblem | None:
                return parts.problem

        class Node(Part):
            name = "node"
            node_id = property(lambda self: parts.node.node_id)
            problem = property(lambda self: parts.node.problem)

        class Runner(Part):
            name = "runner"

            def __init__(self, *arguments: Any, **options: Any) -> None:
                parts.paused = options["paused"]
                parts.record_refusal = options["record_refusal"]
                parts.limits = options["limits"]

        class Sync(Part):
            name = "sync"
            problem = property(lambda self: parts.sync_problem)
            clock_problem = property(lambda self: parts.clock_problem)
            rejection = property(lambda self: parts.rejection)

            def hurry(self) -> None:
                parts.events.append("sync hurries")

        real = {"Tunnel": Tunnel, "SuperNode": Node, "Runner": Runner, "SiteSync": Sync}
        for name, part in real.items():
            monkeypatch.setattr(site_service, name, part)
        monkeypatch.setattr(site_service, "probe", lambda *_: None)
        monkeypatch.setattr(site_service, "LOOK_S", 0.01)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Parts:
    parts = Parts()
    parts.put_in(monkeypatch)
    return parts


@contextmanager
def running(service: SiteService) -> Iterator[threading.Thread]:
    """Run the agent in a thread; it is told to stop, and must, at the end."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            service.run()
        except ConfigurationError as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield thread
    finally:
        service.stop()
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    if failures:
        raise failures[0]


def settled(service: SiteService) -> Health:
    """Wait until the agent has looked after its parts; return what it found."""

    def look() -> Health | None:
        health = service.health
        return health if health.problem is None or health.problem.code != "starting" else None

    found: Health = wait_for("a first look", look)
    return found


class TestRunning:
    def test_parts_start_and_stop_in_order(self, joined: SiteHome, parts: Parts) -> None:
        """Nothing new is fetched while tasks finish, and the way out closes last."""
        service = SiteService(joined, AgentSettings(stop_seconds=7.0))
        with running(service):
            assert settled(service).ready
        assert parts.events == [
            "tunnel starts",
            "node starts",
            "runner starts",
            "sync starts",
            "sync stops",
            "runner stops 7",
            "node stops",
            "tunnel stops",
        ]

    def test_a_second_agent_is_refused_while_one_runs(self, joined: SiteHome, parts: Parts) -> None:
        service = SiteService(joined, AgentSettings())
        with running(service):
            settled(service)
            before = list(parts.events)
            with pytest.raises(ConfigurationError) as refusal:
                SiteService(joined, AgentSettings()).run()
            assert f"another agent runs for this site already (process {os.getpid()})" in str(
                refusal.value
            )
            assert parts.events == before
        with running(SiteService(joined, AgentSettings())):
            pass

    def test_the_settings_reach_the_workers(self, joined: SiteHome, parts: Parts) -> None:
        settings = AgentSettings(memory_gib=2, nice=3, workers=2)
        with running(SiteService(joined, settings)):
            wait_for("the runner", lambda: parts.limits)
        limits = parts.limits
        assert (limits.memory_mib, limits.nice, limits.workers) == (2048, 3, 2)

    def test_a_pause_holds_at_once(self, joined: SiteHome, parts: Parts) -> None:
        service = SiteService(joined, AgentSettings())
        with running(service):
            settled(service)
            assert not parts.paused()
            joined.pause.pause("moving")
            assert parts.paused()
            wait_for("the pause in the report", lambda: service.health.paused)
            assert service.health.connected
            assert not service.health.ready
            joined.pause.resume()
            assert not parts.paused()

    def test_a_refused_bundle_goes_into_the_ledger(self, joined: SiteHome, parts: Parts) -> None:
        service = SiteService(joined, AgentSettings())
        with running(service):
            settled(service)
            parts.record_refusal("entries")
        with joined.open_ledger() as ledger:
            entry = ledger.leaves()[-1].entry
        assert (entry.kind, entry.code, entry.rule) == (  # type: ignore[union-attr]
            "refused",
            "bundle",
            "entries",
        )

    def test_problems_show_the_cause_before_its_effects(
        self, joined: SiteHome, parts: Parts
    ) -> None:
        parts.node.problem, parts.node.node_id = "the SuperNode ended", None
        parts.sync_problem = "cannot be reached"
        service = SiteService(joined, AgentSettings())
        with running(service):
            assert settled(service).problem == Problem("supernode", "the SuperNode ended")
            parts.rejection = "the certificate was revoked"
            expected = Problem("rejected", "the certificate was revoked")
            wait_for("the rejection", lambda: service.health.problem == expected)
            parts.clock_problem = "the clock is a day ahead"
            expected = Problem("clock", "the clock is a day ahead")
            wait_for("the clock", lambda: service.health.problem == expected)
            parts.problem = ConnectionProblem("timed-out", "no answer")
            expected = Problem("timed-out", "no answer")
            wait_for("the cause", lambda: service.health.problem == expected)
            parts.problem = parts.clock_problem = parts.rejection = parts.node.problem = None
            expected = Problem("governance", "cannot be reached")
            wait_for("the rest", lambda: service.health.problem == expected)
            parts.sync_problem, parts.node.node_id = None, 7
            wait_for("all well", lambda: service.health.ready and not service.health.problem)

    def test_a_lost_node_has_the_coordinator_asked_why(
        self, joined: SiteHome, parts: Parts
    ) -> None:
        service = SiteService(joined, AgentSettings())
        with running(service):
            assert settled(service).ready
            assert "sync hurries" not in parts.events
            parts.node.node_id = None
            wait_for("the question", lambda: "sync hurries" in parts.events)

    def test_a_certificate_that_expires_soon_is_a_problem(
        self, home: SiteHome, authority: Authority, parts: Parts
    ) -> None:
        join(home, authority, now=datetime.now(UTC) - timedelta(days=365 - 12))
        service = SiteService(home, AgentSettings())
        with running(service):
            problem = settled(service).problem
        assert problem == Problem("certificate-expires", "the certificate expires in 12 days")

    def test_who_leaves_stops(self, joined: SiteHome, parts: Parts) -> None:
        service = SiteService(joined, AgentSettings())
        with running(service) as thread:
            settled(service)
            joined.membership.leave()
            thread.join(DEADLINE_S)
            assert not thread.is_alive()

    def test_it_starts_while_the_coordinator_is_away(
        self, joined: SiteHome, parts: Parts, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unreachable(*_: object) -> None:
            raise ConnectionProblem("refused", "127.0.0.1:9 refuses connections")

        monkeypatch.setattr(site_service, "probe", unreachable)
        service = SiteService(joined, AgentSettings())
        with running(service):
            settled(service)

    def test_the_report_is_there_for_status(self, joined: SiteHome, parts: Parts) -> None:
        service = SiteService(joined, AgentSettings())
        with running(service):
            settled(service)
            path = joined.run / site_health.FILE
            report = wait_for("the report", lambda: read_health(path))
            assert (report["site"], report["ready"]) == ("alder", True)
            assert agent_process(joined.run / agent_lock.FILE) == os.getpid()
        assert agent_process(joined.run / agent_lock.FILE) is None

    def test_systemd_is_told(
        self, joined: SiteHome, parts: Parts, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        address = joined.folder / "notify"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
            receiver.bind(str(address))
            receiver.settimeout(DEADLINE_S)
            monkeypatch.setenv("NOTIFY_SOCKET", str(address))
            told: list[bytes] = []
            with running(SiteService(joined, AgentSettings())):
                told = [receiver.recv(100), receiver.recv(100)]
            while told[-1] != b"STOPPING=1":
                told.append(receiver.recv(100))
        assert told[:2] == [b"READY=1", b"WATCHDOG=1"]

    def test_a_silent_systemd_stops_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NOTIFY_SOCKET", "@fedcmr-test-nobody-listens")
        notify("READY=1")
        monkeypatch.delenv("NOTIFY_SOCKET")
        notify("READY=1")


class TestHealthPage:
    def ask(self, port: int, path: str) -> tuple[int, dict[str, Any]]:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"http://127.0.0.1:{port}{path}", timeout=DEADLINE_S) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                content = error.read()
            return error.code, json.loads(content) if content.startswith(b"{") else {}

    def test_ready_and_live(self, joined: SiteHome) -> None:
        now = health_of(joined)
        with health_page(0, lambda: now) as port:
            assert self.ask(port, "/healthz") == (200, {"live": True, "age_s": 0.0})
            code, values = self.ask(port, "/readyz")
            assert (code, values["connected"], values["certificate_days"]) == (200, True, 300.0)
            now = health_of(joined, paused="quiet hours")
            assert self.ask(port, "/readyz")[0] == 503
            problem = Problem("timed-out", "no answer")
            now = health_of(joined, connected=False, problem=problem)
            code, values = self.ask(port, "/readyz")
            assert (code, values["problem"]["code"]) == (503, "timed-out")
            now = health_of(joined, at=datetime.now(UTC) - timedelta(minutes=10))
            assert self.ask(port, "/healthz")[0] == 503
            assert self.ask(port, "/policy.yaml")[0] == 404

    def test_a_port_that_is_taken_is_named(self, joined: SiteHome) -> None:
        with (
            health_page(0, lambda: health_of(joined)) as port,
            pytest.raises(ConfigurationError, match=f"health_port: {port} cannot be opened"),
            health_page(port, lambda: health_of(joined)),
        ):
            pass

    def test_an_unreadable_report_is_none(self, tmp_path: Path) -> None:
        assert read_health(tmp_path / "absent") is None
        (tmp_path / "half").write_text('{"site": ')
        assert read_health(tmp_path / "half") is None


class TestLock:
    def test_a_killed_agent_leaves_no_lock(self, tmp_path: Path) -> None:
        path = tmp_path / "agent.lock"
        code = (
            "import sys\nfrom pathlib import Path\n"
            "from fedcmr_client.agent_lock import only_agent\n"
            f"with only_agent(Path({str(path)!r})):\n    print('in', flush=True)\n"
            "    sys.stdin.read()\n"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"in\n"
            assert agent_process(path) == process.pid
            with (
                pytest.raises(ConfigurationError, match=f"process {process.pid}"),
                only_agent(path),
            ):
                pass
            process.kill()
        assert agent_process(path) is None
        with only_agent(path):
            assert agent_process(path) == os.getpid()


class TestLog:
    PSEUDONYM = "p-abcdefghijklmnopqrstuvwxyz"

    def read(self, folder: Path) -> list[dict[str, Any]]:
        lines = (folder / "agent.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def test_lines_are_json_and_hold_what_workers_write(self, tmp_path: Path) -> None:
        settings = AgentSettings(log_folder=tmp_path / "logs")
        log = logging.getLogger("fedcmr.site")
        with agent_log(settings):
            log.info("round %d", 3)
            code = f"import sys; sys.stderr.write('step 1 of {self.PSEUDONYM}\\n')"
            subprocess.run([sys.executable, "-c", code], check=True)
            try:
                raise ValueError(f"scan of {self.PSEUDONYM}")
            except ValueError:
                log.exception("failed")
        lines = self.read(tmp_path / "logs")
        assert (lines[0]["part"], lines[0]["level"], lines[0]["text"]) == (
            "site",
            "info",
            "round 3",
        )
        worker = next(line for line in lines if line["part"] == "workers")
        assert worker["text"] == "step 1 of <patient>"
        failed = next(line for line in lines if line["text"] == "failed")
        assert "ValueError: scan of <patient>" in failed["trace"]
        assert self.PSEUDONYM not in (tmp_path / "logs" / "agent.jsonl").read_text()
        assert datetime.fromisoformat(lines[0]["at"]).tzinfo is not None

    def test_full_files_are_put_aside_and_the_oldest_go(self, tmp_path: Path) -> None:
        settings = AgentSettings(log_folder=tmp_path, log_megabytes=1, log_files=2)
        with agent_log(settings):
            for _ in range(40):
                logging.getLogger("fedcmr.site").info("x" * 100_000)
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == ["agent.jsonl", "agent.jsonl.1", "agent.jsonl.2"]
        assert all(path.stat().st_size <= 1_000_000 for path in tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("text", "kept"),
        [
            (f"patient {PSEUDONYM}: odd", "patient <patient>: odd"),
            ("http://me:hush@proxy:3128 said no", "http://me:<password>@proxy:3128 said no"),
            ("Proxy-Authorization: Basic bWU6aHVzaA==", "Proxy-Authorization: Basic <secret>"),
            ("-----BEGIN PRIVATE KEY-----\nabc\n-----END PRIVATE KEY-----", "<key>"),
            ("job p-1 of site p-north", "job p-1 of site p-north"),
        ],
    )
    def test_what_must_not_stay_is_blotted_out(self, text: str, kept: str) -> None:
        assert blot(text) == kept

    def test_a_folder_that_cannot_be_written_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        settings = AgentSettings(log_folder=tmp_path / "file" / "logs")
        with (
            pytest.raises(ConfigurationError, match=r"log_folder: .* choose another"),
            agent_log(settings),
        ):
            pass


def test_a_real_agent_connects_reports_and_signs_off_at_sigterm(
    home: SiteHome, authority: Authority, tmp_path: Path
) -> None:
    """Everything is real but the governance service, which this coordinator lacks."""
    with superlink(tmp_path / "superlink", authority) as link:
        join(home, authority, int(link.address.rpartition(":")[2]))
        key = load_ssh_private_key(home.membership.node_key_path.read_bytes(), password=None)
        assert isinstance(key, EllipticCurvePrivateKey)
        node = link.register(public_key_to_bytes(key.public_key()))
        health_port = free_port()
        (home.folder / "agent.yaml").write_text(f"health_port: {health_port}\nstop_seconds: 5\n")
        command = [sys.executable, "-m", "fedcmr_shared", "site", "start"]
        with (
            (tmp_path / "stderr").open("wb") as errors,
            subprocess.Popen(
                [*command, "--policy", str(home.path)],
                stderr=errors,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            ) as process,
        ):
            try:
                path = home.run / site_health.FILE

                def connected() -> dict[str, Any] | None:
                    assert process.poll() is None, (tmp_path / "stderr").read_text()
                    report = read_health(path)
                    return report if report is not None and report["connected"] else None

                report = wait_for("the connection", connected)
                assert report["process"] == process.pid
                code, values = TestHealthPage().ask(health_port, "/readyz")
                assert (code, values["site"]) == (200, "alder")
                assert link.online(node)
                process.send_signal(signal.SIGTERM)
                assert process.wait(DEADLINE_S) == 0
                assert not link.online(node)
            finally:
                process.kill()
    lines = TestLog().read(home.folder / "logs")
    texts = [line["text"] for line in lines]
    assert "the agent of alder has stopped" in texts
    assert any("the agent stops" in text for text in texts)
    assert any(line["part"] == "supernode" for line in lines)
    assert "Traceback" not in (tmp_path / "stderr").read_text()
    assert agent_process(home.run / agent_lock.FILE) is None
