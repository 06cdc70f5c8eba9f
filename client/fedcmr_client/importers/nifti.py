"""Cine NIfTI files: (x, y, slice, frame), or (x, y, slice) for one frame.

A label map ``<name>_gt`` or ``<name>_seg`` beside the image is used when the user says what its
values mean, since public data sets number the ventricles differently. The patient is the part of
the file name before the first underscore.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.wrapstruct import WrapStructError

from fedcmr_client.importers import wording
from fedcmr_client.importers.contours import LABEL_NAMES, on_grid, truth_from_labels
from fedcmr_client.importers.interface import (
    ImporterWarning,
    ImportOptions,
    build_metadata,
    positive,
)
from fedcmr_client.importers.synthesis import MagnitudeStack, Synthesis, acquired_matrix
from fedcmr_client.store.scan_file import ScanSource, Truth
from fedcmr_shared.errors import DataError

_ENDINGS: Final = (".nii.gz", ".nii")
_LABEL_ENDINGS: Final = ("_gt", "_seg")
_ERRORS: Final = (ImageFileError, WrapStructError, OSError, EOFError, ValueError, zlib.error)


def is_label_map(path: Path) -> bool:
    """Whether the name is that of a label map beside an image."""
    return path.name.endswith(_ENDINGS) and _stem(path).endswith(_LABEL_ENDINGS)


class NiftiImporter:
    """Importer of ``.nii`` and ``.nii.gz`` files; see the module."""

    name = "nifti"

    def claims(self, path: Path) -> bool:
        """Whether ``path`` is named as NIfTI and is not a label map."""
        return path.is_file() and path.name.endswith(_ENDINGS) and not is_label_map(path)

    def scans(self, path: Path, options: ImportOptions) -> Iterator[ScanSource]:
        """Yield the one scan. Raises DataError for complex, RGB, empty and damaged files."""
        source = str(path)
        pixels, zooms = _read(path)
        stored = (pixels.shape[2], pixels.shape[3])
        matrix = acquired_matrix(stored, options.acquired_fraction)
        stack = MagnitudeStack(
            pixels.shape[0], pixels.shape[1], matrix, lambda t, z: pixels[t, z], source
        )
        synthesis = Synthesis(stack, options)
        fields: dict[str, Any] = {
            "modality": wording.modality(_stem(path)),
            "view": wording.view(_stem(path)),
            "origin": "synthesised",
            "source_format": self.name,
            "frames": stack.frames,
            "slices": stack.slices,
            "coils": options.coils,
            "phase_encodes": matrix[0],
            "readout_samples": matrix[1],
            "slice_pitch_mm": zooms[2],
        }
        voxel = None
        if zooms[0] and zooms[1]:
            fields["pixel_spacing_mm"] = (
                zooms[1] * stored[0] / matrix[0],
                zooms[0] * stored[1] / matrix[1],
            )
            fields["spacing_source"] = "header"
            voxel = (zooms[0] * zooms[1], zooms[2]) if zooms[2] else None
        truth = _truth(path, pixels.shape, voxel, options)
        yield ScanSource(
            patient=options.patient or _stem(path).split("_")[0],
            metadata=build_metadata(fields, options, source),
            images=synthesis.images,
            truth=on_grid(truth, matrix) if truth else None,
            noise_covariance=synthesis.noise_covariance,
            source=source,
        )


def _read(path: Path) -> tuple[np.ndarray, tuple[float | None, float | None, float | None]]:
    """Array [frame, slice, y, x] and the spacing along x, y and slice in mm."""
    try:
        image: Any = nibabel.load(path)
        array = np.asanyarray(image.dataobj)
        zooms = [positive(value) for value in image.header.get_zooms()[:3]]
    except _ERRORS as error:
        raise DataError(f"{path}: damaged NIfTI file: {error}: copy it again") from error
    if array.dtype.kind not in "iuf":
        raise DataError(f"{path}: values are {array.dtype}, not magnitudes")
    if array.ndim not in {3, 4} or 0 in array.shape:
        shape = list(array.shape)
        raise DataError(f"{path}: has shape {shape}, expected (x, y, slice[, frame])")
    if array.ndim == 3:
        array = array[..., None]
    return array.transpose(3, 2, 1, 0), (zooms[0], zooms[1], zooms[2])


def _truth(
    path: Path,
    shape: tuple[int, ...],
    voxel: tuple[float, float] | None,
    options: ImportOptions,
) -> Truth | None:
    stem, ending = _stem(path), path.name[len(_stem(path)) :]
    candidates = [path.with_name(f"{stem}{suffix}{ending}") for suffix in _LABEL_ENDINGS]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        return None
    if not options.label_names:
        message = f"{found.name} is not used: say what its values mean with label names"
        warnings.warn(f"{path}: {message}", ImporterWarning, stacklevel=3)
        return None
    labels, _ = _read(found)
    if labels.shape != shape:
        seen = f"{list(labels.shape)}, the image {list(shape)}"
        raise DataError(f"{found}: labels have shape {seen} (frame, slice, y, x)")
    return truth_from_labels(_renumber(labels, found, options.label_names), voxel)


def _renumber(labels: np.ndarray, path: Path, names: tuple[str, ...]) -> np.ndarray:
    """Labels with the numbers of LABEL_NAMES; mapped by name, never by number."""
    unknown = [name for name in names if name not in LABEL_NAMES]
    if unknown:
        raise DataError(f"{path}: label {unknown[0]!r} is unknown: use {', '.join(LABEL_NAMES)}")
    values = np.unique(labels)
    if values.min() < 0 or values.max() >= len(names) or (values != values.astype(int)).any():
        raise DataError(f"{path}: label {values.max():g} has no name among {', '.join(names)}")
    table = np.array([LABEL_NAMES.index(name) for name in names], np.uint8)
    renumbered: np.ndarray = table[labels.astype(int)]
    return renumbered


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")
