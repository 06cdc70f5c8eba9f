"""What an agent tells its coordinator and asks of it every few minutes, beside the tasks.

Each deed stands alone: one that fails is tried again the next time and stops no other. What leaves
is how the site is in one word, its receipts and checkpoints, and a request to renew a certificate.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from fedcmr_client.announced import is_over, refused_by
from fedcmr_client.cosigning import publish_and_cosign
from fedcmr_client.governance import Condition, Governance, ListedJob
from fedcmr_client.pauses import held_by
from fedcmr_client.roster_news import RosterNews
from fedcmr_shared.errors import ConnectionProblem, FedcmrError, FederationError
from fedcmr_shared.identity.certificates import WARNING_DAYS, days_left
from fedcmr_shared.schemas.ledger import Started
from fedcmr_shared.schemas.receipt import Receipt

if TYPE_CHECKING:
    from fedcmr_client.site_home import SiteHome
    from fedcmr_shared.schemas.ledger import Hash

FIRST_WAIT_S: Final = 2.0
"""After a failure it is tried again so soon; the time doubles up to the usual interval."""

CLOCK_AHEAD_S: Final = 5.0
CLOCK_BEHIND_S: Final = 300.0
"""The SuperLink refuses what was signed later than that from now, or longer ago."""

LAST_WORD_S: Final = 5.0
"""A stopping agent waits so long for its last report to arrive."""

_log = logging.getLogger("fedcmr.site")


def renew_certificate(home: SiteHome, governance: Governance, *, new_key: bool = False) -> None:
    """Fetch a new certificate, for the same or a new key, and take it.

    Raises:
        ConnectionProblem: the coordinator cannot be reached.
        FederationError: it refuses.
        ConfigurationError: what it sent cannot be used; the present one stays.
    """
    membership = home.membership
    request = membership.renewal_request(new_key=new_key)
    membership.replace_certificate(governance.renew(request))
    if new_key:
        membership.write_request(home.identity())
    until = membership.certificate.not_valid_after_utc
    _log.info("the certificate was renewed: it is valid until %s", f"{until:%Y-%m-%d}")


class SiteSync:
    """Keeps up one site's side of the governance service in a thread, until `stop`.

    ``target`` is the tunnel's governance door. ``attention`` says whether the site's operator has
    to see to something.
    """

    def __init__(
        self,
        home: SiteHome,
        target: str,
        every_s: float,
        attention: Callable[[], bool] = lambda: False,
    ) -> None:
        self._home = home
        self._target = target
        self._every_s = every_s
        self._attention = attention
        self._stopping = threading.Event()
        self._due = threading.Event()
        self._thread = threading.Thread(target=self._keep_up, name="sync", daemon=True)
        self._problem: FedcmrError | None = None
        self._clock_problem: str | None = None
        self._receipts: dict[Hash, set[Receipt]] = {}
        self._told: set[Hash] = set()

    @property
    def problem(self) -> str | None:
        """What failed the last time; None when all went well or nothing was tried yet."""
        if self._thread.ident is not None and not self._thread.is_alive():
            return "the agent's sync has broken down: restart the agent, and report its log"
        problem = self._problem
        return None if problem is None else str(problem)

    @property
    def rejection(self) -> str | None:
        """Why the coordinator refuses this site's certificate, if it did so the last time."""
        problem = self._problem
        rejected = isinstance(problem, ConnectionProblem) and problem.kind == "rejected"
        return str(problem) if rejected else None

    @property
    def clock_problem(self) -> str | None:
        """Why the SuperLink refuses this machine's messages, if that is its clock."""
        return self._clock_problem

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def hurry(self) -> None:
        """Do everything now; returns at once."""
        self._due.set()

    def stop(self) -> None:
        """End, after a last report that need not arrive."""
        self._stopping.set()
        self._due.set()
        self._thread.join(LAST_WORD_S)

    def once(self, governance: Governance) -> None:
        """Do everything once.

        Raises:
            ConnectionProblem: the coordinator cannot be reached, or this machine's clock is wrong;
                nothing else was done.
            FedcmrError: something failed; the rest was done.
        """
        deeds = (
            self._report,
            self._renew,
            self._hand_in_receipts,
            self._learn_roster,
            self._cosign,
        )
        problems: list[FedcmrError] = []
        for deed in deeds:
            if self._stopping.is_set():
                return
            try:
                deed(governance)
            except ConnectionProblem:
                raise  # the others would fail alike, or bring a wrong time into the ledger
            except FedcmrError as error:
                _log.error("%s", error)
                problems.append(error)
        if problems:
            raise FederationError("; ".join(map(str, problems)))

    def _keep_up(self) -> None:
        failures = 0
        with Governance(self._target, wait=self._wait) as governance:
            while not self._stopping.is_set():
                try:
                    self.once(governance)
                    self._problem, failures = None, 0
                except FedcmrError as error:
                    self._note(error)
                    failures += 1
                wait = FIRST_WAIT_S * 2 ** min(failures - 1, 16) if failures else self._every_s
                self._due.wait(min(wait, self._every_s))
                self._due.clear()
            try:
                governance.report("stopping")
            except FedcmrError as error:
                _log.info("the coordinator was not told that the agent stops: %s", error)

    def _wait(self, seconds: float) -> None:
        self._stopping.wait(seconds)

    def _note(self, problem: FedcmrError) -> None:
        if str(problem) != str(self._problem):
            _log.warning("%s", problem)
        self._problem = problem

    def _report(self, governance: Governance) -> None:
        ahead_s = governance.report(self._condition())
        self._clock_problem = _clock_problem(ahead_s)
        if self._clock_problem is not None:
            raise ConnectionProblem("clock", self._clock_problem)

    def _condition(self) -> Condition:
        if self._home.pause.on:
            return "paused"
        if held_by(self._home) is not None:
            return "quiet"
        return "attention" if self._attention() else "ready"

    def _renew(self, governance: Governance) -> None:
        membership = self._home.membership
        changing = membership.changing_key  # an answer was lost: the old one soon ends
        if changing or days_left(membership.certificate) <= WARNING_DAYS:
            renew_certificate(self._home, governance, new_key=changing)

    def _hand_in_receipts(self, governance: Governance) -> None:
        """Sign a receipt for each start of this coordinator's jobs that it has none of yet.

        Other coordinators' jobs are none of its business, and are not named.
        """
        announced = governance.jobs()
        self._tell_new(announced)
        jobs = {job.spec.sha256 for job in announced}
        for receipt in self._own_receipts(jobs):
            if receipt.job not in self._receipts:
                self._receipts[receipt.job] = set(governance.receipts(receipt.job))
            if receipt not in self._receipts[receipt.job]:
                governance.put_receipt(receipt)
                self._receipts[receipt.job].add(receipt)

    def _tell_new(self, announced: Sequence[ListedJob]) -> None:
        for job in announced:
            if is_over(job) or job.spec.sha256 in self._told:
                continue
            self._told.add(job.spec.sha256)
            refused = ", ".join(refused_by(self._home, job)) or "nothing: it takes part"
            _log.info("job %s is announced; against it: %s", job.spec.name, refused)

    def _own_receipts(self, jobs: Collection[Hash]) -> list[Receipt]:
        identity = self._home.identity()
        with closing(self._home.open_ledger()) as ledger:
            entries = [leaf.entry for leaf in ledger.leaves()]
        return [
            Receipt.sign(self._home.policy.site, entry, identity)
            for entry in entries
            if isinstance(entry, Started) and entry.job in jobs
        ]

    def _learn_roster(self, governance: Governance) -> None:
        news = RosterNews(self._home)
        known = len(news.history)
        news.take(governance.roster_history())
        waiting = news.waiting
        if waiting is not None and len(news.history) > known:
            _log.warning(
                "version %d of the roster waits to be accepted: fedcmr site roster fetch",
                waiting.number,
            )

    def _cosign(self, governance: Governance) -> None:
        roster = RosterNews(self._home).accepted
        publish_and_cosign(governance, self._home, {} if roster is None else roster.sites)


def _clock_problem(ahead_s: float) -> str | None:
    if -CLOCK_BEHIND_S <= ahead_s <= CLOCK_AHEAD_S:
        return None
    off, side = timedelta(seconds=round(abs(ahead_s))), "ahead of" if ahead_s > 0 else "behind"
    return (
        f"this machine's clock is {off} {side} the coordinator's, which therefore refuses the "
        "site's messages: set the clock, best by NTP"
    )
