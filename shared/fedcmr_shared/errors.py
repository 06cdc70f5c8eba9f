"""The errors that a user can meet, as one small tree.

::

    FedcmrError            shown as one line; the command ends with exit code 1
    ├── ConfigurationError a setting, job or option is wrong
    ├── DataError          a file, scan or store is wrong
    │   └── AlreadyImported   the store holds these samples already
    ├── ModelError         a model, bundle or text encoder is wrong
    ├── FederationError    a run, round or message is wrong
    ├── ConnectionProblem  the coordinator cannot be reached, or not safely; carries a kind
    ├── LedgerError        a ledger, checkpoint, proof or evidence cannot be trusted
    └── JobRefused         a site's policy or budget does not allow a job; carries a public code

Each message names the file, field or setting and says what to do about it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from fedcmr_shared.schemas.refusals import RefusalCode

ProblemKind = Literal[
    "name-unknown",
    "refused",
    "timed-out",
    "unreachable",
    "proxy-unreachable",
    "proxy-refused",
    "proxy-credentials",
    "inspected",
    "wrong-host",
    "server-dates",
    "own-certificate",
    "clock",
    "rejected",
    "tls",
]
"""What stands between a member and the coordinator; ``inspected``: someone reads along."""


class FedcmrError(Exception):
    """Root of all errors that are meant for the user."""


class ConfigurationError(FedcmrError):
    """A setting, job or option cannot be used."""


class DataError(FedcmrError):
    """A file, scan or store cannot be used."""


class AlreadyImported(DataError):
    """The store already holds a scan with the same samples."""


class ModelError(FedcmrError):
    """A model, bundle or text encoder cannot be used."""


class FederationError(FedcmrError):
    """A run, round or message cannot be used."""


class ConnectionProblem(FedcmrError):
    """The coordinator cannot be reached, or not safely; ``kind`` says why in one word."""

    def __init__(self, kind: ProblemKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class LedgerError(FedcmrError):
    """A privacy ledger, checkpoint, proof or evidence bundle cannot be trusted or used."""


class JobRefused(FedcmrError):
    """A site does not take part in a job.

    ``code`` is public and all that the coordinator learns; ``rule`` names what the job broke and,
    like the message, stays at the site.
    """

    def __init__(self, code: RefusalCode, rule: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.rule = rule
