"""What can go wrong in a running federation, and what must come of it.

Each case breaks one thing in a real federation of four hospitals and states the outcome. Always
holds, and is asserted by `Lab.account`: every round is committed or closed with a reason, the last
model is the one that was committed, and no ledger was charged for more than was done. All waiting
has a deadline.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import signal
import ssl
import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPSConnection
from pathlib import Path
from typing import Any, Final

import httpx
from bad_link import BadLink, Line
from databases import PostgresqlServer
from deployment import SITES, Federation, Service, Site, session_of, until
from small_scans import small_store

from fedcmr_client.site_home import SiteHome
from fedcmr_client.store.split import SplitFractions
from fedcmr_server.home import CoordinatorHome
from fedcmr_server.job_run import StoredRun
from fedcmr_server.rounds import initial_state
from fedcmr_server.store import Events, Jobs, Rounds, Store
from fedcmr_server.store.tables import JobRow
from fedcmr_shared.models.bundle import state_sha256
from fedcmr_shared.privacy.budget import JobState
from fedcmr_shared.secagg.messages import STEPS

Repeated = Collection[tuple[str, str, int]]
"""Rounds (site, phase, number) that a site lost while it trained and may have begun again."""

WATCH_S: Final = 0.05
NODE_MISSED_S: Final = 150.0
"""Flower misses a killed node for a minute before it lets it in again; a loaded machine adds."""

_PATIENCE_S: Final = 60.0  # a database that restarts
_CLOCKS: Final = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1"
_JOB: Final = """\
name: heart-{number}
coordinator: coordinator
rounds: {rounds}
minimum_sites: 3
round_timeout_s: {round_timeout_s}
model: {{size: {size}, text_encoder: hashed}}
sampling: {{accelerations: [4.0], acs_lines: 8}}
training: {{part: adapters, local_steps: 2}}
privacy:
  cohort_size: 10
  sampling_rate: 0.5
  noise_multiplier: 40.0
  spare_rounds: 2
  evaluation: {{rounds: {evaluated}, noise_multiplier: 40.0, cohort_size: 2}}
secure: {{step_timeout_s: {step_timeout_s}}}
"""


class CannotRun(Exception):
    """This machine cannot show the case; says why."""


@dataclass
class Lab:
    """A federation of four hospitals, each behind a line that can be spoilt."""

    federation: Federation
    home: CoordinatorHome
    store: Store
    lines: dict[str, Line]
    database: PostgresqlServer | None
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @classmethod
    @contextmanager
    def open(cls, folder: Path, database: PostgresqlServer | None = None) -> Iterator[Lab]:
        """Make it and wait until all hospitals are connected."""
        url = None if database is None else database.url(database.create_database())
        with ExitStack() as stack:
            links = {name: stack.enter_context(BadLink.open()) for name in SITES}
            federation = stack.enter_context(
                Federation.open(folder, isolated=False, database_url=url)
            )
            federation.start()
            for name, link in links.items():
                scans = small_store(folder / "stores" / name, 24, SplitFractions(0.5, 0.25, 0.25))
                site = federation.add_site(name, scans, proxy=link.url)
                _allow(site, "models: [cardiomm/tiny]", "models: [cardiomm]")
                site.join()
            for site in federation.sites.values():
                site.pin_roster()
                site.start()
            federation.wait_connected()
            home = CoordinatorHome.open(federation.home)
            store = stack.enter_context(home.store(_PATIENCE_S))
            lines = {name: link.line for name, link in links.items()}
            yield cls(federation, home, store, lines, database)

    def submit(
        self,
        rounds: int = 1,
        *,
        size: str = "tiny",
        evaluated: str = "none",
        round_timeout_s: float = 180,
        step_timeout_s: float = 60,
    ) -> str:
        """Submit a job; return its id."""
        text = _JOB.format(
            number=next(self._numbers),
            rounds=rounds,
            size=size,
            evaluated=evaluated,
            round_timeout_s=round_timeout_s,
            step_timeout_s=step_timeout_s,
        )
        path = self.federation.folder / "job.yaml"
        path.write_text(text)
        return str(self.federation.fedcmr("coordinator", "submit", str(path))["id"])

    def site(self, name: str) -> Site:
        """A hospital."""
        return self.federation.sites[name]

    def service(self, name: str) -> Service:
        """The agent of a hospital."""
        service = self.site(name).service
        assert service is not None
        return service

    @property
    def coordinator(self) -> Service:
        """The coordinator's process."""
        assert self.federation.coordinator is not None
        return self.federation.coordinator

    def events(self, job: str) -> list[dict[str, Any]]:
        """What happened in a job."""
        return Events(self.store).as_values(job)

    def job(self, job: str) -> JobRow:
        """Where a job stands."""
        return Jobs(self.store).get(job)

    def wait_event(self, job: str, name: str, timeout_s: float = 240.0, **values: Any) -> None:
        """Wait for an event with these values."""

        def happened() -> bool:
            row = self.job(job)
            assert row.state != "failed", row.reason
            return any(
                event["event"] == name and values.items() <= event.items()
                for event in self.events(job)
            )

        until(happened, f"event {name} {values}", timeout_s, WATCH_S)

    def reach(self, name: str, step: str, timeout_s: float = 240.0) -> None:
        """Wait until a hospital works on the next question of ``step``."""
        log = self.service(name).log
        begin = log.stat().st_size
        signs = [f"Receiving: train.{step} message"]
        if step == "update":  # its ledger is charged and nothing is stored yet
            signs.append("patients drawn")

        def seen() -> bool:
            text = log.read_bytes()[begin:].decode(errors="replace")
            for sign in signs:
                _, found, text = text.partition(sign)
                if not found:
                    return False
            return True

        until(seen, f"{name} to work on {step}", timeout_s, WATCH_S)

    def finish(self, job: str, timeout_s: float = 300.0) -> list[dict[str, Any]]:
        """Wait until a job is finished; return its attempts."""

        def over() -> bool:
            row = self.job(job)
            assert row.state != "failed", row.reason
            return row.state == "finished"

        until(over, f"job {self.job(job).name} to finish", timeout_s)
        return [event for event in self.events(job) if event["event"] == "attempt"]

    def restart(self, name: str) -> None:
        """Start a hospital's agent again, and do not take its earlier report for its own."""
        (self.site(name).folder / "federation" / "run" / "health.json").unlink(missing_ok=True)
        self.site(name).start()

    def wait_whole(self) -> None:
        """Wait until all hospitals are connected again."""
        for site in self.federation.sites.values():
            until(lambda site=site: site.is_connected(), f"{site.name} to be back", NODE_MISSED_S)

    def problem(self, name: str) -> str:
        """What a hospital's agent says is wrong; empty if nothing is."""
        from fedcmr_client.site_health import read_health

        path = self.site(name).folder / "federation" / "run" / "health.json"
        report = read_health(path) if path.exists() else None
        problem = (report or {}).get("problem")
        return f"{problem['code']}: {problem['message']}" if problem else ""

    def ledger(self, name: str, job: str) -> JobState | None:
        """What a hospital's ledger says of a job."""
        home = SiteHome.open(self.site(name).policy)
        with closing(home.open_ledger()) as ledger:
            return ledger.budget.jobs.get(job)

    def account(self, job: str, repeated: Repeated = ()) -> dict[str, int]:
        """Require that nothing was lost or charged twice; return the starts of each hospital."""
        self._require_rounds(job)
        self._require_model(job)
        opened = [
            (event["phase"], event["round"], event["survivors"])
            for event in self.events(job)
            if event["event"] == "attempt" and event["outcome"] == "opened"
        ]
        starts = {}
        for name in SITES:
            state = self.ledger(name, job)
            took_part = {(phase, number) for phase, number, of in opened if name in of}
            if state is None:
                assert not took_part, f"{name} is in sums and its ledger knows nothing of it"
                continue
            assert took_part <= state.stored.keys(), f"{name} is in sums that it did not store"
            for (phase, number), times in state.attempts.items():
                allowed = 1 + ((name, phase, number) in repeated)
                assert times <= allowed, f"{name} was charged {times} times for {phase} {number}"
            for phase, reserved in state.admitted.phases.items():
                assert state.started(phase) <= reserved.starts
            starts[name] = state.started("train")
        return starts

    def _require_rounds(self, job: str) -> None:
        events = {e["round"]: e for e in self.events(job) if e["event"] == "round"}
        rounds = [row for row in Rounds(self.store).of(job) if row.number > 0]
        assert [row.number for row in rounds] == sorted(events)
        for row in rounds:
            assert row.state == ("closed" if events[row.number]["closed"] else "committed")
            attempts = [
                event
                for event in self.events(job)
                if event["event"] == "attempt"
                and (event["phase"], event["round"]) == ("train", row.number)
            ]
            last = attempts[-1]
            expected = "closed" if row.state == "closed" else "opened"
            assert last["outcome"] == expected
            assert last["reason"] or expected == "opened"

    def _require_model(self, job: str) -> None:
        run = StoredRun(self.store, self.home.jobs, job, run="")
        latest = run.latest()  # raises when it is not what was committed
        assert latest is not None
        committed = [row.state == "committed" for row in Rounds(self.store).of(job)[1:]]
        learnt = state_sha256(latest.state) != state_sha256(initial_state(run.job))
        assert learnt == any(committed)


Act = Callable[[Lab, str], None]
"""Breaks something while a job runs, and mends what is to be mended."""


@dataclass(frozen=True)
class FaultCase:
    """One thing that goes wrong.

    ``play`` breaks it, asserts ``outcome`` and returns what it saw. It must be over, clean-up
    included, in ``bound_s``. Where ``spoils`` is set the federation is of no more use.
    """

    name: str
    outcome: str
    bound_s: float
    play: Callable[[Lab], dict[str, Any]]
    spoils: bool = False


# --- hospitals and the coordinator are killed ---------------------------------------------------


def kill_site(name: str, step: str) -> Act:
    """Cut a hospital's power while it works on ``step``, and switch it on again."""

    def act(lab: Lab, job: str) -> None:
        lab.reach(name, step)
        lab.service(name).kill()
        lab.restart(name)

    return act


def kill_coordinator(step: str) -> Act:
    """Kill -9 the coordinator while a hospital works on ``step``; start it again."""

    def act(lab: Lab, job: str) -> None:
        if step == "unmask":
            asked = _count(lab, job, "unmask_asked")
            until(lambda: _count(lab, job, "unmask_asked") > asked, "unmask", 240, 0.01)
        else:
            lab.reach("alder", step)
        lab.coordinator.signal(signal.SIGKILL)
        lab.coordinator.process.wait(10)
        lab.federation.start()

    return act


def kill_superlink(step: str) -> Act:
    """Kill -9 Flower's SuperLink while a hospital works on ``step``."""

    def act(lab: Lab, job: str) -> None:
        lab.reach("alder", step)
        found = [
            pid
            for pid in session_of(lab.coordinator.process.pid)
            if _is_superlink(_command_line(pid))
        ]
        assert len(found) == 1, found
        os.kill(found[0], signal.SIGKILL)

    return act


def cut(name: str, seconds: float) -> Act:
    """Cut a hospital's line in the middle of its work, for a time."""

    def act(lab: Lab, job: str) -> None:
        lab.reach(name, "update")
        line = lab.lines[name]
        line.is_cut = True
        time.sleep(seconds)  # the fault itself
        line.is_cut = False

    return act


def restart_database(seconds: float) -> Act:
    """Stop PostgreSQL in the middle of a round, and start it again."""

    def act(lab: Lab, job: str) -> None:
        if lab.database is None:
            raise CannotRun("the federation has no PostgreSQL")
        lab.reach("alder", "update")
        lab.database.stop()
        time.sleep(seconds)  # the fault itself
        lab.database.start()

    return act


def revoke(name: str) -> Act:
    """Throw a hospital out while it works."""

    def act(lab: Lab, job: str) -> None:
        lab.reach(name, "update")
        lab.federation.fedcmr("coordinator", "revoke", name, "--reason", "a test")

    return act


def _with_job(act: Act, least: int, repeated: Repeated = ()) -> Callable[[Lab], dict[str, Any]]:
    """Break something in a job of one round: it is opened over ``least`` hospitals or more."""

    def play(lab: Lab) -> dict[str, Any]:
        job = lab.submit()
        act(lab, job)
        attempts = lab.finish(job)
        starts = lab.account(job, repeated)
        assert attempts[-1]["outcome"] == "opened"
        assert len(attempts[-1]["survivors"]) >= least
        lab.wait_whole()
        return _seen(attempts, starts)

    return play


def _closes(act: Act) -> Callable[[Lab], dict[str, Any]]:
    """Break something once shares were asked for: the round is closed, and the next one opened."""

    def play(lab: Lab) -> dict[str, Any]:
        job = lab.submit(rounds=2)
        act(lab, job)
        attempts = lab.finish(job)
        starts = lab.account(job)
        assert [attempt["outcome"] for attempt in attempts][-2:] == ["closed", "opened"]
        assert attempts[-1]["survivors"] == list(SITES)
        lab.wait_whole()
        return _seen(attempts, starts)

    return play


def _kills() -> Iterator[FaultCase]:
    for step in STEPS:
        # After `update` the killed hospital is part of the sum already.
        least = 4 if step in ("consistency", "unmask") else 3
        repeated = [("birch", "train", 1)] if step == "update" else []
        yield FaultCase(
            f"kill-site-{step}",
            f"the sum is opened over {least} hospitals or more; the killed one comes back",
            420,
            _with_job(kill_site("birch", step), least, repeated),
        )
    for step in STEPS:
        closes = step == "unmask"
        act = kill_coordinator(step)
        yield FaultCase(
            f"kill-coordinator-{step}",
            "the round is closed, the next one opened"
            if closes
            else "the round is done again with stored results; nobody trains twice",
            420,
            _closes(act) if closes else _with_job(act, 3),
        )
    for step in STEPS:
        act = kill_superlink(step)
        yield FaultCase(
            f"kill-superlink-{step}",
            "SuperLink comes back and another run goes on; nobody trains twice",
            420,
            _superlink_killed(act),
        )


def _superlink_killed(act: Act) -> Callable[[Lab], dict[str, Any]]:
    def play(lab: Lab) -> dict[str, Any]:
        job = lab.submit(rounds=2)
        act(lab, job)
        attempts = lab.finish(job)
        starts = lab.account(job)
        # Killed in `unmask` it may have delivered all shares, or the round is closed.
        assert attempts[-1]["outcome"] == "opened"
        lab.wait_whole()
        return _seen(attempts, starts)

    return play


# --- the network --------------------------------------------------------------------------------


def _cut_for_ever(lab: Lab) -> dict[str, Any]:
    job = lab.submit()
    lab.reach("birch", "update")
    lab.lines["birch"].is_cut = True
    try:
        attempts = lab.finish(job)
        starts = lab.account(job)
        assert attempts[-1]["survivors"] == ["alder", "cedar", "dogwood"]
        until(lambda: lab.problem("birch"), "birch to notice", 180)
        problem = lab.problem("birch")
    finally:
        lab.lines["birch"].is_cut = False
    lab.wait_whole()
    return {**_seen(attempts, starts), "problem": problem}


def _late_and_lossy(lab: Lab) -> dict[str, Any]:
    return _on_lines(lab, Line(delay_s=0.2, loss=0.02), round_timeout_s=240, step_timeout_s=60)


def _slow(lab: Lab) -> dict[str, Any]:
    return _on_lines(
        lab, Line(bytes_per_s=4e6 / 8), size="small", round_timeout_s=600, step_timeout_s=60
    )


def _damaged(lab: Lab) -> dict[str, Any]:
    return _on_lines(lab, Line(damage=0.02), round_timeout_s=240, step_timeout_s=60)


def _on_lines(lab: Lab, like: Line, **job: Any) -> dict[str, Any]:
    """Do a round over lines like that."""
    before = {name: dataclasses.replace(line) for name, line in lab.lines.items()}
    carried = sum(line.carried for line in lab.lines.values())
    for line in lab.lines.values():
        _spoil(line, like)
    began = time.monotonic()
    try:
        number = lab.submit(**job)
        attempts = lab.finish(number, 600)
        took = time.monotonic() - began
        starts = lab.account(number)
    finally:
        for name, line in lab.lines.items():
            _spoil(line, before[name])
    assert len(attempts[-1]["survivors"]) >= 3
    lab.wait_whole()
    moved = sum(line.carried for line in lab.lines.values()) - carried
    return {**_seen(attempts, starts), "round_s": round(took, 1), "carried_bytes": moved}


def _spoil(line: Line, like: Line) -> None:
    line.delay_s, line.loss = like.delay_s, like.loss
    line.bytes_per_s, line.damage = like.bytes_per_s, like.damage


def _hostile_messages(lab: Lab) -> dict[str, Any]:
    """A hospital's own certificate sends rubbish and far too much, while a job runs."""
    job = lab.submit()
    lab.reach("alder", "shares")
    folder = lab.site("birch").folder / "federation"
    trusted = ssl.create_default_context(cafile=str(folder / "authority.pem"))
    trusted.load_cert_chain(folder / "certificate.pem", folder / "tls.key")
    url = f"https://127.0.0.1:{lab.federation.port}/v1/fleet"
    codes = set()
    with httpx.Client(verify=trusted, trust_env=False, timeout=30) as client:
        for name in ("pull-messages", "push-messages", "push-object", "send-node-heartbeat"):
            codes.add(client.post(f"{url}/{name}", content=os.urandom(4096)).status_code)
        codes.add(client.post(f"{url}/../control/start-run", content=b"").status_code)
    codes.add(_announce(lab.federation.port, trusted, 1 << 40))
    assert all(400 <= code < 500 for code in codes), codes
    attempts = lab.finish(job)
    starts = lab.account(job)
    assert attempts[-1]["survivors"] == list(SITES)
    return {**_seen(attempts, starts), "answers": sorted(codes)}


def _announce(port: int, trusted: ssl.SSLContext, size: int) -> int:
    """Begin to send a message of ``size`` bytes; return what is answered to that."""
    connection = HTTPSConnection("127.0.0.1", port, timeout=30, context=trusted)
    with closing(connection):
        connection.putrequest("POST", "/v1/fleet/push-object")
        connection.putheader("content-length", str(size))
        connection.endheaders(b"0" * 4096)
        return connection.getresponse().status


# --- disks, databases, clocks -------------------------------------------------------------------


def _site_disk_full(lab: Lab) -> dict[str, Any]:
    """The disk of a hospital's agent is full for one job, and has room again for the next."""
    site = lab.site("birch")
    assert lab.service("birch").stop() == 0
    with small_disk(site.folder, 64) as filled:
        lab.restart("birch")
        lab.wait_whole()
        with filled():
            job = lab.submit()
            attempts = lab.finish(job)
            starts = lab.account(job)
            assert attempts[-1]["survivors"] == ["alder", "cedar", "dogwood"]
        again = lab.submit()
        assert lab.finish(again)[-1]["survivors"] == list(SITES)
        lab.account(again)
        assert lab.service("birch").stop() == 0
    lab.restart("birch")
    lab.wait_whole()
    losses = [loss for attempt in attempts for loss in attempt["losses"]]
    return {**_seen(attempts, starts), "losses": losses}


def _coordinator_disk_full(lab: Lab) -> dict[str, Any]:
    """The disk of the models is full when a round is to be committed; room is made; resumed."""
    lab.home.jobs.mkdir(mode=0o700, exist_ok=True)
    with small_disk(lab.home.jobs, 512) as filled:
        job = lab.submit(rounds=2)
        lab.reach("alder", "update")
        with filled():
            until(lambda: lab.job(job).state == "failed", "the job to say so", 240)
            reason = lab.job(job).reason or ""
            assert "space" in reason or "cannot be written" in reason, reason
        lab.federation.fedcmr("coordinator", "resume", job)
        attempts = lab.finish(job)
        starts = lab.account(job)
        assert attempts[-1]["survivors"] == list(SITES)
    return {**_seen(attempts, starts), "reason": reason}


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Callable[[], Any]]:
    """Put what is in ``folder`` on a disk of its own; yields what fills that up for a block.

    Raises:
        CannotRun: disks cannot be mounted here.
    """
    if os.geteuid() != 0:
        raise CannotRun("a small disk needs root (mount of a tmpfs)")
    aside = folder.with_name(f"{folder.name}.aside")
    shutil.copytree(folder, aside)
    options = ("-t", "tmpfs", "-o", f"size={megabytes}m,mode=0700", "tmpfs")
    mounted = subprocess.run(["mount", *options, str(folder)], capture_output=True, check=False)
    if mounted.returncode != 0:
        shutil.rmtree(aside)
        raise CannotRun(f"a small disk cannot be mounted: {mounted.stderr.decode().strip()}")

    @contextmanager
    def filled() -> Iterator[None]:
        ballast = folder / "ballast"
        with suppress(OSError), ballast.open("wb", buffering=0) as stream:
            while True:
                stream.write(bytes(4096))
        try:
            yield
        finally:
            ballast.unlink()

    try:
        shutil.copytree(aside, folder, dirs_exist_ok=True)
        yield filled
    finally:
        shutil.rmtree(aside)
        shutil.copytree(folder, aside)
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        shutil.rmtree(folder)
        aside.rename(folder)


def _clock_a_day_ahead(lab: Lab) -> dict[str, Any]:
    """A hospital's clock is a day ahead: it is not let in, says why, and comes back once right."""
    if not Path(_CLOCKS).exists():
        raise CannotRun("libfaketime is not installed")
    site = lab.site("birch")
    assert lab.service("birch").stop() == 0
    ahead = {"LD_PRELOAD": _CLOCKS, "FAKETIME": "+1d", "DONT_FAKE_MONOTONIC": "1"}
    site.environment.update(ahead)
    lab.restart("birch")
    until(lambda: "clock" in lab.problem("birch"), "birch to name its clock", 120)
    problem = lab.problem("birch")
    job = lab.submit()
    attempts = lab.finish(job)
    starts = lab.account(job)
    assert attempts[-1]["survivors"] == ["alder", "cedar", "dogwood"]
    assert lab.service("birch").stop() == 0
    for name in ahead:
        del site.environment[name]
    lab.restart("birch")
    lab.wait_whole()
    return {**_seen(attempts, starts), "problem": problem}


# --- certificates, identities, states -----------------------------------------------------------


def _revoked(lab: Lab) -> dict[str, Any]:
    job = lab.submit(rounds=2)
    revoke("dogwood")(lab, job)
    attempts = lab.finish(job)
    starts = lab.account(job)
    assert attempts[-1]["survivors"] == ["alder", "birch", "cedar"]
    until(lambda: lab.problem("dogwood"), "dogwood to say so", 120)
    return {**_seen(attempts, starts), "problem": lab.problem("dogwood")}


def _second_agent(lab: Lab) -> dict[str, Any]:
    """A copy of a hospital's folder is started beside it: it is not let in while the first runs."""
    site = lab.site("birch")
    folder = site.folder.with_name("copy")
    shutil.copytree(site.folder, folder, ignore=shutil.ignore_patterns("run", "logs"))
    copy = dataclasses.replace(site, folder=folder, service=None)
    _allow(copy, str(site.folder / "ledger"), str(folder / "ledger"))
    command = ["site", "start", "--policy", str(copy.policy)]
    copy.service = lab.federation.service("birch-copy", copy.host, command, {})
    try:
        job = lab.submit(rounds=1)
        attempts = lab.finish(job)
        starts = lab.account(job)
        assert attempts[-1]["survivors"] == list(SITES)
        said = copy.service.said()
        assert "SuperNode ID" not in said
        assert "does not let the node in" in said or "another agent" in said
        line = next(
            (text for text in said.splitlines() if "not let" in text or "another" in text), ""
        )
    finally:
        copy.service.kill()
        shutil.rmtree(folder)
    return {**_seen(attempts, starts), "copy_says": line}


def _older_state(lab: Lab) -> dict[str, Any]:
    """A hospital's ledger is put back to a backup: the agent refuses; with the newest it works."""
    site = lab.site("birch")
    ledger, backup = site.folder / "ledger", site.home / "backup"
    assert lab.service("birch").stop() == 0
    shutil.copytree(ledger, backup)
    lab.restart("birch")
    lab.wait_whole()
    job = lab.submit()
    attempts = lab.finish(job)
    assert lab.service("birch").stop() == 0
    newest = ledger.rename(site.home / "newest")
    backup.rename(ledger)
    site.start()
    code = lab.service("birch").process.wait(120)
    said = lab.service("birch").said().strip().splitlines()[-1]
    assert code != 0
    assert "second-place" in said or "backup" in said or "head" in said, said
    shutil.rmtree(ledger)
    newest.rename(ledger)
    lab.restart("birch")
    lab.wait_whole()
    return {**_seen(attempts, lab.account(job)), "refusal": said}


def _clean_leave(lab: Lab) -> dict[str, Any]:
    """SIGTERM while it trains: the task ends, the node signs off, and may come back at once."""
    job = lab.submit()
    lab.reach("birch", "update")
    assert lab.service("birch").stop(120) == 0
    began = time.monotonic()
    lab.restart("birch")
    until(lambda: lab.site("birch").is_connected(), "birch to be back at once", 55)
    back = time.monotonic() - began
    attempts = lab.finish(job)
    starts = lab.account(job)
    assert attempts[-1]["outcome"] == "opened"
    lab.wait_whole()
    return {**_seen(attempts, starts), "back_s": round(back, 1)}


def _seen(attempts: list[dict[str, Any]], starts: dict[str, int]) -> dict[str, Any]:
    return {
        "attempts": [f"{a['outcome']} with {len(a['survivors'])}" for a in attempts],
        "starts": starts,
    }


def _count(lab: Lab, job: str, name: str) -> int:
    return sum(event["event"] == name for event in lab.events(job))


def _allow(site: Site, old: str, new: str) -> None:
    text = site.policy.read_text()
    assert old in text, old
    site.policy.write_text(text.replace(old, new))


def _command_line(pid: int) -> list[str]:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    return []


def _is_superlink(command: list[str]) -> bool:
    # Its leash has the same words after its own.
    return "fedcmr_server.process_leash" not in command and any(
        word.endswith("/flower-superlink") for word in command[:2]
    )


CASES: Final[tuple[FaultCase, ...]] = (
    *_kills(),
    FaultCase(
        "cut-1s", "nobody notices: all four are in the sum", 240, _with_job(cut("birch", 1), 4)
    ),
    FaultCase("cut-30s", "three or four are in the sum", 300, _with_job(cut("birch", 30), 3)),
    FaultCase(
        "cut-for-ever", "the job goes on with three; the hospital says why", 480, _cut_for_ever
    ),
    FaultCase("latency-200ms-loss-2pct", "the round is opened, more slowly", 600, _late_and_lossy),
    FaultCase("slow-link-4mbit-small", "the round is opened, more slowly", 900, _slow),
    FaultCase("damaged-bytes", "TLS drops what is damaged; it is sent again", 600, _damaged),
    FaultCase(
        "hostile-messages", "each gets an error of its own; the job goes on", 240, _hostile_messages
    ),
    FaultCase("disk-full-site", "a drop-out until there is room", 480, _site_disk_full),
    FaultCase(
        "disk-full-coordinator",
        "the job fails by name; resumed, it goes on",
        480,
        _coordinator_disk_full,
    ),
    FaultCase(
        "database-restart",
        "the round waits for PostgreSQL; nothing is lost",
        420,
        _with_job(restart_database(10), 3),
    ),
    FaultCase("clock-a-day-ahead", "it is not let in and says why", 480, _clock_a_day_ahead),
    FaultCase("second-agent", "the copy is not let in", 300, _second_agent),
    FaultCase("older-state", "the agent refuses to start", 420, _older_state),
    FaultCase("clean-leave", "the task ends, and it is back at once", 420, _clean_leave),
    FaultCase("revoked", "a drop-out at its next message; three go on", 480, _revoked, spoils=True),
)
"""All cases, those that spoil the federation last."""
