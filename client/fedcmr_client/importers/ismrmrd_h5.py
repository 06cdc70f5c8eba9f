"""ISMRMRD ``.h5`` files, among them those of OCMR (Chen et al., 2008.03410).

Acquisitions are sorted into images by their headers, which alone are read as a whole; samples are
read image by image. Averages are averaged, reversed readouts turned, asymmetric echoes filled with
zeros in front, and noise measurements become the noise covariance.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import h5py
import ismrmrd
import numpy as np

from fedcmr_client.importers.coverage import check_coverage
from fedcmr_client.importers.interface import ImporterWarning, ImportOptions, build_metadata
from fedcmr_client.importers.ismrmrd_header import (
    header_fields,
    parse_header,
    patient_of,
    pilot_tone,
)
from fedcmr_client.store.scan_file import ScanSource
from fedcmr_shared.errors import DataError

_SUFFIXES: Final = {".h5", ".hdf5", ".mrd"}
_HEADS_PER_READ: Final = 4096


def _bit(flag: int) -> int:
    return 1 << (flag - 1)


_NOISE: Final = _bit(ismrmrd.ACQ_IS_NOISE_MEASUREMENT)
_REVERSED: Final = _bit(ismrmrd.ACQ_IS_REVERSE)
_NOT_IMAGING: Final = (
    _NOISE
    | _bit(ismrmrd.ACQ_IS_PARALLEL_CALIBRATION)
    | _bit(ismrmrd.ACQ_IS_NAVIGATION_DATA)
    | _bit(ismrmrd.ACQ_IS_PHASECORR_DATA)
    | _bit(ismrmrd.ACQ_IS_HPFEEDBACK_DATA)
    | _bit(ismrmrd.ACQ_IS_RTFEEDBACK_DATA)
    | _bit(ismrmrd.ACQ_IS_DUMMYSCAN_DATA)
)


class IsmrmrdImporter:
    """Importer of ISMRMRD files; see the module."""

    name = "ismrmrd"

    def claims(self, path: Path) -> bool:
        """Whether ``path`` is HDF5 with the group ``dataset`` and an XML header."""
        if path.suffix not in _SUFFIXES or not path.is_file():
            return False
        try:
            with h5py.File(path, "r") as file:
                return "dataset/xml" in file
        except (OSError, RuntimeError):  # a damaged file is nobody's
            return False

    def scans(self, path: Path, options: ImportOptions) -> Iterator[ScanSource]:
        """Yield the one scan. Raises DataError for undersampled, 3-D and non-Cartesian data."""
        source = str(path)
        try:
            with h5py.File(path, "r") as file:
                if "dataset/xml" not in file or "dataset/data" not in file:
                    raise DataError(f"{path}: no group `dataset` with `xml` and `data`")
                header = parse_header(file["dataset/xml"][0], source)
                heads = _read_heads(file["dataset/data"])
                plan = _plan(header, heads, source)
                noise = _noise_covariance(file["dataset/data"], heads, plan.coils)
        except (OSError, RuntimeError) as error:
            raise DataError(f"{path}: damaged ISMRMRD file: {error}: copy it again") from error
        fields = {
            **header_fields(header),
            **_geometry(heads[heads["flags"] & _NOT_IMAGING == 0], plan),
            "origin": "measured",
            "source_format": self.name,
            "frames": plan.frames,
            "slices": plan.slices,
            "coils": plan.coils,
            "phase_encodes": plan.phase_encodes,
            "readout_samples": plan.readout,
        }
        yield ScanSource(
            patient=options.patient or patient_of(header) or _patient_from_name(path),
            metadata=build_metadata(fields, options, source),
            images=_Images(path, plan, heads).read,
            noise_covariance=noise,
            source=source,
        )


@dataclass(frozen=True)
class _Plan:
    """Where each acquisition goes: rows of the header table by (frame, slice)."""

    members: dict[tuple[int, int], np.ndarray]
    frames: int
    slices: int
    coils: int
    phase_encodes: int
    readout: int
    line_offset: int
    pilot_tone: bool
    slice_order: tuple[int, ...]


@dataclass(frozen=True)
class _Images:
    path: Path
    plan: _Plan
    heads: np.ndarray

    def read(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield image by image; only the acquisitions of one image are in memory."""
        try:
            with h5py.File(self.path, "r") as file:
                for (frame, slice_), rows in self.plan.members.items():
                    yield frame, slice_, self._gather(file["dataset/data"], rows)
        except (OSError, RuntimeError) as error:
            raise DataError(f"{self.path}: samples cannot be read: {error}") from error

    def _gather(self, data: h5py.Dataset, rows: np.ndarray) -> np.ndarray:
        plan = self.plan
        image = np.zeros((plan.coils, plan.phase_encodes, plan.readout), np.complex64)
        averages = np.zeros(plan.phase_encodes, np.float32)
        for row in rows:
            head = self.heads[row]
            line = int(head["idx"]["kspace_encode_step_1"]) + plan.line_offset
            image[:, line] += self._readout(head, _samples(data, row, head))
            averages[line] += 1
        image /= np.maximum(averages, 1)[:, None]
        return image

    def _readout(self, head: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """One acquisition on the full readout; what was not measured is zero."""
        count = samples.shape[1]
        kept = np.zeros(count, bool)
        kept[int(head["discard_pre"]) : count - int(head["discard_post"])] = True
        if self.plan.pilot_tone:
            # The pilot tone disturbs the first three samples and the last one (OCMR).
            kept[:3] = kept[-1:] = False
        samples = np.where(kept, samples, 0)
        centre = int(head["center_sample"])
        if int(head["flags"]) & _REVERSED:
            samples, centre = samples[:, ::-1], count - 1 - centre
        missing = self.plan.readout - count
        front = missing if 2 * centre < self.plan.readout else 0
        return np.pad(samples, ((0, 0), (front, missing - front)))


def _read_heads(data: h5py.Dataset) -> np.ndarray:
    # Reading one field keeps HDF5 from loading the samples.
    steps = range(0, data.shape[0], _HEADS_PER_READ)
    parts = [data.fields("head")[start : start + _HEADS_PER_READ] for start in steps]
    if not parts:
        raise DataError(f"{data.file.filename}: holds no acquisition")
    return np.concatenate(parts)


def _samples(data: h5py.Dataset, row: int, head: np.ndarray) -> np.ndarray:
    flat = data[int(row)]["data"]
    shape = (int(head["active_channels"]), int(head["number_of_samples"]))
    if flat.size != 2 * shape[0] * shape[1]:
        message = f"has {flat.size} numbers instead of {2 * shape[0] * shape[1]}"
        raise DataError(f"{data.file.filename}: acquisition {row} {message}")
    samples: np.ndarray = flat.view(np.complex64).reshape(shape)
    return samples


def _plan(header: Any, heads: np.ndarray, source: str) -> _Plan:
    rows = np.flatnonzero(heads["flags"] & _NOT_IMAGING == 0)
    if rows.size == 0:
        raise DataError(f"{source}: holds no imaging acquisition")
    imaging = heads[rows]
    _check_geometry(header, imaging, source)
    readout = int(header.encoding[0].encodedSpace.matrixSize.x)
    if imaging["number_of_samples"].max() > readout:
        found = imaging["number_of_samples"].max()
        raise DataError(f"{source}: a readout of {found} samples exceeds the matrix of {readout}")
    phase_encodes, offset = _lines(header, imaging)
    order = _slice_order(imaging)
    members, frames = _sort_rows(imaging, rows, order)
    for (frame, slice_), group in members.items():
        lines = np.zeros(phase_encodes, bool)
        lines[heads[group]["idx"]["kspace_encode_step_1"].astype(int) + offset] = True
        check_coverage(lines, f"{source}: frame {frame}, slice {slice_}")
    if len(members) != frames * len(order):
        found = f"{len(members)} of {frames * len(order)} images"
        raise DataError(f"{source}: undersampled acquisition: only {found} were acquired")
    return _Plan(
        members=members,
        frames=frames,
        slices=len(order),
        coils=int(imaging["active_channels"][0]),
        phase_encodes=phase_encodes,
        readout=readout,
        line_offset=offset,
        pilot_tone=pilot_tone(header),
        slice_order=order,
    )


def _check_geometry(header: Any, imaging: np.ndarray, source: str) -> None:
    trajectory = str(header.encoding[0].trajectory.value).lower()
    if trajectory != "cartesian":
        raise DataError(f"{source}: the trajectory is {trajectory}: only Cartesian data are read")
    if imaging["idx"]["kspace_encode_step_2"].any():
        raise DataError(f"{source}: 3-D encoding: only stacks of 2-D slices are read")
    if len(np.unique(imaging["active_channels"])) != 1:
        raise DataError(f"{source}: the number of coils changes between acquisitions")


def _lines(header: Any, imaging: np.ndarray) -> tuple[int, int]:
    """Number of phase encodes and the shift that puts the centre of k-space in the middle.

    Partial Fourier acquisitions count from their first line, so their centre is off the middle.
    """
    limits = header.encoding[0].encodingLimits
    limit = limits.kspace_encoding_step_1 if limits is not None else None
    acquired = int(imaging["idx"]["kspace_encode_step_1"].max()) + 1
    count = max(acquired, int(limit.maximum) + 1) if limit is not None else acquired
    centre = int(limit.center) if limit is not None else count // 2
    if centre == count // 2 or not 0 < centre < count:
        return count, 0
    half = max(centre, count - centre)
    return 2 * half, half - centre


def _slice_order(imaging: np.ndarray) -> tuple[int, ...]:
    """Slice counters in spatial order, where the headers have positions."""
    counters = imaging["idx"]["slice"]
    first = {int(n): imaging[counters == n][0] for n in np.unique(counters)}
    height = {n: float(np.dot(head["position"], head["slice_dir"])) for n, head in first.items()}
    return tuple(sorted(first, key=lambda n: (height[n], n)))


def _sort_rows(
    imaging: np.ndarray, rows: np.ndarray, order: tuple[int, ...]
) -> tuple[dict[tuple[int, int], np.ndarray], int]:
    idx = imaging["idx"]
    keys = list(zip(idx["contrast"], idx["set"], idx["repetition"], idx["phase"], strict=True))
    frame_of = {key: frame for frame, key in enumerate(sorted(set(keys)))}
    slice_of = {counter: position for position, counter in enumerate(order)}
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row, key, counter in zip(rows, keys, idx["slice"], strict=True):
        groups[frame_of[key], slice_of[int(counter)]].append(int(row))
    return {place: np.array(group) for place, group in sorted(groups.items())}, len(frame_of)


def _geometry(imaging: np.ndarray, plan: _Plan) -> dict[str, Any]:
    counters = imaging["idx"]["slice"]
    first = [imaging[counters == n][0] for n in plan.slice_order]
    heights = [float(np.dot(head["position"], head["slice_dir"])) for head in first]
    pitch = float(np.median(np.diff(heights))) if len(heights) > 1 else 0.0
    return {"slice_pitch_mm": pitch, "spacing_source": "header"} if pitch > 0 else {}


def _noise_covariance(data: h5py.Dataset, heads: np.ndarray, coils: int) -> np.ndarray | None:
    """Sample covariance E[n n^H] over all noise measurements with the imaging coils."""
    total, count = np.zeros((coils, coils), np.complex128), 0
    for row in np.flatnonzero(heads["flags"] & _NOISE):
        if heads[row]["active_channels"] == coils:
            noise = _samples(data, int(row), heads[row]).astype(np.complex128)
            total += noise @ noise.conj().T
            count += noise.shape[1]
    return (total / count).astype(np.complex64) if count else None


def _patient_from_name(path: Path) -> str:
    message = f"no patient in the header: the file name stands for the patient {path.stem!r}"
    advice = "map all files of one patient with --patient-map"
    warnings.warn(f"{path}: {message}; {advice}", ImporterWarning, stacklevel=3)
    return path.stem
