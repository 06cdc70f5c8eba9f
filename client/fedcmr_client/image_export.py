"""Write reconstructed images as NIfTI and DICOM, marked as research results.

::

    reconstruction.nii.gz   float32 [x, y, slice, frame], provenance in a header extension
    reconstruction.json     the same provenance
    dicom/IM00001.dcm …     MR Image Storage, uint16 with one rescale slope; slice by slice

A site store knows neither position nor orientation of a scan, so both formats carry the axes of
the image, not those of the patient, and say so.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Final

import nibabel
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, MRImageStorage

from fedcmr_client.reconstruction import RESIDUAL_DEFINITION, ReconstructedScan
from fedcmr_shared import __version__
from fedcmr_shared.errors import ConfigurationError, DataError
from fedcmr_shared.schemas.acquisition import AcquisitionMetadata

NOTICE: Final = "RESEARCH USE ONLY"
ORIENTATION_NOTE: Final = "position and orientation are those of the image, not of the patient"
UNKNOWN_SPACING_MM: Final = 1.0

_UID_NAMESPACE: Final = uuid.UUID("5f0c1b52-6f0e-4c55-9b7e-0f9f1f1d9a35")
_NIFTI_COMMENT: Final = 6  # code of a header extension with plain text
_DICOM_MAX: Final = 65535


@dataclass(frozen=True)
class Voxel:
    """Voxel size in mm; ``assumed`` names the axes whose size is not known and set to 1 mm."""

    y: float
    x: float
    z: float
    assumed: tuple[str, ...]

    @classmethod
    def of(cls, metadata: AcquisitionMetadata) -> Voxel:
        """Take what the metadata knows; the slice thickness stands in for an unknown pitch."""
        plane = metadata.pixel_spacing_mm
        pitch = metadata.slice_pitch_mm or metadata.slice_thickness_mm
        y, x = plane or (UNKNOWN_SPACING_MM, UNKNOWN_SPACING_MM)
        assumed = (() if plane else ("y", "x")) + (() if pitch else ("z",))
        return cls(y, x, pitch or UNKNOWN_SPACING_MM, assumed)

    @property
    def note(self) -> str:
        """One phrase about what is not known."""
        if not self.assumed:
            return "voxel size from metadata"
        return f"{', '.join(self.assumed)} spacing unknown, set to 1 mm"


@dataclass(frozen=True)
class ImageSeries:
    """A reconstructed scan with what identifies it: pseudonym, scan digest, model hash, seed."""

    scan: ReconstructedScan
    metadata: AcquisitionMetadata
    patient: str
    scan_digest: str
    model_sha256: str
    seed: int

    @property
    def provenance(self) -> dict[str, Any]:
        """How the images were made, as both formats record it."""
        sampling = self.scan.sampling
        voxel = Voxel.of(self.metadata)
        return {
            "notice": NOTICE,
            "software": f"FedCMR {__version__}",
            "patient": self.patient,
            "kspace_origin": self.metadata.origin,
            "scan_digest": self.scan_digest,
            "model_sha256": self.model_sha256,
            "undersampling": self.scan.undersampling,
            "pattern": sampling.pattern,
            "acceleration_nominal": sampling.acceleration,
            "acceleration_realised": self.scan.realised_acceleration,
            "acs_lines": sampling.acs_lines,
            "seed": self.seed,
            "data_consistency_residual": self.scan.residual,
            "data_consistency_residual_definition": RESIDUAL_DEFINITION,
            "voxel_size_mm": {"y": voxel.y, "x": voxel.x, "z": voxel.z},
            "voxel_size_note": voxel.note,
            "orientation_note": ORIENTATION_NOTE,
        }

    @property
    def derivation(self) -> str:
        """The provenance as one sentence."""
        scan = self.scan
        return (
            f"Reconstructed by FedCMR {__version__} from {self.metadata.origin} k-space, "
            f"{scan.undersampling} undersampling {scan.sampling.pattern}, "
            f"acceleration nominal {scan.sampling.acceleration:g}, "
            f"realised {scan.realised_acceleration:.2f}, {scan.sampling.acs_lines} ACS lines, "
            f"seed {self.seed}; model SHA-256 {self.model_sha256}; "
            f"relative data-consistency residual {scan.residual:.3e}"
        )


def check_free(folder: Path) -> None:
    """Raise ConfigurationError unless ``folder`` is absent or an empty folder."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() or folder.is_symlink():
        raise ConfigurationError(f"output {folder} is not an empty folder: choose another")


def export_images(folder: Path, series: ImageSeries) -> list[Path]:
    """Write all files into ``folder`` and return their paths.

    The folder appears complete or not at all.

    Raises:
        ConfigurationError: ``folder`` exists and is not empty.
        DataError: the disk refuses.
    """
    check_free(folder)
    with _appears_whole(folder) as partial:
        write_nifti(partial / "reconstruction.nii.gz", series)
        text = json.dumps(series.provenance, indent=2, sort_keys=True)
        (partial / "reconstruction.json").write_text(text + "\n", encoding="utf-8")
        write_dicom(partial / "dicom", series)
        names = sorted(path.relative_to(partial) for path in partial.rglob("*") if path.is_file())
    return [folder / name for name in names]


def write_nifti(path: Path, series: ImageSeries) -> None:
    """Write a NIfTI-1 file; time steps in seconds where the frame times are known."""
    voxel = Voxel.of(series.metadata)
    data = np.ascontiguousarray(series.scan.images.transpose(3, 2, 1, 0))
    affine = np.diag([voxel.x, voxel.y, voxel.z, 1.0])
    image: Any = nibabel.Nifti1Image(data, affine)  # type: ignore[no-untyped-call]  # half typed
    header = image.header
    step = _frame_interval_s(series.metadata)
    header.set_xyzt_units("mm", "sec" if step else "unknown")
    header.set_zooms((voxel.x, voxel.y, voxel.z, step or 1.0))
    header["descrip"] = f"{NOTICE}; {voxel.note}".encode()
    comment = json.dumps(series.provenance, sort_keys=True).encode()
    header.extensions.append(nibabel.nifti1.Nifti1Extension(_NIFTI_COMMENT, comment))
    nibabel.save(image, path)


def write_dicom(folder: Path, series: ImageSeries) -> None:
    """Write one MR Image Storage file per slice and frame into the new ``folder``.

    Identifiers follow from scan, model, sampling and seed: the same reconstruction gets the same
    ones again.
    """
    folder.mkdir()
    images = series.scan.images
    slope = _rescale_slope(float(images.max()))
    frames, slices = images.shape[:2]
    for slice_, frame in np.ndindex(slices, frames):
        number = slice_ * frames + frame + 1
        pixels = np.minimum(np.rint(images[frame, slice_] / slope), _DICOM_MAX).astype("<u2")
        dataset = _instance(series, frame, slice_, number)
        _set_pixels(dataset, pixels, slope)
        dataset.save_as(folder / f"IM{number:05d}.dcm", enforce_file_format=True)


@contextmanager
def _appears_whole(folder: Path) -> Iterator[Path]:
    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _frame_interval_s(metadata: AcquisitionMetadata) -> float | None:
    times = metadata.frame_times_ms
    if times is None or len(times) < 2 or times[-1] <= times[0]:
        return None
    return (times[-1] - times[0]) / (len(times) - 1) / 1000


def _rescale_slope(peak: float) -> float:
    # Rounded to what a decimal string of 16 characters can hold, so that readers get it exactly.
    return float(f"{peak / _DICOM_MAX:.8e}") or 1.0


def _uid(*parts: object) -> UID:
    """UID derived from a UUID (DICOM PS3.5, B.2), the same for the same parts."""
    return UID(f"2.25.{uuid.uuid5(_UID_NAMESPACE, json.dumps(parts)).int}")


def _instance(series: ImageSeries, frame: int, slice_: int, number: int) -> Dataset:
    sampling = series.scan.sampling
    key = (series.scan_digest, series.model_sha256, series.seed, *astuple(sampling))
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = MRImageStorage
    meta.MediaStorageSOPInstanceUID = _uid("instance", *key, number)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = Dataset()
    dataset.file_meta = meta
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.SOPClassUID = MRImageStorage
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    dataset.StudyInstanceUID = _uid("study", series.scan_digest)
    dataset.SeriesInstanceUID = _uid("series", *key)
    dataset.FrameOfReferenceUID = _uid("frame of reference", series.scan_digest)
    dataset.InstanceNumber = number
    _set(dataset, _patient_and_study(series))
    _set(dataset, _provenance(series))
    _set(dataset, _acquisition(series.metadata, frame))
    _set(dataset, _plane(series.metadata, slice_))
    return dataset


def _set(dataset: Dataset, values: Mapping[str, Any]) -> None:
    for keyword, value in values.items():
        setattr(dataset, keyword, value)


def _patient_and_study(series: ImageSeries) -> dict[str, Any]:
    return {
        "PatientName": series.patient,
        "PatientID": series.patient,
        "PatientBirthDate": "",
        "PatientSex": "",
        "PatientIdentityRemoved": "YES",
        "DeidentificationMethod": "keyed pseudonym of the site store",
        "StudyDate": "",
        "StudyTime": "",
        "StudyID": "",
        "AccessionNumber": "",
        "ReferringPhysicianName": "",
    }


def _provenance(series: ImageSeries) -> dict[str, Any]:
    voxel = Voxel.of(series.metadata)
    return {
        "Modality": "MR",
        "ImageType": ["DERIVED", "SECONDARY", "OTHER"],
        "SeriesNumber": 1,
        "SeriesDescription": f"{NOTICE}: FedCMR reconstruction",
        "ImageComments": f"{NOTICE}. {ORIENTATION_NOTE}; {voxel.note}.",
        "DerivationDescription": series.derivation,
        "ContentQualification": "RESEARCH",
        # The notice stands in the attributes; nothing is drawn into the pixels.
        "BurnedInAnnotation": "NO",
        "LossyImageCompression": "00",
        "SoftwareVersions": f"FedCMR {__version__}",
        "Manufacturer": series.metadata.vendor or "",
        "ManufacturerModelName": series.metadata.scanner or "",
    }


def _acquisition(metadata: AcquisitionMetadata, frame: int) -> dict[str, Any]:
    times = metadata.frame_times_ms
    values = {
        "RepetitionTime": metadata.repetition_time_ms,
        "EchoTime": metadata.echo_time_ms,
        "FlipAngle": metadata.flip_angle_deg,
        "MagneticFieldStrength": metadata.field_strength_t,
        "TriggerTime": None if times is None else times[frame],
    }
    heart_rate = metadata.heart_rate_bpm
    return {
        "ScanningSequence": "RM",  # research mode
        "SequenceVariant": "NONE",
        "ScanOptions": "",
        "MRAcquisitionType": "2D",
        "EchoTrainLength": None,
        "HeartRate": None if heart_rate is None else round(heart_rate),
        "TemporalPositionIdentifier": frame + 1,
        "NumberOfTemporalPositions": metadata.frames,
        **{name: None if value is None else _decimal(value) for name, value in values.items()},
    }


def _plane(metadata: AcquisitionMetadata, slice_: int) -> dict[str, Any]:
    voxel = Voxel.of(metadata)
    thickness = metadata.slice_thickness_mm
    return {
        "PixelSpacing": [_decimal(voxel.y), _decimal(voxel.x)],
        "SliceThickness": None if thickness is None else _decimal(thickness),
        "SpacingBetweenSlices": _decimal(voxel.z),
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "ImagePositionPatient": [0, 0, _decimal(slice_ * voxel.z)],
        "SliceLocation": _decimal(slice_ * voxel.z),
        "PositionReferenceIndicator": "",
        "PatientPosition": "",
    }


def _set_pixels(dataset: Dataset, pixels: np.ndarray, slope: float) -> None:
    _set(
        dataset,
        {
            "SamplesPerPixel": 1,
            "PhotometricInterpretation": "MONOCHROME2",
            "Rows": pixels.shape[0],
            "Columns": pixels.shape[1],
            "BitsAllocated": 16,
            "BitsStored": 16,
            "HighBit": 15,
            "PixelRepresentation": 0,
            "RescaleSlope": f"{slope:.8e}",
            "RescaleIntercept": "0",
            "RescaleType": "US",  # unspecified: the units are arbitrary
            "WindowCenter": _decimal(_DICOM_MAX / 2 * slope),
            "WindowWidth": _decimal(max(_DICOM_MAX * slope, 1e-12)),
            "PixelData": pixels.tobytes(),
        },
    )


def _decimal(value: float) -> str:
    """Decimal string of at most 16 characters."""
    return f"{value:.9g}"
