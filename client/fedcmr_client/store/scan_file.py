"""One scan as one HDF5 file: written once, atomically, and never changed afterwards.

Layout (format 1)::

    /                   attributes fedcmr_format="1", metadata (JSON), digest (hexadecimal)
    /kspace             complex64 [frame, slice, coil, phase, readout], one chunk per image
    /noise_covariance   complex64 [coil, coil], optional
    /truth              optional group, attributes phenotypes (JSON) and label_names (JSON)
    /truth/labels       uint8 [frame, slice, y, x], optional

Images pass through memory one at a time. A file appears under its final name only when it is
complete and on the disk; whatever goes wrong before that leaves nothing behind.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import h5py
import numpy as np
from pydantic import ValidationError

from fedcmr_shared.errors import DataError
from fedcmr_shared.schemas.acquisition import AcquisitionMetadata, UnknownVocabularyWarning

FORMAT: Final = "1"
PARTIAL_SUFFIX: Final = ".partial"
"""Ending of the hidden files that hold a scan while it is being written."""

# Format 1.10 indexes equal-sized chunks by arithmetic and allows attributes above 64 KiB.
_LIBVER: Final = ("v110", "v110")
_RESERVE_MARGIN: Final = 2**17
_FULL: Final = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


@dataclass(frozen=True)
class Truth:
    """What is known about the heart in a scan: exact for a phantom, by an expert otherwise.

    ``labels`` is uint8 ``[frame, slice, y, x]`` on the grid after removal of readout
    oversampling; a value is an index into ``label_names``, whose entry 0 is the background.
    ``phenotypes`` maps names such as ``LVEF_percent`` to values in the unit the name ends with.
    """

    phenotypes: Mapping[str, float]
    labels: np.ndarray | None = None
    label_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class ScanSource:
    """A scan on its way into a store.

    ``patient`` is the name that the source uses; it is never stored in clear. ``images`` starts a
    fresh iteration over ``(frame, slice, image)`` with complex64 images ``[coil, phase, readout]``,
    each exactly once and in any order. Each image must be an array of its own: the store still
    reads it while the next one is made.
    ``noise_covariance`` is complex64 ``[coil, coil]``. ``source`` names the origin in messages.
    """

    patient: str
    metadata: AcquisitionMetadata
    images: Callable[[], Iterator[tuple[int, int, np.ndarray]]]
    truth: Truth | None = None
    noise_covariance: np.ndarray | None = None
    source: str = ""


@dataclass(frozen=True)
class StagedScan:
    """A complete, synchronised scan file that has no final name yet."""

    path: Path
    digest: str

    def publish(self, path: Path) -> None:
        """Give the file its final name ``path``, on the same file system, and make it durable."""
        os.replace(self.path, path)
        sync(path.parent)


@contextmanager
def staged_scan(folder: Path, source: ScanSource) -> Iterator[StagedScan]:
    """Write ``source`` to a temporary file in ``folder``; it is gone afterwards if not published.

    Raises DataError when the source breaks a rule of ScanSource, cannot be read, holds NaN,
    infinity or nothing but zeros, or when the disk is full.
    """
    partial = folder / f".{uuid.uuid4().hex}{PARTIAL_SUFFIX}"
    try:
        yield StagedScan(partial, _write(partial, source))
    finally:
        partial.unlink(missing_ok=True)


def write_scan(path: Path, source: ScanSource) -> str:
    """Write ``source`` to ``path`` atomically and return its content digest.

    The digest is the SHA-256 over the array shape and the SHA-256 of every image in
    [frame, slice] order. It depends neither on the metadata, nor on the order in which the images
    arrive, nor on HDF5. Raises DataError like `staged_scan`; an existing ``path`` then stays.
    """
    path = Path(path)
    with staged_scan(path.parent, source) as staged:
        with _disk_errors(source, path.parent):
            staged.publish(path)
        return staged.digest


class ScanFile:
    """Read access to a stored scan, open until closed; also a context manager.

    Opening raises DataError when the file is absent, not a scan or inconsistent with its metadata.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"{self.path}: there is no such scan file")
        try:
            self._file = h5py.File(self.path, "r")
        except OSError as error:
            raise DataError(f"{self.path}: not a readable scan file: {_line(error)}") from error
        try:
            self.metadata, self.digest = self._read_header()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()

    def image(self, frame: int, slice: int) -> np.ndarray:
        """K-space of one image, complex64 ``[coil, phase, readout]``."""
        if not (0 <= frame < self.metadata.frames and 0 <= slice < self.metadata.slices):
            raise IndexError(f"{self.path} has no frame {frame}, slice {slice}")
        with self._read_errors(f"frame {frame}, slice {slice}"):
            image: np.ndarray = self._file["kspace"][frame, slice]
        return image

    @property
    def noise_covariance(self) -> np.ndarray | None:
        """Covariance of the coils' complex noise, complex64 ``[coil, coil]``."""
        if "noise_covariance" not in self._file:
            return None
        with self._read_errors("noise_covariance"):
            covariance: np.ndarray = self._file["noise_covariance"][()]
        return covariance

    @property
    def truth(self) -> Truth | None:
        """The ground truth stored with the scan, labels included."""
        if "truth" not in self._file:
            return None
        with self._read_errors("truth"):
            group = self._file["truth"]
            return Truth(
                phenotypes=json.loads(group.attrs["phenotypes"]),
                labels=group["labels"][()] if "labels" in group else None,
                label_names=tuple(json.loads(group.attrs["label_names"])),
            )

    def verify(self) -> None:
        """Hash all samples again; DataError when they no longer match the digest."""
        digests = {
            (frame, slice_): hashlib.sha256(self.image(frame, slice_).data).digest()
            for frame in range(self.metadata.frames)
            for slice_ in range(self.metadata.slices)
        }
        if _content_digest(_shape(self.metadata), digests) != self.digest:
            raise DataError(f"{self.path}: samples do not match the digest: import the scan again")

    def _read_header(self) -> tuple[AcquisitionMetadata, str]:
        attributes = self._file.attrs
        if attributes.get("fedcmr_format") != FORMAT:
            raise DataError(f"{self.path}: not a scan file of format {FORMAT}")
        with self._read_errors("header"):
            metadata = parse_metadata(attributes["metadata"])
            kspace = self._file["kspace"]
            if kspace.shape != _shape(metadata) or kspace.dtype != np.complex64:
                raise DataError(
                    f"{self.path}: kspace is {kspace.dtype} {list(kspace.shape)}, "
                    f"its metadata says complex64 {list(_shape(metadata))}"
                )
            return metadata, str(attributes["digest"])

    @contextmanager
    def _read_errors(self, part: str) -> Iterator[None]:
        # h5py raises the latter two for missing and for damaged objects.
        try:
            yield
        except (OSError, KeyError, RuntimeError, ValidationError, json.JSONDecodeError) as error:
            raise DataError(f"{self.path}: cannot read {part}: {_line(error)}") from error


def parse_metadata(text: str) -> AcquisitionMetadata:
    """Metadata from its stored JSON, without repeating the warnings of the import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnknownVocabularyWarning)
        return AcquisitionMetadata.model_validate_json(text)


def sync(path: Path) -> None:
    """Force a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Inspection(NamedTuple):
    digest: bytes
    nonzero: bool


def _inspect(source: ScanSource, frame: int, slice_: int, image: np.ndarray) -> _Inspection:
    parts = image.reshape(-1).view(np.float32)
    if not np.isfinite(parts).all():
        raise _error(source, "holds NaN or infinity", frame, slice_)
    return _Inspection(hashlib.sha256(image.data).digest(), bool(parts.any()))


def _shape(metadata: AcquisitionMetadata) -> tuple[int, int, int, int, int]:
    m = metadata
    return (m.frames, m.slices, m.coils, m.phase_encodes, m.readout_samples)


def _content_digest(shape: tuple[int, ...], digests: Mapping[tuple[int, int], bytes]) -> str:
    content = hashlib.sha256(f"fedcmr-kspace-{FORMAT} {list(shape)} complex64\n".encode())
    for position in sorted(digests):
        content.update(digests[position])
    return content.hexdigest()


def _write(path: Path, source: ScanSource) -> str:
    _check_noise_covariance(source)
    _check_truth(source)
    with _disk_errors(source, path.parent):
        file = h5py.File(path, "x", libver=_LIBVER)
    try:
        with _disk_errors(source, path.parent):
            _reserve(path, source)
        digest = _write_images(file, source, path.parent)
        with _disk_errors(source, path.parent):
            _write_extras(file, source, digest)
            file.close()
            os.truncate(path, _end_of_file(path))
            sync(path)
    finally:
        # After a failed write the first close fails too; the second frees the file.
        with suppress(OSError, RuntimeError):
            file.close()
    return digest


def _reserve(path: Path, source: ScanSource) -> None:
    """Claim the disk space of the whole scan, because HDF5 can crash when a disk fills up."""
    m = source.metadata
    size = 8 * math.prod(_shape(m)) + 64 * m.frames * m.slices + 2 * len(m.model_dump_json())
    if source.truth is not None:
        labels = source.truth.labels
        size += 0 if labels is None else labels.nbytes + labels.nbytes // 64
        size += 8 * len(json.dumps([dict(source.truth.phenotypes), source.truth.label_names]))
    if source.noise_covariance is not None:
        size += source.noise_covariance.nbytes
    descriptor = os.open(path, os.O_WRONLY)
    try:
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(descriptor, 0, size + _RESERVE_MARGIN)
    finally:
        os.close(descriptor)


def _end_of_file(path: Path) -> int:
    """End-of-file address of the superblock, version 2 or 3 (HDF5 File Format 3.0, II.A)."""
    with path.open("rb") as file:
        header = file.read(36)
    return int.from_bytes(header[28:36], "little")


def _write_images(file: h5py.File, source: ScanSource, folder: Path) -> str:
    shape = _shape(source.metadata)
    with _disk_errors(source, folder):
        kspace = file.create_dataset("kspace", shape, np.complex64, chunks=(1, 1, *shape[2:]))
    inspections: dict[tuple[int, int], Future[_Inspection]] = {}
    last: Future[_Inspection] | None = None
    # Hashing releases the interpreter lock, so it runs while the next image is read and written.
    with ThreadPoolExecutor(max_workers=1) as inspector:
        for frame, slice_, image in _read_images(source):
            _check_image(source, frame, slice_, image, inspections)
            contiguous = np.ascontiguousarray(image)
            with _disk_errors(source, folder):
                kspace.id.write_direct_chunk((frame, slice_, 0, 0, 0), contiguous)
            if last is not None:
                last.result()  # never more than two images in memory
            last = inspector.submit(_inspect, source, frame, slice_, contiguous)
            inspections[frame, slice_] = last
    results = {position: inspection.result() for position, inspection in inspections.items()}
    _check_complete(source, results)
    return _content_digest(shape, {position: result.digest for position, result in results.items()})


def _read_images(source: ScanSource) -> Iterator[tuple[int, int, np.ndarray]]:
    try:
        yield from source.images()
    except OSError as error:
        raise _error(source, f"cannot be read: {_line(error)}") from error


def _write_extras(file: h5py.File, source: ScanSource, digest: str) -> None:
    file.attrs["fedcmr_format"] = FORMAT
    file.attrs["metadata"] = source.metadata.model_dump_json()
    file.attrs["digest"] = digest
    if source.noise_covariance is not None:
        file.create_dataset("noise_covariance", data=source.noise_covariance)
    if source.truth is None:
        return
    group = file.create_group("truth")
    group.attrs["phenotypes"] = json.dumps(dict(source.truth.phenotypes), sort_keys=True)
    group.attrs["label_names"] = json.dumps(source.truth.label_names)
    labels = source.truth.labels
    if labels is not None:
        chunks = (1, 1, *labels.shape[2:])
        group.create_dataset("labels", data=labels, chunks=chunks, compression="gzip")


def _check_image(
    source: ScanSource, frame: int, slice_: int, image: np.ndarray, seen: Mapping[Any, Any]
) -> None:
    shape = _shape(source.metadata)
    if not (0 <= frame < shape[0] and 0 <= slice_ < shape[1]):
        message = f"is outside the {shape[0]} frames and {shape[1]} slices of the metadata"
        raise _error(source, message, frame, slice_)
    if (frame, slice_) in seen:
        raise _error(source, "comes twice", frame, slice_)
    if image.dtype != np.complex64:
        raise _error(source, f"has type {image.dtype} instead of complex64", frame, slice_)
    if image.shape != shape[2:]:
        message = f"has shape {list(image.shape)}, the metadata says {list(shape[2:])}"
        raise _error(source, f"{message} (coil, phase, readout)", frame, slice_)


def _check_complete(source: ScanSource, results: Mapping[tuple[int, int], _Inspection]) -> None:
    frames, slices = source.metadata.frames, source.metadata.slices
    missing = [(f, s) for f in range(frames) for s in range(slices) if (f, s) not in results]
    if missing:
        count = f"({len(missing)} of {frames * slices} images are missing)"
        raise _error(source, f"is missing {count}", *missing[0])
    if not any(result.nonzero for result in results.values()):
        message = f"all samples are zero, frame 0 to {frames - 1} and slice 0 to {slices - 1}"
        raise _error(source, message)


def _check_noise_covariance(source: ScanSource) -> None:
    noise = source.noise_covariance
    if noise is None:
        return
    coils = source.metadata.coils
    if noise.dtype != np.complex64 or noise.shape != (coils, coils):
        found = f"{noise.dtype} {list(noise.shape)}"
        raise _error(source, f"noise_covariance is {found}, not complex64 [{coils}, {coils}]")
    if not np.isfinite(noise).all():
        raise _error(source, "noise_covariance holds NaN or infinity")


def _check_truth(source: ScanSource) -> None:
    if source.truth is None:
        return
    for name, value in source.truth.phenotypes.items():
        if not np.isfinite(value):
            raise _error(source, f"phenotype {name} is {value}")
    labels = source.truth.labels
    if labels is None:
        return
    m = source.metadata
    shape = (m.frames, m.slices, m.phase_encodes, round(m.readout_samples / m.readout_oversampling))
    if labels.dtype != np.uint8 or labels.shape != shape:
        found = f"{labels.dtype} {list(labels.shape)}"
        raise _error(source, f"labels are {found}, not uint8 {list(shape)} (frame, slice, y, x)")
    if labels.max() >= len(source.truth.label_names):
        raise _error(source, f"label {labels.max()} has no name in label_names")


def _error(
    source: ScanSource, message: str, frame: int | None = None, slice_: int | None = None
) -> DataError:
    place = "" if frame is None else f"frame {frame}, slice {slice_} "
    return DataError(f"{source.source or 'scan'}: {place}{message}")


@contextmanager
def _disk_errors(source: ScanSource, folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # h5py raises the latter from flushes
        name = source.source or "the scan"
        if _is_full(error):
            message = f"disk full while storing {name} in {folder}: free some space and try again"
        else:
            message = f"cannot store {name} in {folder}: {_line(error)}"
        raise DataError(message) from error


def _is_full(error: OSError | RuntimeError) -> bool:
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    number = re.search(r"errno = (\d+)", str(error))
    return number is not None and int(number.group(1)) in _FULL


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0]
