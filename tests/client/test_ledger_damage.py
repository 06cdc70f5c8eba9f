"""A site's ledger after damage, deceit and full disks: it refuses, says why, changes nothing."""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event

from fedcmr_client.ledger import Ledger, LedgerPlace, second_place
from fedcmr_client.ledger import ledger as ledger_module
from fedcmr_shared.errors import LedgerError
from fedcmr_shared.identity.keys import SiteKey
from fedcmr_shared.privacy.merkle import MerkleTree, leaf_hash
from fedcmr_shared.schemas.ledger import Checkpoint, Leaf, Padding

if TYPE_CHECKING:
    from conftest import LedgerSite

HOUR = 3_600_000  # milliseconds

# Results


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_result_is_named(north: LedgerSite, damage: str) -> None:
    job = north.admit()
    north.ledger.start(job, "train", 1)
    path = north.ledger.store(job, "train", 1, 1, b"update")
    if damage == "changed":
        path.write_bytes(b"updatf")
    else:
        path.unlink()
    with pytest.raises(LedgerError, match=r"train-1\.bin: .*restore it from backup"):
        north.ledger.stored(job, "train", 1)


def test_a_file_without_an_entry_is_written_over(north: LedgerSite) -> None:
    job = north.admit()
    north.ledger.start(job, "train", 1)
    path = north.place.result(job, "train", 1)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"cut off")
    assert north.ledger.stored(job, "train", 1) is None
    attempt = north.ledger.start(job, "train", 1)
    north.ledger.store(job, "train", 1, attempt, b"update")
    assert path.read_bytes() == b"update"


# Failing disks


def no_space(*_arguments: object, **_named: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_for_results_stores_nothing(
    north: LedgerSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = north.admit()
    north.ledger.start(job, "train", 1)
    before = north.ledger.head()
    with monkeypatch.context() as patch:
        patch.setattr(ledger_module, "write_durably", no_space)
        with pytest.raises(LedgerError, match=r"train-1\.bin: cannot be written: No space left"):
            north.ledger.store(job, "train", 1, 1, b"update")
    assert north.ledger.head() == before
    assert north.ledger.stored(job, "train", 1) is None
    north.ledger.store(job, "train", 1, 1, b"update")
    assert north.ledger.stored(job, "train", 1) is not None


def test_a_full_second_place_stops_training_and_the_charge_stays(
    north: LedgerSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = north.admit()
    with monkeypatch.context() as patch:
        patch.setattr(second_place, "write_durably", no_space)
        with pytest.raises(LedgerError, match=r"north\.head: No space left .*before training"):
            north.ledger.start(job, "train", 1)
        assert north.ledger.budget.jobs[job].starts == {"train": 1}
        # Trying on costs nothing more.
        for _ in range(3):
            with pytest.raises(LedgerError, match="No space left"):
                north.ledger.start(job, "train", 1)
        assert north.ledger.budget.jobs[job].starts == {"train": 1}
        north.open().close()
    assert north.ledger.start(job, "train", 1) == 2


def test_an_unreachable_second_place_changes_nothing(north: LedgerSite) -> None:
    job = north.admit()
    before = north.ledger.head()
    north.place.second_place.rename(north.place.second_place.with_name("away"))
    for call in (lambda: north.ledger.start(job, "train", 1), lambda: north.open()):
        with pytest.raises(LedgerError, match=r"north\.head: the ledger's newest head is missing"):
            call()
    assert north.ledger.head() == before
    north.place.second_place.with_name("away").rename(north.place.second_place)
    assert north.ledger.start(job, "train", 1) == 1


@pytest.mark.parametrize("pages", [0, 3])
def test_a_full_disk_for_the_database_changes_nothing(north: LedgerSite, pages: int) -> None:

    job = north.admit()
    before = north.ledger.head()
    database = north.place.folder / "ledger.sqlite"
    with closing(sqlite3.connect(database)) as connection:
        used = connection.execute("PRAGMA page_count").fetchone()[0]

    def limit(connection: Any, _record: object) -> None:
        # What SQLite raises then is what it raises on a full disk.
        connection.execute(f"PRAGMA max_page_count = {used + pages}")

    event.listen(north.ledger._log.engine, "connect", limit)
    north.clock.now += 100 * HOUR
    with pytest.raises(LedgerError, match="database or disk is full"):
        north.ledger.checkpoint()
    event.remove(north.ledger._log.engine, "connect", limit)
    assert north.ledger.head() == before
    with north.open() as again:
        assert again.start(job, "train", 1) == 1


# Damage and deceit


def change(north: LedgerSite, *statements: str) -> None:
    with closing(sqlite3.connect(north.place.folder / "ledger.sqlite")) as connection, connection:
        for statement in statements:
            assert connection.execute(statement).rowcount > 0, statement


@pytest.fixture
def used(north: LedgerSite) -> LedgerPlace:
    """A site with a closed ledger of ten entries: one round stored, one started, padding."""
    job = north.admit()
    north.ledger.start(job, "train", 1)
    north.ledger.store(job, "train", 1, 1, b"update")
    north.ledger.start(job, "train", 2)
    north.ledger.checkpoint()
    north.ledger.close()
    return north


@pytest.mark.parametrize(
    ("statements", "problem"),
    [
        (
            ["UPDATE ledger_entries SET leaf = replace(leaf, 'started', 'stored')"],
            "entry 2 of the ledger was changed",
        ),
        (
            ["UPDATE ledger_entries SET leaf_hash = 'ff' || substr(leaf_hash, 3) WHERE number = 2"],
            "entry 2 of the ledger was changed",
        ),
        (["DELETE FROM ledger_entries WHERE number = 3"], "entry 3 of the ledger is missing"),
        (["DELETE FROM ledger_entries WHERE number = 0"], "entry 0 of the ledger is missing"),
        (
            ["DELETE FROM ledger_entries WHERE number = 9"],
            "newest head covers 10 entries and the log has 9: entries were removed",
        ),
        (
            ["UPDATE ledger_heads SET root = 'ff' || substr(root, 3) WHERE size = 10"],
            "first 10 entries of the ledger do not have the signed root",
        ),
        (
            ["UPDATE ledger_heads SET root = 'ff' || substr(root, 3) WHERE size = 3"],
            "first 3 entries of the ledger do not have the signed root",
        ),
        (
            ["UPDATE ledger_heads SET signature = 'ff' || substr(signature, 3) WHERE size = 10"],
            "signature is not that of key",
        ),
        (["UPDATE ledger_heads SET at = at + 1 WHERE size = 10"], "signature is not that of key"),
        (["UPDATE ledger_heads SET signature = 'none'"], "a signed head was changed"),
        (["UPDATE ledger_checkpoints SET at = at + 1"], "signature is not that of key"),
        (
            ["UPDATE ledger_checkpoints SET root = 'ff' || substr(root, 3)"],
            "first 10 entries of the ledger do not have the signed root",
        ),
        (
            [
                "DELETE FROM ledger_entries WHERE number >= 4",
                "DELETE FROM ledger_heads WHERE size > 4",
                "DELETE FROM ledger_checkpoints",
            ],
            "keeps a head over 10 entries that this ledger of 4 entries does not have: an older",
        ),
        (["DELETE FROM ledger_heads"], "newest head covers 0 entries and the log has 10"),
        (
            ["DELETE FROM ledger_heads", "DELETE FROM ledger_entries"],
            "newest head covers 0 entries and the log has 0",
        ),
        (
            ["UPDATE ledger_cohorts SET members = members || char(10) || 'p-99'"],
            r"cohort .* its members were changed",
        ),
        (
            ["UPDATE ledger_cohorts SET members = replace(members, 'p-8', 'p-7')"],
            r"cohort .* its members were changed",
        ),
        (["DELETE FROM ledger_cohorts"], "cohorts of the ledger are missing or foreign"),
        (
            [f"INSERT INTO ledger_cohorts VALUES ('{'a' * 64}', 'p-1')"],
            "cohorts of the ledger are missing or foreign",
        ),
    ],
)
def test_a_tampered_ledger_is_refused(
    used: LedgerSite, statements: list[str], problem: str
) -> None:
    used.open().close()
    change(used, *statements)
    kept = (used.place.folder / "ledger.sqlite").read_bytes(), used.place.second_place.read_bytes()
    with pytest.raises(LedgerError, match=problem):
        used.open()
    assert kept == (
        (used.place.folder / "ledger.sqlite").read_bytes(),
        used.place.second_place.read_bytes(),
    )


def test_a_rewritten_leaf_with_its_hash_is_still_refused(used: LedgerSite) -> None:
    with closing(sqlite3.connect(used.place.folder / "ledger.sqlite")) as connection, connection:
        query = "SELECT leaf FROM ledger_entries WHERE number = 4"
        leaf = connection.execute(query).fetchone()[0].replace('"started"', '"padding"')
        values = (leaf, leaf_hash(leaf.encode()).hex())
        connection.execute(
            "UPDATE ledger_entries SET leaf = ?, leaf_hash = ? WHERE number = 4", values
        )
    # Its fields are those of a start, so that it is no padding either.
    with pytest.raises(LedgerError, match="entry 4 of the ledger cannot be read"):
        used.open()


def test_tampering_is_noticed_while_the_ledger_is_open(used: LedgerSite) -> None:
    with used.open() as used.ledger:
        change(used, "UPDATE ledger_cohorts SET members = members || char(10) || 'p-99'")
        with pytest.raises(LedgerError, match="members were changed"):
            used.ledger.cohort(used.job().sha256, "train")
        change(used, "DELETE FROM ledger_entries WHERE number = 9")
        change(used, "DELETE FROM ledger_heads WHERE size = 10")
        with pytest.raises(LedgerError, match="entries were removed"):
            used.ledger.start(used.job().sha256, "train", 2)


def test_entries_that_another_key_signed_are_refused_for_good(
    north: LedgerSite, tmp_path: Path
) -> None:
    job = north.admit()
    leaf = Leaf(entry=Padding(at=north.clock.now), salt="0" * 64).content()
    tree = MerkleTree(leaf_hash(leaf.content()) for leaf in north.ledger.leaves())
    tree.append(leaf_hash(leaf))
    unsigned = north.ledger.head().model_copy(update={"size": 3, "root": tree.root().hex()})
    forged = SiteKey.create(tmp_path / "another.key").sign(unsigned.signed_bytes())
    change(
        north,
        f"INSERT INTO ledger_entries VALUES (2, '{leaf.decode()}', '{leaf_hash(leaf).hex()}')",
        "INSERT INTO ledger_heads (size, at, root, signature) VALUES "
        f"(3, {unsigned.at}, '{unsigned.root}', '{forged}')",
    )
    for _ in range(2):
        with pytest.raises(LedgerError, match="signature is not that of key"):
            north.ledger.start(job, "train", 1)


def test_another_secret_is_refused(used: LedgerSite) -> None:
    with pytest.raises(LedgerError, match=r"another site secret: .*budgets would silently restart"):
        used.open(b"s" * 32)


def test_another_sites_key_or_head_is_refused(used: LedgerSite, tmp_path: Path) -> None:
    south = type(used)(tmp_path, "south")
    south.create().close()
    mixed = LedgerPlace(used.place.folder, south.place.second_place)
    with pytest.raises(LedgerError, match="does not have: the ledger was forked"):
        used.open(place=mixed)
    key = used.place.key.read_bytes()
    used.place.key.write_bytes(south.place.key.read_bytes())
    with pytest.raises(LedgerError, match="ledger of site north was made with another key"):
        used.open()
    used.place.key.unlink()
    with pytest.raises(LedgerError, match="cannot read the site's key"):
        used.open()
    used.place.key.write_bytes(key)
    with used.open() as ledger, pytest.raises(LedgerError, match="of north, not of south"):
        ledger.admit(
            used.job(), site="south", policy_sha256="0" * 64, training=["p-1"], evaluation=["p-8"]
        )


def test_a_whole_log_signed_by_another_key_is_refused(used: LedgerSite) -> None:
    used.place.key.unlink()
    SiteKey.create(used.place.key)
    with pytest.raises(LedgerError, match=r"restore ledger and site\.key from one backup"):
        used.open()


@pytest.mark.parametrize("content", [b"no database at all, only text" * 200, b""])
def test_an_unreadable_database_is_refused(used: LedgerSite, content: bytes) -> None:
    database = used.place.folder / "ledger.sqlite"
    database.write_bytes(content)
    problem = "file is not a database" if content else "holds no ledger: restore it from backup"
    with pytest.raises(LedgerError, match=problem):
        used.open()


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\x00", b'{"site": "north"}'])
def test_an_unreadable_second_place_is_refused(used: LedgerSite, content: bytes) -> None:
    used.place.second_place.write_bytes(content)
    with pytest.raises(LedgerError, match="does not hold a ledger's head"):
        used.open()


def test_a_second_place_behind_the_log_is_brought_up_by_the_next_entry(north: LedgerSite) -> None:
    older = north.place.second_place.read_bytes()
    job = north.admit()
    north.place.second_place.write_bytes(older)
    with north.open() as again:
        assert north.place.second_place.read_bytes() == older
        again.start(job, "train", 1)
        assert Checkpoint.model_validate_json(north.place.second_place.read_bytes()) == again.head()


def test_a_changed_head_in_the_second_place_is_refused(used: LedgerSite) -> None:
    head = Checkpoint.model_validate_json(used.place.second_place.read_bytes())
    wrong = head.model_copy(update={"root": "f" * 64})
    used.place.second_place.write_text(wrong.model_dump_json())
    with pytest.raises(LedgerError, match="does not have: the ledger was forked"):
        used.open()


# Backup and recovery


def restore(backup: Path, site: LedgerSite) -> None:
    shutil.rmtree(site.place.folder)
    shutil.copytree(backup, site.place.folder)


def test_a_current_backup_works(north: LedgerSite, tmp_path: Path) -> None:
    over, job = north.admit(north.job("over")), north.admit()
    for name in (over, job):
        north.ledger.start(name, "train", 1)
        north.ledger.store(name, "train", 1, 1, b"update")
    north.ledger.finish(over, "finished")
    north.ledger.backup(tmp_path / "backup")
    north.ledger.close()
    assert os.stat(tmp_path / "backup" / "site.key").st_mode & 0o777 == 0o600
    restore(tmp_path / "backup", north)
    with north.open() as again:
        assert again.budget == north.ledger.budget
        assert again.stored(job, "train", 1) is not None
        assert again.start(job, "train", 2) == 1
    assert not north.place.result(over, "train", 1).exists()


def test_an_old_backup_is_refused(north: LedgerSite, tmp_path: Path) -> None:
    job = north.admit()
    north.ledger.backup(tmp_path / "backup")
    north.ledger.start(job, "train", 1)
    north.ledger.close()
    restore(tmp_path / "backup", north)
    with pytest.raises(LedgerError, match="an older copy was restored, and charges would be lost"):
        north.open()


def test_an_old_copy_slipped_under_an_open_ledger_is_refused(
    north: LedgerSite, tmp_path: Path
) -> None:
    job = north.admit()
    north.ledger.backup(tmp_path / "backup")
    north.ledger.start(job, "train", 1)
    shutil.copy(tmp_path / "backup" / "ledger.sqlite", north.place.folder / "ledger.sqlite")
    with pytest.raises(LedgerError, match="covers 2 entries and the log has 3"):
        north.ledger.start(job, "train", 1)


def test_two_copies_with_one_second_place_cannot_both_go_on(
    north: LedgerSite, tmp_path: Path
) -> None:
    job = north.admit()
    north.ledger.backup(tmp_path / "clone")
    clone = LedgerPlace(tmp_path / "clone", north.place.second_place)
    with north.open(place=clone) as twin:
        assert twin.start(job, "train", 1) == 1
        before = north.ledger.head()
        with pytest.raises(LedgerError, match="does not have: an older copy"):
            north.ledger.start(job, "train", 1)
        assert north.ledger.head() == before


def test_a_backup_never_replaces_anything(north: LedgerSite, tmp_path: Path) -> None:
    (tmp_path / "backup").mkdir()
    with pytest.raises(LedgerError, match="backup exists: name a new folder"):
        north.ledger.backup(tmp_path / "backup")
    (tmp_path / "file").write_text("x")
    with pytest.raises(LedgerError, match=r"the backup failed: .*File exists"):
        north.ledger.backup(tmp_path / "file" / "backup")


def test_a_lost_second_place_is_made_anew_on_request(used: LedgerSite) -> None:
    with pytest.raises(LedgerError, match="head exists"):
        Ledger.restore_second_place(used.place, secret=used.secret)
    kept = used.place.second_place.read_bytes()
    used.place.second_place.unlink()
    with pytest.raises(LedgerError, match="another site secret"):
        Ledger.restore_second_place(used.place, secret=b"s" * 32)
    with pytest.raises(LedgerError, match="newest head is missing: mount"):
        used.open()
    Ledger.restore_second_place(used.place, secret=used.secret)
    assert used.place.second_place.read_bytes() == kept
    used.open().close()
