"""Who takes part in a federation: the sites' names and public keys, pinned out of band.

A roster file is YAML::

    sites:
      alder: 4b1f…   # Ed25519 public key, 64 hexadecimal digits
      birch: 90ac…
      cedar: e27d…
    threshold: 3     # sites that open a sum together; more than two thirds, which is the default

Every site keeps its own copy, and nothing that a coordinator sends changes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.schemas.canonical import canonical_json
from fedcmr_shared.schemas.job import FEWEST_SITES
from fedcmr_shared.schemas.ledger import Hash
from fedcmr_shared.schemas.policy import SiteName
from fedcmr_shared.schemas.problems import problems

MOST_SITES: Final = 100


def least_threshold(sites: int) -> int:
    """Return the smallest whole number above two thirds of ``sites``.

    With t of n, two different sets of survivors can only both be confirmed when at least 2 t - n
    sites lie; above two thirds these are more than a third of all.
    """
    return 2 * sites // 3 + 1


class Roster(BaseModel):
    """Names and Ed25519 public keys of 3 to 100 sites, and how many of them open a sum."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sites: Annotated[dict[SiteName, Hash], Field(min_length=FEWEST_SITES, max_length=MOST_SITES)]
    threshold: int

    @model_validator(mode="before")
    @classmethod
    def _fill_threshold(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("threshold") is None:
            sites = values.get("sites")
            if isinstance(sites, dict):
                return {**values, "threshold": least_threshold(len(sites))}
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        count = len(self.sites)
        if len(set(self.sites.values())) < count:
            raise ValueError("two sites have the same key: each site has its own")
        least = least_threshold(count)
        if not least <= self.threshold <= count:
            raise ValueError(
                f"threshold is {self.threshold}: with {count} sites it must lie between {least}, "
                f"just above two thirds, and {count}"
            )
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all sites, sorted."""
        return tuple(sorted(self.sites))

    @property
    def sha256(self) -> str:
        """SHA-256 (hexadecimal) of the roster's canonical JSON."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json"))).hexdigest()

    @property
    def fingerprint(self) -> str:
        """`sha256` in groups of four digits, to be read out.

        All of it: whoever writes a roster could find two that agree in the first half.
        """
        digits = self.sha256
        return " ".join(digits[at : at + 4] for at in range(0, len(digits), 4))

    def index(self, site: str) -> int:
        """Return the place of ``site`` among the sorted names, from 1."""
        return self.names.index(site) + 1

    def subset(self, names: Collection[str]) -> Roster:
        """Return the roster of some of the sites, with a threshold of at least the same share.

        Raises:
            ConfigurationError: there are fewer than three, or one is not on this roster.
        """
        chosen = {name: self.sites[name] for name in names if name in self.sites}
        if len(chosen) < max(len(names), FEWEST_SITES):
            raise ConfigurationError(
                f"{', '.join(sorted(names))}: a group needs at least {FEWEST_SITES} sites of the "
                "roster"
            )
        count = len(chosen)
        share = -(-count * self.threshold // len(self.sites))  # rounded up
        return Roster(sites=chosen, threshold=max(least_threshold(count), share))


def new_roster(sites: Mapping[str, str]) -> Roster:
    """Return the roster of ``sites`` (public key by name) with the default threshold.

    Raises:
        ConfigurationError: they cannot form one.
    """
    try:
        return Roster(sites=dict(sites), threshold=least_threshold(len(sites)))
    except ValidationError as error:
        raise ConfigurationError(f"these sites form no roster: {problems(error)}") from error


def read_roster(path: Path) -> Roster:
    """Read a roster file.

    Raises:
        ConfigurationError: it is missing, no YAML, names a site twice, or is no roster; the
            message names the field.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _OneOfEach)
    except OSError as error:
        raise ConfigurationError(f"roster {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"roster {path} is not valid YAML: {error}") from error
    try:
        return Roster.model_validate(content)
    except ValidationError as error:
        raise ConfigurationError(f"roster {path}: {problems(error)}") from error


class _OneOfEach(yaml.SafeLoader):
    """Refuses a name that comes twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [name.value for name, _ in node.value]
        for at, name in enumerate(names):
            if name in names[:at]:
                raise yaml.constructor.ConstructorError(
                    problem=f"{name} is there twice", problem_mark=node.value[at][0].start_mark
                )
        return super().construct_mapping(node, deep)


def roster_text(roster: Roster) -> str:
    """Return the content of a roster file."""
    return str(yaml.safe_dump(roster.model_dump(mode="json"), sort_keys=True))
