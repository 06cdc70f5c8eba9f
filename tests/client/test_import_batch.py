"""Importing whole folders into a real store."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest

from fedcmr_client.importers import IMPORTERS, ImportOptions, ImportSummary, import_path
from fedcmr_client.store.site_store import SiteStore
from fedcmr_shared.errors import ConfigurationError, DataError

COMPOUND = [("real", "<f4"), ("imag", "<f4")]
TREE = "Cine/TrainingSet/FullSample/Center001/Siemens_30T_Vida"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SiteStore]:
    with SiteStore.create(tmp_path / "store", secret=bytes(range(32))) as made:
        yield made


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


def write_mat(root: Path, patient: str, seed: int, size: int = 12, center: str = "") -> Path:
    values = np.random.default_rng(seed).normal(size=(2, 1, 2, 8, size, 2)).astype(np.float32)
    path = root / (TREE.replace("Center001", center) if center else TREE) / patient / "cine_sax.mat"
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w", userblock_size=512) as file:
        file["kspace_full"] = values.view(COMPOUND)[..., 0]
    return path


def write_nifti(path: Path) -> Path:
    x, y, z = np.ogrid[0:16, 0:20, 0:2]
    array = (100 + x + y + z).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)  # type: ignore[no-untyped-call]  # nibabel
    return path


def outcomes(summary: ImportSummary) -> dict[str, str]:
    return {Path(row.file).name: row.outcome for row in summary.rows}


def contents(store: SiteStore) -> list[Path]:
    return sorted(path for path in (store.root / "scans").rglob("*") if path.is_file())


def test_mixed_folder(store: SiteStore, source: Path) -> None:
    write_mat(source, "P001", 1)
    write_mat(source, "P002", 2)
    broken = write_mat(source, "P003", 3)
    broken.write_bytes(broken.read_bytes()[:-400])
    write_nifti(source / "A_sax.nii.gz")
    write_nifti(source / "A_sax_gt.nii.gz")
    (source / "README.md").write_text("words")
    (source / "broken.h5").write_bytes(b"\x89HDF\r\n\x1a\nnothing")
    (source / "other.npz").write_bytes(b"no archive")
    summary = import_path(store, source)
    assert (summary.imported, summary.skipped, summary.failed, summary.ignored) == (3, 0, 3, 2)
    by_name = {Path(row.file).name: row for row in summary.rows}
    assert "damaged" in by_name["broken.h5"].reason
    assert "no importer" in by_name["other.npz"].reason
    assert by_name["README.md"].outcome == "ignored"
    assert "together with its image" in by_name["A_sax_gt.nii.gz"].reason
    assert [warning for warning in by_name["A_sax.nii.gz"].warnings if "label names" in warning]
    failed = next(row for row in summary.rows if "P003" in row.file)
    assert failed.outcome == "failed"
    assert "cine_sax.mat" in failed.reason
    assert "\n" not in failed.reason
    assert len(store.scans()) == len(contents(store)) == 3
    assert store.strays() == []
    assert {row.scan_id for row in summary.rows if row.scan_id} == {
        record.scan_id for record in store.scans()
    }


def test_json_says_the_same(store: SiteStore, source: Path) -> None:
    write_mat(source, "P001", 1)
    summary = import_path(store, source)
    value = json.loads(json.dumps(summary.to_json()))
    assert value["imported"] == summary.imported == 1
    assert value["rows"][0]["scan_id"] == store.scans()[0].scan_id


def test_second_import_skips_everything(store: SiteStore, source: Path) -> None:
    write_mat(source, "P001", 1)
    write_nifti(source / "A_sax.nii.gz")
    assert import_path(store, source).imported == 2
    before = contents(store)
    again = import_path(store, source)
    assert (again.imported, again.skipped, again.failed) == (0, 2, 0)
    assert all("already imported" in row.reason for row in again.rows)
    assert contents(store) == before


@pytest.mark.parametrize("synthesised", [False, True])
def test_patient_under_two_names(store: SiteStore, source: Path, synthesised: bool) -> None:
    if synthesised:
        write_nifti(source / "first_sax.nii.gz")
        write_nifti(source / "second_sax.nii.gz")
        names = {"first": "A", "second": "A"}
    else:
        write_mat(source, "P001", 1)
        write_mat(source, "P002", 1)
        names = {"Center001/P001": "A", "Center001/P002": "A"}
    summary = import_path(store, source)
    assert (summary.imported, summary.failed) == (1, 1)
    assert "--patient-map" in summary.rows[1].reason
    mapped = SiteStore.create(source.parent / "mapped")
    summary = import_path(mapped, source, options=ImportOptions(patient_map=names))
    assert (summary.imported, summary.skipped, summary.failed) == (1, 1, 0)
    mapped.close()


def test_patient_map_joins_and_centres_separate(store: SiteStore, source: Path) -> None:
    write_mat(source, "P001", 1)
    write_mat(source, "P001", 2, center="Center002")
    write_mat(source, "P002", 3)
    names = {"Center001/P002": "Center001/P001"}
    assert import_path(store, source, options=ImportOptions(patient_map=names)).imported == 3
    assert len(store.patients()) == 2
    stored = b"".join(path.read_bytes() for path in store.root.rglob("*") if path.is_file())
    assert b"P001" not in stored


def test_one_patient_for_everything(store: SiteStore, source: Path) -> None:
    write_mat(source, "P001", 1)
    write_mat(source, "P002", 2)
    import_path(store, source, options=ImportOptions(patient="A"))
    assert len(store.patients()) == 1


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """The system refuses larger files, as a full disk would."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_full_disk_leaves_nothing_of_that_scan(store: SiteStore, source: Path) -> None:
    write_mat(source, "P001", 1, size=32768)
    write_mat(source, "P002", 2)
    with file_size_limit(1_000_000):
        summary = import_path(store, source)
    assert [row.outcome for row in summary.rows] == ["failed", "imported"]
    assert "disk full" in summary.rows[0].reason
    assert len(contents(store)) == len(store.scans()) == len(store.patients()) == 1
    assert store.verify() == []


def test_one_format_only(store: SiteStore, source: Path) -> None:
    write_mat(source, "P001", 1)
    write_nifti(source / "A_sax.nii.gz")
    summary = import_path(store, source, "nifti")
    assert outcomes(summary) == {"cine_sax.mat": "ignored", "A_sax.nii.gz": "imported"}


def test_single_files(store: SiteStore, source: Path) -> None:
    assert import_path(store, write_mat(source, "P001", 1)).imported == 1
    (source / "notes.txt").write_text("words")
    assert import_path(store, source / "notes.txt").failed == 1
    for importer in IMPORTERS:
        summary = import_path(store, source / "notes.txt", importer.name)
        assert summary.failed == 1, importer.name
        assert "\n" not in summary.rows[0].reason


def test_wrong_paths_and_formats(store: SiteStore, source: Path) -> None:
    with pytest.raises(DataError, match="holds no file"):
        import_path(store, source)
    with pytest.raises(DataError, match="no such file"):
        import_path(store, source / "absent")
    with pytest.raises(ConfigurationError, match=r"auto or one of cmrxrecon, ismrmrd"):
        import_path(store, source, "jpeg")


def test_own_scan_files_are_not_imported(store: SiteStore, source: Path) -> None:
    write_mat(source, "P001", 1)
    import_path(store, source)
    summary = import_path(store, store.root / "scans")
    assert (summary.imported, summary.failed, summary.ignored) == (0, 1, 0)
