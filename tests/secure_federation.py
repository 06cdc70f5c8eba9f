"""Sites that answer secure sums by the real protocol, and a link in memory that can lose answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import RecordDict
from torch import Tensor

from fedcmr_shared.federation.messages import Refusal, Task
from fedcmr_shared.federation.secure_messages import (
    QUESTIONS,
    ConsistencyQuestion,
    KeysQuestion,
    SharesQuestion,
    UnmaskAnswer,
    UnmaskQuestion,
    UpdateQuestion,
    add_vector,
    pack_record,
    read_record,
)
from fedcmr_shared.identity.keys import SiteKey
from fedcmr_shared.identity.roster import Roster
from fedcmr_shared.privacy.evaluation import totals_layout
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.secagg.faults import ProtocolError
from fedcmr_shared.secagg.layout import (
    encoding_for,
    following,
    group_of,
    header_for,
    trained_shapes,
    weights,
)
from fedcmr_shared.secagg.masking import masked_vector
from fedcmr_shared.secagg.messages import Confirmation, Keys, Shares, Step, Unmasking
from fedcmr_shared.secagg.session import Session
from fedcmr_shared.secagg.site import (
    SiteState,
    accept_shares,
    announce_vector,
    confirm_survivors,
    masks,
    offer_keys,
    reveal_shares,
    rounding_key,
    share_secrets,
)


@dataclass
class ProtocolSite:
    """Adds ``amount`` to every trained parameter, and its four patients score ``amount``."""

    name: str
    amount: float
    identity: SiteKey = field(default_factory=lambda: SiteKey(Ed25519PrivateKey.generate()))
    roster: Roster | None = None
    job: JobSpec | None = None
    states: dict[Session, SiteState] = field(default_factory=dict)
    answers: dict[Session, Unmasking] = field(default_factory=dict)
    stored: dict[tuple[str, int], Mapping[str, Tensor]] = field(default_factory=dict)
    trained: int = 0

    def answer(self, step: Step, content: RecordDict) -> RecordDict:
        """Answer, or refuse with the code `protocol`."""
        question = read_record(content, QUESTIONS[step])
        try:
            match question:
                case KeysQuestion():
                    self.job = question.job
                    return pack_record(self._offer(question.session))
                case SharesQuestion():
                    return pack_record(self._shares(question))
                case UpdateQuestion():
                    return self._update(question, Task.unpack(content))
                case ConsistencyQuestion():
                    return pack_record(self._confirm(question))
                case UnmaskQuestion():
                    return pack_record(self._unmask(question))
        except ProtocolError:
            return Refusal(self.name, "protocol").pack()
        raise AssertionError(question)

    def _offer(self, session: Session) -> Keys:
        if session in self.states and self.states[session].answered == "keys":
            return self.states[session].peers[self.name]
        same = [s for s in self.states if (s.phase, s.round) == (session.phase, session.round)]
        opened = [s for s in self.answers if (s.phase, s.round) == (session.phase, session.round)]
        if opened or any(session.attempt <= each.attempt for each in same):
            raise ProtocolError("repeated", "this attempt or a later one was answered")
        assert self.job is not None
        assert self.roster is not None
        group = group_of(self.job, self.roster, self.name)
        header = header_for(self.job, session, group)
        self.states[session], keys = offer_keys(self.name, self.identity, group, header)
        return keys

    def _shares(self, question: SharesQuestion) -> Shares:
        state = self._state(question.session)
        self.states[question.session], answer = share_secrets(
            state, self.identity, question.model, question.keys
        )
        return answer

    def _update(self, question: UpdateQuestion, task: Task) -> RecordDict:
        session = question.session
        state = accept_shares(self._state(session), question.deliveries)
        self.states[session] = state
        encoding = encoding_for(task.job, session.phase, state.roster)
        weight = weights(task.job, session.phase, state.roster)[self.name]
        values = self._result(task, session)
        vector = masked_vector(encoding, values, weight, rounding_key(state), masks(state))
        return add_vector(pack_record(announce_vector(state, self.identity, vector)), vector)

    def _result(self, task: Task, session: Session) -> Mapping[str, Tensor]:
        """Train once a round, whatever the number of attempts."""
        place = (session.phase, session.round)
        if place not in self.stored:
            self.trained += session.phase == "train"
            self.stored[place] = self.update(task) if place[0] == "train" else self.totals(task)
        return self.stored[place]

    def update(self, task: Task) -> dict[str, Tensor]:
        """What training would give."""
        shapes = trained_shapes(task.job.model, task.job.training.part)
        return {name: torch.full(shape, self.amount) for name, shape in shapes.items()}

    def totals(self, task: Task) -> dict[str, Tensor]:
        """Totals of four patients who all score ``amount`` from 0 to 1; one in each bin.

        Gates pass.
        """
        each = {"sum": 4 * self.amount, "patients": 4.0, "histogram": 1.0, "passed": 1.0}
        return {
            name: torch.full((length,), each[name.partition("/")[2]], dtype=torch.float64)
            for name, (length, _) in totals_layout(task.job).items()
        }

    def _confirm(self, question: ConsistencyQuestion) -> Confirmation:
        state = self._state(question.session)
        self.states[question.session], answer = confirm_survivors(
            state, self.identity, question.survivors
        )
        return answer

    def _unmask(self, question: UnmaskQuestion) -> UnmaskAnswer:
        session = question.session
        if session in self.answers:
            return UnmaskAnswer(unmasking=self.answers[session])
        state = self._state(session)
        self.states[session], answer = reveal_shares(state, self.identity, question.confirmations)
        self.answers[session] = answer
        assert self.job is not None
        after = following(self.job, session)
        next_keys = None if after is None else self._offer(after)
        return UnmaskAnswer(unmasking=answer, next_keys=next_keys)

    def _state(self, session: Session) -> SiteState:
        if session not in self.states:
            raise ProtocolError("order", "no keys were sent for this session")
        return self.states[session]


@dataclass(frozen=True)
class Place:
    """One site's answer: action (`train.keys`, …), round and attempt."""

    site: str
    action: str
    round: int = 1
    attempt: int = 1


Change = Callable[[RecordDict], RecordDict]


@dataclass
class ProtocolLink:
    """A `fedcmr_server.links.SiteLink` to protocol sites.

    ``deaf`` sites never get a question; answers are ``lost`` so often, or ``changed``.
    """

    sites: Sequence[ProtocolSite]
    deaf: set[Place] = field(default_factory=set)
    lost: dict[Place, int] = field(default_factory=dict)
    changed: dict[Place, Change] = field(default_factory=dict)
    asked: list[tuple[str, int, int, int]] = field(default_factory=list)
    away: set[str] = field(default_factory=set)

    def connected(self, at_least: int, timeout_s: float) -> list[int]:
        return [node for node, site in enumerate(self.sites) if site.name not in self.away]

    def exchange(
        self, action: str, contents: Mapping[int, RecordDict], timeout_s: float
    ) -> Iterator[tuple[int, RecordDict]]:
        step: Step = action.partition(".")[2]  # type: ignore[assignment]  # one of the five
        some = next(iter(contents.values()))
        session = read_record(some, QUESTIONS[step]).session
        assert action == f"{session.phase}.{step}"
        self.asked.append((action, session.round, session.attempt, len(contents)))
        for node, content in contents.items():
            place = Place(self.sites[node].name, action, session.round, session.attempt)
            if place in self.deaf:
                continue
            answer = self.sites[node].answer(step, content)
            if self.lost.get(place, 0) > 0:
                self.lost[place] -= 1
                continue
            if place in self.changed:
                answer = self.changed[place](answer)
            yield node, answer
            del answer


def federation(amounts: Mapping[str, float]) -> ProtocolLink:
    """Return a link to sites that all hold the same roster."""
    sites = [ProtocolSite(name, amount) for name, amount in amounts.items()]
    roster = Roster.model_validate({"sites": {s.name: s.identity.public_key for s in sites}})
    for site in sites:
        site.roster = roster
    return ProtocolLink(sites)
