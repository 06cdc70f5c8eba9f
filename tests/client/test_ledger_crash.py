"""A ledger killed at every statement: charges are never fewer than what was done.

Run as a program, this file plays a job's whole life once for each point at which something is
written (`python test_ledger_crash.py FOLDER ORDER STRIDE`), kills the player there with SIGKILL, and
reports what the next process finds. ORDER is the ledger's own or a deliberately wrong one, which
the matrix must catch.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine.default import DefaultDialect

from fedcmr_client.ledger import CheckpointSchedule, Ledger, LedgerPlace
from fedcmr_client.ledger.log import SignedLog
from fedcmr_shared.errors import LedgerError
from fedcmr_shared.privacy.budget import JobState, replay
from fedcmr_shared.schemas.job import JobSpec, TrainingSpec
from fedcmr_shared.schemas.ledger import Checkpoint, Phase
from fedcmr_shared.schemas.privacy import PrivacySpec

SECRET = b"n" * 32
JOB = JobSpec(rounds=1, training=TrainingSpec(local_steps=5), privacy=PrivacySpec(spare_rounds=1))
ROUNDS: list[tuple[Phase, int]] = [("train", 1), ("evaluate", 1)]


@dataclass(frozen=True)
class Finding:
    """What one killed life left behind.

    ``charged`` counts starts, masked attempts and opened sums in the ledger, ``spent`` those that
    were done.
    """

    point: int
    name: str
    charged: int
    spent: int
    finished: bool
    old_backup_is_safe: bool


@dataclass(frozen=True)
class Scene:
    """One life's folders."""

    folder: Path

    @property
    def place(self) -> LedgerPlace:
        return LedgerPlace(self.folder / "ledger", self.folder / "head")

    @property
    def work(self) -> Path:
        """One line for each start of work on patients' data and each answer that left."""
        return self.folder / "work"

    @property
    def backup(self) -> Path:
        """Copy of the ledger from before the last deed."""
        return self.folder / "backup"

    def spent(self) -> int:
        return len(self.work.read_text().splitlines()) if self.work.exists() else 0


def live(scene: Scene, order: str = "right") -> None:
    """Play a job from its admission to its end; picks up whatever is there already."""
    with open_or_create(scene.place) as ledger:
        job = JOB.sha256
        if ledger.budget.status(job) != "closed":
            ledger.admit(JOB, policy_sha256="0" * 64, training=["p-1", "p-2"], evaluation=["p-4"])
        for phase, number in ROUNDS:
            if ledger.stored(job, phase, number) is None:
                with deed(ledger, scene, order):
                    attempt = ledger.start(job, phase, number)
                ledger.store(job, phase, number, attempt, f"{phase} {number}".encode())
            if (phase, number) == ROUNDS[-1]:
                ledger.checkpoint()
                ledger.withdraw("p-1")
                ledger.finish(job, "finished")
            open_sum(ledger, scene, order, phase, number)


def open_sum(ledger: Ledger, scene: Scene, order: str, phase: Phase, number: int) -> None:
    """Send the stored result under masks and help to open the sum; in a new attempt if cut off."""
    job, place = JOB.sha256, (phase, number)
    state = ledger.budget.jobs[job]
    if place in state.unmasked:
        return
    attempt = state.masked.get(place, 0) + 1
    with deed(ledger, scene, order):
        ledger.mask(job, phase, number, attempt, "4" * 64)
    with deed(ledger, scene, order):
        ledger.unmask(job, phase, number, attempt, ("east", "north", "south"), "5" * 64)


def open_or_create(place: LedgerPlace) -> Ledger:
    try:
        return Ledger.create(
            place,
            site="north",
            secret=SECRET,
            epsilon=8.0,
            delta=1e-5,
            order=6,
            schedule=CheckpointSchedule(leaves=12),
        )
    except LedgerError:
        return Ledger.open(place, secret=SECRET)


def copy_ledger(ledger: Ledger, scene: Scene) -> None:
    if paused.points is not None:
        with paused():
            shutil.rmtree(scene.backup, ignore_errors=True)
            ledger.backup(scene.backup)


@contextmanager
def deed(ledger: Ledger, scene: Scene, order: str) -> Iterator[None]:
    """Do something in the right order: first the entry, which is written inside, then the deed."""
    copy_ledger(ledger, scene)
    if order == "charged-after":
        do(scene)
    yield
    if order != "charged-after":
        do(scene)


def do(scene: Scene) -> None:
    """Mark that gradients of patients are computed, or that an answer is away, from now on."""
    with paused():
        descriptor = os.open(scene.work, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, b"done\n")
        os.fsync(descriptor)
        os.close(descriptor)


class Points:
    """Counts the moments before something is done to a disk, and kills the process at one of them.

    The moment after it leaves the same disk as the moment before the next one, and so does a
    statement that only reads.
    """

    def __init__(self, deadly: int | None) -> None:
        self.deadly = deadly
        self.names: list[str] = []
        self.active = True

    def reach(self, name: str) -> None:
        if not self.active:
            return
        if len(self.names) == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        self.names.append(name)

    def around(self, owner: Any, function: str) -> None:
        original: Callable[..., Any] = getattr(owner, function)

        def watched(*arguments: Any, **named: Any) -> Any:
            self.reach(function)
            return original(*arguments, **named)

        setattr(owner, function, watched)

    def watch(self) -> None:
        """Watch SQL statements, commits, file writes, synchronisation, renames and links."""

        def statement(_connection: Connection, _cursor: Any, text: str, *_rest: Any) -> None:
            if not text.startswith("SELECT"):
                self.reach(text.split("(")[0].strip()[:40])

        event.listen(Engine, "before_cursor_execute", statement)
        self.around(DefaultDialect, "do_commit")
        for function in ("fsync", "replace", "link", "mkdir"):
            self.around(os, function)


class _Pause:
    """Switches the points off for what the test itself writes."""

    points: Points | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if self.points is None:
            yield
            return
        self.points.active = False
        try:
            yield
        finally:
            self.points.active = True


paused = _Pause()


def play(scene: Scene, order: str, deadly: int | None, report: Path | None = None) -> None:
    """Live under watch; returns only when no point was deadly."""
    scene.folder.mkdir()
    points = paused.points = Points(deadly)
    if order == "second-place-late":
        put_off_second_place()
    points.watch()
    live(scene, order)
    if report is not None:
        report.write_text(json.dumps(points.names))


def put_off_second_place() -> None:
    """Make each head reach the second place one entry too late: the bug to be caught."""
    heads: list[Checkpoint] = []

    def late(log: SignedLog) -> None:
        heads.append(log.head())
        log._second_place.write(heads[-2] if len(heads) > 1 else heads[-1])

    SignedLog.keep_newest_head = late  # type: ignore[method-assign]


def in_child(work: Callable[[], None]) -> int:
    """Run ``work`` in a fork and return how it ended, as `os.waitpid` says."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def examine(scene: Scene, point: int, name: str) -> Finding:
    """Open what a killed life left and live on to the end."""
    charged = deeds(scene.place) if scene.place.second_place.exists() else 0
    spent = scene.spent()
    old = is_old_backup_safe(scene)
    paused.points = None
    live(scene)
    with Ledger.open(scene.place, secret=SECRET) as ledger:
        state = ledger.budget.jobs[JOB.sha256]
        finished = (
            ledger.budget == replay(leaf.entry for leaf in ledger.leaves())
            and state.closed == "finished"
            and set(state.stored) == set(state.unmasked) == set(ROUNDS)
            # An opening that was cut off is not repeated.
            and count(state) >= scene.spent() >= 2 * len(ROUNDS)
            and ledger.withdrawn(["p-1", "p-2"]) == {"p-1"}
            and len(ledger.checkpoints()) == 1
        )
    return Finding(point, name, charged, spent, finished, old)


def deeds(place: LedgerPlace) -> int:
    with Ledger.open(place, secret=SECRET) as ledger:
        state = ledger.budget.jobs.get(JOB.sha256)
        return 0 if state is None else count(state)


def count(state: JobState) -> int:
    # Attempts come one after the other here, so that the newest one is their number.
    return sum(state.starts.values()) + sum(state.masked.values()) + len(state.unmasked)


def is_old_backup_safe(scene: Scene) -> bool:
    """Whether the copy from before the last deed is refused, unless it lacks none."""
    if not scene.backup.exists():
        return True
    try:
        return deeds(LedgerPlace(scene.backup, scene.place.second_place)) >= scene.spent()
    except LedgerError:
        return True


def matrix(folder: Path, order: str, stride: int) -> list[Finding]:
    """Return what every ``stride``-th point leads to."""
    live_once = Scene(folder / "warm-up")
    live_once.folder.mkdir()
    live(live_once)  # so that forks find everything imported
    names = folder / "names.json"
    assert in_child(lambda: play(Scene(folder / "whole"), order, None, names)) == 0
    findings = []
    for point, name in [*enumerate(json.loads(names.read_text()))][::stride]:
        scene = Scene(folder / f"life-{point}")
        ended = in_child(partial(play, scene, order, point))
        assert os.WTERMSIG(ended) == signal.SIGKILL, (point, name, ended)
        findings.append(examine(scene, point, name))
        shutil.rmtree(scene.folder)
    return findings


def run_matrix(order: str, stride: int) -> list[Finding]:
    """Run `matrix` in a fresh process, which forks a life a point."""
    # In memory where that is possible: each life synchronises dozens of files.
    memory = Path("/dev/shm")
    base = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="lives", dir=base) as folder:
        command = [sys.executable, __file__, folder, order, str(stride)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert ran.returncode == 0, ran.stderr
    return [Finding(**values) for values in json.loads(ran.stdout)]


def under_counts(findings: list[Finding]) -> list[Finding]:
    return [f for f in findings if f.charged < f.spent or not f.old_backup_is_safe]


def test_no_kill_leads_to_an_under_count_or_stops_the_job() -> None:
    findings = run_matrix("right", 1)
    assert len(findings) >= 100
    assert under_counts(findings) == []
    assert [found for found in findings if not found.finished] == []
    # The lives did end in many different states, by kills before every kind of write.
    # Two rounds, each started, masked and opened; nothing is written after the last deed.
    assert {(found.charged, found.spent) for found in findings} == {
        *((done, done) for done in range(6)),
        *((done + 1, done) for done in range(6)),
    }
    assert {found.name for found in findings} > {
        "BEGIN IMMEDIATE",
        "INSERT INTO ledger_entries",
        "INSERT INTO ledger_heads",
        "INSERT INTO ledger_cohorts",
        "INSERT INTO ledger_checkpoints",
        "CREATE TABLE ledger_entries",
        *("do_commit", "fsync", "replace", "link", "mkdir"),
    }


@pytest.mark.parametrize("order", ["charged-after", "second-place-late"])
def test_the_matrix_catches_a_wrong_order(order: str) -> None:
    """Positive control: with one step out of order some kill does lead to an under-count."""
    assert under_counts(run_matrix(order, 4))


if __name__ == "__main__":
    results = matrix(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    print(json.dumps([asdict(finding) for finding in results]))
