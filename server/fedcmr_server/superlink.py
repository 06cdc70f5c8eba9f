"""Flower's SuperLink: a process on the loopback, and the coordinator's hand on it.

Its Control interface asks nobody for an account: whoever may log in to this machine could start
runs and register nodes there. Nobody but the coordinator's operators should. From outside the
gateway lets only Fleet requests through.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import httpx
from flwr.common.constant import Status
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.proto.run_pb2 import Run
from flwr.proto.transport_pb2 import Scalar
from flwr.supercore.constant import NodeStatus
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from fedcmr_server.authoriser import flower_key
from fedcmr_server.home import FOLDER_VARIABLE, CoordinatorHome, write_private
from fedcmr_server.kept_process import KeptProcess, Program
from fedcmr_server.store.tables import MemberRow
from fedcmr_shared.cli import FLOWER_SILENCE
from fedcmr_shared.errors import FederationError
from fedcmr_shared.identity.certificates import (
    WARNING_DAYS,
    certificate_pem,
    days_left,
    issue_server,
    key_pem,
    new_authority,
    new_key,
    read_certificate,
)

PROXIES: Final = ("http_proxy", "https_proxy", "all_proxy")
"""Environment variables (in lower case) that would lead loopback requests elsewhere."""

_HOST: Final = "127.0.0.1"
_KEY_USED: Final = 412
_UNKNOWN: Final = 404
_MOST_RUNS: Final = 200
_QUIET: Final = re.compile(
    r'"POST /v1/\S+ HTTP/\S+" 200|\.(ListNodes|ListRuns|PullMessages|SendNodeHeartbeat)\b'
)

_log = logging.getLogger("fedcmr.superlink")
_supervisor_log = logging.getLogger("fedcmr.supervisor")


class SuperLinkUnreachable(FederationError):
    """SuperLink does not answer; it may be starting."""


class KeyUsed(FederationError):
    """Flower knows the node key and takes it no second time."""


@dataclass(frozen=True)
class FlowerRun:
    """A run: whether it is over, how it ended, and the job that it was started for."""

    id: str
    job: str | None
    over: bool
    ending: str


class Control:
    """SuperLink's Control interface: nodes and runs.

    Every method raises SuperLinkUnreachable when there is no answer, and FederationError when
    SuperLink refuses.
    """

    def __init__(self, client: ControlHttpClient) -> None:
        self._client = client

    @classmethod
    @contextmanager
    def open(cls, port: int, root: Path) -> Iterator[Self]:
        """Connect to SuperLink on the loopback, whose certificate ``root`` vouches for."""
        with ControlHttpClient.from_server_address(
            f"{_HOST}:{port}",
            insecure=False,
            root_certificates=root.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr")],
        ) as client:
            yield cls(client)

    def nodes(self) -> dict[bytes, int]:
        """Registered nodes: number by public key (PEM)."""
        with _plain_errors("list its nodes"):
            found = self._client.ListNodes(ListNodesRequest()).nodes_info
        return {
            node.public_key: node.node_id
            for node in found
            if node.status != NodeStatus.UNREGISTERED
        }

    def register(self, public_key: bytes) -> int:
        """Let a node in and return its number; KeyUsed if the key (PEM) was ever registered."""
        with _plain_errors("register a node"):
            request = RegisterNodeRequest(public_key=public_key)
            return int(self._client.RegisterNode(request).node_id)

    def unregister(self, node: int) -> None:
        """Throw a node out for ever: its key is not taken again."""
        with _plain_errors("unregister a node"):
            self._client.UnregisterNode(UnregisterNodeRequest(node_id=node))

    def start_run(self, bundle: bytes, config: Mapping[str, str]) -> str:
        """Start a run of an app and return its number."""
        fab = Fab(hash_str=hashlib.sha256(bundle).hexdigest(), content=bundle)
        values = {name: Scalar(string=value) for name, value in config.items()}
        with _plain_errors("start a run"):
            answer = self._client.StartRun(StartRunRequest(fab=fab, override_config=values))
        if not answer.run_id:
            raise FederationError("SuperLink started no run: read logs/superlink.log")
        return str(answer.run_id)

    def stop_run(self, run: str) -> None:
        """Stop a run; nothing happens to one that is over."""
        with _plain_errors("stop a run"):
            if not self._run(run).over:
                self._client.StopRun(StopRunRequest(run_id=int(run)))

    def run(self, run: str) -> FlowerRun | None:
        """Return a run; None if SuperLink knows none of this number."""
        try:
            with _plain_errors("show a run"):
                return self._run(run)
        except _Unknown:
            return None

    def runs(self) -> list[FlowerRun]:
        """The newest runs."""
        with _plain_errors("list its runs"):
            answer = self._client.ListRuns(ListRunsRequest(limit=_MOST_RUNS))
        return [_flower_run(run) for run in answer.run_dict.values()]

    def _run(self, run: str) -> FlowerRun:
        answer = self._client.ListRuns(ListRunsRequest(run_id=int(run)))
        return _flower_run(answer.run_dict[int(run)])


class SuperLink:
    """A SuperLink process that is started again whenever it ends.

    The server apps that it starts are its children and end with it; they find the coordinator's
    folder in their environment. ``lock`` is that of :class:`Program`.
    """

    def __init__(self, home: CoordinatorHome, lock: int | None = None) -> None:
        self._home = home
        self.port = home.settings.superlink_port or free_port()
        self._process = KeptProcess(
            Program(
                name="SuperLink",
                command=_command(home, self.port),
                folder=home.run,
                environment=_environment(home),
                take_line=take_line,
                lock=lock,
            )
        )

    @property
    def root(self) -> Path:
        """The certificate that vouches for SuperLink's own."""
        return _paths(self._home)["root"]

    def start(self) -> None:
        """Write a fresh certificate and begin to keep SuperLink running."""
        (self._home.run / "flower").mkdir(mode=0o700, exist_ok=True)
        _write_certificate(self._home)
        self._process.start()

    def stop(self) -> None:
        """End SuperLink and all server apps."""
        self._process.stop()

    def renew_certificate(self) -> bool:
        """Start SuperLink anew with another certificate if its own ends within 30 days."""
        certificate = read_certificate(_paths(self._home)["certificate"].read_bytes())
        if days_left(certificate) > WARNING_DAYS:
            return False
        _write_certificate(self._home)
        self._process.restart()
        return True

    @contextmanager
    def control(self) -> Iterator[Control]:
        """Connect to the Control interface."""
        with Control.open(self.port, self.root) as control:
            yield control

    @property
    def problem(self) -> str | None:
        """See :class:`KeptProcess`."""
        return self._process.problem

    @property
    def starts(self) -> int:
        """See :class:`KeptProcess`."""
        return self._process.starts

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def reconcile_nodes(control: Control, members: Iterable[MemberRow]) -> list[str]:
    """Register the active sites' nodes and throw all others out; return what could not be done.

    ``members`` are the active ones.
    """
    wanted = {flower_key(row.node_key): row.name for row in members if row.node_key is not None}
    present = control.nodes()
    for key in present.keys() - wanted.keys():
        control.unregister(present[key])
        _supervisor_log.info("node %d left", present[key])
    problems = []
    for key in sorted(wanted.keys() - present.keys(), key=wanted.__getitem__):
        try:
            node = control.register(key)
        except KeyUsed as error:
            problems.append(f"site {wanted[key]}: {error}")
        else:
            _supervisor_log.info("site %s is node %d", wanted[key], node)
    return problems


def free_port() -> int:
    """Return a port of the loopback that nobody has."""
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def take_line(line: str) -> None:
    """Log a line of SuperLink; that somebody looked for news, which is every second, is none."""
    if not _QUIET.search(line):
        _log.info("%s", line)


def _command(home: CoordinatorHome, port: int) -> list[str]:
    files = _paths(home)
    options: dict[str, object] = {
        "--host": _HOST,
        "--port": port,
        "--ssl-certfile": files["certificate"],
        "--ssl-keyfile": files["key"],
        "--ssl-ca-certfile": files["root"],
        "--database": home.run / "superlink.sqlite",
        "--isolation": "subprocess",
    }
    command = [
        *(sys.executable, "-P", "-m", "fedcmr_server.superlink_process"),
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
    ]
    return command + [str(part) for option in options.items() for part in option]


def _environment(home: CoordinatorHome) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name.lower() not in PROXIES}
    scripts = Path(sys.executable).parent  # Flower starts its helpers by name
    return {
        **kept,
        **FLOWER_SILENCE,
        "PATH": f"{scripts}{os.pathsep}{kept.get('PATH', os.defpath)}",
        "FLWR_HOME": str(home.run / "flower"),
        "PYTHONUNBUFFERED": "1",
        FOLDER_VARIABLE: str(home.folder),
    }


def _paths(home: CoordinatorHome) -> dict[str, Path]:
    names = {"root": "superlink-root.crt", "certificate": "superlink.crt", "key": "superlink.pem"}
    return {what: home.run / name for what, name in names.items()}


def _write_certificate(home: CoordinatorHome) -> None:
    """Write a certificate of an authority whose key nobody keeps."""
    authority, key = new_authority("loopback"), new_key()
    certificate = issue_server(authority, key, ["localhost", _HOST])
    files = _paths(home)
    write_private(files["root"], certificate_pem(authority.certificate).encode())
    write_private(files["key"], key_pem(key))
    write_private(files["certificate"], certificate_pem(certificate).encode())


def _flower_run(run: Run) -> FlowerRun:
    job = run.override_config["job"].string if "job" in run.override_config else None
    status = run.status
    ending = f"{status.sub_status}: {status.details}" if status.details else status.sub_status
    return FlowerRun(str(run.run_id), job, status.status == Status.FINISHED, ending)


class _Unknown(FederationError):
    """SuperLink has no such run or node."""


@contextmanager
def _plain_errors(what: str) -> Iterator[None]:
    try:
        yield
    except httpx.HTTPStatusError as error:
        code = error.response.status_code
        if code == _KEY_USED:
            message = "its node key was registered before: it needs new keys, enrol it again"
            raise KeyUsed(message) from error
        kind = _Unknown if code == _UNKNOWN else FederationError
        reason = error.response.text[:200]
        raise kind(f"SuperLink did not {what}: {code} {reason}") from error
    except (httpx.TransportError, ValueError) as error:
        raise SuperLinkUnreachable(f"SuperLink did not {what}: {error}") from error
