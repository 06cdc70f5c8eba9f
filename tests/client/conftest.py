"""Fresh databases, and sites with a ledger."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
from databases import create_database, new_database, postgresql

from fedcmr_client.ledger import CheckpointSchedule, Ledger, LedgerPlace
from fedcmr_shared.schemas.job import JobSpec, TrainingSpec
from fedcmr_shared.schemas.privacy import EvaluationSpec, PrivacySpec

__all__ = ["create_database", "new_database", "postgresql"]


class Clock:
    """A clock that tests set; UTC milliseconds."""

    def __init__(self, now: int = 1_800_000_000_000) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now


class LedgerSite:
    """A site of six patients and two held-out ones, with places for a ledger and a clock."""

    ward = frozenset(f"p-{number}" for number in range(6))
    held_out = frozenset({"p-8", "p-9"})

    def __init__(self, folder: Path, name: str = "north", database_url: str | None = None) -> None:
        share = folder / "share"
        share.mkdir(parents=True, exist_ok=True)
        self.name = name
        self.secret = name[:1].encode() * 32
        self.clock = Clock()
        self.place = LedgerPlace(folder / name, share / f"{name}.head", database_url)
        self.ledger: Ledger

    def create(self, place: LedgerPlace | None = None, **changes: Any) -> Ledger:
        """Make the ledger, with a checkpoint over ten entries each hour unless changed."""
        values = {
            "site": self.name,
            "secret": self.secret,
            "epsilon": 8.0,
            "delta": 1e-5,
            "schedule": CheckpointSchedule(every_s=3600, leaves=10),
        }
        return Ledger.create(place or self.place, clock=self.clock, **(values | changes))

    def open(self, secret: bytes | None = None, place: LedgerPlace | None = None) -> Ledger:
        """Open the ledger as another process would."""
        return Ledger.open(place or self.place, secret=secret or self.secret, clock=self.clock)

    def job(self, name: str = "job", rounds: int = 2, noise: float = 2.0, **more: Any) -> JobSpec:
        """Return a job with one spare round that scores its last round under much noise."""
        settings = {
            "noise_multiplier": noise,
            "spare_rounds": 1,
            "evaluation": EvaluationSpec(noise_multiplier=50.0),
        }
        privacy = PrivacySpec.model_validate(settings | more)
        training = TrainingSpec(local_steps=10)
        return JobSpec(name=name, rounds=rounds, training=training, privacy=privacy)

    def admit(
        self,
        job: JobSpec | None = None,
        training: Collection[str] = ward,
        evaluation: Collection[str] = held_out,
    ) -> str:
        """Admit ``job``, by default the one of `job()`, and return its SHA-256."""
        job = job or self.job()
        self.ledger.admit(job, policy_sha256="0" * 64, training=training, evaluation=evaluation)
        return job.sha256

    def kinds(self, ledger: Ledger | None = None) -> list[str]:
        """Return the kinds of all entries."""
        return [leaf.entry.kind for leaf in (ledger or self.ledger).leaves()]


@pytest.fixture
def new_site(tmp_path: Path) -> LedgerSite:
    """A site that has no ledger yet."""
    return LedgerSite(tmp_path)


@pytest.fixture
def north(new_site: LedgerSite) -> Iterator[LedgerSite]:
    """A site with a ledger of one entry."""
    with new_site.create() as new_site.ledger:
        yield new_site
