"""Real sites with policy, store and ledger for secure sums in memory, and attempts to open them.

The link between them and the coordinator's real protocol is `secure_federation.ProtocolLink`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import RecordDict
from secure_federation import ProtocolLink, ProtocolSite
from torch import Tensor

from fedcmr_client.agent import SiteAgent
from fedcmr_client.site_home import SiteHome
from fedcmr_server.secure_attempt import Attempt, Bounds, KeysAhead
from fedcmr_shared.errors import FedcmrError, JobRefused
from fedcmr_shared.federation.messages import Refusal, Task
from fedcmr_shared.federation.secure_messages import QUESTIONS, UpdateQuestion, read_record
from fedcmr_shared.identity.roster import Roster, new_roster, roster_text
from fedcmr_shared.privacy.accounting import best_order
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.ledger import Phase
from fedcmr_shared.schemas.signed_job import JobAuthorisation
from fedcmr_shared.secagg.faults import ProtocolError
from fedcmr_shared.secagg.layout import groups
from fedcmr_shared.secagg.messages import STEPS, Step
from fedcmr_shared.secagg.session import Session

SECURE: dict[str, Any] = {
    "aggregation": ["secure_sum"],
    "minimum_sites": 3,
    "budget": {"epsilon": 8.0, "delta": 1e-5, "order": best_order(8.0, 1e-5)},
}
"""Rules of a policy that lets results leave in a sum only; looks for the best order once."""


@dataclass
class Hospital:
    """A real site on a `ProtocolLink`; ``asked`` keeps the newest question of each step.

    ``pinned`` is that of its `SiteAgent`.
    """

    home: SiteHome
    pinned: tuple[str, str] | None = None
    asked: dict[tuple[Session, Step], RecordDict] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.home.policy.site

    def answer(self, step: Step, content: RecordDict) -> RecordDict:
        """Answer, or refuse by code, as `fedcmr_client.app` does."""
        self.asked[session_of(step, content), step] = content
        return self.reply(step, content)

    def reply(self, step: Step, content: RecordDict) -> RecordDict:
        try:
            return SiteAgent(self.home, pinned=self.pinned).secure_answer(step, content)
        except ProtocolError:
            return Refusal(self.name, "protocol").pack()
        except JobRefused as refusal:
            return Refusal(self.name, refusal.code).pack()
        except FedcmrError:
            return Refusal(self.name, "failed").pack()

    def entries(self) -> list[Any]:
        """Entries of the ledger without the first."""
        with closing(self.home.open_ledger()) as ledger:
            return [leaf.entry for leaf in ledger.leaves()][1:]

    def kinds(self) -> list[str]:
        return [entry.kind for entry in self.entries()]

    def kept(self) -> dict[str, bytes]:
        """Everything on disk that a refusal must leave alone: ledger, results and sessions."""
        ledger = self.home.policy.ledger
        return {
            str(path): path.read_bytes()
            for folder in (ledger.folder, ledger.second_place)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.name.endswith(("-shm", "-wal", ".lock"))
        }


class Peer(ProtocolSite):
    """A quick peer: does not read the model that comes with the question for its vector."""

    def answer(self, step: Step, content: RecordDict) -> RecordDict:
        if step != "update":
            return super().answer(step, content)
        question = read_record(content, UpdateQuestion)
        assert self.job is not None
        return self._update(question, Task(self.job, question.session.round, {}))


def session_of(step: Step, content: RecordDict) -> Session:
    return read_record(content, QUESTIONS[step]).session


def text_of(content: RecordDict) -> str:
    """Return the record of an answer, as it travels; a refusal's code when it is one."""
    if "secure" in content.config_records:
        return str(content.config_records["secure"]["json"])
    return f"refused: {content.config_records['header']['refusal']}"


@dataclass
class Federation:
    """Sites behind a link, their common roster and what they are asked to do, perhaps signed."""

    job: JobSpec
    link: ProtocolLink
    roster: Roster
    model: Mapping[str, Tensor]
    authorisation: JobAuthorisation | None = None

    def session(self, number: int = 1, attempt: int = 1, phase: Phase = "train") -> Session:
        return Session(job=self.job.sha256, phase=phase, round=number, attempt=attempt)

    def task(self, number: int = 1) -> Task:
        return Task(self.job, number, self.model, self.authorisation)

    def begin(self, session: Session) -> Attempt:
        bounds = Bounds(1, max(self.job.minimum_sites, self.roster.threshold))
        return Attempt(self.link, self.job, session, groups(self.job, self.roster), bounds)

    def run(
        self, session: Session, *, ahead: KeysAhead | None = None, before: Step | None = None
    ) -> Attempt:
        """Take an attempt through all steps, or through those before one."""
        attempt = self.begin(session)
        for step in STEPS:
            if step == before:
                break
            self.advance(attempt, step, ahead or KeysAhead())
        return attempt

    def advance(self, attempt: Attempt, step: Step, ahead: KeysAhead | None = None) -> None:
        """Take an attempt through one step."""
        nodes = self.link.connected(3, 0)
        task = self.task(attempt.session.round)
        ways: Mapping[Step, Callable[[], None]] = {
            "keys": lambda: attempt.keys(nodes, ahead or KeysAhead(), task),
            "shares": attempt.shares,
            "update": lambda: attempt.vectors(task),
            "consistency": attempt.confirm,
            "unmask": attempt.open,
        }
        ways[step]()


def write_roster(path: Path, sites: Mapping[str, str]) -> Roster:
    """Write the roster of ``sites``, public keys by name."""
    roster = new_roster(sites)
    path.write_text(roster_text(roster))
    return roster
