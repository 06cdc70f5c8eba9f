"""What a trainer has to know of a family of networks."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol, TypeVar

import numpy as np
from torch import nn

from fedcmr_client.dataset import Cohort
from fedcmr_shared.privacy.mechanism import Loss

Example = TypeVar("Example")


class Objective(Protocol[Example]):
    """Examples of patients, and the loss of an example, which depends on no other example."""

    def draw(self, cohort: Cohort, patient: str, generator: np.random.Generator) -> list[Example]:
        """Return the examples of one patient for one step.

        Raises:
            ConfigurationError: the job does not fit the patient's scans.
            DataError: the patient's scans are damaged or of no use.
            LedgerError: what is kept of the patient between steps cannot be read or written.
        """

    def loss_of(self, module: nn.Module) -> Loss[Example]:
        """Return the loss under ``module``, which may be a wrapper around the network."""

    def synthetic(self) -> Sequence[Example]:
        """Return two or more random examples in float64, without any patient."""

    def shape_of(self, example: Example) -> Hashable:
        """Return what examples must share to be in one batch."""
