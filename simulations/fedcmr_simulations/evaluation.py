"""Scores of every reconstruction method on each site's held-out patients.

The reference of an image is the root-sum-of-squares of its fully sampled k-space; scores follow the
CardioMM protocol (`fedcmr_shared.metrics.image_quality`). Means are taken over a patient's images
first and over patients then, so that a patient with many frames counts once.
"""

from __future__ import annotations

import json
import statistics
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from fedcmr_client.dataset import Image, Undersampled, undersample
from fedcmr_client.trainer import collate
from fedcmr_shared.errors import DataError
from fedcmr_shared.kspace import sense
from fedcmr_shared.kspace.coils import rss
from fedcmr_shared.kspace.fourier import ifft2c
from fedcmr_shared.kspace.masks import Sampling, acs_region
from fedcmr_shared.kspace.sense import SenseCase, SenseSettings
from fedcmr_shared.metrics.image_quality import score
from fedcmr_shared.models.cardiomm import CardioMM
from fedcmr_shared.text.encoders import TextEncoder

Magnitude = NDArray[np.float32]
"""Real image [y, x] in the units of the measured k-space."""

Method = Callable[[Undersampled], Magnitude]
"""Reconstructs an image from its measured samples, mask, calibration region and texts."""

METHODS: Final = ("zero_filled", "sense", "start", "local", "federated")
"""`start` has rows only where a run began with pretrained weights."""
METRICS: Final = ("psnr", "ssim", "nmse")


@dataclass(frozen=True)
class EvaluationRow:
    """Scores of one method on one image under one sampling."""

    site: str
    patient: str
    scan: str
    modality: str
    frame: int
    slice: int
    pattern: str
    nominal_af: float
    realised_af: float
    method: str
    psnr: float
    ssim: float
    nmse: float


def reference(image: Image) -> Magnitude:
    """Return the root-sum-of-squares of the fully sampled image."""
    return _array(rss(ifft2c(image.kspace)))


def zero_filled(item: Undersampled) -> Magnitude:
    """Root-sum-of-squares with zeros where nothing was measured."""
    return _array(rss(ifft2c(item.measured)))


SenseTuning = Mapping[tuple[Sampling, str | None], SenseSettings]
"""Settings by sampling and modality; None stands for modalities without validation images."""


class SenseReconstructor:
    """CG-SENSE with settings tuned per sampling and modality, see `tune_sense`."""

    def __init__(self, tuning: SenseTuning) -> None:
        self._tuning = dict(tuning)

    def __call__(self, item: Undersampled) -> Magnitude:
        """Reconstruct ``item``.

        Raises:
            DataError: its sampling was not tuned, or its calibration region holds no signal.
        """
        key = (item.sampling, item.image.record.metadata.modality)
        settings = self._tuning.get(key) or self._tuning.get((item.sampling, None))
        if settings is None:
            raise DataError(f"CG-SENSE is not tuned for {item.sampling}: tune it first")
        region = acs_region(item.sampling, *item.image.kspace.shape[-2:])
        result = sense.reconstruct(item.measured[None], item.mask[None], region, settings)
        return _array(result[0])


class NetworkReconstructor:
    """A trained CardioMM with its text encoder."""

    def __init__(self, model: CardioMM, encoder: TextEncoder, *, device: str = "cpu") -> None:
        self._device = torch.device(device)
        self._model = model.to(self._device).eval()
        self._encoder = encoder

    @torch.no_grad()
    def __call__(self, item: Undersampled) -> Magnitude:
        """Reconstruct ``item``."""
        (batch,) = collate([item], self._encoder)
        batch = batch.to(self._device)
        output = self._model(
            batch.measured, batch.mask, batch.acs, batch.metadata_text, batch.sampling_text
        )
        return _array(output.image[0])


def undersample_for_evaluation(image: Image, sampling: Sampling, seed: int) -> Undersampled:
    """Apply the mask that belongs to this seed, scan and slice; every method gets the same one.

    Raises:
        DataError: the mask measures everything, so that there is nothing to compare.
    """
    key = f"{seed}/{image.record.scan_id}/{image.slice}"
    item = undersample(image, sampling, zlib.crc32(key.encode()))
    if bool(item.mask.all()):
        shape = tuple(image.kspace.shape[-2:])
        raise DataError(
            f"scan {image.record.scan_id}: {sampling.pattern} {sampling.acceleration:g}x with "
            f"{sampling.acs_lines} ACS lines measures all of {shape}: use fewer ACS lines"
        )
    return item


def tune_sense(
    images: Iterable[Image], samplings: Sequence[Sampling], seed: int, *, limit: int = 3
) -> SenseTuning:
    """Tune CG-SENSE for each sampling, on at most ``limit`` validation images of each modality.

    The best λ differs by contrast as much as by sampling, so pooling modalities would give a
    comparator that is too easy to beat. Modalities without validation images get the settings
    that are best for all of them together.

    Raises:
        ConfigurationError: there is no image.
        DataError: a sampling measures everything.
    """
    groups: dict[str | None, list[Image]] = {None: list(images)}
    for image in groups[None]:
        if image.record.metadata.modality is not None:
            groups.setdefault(image.record.metadata.modality, []).append(image)
    return {
        (sampling, modality): sense.tune_regularisation(
            [_case(image, sampling, seed) for image in _spread(group, limit)]
        )
        for sampling in samplings
        for modality, group in groups.items()
    }


def _spread(images: Sequence[Image], limit: int) -> list[Image]:
    count = min(limit, len(images))
    return [images[(2 * i + 1) * len(images) // (2 * count)] for i in range(count)]


def _case(image: Image, sampling: Sampling, seed: int) -> SenseCase:
    mask = undersample_for_evaluation(image, sampling, seed).mask
    return SenseCase(image.kspace, mask, acs_region(sampling, *image.kspace.shape[-2:]))


def evaluate(
    site: str,
    images: Iterable[Image],
    samplings: Sequence[Sampling],
    methods: Mapping[str, Method],
    seed: int,
) -> Iterator[EvaluationRow]:
    """Yield the scores of each method on each image under each sampling.

    Raises:
        DataError: an image cannot be undersampled, reconstructed or scored.
    """
    for image in images:
        truth = reference(image)
        for sampling in samplings:
            item = undersample_for_evaluation(image, sampling, seed)
            for name, method in methods.items():
                quality = score(truth, method(item))
                yield EvaluationRow(
                    site=site,
                    patient=image.record.patient,
                    scan=image.record.scan_id,
                    modality=image.record.metadata.modality or "unknown",
                    frame=image.frame,
                    slice=image.slice,
                    pattern=sampling.pattern,
                    nominal_af=sampling.acceleration,
                    realised_af=item.realised_acceleration,
                    method=name,
                    **quality._asdict(),
                )


@dataclass(frozen=True)
class Cell:
    """Mean scores of each method for one site, modality and sampling.

    ``scores[metric][method]``; a method without rows is absent.
    """

    site: str
    modality: str
    pattern: str
    nominal_af: float
    realised_af: float
    patients: int
    images: int
    scores: dict[str, dict[str, float]]


def aggregate(rows: Iterable[EvaluationRow]) -> list[Cell]:
    """Return the means per site, modality, pattern and nominal acceleration, sorted by these."""
    groups: dict[tuple[str, str, str, float], list[EvaluationRow]] = {}
    for row in rows:
        key = (row.site, row.modality, row.pattern, row.nominal_af)
        groups.setdefault(key, []).append(row)
    return [_cell(key, groups[key]) for key in sorted(groups)]


def site_summary(rows: Sequence[EvaluationRow], headline: Sampling) -> list[dict[str, Any]]:
    """Return the ``sites`` entries of summary.json for the headline sampling, all modalities.

    Keys: name, patients, scans, images, pattern, nominal_af, realised_af, and METRIC_METHOD for
    each of `METRICS` and `METHODS` (None for a method without rows).
    """
    chosen: dict[str, list[EvaluationRow]] = {}
    for row in rows:
        if (row.pattern, row.nominal_af) == (headline.pattern, headline.acceleration):
            chosen.setdefault(row.site, []).append(row)
    summary = []
    for name, own in sorted(chosen.items()):
        cell = _cell((name, "", headline.pattern, headline.acceleration), own)
        entry: dict[str, Any] = {
            "name": name,
            "patients": cell.patients,
            "scans": len({row.scan for row in own}),
            "images": cell.images,
            "pattern": cell.pattern,
            "nominal_af": cell.nominal_af,
            "realised_af": cell.realised_af,
        }
        for metric in METRICS:
            for method in METHODS:
                entry[f"{metric}_{method}"] = cell.scores[metric].get(method)
        summary.append(entry)
    return summary


def append_rows(path: Path, rows: Iterable[EvaluationRow]) -> None:
    """Append ``rows`` to a JSON lines file."""
    with path.open("a") as stream:
        for row in rows:
            stream.write(json.dumps(asdict(row)) + "\n")


def read_rows(path: Path) -> list[EvaluationRow]:
    """Read a JSON lines file of rows; a last line that was cut off is left out.

    Raises:
        DataError: a complete line is no row.
    """
    rows = []
    names = {field.name for field in fields(EvaluationRow)}
    for number, line in enumerate(path.read_text().split("\n")[:-1], start=1):
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} line {number} is not JSON: {error.msg}") from error
        if not isinstance(values, dict) or set(values) != names:
            raise DataError(f"{path} line {number} is no evaluation row: evaluate again")
        rows.append(EvaluationRow(**values))
    return rows


def _cell(key: tuple[str, str, str, float], rows: Sequence[EvaluationRow]) -> Cell:
    site, modality, pattern, nominal = key
    methods = sorted({row.method for row in rows})
    return Cell(
        site=site,
        modality=modality,
        pattern=pattern,
        nominal_af=nominal,
        realised_af=_patient_mean(rows, "realised_af"),
        patients=len({row.patient for row in rows}),
        images=len({(row.scan, row.frame, row.slice) for row in rows}),
        scores={
            metric: {
                method: _patient_mean([row for row in rows if row.method == method], metric)
                for method in methods
            }
            for metric in METRICS
        },
    )


def _patient_mean(rows: Iterable[EvaluationRow], name: str) -> float:
    by_patient: dict[str, list[float]] = {}
    for row in rows:
        by_patient.setdefault(row.patient, []).append(getattr(row, name))
    return statistics.fmean(statistics.fmean(values) for values in by_patient.values())


def _array(image: torch.Tensor) -> Magnitude:
    values: Magnitude = image.cpu().numpy()
    return values
