"""Opens the secure sums of a job's rounds, attempt after attempt.

What follows an attempt of too few sites depends on whether unmasking shares were asked for:

* before, the attempt *ended*, and the next one begins with whoever is connected: the sites mask
  their stored results again, under fresh keys, and nobody trains twice;
* after, the sites answer no other attempt of the round. Either the sums are *opened*, or the round
  is *closed* without an update, for the sites have spent its privacy.

With `secure_groups` the sums of all groups go through the steps together, and a group of too few
sites is left out as long as enough groups remain. Events:

=================== ================================================================
``attempt_started``  before the first question; its number is never used again
``unmask_asked``     before the first question for shares; no other attempt follows
``attempt``          the outcome, with survivors, losses, traffic and time
=================== ================================================================
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from fedcmr_server.job_run import JobRun
from fedcmr_server.job_states import attempts_at, summed_sites
from fedcmr_server.links import CONNECT_TIMEOUT_S, SiteLink, SitesMissing
from fedcmr_server.secure_attempt import Attempt, AttemptOver, Bounds, KeysAhead, Traffic
from fedcmr_shared.errors import ConfigurationError, FederationError
from fedcmr_shared.federation.messages import Task
from fedcmr_shared.identity.roster import Roster
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.ledger import Phase
from fedcmr_shared.schemas.refusals import PASSING
from fedcmr_shared.secagg.layout import groups
from fedcmr_shared.secagg.server import Loss, Opened
from fedcmr_shared.secagg.session import Session

AttemptOutcome = Literal["opened", "ended", "closed"]

_log = logging.getLogger("fedcmr.server")


@dataclass(frozen=True)
class Collected:
    """What a phase of a round brought: one sum of each group, or none when the round closed."""

    opened: tuple[Opened, ...]
    traffic: Traffic


class SecureSums:
    """Opens the sums of a job among the sites of ``roster``.

    Raises:
        ConfigurationError: the roster has too few sites for the job.
    """

    def __init__(self, link: SiteLink, run: JobRun, job: JobSpec, roster: Roster) -> None:
        self._link = link
        self._run = run
        self._job = job
        self._roster = roster
        self._groups = groups(job, roster)
        self._bounds = _bounds(job, roster, self._groups)
        self._ahead = KeysAhead()

    def collect(self, phase: Phase, task: Task) -> Collected:
        """Open the sums of ``phase`` of a task's round.

        Raises:
            SitesMissing: too few sites are connected, or no attempt got as far as the unmasking
                shares. Nothing is lost then: the sites keep their stored results.
            FederationError: too many sites refuse the job for a reason that stays.
        """
        number, traffic = task.round, Traffic()
        before = self._recorded(phase, number)
        if any(event["event"] == "unmask_asked" for event in before):
            self._close_after_restart(before[-1])
            return Collected((), traffic)
        last = max((event["attempt"] for event in before), default=0)
        bounds = self._bounds_of(phase)
        reason: AttemptOver | None = None
        for attempt in range(last + 1, last + 1 + self._job.secure.attempts):
            session = Session(job=self._job.sha256, phase=phase, round=number, attempt=attempt)
            sums = Attempt(self._link, self._job, session, self._groups, bounds)
            outcome, reason = self._try(sums, task)
            traffic.add(sums.traffic)
            if outcome != "ended":
                opened = sums.opened if outcome == "opened" else ()
                return Collected(opened, traffic)
            self._require_willing(sums.losses, bounds)
        raise SitesMissing(
            f"round {number} ({phase}): {self._job.secure.attempts} attempts to open the sum "
            f"ended, the last one because {reason}. See {self._run.journal}, "
            "start the missing sites and run the job again: sites send their stored results"
        )

    def _bounds_of(self, phase: Phase) -> Bounds:
        """Return what must remain of ``phase``.

        A model is released only if the memorisation gate of every site passed that trained it. So
        that sum waits for all of them; opened without one, it could never be opened again.
        """
        privacy = self._job.privacy
        if phase == "train" or privacy is None or not privacy.evaluation.memorisation:
            return self._bounds
        trained = summed_sites(self._run.events(), "train")
        return replace(self._bounds, sites=max(self._bounds.sites, len(trained)))

    def _require_willing(self, losses: Sequence[Loss], bounds: Bounds) -> None:
        """Give the job up when too many sites refuse it for reasons that stay.

        Raises:
            FederationError: they do; the message names them.
        """
        codes = {
            loss.site: loss.reason.partition(":")[0] for loss in losses if loss.fault == "refused"
        }
        lasting = {site: code for site, code in codes.items() if code not in PASSING}
        if len(self._roster.sites) - len(lasting) >= bounds.sites:
            return
        listed = ", ".join(f"{site} ({code})" for site, code in sorted(lasting.items()))
        raise FederationError(
            f"{listed} refuse the job, and {bounds.sites} of {len(self._roster.sites)} sites "
            "are needed: submit another job, or agree on the sites' policies and resume this one"
        )

    def _try(self, sums: Attempt, task: Task) -> tuple[AttemptOutcome, AttemptOver | None]:
        nodes = self._link.connected(sums.bounds.sites, CONNECT_TIMEOUT_S)
        place = sums.session.model_dump(exclude={"job"})
        self._run.record("attempt_started", **place)
        started = time.monotonic()
        outcome: AttemptOutcome = "ended"
        reason = None
        try:
            sums.keys(nodes, self._ahead, task)
            sums.shares()
            sums.vectors(task)
            sums.confirm()
            self._run.require_room()
            self._run.record("unmask_asked", **place)
            outcome = "closed"
            sums.open()
            outcome = "opened"
        except AttemptOver as error:
            reason = error
            _log.warning("%s %s: %s", sums.session, outcome, error)
        self._ahead = sums.ahead
        self._run.record(
            "attempt",
            **place,
            outcome=outcome,
            step=sums.step,
            reason=None if reason is None else str(reason),
            survivors=sorted(site for each in sums.opened for site in each.survivors),
            losses=[asdict(loss) for loss in sums.losses],
            seconds=time.monotonic() - started,
            step_seconds=sums.step_seconds(),
            bytes_up=sums.traffic.up,
            bytes_down=sums.traffic.down,
            exchanges=sums.traffic.exchanges,
            **self._sizes(sums.bounds),
        )
        return outcome, reason

    def _recorded(self, phase: Phase, number: int) -> list[Mapping[str, Any]]:
        """Return what was recorded about attempts at this round."""
        return attempts_at(self._run.events(), phase, number)

    def _close_after_restart(self, newest: Mapping[str, Any]) -> None:
        """Record the end of a round whose shares a stopped coordinator had asked for."""
        _log.warning("round %d: the sum was asked for before a restart", newest["round"])
        if newest["event"] == "attempt":
            return
        self._run.record(
            "attempt",
            **{name: newest[name] for name in ("phase", "round", "attempt")},
            outcome="closed",
            step="unmask",
            reason="the coordinator stopped before it had opened the sum",
            survivors=[],
            losses=[],
            seconds=0.0,
            step_seconds={},
            bytes_up=0,
            bytes_down=0,
            exchanges=0,
            **self._sizes(self._bounds_of(newest["phase"])),
        )

    def _sizes(self, bounds: Bounds) -> dict[str, Any]:
        """Return sites of the roster and of each group, and how many of them must remain."""
        return {
            "sites": len(self._roster.sites),
            "threshold": bounds.sites,
            "groups": [list(group.names) for group in self._groups],
        }


def _bounds(job: JobSpec, roster: Roster, groups: tuple[Roster, ...]) -> Bounds:
    """Return how many groups and sites must remain for the job's rule to mean something."""
    least = 1
    if job.aggregation == "secure_groups":
        least = 2 if job.robust == "mean" else 3
    smallest = sorted(group.threshold for group in groups)[:least]
    sites = max(job.minimum_sites, sum(smallest))
    if len(roster.sites) < sites:
        raise ConfigurationError(
            f"minimum_sites is {sites}, and the roster lists {len(roster.sites)} sites"
        )
    return Bounds(least, sites)
