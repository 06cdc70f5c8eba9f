"""Public constants that bring phenotypes to about zero mean and unit deviation.

A scaler fitted to patients would be a release without noise, and another one at every site. The
constants are the public priors of :mod:`fedcmr_shared.metrics.phenotypes.table`; weights remember
for which names and constants they were trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedcmr_shared.errors import ConfigurationError, ModelError
from fedcmr_shared.metrics.phenotypes.table import NAMES, phenotype


@dataclass(frozen=True)
class Standardisation:
    """Names of a vector of phenotypes, with a public centre and spread of each in its unit.

    Raises:
        ConfigurationError: lengths differ, a name is twice there, or a spread is not positive.
    """

    names: tuple[str, ...]
    centres: tuple[float, ...]
    spreads: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.centres) == len(self.spreads) > 0:
            raise ConfigurationError(
                f"{len(self.names)} names, {len(self.centres)} centres and {len(self.spreads)} "
                "spreads of phenotypes: give one of each for every phenotype"
            )
        if len(set(self.names)) < len(self.names):
            raise ConfigurationError("names of phenotypes: give each name once")
        for name, spread in zip(self.names, self.spreads, strict=True):
            if not spread > 0:
                raise ConfigurationError(f"spread {spread} of {name} must be positive")

    @classmethod
    def of_priors(cls, names: tuple[str, ...] = NAMES) -> Standardisation:
        """Return the public priors' means and deviations of ``names``.

        Raises:
            DataError: there is no phenotype of such a name.
        """
        priors = [phenotype(name).prior for name in names]
        return cls(names, tuple(mean for mean, _ in priors), tuple(sd for _, sd in priors))

    def __len__(self) -> int:
        return len(self.names)

    @property
    def sha256(self) -> bytes:
        """Digest of names, order and constants."""
        rows = list(zip(self.names, self.centres, self.spreads, strict=True))
        return hashlib.sha256(json.dumps(rows).encode()).digest()

    def apply(self, values: Tensor) -> Tensor:
        """Return phenotypes ``[..., names]`` in their units as numbers without unit."""
        return (values - self._row(self.centres, values)) / self._row(self.spreads, values)

    def undo(self, standard: Tensor) -> Tensor:
        """Return numbers without unit ``[..., names]`` as phenotypes in their units."""
        return standard * self._row(self.spreads, standard) + self._row(self.centres, standard)

    def _row(self, constants: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(constants, dtype=like.dtype, device=like.device)


class PhenotypeScale(nn.Module):
    """Standardises a network's phenotypes; weights for other names or constants are refused."""

    public_constants: ClassVar[frozenset[str]] = frozenset({"digest"})
    digest: Tensor  # a buffer, which mypy cannot see

    def __init__(self, standardisation: Standardisation) -> None:
        super().__init__()
        self.standardisation = standardisation
        # On the CPU also where other tensors have no values yet.
        digest = torch.tensor(list(standardisation.sha256), dtype=torch.uint8, device="cpu")
        self.register_buffer("digest", digest)
        self.register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]  # torch does not
            _refuse_other_phenotypes  # annotate it
        )

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return standardised phenotypes and which are there; the others are zero.

        Args:
            values: ``[batch, names]`` in the phenotypes' units; not finite where missing.

        Raises:
            ModelError: the rows have another length.
        """
        names = self.standardisation.names
        if values.ndim != 2 or values.shape[1] != len(names):
            raise ModelError(
                f"phenotypes of shape {list(values.shape)}: give rows of {len(names)} values, "
                f"{names[0]} to {names[-1]} in the order of the model's names"
            )
        known = torch.isfinite(values)
        return torch.where(known, self.standardisation.apply(values), 0.0), known


def _refuse_other_phenotypes(
    module: PhenotypeScale, state: Mapping[str, Any], prefix: str, *_: object
) -> None:
    found = state.get(f"{prefix}digest")
    if found is not None and not torch.equal(found.cpu(), module.digest.cpu()):
        raise ModelError(
            f"{prefix}digest: the weights were trained with other phenotypes, another order or "
            "other constants: use those that they were trained with"
        )
