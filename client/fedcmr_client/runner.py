"""Fetches the site's tasks from the SuperNode and has each done in a worker process.

For every task, in this order:

1. its input is pulled here, without the message's content;
2. its bundle is held against the code-free app (`check_bundle`);
3. while the site is paused, what would begin anything new is refused;
4. a fresh worker calls the app of the *installed* package and pushes the reply.

A task that is refused, or whose worker ends without a reply, is answered from here with a refusal
by code: the coordinator learns at once that the site drops out, and nothing else.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Final, Protocol, Self

import httpx
from flwr.app import Context, Message
from flwr.common.constant import SubStatus
from flwr.common.serde import context_from_proto, message_from_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    AcquireTaskResponse,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, pull_objects
from flwr.supercore.interceptors import SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import push_message, push_task_output

from fedcmr_client.bundle_check import check_bundle
from fedcmr_client.gpus import Gpus
from fedcmr_client.supernode import RuntimeAddress
from fedcmr_client.worker import (
    PUSHING,
    App,
    Assignment,
    WorkerLimits,
    installed_app,
    log_said,
    runtime_client,
    task_client,
    work,
)
from fedcmr_shared.errors import FedcmrError, JobRefused
from fedcmr_shared.federation.messages import Refusal
from fedcmr_shared.schemas.refusals import RefusalCode
from fedcmr_shared.secagg.messages import Step

POLL_S: Final = 0.3

WHILE_PAUSED: Final[frozenset[Step]] = frozenset({"shares", "consistency", "unmask"})
"""Steps that are answered while the site is paused.

They open no data and spend nothing. A sum in which this site takes part already may still be
opened; the steps that begin one (`keys`) or work on data (`update`, `train`, `evaluate`) may not.
"""

ON_DATA: Final = frozenset({"update", ""})
"""Steps that train or score; those outside a secure sum have no name."""

# An agent app is never ours. It is fetched all the same, to be refused: the SuperNode hands on one
# message at a time and would wait for ever for its answer.
_TASK_TYPES: Final = (TaskType.CLIENT_APP, TaskType.AGENT_APP)
_ACQUIRE: Final = "/flwr.proto.Runtime/AcquireTask"

_log = logging.getLogger("fedcmr.site")


class TaskSource(Protocol):
    """Who hands out tasks: a `SuperNode`."""

    @property
    def runtime(self) -> RuntimeAddress | None:
        """Where to fetch tasks; None while there is no connection."""

    def restart(self) -> None:
        """Begin anew, without the tasks of before."""


@dataclass(frozen=True)
class _Input:
    """What a task is about; ``message`` has no content yet."""

    kind: str
    bundle: bytes
    context: Context
    packed_context: bytes
    message: Message
    packed_tree: bytes

    @property
    def step(self) -> str:
        """The step of a secure sum; empty for others."""
        return self.message.metadata.message_type.partition(".")[2]


class Runner:
    """Does the tasks of one site until `stop`.

    ``record_refusal`` writes a refused bundle's rule into the site's ledger. ``paused`` is asked
    anew for every task. The workers work by the policy file ``policy`` and with ``app``; what works
    on data waits until some of the ``gpus`` are free, where the site uses any.
    """

    def __init__(
        self,
        source: TaskSource,
        site: str,
        policy: Path,
        *,
        record_refusal: Callable[[str], None],
        paused: Callable[[], bool] = lambda: False,
        limits: WorkerLimits | None = None,
        gpus: Gpus | None = None,
        app: App = installed_app,
    ) -> None:
        self._source = source
        self._site = site
        self._policy = policy
        self._record_refusal = record_refusal
        self._paused = paused
        self._limits = limits or WorkerLimits()
        self._gpus = gpus
        self._app = app
        self._processes = _worker_processes()
        self._stopping = threading.Event()
        self._free = threading.Semaphore(self._limits.workers)
        self._thread = threading.Thread(target=self._serve, name="runner", daemon=True)
        self._tasks: set[threading.Thread] = set()
        self._workers: set[ForkServerProcess] = set()

    def start(self) -> None:
        """Begin to fetch tasks."""
        self._thread.start()

    def stop(self, patience_s: float = 30.0) -> None:
        """Fetch no more tasks; end the workers that are not done after ``patience_s``.

        A round that is ended so is spent, as after a crash.
        """
        self._stopping.set()
        self._thread.join()
        deadline = time.monotonic() + patience_s
        for task in list(self._tasks):
            task.join(max(0.0, deadline - time.monotonic()))
        while any(task.is_alive() for task in list(self._tasks)):
            for process in list(self._workers):
                _kill(process)
            for task in list(self._tasks):
                task.join(1.0)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _serve(self) -> None:
        runtime: RuntimeAddress | None = None
        client: RuntimeHttpClient | None = None
        while not self._stopping.is_set():
            if runtime != self._source.runtime:
                if client is not None:
                    client.close()
                runtime = self._source.runtime
                client = None if runtime is None else _acquiring_client(runtime)
            if runtime is None or client is None or not self._fetch(runtime, client):
                self._stopping.wait(POLL_S)
        if client is not None:
            client.close()

    def _fetch(self, runtime: RuntimeAddress, client: RuntimeHttpClient) -> bool:
        """Start a thread for the next task, if there is one and a worker is free for it."""
        if not self._free.acquire(blocking=False):
            return False
        acquired = _acquire(client)
        if acquired is None:
            self._free.release()
            return False
        task = threading.Thread(
            target=self._do, args=(runtime, acquired), name=f"task-{acquired.task.task_id}"
        )
        self._tasks.add(task)
        task.start()
        return True

    def _do(self, runtime: RuntimeAddress, acquired: AcquireTaskResponse) -> None:
        try:
            with task_client(runtime.address, acquired.token) as client:
                self._answer(runtime, acquired, client)
        except httpx.HTTPError as error:
            _log.warning("a task is lost, the SuperNode does not answer for it: %s", error)
        except Exception:  # noqa: BLE001  # one task must not stop the others
            _log.exception("a task is lost")
        finally:
            self._tasks.discard(threading.current_thread())
            self._free.release()

    def _answer(
        self, runtime: RuntimeAddress, acquired: AcquireTaskResponse, client: RuntimeHttpClient
    ) -> None:
        task = _pull_input(acquired, client)
        try:
            self._require_allowed(task)
            with _heartbeats(client), self._devices(task) as gpus:
                code, pushing = self._run_worker(runtime, acquired.token, task, gpus)
        except JobRefused as refusal:
            _log.error("site %s refuses (%s): %s", self._site, refusal.code, refusal)
            self._refuse(client, task, refusal.code)
            push_task_output(client, None, SubStatus.COMPLETED, "")
            return
        if code == 0:
            push_task_output(client, None, SubStatus.COMPLETED, "")
            return
        _log.error("the worker of a task ended with %s", code)
        if not pushing:
            self._refuse(client, task, "failed")
            push_task_output(client, None, SubStatus.FAILED, "")
        elif self._source.runtime == runtime:
            # It would wait minutes for the rest of the reply, and for ever if nobody asks.
            self._source.restart()

    def _require_allowed(self, task: _Input) -> None:
        try:
            if task.kind != TaskType.CLIENT_APP:
                raise JobRefused("bundle", "kind", f"the task is for a {task.kind}")
            check_bundle(task.bundle)
        except JobRefused as refusal:
            try:
                self._record_refusal(refusal.rule)
            except FedcmrError:
                _log.exception("a refused bundle could not be written down")
            raise
        if self._paused() and task.step not in WHILE_PAUSED:
            raise JobRefused("paused", "paused", "the site is paused")

    def _refuse(self, client: RuntimeHttpClient, task: _Input, code: RefusalCode) -> None:
        with _heartbeats(client):
            _wait_received(client, task)
        reply = Message(Refusal(self._site, code).pack(), reply_to=task.message)
        push_message(client, reply, task.context)
        # Its content is not pulled, or not any more: the SuperNode need not keep it.
        client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(
                node=Node(node_id=task.context.node_id),
                run_id=task.context.run_id,
                message_object_id=task.message.metadata.message_id,
            )
        )

    @contextmanager
    def _devices(self, task: _Input) -> Iterator[tuple[str, ...] | None]:
        if self._gpus is None:
            yield None
        elif task.step not in ON_DATA:
            yield ()
        else:
            with self._gpus.lent() as gpus:
                if self._stopping.is_set():  # it waited too long to begin now, and be cut off
                    raise JobRefused("paused", "paused", "the agent stops")
                yield gpus

    def _run_worker(
        self, runtime: RuntimeAddress, token: str, task: _Input, gpus: tuple[str, ...] | None
    ) -> tuple[int | None, bool]:
        """Return the worker's exit code and whether it began to push its reply."""
        assignment = Assignment(
            runtime=runtime.address,
            token=token,
            context=task.packed_context,
            tree=task.packed_tree,
            policy=self._policy,
            limits=self._limits,
            gpus=gpus,
        )
        receiver, sender = self._processes.Pipe(duplex=False)
        with receiver:
            # Not a daemon: training on several GPUs starts processes of its own.
            process = self._processes.Process(target=work, args=(assignment, self._app, sender))
            with sender:
                process.start()
            self._workers.add(process)
            pushing = _listen(receiver, process)
            process.join()
            self._workers.discard(process)
            return process.exitcode, pushing


def _worker_processes() -> ForkServerContext:
    # Workers are forked from a server that has imported the app, and torch with it, once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "fedcmr_client.app", "fedcmr_client.worker"])
    return context


def _acquiring_client(runtime: RuntimeAddress) -> RuntimeHttpClient:
    signing = SuperExecAuthHttpInterceptor(
        master_secret=runtime.secret, protected_methods={_ACQUIRE}
    )
    return runtime_client(runtime.address, signing)


def _acquire(client: RuntimeHttpClient) -> AcquireTaskResponse | None:
    try:
        acquired = client.AcquireTask(AcquireTaskRequest(supported_task_types=_TASK_TYPES))
    except httpx.TransportError:
        return None  # it starts, or ends
    except httpx.HTTPStatusError as error:
        _log.warning("the SuperNode hands out no task: %s", error)
        return None
    return acquired if acquired.token else None


def _pull_input(acquired: AcquireTaskResponse, client: RuntimeHttpClient) -> _Input:
    task = client.PullTaskInput(PullTaskInputRequest())
    pulled = client.PullMessages(PullAppMessagesRequest())
    message = message_from_proto(pulled.messages_list[0])
    tree = pulled.message_object_trees[0]
    # A message travels without its own name.
    message.metadata.__dict__["_message_id"] = tree.object_id
    return _Input(
        kind=acquired.task.type,
        bundle=task.fab.content,
        context=context_from_proto(task.context),
        packed_context=task.context.SerializeToString(),
        message=message,
        packed_tree=tree.SerializeToString(),
    )


def _wait_received(client: RuntimeHttpClient, task: _Input) -> None:
    """Return once the SuperNode has all objects of the message, or none any more.

    It hands on a message before its objects have come. Were they removed meanwhile, it would drop
    the message and the reply to it, and the coordinator would wait for its longest time.
    """
    node = Node(node_id=task.context.node_id)
    pull = make_pull_object_fn_protobuf(client.PullObject, node, task.context.run_id)
    with suppress(ObjectPullError):  # gone: a worker has pulled them, or they will never come
        for each in iterate_object_tree(ObjectTree.FromString(task.packed_tree)):
            pull_objects([each.object_id], pull)


@contextmanager
def _heartbeats(client: RuntimeHttpClient) -> Iterator[None]:
    """Tell the SuperNode that the task is being worked on.

    From here and not from the worker, so that a task lives as long as its worker does. When the
    SuperNode has forgotten the task, the worker goes on: what it spends is spent, and the stored
    result is sent when it is asked for again.
    """

    def beat() -> bool:
        try:
            client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        except httpx.TransportError:
            return False
        except httpx.HTTPStatusError as error:
            _log.warning("the SuperNode does not know the task any more: %s", error)
        return True

    sender = HeartbeatSender(beat)
    sender.start()
    try:
        yield
    finally:
        sender.stop()


def _listen(worker: Connection, process: ForkServerProcess) -> bool:
    """Log what a worker says until it ends; return whether it began to push its reply."""
    pushing = False
    with suppress(EOFError):
        while worker in wait([worker, process.sentinel]):
            said = worker.recv_bytes()
            if said == PUSHING:
                pushing = True
            else:
                log_said(said)
    return pushing


def _kill(process: ForkServerProcess) -> None:
    if process.pid is not None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
    process.kill()
