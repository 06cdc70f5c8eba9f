"""A coordinator killed at every point of a job: the next run leads to the same model.

Run as a program, this file carries a job once for each point at which something is written
(`python test_job_run_crash.py FOLDER KIND ORDER STRIDE`), kills the coordinator there with SIGKILL,
has another run go on, and reports how the job ended. Sites of a secure job live in another process,
which the kill leaves alone. KIND is `plain` or `secure`; ORDER is the coordinator's own, or a deliberately
wrong one, which the matrix must catch.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from flwr.app import RecordDict
from plain_federation import JOB, MemoryLink, totals
from secure_federation import ProtocolLink, federation
from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.engine.default import DefaultDialect

from fedcmr_server.app import carry_job
from fedcmr_server.checkpoint_files import Checkpoint
from fedcmr_server.job_run import StoredRun
from fedcmr_server.job_states import TransitionRefused
from fedcmr_server.links import SiteLink
from fedcmr_server.rounds import initial_state
from fedcmr_server.store import Events, Jobs, Rounds, open_store
from fedcmr_shared.errors import FedcmrError
from fedcmr_shared.federation.messages import Scores, Task, Update
from fedcmr_shared.models.bundle import state_sha256
from fedcmr_shared.schemas.job import JobSpec, TrainingSpec
from fedcmr_shared.secagg.layout import trained_shapes

PLAIN = JobSpec.model_validate(
    {
        **JOB.model_dump(),
        "minimum_sites": 1,
        "server_optimiser": {"name": "fedadam", "learning_rate": 0.1},
        "training": {"part": "prompts"},
        "privacy": {"evaluation": {"rounds": "last"}},
    }
)
SECURE = JobSpec(rounds=2, model=JOB.model, training=TrainingSpec(part="prompts"))
AMOUNTS = {"alder": 0.1, "birch": 0.2, "cedar": 0.4}
MEAN = 0.7 / 3


@dataclass(frozen=True)
class Finding:
    """How a job ended whose first run was killed before ``name``, point number ``point``.

    ``model`` is the last model's hash; of a secure job, whose sums are rounded at random, whether
    it moved by the mean of each round that is not closed. ``closed`` are the closed rounds.
    """

    point: int
    name: str
    state: str
    model: str
    closed: list[int]
    problem: str = ""


class PipeLink:
    """A `SiteLink` to sites in the process at the other end of a pipe."""

    def __init__(self, nodes: list[int], pipe: Connection) -> None:
        self._nodes, self._pipe = nodes, pipe

    def connected(self, at_least: int, timeout_s: float) -> list[int]:
        return self._nodes

    def exchange(
        self, action: str, contents: Mapping[int, RecordDict], timeout_s: float
    ) -> Iterator[tuple[int, RecordDict]]:
        self._pipe.send((action, dict(contents)))
        yield from self._pipe.recv()


class Points:
    """Counts the moments before something is done to a disk, and kills the process at one."""

    def __init__(self, deadly: int | None) -> None:
        self.deadly = deadly
        self.names: list[str] = []

    def reach(self, name: str) -> None:
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
        def statement(_connection: Any, _cursor: Any, text: str, *_rest: Any) -> None:
            if text.startswith(("INSERT", "UPDATE")):
                self.reach(text.split("(")[0].split(" SET")[0].strip())

        event.listen(Engine, "before_cursor_execute", statement)
        self.around(DefaultDialect, "do_commit")
        for function in ("fsync", "replace"):
            self.around(os, function)


@dataclass(frozen=True)
class Scene:
    """One job in a folder of its own, with its sites."""

    folder: Path
    kind: str
    link: MemoryLink | ProtocolLink

    @classmethod
    def new(cls, folder: Path, kind: str) -> "Scene":
        folder.mkdir()
        link = federation(AMOUNTS) if kind == "secure" else plain_link()
        scene = cls(folder, kind, link)
        roster = link.sites[0].roster if isinstance(link, ProtocolLink) else None
        with open_store(scene.url) as store:
            Jobs(store).submit(scene.job, None, roster)
        return scene

    @property
    def job(self) -> JobSpec:
        return SECURE if self.kind == "secure" else PLAIN

    @property
    def url(self) -> str:
        return f"sqlite:///{self.folder}/coordinator.sqlite"

    def carry(self, link: SiteLink, run: str) -> None:
        with open_store(self.url) as store:
            carry_job(link, StoredRun(store, self.folder, self.job.sha256, run))

    def first_run(self, deadly: int | None, order: str) -> list[str] | None:
        """Have a child carry the job and answer it; return the points, or None when it died."""
        here, there = Pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                here.close()
                points = Points(deadly)
                if order == "row-first":
                    commit_row_first()
                points.watch()
                self.carry(self.seen_through(there), "run-1")
                there.send(points.names)
                code = 0
            finally:
                os._exit(code)
        there.close()
        names = None
        try:
            while True:
                asked = here.recv()
                if isinstance(asked, list):
                    names = asked
                    break
                action, contents = asked
                here.send(list(self.link.exchange(action, contents, 60.0)))
        except (EOFError, ConnectionResetError):
            pass
        here.close()
        ended = os.waitpid(child, 0)[1]
        expected = 0 if deadly is None else signal.SIGKILL
        assert os.WIFEXITED(ended) if deadly is None else os.WTERMSIG(ended) == expected, ended
        return names

    def seen_through(self, pipe: Connection) -> SiteLink:
        """Return the link of the process at the other end; plain sites remember nothing."""
        if isinstance(self.link, MemoryLink):
            return self.link
        return PipeLink(self.link.connected(0, 0.0), pipe)

    def examine(self, point: int, name: str) -> Finding:
        """Report the first run as lost, have a second one go on, and look at what it left."""
        job, problem = self.job.sha256, ""
        with open_store(self.url) as store:
            with suppress(TransitionRefused):  # killed before it had started, or after the end
                Jobs(store).change(job, "run_lost", run="run-1")
            if Jobs(store).get(job).state != "finished":
                try:
                    self.carry(self.link, "run-2")
                except FedcmrError as error:
                    problem = str(error)
            problem = problem or self.broken_guarantee(Events(store).as_values(job))
            row = Jobs(store).get(job)
            closed = [r.number for r in Rounds(store).of(job) if r.state == "closed"]
            try:
                last = StoredRun(store, self.folder, job, "nobody").latest()
            except FedcmrError as error:
                return Finding(point, name, row.state, "", closed, str(error))
        assert last is not None
        return Finding(point, name, row.state, self.model(last, closed), closed, problem)

    def broken_guarantee(self, events: list[dict[str, Any]]) -> str:
        """Say what the sites saw that must never be: two openings, or training twice."""
        if not isinstance(self.link, ProtocolLink):
            return ""
        for site in self.link.sites:
            opened = [(each.phase, each.round) for each in site.answers]
            if len(set(opened)) < len(opened):
                return f"{site.name} helped to open a round twice"
            if site.trained > self.job.rounds:
                return f"{site.name} trained a round twice"
        started = [
            (e["phase"], e["round"], e["attempt"])
            for e in events
            if e["event"] == "attempt_started"
        ]
        return "" if len(set(started)) == len(started) else "an attempt's number was used twice"

    def model(self, last: Checkpoint, closed: list[int]) -> str:
        if self.kind == "plain":
            return state_sha256(last.state)
        start = initial_state(self.job)
        moved = (self.job.rounds - len(closed)) * MEAN
        names = trained_shapes(self.job.model, self.job.training.part)
        fits = all(
            torch.allclose(value, start[name] + (moved if name in names else 0.0), atol=1e-5)
            for name, value in last.state.items()
        )
        return "as expected" if fits and last.round == self.job.rounds else "other"


def moves(name: str, action: str, task: Task) -> Update | Scores:
    """Return one site's answer; its update is smaller in later rounds, which the optimiser sees."""
    base = state_sha256(task.state)
    if action == "evaluate":
        return Scores(name, task.round, base, totals(task.job, 0.5))
    shapes = trained_shapes(task.job.model, task.job.training.part)
    delta = {each: torch.full(shape, 1.0 / task.round) for each, shape in shapes.items()}
    return Update(name, task.round, base, delta)


def plain_link() -> MemoryLink:
    return MemoryLink({"a": moves})


def commit_row_first() -> None:
    """The bug to be caught: the row says that files are there before they are."""

    def commit(run: StoredRun, checkpoint: Checkpoint, **figures: Any) -> None:
        hashes = state_sha256(checkpoint.state), state_sha256(checkpoint.optimiser)
        Rounds(run.store).commit(run.job_id, checkpoint.round, hashes, run.run, figures)
        run._files.save(checkpoint, run.job.model)

    StoredRun.commit = commit  # type: ignore[method-assign]


def matrix(folder: Path, kind: str, order: str, stride: int) -> list[Finding]:
    """Return what every ``stride``-th point leads to; first of all, what no kill leads to."""
    warm = Scene.new(folder / "warm-up", kind)
    warm.carry(warm.link, "run-1")  # so that forks find everything imported
    whole = Scene.new(folder / "whole", kind)
    names = whole.first_run(None, order)
    assert names is not None
    findings = [whole.examine(-1, "")]
    for point, name in [*enumerate(names)][::stride]:
        scene = Scene.new(folder / f"life-{point}", kind)
        scene.first_run(point, order)
        findings.append(scene.examine(point, name))
        shutil.rmtree(scene.folder)
    return findings


def run_matrix(kind: str, order: str = "right", stride: int = 1) -> list[Finding]:
    """Run `matrix` in a fresh process, which forks a coordinator a point."""
    memory = Path("/dev/shm")
    base = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
    tests = str(Path(__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": tests}
    with tempfile.TemporaryDirectory(prefix="lives", dir=base) as folder:
        command = [sys.executable, __file__, folder, kind, order, str(stride)]
        ran = subprocess.run(
            command, capture_output=True, text=True, timeout=900, check=False, env=environment
        )
    assert ran.returncode == 0, ran.stderr
    return [Finding(**values) for values in json.loads(ran.stdout.splitlines()[-1])]


def test_whatever_the_moment_a_killed_job_ends_with_the_same_model() -> None:
    whole, *killed = run_matrix("plain")
    assert len(killed) >= 35
    assert (whole.state, whole.problem, whole.closed) == ("finished", "", [])
    assert [
        found
        for found in killed
        if (found.state, found.model, found.problem) != ("finished", whole.model, "")
    ] == []
    assert {found.name for found in killed} >= {
        *("INSERT INTO events", "INSERT INTO rounds", "UPDATE rounds", "UPDATE jobs"),
        *("do_commit", "fsync", "replace"),
    }


def test_a_killed_secure_job_opens_each_round_once_or_closes_it() -> None:
    whole, *killed = run_matrix("secure", stride=8)
    assert (whole.state, whole.model, whole.closed) == ("finished", "as expected", [])
    assert [
        found
        for found in killed
        if (found.state, found.model, found.problem) != ("finished", "as expected", "")
    ] == []
    # Killed before it asked for shares, it opens the round later; after that, it closes it.
    assert {tuple(found.closed) for found in killed} == {(), (1,), (2,)}


def test_the_matrix_catches_a_wrong_order() -> None:
    """Positive control: with rows before files some kill does lose the model."""
    _, *killed = run_matrix("plain", "row-first", stride=4)
    assert any("does not exist" in found.problem for found in killed)


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = matrix(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
    print(json.dumps([asdict(finding) for finding in results]))
