"""fastMRI files, and the training files of CardioMM, which reuse their layout.

fastMRI: ``kspace`` [slice, coil, readout, phase] with an ISMRMRD header as text. CardioMM
(2512.21652): ``kspace`` [nt * nz, coil, readout, phase] with vendor, modality and so on as
attributes; ``shape`` is that of the original array (nt, nz, nc, ny, nx).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np

from fedcmr_client.importers import wording
from fedcmr_client.importers.coverage import check_image
from fedcmr_client.importers.interface import ImportOptions, build_metadata
from fedcmr_client.importers.ismrmrd_header import header_fields, parse_header
from fedcmr_client.store.scan_file import ScanSource
from fedcmr_shared.errors import DataError

_SUFFIXES: Final = {".h5", ".hdf5"}


class FastMRIImporter:
    """Importer of fastMRI-style ``.h5`` files; see the module."""

    name = "fastmri"

    def claims(self, path: Path) -> bool:
        """Whether ``path`` is HDF5 with ``kspace`` at its root, but not a scan of a site store."""
        if path.suffix not in _SUFFIXES or not path.is_file():
            return False
        try:
            with h5py.File(path, "r") as file:
                return "kspace" in file and "fedcmr_format" not in file.attrs
        except (OSError, RuntimeError):  # a damaged file is nobody's
            return False

    def scans(self, path: Path, options: ImportOptions) -> Iterator[ScanSource]:
        """Yield the one scan. Raises DataError when it is undersampled or of another layout."""
        try:
            with h5py.File(path, "r") as file:
                array, fields, patient = _describe(path, file)
        except (OSError, RuntimeError) as error:
            raise DataError(f"{path}: damaged HDF5 file: {error}: copy it again") from error
        name = options.patient or patient
        if not name:
            raise DataError(f"{path}: attribute patient_id is absent: use --patient")
        fields = {**fields, "origin": "measured", "source_format": self.name}
        metadata = build_metadata(fields, options, str(path))
        yield ScanSource(name, metadata, array.images, source=str(path))


@dataclass(frozen=True)
class _Array:
    path: Path
    slices: int

    def images(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield all images, turned to [coil, phase, readout]."""
        try:
            with h5py.File(self.path, "r") as file:
                dataset = file["kspace"]
                for index in range(dataset.shape[0]):
                    image = np.ascontiguousarray(dataset[index].swapaxes(-1, -2), np.complex64)
                    frame, slice_ = divmod(index, self.slices)
                    check_image(image, f"{self.path}: frame {frame}, slice {slice_}")
                    yield frame, slice_, image
        except (OSError, RuntimeError) as error:
            raise DataError(f"{self.path}: kspace cannot be read: {error}") from error


def _describe(path: Path, file: h5py.File) -> tuple[_Array, dict[str, Any], str]:
    dataset = file.get("kspace")
    if not isinstance(dataset, h5py.Dataset) or dataset.ndim != 4 or dataset.dtype.kind != "c":
        found = f"{dataset.dtype} {list(dataset.shape)}" if isinstance(dataset, h5py.Dataset) else 0
        message = f"kspace is {found or 'absent'}, expected complex (slices, coils, H, W)"
        raise DataError(f"{path}: {message}")
    if "mask" in file:
        raise DataError(f"{path}: undersampled acquisition (it has a mask): use the training set")
    count, coils, readout, phase = dataset.shape
    if coils > 64:
        raise DataError(f"{path}: coil axis of {coils} is improbable: wrong dimension order")
    frames, slices = _frames(path, file, count)
    if "ismrmrd_header" in file:
        header = file["ismrmrd_header"][()]
        fields = header_fields(parse_header(header, str(path)))
    else:
        fields = _attribute_fields(file.attrs)
    fields |= {
        "frames": frames,
        "slices": slices,
        "coils": coils,
        "phase_encodes": phase,
        "readout_samples": readout,
    }
    if "acquisition" in file.attrs and fields.get("modality") is None:
        fields["modality"] = wording.modality(_text(file.attrs["acquisition"]))
    return _Array(path, slices), fields, _text(file.attrs.get("patient_id", ""))


def _frames(path: Path, file: h5py.File, count: int) -> tuple[int, int]:
    original = file.attrs.get("shape")
    if original is None:
        return 1, count
    shape = [int(n) for n in np.ravel(original)]
    frames, slices = (shape[0], shape[1]) if len(shape) == 5 else (1, shape[0])
    if frames * slices != count:
        message = f"attribute shape {shape} does not fit {count} images"
        raise DataError(f"{path}: {message}: expected (nt, nz, nc, ny, nx)")
    return frames, slices


def _attribute_fields(attributes: h5py.AttributeManager) -> dict[str, Any]:
    text = {name: _text(attributes[name]) for name in attributes}
    vendor = wording.vendor(text.get("vendor", ""))
    return {
        "vendor": vendor,
        "scanner": wording.scanner(text.get("scanner", ""), vendor),
        "field_strength_t": wording.field_strength(text.get("field", "")),
        "modality": wording.spelled(text.get("modality", "")),
        "view": wording.spelled(text.get("view", "")),
        "life_span": wording.spelled(text.get("lifespan", "")),
        "centre": text.get("center") or None,
    }


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
