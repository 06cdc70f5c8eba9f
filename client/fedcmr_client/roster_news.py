"""The roster's history as the coordinator shows it, kept beside the kit.

Fetching believes nothing: a version counts once somebody has accepted its fingerprint, and then
the file that the policy names holds it. A history may only grow, so a coordinator cannot show this
site one past today and another one tomorrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pydantic import TypeAdapter, ValidationError

from fedcmr_client.ledger.place import write_durably
from fedcmr_shared.errors import ConfigurationError, FederationError
from fedcmr_shared.identity.roster import Roster, read_roster, roster_text
from fedcmr_shared.identity.roster_history import RosterVersion, verify_history
from fedcmr_shared.schemas.problems import problems

if TYPE_CHECKING:
    from fedcmr_client.site_home import SiteHome

_VERSIONS: Final = TypeAdapter(tuple[RosterVersion, ...])


@dataclass(frozen=True)
class RosterNews:
    """What a site knows about the federation's roster."""

    home: SiteHome

    @property
    def history(self) -> tuple[RosterVersion, ...]:
        """All versions that were fetched, the first first; empty before.

        Raises:
            ConfigurationError: the file is damaged.
        """
        try:
            return _VERSIONS.validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise ConfigurationError(f"{self._path} cannot be read: {error.strerror}") from error
        except ValidationError as error:
            raise ConfigurationError(
                f"{self._path}: {problems(error)}: remove it and fetch again"
            ) from error

    @property
    def newest(self) -> RosterVersion | None:
        """The newest version that was fetched, or None."""
        return self.history[-1] if self.history else None

    @property
    def accepted(self) -> Roster | None:
        """The roster that this site goes by, or None; ConfigurationError when it is damaged."""
        path = self.home.policy.roster
        return read_roster(path) if path is not None and path.exists() else None

    @property
    def waiting(self) -> RosterVersion | None:
        """A version that nobody has accepted here yet, or None."""
        newest, accepted = self.newest, self.accepted
        if newest is None or (accepted is not None and newest.roster.sha256 == accepted.sha256):
            return None
        return newest

    def take(self, history: Sequence[RosterVersion]) -> None:
        """Check and keep what the coordinator shows now.

        Raises:
            ConfigurationError: it is no signed chain.
            FederationError: it is another chain than before.
        """
        _, coordinator_key = self.home.membership.pinned
        verify_history(history, coordinator_key)
        known = self.history
        if tuple(history[: len(known)]) != known:
            raise FederationError(
                f"the coordinator shows another history of the roster than before: compare "
                f"{self._path} with the other sites, and accept nothing until that is explained"
            )
        if len(history) == len(known):
            return
        try:
            write_durably(self._path, _VERSIONS.dump_json(tuple(history), indent=1))
        except OSError as error:
            raise ConfigurationError(
                f"{self._path}: cannot be written: {error.strerror}"
            ) from error

    def accept(self, version: RosterVersion) -> Path:
        """Write the roster of ``version`` into the file that the policy names; return the file.

        Raises:
            ConfigurationError: the policy names none, the roster has not this site's own key, or
                the file cannot be written.
        """
        home = self.home
        if home.policy.roster is None:
            raise ConfigurationError(
                f"policy {home.path} names no roster: write the line `roster: roster.yaml` into it "
                "and accept again"
            )
        key = home.identity().public_key
        if version.roster.sites.get(home.policy.site) != key:
            raise ConfigurationError(
                f"version {version.number} does not list this site as it is: the line must read "
                f"{home.policy.site}: {key}; tell the coordinator"
            )
        try:
            write_durably(home.policy.roster, roster_text(version.roster).encode())
        except OSError as error:
            message = f"{home.policy.roster} cannot be written: {error.strerror}"
            raise ConfigurationError(message) from error
        return home.policy.roster

    @property
    def _path(self) -> Path:
        return self.home.membership.folder / "roster_history.json"
