"""Several processes and several jobs on one ledger, in SQLite and in PostgreSQL."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fedcmr_client.ledger import Ledger, LedgerPlace
from fedcmr_shared.errors import JobRefused, LedgerError
from fedcmr_shared.privacy.budget import replay
from fedcmr_shared.privacy.merkle import MerkleTree, leaf_hash
from fedcmr_shared.schemas.job import JobSpec, TrainingSpec
from fedcmr_shared.schemas.ledger import Checkpoint, Started
from fedcmr_shared.schemas.privacy import PrivacySpec

if TYPE_CHECKING:
    from conftest import LedgerSite

SECRET = b"n" * 32


def a_job(name: str) -> JobSpec:
    privacy = PrivacySpec(noise_multiplier=1.0, spare_rounds=4)
    return JobSpec(name=name, rounds=8, training=TrainingSpec(local_steps=1), privacy=privacy)


def work(folder: Path, second_place: Path, url: str, name: str) -> dict[str, object]:
    """Admit a job and start its rounds while others do the same; return what happened."""
    place = LedgerPlace(folder, second_place, url or None)
    job = a_job(name)
    attempts = []
    with Ledger.open(place, secret=SECRET) as ledger:
        wait_for_the_other(folder.parent, name)
        ledger.admit(job, policy_sha256="0" * 64, training=["p-1"], evaluation=["p-2"])
        for number in range(1, 9):
            attempts.append(ledger.start(job.sha256, "train", number))
            time.sleep(0.03)  # the training
            ledger.store(job.sha256, "train", number, attempts[-1], name.encode())
            ledger.refuse("9" * 64, "declined", f"{name}-{number}")
        head = ledger.checkpoint()
    return {"name": name, "attempts": attempts, "checkpoint": head.model_dump(mode="json")}


def wait_for_the_other(folder: Path, name: str) -> None:
    (folder / f"ready-{name}").touch()
    while len([*folder.glob("ready-*")]) < 2:
        time.sleep(0.005)


def run_at_once(place: LedgerPlace, names: list[str]) -> list[dict[str, object]]:
    arguments = [str(place.folder), str(place.second_place), place.database_url or ""]
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, *arguments, name],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in names
    ]
    results = []
    for worker in workers:
        out, problems = worker.communicate(timeout=240)
        assert worker.returncode == 0, problems
        results.append(json.loads(out))
    return results


@pytest.fixture
def site(new_site: LedgerSite, new_database: Callable[[], str], tmp_path: Path) -> LedgerSite:
    """A site whose ledger lies in a database of its own, SQLite or PostgreSQL."""
    site = type(new_site)(tmp_path / "shared", database_url=new_database())
    site.clock = None  # the processes share the machine's clock
    with Ledger.create(site.place, site="north", secret=SECRET, epsilon=8.0, delta=1e-5):
        return site


def verify(place: LedgerPlace) -> Ledger:
    """Open the ledger, check that one chain of heads covers all of it, and return it."""
    ledger = Ledger.open(place, secret=SECRET)
    leaves = ledger.leaves()
    head = Checkpoint.model_validate_json(place.second_place.read_bytes())
    tree = MerkleTree(leaf_hash(leaf.content()) for leaf in leaves)
    assert (head.size, head.root) == (tree.size, tree.root().hex())
    assert ledger.budget == replay(leaf.entry for leaf in leaves)
    return ledger


def test_two_processes_append_to_one_log(site: LedgerSite) -> None:
    first, second = run_at_once(site.place, ["one", "two"])
    assert first["attempts"] == second["attempts"] == [1] * 8
    # The clock alone decides about checkpoints: both processes got the same.
    assert first["checkpoint"] == second["checkpoint"]
    with verify(site.place) as ledger:
        jobs = ledger.budget.jobs
        assert {state.admitted.name for state in jobs.values()} == {"one", "two"}
        for job, state in jobs.items():
            assert state.starts == {"train": 8}
            path = ledger.stored(job, "train", 8)
            assert path is not None
            assert path.read_text() == state.admitted.name
        leaves = ledger.leaves()
    kinds = Counter(leaf.entry.kind for leaf in leaves)
    del kinds["padding"]
    assert kinds == {"opened": 1, "admitted": 2, "started": 16, "stored": 16, "refused": 16}
    head = Checkpoint.model_validate(first["checkpoint"])
    tree = MerkleTree(leaf_hash(leaf.content()) for leaf in leaves)
    assert (head.size, head.root) == (128, tree.root(128).hex())
    # They did take turns.
    owners = [leaf.entry.job for leaf in leaves if isinstance(leaf.entry, Started)]
    assert sum(a != b for a, b in pairwise(owners)) > 1


def test_two_jobs_at_once_share_one_budget(site: LedgerSite) -> None:
    with (
        Ledger.open(site.place, secret=SECRET) as mine,
        Ledger.open(site.place, secret=SECRET) as yours,
    ):
        admitted = 0
        refused = None
        while refused is None:
            ledger = (mine, yours)[admitted % 2]
            job = a_job(f"job-{admitted}")
            try:
                ledger.admit(job, policy_sha256="0" * 64, training=["p-1"], evaluation=[])
                admitted += 1
            except JobRefused as refusal:
                refused = refusal
        assert admitted > 2
        assert refused.rule == "budget"
        for ledger in (mine, yours):
            assert ledger.spending().committed_rdp <= ledger.limit_rdp
            with pytest.raises(JobRefused):
                ledger.admit(
                    a_job("another"), policy_sha256="0" * 64, training=["p-1"], evaluation=[]
                )


def test_each_process_sees_what_the_other_wrote(site: LedgerSite) -> None:
    with (
        Ledger.open(site.place, secret=SECRET) as mine,
        Ledger.open(site.place, secret=SECRET) as yours,
    ):
        job = a_job("one")
        mine.admit(job, policy_sha256="0" * 64, training=["p-1"], evaluation=["p-2"])
        assert yours.start(job.sha256, "train", 1) == 1
        assert mine.start(job.sha256, "train", 1) == 2
        yours.store(job.sha256, "train", 1, 1, b"slow but first")
        with pytest.raises(LedgerError, match="is stored already"):
            mine.store(job.sha256, "train", 1, 2, b"too late")
        path = mine.stored(job.sha256, "train", 1)
        assert path is not None
        assert path.read_bytes() == b"slow but first"
        yours.withdraw("p-1")
        assert mine.cohort(job.sha256, "train") == frozenset()
        mine.finish(job.sha256, "finished")
        with pytest.raises(JobRefused, match="is over"):
            yours.start(job.sha256, "train", 2)
    verify(site.place).close()


def test_a_database_without_a_ledger_is_refused(site: LedgerSite, tmp_path: Path) -> None:
    place = site.place
    with Ledger.open(place, secret=SECRET) as ledger:
        connection = ledger._log.engine.connect()
        with connection, connection.begin():
            for table in ("entries", "heads", "checkpoints", "cohorts"):
                connection.exec_driver_sql(f"DROP TABLE ledger_{table}")
    with pytest.raises(LedgerError, match="holds no ledger: restore it from backup"):
        Ledger.open(place, secret=SECRET)


def test_a_second_ledger_in_the_same_database_is_refused(site: LedgerSite) -> None:
    south = type(site)(site.place.folder.parent, "south", site.place.database_url)
    with pytest.raises(LedgerError, match="made with another key"):
        Ledger.create(south.place, site="south", secret=b"s" * 32, epsilon=8.0, delta=1e-5)
    verify(site.place).close()


def test_backup_is_left_to_postgresql(
    new_site: LedgerSite, create_database: Callable[[], str], postgresql: str, tmp_path: Path
) -> None:
    url = f"postgresql+psycopg://fedcmr@/{create_database()}?host={postgresql}"
    place = LedgerPlace(new_site.place.folder, new_site.place.second_place, url)
    with new_site.create(place) as ledger, pytest.raises(LedgerError, match="with pg_dump"):
        ledger.backup(tmp_path / "backup")


def test_a_server_that_is_down_is_named(new_site: LedgerSite, tmp_path: Path) -> None:
    url = f"postgresql+psycopg://fedcmr@/site?host={tmp_path}"
    place = LedgerPlace(new_site.place.folder, new_site.place.second_place, url)
    with pytest.raises(LedgerError, match=r"connection .* failed"):
        new_site.create(place)
    assert not place.second_place.exists()


if __name__ == "__main__":
    print(json.dumps(work(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4])))
