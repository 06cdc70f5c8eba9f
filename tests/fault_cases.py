"""What can go wrong in a running federation, and what must come of it.

Each case breaks one thing in the federation of `fault_lab` and asserts the outcome.
"""

from __future__ import annotations

import base64
import dataclasses
import os
import shutil
import signal
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPSConnection
from pathlib import Path
from typing import Any, Final

import httpx
from bad_link import CUT, GOOD, Line
from deployment import SITES, session_of, until
from fault_lab import Lab, Repeated, edit_policy
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER

from fedcmr_server.authoriser import flower_key
from fedcmr_shared.identity.enrolment import EnrolmentRequest
from fedcmr_shared.secagg.messages import STEPS

OTHERS: Final = [name for name in SITES if name != "birch"]


class CannotRun(Exception):
    """This machine cannot show the case; says why."""


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
        lab.links[name].line = CUT
        time.sleep(seconds)  # the fault itself
        lab.links[name].line = GOOD

    return act


def restart_database(seconds: float) -> Act:
    """Stop PostgreSQL in the middle of a round, and start it again."""

    def act(lab: Lab, job: str) -> None:
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
    lab.links["birch"].line = CUT
    attempts = lab.finish(job)
    starts = lab.account(job)
    assert attempts[-1]["survivors"] == OTHERS
    problem = lab.wait_problem("birch")
    lab.links["birch"].line = GOOD
    lab.wait_whole()
    return {**_seen(attempts, starts), "problem": problem}


def _on_lines(line: Line, **job: Any) -> Callable[[Lab], dict[str, Any]]:
    """Do a round over lines like that."""

    def play(lab: Lab) -> dict[str, Any]:
        links = lab.links.values()
        carried = sum(link.carried for link in links)
        for link in links:
            link.line = line
        began = time.monotonic()
        number = lab.submit(**job)
        attempts = lab.finish(number, 600)
        took = time.monotonic() - began
        starts = lab.account(number)
        for link in links:
            link.line = GOOD
        assert len(attempts[-1]["survivors"]) >= 3
        lab.wait_whole()
        moved = sum(link.carried for link in links) - carried
        return {**_seen(attempts, starts), "round_s": round(took, 1), "carried_bytes": moved}

    return play


def _hostile_messages(lab: Lab) -> dict[str, Any]:
    """A hospital's own certificate sends rubbish and far too much, while a job runs."""
    job = lab.submit()
    lab.reach("alder", "shares")
    folder = lab.site("birch").folder / "federation"
    trusted = ssl.create_default_context(cafile=str(folder / "authority.pem"))
    trusted.load_cert_chain(folder / "certificate.pem", folder / "tls.key")
    url = f"https://127.0.0.1:{lab.federation.port}/v1/fleet"
    paths = ("pull-messages", "push-messages", "push-object", "send-node-heartbeat")
    answers = {"announced": _announce(lab.federation.port, trusted, 1 << 40)}
    with httpx.Client(verify=trusted, trust_env=False, timeout=30) as client:
        for path in (*paths, "../control/start-run"):
            rubbish = os.urandom(4096)
            answers[path] = client.post(f"{url}/{path}", content=rubbish).status_code
            # With its node key it gets past the gateway, and without a signature no further.
            answer = client.post(f"{url}/{path}", content=rubbish, headers=_shown_key(folder))
            answers[f"{path}, with key"] = answer.status_code
    assert all(400 <= code < 500 for code in answers.values()), answers
    attempts = lab.finish(job)
    starts = lab.account(job)
    assert attempts[-1]["survivors"] == list(SITES)
    return {**_seen(attempts, starts), "answers": answers}


def _shown_key(folder: Path) -> dict[str, str]:
    node_key = EnrolmentRequest.read(folder / "request.json").node_key
    assert node_key is not None
    return {FLEET_HTTP_PUBLIC_KEY_HEADER: base64.b64encode(flower_key(node_key)).decode()}


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
            assert attempts[-1]["survivors"] == OTHERS
        starts = lab.account(job)
        again = lab.submit()
        assert lab.finish(again)[-1]["survivors"] == list(SITES)
        lab.account(again)
        assert lab.service("birch").stop() == 0
    lab.restart("birch")
    lab.wait_whole()
    losses = [loss for attempt in attempts for loss in attempt["losses"]]
    return {**_seen(attempts, starts), "losses": losses}


def _coordinator_disk_full(lab: Lab) -> dict[str, Any]:
    """The disk of the models is full before a sum is opened; room is made; resumed."""
    lab.home.jobs.mkdir(mode=0o700, exist_ok=True)
    with small_disk(lab.home.jobs, 512) as filled:
        job = lab.submit()
        lab.reach("alder", "update")
        with filled():
            until(lambda: lab.job(job).state == "failed", "the job to say so", 240)
            reason = lab.job(job).reason or ""
            assert "make room" in reason
        lab.federation.fedcmr("coordinator", "resume", job)
        attempts = lab.finish(job)
        starts = lab.account(job)
        assert attempts[-1]["survivors"] == list(SITES)
    return {**_seen(attempts, starts), "reason": reason}


@contextmanager
def small_disk(
    folder: Path, megabytes: int
) -> Iterator[Callable[[], AbstractContextManager[None]]]:
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
        shutil.rmtree(aside)
        shutil.copytree(folder, aside)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
    shutil.rmtree(folder)
    aside.rename(folder)


def _clock_off(seconds: int) -> Callable[[Lab], dict[str, Any]]:
    """A hospital's clock is off: it is not let in, says why, and comes back once it is right."""

    def play(lab: Lab) -> dict[str, Any]:
        site = lab.site("birch")
        environment = _skewed_clock(lab.federation.folder, seconds)
        assert lab.service("birch").stop() == 0
        site.environment.update(environment)
        lab.restart("birch")
        problem = lab.wait_problem("birch", "clock")
        job = lab.submit()
        attempts = lab.finish(job)
        starts = lab.account(job)
        assert attempts[-1]["survivors"] == OTHERS
        assert lab.service("birch").stop() == 0
        site.environment.clear()
        lab.restart("birch")
        lab.wait_whole()
        again = lab.submit()  # no entry in its ledger has the wrong time
        assert lab.finish(again)[-1]["survivors"] == list(SITES)
        return {**_seen(attempts, starts), "problem": problem}

    return play


def _skewed_clock(folder: Path, seconds: int) -> dict[str, str]:
    """Return the environment in which programs see a clock that is so far ahead."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise CannotRun("a wrong clock needs a C compiler")
    library = folder / "skewed_clock.so"
    options = ["-shared", "-fPIC", f"-DAHEAD={seconds}", "-o", library, "-ldl"]
    source = Path(__file__).with_name("skewed_clock.c")
    subprocess.run([compiler, source, *options], check=True)
    return {"LD_PRELOAD": str(library)}


# --- certificates, identities, states -----------------------------------------------------------


def _revoked(lab: Lab) -> dict[str, Any]:
    job = lab.submit(rounds=2)
    revoke("dogwood")(lab, job)
    attempts = lab.finish(job)
    starts = lab.account(job)
    assert attempts[-1]["survivors"] == ["alder", "birch", "cedar"]
    return {**_seen(attempts, starts), "problem": lab.wait_problem("dogwood")}


def _second_agent(lab: Lab) -> dict[str, Any]:
    """A copy of a hospital's folder is started beside it: it is not let in while the first runs."""
    site = lab.site("birch")
    folder = site.folder.with_name("copy")
    shutil.copytree(site.folder, folder, ignore=shutil.ignore_patterns("run", "logs"))
    copy = dataclasses.replace(site, folder=folder, service=None)
    edit_policy(copy, str(site.folder / "ledger"), str(folder / "ledger"))
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


def _command_line(pid: int) -> list[str]:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    return []


def _is_superlink(command: list[str]) -> bool:
    # Its leash has the same words after its own.
    return "fedcmr_server.process_leash" not in command and (
        "fedcmr_server.superlink_process" in command
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
    FaultCase(
        "latency-200ms-loss-2pct",
        "the round is opened, more slowly",
        600,
        _on_lines(Line(delay_s=0.2, loss=0.02), round_timeout_s=240),
    ),
    FaultCase(
        "slow-link-4mbit-small",
        "the round is opened, more slowly",
        900,
        _on_lines(Line(bytes_per_s=4e6 / 8), size="small", round_timeout_s=600),
    ),
    FaultCase(
        "damaged-bytes",
        "TLS drops what is damaged; it is sent again",
        600,
        _on_lines(Line(damage=0.02), round_timeout_s=240),
    ),
    FaultCase(
        "hostile-messages", "each gets an error of its own; the job goes on", 240, _hostile_messages
    ),
    FaultCase("disk-full-site", "a drop-out until there is room", 480, _site_disk_full),
    FaultCase(
        "disk-full-coordinator",
        "the job fails by name; resumed, nobody trains twice",
        480,
        _coordinator_disk_full,
    ),
    FaultCase(
        "database-restart",
        "the round waits for PostgreSQL; nothing is lost",
        420,
        _with_job(restart_database(10), 3),
    ),
    FaultCase("clock-a-day-ahead", "it is not let in and says why", 480, _clock_off(86_400)),
    FaultCase("clock-a-day-behind", "it is not let in and says why", 480, _clock_off(-86_400)),
    FaultCase("second-agent", "the copy is not let in", 300, _second_agent),
    FaultCase("older-state", "the agent refuses to start", 420, _older_state),
    FaultCase("clean-leave", "the task ends, and it is back at once", 420, _clean_leave),
    FaultCase("revoked", "a drop-out at its next message; three go on", 480, _revoked, spoils=True),
)
"""All cases, those that spoil the federation last."""
