"""One attempt to open the secure sums of a round: messages between link and protocol.

The protocol's own rules are in :mod:`fedcmr_shared.secagg.server`. A site that is silent or late,
refuses, or sends something wrong is lost for the attempt, and the losses say why.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from flwr.app import RecordDict

from fedcmr_server.links import SiteLink
from fedcmr_shared.errors import FederationError
from fedcmr_shared.federation.messages import Refusal, Task, unpack_answer
from fedcmr_shared.federation.secure_messages import (
    ConsistencyQuestion,
    KeysQuestion,
    Question,
    Record,
    SharesQuestion,
    UnmaskAnswer,
    UnmaskQuestion,
    UpdateQuestion,
    add_record,
    pack_record,
    read_record,
    read_vector,
)
from fedcmr_shared.identity.roster import Roster
from fedcmr_shared.models.bundle import state_sha256
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.refusals import REFUSAL_CODES
from fedcmr_shared.secagg.faults import ProtocolError
from fedcmr_shared.secagg.layout import encoding_for, following, header_for, weights
from fedcmr_shared.secagg.messages import Confirmation, Keys, Shares, Step, Vector
from fedcmr_shared.secagg.server import Aggregation, Loss, Opened, TooFewSites
from fedcmr_shared.secagg.session import Session

_UNMASK_REQUESTS: Final = 2  # asked again, a site sends the same shares

_log = logging.getLogger("fedcmr.server")


class AttemptOver(FederationError):
    """Too few sites are left to open the sums."""


class _Refused(ProtocolError):
    def __init__(self, refusal: Refusal) -> None:
        super().__init__("refused", f"{refusal.code}: {REFUSAL_CODES[refusal.code]}")
        self.site = refusal.site


@dataclass(frozen=True)
class Bounds:
    """The fewest groups, and the fewest sites in all of them, whose sums are opened."""

    groups: int
    sites: int


@dataclass(frozen=True)
class KeysAhead:
    """Keys for ``session`` by node, which came with the answers before it."""

    session: Session | None = None
    by_node: Mapping[int, Keys] = field(default_factory=dict)


@dataclass
class Traffic:
    """Bytes up to the server and down to the nodes; exchanges of messages beside `update`."""

    up: int = 0
    down: int = 0
    exchanges: int = 0

    def add(self, other: Traffic) -> None:
        """Add ``other``."""
        self.up += other.up
        self.down += other.down
        self.exchanges += other.exchanges


class GroupSum:
    """The sum of one group. ``questions`` are what its sites are asked next."""

    def __init__(self, job: JobSpec, session: Session, roster: Roster) -> None:
        self.roster = roster
        self.aggregation = Aggregation(
            roster,
            header_for(job, session, roster),
            encoding_for(job, session.phase, roster),
            weights(job, session.phase, roster),
        )
        self.questions: Mapping[str, Question] = {}
        self.over: FederationError | None = None
        self.opened: Opened | None = None

    def lose(self, site: str, step: Step, error: ProtocolError) -> None:
        """Note why the attempt goes on without ``site``."""
        loss = Loss(site, step, error.fault, str(error))
        self.aggregation.losses.setdefault(site, loss)


class Attempt:
    """Takes the sums of all groups through the steps, in the order of the methods.

    Each method raises `AttemptOver` when too few groups or sites are left. Up to and with
    `confirm` another attempt may follow; once `open` was called, none can.
    """

    def __init__(
        self,
        link: SiteLink,
        job: JobSpec,
        session: Session,
        groups: Sequence[Roster],
        bounds: Bounds,
    ) -> None:
        self.session = session
        self.sums = tuple(GroupSum(job, session, group) for group in groups)
        self.step: Step = "keys"
        self.traffic = Traffic()
        self.ahead = KeysAhead()
        self._link = link
        self._job = job
        self.bounds = bounds
        self._of_site = {site: one for one in self.sums for site in one.roster.sites}
        self._sites: dict[int, str] = {}
        self._strangers: dict[str, Loss] = {}
        self._began: dict[Step, float] = {}

    @property
    def opened(self) -> tuple[Opened, ...]:
        """The sums that were opened, one of each group."""
        return tuple(one.opened for one in self.sums if one.opened is not None)

    @property
    def losses(self) -> list[Loss]:
        """Why sites were lost, by name."""
        found = [loss for one in self.sums for loss in one.aggregation.losses.values()]
        return sorted([*found, *self._strangers.values()], key=lambda loss: loss.site)

    def step_seconds(self) -> dict[Step, float]:
        """Return how long each step took that has begun; the last one is over now."""
        ends = [*list(self._began.values())[1:], time.monotonic()]
        return {
            step: end - begun for (step, begun), end in zip(self._began.items(), ends, strict=True)
        }

    def keys(self, nodes: Sequence[int], ahead: KeysAhead, task: Task) -> None:
        """Collect fresh keys for ``task`` from ``nodes``, except where they came ahead."""
        model_sha256 = state_sha256(task.state)
        came = ahead.by_node if ahead.session == self.session else {}
        found = {node: came[node] for node in nodes if node in came}
        question = pack_record(
            KeysQuestion(session=self.session, job=task.job, authorisation=task.authorisation)
        )
        for node, content in self._exchange(
            "keys", {node: question for node in nodes if node not in found}
        ):
            try:
                found[node] = _read(content, Keys)
            except _Refused as error:
                self._lose(error.site, error)
            except ProtocolError as error:
                _log.warning("%s: node %d: %s", self.session, node, error)

        def take(one: GroupSum) -> Mapping[str, Question]:
            own = {
                node: found[node] for node in sorted(found) if found[node].site in one.roster.sites
            }
            accepted = one.aggregation.keys(own.values(), model_sha256)
            for keys in accepted:
                self._sites[next(node for node in own if own[node] == keys)] = keys.site
            question = SharesQuestion(session=self.session, model=model_sha256, keys=accepted)
            return {keys.site: question for keys in accepted}

        for keys in found.values():
            if keys.site not in self._of_site:
                self._lose(keys.site, ProtocolError("roster", "the roster does not list the site"))
        self._advance(take)

    def shares(self) -> None:
        """Collect the sealed shares."""
        answers = self._ask("shares", Shares)

        def take(one: GroupSum) -> Mapping[str, Question]:
            deliveries = one.aggregation.shares(self._own(one, answers))
            return {
                site: UpdateQuestion(session=self.session, deliveries=given)
                for site, given in deliveries.items()
            }

        self._advance(take)

    def vectors(self, task: Task) -> None:
        """Have the sites work on ``task``; add each masked vector as it arrives, and let it go."""
        packed = dict(task.pack())
        contents = {
            node: add_record(RecordDict(packed), question)
            for node, question in self._questions().items()
        }
        for node, content in self._exchange("update", contents):
            site = self._sites[node]
            try:
                message = _read(content, Vector)
                self._of_site[site].aggregation.vector(message, _vector(content))
            except ProtocolError as error:
                self._lose(site, error)
            _empty(content)

        def take(one: GroupSum) -> Mapping[str, Question]:
            survivors = one.aggregation.vectors_complete()
            question = ConsistencyQuestion(session=self.session, survivors=survivors)
            return dict.fromkeys(survivors, question)

        self._advance(take)

    def confirm(self) -> None:
        """Collect signatures of the survivors."""
        answers = self._ask("consistency", Confirmation)

        def take(one: GroupSum) -> Mapping[str, Question]:
            signed = one.aggregation.confirmations(self._own(one, answers))
            question = UnmaskQuestion(session=self.session, confirmations=signed)
            return {confirmation.site: question for confirmation in signed}

        self._advance(take)

    def open(self) -> None:
        """Collect the unmasking shares, and the keys that come with them; open the sums.

        The sites that stay silent are asked once more when a group is short of shares.
        """
        answers: dict[int, UnmaskAnswer] = {}
        for _ in range(_UNMASK_REQUESTS):
            answers |= self._ask("unmask", UnmaskAnswer, but=answers)
            if all(len(self._own(one, answers)) >= one.roster.threshold for one in self._left()):
                break
        keys = {node: answer.next_keys for node, answer in answers.items() if answer.next_keys}
        self.ahead = KeysAhead(following(self._job, self.session), keys)
        for one in self._left():
            try:
                shares = [answer.unmasking for answer in self._own(one, answers)]
                one.opened = one.aggregation.open(shares)
            except FederationError as error:
                one.over = error
        self._require_enough()

    def _exchange(
        self, step: Step, contents: Mapping[int, RecordDict]
    ) -> Iterator[tuple[int, RecordDict]]:
        self.step = step
        self._began.setdefault(step, time.monotonic())
        if not contents:
            return
        timeout_s = self._job.secure.step_timeout_s
        if step == "update":
            timeout_s = self._job.round_timeout_s
        else:
            self.traffic.exchanges += 1
        self.traffic.down += sum(_size(content) for content in contents.values())
        action = f"{self.session.phase}.{step}"
        for node, content in self._link.exchange(action, contents, timeout_s):
            self.traffic.up += _size(content)
            yield node, content
            del content  # before the next one arrives

    def _ask(self, step: Step, kind: type[Record], but: Collection[int] = ()) -> dict[int, Record]:
        """Send the questions to all nodes ``but`` some; return what can be read, by node."""
        contents = {
            node: pack_record(question)
            for node, question in self._questions().items()
            if node not in but
        }
        answers = {}
        for node, content in self._exchange(step, contents):
            try:
                answers[node] = _read(content, kind)
            except ProtocolError as error:
                self._lose(self._sites[node], error)
        return answers

    def _questions(self) -> dict[int, Question]:
        return {
            node: self._of_site[site].questions[site]
            for node, site in self._sites.items()
            if self._of_site[site].over is None and site in self._of_site[site].questions
        }

    def _own(self, one: GroupSum, answers: Mapping[int, Record]) -> list[Record]:
        """Return the answers of one group's nodes."""
        return [answers[node] for node in answers if self._of_site[self._sites[node]] is one]

    def _left(self) -> list[GroupSum]:
        return [one for one in self.sums if one.over is None]

    def _advance(self, take: Callable[[GroupSum], Mapping[str, Question]]) -> None:
        """Hand each group its answers; leave out those that fall short."""
        for one in self._left():
            try:
                one.questions = take(one)
            except TooFewSites as error:
                one.over = error
        self._require_enough()

    def _require_enough(self) -> None:
        left = self._left()
        sites = sum(len(one.aggregation.taking_part) for one in left)
        if len(left) >= self.bounds.groups and sites >= self.bounds.sites:
            return
        reasons = "; ".join(str(one.over) for one in self.sums if one.over is not None)
        raise AttemptOver(reasons or f"{sites} sites are left; {self.bounds.sites} are needed")

    def _lose(self, site: str, error: ProtocolError) -> None:
        _log.warning("%s: lost %s: %s", self.session, site, error)
        if site in self._of_site:
            self._of_site[site].lose(site, self.step, error)
        else:
            self._strangers[site] = Loss(site, self.step, error.fault, str(error))


def _read(content: RecordDict, kind: type[Record]) -> Record:
    """Read a site's answer.

    Raises:
        ProtocolError: it is malformed, or a refusal.
    """
    try:
        answer = unpack_answer(content)
    except FederationError:
        return read_record(content, kind)
    if isinstance(answer, Refusal):
        raise _Refused(answer)
    raise ProtocolError("malformed", f"site {answer.site} sent its result unmasked")


def _vector(content: RecordDict) -> memoryview:
    try:
        return read_vector(content)
    except FederationError as error:
        raise ProtocolError("vector", str(error)) from error


def _empty(content: RecordDict) -> None:
    """Free a message's arrays now: Flower's records form cycles, which outlive their last use."""
    for record in content.array_records.values():
        record.clear()


def _size(content: RecordDict) -> int:
    return sum(record.count_bytes() for record in content.values())
