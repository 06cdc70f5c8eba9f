"""Cine DICOM folders, contours and what must not leave the headers."""

from __future__ import annotations

import warnings
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

from fedcmr_client.importers import ImporterWarning, ImportOptions, Refusal
from fedcmr_client.importers.dicom import DicomImporter
from fedcmr_client.store.scan_file import ScanSource
from fedcmr_shared.errors import DataError

FRAMES, SLICES, ROWS, COLUMNS = 4, 3, 32, 40
SERIES = generate_uid(entropy_srcs=["fedcmr"])
SECRETS = ("DOE^JANE", "19480312", "SERIAL-77", "Dr Who", "General Hospital")


def pixels(frame: int, slice_: int) -> np.ndarray:
    y, x = np.ogrid[-1 : 1 : ROWS * 1j, -1 : 1 : COLUMNS * 1j]
    radius = 0.5 + 0.05 * frame
    image = 100 * (y**2 + (x - 0.1 * slice_) ** 2 < radius**2) + 10 + frame + 10 * slice_
    return image.astype(np.int16)


def write_image(path: Path, frame: int, slice_: int, **changes: Any) -> Path:
    """Instance numbers run frame by frame within a slice; SliceLocation is wrong on purpose."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = MRImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    d = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    d.SOPClassUID, d.SOPInstanceUID = MRImageStorage, meta.MediaStorageSOPInstanceUID
    d.PatientName, d.PatientBirthDate, d.DeviceSerialNumber = SECRETS[:3]
    d.ReferringPhysicianName, d.InstitutionName = SECRETS[3:]
    d.PatientID, d.SeriesInstanceUID, d.Modality = "MRN-1", SERIES, "MR"
    d.SeriesDescription = "CINE SAX DOE JANE"
    d.Manufacturer, d.ManufacturerModelName = "GE MEDICAL SYSTEMS", "SIGNA HDx"
    d.MagneticFieldStrength, d.HeartRate = "1.5", 60
    d.InstanceNumber = slice_ * FRAMES + frame + 1
    d.TriggerTime, d.SliceLocation = 50.0 * frame, float(-slice_ % 2)
    d.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    d.ImagePositionPatient = [0, 0, 8.0 * slice_]
    d.PixelSpacing, d.SliceThickness = [1.5, 1.25], 6
    d.AcquisitionMatrix, d.InPlanePhaseEncodingDirection = [0, 24, 20, 0], "ROW"
    d.PercentSampling = 80
    d.Rows, d.Columns, d.SamplesPerPixel = ROWS, COLUMNS, 1
    d.PhotometricInterpretation = "MONOCHROME2"
    d.BitsAllocated = d.BitsStored = 16
    d.HighBit, d.PixelRepresentation = 15, 1
    d.PixelData = pixels(frame, slice_).tobytes()
    for name, value in changes.items():
        if value is None:
            delattr(d, name)
        else:
            setattr(d, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    d.save_as(path)
    return path


def write_series(folder: Path, **changes: Any) -> Path:
    places = [(t, z) for z in range(SLICES) for t in range(FRAMES)]
    # File names in an order that says nothing.
    for number, (frame, slice_) in enumerate(sorted(places, key=lambda p: (p[0] * 7 + p[1]) % 5)):
        write_image(folder / f"{number}.dcm", frame, slice_, **changes)
    return folder


def square(path: Path, half: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    corners = [(-half, -half), (half, -half), (half, half), (-half, half)]
    path.write_text("".join(f"{20 + x:.2f} {16 + y:.2f}\n" for x, y in corners))


def write_contours(folder: Path) -> Path:
    """Diastole in frame 3 (side 12), systole in frame 1 (side 6), in all slices."""
    for slice_ in range(SLICES):
        first = slice_ * FRAMES + 1
        for frame, half in ((3, 6.0), (1, 3.0)):
            name = f"IM-0001-{first + frame:04d}-icontour-manual.txt"
            square(folder / "i-contours" / name, half)
        square(folder / "o-contours" / f"IM-0001-{first + 3:04d}-ocontour-manual.txt", 8.0)
    return folder


def results(path: Path, options: ImportOptions | None = None) -> list[ScanSource | Refusal]:
    return list(DicomImporter().scans(path, options or ImportOptions(snr=1e6, coils=2)))


def only(path: Path, options: ImportOptions | None = None) -> ScanSource:
    (scan,) = results(path, options)
    assert isinstance(scan, ScanSource), scan
    return scan


def refusal(path: Path) -> str:
    (found,) = results(path)
    assert isinstance(found, Refusal)
    return str(found.error)


def magnitude(kspace: np.ndarray) -> np.ndarray:
    shifted = np.fft.ifftshift(kspace, axes=(-2, -1))
    images = np.fft.fftshift(np.fft.ifft2(shifted, norm="ortho"), axes=(-2, -1))
    result: np.ndarray = np.sqrt((np.abs(images) ** 2).sum(axis=0))
    return result


def test_frames_and_slices_are_sorted_by_trigger_and_position(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "series")
    assert DicomImporter().claims(folder)
    scan = only(folder)
    for frame, slice_, kspace in scan.images():
        mean = pixels(frame, slice_).mean()
        # Rows of ROW phase encoding become the readout axis.
        assert kspace.shape == (2, 16, 24)
        assert magnitude(kspace).mean() == pytest.approx(mean, rel=0.02)


def test_image_is_transposed_for_row_phase_encoding(tmp_path: Path) -> None:
    full = {"AcquisitionMatrix": [0, ROWS, COLUMNS, 0], "PercentSampling": 100}
    row = only(write_series(tmp_path / "row", **full))
    column = {"AcquisitionMatrix": [COLUMNS, 0, 0, ROWS], "InPlanePhaseEncodingDirection": "COL"}
    col = only(write_series(tmp_path / "col", **{**full, **column}))
    for scan, expected in ((row, pixels(0, 2).T), (col, pixels(0, 2))):
        images = {(t, z): kspace for t, z, kspace in scan.images()}
        np.testing.assert_allclose(magnitude(images[0, 2]), expected, rtol=0.01)


def test_metadata(tmp_path: Path) -> None:
    scan = only(write_series(tmp_path / "series"))
    m = scan.metadata
    assert (m.origin, m.modality, m.view) == ("synthesised", "cine", "short-axis")
    assert (m.vendor, m.scanner, m.field_strength_t) == ("GE", "Signa HDx", 1.5)
    assert (m.phase_encodes, m.readout_samples) == (16, 24)
    assert m.pixel_spacing_mm == pytest.approx((1.25 * COLUMNS / 16, 1.5 * ROWS / 24))
    assert (m.slice_thickness_mm, m.slice_pitch_mm, m.spacing_source) == (6.0, 8.0, "header")
    assert m.frame_times_ms == (0.0, 50.0, 100.0, 150.0)
    assert scan.patient == "MRN-1"


@pytest.mark.parametrize(
    ("dates", "day"),
    [
        ({}, None),
        ({"StudyDate": "20240501"}, date(2024, 5, 1)),
        ({"StudyDate": "20240501", "AcquisitionDate": "20240430"}, date(2024, 4, 30)),
        ({"StudyDate": "20240501", "AcquisitionDate": ""}, date(2024, 5, 1)),
    ],
)
def test_the_day_is_that_of_the_acquisition_or_the_study(
    tmp_path: Path, dates: dict[str, str], day: date | None
) -> None:
    scan = only(write_series(tmp_path / "series", **dates))
    assert scan.metadata.acquired_on == day


@pytest.mark.filterwarnings("ignore:Invalid value for VR DA")
def test_a_date_that_is_none_is_missing(tmp_path: Path) -> None:
    scan = only(write_series(tmp_path / "series", StudyDate="20241399"))
    assert scan.metadata.acquired_on is None
    assert "acquired_on" in scan.metadata.missing


def test_no_identifying_text_reaches_the_metadata(tmp_path: Path) -> None:
    text = only(write_series(tmp_path / "series")).metadata.model_dump_json()
    for secret in (*SECRETS, "JANE", "MRN-1"):
        assert secret not in text


def test_contours_become_labels_and_phenotypes(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "series")
    write_contours(folder / "contours")
    truth = only(folder).truth
    assert truth is not None
    assert truth.labels is not None
    volume = 3 * 8 * 1.5 * 1.25 / 1000
    assert truth.phenotypes["LVEF"] == pytest.approx(75)
    assert truth.phenotypes["LVEDV"] == pytest.approx(144 * volume)
    assert truth.phenotypes["LVESV"] == pytest.approx(36 * volume)
    assert truth.phenotypes["LVM"] == pytest.approx((256 - 144) * volume * 1.05)
    assert truth.labels.shape == (FRAMES, SLICES, 16, 24)
    assert set(np.unique(truth.labels[3])) == {0, 1, 2}
    assert set(np.unique(truth.labels[1])) == {0, 1}
    assert not truth.labels[[0, 2]].any()
    scale = (16 / COLUMNS) * (24 / ROWS)
    assert (truth.labels[3, 0] == 1).sum() == pytest.approx(144 * scale, rel=0.2)


def test_contours_beside_need_the_patients_name(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "series")
    write_contours(tmp_path / "contours-HEART-4")
    with pytest.warns(ImporterWarning, match="contours-HEART-4 is not used"):
        assert only(folder).truth is None
    mapped = ImportOptions(patient_map={"MRN-1": "HEART-4"}, coils=2)
    assert only(folder, mapped).truth is not None


@pytest.mark.parametrize(
    ("text", "message"), [("1 2\nx y\n", "cannot be read"), ("1 2\n3 4\n", "three or more")]
)
def test_bad_contours(tmp_path: Path, text: str, message: str) -> None:
    folder = write_series(tmp_path / "series")
    (folder / "contours").mkdir()
    (folder / "contours" / "IM-0001-0001-icontour-manual.txt").write_text(text)
    assert message in refusal(folder)


def test_contour_of_another_series(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "series")
    square(folder / "contours" / "IM-0001-0099-icontour-manual.txt", 3)
    assert "instance 99" in refusal(folder)


def test_a_good_series_survives_a_bad_one(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "series")
    other = {"SeriesInstanceUID": generate_uid(), "SeriesNumber": 9, "PatientID": ""}
    write_image(folder / "other.dcm", 0, 0, **other)
    good, bad = results(folder)
    assert isinstance(good, ScanSource)
    assert isinstance(bad, Refusal)
    assert "series 9" in bad.source
    assert "--patient" in str(bad.error)


def test_foreign_and_damaged_files_among_images(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "series")
    for name in ("report1.dcm", "report2.dcm"):
        write_image(folder / name, 0, 0, Modality="SR", SeriesInstanceUID="1.2.3")
    (folder / "DICOMDIR").write_bytes((folder / "0.dcm").read_bytes())
    bad, good = results(folder)
    assert isinstance(good, ScanSource)
    assert isinstance(bad, Refusal)
    assert "report1.dcm: Modality is SR" in str(bad.error)
    (folder / "cut.dcm").write_bytes((folder / "0.dcm").read_bytes()[:300])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = results(folder)
    assert not any(isinstance(item, ScanSource) for item in found)
    assert "no series of its folder" in str([r.error for r in found if isinstance(r, Refusal)][-1])


def test_missing_image(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "series")
    (folder / "3.dcm").unlink()
    assert "images are missing" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"Modality": "CT"}, "not MR"),
        ({"NumberOfFrames": 3}, "multi-frame"),
        ({"ImagePositionPatient": None}, "ImagePositionPatient is missing"),
        ({"Rows": 16}, "differ in size"),
    ],
)
def test_refusals(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = write_series(tmp_path / "series")
    write_image(folder / "0.dcm", 0, 0, **changes)
    assert message in refusal(folder)


def test_truncated_pixels(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "series")
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:-500])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "pixels cannot be read" in refusal(folder)


def test_truncated_header_names_the_file_but_no_value(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "series")
    path = folder / "0.dcm"
    path.write_bytes(path.read_bytes()[:300])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = refusal(folder)
    assert "0.dcm" in text
    assert not any(secret in text for secret in SECRETS)


def test_without_acquisition_matrix_the_fraction_counts(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "series", AcquisitionMatrix=None)
    options = ImportOptions(coils=2, acquired_fraction=(0.5, 1.0))
    with pytest.warns(ImporterWarning, match="no AcquisitionMatrix"):
        m = only(folder, options).metadata
    assert (m.phase_encodes, m.readout_samples) == (COLUMNS // 2, ROWS)


def test_other_files_are_not_claimed(tmp_path: Path) -> None:
    (tmp_path / "notes.dcm").write_text("no preamble")
    assert not DicomImporter().claims(tmp_path / "notes.dcm")
    assert not DicomImporter().claims(tmp_path)
    assert pydicom.__version__.startswith("3.")


def test_empty_image_is_a_data_error(tmp_path: Path) -> None:
    blank = np.zeros((ROWS, COLUMNS), np.int16).tobytes()
    folder = write_series(tmp_path / "series", PixelData=blank)
    with pytest.raises(DataError, match="is empty"):
        raise_refusal(results(folder))


def raise_refusal(found: list[ScanSource | Refusal]) -> None:
    for item in found:
        if isinstance(item, Refusal):
            raise item.error
