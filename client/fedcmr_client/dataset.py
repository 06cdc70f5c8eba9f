"""Fully sampled images of a site's patients, drawn for training or listed for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedcmr_client.store.scan_file import ScanFile
from fedcmr_client.store.site_store import ScanRecord
from fedcmr_shared.kspace.coils import remove_readout_oversampling
from fedcmr_shared.kspace.masks import Sampling, acs_mask, make_mask, realised_acceleration
from fedcmr_shared.text.prompts import metadata_text, sampling_text


@dataclass(frozen=True)
class Image:
    """One fully sampled image.

    ``kspace`` is complex64 [coil, phase, readout] without readout oversampling.
    """

    record: ScanRecord
    frame: int
    slice: int
    kspace: Tensor


@dataclass(frozen=True)
class Undersampled:
    """An image with its sampling mask and the texts that describe both.

    ``mask`` and ``acs`` are bool [1, phase, readout].
    """

    image: Image
    sampling: Sampling
    mask: Tensor
    acs: Tensor

    @property
    def measured(self) -> Tensor:
        """Acquired k-space, zero elsewhere, complex64 [coil, phase, readout]."""
        return self.image.kspace * self.mask

    @property
    def texts(self) -> tuple[str, str]:
        """Metadata sentence and undersampling sentence."""
        return metadata_text(self.image.record.metadata), sampling_text(self.sampling)

    @property
    def realised_acceleration(self) -> float:
        """All samples divided by acquired samples, calibration lines included."""
        return realised_acceleration(self.mask.numpy())


def undersample(image: Image, sampling: Sampling, seed: int) -> Undersampled:
    """Apply one mask to ``image``; time-dependent patterns take the image's own frame."""
    phase, readout = image.kspace.shape[-2:]
    frames = image.record.metadata.frames
    masks = make_mask(sampling, phase_encodes=phase, readout=readout, frames=frames, seed=seed)
    acs = torch.from_numpy(acs_mask(sampling, phase, readout))[None]
    return Undersampled(image, sampling, torch.from_numpy(masks[image.frame][None]), acs)


def load_image(record: ScanRecord, frame: int, slice_index: int) -> Image:
    """Read one image of a scan and remove its readout oversampling."""
    with ScanFile(record.path) as scan:
        kspace = torch.from_numpy(scan.image(frame, slice_index))
    factor = record.metadata.readout_oversampling
    return Image(record, frame, slice_index, remove_readout_oversampling(kspace, factor))


def all_images(records: Sequence[ScanRecord]) -> Iterator[Image]:
    """Every image of the given scans, in order of scan, frame and slice."""
    for record in records:
        for frame in range(record.metadata.frames):
            for slice_index in range(record.metadata.slices):
                yield load_image(record, frame, slice_index)


class Cohort:
    """Patients with all their scans; what a job may train on at a site."""

    def __init__(self, records: Sequence[ScanRecord]) -> None:
        self._by_patient: dict[str, list[ScanRecord]] = {}
        for record in records:
            self._by_patient.setdefault(record.patient, []).append(record)

    @property
    def patients(self) -> list[str]:
        """Pseudonyms, sorted."""
        return sorted(self._by_patient)

    def scans(self, patient: str) -> list[ScanRecord]:
        """All scans of a patient."""
        return list(self._by_patient[patient])

    def draw(self, patient: str, at_most: int, generator: np.random.Generator) -> list[Image]:
        """Load ``at_most`` of a patient's images, drawn without replacement over all scans."""
        scans = self._by_patient[patient]
        ends = np.cumsum([scan.metadata.frames * scan.metadata.slices for scan in scans])
        count = min(at_most, int(ends[-1]))
        chosen = generator.choice(int(ends[-1]), size=count, replace=False)
        return [self._load(scans, ends, int(index)) for index in chosen]

    def _load(self, scans: list[ScanRecord], ends: NDArray[np.int_], index: int) -> Image:
        scan = int(np.searchsorted(ends, index, side="right"))
        within = index - (int(ends[scan - 1]) if scan else 0)
        frame, slice_index = divmod(within, scans[scan].metadata.slices)
        return load_image(scans[scan], frame, slice_index)
