"""What DICOM asks of MR images, for tests of files that we write."""

from __future__ import annotations

from typing import Final

# fmt: off
REQUIRED: Final = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate",
    "StudyTime", "ReferringPhysicianName", "StudyID", "AccessionNumber", "Modality",
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
