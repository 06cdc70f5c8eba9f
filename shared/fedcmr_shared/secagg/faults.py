"""What can be wrong with a message of the protocol."""

from __future__ import annotations

from typing import Literal

from fedcmr_shared.errors import FederationError

Fault = Literal[
    "malformed",  # it cannot be read
    "order",  # another step is due
    "repeated",  # this step was answered before
    "foreign",  # it belongs to another job, round, attempt, roster, threshold or encoding
    "model",  # its sender works on another model
    "roster",  # its sender is not on the roster, or comes twice
    "signature",  # the roster's key did not sign it
    "keys",  # a public key is unusable or used twice
    "threshold",  # too few sites
    "share",  # a sealed or revealed share does not fit
    "survivors",  # the set of survivors is not one that may be opened
    "vector",  # the masked vector is not the signed one
    "silent",  # it never came
    "refused",  # its sender answered with a public code instead
]


class ProtocolError(FederationError):
    """A message is refused; nothing was changed by it."""

    def __init__(self, fault: Fault, message: str) -> None:
        super().__init__(message)
        self.fault = fault
