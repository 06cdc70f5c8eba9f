"""A coordinator that is stopped, killed or has its parts killed goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from coordinator_parties import Party, new_home
from flower_parties import alive, free_port, wait_for
from flwr.supercore import sql_mixin
from sqlalchemy import MetaData, update

from fedcmr_server import job_carrier, superlink_process
from fedcmr_server.gateway import require_port
from fedcmr_server.home import CoordinatorHome
from fedcmr_server.job_carrier import JobCarrier
from fedcmr_server.kept_process import Backoff, KeptProcess, Program
from fedcmr_server.store import AccessLog, Jobs, Members, Store, open_store
from fedcmr_server.store.tables import AccessRow, JobRow
from fedcmr_server.superlink import (
    Control,
    FlowerRun,
    KeyUsed,
    SuperLinkUnreachable,
    reconcile_nodes,
)
from fedcmr_shared.errors import FederationError
from fedcmr_shared.identity.roster import Roster
from fedcmr_shared.schemas.job import JobSpec

FEDCMR = Path(sys.executable).with_name("fedcmr")
ROSTER = Roster.model_validate({"sites": {name: 64 * name for name in "abc"}})


# --- Jobs and runs -------------------------------------------------------------------------------


@dataclass
class Flower:
    """Runs that never do anything by themselves."""

    known: dict[str, FlowerRun] = field(default_factory=dict)
    refuses: str | None = None
    silent: bool = False

    def start_run(self, bundle: bytes, config: dict[str, str]) -> str:
        self._answer()
        if self.refuses:
            raise FederationError(self.refuses)
        run = str(len(self.known) + 1)
        self.known[run] = FlowerRun(run, config["job"], False, "")
        return run

    def stop_run(self, run: str) -> None:
        self.end(run, "stopped")

    def run(self, run: str) -> FlowerRun | None:
        self._answer()
        return self.known.get(run)

    def runs(self) -> list[FlowerRun]:
        return list(self.known.values())

    def end(self, run: str, how: str) -> None:
        self.known[run] = FlowerRun(run, self.known[run].job, True, how)

    def running(self) -> list[str]:
        return [run.id for run in self.known.values() if not run.over]

    def _answer(self) -> None:
        if self.silent:
            raise SuperLinkUnreachable("nobody there")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(f"sqlite:///{tmp_path}/store.sqlite") as opened:
        yield opened


@pytest.fixture
def flower() -> Flower:
    return Flower()


def submit(store: Store, name: str) -> str:
    return Jobs(store).submit(JobSpec(name=name), None, ROSTER).id


def carrier(store: Store, at_once: int = 1, patience_s: float = 3600) -> JobCarrier:
    return JobCarrier(store, at_once, patience_s)


def make_due(store: Store) -> None:
    """Let the pause after a lost run pass."""
    with store.writing() as session:
        session.execute(update(JobRow).values(changed_at=datetime.now(UTC) - timedelta(days=1)))


def test_jobs_run_in_the_order_of_their_submission_and_no_more_than_there_is_room(
    store: Store, flower: Flower
) -> None:
    jobs, carry = [submit(store, name) for name in ("first", "second", "third")], carrier(store, 2)
    for _ in range(3):
        carry.step(flower)
    assert [flower.known[run].job for run in flower.running()] == jobs[:2]
    assert [Jobs(store).get(job).state for job in jobs] == ["running", "running", "submitted"]
    Jobs(store).change(jobs[0], "finish", run="1")
    flower.end("1", "completed")
    carry.step(flower)
    assert [flower.known[run].job for run in flower.running()] == jobs[1:]


def test_a_run_that_ends_too_early_is_followed_by_another_after_a_pause(
    store: Store, flower: Flower
) -> None:
    job, carry = submit(store, "heart"), carrier(store)
    carry.step(flower)
    flower.end("1", "failed: the server app was killed")
    carry.step(flower)
    row = Jobs(store).get(job)
    assert (row.state, row.run, row.losses) == ("running", None, 1)
    assert "the server app was killed" in str(row.reason)
    carry.step(flower)
    assert flower.running() == [], "not at once"
    make_due(store)
    carry.step(flower)
    assert Jobs(store).get(job).run == "2"


def test_a_run_that_superlink_has_forgotten_is_lost(store: Store, flower: Flower) -> None:
    job, carry = submit(store, "heart"), carrier(store)
    carry.step(flower)
    flower.known.clear()
    carry.step(flower)
    assert "unknown to SuperLink" in str(Jobs(store).get(job).reason)


def test_after_a_restart_of_superlink_every_run_is_lost_at_once(
    store: Store, flower: Flower
) -> None:
    jobs, carry = [submit(store, name) for name in ("first", "second", "third")], carrier(store, 2)
    carry.step(flower)
    Jobs(store).change(jobs[1], "pause")
    carry.give_up_runs(flower, "a restart")
    rows = [Jobs(store).get(job) for job in jobs]
    assert [row.state for row in rows] == ["running", "paused", "submitted"]
    assert rows[0].reason == "a restart"
    assert flower.running() == []


def test_a_job_that_ended_well_is_not_started_again(store: Store, flower: Flower) -> None:
    job, carry = submit(store, "heart"), carrier(store)
    carry.step(flower)
    Jobs(store).change(job, "finish", run="1")
    flower.end("1", "completed")
    make_due(store)
    carry.step(flower)
    assert (Jobs(store).get(job).state, flower.running()) == ("finished", [])


def test_a_run_that_a_killed_supervisor_started_is_not_started_twice(
    store: Store, flower: Flower
) -> None:
    job = submit(store, "heart")
    flower.start_run(b"", {"job": job})  # and killed before the job's row said so
    carry = carrier(store)
    carry.step(flower)
    assert flower.running() == ["1"]
    Jobs(store).change(job, "start", run="1")  # as the server app itself reports
    carry.step(flower)
    assert (flower.running(), Jobs(store).get(job).run) == (["1"], "1")


def test_a_run_whose_job_was_cancelled_is_stopped_at_once(store: Store, flower: Flower) -> None:
    job = submit(store, "heart")
    carrier(store).step(flower)
    assert flower.running() == ["1"]
    Jobs(store).change(job, "cancel")
    carrier(store).step(flower)
    assert flower.running() == []


def test_a_run_that_carries_no_job_is_stopped_after_a_while(
    store: Store, flower: Flower, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_carrier, "LOOK_S", 0.0)
    job, carry = submit(store, "heart"), carrier(store)
    carry.step(flower)
    Jobs(store).change(job, "run_lost", run="1", reason="a test")
    carry.step(flower)
    assert flower.running() == ["1"], "it may end by itself"
    monkeypatch.setattr(job_carrier, "GRACE_S", 0.0)
    carry.step(flower)
    assert flower.running() == []


def test_a_pause_waits_for_the_round_and_not_for_ever(store: Store, flower: Flower) -> None:
    job = submit(store, "heart")
    carrier(store).step(flower)
    Jobs(store).change(job, "pause")
    carrier(store, patience_s=3600).step(flower)
    assert flower.running() == ["1"]
    impatient = carrier(store, patience_s=0)
    impatient.step(flower)
    assert flower.running() == []
    impatient.step(flower)
    assert Jobs(store).get(job).state == "paused"


def test_a_job_that_cannot_be_started_fails_with_the_reason_and_others_go_on(
    store: Store, flower: Flower
) -> None:
    bad, good = submit(store, "bad"), submit(store, "good")
    flower.refuses = "no such app"
    carry = carrier(store)
    carry.step(flower)
    row = Jobs(store).get(bad)
    assert (row.state, row.reason) == ("failed", "no such app")
    flower.refuses = None
    carry.step(flower)
    assert Jobs(store).get(good).state == "running"


def test_while_superlink_is_away_no_job_changes(store: Store, flower: Flower) -> None:
    jobs, carry = [submit(store, "first"), submit(store, "second")], carrier(store)
    carry.step(flower)
    flower.silent = True
    with pytest.raises(SuperLinkUnreachable):
        carry.step(flower)
    assert [Jobs(store).get(job).state for job in jobs] == ["running", "submitted"]


# --- Nodes ---------------------------------------------------------------------------------------


class Nodes(Control):
    """Registered nodes, in memory."""

    def __init__(self) -> None:
        self.present: dict[bytes, int] = {}
        self.used: set[bytes] = set()

    def nodes(self) -> dict[bytes, int]:
        return dict(self.present)

    def register(self, public_key: bytes) -> int:
        if public_key in self.used:
            raise KeyUsed("registered before")
        self.used.add(public_key)
        self.present[public_key] = len(self.used)
        return len(self.used)

    def unregister(self, node: int) -> None:
        self.present = {key: each for key, each in self.present.items() if each != node}


def test_the_active_sites_are_flower_s_nodes_and_nobody_else(tmp_path: Path, store: Store) -> None:
    home, nodes = new_home(tmp_path / "c"), Nodes()
    members = Members(store)
    for name, role in (("alder", "site"), ("birch", "site"), ("eye", "auditor")):
        Party.make(tmp_path / name, name, role).join(home, store)  # type: ignore[arg-type]
    assert reconcile_nodes(nodes, members.active()) == []
    assert len(nodes.present) == 2
    members.end("alder", "revoked", "a test")
    assert reconcile_nodes(nodes, members.active()) == []
    assert len(nodes.present) == 1
    nodes.present.clear()
    (problem,) = reconcile_nodes(nodes, members.active())
    assert "site birch" in problem


# --- Programs ------------------------------------------------------------------------------------


def program(folder: Path, script: str, lines: list[str], **options: Any) -> Program:
    """A Python script as a kept program."""
    command = [sys.executable, "-u", "-c", script]
    environment = {"PATH": os.defpath, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return Program("a script", command, folder, environment, lines.append, **options)


FAST = Backoff(first_s=0.01, most_s=0.05)
FAMILY = """
import os, subprocess, sys, time
sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
own = subprocess.Popen(sleeper, start_new_session=True)
print("all", os.getpid(), own.pid)
{then}
"""


def pids(lines: list[str]) -> list[int]:
    """Wait until a family told its process numbers."""
    line = wait_for("the program", lambda: next((x for x in lines if x.startswith("all")), None))
    return [int(word) for word in line.split()[1:]]


def test_superlink_waits_for_its_database_as_long_as_the_gateway_lets_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Database(sql_mixin.SqlMixin):
        def get_metadata(self) -> MetaData:
            return MetaData()

    def patience() -> list[int]:
        database = Database(":memory:")
        database.initialize()
        return list(database.query("PRAGMA busy_timeout")[0].values())

    assert patience() == [5_000]
    monkeypatch.setitem(vars(sql_mixin), "SQLITE_PRAGMAS", vars(sql_mixin)["SQLITE_PRAGMAS"])
    superlink_process.be_patient()
    assert patience() == [50_000]


def test_a_program_that_ends_is_started_again_until_it_is_stopped(tmp_path: Path) -> None:
    lines: list[str] = []
    kept = KeptProcess(program(tmp_path, "print('on'); raise SystemExit(3)", lines), FAST)
    with kept:
        wait_for("three starts", lambda: kept.starts >= 3)
        assert "code 3" in str(kept.problem)
    starts = kept.starts
    assert lines.count("on") >= 2
    assert kept.process_id is None
    assert kept.starts == starts


def test_a_program_that_cannot_be_started_says_why(tmp_path: Path) -> None:
    missing = Program("nothing", ["/no/such/program"], tmp_path, {}, lambda _: None)
    with KeptProcess(missing, FAST) as kept:
        wait_for("the problem", lambda: kept.problem)
        assert "cannot be started: No such file" in str(kept.problem)


@pytest.mark.parametrize("then", ["time.sleep(600)", "raise SystemExit(0)"])
def test_nothing_that_a_program_started_outlives_it(tmp_path: Path, then: str) -> None:
    lines: list[str] = []
    with KeptProcess(program(tmp_path, FAMILY.format(then=then), lines), FAST):
        family = pids(lines)
    wait_for("their end", lambda: not any(alive(pid) for pid in family))


def test_a_program_that_does_not_end_by_itself_is_killed(tmp_path: Path) -> None:
    lines: list[str] = []
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)"
    script = FAMILY.format(then=stubborn)
    with KeptProcess(program(tmp_path, script, lines, patience_s=0.2), FAST):
        family = pids(lines)
    wait_for("their end", lambda: not any(alive(pid) for pid in family))


def test_a_program_gets_the_signal_to_read_its_settings_again(tmp_path: Path) -> None:
    lines: list[str] = []
    script = (
        "import signal; signal.signal(signal.SIGHUP, lambda *_: print('again'))\n"
        "print('on')\nwhile True: signal.pause()"
    )
    with KeptProcess(program(tmp_path, script, lines), FAST) as kept:
        wait_for("the program", lambda: "on" in lines)
        kept.reload()
        wait_for("the signal", lambda: "again" in lines)
        assert kept.starts == 1


KEEPER = """
import sys
from pathlib import Path
sys.path[:0] = {path!r}
from fedcmr_server.kept_process import KeptProcess, Program
lines = Path({lines!r})
def take(line):
    with lines.open("a") as file: file.write(line + chr(10))
command = [sys.executable, "-u", "-c", {script!r}]
KeptProcess(Program("a script", command, lines.parent, {environment!r}, take)).start()
input()
"""


@pytest.mark.parametrize("victim", ["keeper", "leash"])
def test_a_program_dies_with_whoever_keeps_it_even_by_a_kill(tmp_path: Path, victim: str) -> None:
    lines = tmp_path / "lines"
    lines.touch()
    script = "import os, time; print('all', os.getpid(), os.getppid()); time.sleep(600)"
    made = program(tmp_path, script, [])
    text = KEEPER.format(
        path=sys.path, lines=str(lines), script=script, environment=dict(made.environment)
    )
    with subprocess.Popen([sys.executable, "-c", text], stdin=subprocess.PIPE) as keeper:
        try:
            own, leash = pids_in(lines)
            os.kill(keeper.pid if victim == "keeper" else leash, signal.SIGKILL)
            wait_for("the program's end", lambda: not alive(own))
        finally:
            keeper.kill()


def pids_in(path: Path) -> list[int]:
    wait_for("the program", lambda: path.read_text().endswith("\n"))
    return pids(path.read_text().splitlines())


# --- The whole coordinator -----------------------------------------------------------------------

needs_nginx = pytest.mark.skipif(
    shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin") is None,
    reason="nginx is not installed",
)


SUPERLINK = "fedcmr_server.superlink_process"
PROGRAMS = ("nginx: master", SUPERLINK, "flower-superexec", "flwr-serverapp")


@dataclass
class Coordinator:
    """`fedcmr coordinator start` as a process."""

    home: CoordinatorHome
    process: subprocess.Popen[str]

    def wait_ready(self) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("ready: "), f"{line}{self.process.communicate(timeout=60)}"
        assert self.home.address in line

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)

    def programs(self) -> dict[str, list[int]]:
        """Processes of nginx and SuperLink that belong to this coordinator."""
        return {
            name: [
                pid for pid, words in commands() if name in words and str(self.home.run) in words
            ]
            for name in PROGRAMS
        }

    def log(self, name: str = "coordinator.log") -> list[dict[str, Any]]:
        text = (self.home.logs / name).read_text()
        return [json.loads(line) for line in text.splitlines()]


def commands() -> list[tuple[int, str]]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if "process_leash" not in words:
            found.append((int(path.parent.name), words))
    return found


@contextmanager
def coordinator(home: CoordinatorHome) -> Iterator[Coordinator]:
    """Start a coordinator; whatever happens, it is gone afterwards."""
    process = subprocess.Popen(
        [FEDCMR, "coordinator", "start"],
        env={**os.environ, "FEDCMR_COORDINATOR": str(home.folder), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        try:
            yield Coordinator(home, process)
        finally:
            process.kill()


def gone(running: dict[str, list[int]]) -> Callable[[], bool]:
    return lambda: not any(alive(pid) for found in running.values() for pid in found)


@needs_nginx
def test_a_coordinator_starts_is_killed_starts_again_and_stops(tmp_path: Path) -> None:
    home = new_home(tmp_path / "c", port=free_port())
    alder = Party.make(tmp_path / "alder", "alder")
    with home.store() as store:
        alder.join(home, store)
        job = submit(store, "heart")
        add_old_request(store)
        with coordinator(home) as first:
            first.wait_ready()
            gateway_answers(home, alder)
            wait_for("an old request to be forgotten", lambda: not has_old_request(store))
            refused_second_start(home)
            running = wait_for("the job's server app", lambda: all_programs(first))
            carried = f"job heart: carried by run {Jobs(store).get(job).run}"
            wait_for("what it says", lambda: said(first, carried, "superlink.log"))
            before = Jobs(store).get(job)
            kill_superlink(first, running)
            wait_for("the run to be lost", lambda: Jobs(store).get(job).losses == 1)
            make_due(store)
            after = wait_for("another run", lambda: running_job(store, job))
            assert (before.state, after.state) == ("running", "running")
            assert after.run != before.run
            running = wait_for("its server app", lambda: all_programs(first))
            first.process.kill()  # kill -9, and a start at once
            first.process.wait(10)
            with coordinator(home) as second:
                second.wait_ready()
                assert gone(running)()
                wait_for("alder's node", lambda: said(second, "site alder"))
                wait_for("the run to be lost", lambda: Jobs(store).get(job).losses == 2)
                make_due(store)
                cancel_while_it_runs(second, store, job)
                running = second.programs()
                assert second.stop() == 0
                assert gone(running)()
                require_port("127.0.0.1", home.settings.port, patience_s=0)


def gateway_answers(home: CoordinatorHome, party: Party) -> None:
    with httpx.Client(verify=party.context(home.authority()), trust_env=False) as client:
        assert client.get(f"{home.address}/").status_code == 200
        assert client.get(f"{home.address}/v1/control/list-nodes").status_code == 404


def all_programs(running: Coordinator) -> dict[str, list[int]] | None:
    found = running.programs()
    return found if all(found.values()) else None


def kill_superlink(running: Coordinator, programs: dict[str, list[int]]) -> None:
    (superlink,) = programs[SUPERLINK]
    os.kill(superlink, signal.SIGKILL)
    children = programs["flower-superexec"] + programs["flwr-serverapp"]
    wait_for("its children's end", lambda: not any(alive(child) for child in children))
    wait_for("another one", lambda: set(running.programs()[SUPERLINK]) - {superlink})
    assert said(running, "SuperLink ended")


def cancel_while_it_runs(running: Coordinator, store: Store, job: str) -> None:
    """Cancel the job; its server app ends, and the other programs stay."""
    apps = wait_for("the server app", lambda: all_programs(running))
    run = wait_for("the run", lambda: running_job(store, job)).run
    carried = f"job heart: carried by run {run}"
    wait_for("it to work", lambda: said(running, carried, "superlink.log"))
    Jobs(store).change(job, "cancel")
    wait_for("its end", lambda: not running.programs()["flwr-serverapp"])
    left = running.programs()
    assert left.pop("flwr-serverapp") == []
    # A program that starts another one is seen twice for a moment.
    assert all(left[name] and set(left[name]) <= set(apps[name]) for name in left)
    assert Jobs(store).get(job).state == "cancelled"


def add_old_request(store: Store) -> None:
    long_ago = datetime.now(UTC) - timedelta(days=366)
    with store.writing() as session:
        session.add(AccessRow(at=long_ago, member="alder", method="Old", allowed=True, detail=""))


def has_old_request(store: Store) -> bool:
    return any(row.method == "Old" for row in AccessLog(store).newest())


def running_job(store: Store, job: str) -> JobRow | None:
    row = Jobs(store).get(job)
    return row if row.run is not None else None


def said(running: Coordinator, text: str, log: str = "coordinator.log") -> bool:
    return any(text in line["text"] for line in running.log(log))


def refused_second_start(home: CoordinatorHome) -> None:
    with coordinator(home) as second:
        out, _ = second.process.communicate(timeout=60)
    assert second.process.returncode == 1
    assert out.startswith("error: a coordinator runs in"), out
    assert out.count("\n") == 1


@needs_nginx
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nginx": "no-such-nginx"}, "install nginx"),
        ({"listen": "192.0.2.1"}, "change `listen`"),
        ({"database_url": "sqlite:////no/such/folder/file"}, "database"),
    ],
)
def test_a_start_that_cannot_succeed_says_why_and_leaves_nothing(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    home = new_home(tmp_path / "c", port=free_port(), **settings)
    with coordinator(home) as refused:
        out, _ = refused.process.communicate(timeout=60)
    assert refused.process.returncode == 1
    assert out.startswith("error: ")
    assert message in out
    assert out.count("\n") == 1
    assert not any(refused.programs().values())


@needs_nginx
def test_ctrl_c_while_it_starts_ends_it_in_good_order(tmp_path: Path) -> None:
    home = new_home(tmp_path / "c", port=free_port())
    with coordinator(home) as early:
        wait_for("its first sign", lambda: (home.run / "superlink.crt").exists())
        assert early.stop(signal.SIGINT) == 0
        assert not any(early.programs().values())


def test_the_thread_that_serves_ends_with_the_server(tmp_path: Path) -> None:
    from starlette.applications import Starlette

    from fedcmr_server.supervisor import WebServer

    with WebServer(Starlette(), tmp_path / "s") as web:
        wait_for("the socket", (tmp_path / "s").exists)
        assert web.alive
    assert not web.alive
