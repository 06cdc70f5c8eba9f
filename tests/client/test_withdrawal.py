"""A withdrawn patient is gone at once, for good, and wherever the machine stops in between."""

import io
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedcmr_client.site_home import SiteHome
from fedcmr_client.store.scan_file import ScanSource
from fedcmr_client.store.site_store import SiteStore
from fedcmr_client.store.split import SPLITS
from fedcmr_shared.cli import main
from fedcmr_shared.errors import DataError
from fedcmr_shared.schemas.acquisition import AcquisitionMetadata
from fedcmr_shared.schemas.job import CohortQuery, JobSpec
from fedcmr_shared.schemas.privacy import PrivacySpec

Run = Callable[..., tuple[int, str, str]]
SECRET = bytes(range(32))
METADATA = AcquisitionMetadata(
    origin="simulated",
    source_format="test",
    centre="Unusual Centre",
    frames=1,
    slices=1,
    coils=2,
    phase_encodes=4,
    readout_samples=5,
)


def scan(patient: str, seed: int) -> ScanSource:
    parts = np.random.default_rng(seed).standard_normal((2, 2, 4, 5))
    image = (parts[0] + 1j * parts[1]).astype(np.complex64)
    return ScanSource(patient, METADATA, lambda: iter([(0, 0, image)]), source=f"{patient}.mat")


@pytest.fixture
def store(tmp_path: Path) -> SiteStore:
    """Return a store with two scans of ann and one of bob."""
    store = SiteStore.create(tmp_path / "store", secret=SECRET)
    for patient, seed in (("ann", 0), ("ann", 1), ("bob", 2)):
        store.add(scan(patient, seed))
    return store


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs `fedcmr data` and gives exit code, output and errors."""
    monkeypatch.delenv("FEDCMR_POLICY", raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(["data", *map(str, arguments)])
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run


def files_of(root: Path, patient: str) -> list[Path]:
    return list((root / "scans" / patient).rglob("*"))


def rows_of(root: Path, patient: str) -> int:
    with sqlite3.connect(root / "catalogue.sqlite") as connection:
        query = "SELECT count(*) FROM scans WHERE patient = ?"
        count: int = connection.execute(query, (patient,)).fetchone()[0]
    connection.close()
    return count


def test_a_withdrawn_patient_is_in_no_list(store: SiteStore) -> None:
    ann, bob = store.pseudonym("ann"), store.pseudonym("bob")
    erased = store.scans_of(ann)[0]
    assert store.withdraw(ann) == 2
    assert store.patients() == [bob]
    assert {record.patient for record in store.scans()} == {bob}
    assert sum(store.split_counts().values()) == 1
    assert store.scans_of(ann) == []
    with pytest.raises(DataError, match="has no scan"):
        store.scan(erased.scan_id)
    admitted = [record for part in SPLITS for record in store.cohort(part, CohortQuery())]
    assert {record.patient for record in admitted} == {bob}
    assert store.verify() == []


def test_nothing_of_the_scans_is_left_in_the_store(store: SiteStore) -> None:
    records = store.scans_of(store.pseudonym("ann"))
    store.withdraw(store.pseudonym("bob"))
    catalogue = (store.root / "catalogue.sqlite").read_bytes()
    assert b"Unusual Centre" in catalogue
    assert all(record.digest.encode() in catalogue for record in records)
    store.withdraw(store.pseudonym("ann"))
    assert not any((store.root / "scans").iterdir())
    for path in store.root.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert b"Unusual Centre" not in content
        assert not any(record.digest.encode() in content for record in records)


@pytest.mark.parametrize("seed", [0, 7])
def test_a_withdrawn_patient_is_not_imported_again(store: SiteStore, seed: int) -> None:
    ann = store.pseudonym("ann")
    store.withdraw(ann)
    with pytest.raises(DataError, match=rf"ann\.mat: patient {ann} withdrew: leave their files"):
        store.add(scan(" ann", seed), consent=True)
    assert rows_of(store.root, ann) == 0
    assert files_of(store.root, ann) == []
    assert store.verify() == []
    store.add(scan("bob", 8))


def test_an_unknown_patient_cannot_withdraw(store: SiteStore) -> None:
    before = store.scans()
    for name in ("ann", "../store"):
        with pytest.raises(DataError, match=f"has no patient {name}: see .* --name"):
            store.withdraw(name)
    assert store.scans() == before


def test_files_that_come_back_are_named_and_can_be_erased(store: SiteStore) -> None:
    ann = store.pseudonym("ann")
    backup = store.root.parent / "backup"
    shutil.copytree(store.root / "scans", backup)
    store.withdraw(ann)
    shutil.copytree(backup, store.root / "scans", dirs_exist_ok=True)
    problems = store.verify()
    assert [problem.kind for problem in problems] == ["withdrawn", "withdrawn"]
    assert all(f"repeat `fedcmr data withdraw {ann}`" in problem.message for problem in problems)
    assert store.withdraw(ann) == 0
    assert store.verify() == []


def test_a_file_that_cannot_be_erased_is_named_and_erased_later(store: SiteStore) -> None:
    ann = store.pseudonym("ann")
    obstacle = store.root / "scans" / ann / "folder"
    obstacle.mkdir()
    with pytest.raises(DataError, match="cannot be erased"):
        store.withdraw(ann)
    # Nobody uses what is still there, and nobody overlooks it.
    assert ann not in store.patients()
    assert store.scans_of(ann) == []
    with pytest.raises(DataError, match="cannot be erased"):
        SiteStore.open(store.root)
    obstacle.rmdir()
    with SiteStore.open(store.root) as again:
        assert again.verify() == []
    assert (rows_of(store.root, ann), files_of(store.root, ann)) == (0, [])


# One child for each store; child number n dies before its step n: a statement, a commit, or the
# removal of a file or folder.
KILLED = """
    import os, signal, sys
    from sqlalchemy import Engine, event
    from fedcmr_client.store.site_store import SiteStore

    patient, *roots = sys.argv[1:]
    for number, root in enumerate(roots):
        child = os.fork()
        if child == 0:
            store, steps = SiteStore.open(root), iter(range(number, -1, -1))
            def step(*_):
                if next(steps) == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            event.listen(Engine, "before_cursor_execute", step)
            event.listen(Engine, "commit", step)
            sys.addaudithook(lambda name, _: step() if name in {"os.remove", "os.rmdir"} else None)
            store.withdraw(patient)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_withdrawal_killed_anywhere_is_undone_or_finished(
    store: SiteStore, tmp_path: Path
) -> None:
    ann, bob = store.pseudonym("ann"), store.pseudonym("bob")
    roots = [tmp_path / f"copy {number}" for number in range(12)]
    for root in roots:
        shutil.copytree(store.root, root)
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(KILLED), ann, *map(str, roots)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    codes = [int(line) for line in done.stdout.split()]
    killed = codes.count(-signal.SIGKILL)
    assert codes == [-signal.SIGKILL] * killed + [0] * (12 - killed)
    assert killed >= 8
    unchanged, cut_off = 0, 0
    for root in roots:
        rest = rows_of(root, ann), len(files_of(root, ann))
        with SiteStore.open(root) as again:
            assert again.verify() == []
            assert bob in again.patients()
            if ann in again.patients():
                assert rest == (2, 2)
                assert len(again.scans_of(ann)) == 2
                unchanged += 1
            else:
                cut_off += rest[0] > 0
                assert (rows_of(root, ann), files_of(root, ann)) == (0, [])
                with pytest.raises(DataError, match="withdrew"):
                    again.add(scan("ann", 5))
    # Before the mark is committed, between it and the last row, and the finished ones.
    assert 2 <= unchanged <= 4
    assert cut_off >= 4


def test_the_command_says_what_it_erased_and_cannot_undo(run: Run, store: SiteStore) -> None:
    ann = store.pseudonym("ann")
    code, out, _ = run("withdraw", ann, "--store", store.root, "--yes")
    assert code == 0
    assert f"{ann}: 2 scans erased" in out
    assert "No ledger was touched" in out
    for words in ("models already trained", "updates and scores", "backups"):
        assert words in out
    assert store.patients() == [store.pseudonym("bob")]
    code, out, _ = run("withdraw", "ann", "--name", "--store", store.root, "--yes", "--json")
    again = json.loads(out)
    assert (code, again["patient"], again["scans"], again["policy"]) == (0, ann, 0, None)
    assert len(again["not_undone"]) == 3


def test_the_command_asks_first(
    run: Run, store: SiteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = store.pseudonym("ann")
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    code, _, err = run("withdraw", ann, "--store", store.root)
    assert code == 1
    assert f"Erase 2 scans of {ann}? This cannot be undone" in err
    assert "not confirmed, nothing was changed" in err
    assert len(store.scans_of(ann)) == 2


def test_the_command_refuses_an_unknown_patient(run: Run, store: SiteStore) -> None:
    code, _, err = run("withdraw", "ann", "--store", store.root, "--yes")
    assert (code, "has no patient ann" in err) == (1, True)
    assert len(store.scans()) == 3


JOB = JobSpec(privacy=PrivacySpec(cohort_size=10, sampling_rate=0.1, noise_multiplier=2.0))


@pytest.fixture
def policy(store: SiteStore, tmp_path: Path) -> Path:
    """Return the policy of a site whose ledger has admitted a job on ann and bob."""
    path = tmp_path / "policy.yaml"
    (tmp_path / "second").mkdir()
    path.write_text("site: north\nstore: store\nledger: {folder: ledger, second_place: second}\n")
    with SiteHome.open(path).create_ledger() as ledger:
        people = [store.pseudonym("ann"), store.pseudonym("bob")]
        ledger.admit(JOB, policy_sha256="0" * 64, training=people, evaluation=[])
    return path


def test_the_ledger_keeps_the_charges_and_leaves_the_patient_out(
    run: Run, store: SiteStore, policy: Path
) -> None:
    ann, bob = store.pseudonym("ann"), store.pseudonym("bob")
    command = ("withdraw", ann, "--store", store.root, "--yes")
    # The first time it is found in the current folder.
    for place in ([], ["--policy", policy]):
        code, out, err = run(*command, *place)
        assert (code, err) == (0, "")
        assert "The ledger keeps the charges" in out
        with SiteHome.open(policy).open_ledger() as ledger:
            assert set(ledger.withdrawn([ann, bob])) == {ann}
            assert ledger.cohort(JOB.sha256, "train") == {bob}
            kinds = [leaf.entry.kind for leaf in ledger.leaves()]
            assert kinds.count("withdrawn") == 1
            assert "admitted" in kinds
    assert store.patients() == [bob]


@pytest.fixture
def latents(store: SiteStore, policy: Path) -> dict[str, list[Path]]:
    """Return the latents by patient that two jobs keep."""
    folders = [SiteHome.open(policy).latents_folder / job for job in ("1" * 64, "2" * 64)]
    files: dict[str, list[Path]] = {}
    for name in ("ann", "bob"):
        pseudonym = store.pseudonym(name)
        files[name] = [folder / f"{pseudonym}-{'0' * 32}.latents" for folder in folders]
        files[name].append(folders[0] / f".{pseudonym}-{'1' * 32}.latents.partial")
    for path in files["ann"] + files["bob"]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"sealed")
    return files


def test_latents_of_the_patient_are_erased_at_once(
    run: Run, store: SiteStore, policy: Path, latents: dict[str, list[Path]]
) -> None:
    command = ("withdraw", "ann", "--name", "--store", store.root, "--policy", policy, "--yes")
    code, out, _ = run(*command)
    assert (code, "Latents" in out) == (0, True)
    assert not any(path.exists() for path in latents["ann"])
    assert all(path.exists() for path in latents["bob"])
    latents["ann"][0].write_bytes(b"of a round that ran at that moment")
    assert run(*command)[0] == 0
    assert not latents["ann"][0].exists()


def test_one_file_that_cannot_be_erased_keeps_no_other(
    run: Run, store: SiteStore, policy: Path, latents: dict[str, list[Path]]
) -> None:
    ann = store.pseudonym("ann")
    command = ("withdraw", ann, "--store", store.root, "--policy", policy, "--yes")
    in_the_store = store.root / "scans" / ann / "folder"
    in_the_store.mkdir()
    code, _, err = run(*command)
    assert (code, "cannot be erased" in err, ann in err) == (1, True, True)
    assert not any(path.exists() for path in latents["ann"])
    in_the_store.rmdir()
    obstacle = latents["ann"][0]
    obstacle.mkdir()
    code, _, err = run(*command)
    assert (code, f"{obstacle}: cannot be erased" in err) == (1, True)
    assert files_of(store.root, ann) == []
    obstacle.rmdir()
    assert run(*command)[0] == 0


def test_a_ledger_that_cannot_be_opened_stops_the_withdrawal(
    run: Run, store: SiteStore, policy: Path
) -> None:
    (policy.parent / "ledger" / "ledger.sqlite").unlink()
    command = ("withdraw", "ann", "--name", "--store", store.root, "--policy", policy, "--yes")
    code, _, err = run(*command)
    assert code == 1
    assert err.startswith("error: ")
    assert len(store.scans()) == 3


def test_the_policy_of_another_store_is_refused(
    run: Run, store: SiteStore, policy: Path, tmp_path: Path
) -> None:
    with SiteStore.create(tmp_path / "other", secret=SECRET) as other:
        other.add(scan("ann", 0))
    command = ("withdraw", "ann", "--name", "--store", other.root, "--policy", policy, "--yes")
    code, _, err = run(*command)
    assert code == 1
    assert f"use the --store of the policy, {store.root}" in err
    assert len(other.scans()) == 1
