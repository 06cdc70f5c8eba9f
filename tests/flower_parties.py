"""A real SuperLink and real SuperNodes on loopback, and a coordinator's hand on a Flower run.

TLS and node authentication are on, as in a federation. The SuperLink starts no server apps: the
test itself acts as the one of a run, see `grid_of_run`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from flwr.app import Message, RecordDict
from flwr.common.serde import run_from_proto
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid
from flwr.supernode.runtime.run_clientapp import push_task_output

from fedcmr_shared.cli import FLOWER_SILENCE
from fedcmr_shared.identity.certificates import (
    Authority,
    certificate_pem,
    issue_server,
    key_pem,
    new_authority,
    new_key,
)

DEADLINE_S = 60.0

Found = TypeVar("Found")


def wait_for(what: str, look: Callable[[], Found | None], deadline_s: float = DEADLINE_S) -> Found:
    """Return what ``look`` finds, as soon as it finds something true."""
    ends = time.monotonic() + deadline_s
    while not (found := look()):
        assert time.monotonic() < ends, f"waited {deadline_s} s in vain for {what}"
        time.sleep(0.05)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def new_node_key(path: Path) -> bytes:
    """Write a node's private key as Flower wants it; return the public one."""
    key = ec.generate_private_key(ec.SECP384R1())
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    path.chmod(0o600)
    return public_key_to_bytes(key.public_key())


def flower_environment(home: Path, **more: str) -> dict[str, str]:
    """The environment of a Flower process of its own, without calls home or proxies."""
    scripts = str(Path(sys.executable).parent)  # Flower starts its helpers by name
    kept = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    return {
        **kept,
        **FLOWER_SILENCE,
        "FLWR_HOME": str(home),
        "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}",
        **more,
    }


@contextmanager
def flower_process(
    command: list[str], home: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run one of Flower's commands, with all that it starts, inside the context.

    What it writes is in ``home``/log.txt.
    """
    home.mkdir(parents=True, exist_ok=True)
    with (home / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / command[0]), *command[1:]],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment or flower_environment(home),
            start_new_session=True,
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                pass
            finally:
                end_group(process.pid)
                process.wait()


def end_group(leader: int) -> None:
    """Kill what is left of a process group."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


@dataclass(frozen=True)
class SuperLink:
    """A running SuperLink: HOST:PORT and the authority of its certificate."""

    address: str
    authority: Path

    @contextmanager
    def control(self) -> Iterator[ControlHttpClient]:
        with ControlHttpClient.from_server_address(
            self.address,
            insecure=False,
            root_certificates=self.authority.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr")],
        ) as client:
            yield client

    def register(self, public_key: bytes) -> int:
        """Let a node in; return its number."""
        with self.control() as client:
            return client.RegisterNode(RegisterNodeRequest(public_key=public_key)).node_id

    def online(self, node_id: int) -> bool:
        with self.control() as client:
            nodes = client.ListNodes(ListNodesRequest()).nodes_info
        return any(node.node_id == node_id and node.status == "online" for node in nodes)

    def start_run(self, bundle: bytes) -> int:
        """Start a run with ``bundle`` as its app; return its number."""
        fab = Fab(hash_str=sha256(bundle).hexdigest(), content=bundle)
        with self.control() as client:
            return client.StartRun(StartRunRequest(fab=fab)).run_id


@contextmanager
def superlink(folder: Path, authority: Authority | None = None) -> Iterator[SuperLink]:
    """Run a SuperLink on loopback, certified by ``authority``, that keeps everything in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    authority, key = authority or new_authority("test"), new_key()
    certificate = issue_server(authority, key, ["127.0.0.1", "localhost"])
    files = {
        "ca.pem": certificate_pem(authority.certificate).encode(),
        "server.pem": certificate_pem(certificate).encode(),
        "server.key": key_pem(key),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    port = free_port()
    command = ["flower-superlink", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--ssl-ca-certfile", str(folder / "ca.pem")]
    command += ["--ssl-certfile", str(folder / "server.pem")]
    command += ["--ssl-keyfile", str(folder / "server.key")]
    command += ["--enable-supernode-auth", "--isolation", "process"]
    with flower_process(command, folder) as process:
        link = SuperLink(f"127.0.0.1:{port}", folder / "ca.pem")
        wait_for("the SuperLink", lambda: _answers(link, process))
        yield link


def _answers(link: SuperLink, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, "the SuperLink ended: see log.txt in its folder"
    try:
        with link.control() as client:
            client.ListNodes(ListNodesRequest())
    except httpx.TransportError:
        return False
    return True


@contextmanager
def plain_supernode(
    link: SuperLink, key: Path, folder: Path, **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run Flower's own SuperNode as it comes, which executes the app of every bundle."""
    command = ["flower-supernode", "--superlink", link.address, "--port", str(free_port())]
    command += ["--root-certificates", str(link.authority)]
    command += ["--auth-supernode-private-key", str(key)]
    with flower_process(command, folder, flower_environment(folder, **environment)) as process:
        yield process


@dataclass(frozen=True)
class Run:
    """A run whose server app is the test."""

    grid: HttpGrid
    run_id: int
    task_id: int

    def push(self, node: int, kind: str, content: RecordDict) -> str:
        """Send a message of type ``kind``; return its name, for `reply`."""
        # Flower keeps the running app's identity in the class; a test may have several runs.
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = (
            self.run_id,
            self.task_id,
            1,
        )
        (name,) = self.grid.push_messages([Message(content, node, kind)])
        return name

    def reply(self, name: str, deadline_s: float = DEADLINE_S) -> Message:
        """Wait for the reply to the message ``name``."""
        return wait_for(
            f"the reply to {name}", lambda: [*self.grid.pull_messages([name])], deadline_s
        )[0]

    def ask(
        self, node: int, kind: str, content: RecordDict, deadline_s: float = DEADLINE_S
    ) -> Message:
        """Send a message and wait for its reply."""
        return self.reply(self.push(node, kind, content), deadline_s)


@contextmanager
def grid_of_run(link: SuperLink, bundle: bytes) -> Iterator[Run]:
    """Start a run with ``bundle`` and act as its server app."""
    run_id = link.start_run(bundle)
    before = {name: getattr(TaskIdentity, name) for name in ("_run_id", "_task_id", "_node_id")}
    grid = HttpGrid(
        link.address, root_certificates=link.authority.read_bytes(), token=_claim(link, run_id)
    )
    client: RuntimeHttpClient = grid._runtime_client
    heartbeats = HeartbeatSender(make_task_heartbeat_fn_http(client))
    try:
        task = client.PullTaskInput(PullTaskInputRequest())
        grid.set_run(run_from_proto(task.run))
        heartbeats.start()
        yield Run(grid, run_id, task.task_id)
        heartbeats.stop()
        push_task_output(client, None, "completed", "")
    finally:
        if heartbeats.is_running:
            heartbeats.stop()
        grid.close()
        for name, value in before.items():
            setattr(TaskIdentity, name, value)


def _claim(link: SuperLink, run_id: int) -> str:
    """Fetch the server app's task of a run; return its token."""
    with RuntimeHttpClient.from_server_address(
        link.address,
        insecure=False,
        root_certificates=link.authority.read_bytes(),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr-serverapp")],
    ) as client:
        request = AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
        acquired = wait_for("the run's task", lambda: _with_token(client.AcquireTask(request)))
    assert acquired.task.run_id == run_id, "another run waits for its server app: begin one by one"
    return str(acquired.token)


def _with_token(acquired: Any) -> Any:
    return acquired if acquired.token else None


def alive(process: int) -> bool:
    """Whether a process runs; one that ended and is not yet fetched does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
