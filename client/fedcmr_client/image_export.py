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
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from pydicom.dataset import Dataset

from fedcmr_client.image_files import (
    NOTICE,
    ORIENTATION_NOTE,
    Grey,
    appears_whole,
    check_free,
    decimal,
    files_in,
    mr_image,
    save_nifti,
    uid,
)
from fedcmr_client.reconstruction import RESIDUAL_DEFINITION, ReconstructedScan
from fedcmr_shared import __version__
from fedcmr_shared.schemas.acquisition import AcquisitionMetadata

UNKNOWN_SPACING_MM: Final = 1.0


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


def export_images(folder: Path, series: ImageSeries) -> list[Path]:
    """Write all files into ``folder`` and return their paths.

    The folder appears complete or not at all.

    Raises:
        ConfigurationError: ``folder`` exists and is not empty.
        DataError: the disk refuses.
    """
    check_free(folder)
    with appears_whole(folder) as partial:
        write_nifti(partial / "reconstruction.nii.gz", series)
        text = json.dumps(series.provenance, indent=2, sort_keys=True)
        (partial / "reconstruction.json").write_text(text + "\n", encoding="utf-8")
        write_dicom(partial / "dicom", series)
        names = files_in(partial)
    return [folder / name for name in names]


def write_nifti(path: Path, series: ImageSeries) -> None:
    """Write a NIfTI-1 file; time steps in seconds where the frame times are known."""
    voxel = Voxel.of(series.metadata)
    save_nifti(
        path,
        series.scan.images,
        (voxel.x, voxel.y, voxel.z),
        _frame_interval_s(series.metadata),
        f"{NOTICE}; {voxel.note}",
        series.provenance,
    )


def write_dicom(folder: Path, series: ImageSeries) -> None:
    """Write one MR Image Storage file per slice and frame into the new ``folder``.

    Identifiers follow from scan, model, sampling and seed: the same reconstruction gets the same
    ones again.
    """
    folder.mkdir()
    images = series.scan.images
    grey = Grey.of(0.0, float(images.max()))
    frames, slices = images.shape[:2]
    for slice_, frame in np.ndindex(slices, frames):
        number = slice_ * frames + frame + 1
        dataset = _instance(series, frame, slice_, number)
        grey.store(dataset, images[frame, slice_])
        dataset.save_as(folder / f"IM{number:05d}.dcm", enforce_file_format=True)


def _frame_interval_s(metadata: AcquisitionMetadata) -> float | None:
    times = metadata.frame_times_ms
    if times is None or len(times) < 2 or times[-1] <= times[0]:
        return None
    return (times[-1] - times[0]) / (len(times) - 1) / 1000


def _instance(series: ImageSeries, frame: int, slice_: int, number: int) -> Dataset:
    sampling = series.scan.sampling
    key = (series.scan_digest, series.model_sha256, series.seed, *astuple(sampling))
    attributes = {
        "StudyInstanceUID": uid("study", series.scan_digest),
        "SeriesInstanceUID": uid("series", *key),
        "FrameOfReferenceUID": uid("frame of reference", series.scan_digest),
        "InstanceNumber": number,
        **_provenance(series),
        **_acquisition(series.metadata, frame),
        **_plane(series.metadata, slice_),
    }
    return mr_image(uid("instance", *key, number), attributes)


def _provenance(series: ImageSeries) -> dict[str, Any]:
    voxel = Voxel.of(series.metadata)
    return {
        "PatientName": series.patient,
        "PatientID": series.patient,
        "DeidentificationMethod": "keyed pseudonym of the site store",
        "SeriesDescription": f"{NOTICE}: FedCMR reconstruction",
        "ImageComments": f"{NOTICE}. {ORIENTATION_NOTE}; {voxel.note}.",
        "DerivationDescription": series.derivation,
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
        "HeartRate": None if heart_rate is None else round(heart_rate),
        "TemporalPositionIdentifier": frame + 1,
        "NumberOfTemporalPositions": metadata.frames,
        **{name: None if value is None else decimal(value) for name, value in values.items()},
    }


def _plane(metadata: AcquisitionMetadata, slice_: int) -> dict[str, Any]:
    voxel = Voxel.of(metadata)
    thickness = metadata.slice_thickness_mm
    return {
        "PixelSpacing": [decimal(voxel.y), decimal(voxel.x)],
        "SliceThickness": None if thickness is None else decimal(thickness),
        "SpacingBetweenSlices": decimal(voxel.z),
        "ImagePositionPatient": [0, 0, decimal(slice_ * voxel.z)],
        "SliceLocation": decimal(slice_ * voxel.z),
    }
