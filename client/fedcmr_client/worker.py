"""One task in a process of its own: pull the message, call the installed app, push the reply.

The runner has accepted the task's bundle before, and nothing of the bundle reaches this process.
Whatever goes wrong here ends the process; its text stays in the site's log and the runner answers
for it.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Final

from flwr.app import Context, Message
from flwr.common.serde import context_from_proto
from flwr.proto.message_pb2 import Context as ProtoContext
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import push_message

from fedcmr_shared.errors import ConfigurationError

App = Callable[[Message, Context], Message]

PUSHING: Final = b""
"""What a worker says before it begins to push its reply; all else that it says is for the log."""

_log = logging.getLogger("fedcmr.site")


@dataclass(frozen=True)
class WorkerLimits:
    """What the workers may use of the machine.

    ``nice`` is added to the agent's niceness. ``memory_mib`` bounds what one worker allocates
    (None: no bound).
    """

    workers: int = 4
    nice: int = 10
    memory_mib: int | None = None

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigurationError(f"workers is {self.workers}: a site needs at least 1")
        if not 0 <= self.nice <= 19:
            raise ConfigurationError(f"nice is {self.nice}: write 0 (normal) to 19 (last)")
        if self.memory_mib is not None and self.memory_mib < 1024:
            raise ConfigurationError(
                f"memory_mib is {self.memory_mib}: a worker needs at least 1024"
            )


@dataclass(frozen=True)
class Assignment:
    """A task as a worker gets it; ``context`` and ``tree`` are Flower's, serialised.

    ``gpus`` are those that it may see (None: as the agent).
    """

    runtime: str
    token: str
    context: bytes
    tree: bytes
    policy: Path
    limits: WorkerLimits
    gpus: tuple[str, ...] | None


def installed_app(message: Message, context: Context) -> Message:
    """Call the app of the installed package."""
    from fedcmr_client.app import app

    return app(message, context)


def runtime_client(runtime: str, *interceptors: ProtobufClientInterceptor) -> RuntimeHttpClient:
    """Return a client of the SuperNode's Runtime API on loopback; it tries nothing twice.

    Flower's retries would wait for ever for a SuperNode that was started anew and knows nothing of
    the task, and they end the whole process when a task is unknown.
    """
    _exempt_loopback()
    return RuntimeHttpClient.from_server_address(
        server_address=runtime,
        insecure=True,
        root_certificates=None,
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"),
            *interceptors,
        ],
    )


def task_client(runtime: str, token: str) -> RuntimeHttpClient:
    """Return a client that speaks for the task of ``token``."""
    return runtime_client(runtime, RuntimeTokenHttpInterceptor(token))


def _exempt_loopback() -> None:
    # Flower's client heeds the environment, where a hospital may name its proxy.
    for name in ("no_proxy", "NO_PROXY"):
        hosts = os.environ.get(name, "")
        if "127.0.0.1" not in hosts.split(","):
            os.environ[name] = f"{hosts},127.0.0.1".lstrip(",")


def work(assignment: Assignment, app: App, runner: Connection) -> None:
    """Do the task of ``assignment`` with ``app``; the entry point of a worker process."""
    _settle(assignment, runner)
    context = context_from_proto(ProtoContext.FromString(assignment.context))
    with task_client(assignment.runtime, assignment.token) as client:
        try:
            message = _pull(client, context, ObjectTree.FromString(assignment.tree))
            reply = app(message, context)
            runner.send_bytes(PUSHING)
            push_message(client, reply, context)
        except Exception:  # noqa: BLE001  # whatever it was, its text stays in the site's log
            _log.exception("a task failed")
            sys.exit(1)


def log_said(said: bytes) -> None:
    """Write what a worker said into this process's log."""
    level, name, text = json.loads(said)
    logging.getLogger(name).log(level, "%s", text)


class _Saying(logging.Handler):
    """Sends log records to the runner, which alone writes the site's log."""

    def __init__(self, runner: Connection) -> None:
        super().__init__()
        self._runner = runner

    def emit(self, record: logging.LogRecord) -> None:
        said = [record.levelno, record.name, self.format(record)]
        self._runner.send_bytes(json.dumps(said).encode())


def _settle(assignment: Assignment, runner: Connection) -> None:
    os.setsid()  # so that the runner can end it with all that it starts
    threading.Thread(target=_end_with_the_agent, daemon=True).start()
    logging.getLogger().handlers = [_Saying(runner)]
    logging.getLogger("fedcmr").setLevel(logging.INFO)
    limits = assignment.limits
    os.nice(limits.nice)
    if limits.memory_mib is not None:
        most = limits.memory_mib << 20
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    os.environ["FEDCMR_POLICY"] = str(assignment.policy)
    if assignment.gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(assignment.gpus)


def _end_with_the_agent() -> None:
    agent = parent_process()
    if agent is not None:
        wait([agent.sentinel])
        os.killpg(0, signal.SIGKILL)


def _pull(client: RuntimeHttpClient, context: Context, tree: ObjectTree) -> Message:
    node = Node(node_id=context.node_id)
    message = pull_and_inflate_object_from_tree(
        tree,
        make_pull_object_fn_protobuf(client.PullObject, node, context.run_id),
        make_confirm_message_received_fn_protobuf(
            client.ConfirmMessageReceived, node, context.run_id
        ),
        return_type=Message,
    )
    # A message travels without its own name.
    message.metadata.__dict__["_message_id"] = tree.object_id
    return message
