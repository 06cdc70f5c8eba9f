"""A site killed around every durable write of a secure sum, and asked by two at once.

Run as a program (`python test_secure_site_crash.py POLICY`), this file plays a site (the one of
POLICY) and three peers through a life of three attempts: one that ends for lack of confirmations,
one that opens the sum, and the beginning of the next round. At every question it forks one branch
for each moment; there the site's process dies by SIGKILL, and an adversary who plays the server and
all peers asks it whatever it was asked before, and something contrary. What ever left the site, and
the ledger, are then held against the protocol's promises.

Where a step's answer leaves before its writes, as a careless site's would, the same search must
find the broken promise. Races ask two processes of the site at once.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from flwr.app import RecordDict
from hospitals import SECURE, Federation, Hospital, Peer, session_of, text_of, write_roster
from secure_federation import Place, ProtocolLink

from fedcmr_client import agent as agent_module
from fedcmr_client import secure_site as secure_site_module
from fedcmr_client.agent import SiteAgent
from fedcmr_client.ledger import Ledger
from fedcmr_client.secure_sessions import SessionStore
from fedcmr_client.site_home import SiteHome
from fedcmr_server.secure_attempt import Attempt, AttemptOver
from fedcmr_shared.federation.secure_messages import (
    ConsistencyQuestion,
    KeysQuestion,
    SharesQuestion,
    UnmaskAnswer,
    UnmaskQuestion,
    UpdateQuestion,
    add_record,
    pack_record,
    read_record,
)
from fedcmr_shared.models.registry import build_model
from fedcmr_shared.schemas.job import JobSpec, ModelSpec, SamplingSpec, SecureSpec, TrainingSpec
from fedcmr_shared.schemas.ledger import Masked, Started, Stored, Unmasked
from fedcmr_shared.schemas.privacy import EvaluationSpec, PrivacySpec
from fedcmr_shared.secagg.layout import trained_shapes
from fedcmr_shared.secagg.messages import Confirmation, Keys, Step, Vector
from fedcmr_shared.secagg.session import Session

JOB = JobSpec(
    name="crash",
    rounds=2,
    model=ModelSpec(text_encoder="hashed"),
    sampling=SamplingSpec(acs_lines=8),
    training=TrainingSpec(local_steps=1, part="prompts"),
    privacy=PrivacySpec(
        cohort_size=10,
        sampling_rate=0.5,
        noise_multiplier=2.0,
        evaluation=EvaluationSpec(rounds="none"),
    ),
    secure=SecureSpec(word_bits=24, update_range=0.01),
)
PEERS = ("north", "south", "west")  # behind "east" in the order of questions
WRITES: list[tuple[Any, str]] = [
    (os, "replace"),  # every file that is written durably gets its name so
    (Path, "unlink"),
    (agent_module, "train_round"),
    *((Ledger, name) for name in ("admit", "start", "store", "finish", "mask", "unmask")),
]
LATER: dict[str, list[tuple[Any, str]]] = {
    "keys": [(SessionStore, "save")],
    "shares": [(SessionStore, "save")],
    "update": [(Ledger, "mask"), (SessionStore, "save")],
    "consistency": [(SessionStore, "save")],
    "unmask": [(Ledger, "unmask"), (SessionStore, "finish")],
}
"""Writes that come after the answer where the order is swapped, by step."""


class Moments:
    """Counts the moments before each write, and kills the process at one of them.

    The last moment is before the answer leaves; after a write is before the next one.
    """

    def __init__(self) -> None:
        self.deadly: int | None = None
        self.last_words = Path()
        self.count = 0

    def reach(self, name: str) -> None:
        if self.count == self.deadly:
            self.last_words.write_text(name)
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def watch(self, owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def watched(*arguments: Any, **named: Any) -> Any:
            self.reach(f"before {name}")
            return original(*arguments, **named)

        setattr(owner, name, watched)


@dataclass(frozen=True)
class Sent:
    """An answer that left the site."""

    step: Step
    session: Session
    text: str


def broken_promises(wire: Sequence[Sent]) -> list[str]:
    """Say what a site gave away that it never may."""
    said: dict[tuple[Any, ...], set[str]] = defaultdict(set)
    opened: set[tuple[Any, ...]] = set()
    broken = []
    for sent in wire:
        about, place = sent.session, (sent.session.phase, sent.session.round)
        if sent.step == "unmask":
            answer = UnmaskAnswer.decode(sent.text)
            said["shares revealed for one round", place].add(answer.unmasking.encode())
            opened.add(place)
            if answer.next_keys is not None:
                mask = answer.next_keys.mask.x25519
                said["sessions of one mask key", mask].add(answer.next_keys.header)
        elif sent.step == "consistency":
            survivors = ",".join(Confirmation.decode(sent.text).survivors)
            said["sets of survivors for one attempt", about].add(survivors)
        else:
            said[f"{sent.step} answers for one attempt", about].add(sent.text)
        if sent.step == "keys":
            keys = Keys.decode(sent.text)
            said["sessions of one mask key", keys.mask.x25519].add(keys.header)
        if sent.step == "update" and place in opened:
            broken.append("a vector after shares were revealed")
    return broken + [f"{len(values)} {what[0]}" for what, values in said.items() if len(values) > 1]


MOMENTS: Final = Moments()


@dataclass
class Site(Hospital):
    """The site that dies. ``branch`` is called before each answer, ``swapped`` steps answer first."""

    wire: list[Sent] = field(default_factory=list)
    swapped: Step | None = None
    branch: Callable[[Step, RecordDict], None] | None = None
    copy: Path | None = None  # where a process that dies leaves what it sent

    def reply(self, step: Step, content: RecordDict) -> RecordDict:
        if self.branch is not None:
            self.branch(step, content)
        return self.speak(step, content)

    def speak(self, step: Step, content: RecordDict) -> RecordDict:
        later: list[Callable[[], None]] = []
        with postponed(LATER[step], later) if step == self.swapped else nullcontext():
            answer = super().reply(step, content)
        MOMENTS.reach("before the answer")
        self.send(Sent(step, session_of(step, content), text_of(answer)))
        for write in later:
            write()
        return answer

    def send(self, sent: Sent) -> None:
        if sent.text.startswith("refused"):
            return
        self.wire.append(sent)
        if self.copy is not None:
            with self.copy.open("a") as file:
                line = {"step": sent.step, "session": sent.session.model_dump(), "text": sent.text}
                file.write(json.dumps(line) + "\n")

    def receive(self, copy: Path) -> None:
        """Take over what another process of the site sent."""
        for line in copy.read_text().splitlines() if copy.exists() else ():
            sent = json.loads(line)
            session = Session.model_validate(sent["session"])
            self.wire.append(Sent(sent["step"], session, sent["text"]))


@contextmanager
def postponed(writes: Sequence[tuple[Any, str]], later: list[Callable[[], None]]) -> Iterator[None]:
    """Collect the calls of ``writes`` in ``later`` instead of making them."""
    originals = [(owner, name, getattr(owner, name)) for owner, name in writes]
    for owner, name, original in originals:

        def collect(*arguments: Any, original: Callable[..., Any] = original, **named: Any) -> None:
            later.append(lambda: original(*arguments, **named))

        setattr(owner, name, collect)
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def quick_training(task: Any, _model: object, _records: object, home: SiteHome) -> object:
    """Stand in for the training of a round; leaves a line of its own for each."""
    with (home.path.parent / "trained").open("a") as file:
        file.write(f"{task.round}\n")
    shapes = trained_shapes(JOB.model, JOB.training.part)
    return {name: 1e-3 * torch.randn(shape) for name, shape in shapes.items()}


class Life:
    """A site and its peers, and the attempts that they go through."""

    def __init__(self, policy: Path) -> None:
        self.site = Site(SiteHome.open(policy))
        peers = [Peer(name, 0.003, job=JOB) for name in PEERS]
        keys = {peer.name: peer.identity.public_key for peer in peers}
        keys["east"] = self.site.home.identity().public_key
        assert self.site.home.policy.roster is not None
        roster = write_roster(self.site.home.policy.roster, keys)
        for peer in peers:
            peer.roster = roster
        self.peers = {peer.name: peer for peer in peers}
        torch.manual_seed(0)
        model = build_model(JOB.model).state_dict()
        link = ProtocolLink([self.site, *peers])  # type: ignore[list-item]  # it answers as they do
        self.federation = Federation(JOB, link, roster, model)
        self.attempt: Attempt

    def play(self) -> None:
        self.take(self.federation.session(), "unmask", deserted=True)
        self.take(self.federation.session(attempt=2), None)
        ahead = self.attempt.ahead
        self.attempt = self.federation.begin(self.federation.session(2))
        for step in ("keys", "shares"):
            self.federation.advance(self.attempt, step, ahead)  # type: ignore[arg-type]  # a step

    def take(self, session: Session, before: Step | None, deserted: bool = False) -> None:
        """Take an attempt through its steps; a deserted one ends when survivors are confirmed."""
        self.attempt = self.federation.begin(session)
        for name in PEERS[:2] if deserted else ():
            place = Place(name, "train.consistency", session.round, session.attempt)
            self.federation.link.lost[place] = 1
        for step in ("keys", "shares", "update", "consistency", "unmask"):
            if step == before:
                return
            try:
                self.federation.advance(self.attempt, step)  # type: ignore[arg-type]  # a step
            except AttemptOver:
                assert deserted
                assert step == "consistency"
                return


@dataclass(frozen=True)
class Search:
    """Kills the site at every moment of every answer.

    Where the order of a step is swapped, in the second attempt's and until a promise is broken.
    """

    life: Life
    folder: Path
    swapped: Step | None = None
    findings: list[dict[str, Any]] = field(default_factory=list)

    def branch(self, step: Step, content: RecordDict) -> None:
        place = (step, session_of(step, content).attempt)
        if self.swapped is not None and place != (self.swapped, 2):
            return
        home = self.life.site.home.path.parent
        kept = self.folder / "kept"
        shutil.copytree(home, kept)
        moment = 0
        while True:
            report = self.folder / "report"
            in_child(lambda n=moment, to=report: self.explore(step, content, n, to))  # type: ignore[misc]
            # mypy cannot infer a lambda with defaults
            shutil.rmtree(home)
            shutil.copytree(kept, home)
            if not report.exists():
                break
            self.findings.append(json.loads(report.read_text()))
            report.unlink()
            if self.swapped is not None and self.found():
                break
            moment += 1
        shutil.rmtree(kept)

    def found(self) -> list[str]:
        """Return all broken promises so far."""
        return [problem for finding in self.findings for problem in finding["broken"]]

    def explore(self, step: Step, content: RecordDict, moment: int, report: Path) -> None:
        """Let the site die at ``moment`` of its answer; report what an adversary gets then."""
        site, words, copy = self.life.site, self.folder / "words", self.folder / "copy"
        site.branch = None
        copy.unlink(missing_ok=True)

        def die() -> None:
            site.copy = copy
            MOMENTS.count, MOMENTS.deadly, MOMENTS.last_words = 0, moment, words
            site.speak(step, content)

        status = in_child(die)
        if not os.WIFSIGNALED(status):
            assert status == 0
            return
        site.receive(copy)
        finding = {"step": step, "attempt": self.life.attempt.session.attempt}
        finding |= {"moment": words.read_text(), **self.recover(step, content)}
        report.write_text(json.dumps(finding))

    def recover(self, step: Step, content: RecordDict) -> dict[str, Any]:
        life, site = self.life, self.life.site
        session = session_of(step, content)
        before = account(site, session)
        # The adversary first asks something contrary, then whatever was asked before; asked to
        # unmask as before, the site would rightly do so, and there would be no other attempt.
        site.speak(step, contrary(life, step, content))
        asked = list(site.asked.items())
        for (_, earlier), question in asked:
            if before["unmasked"] or earlier != "unmask":
                site.speak(earlier, question)
        opened: tuple[str, ...] = ()
        if before["unmasked"]:
            life.attempt.open()
            opened = life.attempt.opened[0].survivors
        other = life.federation.session(session.round, session.attempt + 1)
        try:
            opened = life.federation.run(other).opened[0].survivors
            again = "opened"
        except AttemptOver as error:
            again = str(error)
        for (_, earlier), question in asked:
            site.speak(earlier, question)
        return {
            "before": before,
            "after": account(site, session),
            "opened": opened,
            "new_attempt": again,
            "broken": broken_promises(site.wire) + unwritten(site),
        }


def account(site: Site, session: Session) -> dict[str, Any]:
    """Return what ledger and training know of a session's round."""
    entries = [
        entry
        for entry in site.entries()
        if getattr(entry, "phase", None) == session.phase and entry.round == session.round
    ]
    work = site.home.path.parent / "trained"
    trained = work.read_text().split().count(str(session.round)) if work.exists() else 0
    return {
        "started": sum(isinstance(entry, Started) for entry in entries),
        "stored": sum(isinstance(entry, Stored) for entry in entries),
        "unmasked": sum(isinstance(entry, Unmasked) for entry in entries),
        "trained": trained,
    }


def unwritten(site: Site) -> list[str]:
    """Say which answers left the site without their ledger entry."""
    entries = site.entries()
    masked = {entry.header for entry in entries if isinstance(entry, Masked)}
    answers = {entry.answer for entry in entries if isinstance(entry, Unmasked)}
    broken = []
    for sent in site.wire:
        if sent.step == "update" and Vector.decode(sent.text).header not in masked:
            broken.append("a vector without its entry")
        if sent.step == "unmask":
            text = UnmaskAnswer.decode(sent.text).unmasking.encode()
            if hashlib.sha256(text.encode()).hexdigest() not in answers:
                broken.append("shares without their entry")
    return broken


def contrary(life: Life, step: Step, content: RecordDict) -> RecordDict:
    """Return a question that a site must not answer as well as ``content``."""
    session = session_of(step, content)
    if step == "keys":
        return pack_record(KeysQuestion(session=session, job=JOB))
    if step == "shares":
        keys = read_record(content, SharesQuestion).keys
        return pack_record(SharesQuestion(session=session, model="f" * 64, keys=keys))
    if step == "update":
        fewer = read_record(content, UpdateQuestion).deliveries[:-1]
        question = UpdateQuestion(session=session, deliveries=fewer)
        return add_record(life.federation.task(session.round).pack(), question)
    if step == "consistency":
        others = read_record(content, ConsistencyQuestion).survivors[:-1]
        return pack_record(ConsistencyQuestion(session=session, survivors=others))
    # All peers lie and sign another set.
    given = read_record(content, UnmaskQuestion).confirmations
    signed = [
        Confirmation(site=one.site, header=one.header, survivors=one.survivors[:-1]).signed(
            life.peers[one.site].identity
        )
        for one in given
        if one.site in life.peers
    ]
    return pack_record(UnmaskQuestion(session=session, confirmations=tuple(signed)))


def in_child(action: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def search(policy: Path, swapped: Step | None) -> list[dict[str, Any]]:
    life = Life(policy)
    folder = policy.parent.parent / "search"
    folder.mkdir()
    life.site.swapped = swapped
    matrix = Search(life, folder, swapped)
    life.site.branch = matrix.branch
    life.play()
    assert broken_promises(life.site.wire) == []
    assert unwritten(life.site) == []
    return matrix.findings


def afresh(policy: Path, action: Callable[[], Any]) -> Any:
    """Return what ``action`` finds in a process of its own; afterwards the home is as before."""
    home, folder = policy.parent, policy.parent.parent
    kept, found = folder / "afresh", folder / "found"
    shutil.copytree(home, kept)

    def act() -> None:
        found.write_text(json.dumps(action()))

    assert in_child(act) == 0
    shutil.rmtree(home)
    shutil.rmtree(folder / "search", ignore_errors=True)
    kept.rename(home)
    return json.loads(found.read_text())


def race(policy: Path, step: Step, locked: bool) -> list[str]:
    """Ask two processes of the site two contrary questions of a step; return what left."""
    life = Life(policy)
    life.take(life.federation.session(), step)
    question = life.attempt.sums[0].questions["east"]
    content = pack_record(question)
    if step == "update":
        content = add_record(life.federation.task().pack(), question)
    folder = policy.parent.parent / "search"
    folder.mkdir()
    if not locked:
        SessionStore.locked = lambda *_: nullcontext()  # type: ignore[method-assign]
        # Weakens the site for the positive control.
    decide = {"update": "accept_shares", "consistency": "confirm_survivors"}[step]
    original = getattr(secure_site_module, decide)

    def wait(pattern: str, count: int, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while len([*folder.glob(pattern)]) < count and time.monotonic() < deadline:
            time.sleep(0.01)

    def ask(number: int, asked: RecordDict) -> None:
        def slowly(*arguments: Any) -> Any:
            (folder / f"deciding-{number}").touch()
            # Behind the lock the other process never comes as far; without it, it always does.
            wait("deciding-*", 2, 0.5 if locked else 60)
            if number == 1 and not locked:
                wait("sent-0", 1, 60)
            return original(*arguments)

        setattr(secure_site_module, decide, slowly)
        life.site.copy = folder / f"copy-{number}"
        life.site.speak(step, asked)
        (folder / f"sent-{number}").touch()

    if step == "update":  # its result is stored: nothing but the lock is between the two
        SiteAgent(life.site.home).noised_update(life.federation.task())
    children = []
    for number, asked in enumerate((content, contrary(life, step, content))):
        child = os.fork()
        if child == 0:
            try:
                ask(number, asked)
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    for number in range(2):
        life.site.receive(folder / f"copy-{number}")
    return [sent.text for sent in life.site.wire if sent.step == step]


@pytest.fixture
def policy(
    make_home: Callable[..., SiteHome], make_site: Callable[..., Path], tmp_path: Path
) -> Path:
    """The policy file of a site with patients and an empty ledger."""
    store = make_site("east", 3, coils=2, phase=16, readout=16)
    return make_home(store, roster=tmp_path / "roster.yaml", **SECURE).path


@pytest.fixture(scope="module")
def played() -> dict[str, Any]:
    return {}


@pytest.fixture
def found(policy: Path, played: dict[str, Any]) -> dict[str, Any]:
    """What the program found; played once for all tests, since its start takes longest."""
    if not played:
        done = subprocess.run(
            [sys.executable, __file__, str(policy)],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        played.update(json.loads(done.stdout.splitlines()[-1]))
    return played


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@needs_fork
def test_no_death_breaks_a_promise_or_costs_more_than_an_attempt(found: dict[str, Any]) -> None:
    findings = found["deaths"]
    places = {(finding["attempt"], finding["step"]) for finding in findings}
    assert len(places) == 4 + 5 + 1 - 1  # the last attempt's keys came ahead
    assert len(findings) > 35
    for finding in findings:
        before, after = finding["before"], finding["after"]
        assert finding["broken"] == [], finding
        # Trained and charged once, unless the process died over it.
        missing = 0 if before["stored"] else 1
        assert after["started"] == before["started"] + missing, finding
        assert after["trained"] == before["trained"] + missing, finding
        # A new attempt opens the sum unless shares may have left; then the same answer does.
        if before["unmasked"]:
            assert finding["new_attempt"] != "opened", finding
            assert (before["unmasked"], after["unmasked"]) == (1, 1)
        else:
            assert finding["new_attempt"] == "opened", finding
        assert finding["opened"] == ["east", *PEERS], finding
    # The search reaches deaths over the training, and deaths between entry and answer.
    assert any(finding["after"]["started"] == 2 for finding in findings)
    assert {finding["before"]["unmasked"] for finding in findings} == {0, 1}


@needs_fork
def test_the_search_finds_what_a_swapped_order_breaks(found: dict[str, Any]) -> None:
    """Positive control: the answer leaves before what it rests on is written."""
    findings = found["swapped"]
    for step, broken in {
        "keys": "2 keys answers for one attempt",
        "shares": "2 shares answers for one attempt",
        "update": "2 update answers for one attempt",
        "consistency": "2 sets of survivors for one attempt",
        "unmask": "2 shares revealed for one round",
    }.items():
        assert broken in findings[step][-1]["broken"]
        assert findings[step][-1]["moment"].startswith("before")


@needs_fork
def test_of_two_questions_at_once_exactly_one_is_answered(found: dict[str, Any]) -> None:
    vectors, confirmations, unlocked = found["races"]
    assert len(vectors) == len(confirmations) == 1
    # Positive control: without the lock both would be.
    survivors = {Confirmation.decode(text).survivors for text in unlocked}
    assert survivors == {("east", *PEERS), ("east", *PEERS[:2])}


def main(policy: Path) -> dict[str, Any]:
    agent_module.train_round = quick_training  # type: ignore[assignment]  # a process of its own
    gc.freeze()  # or every child would copy all memory in its search for garbage
    races = [("update", True), ("consistency", True), ("consistency", False)]
    for owner, name in WRITES:
        MOMENTS.watch(owner, name)
    # mypy cannot infer lambdas with defaults
    return {
        "races": [afresh(policy, lambda r=one: race(policy, *r)) for one in races],  # type: ignore[misc]
        "swapped": {step: afresh(policy, lambda s=step: search(policy, s)) for step in LATER},  # type: ignore[misc]
        "deaths": search(policy, None),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
