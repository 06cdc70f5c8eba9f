"""A site's agent: it keeps the site connected until somebody stops it.

The parts, each of which mends itself: the tunnel (one way out), Flower's SuperNode (messages), the
runner (tasks, each in a worker process) and the sync (reports, renewal, checkpoints, news). The
agent watches them and says how they are; it decides nothing about jobs.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from typing import Final

from fedcmr_client import agent_lock, site_health
from fedcmr_client.agent_lock import only_agent
from fedcmr_client.agent_settings import AgentSettings
from fedcmr_client.gpus import gpus_of
from fedcmr_client.pauses import held_by
from fedcmr_client.roster_news import RosterNews
from fedcmr_client.runner import Runner
from fedcmr_client.site_health import Health, Problem, health_page
from fedcmr_client.site_home import SiteHome
from fedcmr_client.site_sync import SiteSync
from fedcmr_client.supernode import SuperNode, SuperNodeSettings
from fedcmr_client.tunnel import Tunnel, probe
from fedcmr_client.worker import WorkerLimits
from fedcmr_shared.errors import ConfigurationError, ConnectionProblem
from fedcmr_shared.identity.certificates import WARNING_DAYS, days_left

LOOK_S: Final = 2.0
"""The agent looks at its parts so often."""

WRITE_S: Final = 20.0
"""Its report is written so often at least, and at every change."""

_FOR_THE_OPERATOR: Final = ("governance", "certificate-expires")

_NO_JOB: Final = "0" * 64  # a bundle that is refused unopened names no job

_log = logging.getLogger("fedcmr.site")


class SiteService:
    """The agent of one site.

    Raises:
        ConfigurationError: the site has not joined or has left, its certificate has expired, or a
            setting cannot be used.
        LedgerError: the ledger cannot be trusted; DataError: the store cannot be opened.
    """

    def __init__(self, home: SiteHome, settings: AgentSettings) -> None:
        self._home = home
        self._settings = settings
        self._membership = home.membership
        self._stopping = threading.Event()
        self._require_sound()
        self._gpus = gpus_of(home.policy, settings.gpus)
        self._route = self._membership.route(settings.forward_proxy())
        self._health = self._first_health()

    def stop(self) -> None:
        """Let `run` come to its end; returns at once and may be called by a signal's handler."""
        self._stopping.set()

    @property
    def health(self) -> Health:
        """How the agent was when it last looked."""
        return self._health

    def run(self) -> None:
        """Keep the site connected until `stop`.

        Tasks that run then may finish, for as long as the settings say; the SuperNode signs off.

        Raises:
            ConfigurationError: another agent runs for this site, or a port or folder is taken.
        """
        home, settings, run = self._home, self._settings, self._home.run
        with ExitStack() as parts:
            parts.enter_context(only_agent(run / agent_lock.FILE))
            self._warn_unless_reachable()
            credentials = self._membership.credentials()
            tunnel = parts.enter_context(Tunnel(self._route, credentials, run / "tunnel"))
            node = SuperNode(self._node_settings(tunnel))
            runner = self._runner(node)
            sync = SiteSync(
                home, tunnel.governance_target, 60 * settings.sync_minutes, self._needs_attention
            )
            node.start()
            parts.callback(node.stop)
            runner.start()
            parts.callback(runner.stop, settings.stop_seconds)
            sync.start()
            parts.callback(sync.stop)
            if settings.health_port:
                parts.enter_context(health_page(settings.health_port, lambda: self._health))
            notify("READY=1")
            _log.info("the agent of %s runs; policy %s", home.policy.site, home.path)
            self._watch(tunnel, node, sync)
            notify("STOPPING=1")
            _log.info("the agent stops; running tasks have %g s", settings.stop_seconds)
        _log.info("the agent of %s has stopped", home.policy.site)

    def _require_sound(self) -> None:
        home = self._home
        self._membership.require_joined()
        self._membership.require_of(home.policy.site, home.identity())
        home.open_ledger().close()
        home.open_store().close()

    def _warn_unless_reachable(self) -> None:
        # After a power cut the coordinator or the network may come later than this machine.
        try:
            probe(self._route, self._membership.credentials())
        except ConnectionProblem as problem:
            _log.warning("%s (%s); the agent goes on trying", problem, problem.kind)

    def _node_settings(self, tunnel: Tunnel) -> SuperNodeSettings:
        return SuperNodeSettings(
            superlink=tunnel.fleet_address,
            root_certificates=tunnel.fleet_root,
            private_key=self._membership.node_key_path,
            folder=self._home.run / "supernode",
            memory_mib=self._settings.supernode_memory_mib,
        )

    def _runner(self, node: SuperNode) -> Runner:
        settings = self._settings
        limits = WorkerLimits(
            workers=settings.workers,
            nice=settings.nice,
            memory_mib=settings.worker_memory_mib,
        )
        home = self._home
        return Runner(
            node,
            home.policy.site,
            home.path.absolute(),
            record_refusal=self._record_refusal,
            paused=lambda: home.pause.on,
            limits=limits,
            gpus=self._gpus,
        )

    def _record_refusal(self, rule: str) -> None:
        with closing(self._home.open_ledger()) as ledger:
            ledger.refuse(_NO_JOB, "bundle", rule)

    def _watch(self, tunnel: Tunnel, node: SuperNode, sync: SiteSync) -> None:
        written_at, report = -WRITE_S, self._home.run / site_health.FILE
        while not self._stopping.is_set():
            before, self._health = self._health, self._look(tunnel, node, sync)
            if before.connected and not self._health.connected:
                sync.hurry()  # the governance service says why, if the site was thrown out
            now = time.monotonic()
            if now - written_at >= WRITE_S or self._health.differs(before):
                self._health.write(report)
                written_at = now
            notify("WATCHDOG=1")
            if self._membership.state == "left":
                _log.info("this site has left the federation")
                return
            self._stopping.wait(LOOK_S)

    def _look(self, tunnel: Tunnel, node: SuperNode, sync: SiteSync) -> Health:
        days = days_left(self._membership.certificate)
        return Health(
            site=self._home.policy.site,
            process=os.getpid(),
            at=datetime.now(UTC),
            connected=node.node_id is not None and tunnel.problem is None,
            paused=held_by(self._home),
            certificate_days=round(days, 1),
            problem=_newest_problem(tunnel, node, sync, days),
            roster_news=self._roster_news(),
        )

    def _needs_attention(self) -> bool:
        problem = self._health.problem
        own = problem is not None and problem.code in _FOR_THE_OPERATOR
        return own or self._health.roster_news is not None

    def _roster_news(self) -> str | None:
        try:
            waiting = RosterNews(self._home).waiting
        except ConfigurationError as error:
            return str(error)
        return None if waiting is None else f"version {waiting.number} waits to be accepted"

    def _first_health(self) -> Health:
        days = days_left(self._membership.certificate)
        starting = Problem("starting", "the agent is starting")
        name, paused = self._home.policy.site, held_by(self._home)
        return Health(name, os.getpid(), datetime.now(UTC), False, paused, round(days, 1), starting)


def notify(state: str) -> None:
    """Tell systemd how this service is, where it asks to be told (sd_notify of systemd)."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]  # a name without a file
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.sendto(state.encode(), address)
    except OSError as error:
        _log.warning("systemd cannot be told %s: %s", state, error)


def _newest_problem(
    tunnel: Tunnel, node: SuperNode, sync: SiteSync, certificate_days: float
) -> Problem | None:
    """Return what most likely stands behind all the others."""
    problem = tunnel.problem
    if problem is not None:
        return Problem(problem.kind, str(problem))
    if sync.clock_problem is not None:
        return Problem("clock", sync.clock_problem)
    if sync.rejection is not None:
        return Problem("rejected", sync.rejection)
    if node.problem is not None:
        return Problem("supernode", node.problem)
    if sync.problem is not None:
        return Problem("governance", sync.problem)
    if certificate_days <= WARNING_DAYS:
        return Problem(
            "certificate-expires", f"the certificate expires in {certificate_days:.0f} days"
        )
    return None
