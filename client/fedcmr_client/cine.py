"""What a generator learns from a patient: a clip of the heart and the phenotypes that go with it.

Both come from the patient's short-axis cine: the clip from its middle slice, the phenotypes from
what an expert drew or, without that, from the packaged segmenter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedcmr_client.dataset import load_image
from fedcmr_client.store.scan_file import ScanFile, Truth
from fedcmr_client.store.site_store import ScanRecord
from fedcmr_shared.errors import DataError
from fedcmr_shared.kspace.coils import rss
from fedcmr_shared.kspace.fourier import ifft2c
from fedcmr_shared.metrics.phenotypes.measurement import measure
from fedcmr_shared.metrics.phenotypes.short_axis import ShortAxis, Spacing
from fedcmr_shared.metrics.phenotypes.table import NAMES
from fedcmr_shared.models.clips import ClipGrid, heart_centre, make_clip, ventricle_centre
from fedcmr_shared.models.segmenter import Segmenter, default_segmenter, load_segmenter, segment
from fedcmr_shared.schemas.acquisition import AcquisitionMetadata

_MODALITY = "cine"
_VIEW = "short-axis"


@dataclass(frozen=True, eq=False)
class Heart:
    """One patient: a clip ``[frames, rows, columns]`` in [-1, 1] and phenotypes by name.

    Phenotypes are in the units of the table; those that are not known are missing.
    """

    clip: NDArray[np.float32]
    phenotypes: Mapping[str, float]

    def vector(self, names: Sequence[str]) -> NDArray[np.float64]:
        """Return the phenotypes in the order of ``names``, NaN where one is missing."""
        return np.array([self.phenotypes.get(name, np.nan) for name in names])


def cine_of(scans: Sequence[ScanRecord]) -> ScanRecord:
    """Return the short-axis cine among a patient's scans that has most frames.

    Raises:
        DataError: there is none with two or more frames and a known pixel size.
    """
    fitting = [
        scan
        for scan in scans
        if (scan.metadata.modality, scan.metadata.view) == (_MODALITY, _VIEW)
        and scan.metadata.frames > 1
        and scan.metadata.pixel_spacing_mm is not None
    ]
    if not fitting:
        raise DataError(
            "the patient has no short-axis cine with several frames and a known pixel size: "
            "import one, or leave the patient out of the job's cohort"
        )
    return max(fitting, key=lambda scan: (scan.metadata.frames, scan.scan_id))


def read_heart(scans: Sequence[ScanRecord], grid: ClipGrid) -> Heart:
    """Return the clip and the phenotypes of one patient.

    Raises:
        DataError: there is no fitting scan, it is damaged, or shows no left ventricle.
    """
    record = cine_of(scans)
    metadata = record.metadata
    spacing = metadata.pixel_spacing_mm
    assert spacing is not None  # `cine_of` takes no other
    truth = _truth(record)
    middle = metadata.slices // 2
    images = _magnitudes(record, middle)
    centre = _centre(images, spacing, truth, middle)
    clip = make_clip(images, heart_cycles(metadata), spacing, centre, grid)
    return Heart(clip, _phenotypes(record, truth))


def read_phenotypes(scans: Sequence[ScanRecord]) -> dict[str, float]:
    """Return the phenotypes of one patient by name, as `read_heart` does.

    Raises:
        DataError: there is no fitting scan, or it is damaged.
    """
    record = cine_of(scans)
    return _phenotypes(record, _truth(record))


def heart_cycles(metadata: AcquisitionMetadata) -> list[float]:
    """Return when each frame was taken, in heart cycles after the R wave.

    Without times or heart rate the frames are taken to be evenly spaced.
    """
    frames, rate, times = metadata.frames, metadata.heart_rate_bpm, metadata.frame_times_ms
    if rate is not None and times is not None:
        cycles = [time * rate / 60e3 % 1 for time in times]
        if len(set(cycles)) == frames:
            return cycles
    return [frame / frames for frame in range(frames)]


def _truth(record: ScanRecord) -> Truth | None:
    with ScanFile(record.path) as file:
        return file.truth


def _magnitudes(record: ScanRecord, slice_index: int) -> NDArray[np.float32]:
    frames = (load_image(record, n, slice_index).kspace for n in range(record.metadata.frames))
    return np.stack([rss(ifft2c(kspace)).numpy() for kspace in frames])


def _centre(
    images: NDArray[np.float32], spacing: tuple[float, float], truth: Truth | None, middle: int
) -> tuple[float, float]:
    if truth is not None and truth.labels is not None:
        try:
            return ventricle_centre(truth.labels[:, middle])
        except DataError:
            pass  # the expert drew other slices
    return heart_centre(images, spacing, _segmenter())


def _phenotypes(record: ScanRecord, truth: Truth | None) -> dict[str, float]:
    known = {} if truth is None else {n: v for n, v in truth.phenotypes.items() if n in NAMES}
    return known or _measured(record)


def _measured(record: ScanRecord) -> dict[str, float]:
    metadata, spacing = record.metadata, record.metadata.pixel_spacing_mm
    assert spacing is not None
    stack = np.stack([_magnitudes(record, n) for n in range(metadata.slices)], axis=1)
    pitch = metadata.slice_pitch_mm or metadata.slice_thickness_mm
    heart = ShortAxis(
        segment(_segmenter(), stack, spacing),
        None if pitch is None else Spacing(*spacing, pitch),
        metadata.heart_rate_bpm,
    )
    return measure(heart)


@lru_cache(maxsize=1)
def _segmenter() -> Segmenter:
    return load_segmenter(default_segmenter()).model
