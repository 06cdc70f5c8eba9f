"""What the coordinator gets to see of the sites' answers: each one's, or secure sums alone."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from fedcmr_server.job_run import JobRun
from fedcmr_server.links import CONNECT_TIMEOUT_S, SiteLink, SitesMissing
from fedcmr_server.robust import MeanUpdate
from fedcmr_server.secure_sums import SecureSums
from fedcmr_shared.errors import FederationError
from fedcmr_shared.federation.messages import (
    Refusal,
    Scores,
    Task,
    Update,
    content_bytes,
    unpack_answer,
)
from fedcmr_shared.models.bundle import state_sha256
from fedcmr_shared.privacy import distributed
from fedcmr_shared.privacy.evaluation import totals_layout
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.ledger import Phase
from fedcmr_shared.schemas.refusals import REFUSAL_CODES
from fedcmr_shared.secagg.server import Opened

_log = logging.getLogger("fedcmr.server")

Answer = TypeVar("Answer", Update, Scores)


@dataclass(frozen=True)
class Updates:
    """Mean updates by site or group, over ``sites`` in all; none when the round closed.

    ``train_loss`` is known without privacy only.
    """

    by_source: Mapping[str, MeanUpdate]
    sites: int
    bytes_up: int
    bytes_down: int
    train_loss: float | None = None


@dataclass(frozen=True)
class Totals:
    """Totals of the scores, added up over ``sites``; none when the round closed."""

    totals: Mapping[str, Tensor]
    sites: int
    bytes_up: int
    bytes_down: int


class SiteAnswers(Protocol):
    """Asks the sites to work on a task.

    Both methods raise SitesMissing when too few sites are connected or answer, and another
    FederationError when an answer is wrong.
    """

    def updates(self, task: Task) -> Updates:
        """Have the sites train."""

    def totals(self, task: Task) -> Totals:
        """Have the sites score the model."""


def answers_of(link: SiteLink, run: JobRun, job: JobSpec) -> SiteAnswers:
    """Return how the coordinator of ``job`` gets its answers.

    Raises:
        FederationError: the job aggregates securely and the run has no roster.
        ConfigurationError: the roster has too few sites for the job.
    """
    if job.aggregation == "plain_with_local_dp":
        return PlainAnswers(link, run.members)
    return SecureAnswers(SecureSums(link, run, job, run.roster))


def mean_update(task: Task, opened: Opened) -> MeanUpdate:
    """Return the mean of an opened sum of updates, whose tensors it takes over.

    Sums with distributed noise hold whole numbers, see :mod:`fedcmr_shared.privacy.distributed`.
    """
    privacy = task.job.privacy
    if privacy is not None and privacy.distributed is not None:
        sites = len(opened.survivors)
        delta = distributed.mean_update(task.job, task.round, opened.sums, sites)
        return MeanUpdate(delta, opened.weight)
    for total in opened.sums.values():
        total /= opened.weight  # in place: a second copy of a large model is saved
    return MeanUpdate(opened.sums, opened.weight)


@dataclass(frozen=True)
class SecureAnswers:
    """Answers as secure sums."""

    sums: SecureSums

    def updates(self, task: Task) -> Updates:
        """See :class:`SiteAnswers`."""
        found = self.sums.collect("train", task)
        means = {
            f"group {number}": mean_update(task, opened)
            for number, opened in enumerate(found.opened, start=1)
        }
        return Updates(means, _survivors(found.opened), found.traffic.up, found.traffic.down)

    def totals(self, task: Task) -> Totals:
        """See :class:`SiteAnswers`."""
        found = self.sums.collect("evaluate", task)
        added = add_totals([opened.sums for opened in found.opened])
        return Totals(added, _survivors(found.opened), found.traffic.up, found.traffic.down)


@dataclass(frozen=True)
class PlainAnswers:
    """Answers in the open; with ``members``, those of these sites alone."""

    link: SiteLink
    members: Collection[str] | None

    def updates(self, task: Task) -> Updates:
        """See :class:`SiteAnswers`."""
        found = self._ask("train", task, Update)
        weights = {site: task.job.weight(site) for site in found.by_site}
        means = {site: MeanUpdate(u.delta, weights[site]) for site, u in found.by_site.items()}
        losses = {site: u.loss for site, u in found.by_site.items() if u.loss is not None}
        loss = _weighted(losses, weights) if losses else None
        return Updates(means, len(means), found.bytes_up, found.bytes_down, loss)

    def totals(self, task: Task) -> Totals:
        """See :class:`SiteAnswers`."""
        found = self._ask("evaluate", task, Scores)
        lengths = {name: (length,) for name, (length, _) in totals_layout(task.job).items()}
        for site, scores in found.by_site.items():
            if {name: tuple(total.shape) for name, total in scores.totals.items()} != lengths:
                raise FederationError(
                    f"the totals of site {site} are not those that the job asks for"
                )
        added = add_totals([found.by_site[site].totals for site in sorted(found.by_site)])
        return Totals(added, len(found.by_site), found.bytes_up, found.bytes_down)

    def _ask(self, phase: Phase, task: Task, kind: type[Answer]) -> _Answers[Answer]:
        """Send ``task`` to every connected site; keep the answers that belong to it."""
        nodes = self.link.connected(task.job.minimum_sites, CONNECT_TIMEOUT_S)
        content = task.pack()
        contents = dict.fromkeys(nodes, content)
        replies = dict(self.link.exchange(phase, contents, task.job.round_timeout_s))
        asked = task.round, state_sha256(task.state)
        by_site: dict[str, Answer] = {}
        refusals: list[str] = []
        bytes_up = 0
        for node in sorted(replies):
            answer = unpack_answer(replies[node])
            if self.members is not None and answer.site not in self.members:
                _log.warning("node %d answers as %r: not a site of the job", node, answer.site)
            elif isinstance(answer, Refusal):
                refusals.append(f"{answer.site} ({answer.code}: {REFUSAL_CODES[answer.code]})")
                _log.warning("round %d refused by %s", task.round, refusals[-1])
            elif answer.site in by_site:
                raise FederationError(f"two nodes answered as site {answer.site}")
            else:
                by_site[answer.site] = _checked(answer, kind, asked)
                bytes_up += content_bytes(replies[node])
        if len(by_site) < max(task.job.minimum_sites, 1):
            raise SitesMissing(
                f"round {task.round}: {len(by_site)} of at least {task.job.minimum_sites} sites "
                f"answered `{phase}`; refused by {', '.join(refusals) or 'none'}; see the sites' "
                "logs"
            )
        return _Answers(by_site, bytes_up, content_bytes(content) * len(nodes))


def add_totals(totals: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Add up totals of the same names and shapes; of none there are none."""
    names = totals[0] if totals else {}
    return {name: torch.stack([each[name] for each in totals]).sum(0) for name in names}


@dataclass(frozen=True)
class _Answers(Generic[Answer]):
    by_site: Mapping[str, Answer]
    bytes_up: int
    bytes_down: int


def _checked(answer: Update | Scores, kind: type[Answer], asked: tuple[int, str]) -> Answer:
    """Return an answer of the right kind for the round and model that were ``asked`` about."""
    if not isinstance(answer, kind):
        raise FederationError(f"site {answer.site} sent another answer than {kind.__name__}")
    if (answer.round, answer.model_sha256) != asked:
        raise FederationError(f"site {answer.site} answered for another round or model")
    return answer


def _survivors(opened: tuple[Opened, ...]) -> int:
    return sum(len(each.survivors) for each in opened)


def _weighted(values: Mapping[str, float], weights: Mapping[str, float]) -> float:
    total = sum(weights[site] for site in sorted(values))
    return sum(values[site] * weights[site] for site in sorted(values)) / total
