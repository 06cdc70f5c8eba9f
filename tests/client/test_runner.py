"""What a site's runner answers: a SuperNode's real interface without its network, real workers."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from time import sleep, time
from typing import Any

import pytest
import uvicorn
import worker_apps
from flower_parties import alive, wait_for
from flwr.app import Context, Message, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeState, NodeStateFactory

from fedcmr_client.gpus import Gpus
from fedcmr_client.runner import WHILE_PAUSED, Runner
from fedcmr_client.supernode import RuntimeAddress
from fedcmr_client.worker import App, WorkerLimits
from fedcmr_shared.errors import ConfigurationError, LedgerError
from fedcmr_shared.federation.flower_app import app_bundle
from fedcmr_shared.federation.messages import Refusal, unpack_answer
from fedcmr_shared.secagg.messages import STEPS

NODE = 7
EVIL = app_bundle() + b"#"


@dataclass
class Node:
    """The inside of a SuperNode: tests put in messages and take out replies."""

    state: NodeState
    factory: ObjectStoreFactory
    runtime: RuntimeAddress | None
    restarts: int = 0
    runs: int = 0
    replies: dict[str, RecordDict] = field(default_factory=dict)
    late: dict[str, bytes] = field(default_factory=dict)

    def restart(self) -> None:
        self.restarts += 1

    def put(
        self,
        content: RecordDict,
        kind: str = "train",
        *,
        bundle: bytes = b"",
        task: str = "flwr-clientapp",
        late: bool = False,
    ) -> str:
        """Put in a message of a new run with its app; return the message's name.

        The objects of a ``late`` one come with `receive`.
        """
        self.runs += 1
        name = self._message(content, kind, late)
        fab = Fab(sha256(bundle or app_bundle()).hexdigest(), bundle or app_bundle(), {})
        run = Run.create_empty(self.runs)
        run.series_id, run.fab_hash = self.runs, fab.hash_str
        self.state.store_fab(fab)
        self.state.store_run(run)
        context = Context(self.runs, NODE, {}, RecordDict(), {}, series_id=self.runs)
        self.state.set_run_series_context(self.runs, context)
        assert self.state.create_task(task, self.runs, fab.hash_str)
        return name

    def receive(self) -> None:
        """Let the objects of the late message come."""
        for object_id, each in self.late.items():
            self.factory.store().put(object_id, each)

    def _message(self, content: RecordDict, kind: str, late: bool) -> str:
        metadata = Metadata(self.runs, "", 1, NODE, "", "", time(), 600.0, kind)
        message = make_message(metadata, content=content)
        name = message.object_id
        message.metadata.__dict__["_message_id"] = name
        store = self.factory.store()
        store.preregister(self.runs, get_object_tree(message))
        self.late = {i: each.deflate() for i, each in get_all_nested_objects(message).items()}
        if not late:
            self.receive()
        self.state.store_message(remove_content_from_message(message))
        return name

    def reply(self, name: str) -> RecordDict:
        """Wait for the reply to a message and for the end of its task."""
        wait_for("the reply", lambda: self._fetch() or name in self.replies)
        return self.replies[name]

    def refusal(self, name: str) -> str:
        answer = unpack_answer(self.reply(name))
        assert isinstance(answer, Refusal)
        assert answer.site == "alder"
        return answer.code

    def own(self, name: str) -> dict[str, Any]:
        """What `worker_apps.answer` says of itself."""
        return dict(json.loads(str(self.reply(name).config_records["own"]["json"])))

    def outcome(self, name: str) -> str:
        """`answered`, or the code of the refusal."""
        return "answered" if "own" in self.reply(name).config_records else self.refusal(name)

    def finished(self) -> list[str]:
        """How the tasks ended, in the order of their runs; empty before they did."""
        tasks = sorted(self.state.get_tasks(), key=lambda task: task.run_id)
        return [task.status.sub_status for task in tasks]

    def _fetch(self) -> None:
        store = self.factory.store()
        for message in self.state.get_messages_legacy(is_reply=True):
            name = message.metadata.message_id
            ids = [node.object_id for node in _walk(store.get_object_tree(name))]
            contents = wait_for(
                "the objects",
                lambda ids=ids: _complete({each: store.get(each) for each in ids}),  # type: ignore[misc]
            )
            reply = inflate_object_from_contents(name, contents)
            assert isinstance(reply, Message)
            answered = message.metadata.reply_to_message_id
            assert answered not in self.replies, "two replies to one message"
            self.replies[answered] = reply.content


def _pending(node: Node) -> list[Any]:
    """Tasks that nobody has fetched."""
    return [task for task in node.state.get_tasks() if task.status.status == "pending"]


def _walk(tree: Any) -> Iterator[Any]:
    for child in tree.children:
        yield from _walk(child)
    yield tree


def _complete(contents: dict[str, bytes | None]) -> dict[str, bytes] | None:
    there = {name: content for name, content in contents.items() if content}
    return there if len(there) == len(contents) else None


@pytest.fixture
def node() -> Iterator[Node]:
    objects = ObjectStoreFactory()
    states = NodeStateFactory(objectstore_factory=objects)
    states.state().set_node_id(NODE)
    secret = os.urandom(32)
    config = uvicorn.Config(
        create_app(states, secret), host="127.0.0.1", port=0, log_level="critical", ws="none"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_for("the interface", lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield Node(states.state(), objects, RuntimeAddress(f"127.0.0.1:{port}", secret))
    server.should_exit = True
    thread.join()


Refused = list[str]


@contextmanager
def runner(
    node: Node,
    app: App = worker_apps.answer,
    *,
    refused: Refused | None = None,
    paused: Callable[[], bool] = lambda: False,
    record: Callable[[str], None] | None = None,
    gpus: Gpus | None = None,
    **limits: Any,
) -> Iterator[Runner]:
    record = record or (refused if refused is not None else []).append
    with Runner(
        node,
        "alder",
        Path("/site/policy.yaml"),
        record_refusal=record,
        paused=paused,
        limits=WorkerLimits(**limits),
        gpus=gpus,
        app=app,
    ) as running:
        yield running


@pytest.fixture
def ask(tmp_path: Path) -> RecordDict:
    return worker_apps.question(tmp_path)


def test_a_message_with_the_code_free_app_is_answered_by_a_worker(
    node: Node, ask: RecordDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A hospital's proxy must not see what stays on the machine.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "intranet")
    refused: Refused = []
    with runner(node, refused=refused, nice=0):
        first, second = node.own(node.put(ask)), node.own(node.put(ask, "evaluate"))
        wait_for("both ends", lambda: node.finished() == ["completed", "completed"])
    assert first["process"] != second["process"]
    assert os.getpid() not in (first["process"], second["process"])
    assert not alive(first["process"])
    assert first["policy"] == "/site/policy.yaml"
    assert first["imported"], "torch is not imported anew for every task"
    assert refused == []
    assert not node.restarts


def test_workers_keep_to_their_limits(node: Node, ask: RecordDict) -> None:
    with runner(node, nice=3, memory_mib=4096):
        own = node.own(node.put(ask))
    assert own["nice"] == os.getpriority(os.PRIO_PROCESS, 0) + 3
    assert own["memory"] == 4096 << 20
    assert own["gpus"] == "all"
    assert own["group"] == own["process"]


def test_another_bundle_is_refused_without_a_worker_and_written_down(
    node: Node, ask: RecordDict, tmp_path: Path
) -> None:
    refused: Refused = []
    with runner(node, refused=refused):
        names = [node.put(ask, bundle=EVIL), node.put(ask, task="flwr-agentapp")]
        assert [node.refusal(name) for name in names] == ["bundle", "bundle"]
        wait_for("the ends", lambda: node.finished() == ["completed", "completed"])
    assert refused == ["encoding", "kind"]
    assert list(tmp_path.iterdir()) == []
    assert not any(name in node.factory.store() for name in names), "it is kept for nobody"


def test_another_bundle_is_refused_also_when_it_cannot_be_written_down(
    node: Node, ask: RecordDict
) -> None:
    def full(rule: str) -> None:
        raise LedgerError("the disk is full")

    with runner(node, record=full):
        assert node.refusal(node.put(ask, bundle=EVIL)) == "bundle"


def test_of_a_failure_only_its_code_leaves_the_worker(
    node: Node, ask: RecordDict, caplog: pytest.LogCaptureFixture
) -> None:
    with runner(node, worker_apps.fail):
        name = node.put(ask)
        assert node.refusal(name) == "failed"
        wait_for("the end", lambda: node.finished() == ["failed"])
    assert set(node.replies[name]) == {"header"}
    assert worker_apps.SECRET_TEXT in caplog.text
    contents = [node.factory.store().get(each) for each in node.factory.store().store]  # type: ignore[attr-defined]
    assert contents
    assert not any(worker_apps.SECRET_TEXT.encode() in content for content in contents)
    assert not any(task.status.details for task in node.state.get_tasks())


@pytest.mark.parametrize("app", [worker_apps.die, worker_apps.hoard])
def test_a_worker_that_dies_has_failed_and_the_next_one_works(
    node: Node, ask: RecordDict, app: App
) -> None:
    with runner(node, app, memory_mib=2048):
        assert node.refusal(node.put(ask)) == "failed"
        assert node.refusal(node.put(ask)) == "failed"
        wait_for("the ends", lambda: node.finished() == ["failed", "failed"])
    assert not node.restarts


def test_half_a_reply_makes_the_supernode_begin_anew(node: Node, ask: RecordDict) -> None:
    # Flower's SuperNode would wait for the other half.
    with runner(node, worker_apps.die_while_pushing):
        node.put(ask)
        wait_for("the restart", lambda: node.restarts)
    assert len(node.state.get_messages_legacy(is_reply=True)) == 1


@pytest.mark.parametrize("kind", ["train", "evaluate", "query", *(f"train.{s}" for s in STEPS)])
def test_while_paused_nothing_new_begins(node: Node, ask: RecordDict, kind: str) -> None:
    pause = [True]
    with runner(node, paused=lambda: pause[0]):
        if kind.partition(".")[2] in WHILE_PAUSED:
            assert node.own(node.put(ask, kind))
        else:
            assert node.refusal(node.put(ask, kind)) == "paused"
        pause[0] = False
        assert node.own(node.put(ask, kind))


def test_what_is_refused_is_received_to_its_end(node: Node, ask: RecordDict) -> None:
    """A SuperNode whose objects are removed while they come drops message and reply."""
    with runner(node, paused=lambda: True):
        name = node.put(ask, "train", late=True)
        wait_for("the task to be taken up", lambda: not _pending(node))
        sleep(0.5)  # in which an early refusal would have removed them
        assert not node.finished()[0]
        node.receive()
        assert node.refusal(name) == "paused"


def test_a_pause_does_not_hide_a_wrong_bundle(node: Node, ask: RecordDict) -> None:
    refused: Refused = []
    with runner(node, refused=refused, paused=lambda: True):
        assert node.refusal(node.put(ask, "train.unmask", bundle=EVIL)) == "bundle"
    assert refused == ["encoding"]


def test_only_so_many_tasks_run_at_once(node: Node, ask: RecordDict, tmp_path: Path) -> None:
    with runner(node, worker_apps.wait, workers=2):
        names = [node.put(ask) for _ in range(3)]
        wait_for("two workers", lambda: len(list(tmp_path.glob("called-*"))) == 2)
        assert len(_pending(node)) == 1
        (tmp_path / "go").touch()
        for name in names:
            assert node.own(name)


def test_what_works_on_data_waits_for_a_gpu_and_the_sum_does_not(
    node: Node, ask: RecordDict, tmp_path: Path
) -> None:
    with runner(node, worker_apps.wait, gpus=Gpus(["4"], 1)):
        working = [node.put(ask, kind) for kind in ("train.update", "evaluate")]
        wait_for("a worker", lambda: list(tmp_path.glob("called-*")))
        summing = node.put(ask, "train.unmask")
        wait_for("another worker", lambda: len(list(tmp_path.glob("called-*"))) == 2)
        (tmp_path / "go").touch()
        assert [node.own(name)["gpus"] for name in working] == ["4", "4"]
        assert node.own(summing)["gpus"] == ""


def test_a_stopping_runner_begins_nothing_that_waits_for_a_gpu(
    node: Node, ask: RecordDict, tmp_path: Path
) -> None:
    with runner(node, worker_apps.wait, gpus=Gpus(["0"], 1)) as running:
        names = [node.put(ask), node.put(ask)]
        wait_for("the worker", lambda: list(tmp_path.glob("called-*")))
        wait_for("both tasks", lambda: not _pending(node))
        threading.Timer(0.5, (tmp_path / "go").touch).start()
        running.stop(patience_s=60)
        assert sorted(map(node.outcome, names)) == ["answered", "paused"]


def test_a_supernode_that_began_anew_is_served(node: Node, ask: RecordDict) -> None:
    there, node.runtime = node.runtime, None
    with runner(node):
        name = node.put(ask)
        node.runtime = RuntimeAddress("127.0.0.1:1", b"gone")
        node.runtime = there
        assert node.own(name)


def test_without_the_secret_no_task_is_handed_out(
    node: Node, ask: RecordDict, caplog: pytest.LogCaptureFixture
) -> None:
    assert node.runtime is not None
    right, node.runtime = node.runtime, RuntimeAddress(node.runtime.address, b"wrong")
    with runner(node):
        name = node.put(ask)
        wait_for("the complaint", lambda: "hands out no task" in caplog.text)
        assert [task.status.status for task in node.state.get_tasks()] == ["pending"]
        node.runtime = right
        assert node.own(name)


def test_stopping_waits_for_workers(node: Node, ask: RecordDict, tmp_path: Path) -> None:
    with runner(node, worker_apps.wait) as running:
        name = node.put(ask)
        wait_for("the worker", lambda: list(tmp_path.glob("called-*")))
        threading.Timer(0.5, (tmp_path / "go").touch).start()
        running.stop(patience_s=60)
        assert node.own(name)


def test_stopping_ends_workers_with_all_that_they_started(
    node: Node, ask: RecordDict, tmp_path: Path
) -> None:
    with runner(node, worker_apps.hang) as running:
        name = node.put(ask)
        started = _pids(tmp_path / "called")
        running.stop(patience_s=0)
        assert node.refusal(name) == "failed"
    wait_for("their end", lambda: not any(map(alive, started)))


def test_workers_do_not_outlive_a_killed_agent(node: Node, ask: RecordDict, tmp_path: Path) -> None:
    assert node.runtime is not None
    agent = f"""
import sys, threading
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, {str(Path(worker_apps.__file__).parent)!r})
import worker_apps
from fedcmr_client.runner import Runner
from fedcmr_client.supernode import RuntimeAddress
runtime = RuntimeAddress({node.runtime.address!r}, bytes.fromhex({node.runtime.secret.hex()!r}))
source = SimpleNamespace(runtime=runtime, restart=print)
with Runner(source, "alder", Path("p"), record_refusal=print, app=worker_apps.hang):
    threading.Event().wait()
"""
    # Not by -c or a file: workers import the main module once more.
    process = subprocess.Popen([sys.executable, "-c", agent])
    try:
        node.put(ask)
        started = _pids(tmp_path / "called")
        process.send_signal(signal.SIGKILL)
        wait_for("the workers' end", lambda: not any(map(alive, started)))
    finally:
        process.kill()
        process.wait()


def _pids(note: Path) -> list[int]:
    wait_for("the worker", note.exists)
    return [int(number) for number in note.read_text().split()]


@pytest.mark.parametrize(
    ("limits", "field"),
    [({"workers": 0}, "workers"), ({"nice": 20}, "nice"), ({"memory_mib": 10}, "memory_mib")],
)
def test_limits_that_cannot_work_are_named(limits: dict[str, int], field: str) -> None:
    with pytest.raises(ConfigurationError, match=field):
        WorkerLimits(**limits)  # type: ignore[arg-type]


def test_the_log_of_a_worker_is_the_agents(
    node: Node, ask: RecordDict, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with runner(node, worker_apps.fail):
        assert node.refusal(node.put(ask)) == "failed"
    (record,) = [each for each in caplog.records if "a task failed" in each.message]
    assert (record.name, record.levelname) == ("fedcmr.site", "ERROR")
    assert "Traceback" in record.message
