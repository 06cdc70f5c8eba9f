"""What all image files have in common that FedCMR writes: folders, NIfTI and DICOM of MR images.

Their images are research results without known position and orientation in a patient, and every
file says so.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import nibabel
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, MRImageStorage

from fedcmr_shared import __version__
from fedcmr_shared.errors import ConfigurationError, DataError

NOTICE: Final = "RESEARCH USE ONLY"
ORIENTATION_NOTE: Final = "position and orientation are those of the image, not of the patient"

_UID_NAMESPACE: Final = uuid.UUID("5f0c1b52-6f0e-4c55-9b7e-0f9f1f1d9a35")
_NIFTI_COMMENT: Final = 6  # code of a header extension with plain text
_LARGEST: Final = 65535

_EVERY_MR_IMAGE: Final[dict[str, Any]] = {
    "PatientBirthDate": "",
    "PatientSex": "",
    "PatientIdentityRemoved": "YES",
    "StudyDate": "",
    "StudyTime": "",
    # Required, if empty, because the frames of a heart cycle are related in time (PS3.3 C.7.6.1).
    "ContentDate": "",
    "ContentTime": "",
    "StudyID": "",
    "AccessionNumber": "",
    "ReferringPhysicianName": "",
    "Modality": "MR",
    "ImageType": ["DERIVED", "SECONDARY", "OTHER"],
    "SeriesNumber": 1,
    "ContentQualification": "RESEARCH",
    # What there is to say stands in the attributes; nothing is drawn into the pixels.
    "BurnedInAnnotation": "NO",
    "LossyImageCompression": "00",
    "SoftwareVersions": f"FedCMR {__version__}",
    "ScanningSequence": "RM",  # research mode
    "SequenceVariant": "NONE",
    "ScanOptions": "",
    "MRAcquisitionType": "2D",
    "EchoTrainLength": None,
    "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
    "PositionReferenceIndicator": "",
    "PatientPosition": "",
}


def check_free(folder: Path) -> None:
    """Check that `appears_whole` can make ``folder``, before any work.

    Raises:
        ConfigurationError: it is there and not an empty folder, or is one that cannot be replaced.
        DataError: it cannot be read, or where it is to be nothing can be written.
    """
    try:
        empty = folder.is_dir() and not any(folder.iterdir())
        if not empty and (folder.exists() or folder.is_symlink()):
            raise ConfigurationError(f"output {folder} is not an empty folder: choose another")
        if folder.resolve().is_mount():
            raise ConfigurationError(
                f"output {folder} is a mount point, which no other folder can replace: name a new "
                "folder in it"
            )
    except OSError as error:
        raise DataError(f"output {folder} cannot be read: {error.strerror}") from error
    _check_writable(folder.resolve())


def _check_writable(folder: Path) -> None:
    """Make and remove a folder where ``folder``, or the first of its parents to be made, will be.

    Only trying tells: file systems refuse for reasons that permissions do not show.
    """
    parent = next(place for place in folder.parents if place.exists())
    trial = parent / _partial(folder).name
    try:
        trial.mkdir()
        trial.rmdir()
    except OSError as error:
        raise DataError(
            f"output {folder}: nothing can be written to {parent}: {error.strerror}: choose another"
        ) from error


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")


@contextmanager
def appears_whole(folder: Path) -> Iterator[Path]:
    """Give a new folder to write to, which takes the place of ``folder`` if all goes well.

    A process that is killed leaves it behind, hidden and with a name that ends in .partial.

    Raises:
        DataError: the disk refuses.
    """
    # A link stays, and what it leads to is replaced: a folder cannot take the place of a link.
    folder = folder.resolve()
    partial = _partial(folder)
    try:
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def files_in(folder: Path) -> list[Path]:
    """Return all files under ``folder``, relative to it, sorted."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def save_nifti(
    path: Path,
    images: NDArray[np.float32],
    voxel_mm: tuple[float, float, float],
    frame_s: float | None,
    description: str,
    provenance: Mapping[str, Any],
) -> None:
    """Write a NIfTI-1 file with ``provenance`` as JSON in a header extension.

    The images lie where the DICOM files of `mr_image` have them. NIfTI's x and y grow to the right
    and to the front, those of DICOM to the left and to the back, hence the signs.

    Args:
        path: name that ends in .nii or .nii.gz.
        images: ``[frame, slice, y, x]``; the file holds [x, y, slice, frame].
        voxel_mm: size along x, y and slice.
        frame_s: seconds between frames, None if unknown.
        description: at most 79 bytes are kept.
        provenance: how the images were made.
    """
    data = np.ascontiguousarray(images.transpose(3, 2, 1, 0))
    x, y, z = voxel_mm
    affine = np.diag([-x, -y, z, 1.0])
    image: Any = nibabel.Nifti1Image(data, affine)  # type: ignore[no-untyped-call]  # half typed
    header = image.header
    header.set_xyzt_units("mm", "sec" if frame_s else "unknown")
    header.set_zooms((*voxel_mm, frame_s or 1.0))
    header["descrip"] = description.encode()
    comment = json.dumps(provenance, sort_keys=True).encode()
    header.extensions.append(nibabel.nifti1.Nifti1Extension(_NIFTI_COMMENT, comment))
    nibabel.save(image, path)


def uid(*parts: object) -> UID:
    """UID derived from a UUID (DICOM PS3.5, B.2), the same for the same parts."""
    return UID(f"2.25.{uuid.uuid5(_UID_NAMESPACE, json.dumps(parts)).int}")


def mr_image(instance: UID, attributes: Mapping[str, Any]) -> Dataset:
    """Return an MR Image Storage instance without pixels: ours in general, then ``attributes``."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = MRImageStorage
    meta.MediaStorageSOPInstanceUID = instance
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = Dataset()
    dataset.file_meta = meta
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.SOPClassUID = MRImageStorage
    dataset.SOPInstanceUID = instance
    _set(dataset, {**_EVERY_MR_IMAGE, **attributes})
    return dataset


@dataclass(frozen=True)
class Grey:
    """How values become 16 bits: value = stored · ``slope`` + ``intercept``."""

    slope: float
    intercept: float = 0.0

    @classmethod
    def of(cls, lowest: float, highest: float) -> Grey:
        """Spread the range over all 65,536 levels."""
        # Rounded to what a decimal string of 16 characters holds, so that readers get it exactly.
        return cls(float(f"{(highest - lowest) / _LARGEST:.8e}") or 1.0, lowest)

    def store(self, dataset: Dataset, image: NDArray[np.floating]) -> None:
        """Set the pixels ``[y, x]`` of ``dataset`` and how to read them."""
        levels = np.rint((image - self.intercept) / self.slope)
        pixels = levels.clip(0, _LARGEST).astype("<u2")
        width = _LARGEST * self.slope
        attributes = {
            "SamplesPerPixel": 1,
            "PhotometricInterpretation": "MONOCHROME2",
            "Rows": pixels.shape[0],
            "Columns": pixels.shape[1],
            "BitsAllocated": 16,
            "BitsStored": 16,
            "HighBit": 15,
            "PixelRepresentation": 0,
            "RescaleSlope": f"{self.slope:.8e}",
            "RescaleIntercept": decimal(self.intercept),
            "RescaleType": "US",  # unspecified: the units are arbitrary
            "WindowCenter": decimal(self.intercept + width / 2),
            "WindowWidth": decimal(max(width, 1e-12)),
            "PixelData": pixels.tobytes(),
        }
        _set(dataset, attributes)


def decimal(value: float) -> str:
    """Decimal string of at most 16 characters."""
    return f"{value:.9g}"


def _set(dataset: Dataset, values: Mapping[str, Any]) -> None:
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
