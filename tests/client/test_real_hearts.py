"""The importers on real hearts."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from real_data import NO_SUNNYBROOK
from real_data import SUNNYBROOK as DATA

from fedcmr_client.importers import ImportOptions, import_path
from fedcmr_client.store.scan_file import ScanFile, Truth
from fedcmr_client.store.site_store import SiteStore

SAME_HEART = {"SCD0000301": "SC-HF-I-04"}
pytestmark = pytest.mark.skipif(not (DATA / "index.csv").is_file(), reason=NO_SUNNYBROOK)


def expected() -> dict[tuple[str, str], dict[str, str]]:
    with (DATA / "index.csv").open(newline="") as file:
        return {(row["kind"], row["patient"]): row for row in csv.DictReader(file)}


def imported(root: Path, *paths: str) -> list[tuple[Truth, ScanFile]]:
    options = ImportOptions(patient_map=SAME_HEART, coils=2)
    with SiteStore.create(root) as store:
        for path in paths:
            summary = import_path(store, DATA / path, options=options)
            assert (summary.imported, summary.failed) == (1, 0), summary.rows
        scans = [ScanFile(record.path) for record in store.scans()]
    return [(scan.truth, scan) for scan in scans if scan.truth is not None]


def test_dicom_series_with_contours(tmp_path: Path) -> None:
    ((truth, scan),) = imported(tmp_path / "s", "dicom")
    row = expected()["cine", "SC-HF-I-04"]
    assert truth.phenotypes["LVEF"] == pytest.approx(float(row["EF"]), abs=1.5)
    assert truth.phenotypes["LVEDV"] == pytest.approx(float(row["EDV"]), rel=0.02)
    assert truth.phenotypes["LVESV"] == pytest.approx(float(row["ESV"]), rel=0.02)
    m = scan.metadata
    assert (m.frames, m.slices) == (20, 10)
    assert m.slice_pitch_mm == pytest.approx(8.0, abs=0.01)
    assert (m.phase_encodes, m.readout_samples, m.vendor) == (192, 256, "GE")
    assert m.origin == "synthesised"
    scan.close()


@pytest.mark.parametrize("name", ["cine/SC-N-02", "cine/SC-HF-I-01", "contoured_png8/SC-HF-NI-14"])
def test_ejection_fraction_of_repacked_patients(tmp_path: Path, name: str) -> None:
    ((truth, scan),) = imported(tmp_path / "s", f"{name}.npz")
    kind, patient = name.split("/")
    row = expected()["cine" if kind == "cine" else "png8", patient]
    assert truth.phenotypes["LVEF"] == pytest.approx(float(row["EF"]), abs=0.5)
    scan.close()


def test_the_heart_is_brighter_than_its_wall(tmp_path: Path) -> None:
    """Labels and images are on one grid: blood is bright in bSSFP, muscle is dark."""
    ((truth, scan),) = imported(tmp_path / "s", "cine/SC-HF-I-04.npz")
    assert truth.labels is not None
    frame = 19
    cavity, wall = [], []
    for slice_ in range(2, 8):
        kspace = np.fft.ifftshift(scan.image(frame, slice_), axes=(-2, -1))
        image = np.fft.fftshift(np.fft.ifft2(kspace, norm="ortho"), axes=(-2, -1))
        magnitude = np.sqrt((np.abs(image) ** 2).sum(axis=0))
        cavity.append(np.median(magnitude[truth.labels[frame, slice_] == 1]))
        wall.append(np.median(magnitude[truth.labels[frame, slice_] == 2]))
    assert (np.array(cavity) > 1.5 * np.array(wall)).all()
    scan.close()


def test_one_heart_under_two_names_is_noticed(tmp_path: Path) -> None:
    """SC-HF-I-04 is there as DICOM (SCD0000301) and as a repacked stack: the same samples."""
    options = ImportOptions(coils=2)
    with SiteStore.create(tmp_path / "s") as store:
        import_path(store, DATA / "cine" / "SC-HF-I-04.npz", options=options)
        refused = import_path(store, DATA / "dicom" / "SCD0000301", options=options)
        assert refused.failed == 1
        assert "--patient-map" in refused.rows[0].reason
        mapped = ImportOptions(coils=2, patient_map=SAME_HEART)
        assert import_path(store, DATA / "dicom" / "SCD0000301", options=mapped).skipped == 1
        assert len(store.patients()) == 1
