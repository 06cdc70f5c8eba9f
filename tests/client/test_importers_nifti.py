"""Cine NIfTI files with and without label maps."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest

from fedcmr_client.importers import ImporterWarning, ImportOptions
from fedcmr_client.importers.nifti import NiftiImporter, is_label_map
from fedcmr_client.store.scan_file import ScanSource
from fedcmr_shared.errors import DataError

# As ACDC numbers them.
NAMES = ("background", "RV", "LV myocardium", "LV cavity")
FULL = (1.0, 1.0)


def write(path: Path, array: np.ndarray, zooms: tuple[float, ...] = (1.5, 1.25, 10, 1)) -> Path:
    affine = np.diag([*zooms[:3], 1])
    image = nibabel.Nifti1Image(array, affine)  # type: ignore[no-untyped-call]  # nibabel
    image.header.set_zooms(zooms[: array.ndim])  # type: ignore[no-untyped-call]  # nibabel
    nibabel.save(image, path)
    return path


def heart(frames: int = 3, slices: int = 2) -> np.ndarray:
    """(x, y, slice, frame), different along every axis."""
    x, y, z, t = np.ogrid[0:20, 0:24, 0:slices, 0:frames]
    image: np.ndarray = (100 + x + 2 * y + 10 * z + 20 * t).astype(np.int16)
    return image


def labels() -> np.ndarray:
    """Cavity of 8 x 8 in frame 0, 4 x 4 in frame 2; wall and right ventricle beside it."""
    result = np.zeros((20, 24, 2, 3), np.uint8)
    result[2:14, 4:16, :, 0] = 2
    result[4:12, 6:14, :, 0] = 3
    result[15:18, 6:14, :, 0] = 1
    result[4:8, 6:10, :, 2] = 3
    return result


def only(path: Path, options: ImportOptions | None = None) -> ScanSource:
    options = options or ImportOptions(coils=2, snr=1e6, acquired_fraction=FULL)
    (scan,) = NiftiImporter().scans(path, options)
    return scan


def magnitude(kspace: np.ndarray) -> np.ndarray:
    shifted = np.fft.ifftshift(kspace, axes=(-2, -1))
    images = np.fft.fftshift(np.fft.ifft2(shifted, norm="ortho"), axes=(-2, -1))
    result: np.ndarray = np.sqrt((np.abs(images) ** 2).sum(axis=0))
    return result


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_axes(tmp_path: Path, ending: str) -> None:
    array = heart()
    path = write(tmp_path / f"patient001_sax{ending}", array)
    assert NiftiImporter().claims(path)
    scan = only(path)
    for t, z, kspace in scan.images():
        np.testing.assert_allclose(magnitude(kspace), array[:, :, z, t].T, rtol=1e-3)
    m = scan.metadata
    assert (m.frames, m.slices, m.phase_encodes, m.readout_samples) == (3, 2, 24, 20)
    assert m.pixel_spacing_mm == (1.25, 1.5)
    assert (m.slice_pitch_mm, m.view, m.origin) == (10.0, "short-axis", "synthesised")
    assert scan.patient == "patient001"


def test_three_axes_are_slices(tmp_path: Path) -> None:
    m = only(write(tmp_path / "A_ED.nii.gz", heart()[..., 0])).metadata
    assert (m.frames, m.slices) == (1, 2)


def test_labels_are_mapped_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "A_4d.nii.gz", heart())
    write(tmp_path / "A_4d_gt.nii.gz", labels())
    options = ImportOptions(coils=2, acquired_fraction=FULL, label_names=NAMES)
    truth = only(path, options).truth
    assert truth is not None
    assert truth.labels is not None
    assert truth.phenotypes["LVEF"] == pytest.approx(75)
    assert truth.phenotypes["LVEDV"] == pytest.approx(2 * 64 * 1.5 * 1.25 * 10 / 1000)
    assert truth.label_names[truth.labels[0, 0, 8, 8]] == "LV cavity"
    assert truth.label_names[truth.labels[0, 0, 8, 16]] == "RV"


def test_unexplained_labels_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "A_4d.nii.gz", heart())
    assert is_label_map(write(tmp_path / "A_4d_seg.nii.gz", labels()))
    with pytest.warns(ImporterWarning, match="label names"):
        assert only(path).truth is None


@pytest.mark.parametrize(
    ("names", "array", "message"),
    [
        (("background", "left"), labels(), "'left' is unknown"),
        (NAMES[:3], labels(), "label 3 has no name"),
        (NAMES, labels()[..., 0], "labels have shape"),
    ],
)
def test_wrong_labels(
    tmp_path: Path, names: tuple[str, ...], array: np.ndarray, message: str
) -> None:
    path = write(tmp_path / "A_4d.nii.gz", heart())
    write(tmp_path / "A_4d_gt.nii.gz", array)
    with pytest.raises(DataError, match=message):
        only(path, ImportOptions(label_names=names))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (heart().astype(np.complex64), "not magnitudes"),
        (heart()[..., 0, 0], "expected"),
        (np.full((8, 8, 2), np.nan, np.float32), "NaN"),
        (np.zeros((8, 8, 2), np.int16), "is empty"),
    ],
)
def test_refusals(tmp_path: Path, array: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        only(write(tmp_path / "A.nii.gz", array))


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_damaged_files(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"A{ending}", heart())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match="damaged"):
        only(path)
    path.write_bytes(b"not an image at all")
    with pytest.raises(DataError, match="damaged"):
        only(path)
