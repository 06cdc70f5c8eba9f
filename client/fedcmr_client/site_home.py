"""A site's policy together with the ledger and the store that it names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from fedcmr_client.policy import load_policy
from fedcmr_client.store.pseudonyms import keyed_hash, read_secret
from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.identity.keys import SiteKey
from fedcmr_shared.identity.roster import Roster, read_roster
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.policy import SitePolicy

if TYPE_CHECKING:
    from fedcmr_client.latents import LatentCache
    from fedcmr_client.ledger import Ledger, LedgerPlace
    from fedcmr_client.membership import Membership
    from fedcmr_client.pauses import PauseSwitch
    from fedcmr_client.secure_sessions import SessionStore
    from fedcmr_client.store.site_store import SiteStore

_HOUR_MS: Final = 3_600_000


@dataclass(frozen=True)
class SiteHome:
    """What the site's commands and its agent work with; ``path`` is the policy file."""

    policy: SitePolicy
    path: Path

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read the policy at ``path``; ConfigurationError when it is wrong."""
        return cls(load_policy(path), path)

    def create_ledger(self) -> Ledger:
        """Make the site's ledger with the policy's budget and the store's secret.

        Raises:
            DataError: the store has no secret.
            LedgerError: there is a ledger already, or it cannot be written.
        """
        from fedcmr_client.ledger import CheckpointSchedule, Ledger

        budget, places = self.policy.budget, self.policy.ledger
        return Ledger.create(
            self._place(),
            site=self.policy.site,
            secret=self._secret(),
            epsilon=budget.epsilon,
            delta=budget.delta,
            order=budget.order,
            schedule=CheckpointSchedule(
                every_s=3600 * places.checkpoint_hours, leaves=places.checkpoint_entries
            ),
        )

    def open_ledger(self) -> Ledger:
        """Open the ledger with the store's secret.

        Raises:
            DataError: the store has no secret.
            LedgerError: the ledger cannot be trusted or read.
            ConfigurationError: it was made for another site or with another budget.
        """
        from fedcmr_client.ledger import Ledger

        ledger = Ledger.open(self._place(), secret=self._secret())
        try:
            self._compare(ledger)
        except ConfigurationError:
            ledger.close()
            raise
        return ledger

    def restore_second_place(self) -> None:
        """Write a lost second place anew, for a ledger that is surely the newest.

        Raises:
            DataError: the store has no secret.
            LedgerError: the second place is there, or the ledger cannot be trusted.
        """
        from fedcmr_client.ledger import Ledger

        Ledger.restore_second_place(self._place(), secret=self._secret())

    def open_store(self) -> SiteStore:
        """Open the site store; DataError when it is absent or damaged."""
        from fedcmr_client.store.site_store import SiteStore

        return SiteStore.open(self.policy.store)

    def identity(self) -> SiteKey:
        """Read the site's signing key, which was made with its ledger; LedgerError if absent."""
        return SiteKey.load(self._place().key)

    def roster(self) -> Roster:
        """Read the roster that the policy names.

        Raises:
            ConfigurationError: the policy names none, or it cannot be used.
        """
        if self.policy.roster is None:
            raise ConfigurationError(
                f"policy {self.path}: secure aggregation needs the federation's sites and keys: "
                "name the file in roster"
            )
        return read_roster(self.policy.roster)

    @property
    def folder(self) -> Path:
        """The policy's folder, which holds the site's other files, too."""
        return self.path.absolute().parent

    @property
    def membership(self) -> Membership:
        """This site's place in its federation: the folder ``federation`` beside the policy."""
        from fedcmr_client.membership import FOLDER, Membership

        return Membership(self.folder / FOLDER)

    @property
    def run(self) -> Path:
        """Folder of a running agent's sockets, lock and report."""
        return self.membership.folder / "run"

    @property
    def pause(self) -> PauseSwitch:
        """The operator's switch that makes this site wait."""
        from fedcmr_client.pauses import PauseSwitch

        return PauseSwitch(self.policy.ledger.folder / "paused.json")

    def sessions(self) -> SessionStore:
        """Return where this site keeps the secrets of running secure sums."""
        from fedcmr_client.secure_sessions import SessionStore

        folder = self.policy.ledger.folder / "sessions"
        return SessionStore(folder, self.identity().storage_key("secure sums"))

    def latents(self, job: JobSpec) -> LatentCache:
        """Return where this site keeps the latents of ``job``; DataError without a secret."""
        from fedcmr_client.latents import LatentCache

        key = keyed_hash(self._secret(), "latents", job.sha256)
        return LatentCache(self.latents_folder, job.sha256, key)

    @property
    def latents_folder(self) -> Path:
        """Folder of the latents of all jobs that run here."""
        return self.policy.ledger.folder / "latents"

    def _compare(self, ledger: Ledger) -> None:
        opened, policy = ledger.budget.opened, self.policy
        places = policy.ledger
        interval_ms = round(places.checkpoint_hours * _HOUR_MS)
        hours = opened.checkpoint_interval_ms / _HOUR_MS
        fixed: dict[str, tuple[object, object]] = {
            "site": (policy.site, opened.site),
            "budget.epsilon": (policy.budget.epsilon, opened.epsilon),
            "budget.delta": (policy.budget.delta, opened.delta),
            "budget.order": (policy.budget.order or opened.order, opened.order),
            "ledger.checkpoint_hours": (interval_ms / _HOUR_MS, hours),
            "ledger.checkpoint_entries": (places.checkpoint_entries, opened.checkpoint_leaves),
        }
        for field, (written, kept) in fixed.items():
            if written != kept:
                raise ConfigurationError(
                    f"policy {self.path}: {field} is {written}, but the ledger was made with "
                    f"{kept} and keeps it: write {kept}"
                )

    def _place(self) -> LedgerPlace:
        from fedcmr_client.ledger import LedgerPlace

        ledger = self.policy.ledger
        head = ledger.second_place / f"{self.policy.site}.head.json"
        return LedgerPlace(ledger.folder, head, ledger.database_url)

    def _secret(self) -> bytes:
        return read_secret(self.policy.store / "site.secret")
