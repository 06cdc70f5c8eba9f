"""A real federation for system tests: processes, files and commands as users run them.

Every host may have a network namespace of its own. What the tests wait for, they poll for with a
deadline; nothing is assumed to take a certain time.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import pytest
from network_namespaces import Host, Network

from fedcmr_shared.identity.enrolment import EnrolmentRequest, StartupKit

FEDCMR: Final = Path(sys.executable).with_name("fedcmr")
SITES: Final = ("alder", "birch", "cedar", "dogwood")
ENVIRONMENT: Final = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

JOB: Final = """\
name: heart
coordinator: coordinator
rounds: {rounds}
minimum_sites: 3
round_timeout_s: 120
model: {{size: tiny, text_encoder: hashed}}
sampling: {{accelerations: [4.0], acs_lines: 8}}
training: {{part: adapters, local_steps: 2}}
privacy:
  cohort_size: 10
  sampling_rate: 0.5
  noise_multiplier: 4.0
  spare_rounds: 2
  evaluation: {{noise_multiplier: 8.0, cohort_size: 2}}
secure: {{step_timeout_s: 30}}
"""

Found = TypeVar("Found")


def until(
    condition: Callable[[], Found | None],
    what: str,
    timeout_s: float = 120.0,
    pause_s: float = 0.2,
) -> Found:
    """Return the first true value of ``condition``; fail with ``what`` when it does not come."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s:g} s for: {what}")
        time.sleep(pause_s)


@dataclass
class Service:
    """A process that runs until it is stopped, with all that it started."""

    process: subprocess.Popen[bytes]
    log: Path
    began_at: int = 0

    def said(self) -> str:
        """Return what this process, not an earlier one with the same log, has written."""
        return self.log.read_bytes()[self.began_at :].decode(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process alone."""
        self.process.send_signal(number)

    def stop(self, patience_s: float = 60.0) -> int:
        """End it as an init system would; return its exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            code = self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        self._kill_group()
        return code

    def kill(self) -> None:
        """End it as a power cut would: the process and its whole control group."""
        self._kill_group()
        self.process.wait(10)

    def _kill_group(self) -> None:
        for pid in session_of(self.process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


@dataclass
class Site:
    """One hospital: its folder, its host and its agent while that runs."""

    name: str
    folder: Path
    store: Path
    host: Host
    federation: Federation
    proxy: str | None = None
    service: Service | None = None
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        """Everything of the hospital, and nothing of others."""
        return self.folder.parent

    @property
    def policy(self) -> Path:
        return self.folder / "policy.yaml"

    def fedcmr(self, *arguments: str, **options: Any) -> Any:
        """Run a command of this site and return its JSON."""
        return run(self.host, arguments, self.environment, **options)

    def create(self) -> None:
        """Make policy, ledger, keys and request."""
        second = self.home / "second-place"
        second.mkdir(parents=True)
        options = {"--store": self.store, "--name": self.name, "--second-place": second}
        words = [str(word) for pair in options.items() for word in pair]
        self.fedcmr("site", "init", str(self.folder), *words, *ALLOWED)
        text = self.policy.read_text()
        for old, new in POLICY.items():
            assert old in text, old
            text = text.replace(old, new)
        self.policy.write_text(text)
        if self.proxy is not None:
            (self.folder / "agent.yaml").write_text(f"proxy: {self.proxy}\n")

    def join(self) -> None:
        """Have the coordinator enrol the site, and pin what comes back."""
        asked = self.folder / "federation" / "request.json"
        kit = self.home / "kit.json"
        self.federation.fedcmr(
            *("coordinator", "enrol", str(asked), "--kit", str(kit)),
            *("--fingerprint", EnrolmentRequest.read(asked).fingerprint),
        )
        self.fedcmr(
            *("site", "join", str(kit), "--policy", str(self.policy)),
            *("--fingerprint", StartupKit.read(kit).fingerprint),
        )

    def pin_roster(self) -> None:
        """Accept the newest roster, as somebody does who compared its fingerprint."""
        fetched = self.fedcmr("site", "roster", "fetch", "--policy", str(self.policy))
        self.fedcmr(
            *("site", "roster", "accept", "--policy", str(self.policy)),
            *("--fingerprint", fetched["fingerprint"]),
        )

    def is_connected(self) -> bool:
        """Whether the agent says so."""
        assert self.service is not None
        assert self.service.process.poll() is None, self.service.log.read_text()
        report = self.folder / "federation" / "run" / "health.json"
        return report.exists() and bool(json.loads(report.read_text())["connected"])

    def start(self) -> Service:
        """Start the agent."""
        command = ["site", "start", "--policy", str(self.policy)]
        self.service = self.federation.service(self.name, self.host, command, self.environment)
        return self.service


ALLOWED: Final = ("--coordinator", "coordinator", "--job", "heart*", "--model", "cardiomm/tiny")
POLICY: Final = {
    "require_consent: true": "require_consent: false",
    "reply_tick_s: 60.0": "reply_tick_s: 0.2",
    "roster: null": "roster: roster.yaml",
}


@dataclass
class Federation:
    """A coordinator, its hospitals and what runs of them."""

    folder: Path
    network: Network
    database_url: str | None = None
    port: int = 0
    sites: dict[str, Site] = field(default_factory=dict)
    coordinator: Service | None = None
    _services: list[Service] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.host = self.network.host("coordinator")
        self.port = 8443 if self.network.isolated else free_port()

    @classmethod
    @contextmanager
    def open(cls, folder: Path, *, isolated: bool = True, **options: Any) -> Iterator[Federation]:
        """Make the coordinator's folder; every process is gone afterwards.

        Without ``isolated`` all hosts share this machine's loopback, where a `BadLink` listens.
        """
        with Network.open(isolated) as network, ExitStack() as stack:
            made = cls(folder, network, **options)
            stack.callback(made._stop_all)
            words = ["--federation", "heart", "--host", made.host.address]
            words += ["--port", str(made.port)]
            if made.database_url is not None:
                words += ["--database-url", made.database_url]
            run(made.host, ["coordinator", "init", str(made.home), *words], {})
            yield made

    @property
    def home(self) -> Path:
        return self.folder / "coordinator"

    @property
    def job_file(self) -> Path:
        """The job that was submitted last."""
        return self.folder / "job.yaml"

    def fedcmr(self, *arguments: str, **options: Any) -> Any:
        """Run a command of the coordinator and return its JSON."""
        return run(self.host, arguments, {"FEDCMR_COORDINATOR": str(self.home)}, **options)

    def start(self) -> Service:
        """Start the coordinator and wait until its port answers."""
        command = ["coordinator", "start"]
        environment = {"FEDCMR_COORDINATOR": str(self.home)}
        self.coordinator = self.service("coordinator", self.host, command, environment)
        self.wait_ready()
        return self.coordinator

    def wait_ready(self) -> None:
        """Wait until the coordinator's line says that it is ready."""
        assert self.coordinator is not None
        service = self.coordinator

        def ready() -> bool:
            said = service.said()
            assert service.process.poll() is None, said
            return "\nready: " in "\n" + said

        until(ready, "the coordinator to be ready", 60)

    def add_site(self, name: str, store: Path, **options: Any) -> Site:
        """Make a hospital on a host of its own."""
        folder = self.folder / "hospitals" / name / "site"
        site = Site(name, folder, store, self.network.host(name), self, **options)
        self.sites[name] = site
        site.create()
        return site

    def wait_connected(self) -> None:
        """Wait until every agent that runs says that it is connected."""
        for site in self.sites.values():
            if site.service is not None:
                until(site.is_connected, f"{site.name} to be connected")

    def submit(self, rounds: int = 2, **changes: str) -> str:
        """Submit a small private job; return its id."""
        text = JOB.format(rounds=rounds)
        for old, new in changes.items():
            text += f"{old}: {new}\n"
        self.job_file.write_text(text)
        submitted = self.fedcmr("coordinator", "submit", str(self.job_file))
        return str(submitted["id"])

    def job(self, job: str) -> dict[str, Any]:
        """What `fedcmr coordinator status JOB` says."""
        return dict(self.fedcmr("coordinator", "status", job))

    def wait_for(self, job: str, state: str, timeout_s: float = 180.0) -> dict[str, Any]:
        """Wait until the job is in ``state``; fail at once when it failed instead."""

        def reached() -> dict[str, Any] | None:
            found = self.job(job)
            if found["state"] == state:
                return found
            assert found["state"] != "failed", found
            return None

        # Each look starts a process.
        return until(reached, f"job {job[:12]} to be {state}", timeout_s, pause_s=2.0)

    def service(
        self,
        name: str,
        host: Host,
        command: Sequence[str],
        environment: Mapping[str, str],
    ) -> Service:
        """Start a process that stays."""
        log = self.folder / f"{name}.out"
        with log.open("ab") as stream:
            began_at = stream.tell()
            process = subprocess.Popen(
                host.command([str(FEDCMR), *command]),
                env={**os.environ, **ENVIRONMENT, **environment},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        made = Service(process, log, began_at)
        self._services.append(made)
        return made

    def _stop_all(self) -> None:
        for service in self._services:
            service.kill()


def run(
    host: Host,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    *,
    fails: bool = False,
    timeout_s: float = 120.0,
) -> Any:
    """Run `fedcmr … --json` on ``host`` and return what it printed."""
    done = subprocess.run(
        host.command([str(FEDCMR), *arguments, "--json"]),
        env={**os.environ, **ENVIRONMENT, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert (done.returncode != 0) == fails, f"{arguments}: {done.stdout}{done.stderr}"
    return json.loads(done.stdout) if done.stdout.strip() else {}


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A temporary folder whose name leaves room for sockets: a socket's path must be short."""
    with tempfile.TemporaryDirectory(prefix="fc") as name:
        yield Path(name)


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def missing_programs() -> str:
    """Say why no federation can run on this machine, or nothing."""
    return "" if shutil.which("nginx") else "nginx is not installed"


def session_of(leader: int) -> list[int]:
    """Process ids of a session and of the sessions that its members began."""
    parents: dict[int, tuple[int, int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (OSError, ValueError):
            continue
        parents[int(entry.name)] = (int(fields[1]), int(fields[3]))
    found = {leader}
    while True:
        more = {
            pid
            for pid, (parent, session) in parents.items()
            if pid not in found and (parent in found or session == leader)
        }
        if not more:
            return sorted(found & parents.keys())
        found |= more
