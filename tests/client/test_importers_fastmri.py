"""fastMRI files, and the training files of CardioMM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from fedcmr_client.importers import ImportOptions
from fedcmr_client.importers.fastmri import FastMRIImporter
from fedcmr_client.store.scan_file import ScanSource, write_scan
from fedcmr_shared.errors import DataError

HEADER = """<?xml version="1.0"?>
<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">
  <acquisitionSystemInformation><systemVendor>SIEMENS</systemVendor>
    <systemFieldStrength_T>2.8936</systemFieldStrength_T></acquisitionSystemInformation>
  <experimentalConditions><H1resonanceFrequency_Hz>123200000</H1resonanceFrequency_Hz>
  </experimentalConditions>
  <encoding>
    <encodedSpace><matrixSize><x>12</x><y>8</y><z>1</z></matrixSize>
      <fieldOfView_mm><x>640</x><y>320</y><z>4.5</z></fieldOfView_mm></encodedSpace>
    <reconSpace><matrixSize><x>6</x><y>6</y><z>1</z></matrixSize>
      <fieldOfView_mm><x>320</x><y>320</y><z>4.5</z></fieldOfView_mm></reconSpace>
    <encodingLimits/><trajectory>cartesian</trajectory>
  </encoding>
</ismrmrdHeader>"""


def kspace(*shape: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(np.complex64)


def write(path: Path, array: np.ndarray, header: str | None = HEADER, **attributes: Any) -> Path:
    with h5py.File(path, "w") as file:
        file["kspace"] = array
        file["reconstruction_rss"] = np.ones((len(array), 6, 6), np.float32)
        if header is not None:
            file["ismrmrd_header"] = header.encode()
        file.attrs.update({"max": 1.0, "norm": 2.0, "patient_id": "abc", **attributes})
    return path


def only(path: Path, options: ImportOptions | None = None) -> ScanSource:
    (scan,) = FastMRIImporter().scans(path, options or ImportOptions())
    return scan


def test_readout_comes_first_in_the_file(tmp_path: Path) -> None:
    array = kspace(3, 4, 12, 8)
    path = write(tmp_path / "file1.h5", array, acquisition="CORPD_FBK")
    assert FastMRIImporter().claims(path)
    scan = only(path)
    for frame, slice_, image in scan.images():
        assert frame == 0
        np.testing.assert_array_equal(image, array[slice_].swapaxes(-1, -2))
    m = scan.metadata
    assert (m.frames, m.slices, m.phase_encodes, m.readout_samples) == (1, 3, 8, 12)
    assert (m.field_strength_t, m.readout_oversampling, scan.patient) == (3.0, 2.0, "abc")
    assert m.modality is None


def test_cardiomm_training_file(tmp_path: Path) -> None:
    array = kspace(6, 4, 12, 8)
    attributes = {
        "shape": (3, 2, 4, 8, 12),
        "vendor": "Siemens",
        "scanner": "Vida",
        "field": "3.0T",
        "modality": "T1 rho mapping",
        "view": "short-axis",
        "lifespan": "Adult",
        "center": "Center001",
    }
    scan = only(write(tmp_path / "P001.h5", array, None, **attributes))
    m = scan.metadata
    assert (m.frames, m.slices, m.modality, m.life_span) == (3, 2, "T1rho mapping", "adult")
    assert (m.field_strength_t, m.scanner, m.centre) == (3.0, "Vida", "Center001")
    images = {(t, z): image for t, z, image in scan.images()}
    np.testing.assert_array_equal(images[1, 0], array[2].swapaxes(-1, -2))


@pytest.mark.parametrize(
    ("array", "attributes", "message"),
    [
        (kspace(3, 4, 12), {}, "expected complex"),
        (np.ones((3, 4, 12, 8), np.float32), {}, "expected complex"),
        (kspace(2, 100, 12, 8), {}, "wrong dimension order"),
        (kspace(6, 4, 12, 8), {"shape": (4, 2, 4, 8, 12)}, "does not fit 6 images"),
        (kspace(6, 4, 12, 8), {"patient_id": ""}, "--patient"),
    ],
)
def test_refusals(
    tmp_path: Path, array: np.ndarray, attributes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        only(write(tmp_path / "file1.h5", array, **attributes))


def test_undersampled_files(tmp_path: Path) -> None:
    array = kspace(3, 4, 12, 8)
    path = write(tmp_path / "test.h5", array)
    with h5py.File(path, "a") as file:
        file["mask"] = np.ones(8)
    with pytest.raises(DataError, match="mask"):
        only(path)
    array[..., ::2] = 0
    with pytest.raises(DataError, match="undersampled acquisition, 4 of 8"):
        write_scan(tmp_path / "scan.h5", only(write(tmp_path / "file1.h5", array)))


def test_damaged_file(tmp_path: Path) -> None:
    path = write(tmp_path / "file1.h5", kspace(3, 4, 12, 8))
    path.write_bytes(path.read_bytes()[:3000])
    assert not FastMRIImporter().claims(path)
    with pytest.raises(DataError, match="damaged"):
        only(path)
