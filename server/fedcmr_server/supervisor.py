"""Runs a coordinator: gateway, SuperLink, governance and dashboard, and the jobs.

nginx and SuperLink are processes, governance and dashboard threads of this one. Every second the
supervisor compares what the database says with what Flower does. Stopped in order or killed, it
leaves nothing behind that keeps the next start from going on: programs end with it, and what counts
is in the database.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import uvicorn

from fedcmr_server.gateway import Gateway
from fedcmr_server.home import CoordinatorHome
from fedcmr_server.job_carrier import JobCarrier
from fedcmr_server.log_files import log_to_files
from fedcmr_server.store import AccessLog, Certificates, Members, Store
from fedcmr_server.superlink import PROXIES, SuperLink, reconcile_nodes
from fedcmr_shared.errors import ConfigurationError, FederationError
from fedcmr_shared.identity.certificates import WARNING_DAYS

if TYPE_CHECKING:
    from starlette.types import ASGIApp

STEP_S: Final = 1.0
NODES_S: Final = 3.0
MAINTENANCE_S: Final = 3600.0

_READY_S: Final = 180.0  # SuperLink on a busy machine
_LEFTOVERS_S: Final = 30.0
_STOP_S: Final = 10.0

_log = logging.getLogger("fedcmr.supervisor")


def supervise(home: CoordinatorHome, stop: threading.Event, ready: Callable[[], None]) -> None:
    """Run the coordinator until ``stop`` is set; call ``ready`` once members can reach it.

    Raises:
        ConfigurationError: it runs already, nginx is missing, or the port cannot be had.
        FederationError: the database cannot be used, or a part failed to start.
    """
    os.umask(0o077)
    for name in [name for name in os.environ if name.lower() in PROXIES]:
        del os.environ[name]  # a coordinator calls nobody; to SuperLink no proxy leads
    with ExitStack() as stack:
        lock = stack.enter_context(_only_one(home))
        log_to_files(home.logs, home.settings.log_files)
        store = stack.enter_context(home.store())
        home.renew_server_certificate()
        superlink = stack.enter_context(SuperLink(home, lock))
        stack.enter_context(_governance(home, store))
        web = stack.enter_context(_dashboard(home, store))
        gateway = stack.enter_context(Gateway(home, superlink.port, superlink.root, lock))
        supervisor = _Supervisor(home, store, superlink, gateway, web)
        if supervisor.wait_ready(stop):
            _log.info("ready at %s", home.address)
            ready()
            supervisor.watch(stop)
        _log.info("stopping")


class WebServer:
    """Serves an application on a Unix socket, from a thread."""

    def __init__(self, app: ASGIApp, path: Path) -> None:
        config = uvicorn.Config(
            app,
            uds=str(path),
            log_config=None,
            access_log=False,  # the gateway writes one
            server_header=False,
            proxy_headers=False,
            ws="none",
            timeout_graceful_shutdown=5,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, name="web", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(_STOP_S)


class _Supervisor:
    def __init__(
        self,
        home: CoordinatorHome,
        store: Store,
        superlink: SuperLink,
        gateway: Gateway,
        web: WebServer,
    ) -> None:
        self._home, self._store = home, store
        self._superlink, self._gateway, self._web = superlink, gateway, web
        settings = home.settings
        self._carrier = JobCarrier(store, settings.jobs_at_once, settings.stop_patience_s)
        self._reported: set[str] = set()
        self._known_starts = 0
        self._nodes_at = self._maintained_at = -MAINTENANCE_S

    def wait_ready(self, stop: threading.Event) -> bool:
        """Wait until both programs answer; False if ``stop`` came first."""
        deadline = time.monotonic() + _READY_S
        while not (self._listens() and self._superlink_answers()):
            problem = self._gateway.problem or self._superlink.problem
            if problem is not None or time.monotonic() > deadline:
                raise FederationError(
                    f"{problem or 'SuperLink does not answer'}: read the logs in {self._home.logs}"
                )
            if stop.wait(0.1):
                return False
        return True

    def watch(self, stop: threading.Event) -> None:
        """Compare and mend, again and again, until ``stop``."""
        while not stop.wait(STEP_S):
            if not self._web.alive:
                raise FederationError(f"the dashboard ended: read the logs in {self._home.logs}")
            try:
                self._step()
            except FederationError as error:
                self._report(str(error))
            else:
                self._reported.clear()

    def _step(self) -> None:
        now = time.monotonic()
        if now - self._maintained_at >= MAINTENANCE_S:
            self._maintained_at = now
            self._maintain()
        starts = self._superlink.starts
        with self._superlink.control() as control:
            if starts != self._known_starts:
                self._carrier.give_up_runs(control, "SuperLink or the coordinator was restarted")
                self._known_starts = starts
            if now - self._nodes_at >= NODES_S:
                self._nodes_at = now
                for problem in reconcile_nodes(control, Members(self._store).active()):
                    self._report(problem)
            self._carrier.step(control)

    def _maintain(self) -> None:
        renewed = self._home.renew_server_certificate()
        if self._superlink.renew_certificate() or renewed:
            self._gateway.reload()
            _log.info("certificates were renewed")
        now = datetime.now(UTC)
        kept = timedelta(days=self._home.settings.access_log_days)
        AccessLog(self._store).forget(now - kept)
        soon = now + timedelta(days=WARNING_DAYS)
        for member, certificate in Certificates(self._store).expiring(soon):
            if member.state == "active":
                _log.warning("certificate of %s ends %s", member.name, certificate.not_after)

    def _report(self, problem: str) -> None:
        """Log a problem once, until all is well again."""
        if problem not in self._reported:
            self._reported.add(problem)
            _log.error("%s", problem)

    def _listens(self) -> bool:
        settings = self._home.settings
        address = settings.listen
        if address.is_unspecified:
            target = "::1" if address.version == 6 else "127.0.0.1"
        else:
            target = str(address)
        try:
            socket.create_connection((target, settings.port), timeout=2).close()
        except OSError:
            return False
        return True

    def _superlink_answers(self) -> bool:
        try:
            with self._superlink.control() as control:
                control.nodes()
        except FederationError:
            return False
        return True


@contextmanager
def _only_one(home: CoordinatorHome) -> Iterator[int]:
    """Refuse a second coordinator; wait for what one that was killed left behind.

    Yields a descriptor whose lock lasts as long as a program that inherits it.
    """
    home.run.mkdir(mode=0o700, exist_ok=True)
    with (home.run / "lock").open("a") as own, (home.run / "programs.lock").open("a") as programs:
        try:
            fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigurationError(
                f"a coordinator runs in {home.folder} already: stop it first"
            ) from error
        deadline = time.monotonic() + _LEFTOVERS_S
        while not _locked(programs.fileno()):
            if time.monotonic() > deadline:
                raise ConfigurationError(
                    f"programs of an earlier start still run in {home.run}: end nginx and "
                    "SuperLink, then start again"
                )
            time.sleep(0.1)
        yield programs.fileno()


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _governance(home: CoordinatorHome, store: Store) -> Iterator[None]:
    from fedcmr_server.governance import serve

    home.governance_socket.unlink(missing_ok=True)
    server = serve(home, store, home.governance_socket)
    try:
        yield
    finally:
        server.stop(grace=2).wait(_STOP_S)


@contextmanager
def _dashboard(home: CoordinatorHome, store: Store) -> Iterator[WebServer]:
    from fedcmr_server.dashboard import create_app

    home.web_socket.unlink(missing_ok=True)
    with WebServer(create_app(home, store), home.web_socket) as web:
        yield web
