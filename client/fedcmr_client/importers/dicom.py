"""Cine series in DICOM folders, with Sunnybrook contours where they exist.

One scan per SeriesInstanceUID. Slices are ordered by ImagePositionPatient along the slice normal
(SliceLocation is wrong in some public data), frames by TriggerTime or, without it, InstanceNumber.
Of the patient only PatientID is read, as the name that becomes a pseudonym.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError

from fedcmr_client.importers import wording
from fedcmr_client.importers.contours import (
    Contour,
    on_grid,
    read_contours,
    truth_from_contours,
)
from fedcmr_client.importers.interface import (
    ImporterWarning,
    ImportOptions,
    Refusal,
    build_metadata,
    calendar_day,
    positive,
)
from fedcmr_client.importers.synthesis import MagnitudeStack, Synthesis, acquired_matrix
from fedcmr_client.store.scan_file import ScanSource, Truth
from fedcmr_shared.errors import DataError

_VENDORS: Final = {"GE MEDICAL SYSTEMS": "GE", "Philips Medical Systems": "Philips"}
_POSITION_TOLERANCE_MM: Final = 0.1
# pydicom raises any of these for files that are cut off or inconsistent.
_DICOM_ERRORS: Final = (
    InvalidDicomError,
    OSError,
    EOFError,
    AttributeError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


class DicomImporter:
    """Importer of folders with DICOM files; see the module."""

    name = "dicom"

    def claims(self, path: Path) -> bool:
        """Whether ``path`` is a DICOM file, or a folder with one directly in it."""
        if path.is_dir():
            return any(_is_dicom(file) for file in path.iterdir())
        return _is_dicom(path)

    def scans(self, path: Path, options: ImportOptions) -> Iterator[ScanSource | Refusal]:
        """Yield one scan per series, or a Refusal; DataError when nothing here is DICOM."""
        found = sorted(path.iterdir()) if path.is_dir() else [path]
        files = [file for file in found if _is_dicom(file)]
        if not files:
            raise DataError(f"{path}: no DICOM file (none has the letters DICM at byte 128)")
        folder = path if path.is_dir() else path.parent
        series, refused = _group(files)
        yield from refused
        for images in series.values():
            source = str(path) if len(series) == 1 else f"{path} (series {images[0].number})"
            try:
                scan: ScanSource | Refusal = _Series(images, folder, source, options).scan()
            except DataError as error:
                scan = Refusal(source, error)
            yield scan


@dataclass(frozen=True)
class _Image:
    """Header of one file, without anything about the patient but ``header.PatientID``."""

    path: Path
    header: pydicom.Dataset

    @property
    def number(self) -> str:
        return str(self.header.get("SeriesNumber") or "without number")

    @property
    def instance(self) -> int:
        return int(self.header.get("InstanceNumber") or 0)

    @property
    def trigger(self) -> float | None:
        time = self.header.get("TriggerTime")
        return None if time is None else float(time)

    @property
    def height(self) -> float:
        """Position along the slice normal in mm."""
        direction = np.array(self.header.ImageOrientationPatient, float)
        normal = np.cross(direction[:3], direction[3:])
        return float(normal @ np.array(self.header.ImagePositionPatient, float))


class _Series:
    def __init__(
        self, images: list[_Image], folder: Path, source: str, options: ImportOptions
    ) -> None:
        self._folder, self._source, self._options = folder, source, options
        self._grid = _arrange(images, source)
        self._header = self._grid[0][0].header
        self._shape = (int(self._header.Rows), int(self._header.Columns))
        # ROW: phase encoding runs along a row; the phase axis must become the first one.
        self._transposed = self._header.get("InPlanePhaseEncodingDirection") == "ROW"

    def scan(self) -> ScanSource:
        options, stored = self._options, self._oriented(self._shape)
        matrix = _matrix(self._header, stored, options, self._source)
        frames, slices = len(self._grid), len(self._grid[0])
        stack = MagnitudeStack(frames, slices, matrix, self._pixels, self._source)
        synthesis = Synthesis(stack, options)
        fields = {
            **_header_fields(self._header),
            **self._spacing(matrix),
            "origin": "synthesised",
            "source_format": DicomImporter.name,
            "frames": frames,
            "slices": slices,
            "coils": options.coils,
            "phase_encodes": matrix[0],
            "readout_samples": matrix[1],
            "frame_times_ms": self._times(),
        }
        patient = options.patient or str(self._header.get("PatientID") or "")
        if not patient:
            raise DataError(f"{self._source}: PatientID is empty: use --patient")
        truth = self._truth(patient)
        return ScanSource(
            patient=patient,
            metadata=build_metadata(fields, options, self._source),
            images=synthesis.images,
            truth=on_grid(truth, matrix, transposed=self._transposed) if truth else None,
            noise_covariance=synthesis.noise_covariance,
            source=self._source,
        )

    def _pixels(self, frame: int, slice_: int) -> np.ndarray:
        path = self._grid[frame][slice_].path
        try:
            pixels = pydicom.dcmread(path).pixel_array
        except _DICOM_ERRORS as error:
            raise DataError(f"{path}: pixels cannot be read ({type(error).__name__})") from error
        if pixels.shape != self._shape:
            raise DataError(f"{path}: pixels have shape {list(pixels.shape)}, not one grey image")
        # Signed storage leaves a few negative values after interpolation.
        image = np.maximum(pixels.astype(np.float32), 0)
        return image.T if self._transposed else image

    def _oriented(self, pair: tuple[Any, Any]) -> tuple[Any, Any]:
        return (pair[1], pair[0]) if self._transposed else pair

    def _spacing(self, matrix: tuple[int, int]) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "slice_thickness_mm": positive(self._header.get("SliceThickness"))
        }
        spacing = [positive(value) for value in self._header.get("PixelSpacing") or ()]
        if len(spacing) == 2 and spacing[0] and spacing[1]:
            stored = self._oriented(self._shape)
            pixel = self._oriented((spacing[0], spacing[1]))
            fields["pixel_spacing_mm"] = tuple(
                s * old / new for s, old, new in zip(pixel, stored, matrix, strict=True)
            )
        fields["slice_pitch_mm"] = self._pitch()
        if any(fields.values()):
            fields["spacing_source"] = "header"
        return fields

    def _pitch(self) -> float | None:
        heights = [image.height for image in self._grid[0]]
        return float(np.median(np.diff(heights))) if len(heights) > 1 else None

    def _times(self) -> tuple[float, ...] | None:
        times = [row[0].trigger for row in self._grid]
        known = tuple(time for time in times if time is not None)
        return known if len(known) == len(times) else None

    def _truth(self, patient: str) -> Truth | None:
        folder = _contour_folder(self._folder, patient, self._options)
        if folder is None:
            return None
        endo, epi = read_contours(folder)
        place = {
            image.instance: (frame, slice_)
            for frame, row in enumerate(self._grid)
            for slice_, image in enumerate(row)
        }
        strays = sorted((set(endo) | set(epi)) - set(place))
        if strays:
            raise DataError(f"{folder}: a contour is for instance {strays[0]}, not in the series")
        spacing = [positive(value) for value in self._header.get("PixelSpacing") or ()]
        pitch = self._pitch() or positive(self._header.get("SpacingBetweenSlices"))
        voxel = None
        if len(spacing) == 2 and spacing[0] and spacing[1] and pitch:
            voxel = (spacing[0] * spacing[1], pitch)
        return truth_from_contours(
            [Contour(*place[number], points) for number, points in endo.items()],
            [Contour(*place[number], points) for number, points in epi.items()],
            (len(self._grid), len(self._grid[0]), *self._shape),
            voxel,
        )


def _is_dicom(path: Path) -> bool:
    # A DICOMDIR is an index of other files.
    if not path.is_file() or path.name == "DICOMDIR":
        return False
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


_WANTED: Final = [
    "SOPClassUID",
    "Modality",
    "AcquisitionDate",
    "StudyDate",
    "Manufacturer",
    "ManufacturerModelName",
    "MagneticFieldStrength",
    "PatientID",
    "SeriesInstanceUID",
    "SeriesNumber",
    "SeriesDescription",
    "InstanceNumber",
    "TriggerTime",
    "HeartRate",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SliceThickness",
    "SpacingBetweenSlices",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "AcquisitionMatrix",
    "InPlanePhaseEncodingDirection",
    "PercentSampling",
    "RepetitionTime",
    "EchoTime",
    "FlipAngle",
]
_REQUIRED: Final = (
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "Rows",
    "Columns",
)


def _group(files: list[Path]) -> tuple[dict[str, list[_Image]], list[Refusal]]:
    """Files by series. A series with an unusable file is refused as a whole.

    A file that cannot be read may belong to any series, so then none is left.
    """
    series: dict[str, list[_Image]] = defaultdict(list)
    refused: dict[str, Refusal] = {}
    for file in files:
        try:
            image = _Image(file, _read_header(file))
        except DataError as error:
            message = f"{error}: copy it again; until then no series of its folder is imported"
            return {}, [*refused.values(), Refusal(str(file), DataError(message))]
        uid = str(image.header.get("SeriesInstanceUID"))
        try:
            _check_header(image)
        except DataError as error:
            refused.setdefault(uid, Refusal(str(file), error))
        else:
            series[uid].append(image)
    good = {uid: images for uid, images in series.items() if uid not in refused}
    return good, list(refused.values())


def _read_header(path: Path) -> pydicom.Dataset:
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_WANTED))
        # Values are parsed on access: what is damaged must show here.
        for name in _WANTED:
            header.get(name)
    except _DICOM_ERRORS as error:
        # The message may quote header values, so only its kind is repeated.
        raise DataError(f"{path}: damaged DICOM file ({type(error).__name__})") from error
    if not header.get("SeriesInstanceUID"):
        raise DataError(f"{path}: damaged DICOM file (no SeriesInstanceUID)")
    return header


def _check_header(image: _Image) -> None:
    header = image.header
    if header.get("Modality") != "MR":
        raise DataError(f"{image.path}: Modality is {header.get('Modality')}, not MR")
    if (header.get("NumberOfFrames") or 1) != 1:
        message = "enhanced (multi-frame) DICOM: convert it to one file per image"
        raise DataError(f"{image.path}: {message}")
    absent = [name for name in _REQUIRED if header.get(name) is None]
    if absent:
        raise DataError(f"{image.path}: {absent[0]} is missing")


def _arrange(images: list[_Image], source: str) -> list[list[_Image]]:
    """Images as [frame][slice]; DataError unless every slice has the same number of frames."""
    if len({(image.header.Rows, image.header.Columns) for image in images}) != 1:
        raise DataError(f"{source}: the images of the series differ in size")
    slices: list[list[_Image]] = []
    for image in sorted(images, key=lambda image: (image.height, image.instance)):
        if slices and image.height - slices[-1][0].height < _POSITION_TOLERANCE_MM:
            slices[-1].append(image)
        else:
            slices.append([image])
    counts = sorted({len(slice_) for slice_ in slices})
    if len(counts) != 1:
        found = f"{counts[0]} to {counts[-1]} frames per slice"
        raise DataError(f"{source}: {found}: images are missing or several series are mixed")
    timed = all(image.trigger is not None for image in images)
    for slice_ in slices:
        slice_.sort(key=lambda i: (i.trigger if timed and i.trigger is not None else 0, i.instance))
    return [list(frame) for frame in zip(*slices, strict=True)]


def _matrix(
    header: pydicom.Dataset, stored: tuple[int, int], options: ImportOptions, source: str
) -> tuple[int, int]:
    """Acquired (phase, readout) size: AcquisitionMatrix times PercentSampling of its phase part."""
    numbers = [int(n) for n in header.get("AcquisitionMatrix") or ()]
    if len(numbers) == 4 and max(numbers[:2]) > 0 and max(numbers[2:]) > 0:
        share = min((positive(header.get("PercentSampling")) or 100.0) / 100, 1.0)
        acquired = (max(numbers[2:]) * share, max(numbers[:2]))
        fraction = tuple(min(n / size, 1.0) for n, size in zip(acquired, stored, strict=True))
        return acquired_matrix(stored, (fraction[0], fraction[1]))
    message = f"no AcquisitionMatrix: {options.acquired_fraction} of the matrix counts as acquired"
    warnings.warn(f"{source}: {message}", ImporterWarning, stacklevel=4)
    return acquired_matrix(stored, options.acquired_fraction)


def _header_fields(header: pydicom.Dataset) -> dict[str, Any]:
    maker = str(header.get("Manufacturer") or "")
    vendor = _VENDORS.get(maker) or wording.vendor(maker)
    description = str(header.get("SeriesDescription") or "")
    return {
        # The description itself is free text and may name the patient: only known words pass.
        "modality": wording.modality(description),
        "view": wording.view(description),
        "vendor": vendor,
        "scanner": wording.scanner(str(header.get("ManufacturerModelName") or ""), vendor),
        "field_strength_t": wording.nominal_field(
            positive(header.get("MagneticFieldStrength")) or 0
        ),
        "repetition_time_ms": positive(header.get("RepetitionTime")),
        "echo_time_ms": positive(header.get("EchoTime")),
        "flip_angle_deg": positive(header.get("FlipAngle")),
        "heart_rate_bpm": positive(header.get("HeartRate")),
        "acquired_on": calendar_day(header.get("AcquisitionDate"))
        or calendar_day(header.get("StudyDate")),
    }


def _contour_folder(folder: Path, patient: str, options: ImportOptions) -> Path | None:
    """Contours inside ``folder``, or beside it under the patient's name."""
    inside = sorted(path for path in folder.glob("contours*") if path.is_dir())
    if inside:
        return inside[0]
    for name in (options.canonical(patient), patient, folder.name):
        beside = folder.parent / f"contours-{name}"
        if beside.is_dir():
            return beside
    others = sorted(path.name for path in folder.parent.glob("contours-*") if path.is_dir())
    if others:
        message = f"{others[0]} is not used: no --patient-map entry leads to that name"
        warnings.warn(f"{folder}: {message}", ImporterWarning, stacklevel=5)
    return None
