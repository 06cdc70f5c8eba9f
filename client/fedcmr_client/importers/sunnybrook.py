"""Sunnybrook Cardiac Data repacked as ``.npz`` (Radau et al., The MIDAS Journal, 2009).

Two layouts: ``cine`` [slice, frame, row, column] with polygons, and the contoured end-diastolic
and end-systolic images only (``image`` [n, row, column]) with masks and without pixel spacing.
"""

from __future__ import annotations

import ast
import json
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from fedcmr_client.importers import wording
from fedcmr_client.importers.contours import (
    LABEL_NAMES,
    Contour,
    on_grid,
    phenotypes,
    truth_from_contours,
)
from fedcmr_client.importers.interface import (
    ImporterWarning,
    ImportOptions,
    build_metadata,
    positive,
)
from fedcmr_client.importers.synthesis import MagnitudeStack, Synthesis, acquired_matrix
from fedcmr_client.store.scan_file import ScanSource, Truth
from fedcmr_shared.errors import DataError

_ERRORS: Final = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error)
_Arrays = Mapping[str, Any]


class SunnybrookImporter:
    """Importer of the ``.npz`` files; see the module."""

    name = "sunnybrook"

    def claims(self, path: Path) -> bool:
        """Whether ``path`` is an ``.npz`` with Sunnybrook arrays."""
        if path.suffix != ".npz" or not path.is_file():
            return False
        try:
            with zipfile.ZipFile(path) as archive:
                names = set(archive.namelist())
        except (OSError, zipfile.BadZipFile):  # a damaged file is nobody's
            return False
        return "meta_json.npy" in names and bool(names & {"cine.npy", "endo_mask.npy"})

    def scans(self, path: Path, options: ImportOptions) -> Iterator[ScanSource]:
        """Yield the one scan. Raises DataError when an array is missing, damaged or misfit."""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays: dict[str, Any] = {name: file[name] for name in file.files}
            notes = json.loads(str(arrays["meta_json"]))
            stored = _cine(arrays) if "cine" in arrays else _contoured(arrays)
            scan = _scan(path, arrays, notes, stored, options)
        except _ERRORS as error:
            raise DataError(f"{path}: damaged or incomplete file: {error}") from error
        yield scan


def _scan(
    path: Path,
    arrays: _Arrays,
    notes: Mapping[str, Any],
    stored: tuple[np.ndarray, Truth],
    options: ImportOptions,
) -> ScanSource:
    pixels, truth = stored
    header: Mapping[str, str] = notes.get("dicom", {})
    transposed = header.get("InPlanePhaseEncodingDirection") == "ROW"
    if transposed:
        pixels = pixels.swapaxes(-1, -2)
    frames, slices, *size = pixels.shape
    matrix = _matrix(path, header, (size[0], size[1]), options)
    stack = MagnitudeStack(frames, slices, matrix, lambda t, z: pixels[t, z], str(path))
    synthesis = Synthesis(stack, options)
    vendor = "GE" if header else None
    fields: dict[str, Any] = {
        "modality": "cine",
        "view": "short-axis",
        "vendor": vendor,
        "scanner": wording.scanner(header.get("ManufacturerModelName", ""), vendor),
        "field_strength_t": positive(header.get("MagneticFieldStrength")),
        "repetition_time_ms": positive(header.get("RepetitionTime")),
        "echo_time_ms": positive(header.get("EchoTime")),
        "flip_angle_deg": positive(header.get("FlipAngle")),
        **_geometry(arrays, (size[0], size[1]), matrix, transposed=transposed),
        "origin": "synthesised",
        "source_format": SunnybrookImporter.name,
        "frames": frames,
        "slices": slices,
        "coils": options.coils,
        "phase_encodes": matrix[0],
        "readout_samples": matrix[1],
    }
    return ScanSource(
        patient=options.patient or str(notes["patient"]),
        metadata=build_metadata(fields, options, str(path)),
        images=synthesis.images,
        truth=on_grid(truth, matrix, transposed=transposed),
        noise_covariance=synthesis.noise_covariance,
        source=str(path),
    )


def _cine(arrays: _Arrays) -> tuple[np.ndarray, Truth]:
    cine, present = arrays["cine"], arrays["present"]
    # Ascending along the normal, as the DICOM importer orders slices: copies are then recognised.
    heights = arrays["slice_position_mm"]
    order = np.argsort(heights, kind="stable")
    complete = order[present.all(axis=1)[order]]
    if cine.ndim != 4 or complete.size == 0:
        raise ValueError("cine holds no slice with all its frames")
    position = {int(old): new for new, old in enumerate(complete)}
    pixels = np.maximum(cine[complete].swapaxes(0, 1), 0)
    area = float(np.prod(arrays["pixel_spacing_mm"]))
    truth = truth_from_contours(
        _polygons(arrays, "endo", position),
        _polygons(arrays, "epi", position),
        (pixels.shape[0], pixels.shape[1], pixels.shape[2], pixels.shape[3]),
        (area, float(arrays["slice_pitch_mm"])),
    )
    return pixels, truth


def _polygons(arrays: _Arrays, kind: str, position: Mapping[int, int]) -> Iterator[Contour]:
    offsets = arrays[f"{kind}_offsets"]
    for index, (slice_, frame) in enumerate(arrays[f"{kind}_slice_frame"]):
        if int(slice_) in position:
            points = arrays[f"{kind}_points"][offsets[index] : offsets[index + 1]]
            yield Contour(int(frame), position[int(slice_)], points)


def _contoured(arrays: _Arrays) -> tuple[np.ndarray, Truth]:
    """Frames (end diastole, end systole) of the slices that have both; grey values as stored."""
    slices, frames = arrays["slice_guess"], arrays["frame_guess"]
    wanted = (int(arrays["ed_frame"]), int(arrays["es_frame"]))
    index = {(int(f), int(s)): i for i, (f, s) in enumerate(zip(frames, slices, strict=True))}
    both = [int(s) for s in np.unique(slices) if all((frame, int(s)) in index for frame in wanted)]
    if not both:
        raise ValueError("no slice is contoured at end diastole and end systole")
    order = np.array([[index[frame, s] for s in both] for frame in wanted])
    endo, epi = arrays["endo_mask"][order], arrays["epi_mask"][order]
    labels = np.where(endo, 1, np.where(epi, 2, 0)).astype(np.uint8)
    # Basal slices often hold a cavity at end diastole only: volumes need every contour.
    areas = {frame: float(arrays["endo_mask"][frames == frame].sum()) for frame in wanted}
    cavity = {position: areas[frame] for position, frame in enumerate(wanted)}
    truth = Truth(phenotypes(cavity, {}, None), labels, LABEL_NAMES)
    return arrays["image"][order], truth


def _matrix(
    path: Path, header: Mapping[str, str], stored: tuple[int, int], options: ImportOptions
) -> tuple[int, int]:
    if "AcquisitionMatrix" not in header:
        part = options.acquired_fraction
        message = f"no AcquisitionMatrix: {part} of the matrix counts as acquired"
        warnings.warn(f"{path}: {message}", ImporterWarning, stacklevel=4)
        return acquired_matrix(stored, part)
    numbers = [int(n) for n in ast.literal_eval(header["AcquisitionMatrix"])]
    share = min((positive(header.get("PercentSampling")) or 100.0) / 100, 1.0)
    phase = min(max(numbers[2:]) * share / stored[0], 1.0)
    return acquired_matrix(stored, (phase, min(max(numbers[:2]) / stored[1], 1.0)))


def _geometry(
    arrays: _Arrays, stored: tuple[int, int], matrix: tuple[int, int], *, transposed: bool
) -> dict[str, Any]:
    if "pixel_spacing_mm" not in arrays:
        return {}
    spacing = arrays["pixel_spacing_mm"].astype(float)
    phase, readout = spacing[::-1] if transposed else spacing
    pixel = (phase * stored[0] / matrix[0], readout * stored[1] / matrix[1])
    times = np.nanmean(arrays["trigger_ms"], axis=0)
    return {
        "pixel_spacing_mm": pixel,
        "slice_thickness_mm": positive(arrays["slice_thickness_mm"]),
        "slice_pitch_mm": positive(arrays["slice_pitch_mm"]),
        "spacing_source": "header",
        "heart_rate_bpm": positive(np.nanmean(arrays["heart_rate"])),
        "frame_times_ms": tuple(float(time) for time in times),
    }
