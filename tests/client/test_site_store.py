"""A site store keeps secrets, rows and files together; patients stay in their part."""

import hashlib
import hmac
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcmr_client.store.pseudonyms import fingerprint, pseudonym
from fedcmr_client.store.scan_file import ScanSource, Truth
from fedcmr_client.store.site_store import SiteStore
from fedcmr_client.store.split import SPLITS, SplitFractions, split_of, split_position
from fedcmr_shared.errors import AlreadyImported, ConfigurationError, DataError
from fedcmr_shared.schemas.acquisition import AcquisitionMetadata
from fedcmr_shared.schemas.job import CohortQuery

SECRET = bytes(range(32))
METADATA = AcquisitionMetadata(
    origin="simulated",
    source_format="test",
    frames=1,
    slices=2,
    coils=2,
    phase_encodes=4,
    readout_samples=5,
)


def scan(patient: str, seed: int) -> ScanSource:
    parts = np.random.default_rng(seed).standard_normal((2, 2, 2, 4, 5))
    samples = (parts[0] + 1j * parts[1]).astype(np.complex64)
    images = [(0, slice_, samples[slice_]) for slice_ in range(2)]
    return ScanSource(patient, METADATA, lambda: iter(images), source=f"{patient}.mat")


@pytest.fixture
def store(tmp_path: Path) -> SiteStore:
    return SiteStore.create(tmp_path / "store", secret=SECRET)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_pseudonym_is_the_keyed_hash_of_the_name() -> None:
    code = pseudonym(SECRET, "Ann Clear")
    expected = hmac.new(SECRET, b"patient:Ann Clear", hashlib.sha256).digest()
    value = int.from_bytes(expected[:16])
    alphabet = "abcdefghijklmnopqrstuvwxyz234567"
    assert code == "p-" + "".join(
        alphabet[(value << 2 >> shift) & 31] for shift in range(125, -1, -5)
    )


@settings(max_examples=50)
@given(name=st.text(min_size=1).filter(str.strip), space=st.sampled_from(["", " ", "\t\n"]))
def test_a_pseudonym_ignores_white_space_and_unicode_form(name: str, space: str) -> None:
    expected = pseudonym(SECRET, name)
    assert pseudonym(SECRET, f"{space}{name}{space}") == expected
    assert pseudonym(SECRET, unicodedata.normalize("NFD", name)) == expected
    assert pseudonym(bytes(32), name) != expected


def test_pseudonyms_take_names_that_are_not_valid_text() -> None:
    broken = os.fsdecode(b"M\xfcller")
    assert pseudonym(SECRET, broken) != pseudonym(SECRET, "Müller")


@pytest.mark.parametrize("name", ["", " \t"])
def test_an_empty_patient_name_is_refused(store: SiteStore, name: str) -> None:
    with pytest.raises(DataError, match="patient name is empty"):
        store.add(scan(name, 0))
    assert store.patients() == []


def test_the_clear_name_is_nowhere_in_the_store(store: SiteStore) -> None:
    record = store.add(scan("Ann Clear", 0))
    assert record.patient == pseudonym(SECRET, "Ann Clear")
    for path, content in contents(store.root).items():
        assert b"Ann" not in content
        assert "Ann" not in str(path.relative_to(store.root))


def test_only_the_owner_reads_the_secret(tmp_path: Path) -> None:
    first, second = (SiteStore.create(tmp_path / name) for name in ("a", "b"))
    secrets = [(store.root / "site.secret").read_bytes() for store in (first, second)]
    assert secrets[0] != secrets[1]
    assert [len(secret) for secret in secrets] == [32, 32]
    assert stat.S_IMODE((first.root / "site.secret").stat().st_mode) == 0o600
    assert stat.S_IMODE(first.root.stat().st_mode) == 0o700
    for path, content in contents(first.root).items():
        assert path.name == "site.secret" or secrets[0] not in content


@pytest.mark.parametrize("secret", [b"", b"short", bytes(33)])
def test_a_secret_of_another_length_is_refused(tmp_path: Path, secret: bytes) -> None:
    with pytest.raises(DataError, match="has 32 bytes"):
        SiteStore.create(tmp_path / "store", secret=secret)
    assert contents(tmp_path) == {}


def test_an_existing_secret_is_never_replaced(tmp_path: Path) -> None:
    root = tmp_path / "store"
    root.mkdir()
    (root / "site.secret").write_bytes(SECRET)
    with pytest.raises(DataError, match=r"site\.secret exists"):
        SiteStore.create(root)
    assert (root / "site.secret").read_bytes() == SECRET


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "site.secret").unlink(), "cannot read the site secret"),
        (lambda root: (root / "site.secret").write_bytes(SECRET[:31]), "has 31 bytes"),
        (lambda root: (root / "site.secret").write_bytes(bytes(32)), "made with another secret"),
        (lambda root: (root / "catalogue.sqlite").unlink(), "is missing: restore it"),
        (lambda root: (root / "catalogue.sqlite").write_bytes(b""), "holds no catalogue"),
        (lambda root: (root / "catalogue.sqlite").write_bytes(b"x" * 9999), "not a database"),
        (lambda root: (root / "site.toml").unlink(), "is not a site store"),
        (lambda root: (root / "site.toml").write_text('format = "2"'), "not the settings"),
        (lambda root: (root / "site.toml").write_text("format = "), "cannot be read"),
    ],
)
def test_a_damaged_store_is_refused(
    store: SiteStore, damage: Callable[[Path], object], message: str
) -> None:
    damage(store.root)
    with pytest.raises(DataError, match=message):
        SiteStore.open(store.root)


def test_folders_that_are_no_store_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DataError, match=r"is not a site store \(no site\.toml\)"):
            SiteStore.open(path)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be made"):
        SiteStore.create(tmp_path / "file")


def test_a_store_is_not_made_twice(store: SiteStore) -> None:
    before = contents(store.root)
    with pytest.raises(DataError, match="is a site store already"):
        SiteStore.create(store.root)
    assert contents(store.root) == before


def test_a_store_can_be_moved(store: SiteStore, tmp_path: Path) -> None:
    store.add(scan("ann", 0))
    store.root.rename(tmp_path / "moved")
    with SiteStore.open(tmp_path / "moved") as moved:
        assert moved.verify() == []


def test_an_unknown_scan_is_refused(store: SiteStore) -> None:
    with pytest.raises(DataError, match="has no scan 0123: see"):
        store.scan("0123")


def test_a_refused_scan_leaves_no_trace(store: SiteStore) -> None:
    before = contents(store.root)
    bad = replace(scan("ann", 0), truth=Truth({"LVEF_percent": float("inf")}))
    with pytest.raises(DataError, match="phenotype"):
        store.add(bad)
    assert contents(store.root) == before


def test_a_file_that_cannot_get_its_name_is_no_scan(store: SiteStore) -> None:
    patient = pseudonym(SECRET, "ann")
    (store.root / "scans" / patient).touch()
    with pytest.raises(DataError, match="cannot be made"):
        store.add(scan("ann", 0))
    assert store.scans() == []
    assert store.patients() == []


fractions = st.tuples(*[st.integers(0, 20)] * 3).filter(lambda parts: sum(parts) > 0)


@given(parts=fractions, position=st.floats(0, 1, exclude_max=True))
def test_a_part_without_share_is_empty(parts: tuple[int, int, int], position: float) -> None:
    shares = SplitFractions(*(part / sum(parts) for part in parts))
    assert getattr(shares, split_of(position, shares)) > 0


def test_positions_are_uniform_and_parts_get_their_shares() -> None:
    shares = SplitFractions(0.6, 0.1, 0.3)
    positions = [split_position(SECRET, f"p-{n}") for n in range(4000)]
    assert all(0 <= position < 1 for position in positions)
    counts = Counter(split_of(position, shares) for position in positions)
    for name in SPLITS:
        share = getattr(shares, name)
        assert abs(counts[name] / 4000 - share) < 4 * np.sqrt(share * (1 - share) / 4000)


def test_patients_keep_their_part_when_others_arrive(store: SiteStore) -> None:
    store.set_split(SplitFractions(0.5, 0.2, 0.3))
    for number in range(6):
        store.add(scan(f"patient {number}", number))
    before = {record.patient: record.split for record in store.scans()}
    for number in range(12):
        store.add(scan(f"patient {number}", 100 + number))
    after = {(record.patient, record.split) for record in store.scans()}
    assert before.items() <= after
    assert len(after) == len(store.patients()) == 12
    assert sum(store.split_counts().values()) == 12
    assert [len(store.patients(name)) for name in SPLITS] == list(store.split_counts().values())


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ((0.7, 0.1, 0.1), "add up to 0.9"),
        ((1.2, -0.1, -0.1), "train is 1.2"),
        ((float("nan"), 0.5, 0.5), "train is nan"),
    ],
)
def test_shares_that_are_no_shares_are_refused(
    shares: tuple[float, float, float], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SplitFractions(*shares)


def change_sample(path: Path) -> None:
    with h5py.File(path, "a") as file:
        file["kspace"][0, 1, 0, 0, 0] += 1


def change_metadata(path: Path) -> None:
    with h5py.File(path, "a") as file:
        changed = METADATA.model_copy(update={"vendor": "GE"})
        file.attrs["metadata"] = changed.model_dump_json()


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (change_sample, "corrupt", "do not match the digest"),
        (change_metadata, "corrupt", "differ from the catalogue"),
        (lambda path: path.write_bytes(b"junk"), "corrupt", "not a readable scan file"),
        (lambda path: path.unlink(), "missing", "is gone"),
    ],
)
def test_verify_names_damaged_and_missing_files(
    store: SiteStore, damage: Callable[[Path], object], kind: str, message: str
) -> None:
    record, _ = store.add(scan("ann", 0)), store.add(scan("bob", 1))
    damage(record.path)
    (problem,) = store.verify()
    assert (problem.kind, problem.path) == (kind, record.path)
    assert message in problem.message


def test_verify_names_a_swapped_file(store: SiteStore) -> None:
    first, second = store.add(scan("ann", 0)), store.add(scan("bob", 1))
    first.path.write_bytes(second.path.read_bytes())
    (problem,) = store.verify()
    assert (problem.kind, problem.path) == ("corrupt", first.path)


def test_an_orphan_is_named_and_adopted_by_its_import(store: SiteStore, tmp_path: Path) -> None:
    other = SiteStore.create(tmp_path / "other", secret=SECRET)
    record = other.add(scan("ann", 0))
    target = store.root / record.path.relative_to(other.root)
    target.parent.mkdir()
    record.path.rename(target)
    (problem,) = store.verify()
    assert (problem.kind, problem.path) == ("orphan", target)
    assert store.add(scan("ann", 0)).path == target
    assert store.verify() == []


KILLED = """
    import os, signal, sys
    import numpy as np
    from fedcmr_client.store.scan_file import ScanSource
    from fedcmr_client.store.site_store import SiteStore
    from fedcmr_shared.schemas.acquisition import AcquisitionMetadata

    def images():
        yield 0, 0, np.ones((2, 4, 5), np.complex64)
        os.kill(os.getpid(), signal.SIGKILL)

    metadata = AcquisitionMetadata(
        origin="simulated", source_format="test", frames=1, slices=2, coils=2,
        phase_encodes=4, readout_samples=5,
    )
    SiteStore.open(sys.argv[1]).add(ScanSource("ann", metadata, images))
"""


def test_a_killed_import_leaves_a_named_rest_and_can_be_repeated(store: SiteStore) -> None:
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(store.root)]
    result = subprocess.run(command, check=False)
    assert result.returncode == -signal.SIGKILL
    assert store.scans() == []
    (problem,) = store.verify()
    assert problem.kind == "partial"
    problem.path.unlink()
    store.add(scan("ann", 0))
    assert store.verify() == []


def test_a_store_survives_an_import_that_is_interrupted(store: SiteStore) -> None:
    def images() -> Iterator[tuple[int, int, np.ndarray]]:
        yield 0, 0, np.ones((2, 4, 5), np.complex64)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.add(replace(scan("ann", 0), images=images))
    assert store.verify() == []
    assert store.scans() == []


def test_a_fingerprint_tells_secrets_apart_without_holding_them() -> None:
    assert fingerprint(SECRET) != fingerprint(bytes(32))
    assert SECRET.hex() not in fingerprint(SECRET)


def consents(store: SiteStore) -> dict[str, bool | None]:
    return {record.patient: record.consent for record in store.scans()}


def test_consent_is_unknown_until_somebody_says_so(store: SiteStore) -> None:
    ann, bob = (store.add(scan(name, n)).patient for n, name in enumerate(("ann", "bob")))
    assert consents(store) == {ann: None, bob: None}
    store.set_consent([ann, bob, ann], given=True)
    store.set_consent([bob], given=False)
    assert consents(store) == {ann: True, bob: False}
    store.set_consent([], given=True)
    with SiteStore.open(store.root) as again:
        assert consents(again) == {ann: True, bob: False}


def test_consent_of_an_unknown_patient_changes_nobodys(store: SiteStore) -> None:
    ann, bob = (store.add(scan(name, n)).patient for n, name in enumerate(("ann", "bob")))
    store.withdraw(bob)
    for wrong in ("ann", bob):
        with pytest.raises(DataError, match=f"has no patient {wrong}: see"):
            store.set_consent([ann, wrong], given=True)
    assert consents(store) == {ann: None}


@pytest.mark.parametrize(
    ("before", "said", "after"),
    [
        (None, True, True),
        (None, False, False),
        (True, None, True),
        (True, False, False),
        (False, None, False),
        (False, True, False),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_an_import_never_lifts_a_refusal(
    store: SiteStore, seed: int, before: bool | None, said: bool | None, after: bool | None
) -> None:
    ann = store.add(scan("ann", 0), consent=before).patient
    assert consents(store) == {ann: before}
    if seed == 0:
        with pytest.raises(AlreadyImported):
            store.add(scan("ann", seed), consent=said)
    else:
        store.add(scan("ann", seed), consent=said)
    assert consents(store) == {ann: after}


def test_consent_of_many_patients_is_set_at_once(store: SiteStore) -> None:
    names = [f"p-{number:05}" for number in range(40_000)]
    with sqlite3.connect(store.root / "catalogue.sqlite") as connection:
        rows = [(name,) for name in names]
        connection.executemany("INSERT INTO patients (pseudonym) VALUES (?)", rows)
    connection.close()
    store.set_consent(names[1:], given=True)
    with sqlite3.connect(store.root / "catalogue.sqlite") as connection:
        query = "SELECT consent, count(*) FROM patients GROUP BY consent ORDER BY consent"
        assert connection.execute(query).fetchall() == [(None, 1), (1, 39_999)]
    connection.close()


PEOPLE: dict[str, dict[str, Any]] = {
    "full": {
        "modality": "cine",
        "view": "short-axis",
        "vendor": "GE",
        "acquired_on": date(2024, 5, 1),
    },
    "old": {"modality": "cine", "vendor": "Siemens", "acquired_on": date(2019, 1, 31)},
    "late": {"modality": "LGE", "view": "long-axis", "acquired_on": date(2024, 12, 31)},
    "bare": {},
}


@pytest.fixture
def people(store: SiteStore) -> SiteStore:
    """Return a store with the four patients of PEOPLE, all in the training part."""
    store.set_split(SplitFractions(1, 0, 0))
    for seed, (name, fields) in enumerate(PEOPLE.items()):
        metadata = METADATA.model_copy(update=fields)
        store.add(replace(scan(name, seed), metadata=metadata))
    return store


def cohort(store: SiteStore, query: dict[str, object], **limits: Any) -> set[str]:
    names = {store.pseudonym(name): name for name in PEOPLE}
    records = store.cohort("train", CohortQuery.model_validate(query), **limits)
    assert records == sorted(records, key=lambda record: (record.patient, record.scan_id))
    return {names[record.patient] for record in records}


@pytest.mark.parametrize(
    ("query", "limits", "expected"),
    [
        ({}, {}, {"full", "old", "late", "bare"}),
        ({"modalities": ["cine"]}, {}, {"full", "old"}),
        ({}, {"modalities": {"cine"}}, {"full", "old"}),
        ({"modalities": ["cine", "LGE"]}, {"modalities": ("LGE",)}, {"late"}),
        ({"modalities": ["cine"]}, {"modalities": ("LGE",)}, set()),
        ({}, {"modalities": ()}, set()),
        ({"views": ["short-axis"]}, {}, {"full"}),
        ({"vendors": ["Siemens", "GE"]}, {}, {"full", "old"}),
        ({"acquired_from": "2024-05-01"}, {}, {"full", "late"}),
        ({"acquired_from": "2024-05-02"}, {}, {"late"}),
        ({"acquired_until": "2024-05-01"}, {}, {"full", "old"}),
        ({"acquired_until": "2024-04-30"}, {}, {"old"}),
        ({}, {"acquired_from": date(2024, 5, 1)}, {"full", "late"}),
        ({}, {"acquired_until": date(2019, 1, 31)}, {"old"}),
        ({"acquired_from": "2019-01-01"}, {"acquired_from": date(2024, 1, 1)}, {"full", "late"}),
        ({"acquired_until": "2024-06-01"}, {"acquired_from": date(2024, 1, 1)}, {"full"}),
        ({"acquired_from": "2024-06-01"}, {"acquired_until": date(2024, 5, 31)}, set()),
    ],
)
def test_a_cohort_meets_the_query_and_the_limits(
    people: SiteStore, query: dict[str, object], limits: dict[str, Any], expected: set[str]
) -> None:
    assert cohort(people, query, **limits) == expected


def test_a_cohort_is_one_part(people: SiteStore) -> None:
    assert len(people.cohort("train", CohortQuery())) == 4
    assert people.cohort("validation", CohortQuery()) == []
    people.set_split(SplitFractions(0, 1, 0))
    assert people.cohort("train", CohortQuery()) == []


def test_a_cohort_respects_consent_and_withdrawal(people: SiteStore) -> None:
    full, old, late = (people.pseudonym(name) for name in ("full", "old", "late"))
    people.set_consent([full, late], given=True)
    people.set_consent([old], given=False)
    assert cohort(people, {}) == {"full", "late", "bare"}
    assert cohort(people, {}, require_consent=True) == {"full", "late"}
    people.withdraw(late)
    assert cohort(people, {}, require_consent=True) == {"full"}
