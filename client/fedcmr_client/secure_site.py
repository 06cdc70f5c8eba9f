"""A site's answers in secure sums: the protocol's rules, between policy, ledger and disk.

Each answer leaves after what it rests on is on disk:

========== ============================================== ==================================
step       before the answer                              refused
========== ============================================== ==================================
keys       policy; fresh secrets kept                     an attempt that is not newer
shares     peers' keys kept                               repeated, out of order
update     round trained and stored (`SiteAgent`);        repeated; another model than the
           ledger entry *masked*                          peers' or than the stored result's
consistency survivors kept                                repeated; a second set
unmask     ledger entry *unmasked*; then the secrets are  another set; any later attempt
           erased
========== ============================================== ==================================

Every step but a repeated *unmask* is also refused when the site's roster is no longer the one that
the attempt began with. Only the unmask answer is sent again, as it was. A crash loses the site for
the attempt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flwr.app import RecordDict
from torch import Tensor

from fedcmr_client.ledger import Ledger
from fedcmr_client.secure_sessions import SessionRecord
from fedcmr_client.site_home import SiteHome
from fedcmr_shared.errors import ConfigurationError, FederationError, JobRefused
from fedcmr_shared.federation.messages import Task
from fedcmr_shared.federation.secure_messages import (
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
from fedcmr_shared.identity.roster import Roster
from fedcmr_shared.models.bundle import state_sha256
from fedcmr_shared.privacy.budget import JobState
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.secagg.faults import ProtocolError
from fedcmr_shared.secagg.layout import encoding_for, following, group_of, header_for, weights
from fedcmr_shared.secagg.masking import masked_vector
from fedcmr_shared.secagg.messages import Keys, Step, Unmasking
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

if TYPE_CHECKING:
    from fedcmr_client.agent import SiteAgent


@dataclass(frozen=True)
class SecureSite:
    """Answers the steps of secure sums for the site of ``agent``."""

    agent: SiteAgent

    def answer(self, step: Step, content: RecordDict) -> RecordDict:
        """Answer one step.

        Raises:
            ProtocolError: the question is malformed, foreign, repeated or out of order.
            JobRefused: the policy, the budget or the ledger does not allow it.
            FedcmrError: the round failed.
        """
        handlers: Mapping[Step, Callable[[RecordDict], RecordDict]] = {
            "keys": self._keys,
            "shares": self._shares,
            "update": self._update,
            "consistency": self._consistency,
            "unmask": self._unmask,
        }
        return handlers[step](content)

    @property
    def _home(self) -> SiteHome:
        return self.agent.home

    def _keys(self, content: RecordDict) -> RecordDict:
        question = read_record(content, KeysQuestion)
        job, session = question.job, question.session
        if session.job != job.sha256:
            raise ProtocolError("foreign", "the session is not of the job that came with it")
        self.agent.require_allowed(job, question.authorisation, session.phase, session.round)
        with self._home.sessions().locked():
            return pack_record(self._offer(job, session))

    def _offer(self, job: JobSpec, session: Session) -> Keys:
        """Return this session's keys; the same again until another step was answered."""
        sessions, site = self._home.sessions(), self.agent.name
        group = summing_group(self._home, job)
        record = sessions.load(session)
        if record is not None and record.state.answered != "keys":
            raise ProtocolError("repeated", f"{session}: the keys were used before")
        if record is not None and record.state.roster == group:
            return record.state.peers[site]
        if session.attempt < sessions.newest_attempt(session):
            raise ProtocolError("repeated", f"{session}: a later attempt began")
        with closing(self._home.open_ledger()) as ledger:
            _require_new(ledger, session)
        header = header_for(job, session, group)
        state, message = offer_keys(site, self._home.identity(), group, header)
        sessions.erase_others(session)
        sessions.save(SessionRecord(job=job, state=state))
        return message

    def _shares(self, content: RecordDict) -> RecordDict:
        question = read_record(content, SharesQuestion)
        sessions = self._home.sessions()
        with sessions.locked():
            record = self._running(question.session)
            identity = self._home.identity()
            state, message = share_secrets(record.state, identity, question.model, question.keys)
            sessions.save(record.model_copy(update={"state": state}))
            sessions.erase_other_answers(question.session)
        return pack_record(message)

    def _update(self, content: RecordDict) -> RecordDict:
        question = read_record(content, UpdateQuestion)
        session, sessions = question.session, self._home.sessions()
        self._running(session)  # or a question about any job would leave a lock file
        # Whoever is late with an attempt may still train when the next one asks for the same
        # result: that waits, and then finds it stored. Other steps do not wait.
        with sessions.locked(f"{session.job}.work"):
            record = self._running(session)
            # Before the round is trained, and again below: training takes long.
            accept_shares(record.state, question.deliveries)
            values = self._noised_result(record, _task(content))
        with sessions.locked(), closing(self._home.open_ledger()) as ledger:
            record = self._running(session)
            state = accept_shares(record.state, question.deliveries)
            digest = state.header.digest()
            ledger.mask(session.job, session.phase, session.round, session.attempt, digest)
            sessions.save(record.model_copy(update={"state": state}))
        vector = self._masked(record.job, state, values)
        message = announce_vector(state, self._home.identity(), vector)
        return add_vector(pack_record(message), vector)

    def _noised_result(self, record: SessionRecord, task: Task) -> Mapping[str, Tensor]:
        """Return the round's noised tensors, trained now or stored before."""
        session, model = record.state.header.session, record.state.header.model
        if (task.job, task.round) != (record.job, session.round):
            raise ProtocolError("foreign", f"{session}: the task is of another job or round")
        if state_sha256(task.state) != model:
            raise ProtocolError("model", f"{session}: the model is not the one that was agreed on")
        if session.phase == "train":
            update = self.agent.noised_update(task)
            result, base = update.delta, update.model_sha256
        else:
            scores = self.agent.noised_scores(task)
            result, base = scores.totals, scores.model_sha256
        if base != model:
            message = f"{session}: the stored result is of another model than this attempt's"
            raise ProtocolError("model", message)
        return result

    def _masked(self, job: JobSpec, state: SiteState, values: Mapping[str, Tensor]) -> bytearray:
        phase = state.header.session.phase
        encoding = encoding_for(job, phase, state.roster)
        weight = weights(job, phase, state.roster)[state.site]
        return masked_vector(encoding, values, weight, rounding_key(state), masks(state))

    def _consistency(self, content: RecordDict) -> RecordDict:
        question = read_record(content, ConsistencyQuestion)
        sessions = self._home.sessions()
        with sessions.locked():
            record = self._running(question.session)
            identity = self._home.identity()
            state, message = confirm_survivors(record.state, identity, question.survivors)
            sessions.save(record.model_copy(update={"state": state}))
        return pack_record(message)

    def _unmask(self, content: RecordDict) -> RecordDict:
        question = read_record(content, UnmaskQuestion)
        session, sessions = question.session, self._home.sessions()
        with sessions.locked():
            kept = sessions.answer(session)
            if kept is not None:
                sessions.erase(session)  # unless a crash came before that
                return pack_record(UnmaskAnswer(unmasking=Unmasking.decode(kept)))
            record = self._running(session)
            identity = self._home.identity()
            state, message = reveal_shares(record.state, identity, question.confirmations)
            text = message.encode()
            with closing(self._home.open_ledger()) as ledger:
                _write_unmasked(ledger, state, hashlib.sha256(text.encode()).hexdigest())
            sessions.finish(session, text)
            next_keys = self._next_keys(record.job, session)
        return pack_record(UnmaskAnswer(unmasking=message, next_keys=next_keys))

    def _next_keys(self, job: JobSpec, session: Session) -> Keys | None:
        """Keys of what follows, to save an exchange; `update` asks the policy."""
        after = following(job, session)
        try:
            return None if after is None else self._offer(job, after)
        except (JobRefused, ProtocolError):
            return None  # asked for them, the site says why

    def _running(self, session: Session) -> SessionRecord:
        record = self._home.sessions().load(session)
        if record is None:
            raise ProtocolError("order", f"{session}: this site sent no keys for it, or it is over")
        if record.state.roster != summing_group(self._home, record.job):
            raise ProtocolError("roster", f"{session}: began with another roster than the site's")
        return record


def _task(content: RecordDict) -> Task:
    try:
        return Task.unpack(content)
    except FederationError as error:
        raise ProtocolError("malformed", str(error)) from error


def summing_group(home: SiteHome, job: JobSpec) -> Roster:
    """Return the sites that ``job`` sums together with this one, by the site's own roster.

    Raises:
        JobRefused: the job sums nothing securely, there is no usable roster or it has another key
            of this site, or fewer sites than the policy asks for open a sum.
    """
    if job.aggregation == "plain_with_local_dp":
        message = f"job {job.name} aggregates by {job.aggregation}: it sums nothing securely"
        raise JobRefused("aggregation", "aggregation", message)
    try:
        group = group_of(job, home.roster(), home.policy.site)
    except ConfigurationError as error:
        raise JobRefused("aggregation", "roster", str(error)) from error
    if group.sites[home.policy.site] != home.identity().public_key:
        message = f"roster {home.policy.roster} has another key of this site: see its public key "
        message += "in `fedcmr site roster`"
        raise JobRefused("aggregation", "roster", message)
    least = home.policy.minimum_sites
    if group.threshold < least:
        message = f"{group.threshold} sites would open the sum; the policy asks for {least}"
        raise JobRefused("minimum-sites", "minimum_sites", message)
    return group


def _state(ledger: Ledger, session: Session) -> JobState | None:
    return ledger.budget.jobs.get(session.job)


def _require_new(ledger: Ledger, session: Session) -> None:
    state, place = _state(ledger, session), (session.phase, session.round)
    if state is None:
        return
    if place in state.unmasked:
        raise ProtocolError("repeated", f"{session}: an unmasking share of this round left before")
    if session.attempt <= state.masked.get(place, 0):
        raise ProtocolError("repeated", f"{session}: a vector of this or a later attempt left")


def _write_unmasked(ledger: Ledger, state: SiteState, answer: str) -> None:
    """Write the entry, unless a crash came between it and the answer, which is the same again."""
    session = state.header.session
    job = _state(ledger, session)
    written = None if job is None else job.unmasked.get((session.phase, session.round))
    if written is not None and (written.attempt, written.answer) == (session.attempt, answer):
        return
    ledger.unmask(
        session.job, session.phase, session.round, session.attempt, state.survivors, answer
    )
