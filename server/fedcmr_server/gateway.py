"""The one public port: nginx, which ends mutual TLS and lets through what sites may ask for.

Of SuperLink's interface only the paths in `FLEET_PATHS` exist here, by POST and with a certificate
of the federation, and each request after :mod:`fedcmr_server.authoriser` allowed it. What goes on
is the path that was allowed, without a query string, so that nothing is read in two ways. Who sent
a request stands in headers that are always set here: a client's own of these names are dropped.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import time
from importlib.resources import files
from pathlib import Path
from pwd import getpwuid
from typing import Final, Self

from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from jinja2 import Environment, StrictUndefined

from fedcmr_server.home import CoordinatorHome, write_private
from fedcmr_server.kept_process import KeptProcess, Program
from fedcmr_shared.errors import ConfigurationError

FLEET_PATHS: Final = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "get-run",
    "get-fab",
    "push-object",
    "pull-object",
    "confirm-message-received",
)
"""All that a SuperNode needs; nodes are registered by the coordinator alone."""

SERVICES: Final = ("fedcmr.governance.v1.Governance", "grpc.health.v1.Health")
"""gRPC services that members reach."""

FLEET_BODY_MB: Final = 16
"""Flower sends arrays in pieces of 5 MB."""

GOVERNANCE_BODY_MB: Final = 80
"""A bundle of evidence comes in one call, with at most 64 MiB besides the heads of its pieces."""

_STRANGER_RATE: Final = 20  # requests a second of an address, for browsers with a link
_QUERY: Final = re.compile(r"\?[^\s\"]*")
_SETTINGS: Final = "nginx.conf"
_PORT_ADVICE: Final = {
    errno.EADDRINUSE: "another program has it: stop that one, or change `port`",
    errno.EACCES: "only root may: change `port` to one above 1023",
    errno.EADDRNOTAVAIL: "it is no address of this machine: change `listen`",
}

_log = logging.getLogger("fedcmr.gateway")


class Gateway:
    """nginx between the public port and what listens behind it.

    ``superlink_port`` and ``superlink_root`` say where SuperLink is and which root certificate
    vouches for it; ``lock`` is that of :class:`Program`.
    """

    def __init__(
        self,
        home: CoordinatorHome,
        superlink_port: int,
        superlink_root: Path,
        lock: int | None = None,
    ) -> None:
        self._home = home
        self._superlink = (superlink_port, superlink_root)
        self._process = KeptProcess(
            Program(
                name="nginx",
                command=[find_nginx(home.settings.nginx), *_options(home), "-g", "daemon off;"],
                folder=home.run,  # paths of sockets are relative to it
                environment=os.environ,
                take_line=take_line,
                lock=lock,
            )
        )

    def start(self) -> None:
        """Write the settings, check them, and begin to listen.

        Raises:
            ConfigurationError: nginx is missing or refuses, or the port cannot be had.
        """
        home = self._home
        require_port(str(home.settings.listen), home.settings.port)
        write_private(home.run / _SETTINGS, nginx_settings(home, *self._superlink).encode())
        _check(home)
        self._process.start()

    def stop(self) -> None:
        """Close the port."""
        self._process.stop()

    def reload(self) -> None:
        """Take up a renewed certificate; connections that are open stay so."""
        self._process.reload()

    @property
    def problem(self) -> str | None:
        """See :class:`KeptProcess`."""
        return self._process.problem

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def nginx_settings(home: CoordinatorHome, superlink_port: int, superlink_root: Path) -> str:
    """Return the content of `nginx.conf`."""
    text = files("fedcmr_server").joinpath("nginx.conf.j2").read_text(encoding="utf-8")
    settings = home.settings
    template = Environment(undefined=StrictUndefined, autoescape=False).from_string(text)
    return template.render(
        # nginx would change to `nobody`, who cannot enter the folder.
        user=f"user {getpwuid(0).pw_name};" if os.geteuid() == 0 else "",
        listen=_listen(str(settings.listen), settings.port),
        rate=settings.requests_per_second,
        stranger_rate=_STRANGER_RATE,
        fleet="|".join(FLEET_PATHS),
        services="|".join(name.replace(".", r"\.") for name in SERVICES),
        fleet_body_mb=FLEET_BODY_MB,
        governance_body_mb=GOVERNANCE_BODY_MB,
        superlink_port=superlink_port,
        superlink_root=os.path.relpath(superlink_root, home.run),
        key_header=FLEET_HTTP_PUBLIC_KEY_HEADER,
    )


def find_nginx(name: str) -> str:
    """Return the path of the nginx program.

    Raises:
        ConfigurationError: it is not there.
    """
    # Debian has it in a folder that only root's path names.
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    if path is None:
        raise ConfigurationError(
            f"{name} is not there: install nginx (Debian and Ubuntu: apt install nginx-light), or "
            "set `nginx` in coordinator.yaml"
        )
    return path


def require_port(address: str, port: int, patience_s: float = 3.0) -> None:
    """Return if the port can be listened on; for ``patience_s`` an earlier nginx may still end.

    Raises:
        ConfigurationError: it is taken, reserved for root, or the address is not this machine's.
    """
    deadline = time.monotonic() + patience_s
    while (error := _try_port(address, port)) is not None:
        if error.errno != errno.EADDRINUSE or time.monotonic() >= deadline:
            advice = _PORT_ADVICE.get(error.errno or 0, error.strerror)
            raise ConfigurationError(
                f"port {port} of {address} cannot be opened: {advice} (coordinator.yaml)"
            ) from error
        time.sleep(0.1)


def take_line(line: str) -> None:
    """Log a line of nginx without query strings, in which one-time tokens travel."""
    try:
        request = json.loads(line)
        text = f"{request['method']} {request['path']} {request['status']}"
    except (ValueError, KeyError, TypeError):  # what nginx says of itself
        _log.warning("%s", _QUERY.sub("?…", line))
    else:
        _log.info("%s", text, extra={"fields": {**request, "text": text}})


def _try_port(address: str, port: int) -> OSError | None:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            return error
    return None


def _options(home: CoordinatorHome) -> list[str]:
    return ["-p", f"{home.run}/", "-c", _SETTINGS, "-e", "stderr"]


def _check(home: CoordinatorHome) -> None:
    command = [find_nginx(home.settings.nginx), *_options(home), "-q", "-t"]
    done = subprocess.run(command, cwd=home.run, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = " ".join(_QUERY.sub("", done.stderr).split())
        raise ConfigurationError(f"nginx refuses its settings: {reason}")


def _listen(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
