"""Hosts for system tests: each in a network namespace of its own, joined by one bridge.

Needs root and `ip` from iproute2. Where either is missing, `Network.open` gives hosts that share
this machine's loopback, and says so.
"""

from __future__ import annotations

import itertools
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Final

NO_NAMESPACES: Final = "network namespaces need root and iproute2: hosts share the loopback"


@dataclass(frozen=True)
class Host:
    """Where commands run; ``address`` is where the others reach it."""

    name: str
    address: str
    namespace: str | None = None
    _wire: str | None = None

    def command(self, command: Sequence[str]) -> list[str]:
        """Return the command that runs ``command`` on this host."""
        if self.namespace is None:
            return list(command)
        return ["ip", "netns", "exec", self.namespace, *command]

    def cut(self) -> None:
        """Pull the host's cable."""
        self._set("down")

    def mend(self) -> None:
        """Plug the host's cable in again."""
        self._set("up")

    def _set(self, state: str) -> None:
        if self.namespace is None or self._wire is None:
            raise RuntimeError(NO_NAMESPACES)
        _ip("-n", self.namespace, "link", "set", self._wire, state)


@dataclass
class Network:
    """Hosts on one bridge; ``isolated`` is false where namespaces are not allowed."""

    isolated: bool
    _bridge: str = ""
    _stack: ExitStack = field(default_factory=ExitStack)
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @classmethod
    @contextmanager
    def open(cls, isolated: bool = True) -> Iterator[Network]:
        """Make the network, without namespaces if asked; everything of it is gone afterwards."""
        with ExitStack() as stack:
            network = cls(isolated and _allowed(), f"fc{secrets.token_hex(3)}", stack)
            if network.isolated:
                network._make(network._bridge)
                inside = ("-n", network._bridge)
                _ip(*inside, "link", "add", "bridge", "type", "bridge")
                _ip(*inside, "link", "set", "bridge", "up")
            yield network

    def host(self, name: str) -> Host:
        """Add a host."""
        if not self.isolated:
            return Host(name, "127.0.0.1")
        number = next(self._numbers)
        namespace, address = f"{self._bridge}-{number}", f"10.77.0.{number}"
        self._make(namespace)
        near, far = f"{self._bridge}n{number}", "wire"
        _ip(
            *("link", "add", near, "netns", self._bridge, "type", "veth"),
            *("peer", "name", far, "netns", namespace),
        )
        _ip("-n", self._bridge, "link", "set", near, "master", "bridge", "up")
        _ip("-n", namespace, "addr", "add", f"{address}/24", "dev", far)
        _ip("-n", namespace, "link", "set", far, "up")
        return Host(name, address, namespace, far)

    def _make(self, namespace: str) -> None:
        _ip("netns", "add", namespace)
        self._stack.callback(_ip, "netns", "delete", namespace)
        _ip("-n", namespace, "link", "set", "lo", "up")


def _allowed() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"fc{secrets.token_hex(3)}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    if made.returncode != 0:
        return False
    _ip("netns", "delete", name)
    return True


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
