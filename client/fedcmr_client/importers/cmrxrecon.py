"""CMRxRecon 2023, 2024, 2025 and MMCMR-427K: fully sampled k-space in MATLAB files.

MATLAB v7.3 files are HDF5: the array ``kspace_full`` or ``kspace`` has MATLAB's order
(nx, ny, nc, nz, nt), which HDF5 shows as (nt, nz, nc, ny, nx), and complex numbers are compounds
(real, imag). Black blood, T1w and T2w have no nt. Older MATLAB v5 files cannot be read in parts.
Metadata come from the folder tree and from ``<name>_info.csv`` beside the file, see
Wang et al., 2512.21652.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import h5py
import numpy as np
import scipy.io
from scipy.io.matlab import MatReadError

from fedcmr_client.importers import cmrxrecon_tree
from fedcmr_client.importers.coverage import check_image
from fedcmr_client.importers.interface import ImportOptions, build_metadata
from fedcmr_client.store.scan_file import ScanSource
from fedcmr_shared.errors import DataError

KEYS: Final = ("kspace_full", "kspace")
"""Accepted names of the array."""
MAX_COILS: Final = 64
"""A longer coil axis means that the axes are in another order."""
MAX_V5_BYTES: Final = 2 * 1024**3
"""Largest array of a MATLAB v5 file, which must be read as a whole."""

_HDF5_SIGNATURE: Final = b"\x89HDF\r\n\x1a\n"
# MATLAB puts 512 bytes of its own in front of the HDF5 part.
_SIGNATURE_OFFSETS: Final = (0, 512)
_SINGLE: Final = np.dtype([("real", "<f4"), ("imag", "<f4")])
_Shape = tuple[int, int, int, int, int]


class CMRxReconImporter:
    """Importer of ``.mat`` files; see the module."""

    name = "cmrxrecon"

    def claims(self, path: Path) -> bool:
        """Whether ``path`` is a ``.mat`` file in MATLAB's format, new or old."""
        if path.suffix != ".mat" or not path.is_file():
            return False
        return _is_hdf5(path) or _head(path, 6) == b"MATLAB"

    def scans(self, path: Path, options: ImportOptions) -> Iterator[ScanSource]:
        """Yield the one scan of the file. Raises DataError for other keys, types and shapes."""
        array = _open_v73(path) if _is_hdf5(path) else _open_v5(path)
        facts = cmrxrecon_tree.describe(path, array.shape, options)
        frames, slices, coils, phase, readout = array.shape
        fields = {
            **facts.fields,
            "origin": "measured",
            "source_format": self.name,
            "frames": frames,
            "slices": slices,
            "coils": coils,
            "phase_encodes": phase,
            "readout_samples": readout,
        }
        yield ScanSource(
            patient=facts.patient,
            metadata=build_metadata(fields, options, str(path)),
            images=array.images,
            source=str(path),
        )


@dataclass(frozen=True)
class _V73Array:
    path: Path
    key: str
    shape: _Shape

    def images(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield all images; at most one frame stack of one slice is in memory."""
        try:
            with h5py.File(self.path, "r") as file:
                yield from self._read(file[self.key])
        except (OSError, RuntimeError) as error:
            raise DataError(f"{self.path}: {self.key} cannot be read: {error}") from error

    def _read(self, dataset: h5py.Dataset) -> Iterator[tuple[int, int, np.ndarray]]:
        frames, slices, *image = self.shape
        has_frames = dataset.ndim == 5
        step_t, step_z = _block(dataset.chunks, has_frames, frames)
        for t in range(0, frames, step_t):
            for z in range(0, slices, step_z):
                where = (slice(t, t + step_t), slice(z, z + step_z))
                # HDF5 converts double to single precision piece by piece.
                block = dataset.astype(_SINGLE)[where if has_frames else where[1:]]
                block = block.view(np.complex64).reshape(-1, min(step_z, slices - z), *image)
                for dt, dz in np.ndindex(block.shape[:2]):
                    check_image(block[dt, dz], f"{self.path}: frame {t + dt}, slice {z + dz}")
                    # A view would keep a larger block alive while the next one is read.
                    alone = block.shape[:2] == (1, 1)
                    yield t + dt, z + dz, block[dt, dz] if alone else block[dt, dz].copy()
                del block


def _block(chunks: tuple[int, ...] | None, has_frames: bool, frames: int) -> tuple[int, int]:
    """Frames and slices to read at once, so that a compressed chunk is unpacked once if possible.

    Never more images than one slice has frames.
    """
    if chunks is None:
        return 1, 1
    chunk_t, chunk_z = (chunks[0], chunks[1]) if has_frames else (1, chunks[0])
    step_t = min(chunk_t, frames)
    return step_t, max(1, min(chunk_z, frames // step_t))


@dataclass(frozen=True)
class _V5Array:
    path: Path
    key: str
    shape: _Shape

    def images(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield all images of the array, which is read as a whole."""
        try:
            array = scipy.io.loadmat(self.path, variable_names=[self.key])[self.key]
        except _V5_ERRORS as error:
            raise DataError(f"{self.path}: {self.key} cannot be read: {error}") from error
        array = array.transpose().reshape(self.shape)
        for t, z in np.ndindex(array.shape[:2]):
            image = np.ascontiguousarray(array[t, z], np.complex64)
            check_image(image, f"{self.path}: frame {t}, slice {z}")
            yield t, z, image


# scipy raises any of these for damaged files.
_V5_ERRORS: Final = (MatReadError, ValueError, TypeError, KeyError, OSError, EOFError, zlib.error)


def _open_v73(path: Path) -> _V73Array:
    try:
        with h5py.File(path, "r") as file:
            key = _choose(path, [name for name in file if not name.startswith("#")])
            dataset = file[key]
            if not isinstance(dataset, h5py.Dataset) or dataset.dtype.names != ("real", "imag"):
                found = getattr(dataset, "dtype", "a group")
                message = f"{key} is {found}, not complex numbers (real, imag)"
                raise DataError(f"{path}: {message}: export the raw k-space")
            return _V73Array(path, key, _check_shape(path, key, dataset.shape))
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path}: damaged MATLAB file: {error}: copy it again") from error


def _open_v5(path: Path) -> _V5Array:
    try:
        variables: Sequence[tuple[str, tuple[int, ...], str]] = scipy.io.whosmat(path)
    except _V5_ERRORS as error:
        raise DataError(f"{path}: damaged MATLAB file: {error}: copy it again") from error
    key = _choose(path, [name for name, _, _ in variables])
    shape, kind = next((shape, kind) for name, shape, kind in variables if name == key)
    if kind not in {"single", "double"}:
        raise DataError(f"{path}: {key} is {kind}, not complex numbers: export the raw k-space")
    if 8 * int(np.prod(shape, dtype=np.int64)) > MAX_V5_BYTES:
        limit = f"{MAX_V5_BYTES / 1024**3:g} GiB"
        raise DataError(f"{path}: {key} exceeds {limit}: save it again in MATLAB with -v7.3")
    return _V5Array(path, key, _check_shape(path, key, tuple(reversed(shape))))


def _choose(path: Path, found: list[str]) -> str:
    for key in KEYS:
        if key in found:
            return key
    names = ", ".join(sorted(found)) or "nothing"
    raise DataError(f"{path}: holds {names}, but k-space is read from {' or '.join(KEYS)} only")


def _check_shape(path: Path, key: str, shape: tuple[int, ...]) -> _Shape:
    order = "(nt, nz, nc, ny, nx), or (nz, nc, ny, nx)"
    if len(shape) not in {4, 5} or 0 in shape:
        raise DataError(f"{path}: {key} has shape {list(shape)}, expected {order}")
    frames = shape[0] if len(shape) == 5 else 1
    slices, coils, phase, readout = shape[-4:]
    if coils > MAX_COILS:
        message = f"coil axis of {coils} in shape {list(shape)} is improbable: expected {order}"
        raise DataError(f"{path}: wrong dimension order: {message}")
    return frames, slices, coils, phase, readout


def _is_hdf5(path: Path) -> bool:
    head = _head(path, 520)
    return any(head[start : start + 8] == _HDF5_SIGNATURE for start in _SIGNATURE_OFFSETS)


def _head(path: Path, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
