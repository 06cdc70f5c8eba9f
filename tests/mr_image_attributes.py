"""What DICOM and NIfTI files of ours must have in common, for tests of those that we write."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

import numpy as np
import pydicom
import pytest

# fmt: off
REQUIRED: Final = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate",
    "StudyTime", "ContentDate", "ContentTime", "ReferringPhysicianName", "StudyID", "AccessionNumber", "Modality",
    "SeriesInstanceUID", "SeriesNumber", "PatientPosition", "FrameOfReferenceUID",
    "PositionReferenceIndicator", "Manufacturer", "InstanceNumber", "PixelSpacing",
    "ImageOrientationPatient", "ImagePositionPatient", "SliceThickness", "SamplesPerPixel",
    "PhotometricInterpretation", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit",
    "PixelRepresentation", "PixelData", "ImageType", "ScanningSequence", "SequenceVariant",
    "ScanOptions", "MRAcquisitionType", "RepetitionTime", "EchoTime", "EchoTrainLength",
    "SOPClassUID", "SOPInstanceUID",
)
# fmt: on
"""Types 1 and 2 of DICOM PS3.3 A.4 that have no condition or whose condition is met."""

_LPS_TO_RAS: Final = np.diag([-1.0, -1.0, 1.0, 1.0])


def read_strictly(paths: Iterable[Path]) -> list[pydicom.Dataset]:
    """Read files with every value checked against its representation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pydicom.config.settings, "reading_validation_mode", pydicom.config.RAISE)
        read: list[pydicom.Dataset] = [pydicom.dcmread(path) for path in paths]
        for dataset in read:
            # pydicom converts and checks a value only when it is asked for.
            assert len(list(dataset.iterall())) > 40
    return read


def nifti_affine(dataset: pydicom.Dataset, pitch_mm: float) -> np.ndarray:
    """From column, row and slice of the first ``dataset`` to mm as NIfTI counts them.

    PS3.3 C.7.6.2.1.1, whose x and y grow to the left and to the back.
    """
    along_row, along_column = np.reshape(
        [float(v) for v in dataset.ImageOrientationPatient], (2, 3)
    )
    between_rows, between_columns = map(float, dataset.PixelSpacing)
    affine = np.eye(4)
    affine[:3, 0] = along_row * between_columns
    affine[:3, 1] = along_column * between_rows
    affine[:3, 2] = np.cross(along_row, along_column) * pitch_mm
    affine[:3, 3] = [float(v) for v in dataset.ImagePositionPatient]
    return np.asarray(_LPS_TO_RAS @ affine)
