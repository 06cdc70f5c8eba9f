"""One representative test image per site with every reconstruction of it, for the report."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedcmr_client.dataset import Image, load_image
from fedcmr_client.store.site_store import ScanRecord
from fedcmr_shared.errors import DataError
from fedcmr_shared.kspace.masks import Sampling
from fedcmr_shared.metrics.image_quality import score
from fedcmr_simulations.evaluation import (
    EvaluationRow,
    Magnitude,
    Method,
    reference,
    undersample_for_evaluation,
)

_FIELDS = "fields"
_REFERENCE = "reference"
_PREFIX = "method_"


@dataclass(frozen=True)
class Example:
    """A test image: reference, reconstructions by method and PSNR (dB) and SSIM of each."""

    site: str
    modality: str
    frame: int
    slice: int
    pattern: str
    nominal_af: float
    realised_af: float
    reference: Magnitude
    images: dict[str, Magnitude]
    psnr: dict[str, float]
    ssim: dict[str, float]


def representative(rows: Sequence[EvaluationRow], headline: Sampling) -> EvaluationRow:
    """Return the zero-filled row of median PSNR under the headline sampling.

    The choice does not look at any trained method, so it cannot flatter one.

    Raises:
        DataError: no zero-filled row has this sampling.
    """
    candidates = [
        row
        for row in rows
        if row.method == "zero_filled"
        and (row.pattern, row.nominal_af) == (headline.pattern, headline.acceleration)
    ]
    if not candidates:
        raise DataError(f"no zero-filled score for {headline}: nothing to show as an example")
    ranked = sorted(candidates, key=lambda row: (row.psnr, row.scan, row.frame, row.slice))
    return ranked[len(ranked) // 2]


def representative_image(row: EvaluationRow, records: Sequence[ScanRecord]) -> Image:
    """Load the image of ``row`` from the site's ``records``.

    Raises:
        DataError: no record has the row's scan.
    """
    for record in records:
        if record.scan_id == row.scan:
            return load_image(record, row.frame, row.slice)
    raise DataError(f"scan {row.scan} of site {row.site} is not among the records")


def make_example(
    site: str, image: Image, sampling: Sampling, methods: Mapping[str, Method], seed: int
) -> Example:
    """Reconstruct ``image`` with each method, with the mask that its evaluation used."""
    truth = reference(image)
    item = undersample_for_evaluation(image, sampling, seed)
    images = {name: method(item) for name, method in methods.items()}
    qualities = {name: score(truth, result) for name, result in images.items()}
    return Example(
        site=site,
        modality=image.record.metadata.modality or "unknown",
        frame=image.frame,
        slice=image.slice,
        pattern=sampling.pattern,
        nominal_af=sampling.acceleration,
        realised_af=item.realised_acceleration,
        reference=truth,
        images=images,
        psnr={name: quality.psnr for name, quality in qualities.items()},
        ssim={name: quality.ssim for name, quality in qualities.items()},
    )


def save_example(folder: Path, example: Example) -> Path:
    """Write ``example`` to its own file in ``folder`` and return the path.

    Each site has its own file, so that sites can be evaluated in parallel.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        name: value for name, value in vars(example).items() if name not in (_REFERENCE, "images")
    }
    arrays: dict[str, Any] = {
        _FIELDS: np.array(json.dumps(values)),
        _REFERENCE: example.reference,
        **{_PREFIX + name: image for name, image in example.images.items()},
    }
    path = folder / f"{zlib.crc32(example.site.encode()):08x}.npz"
    with path.open("wb") as stream:
        np.savez_compressed(stream, **arrays)
    return path


def load_examples(folder: Path) -> list[Example]:
    """Read all examples in ``folder``, sorted by site; none where the folder is missing.

    Raises:
        DataError: a file is no example.
    """
    examples = [_load(path) for path in sorted(folder.glob("*.npz"))]
    return sorted(examples, key=lambda example: example.site)


def _load(path: Path) -> Example:
    try:
        # numpy leaves a file open that it opened itself and cannot read.
        with path.open("rb") as stream, np.load(stream) as content:
            images = {
                name.removeprefix(_PREFIX): content[name]
                for name in content.files
                if name.startswith(_PREFIX)
            }
            values = json.loads(str(content[_FIELDS]))
            return Example(reference=content[_REFERENCE], images=images, **values)
    except (OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is no example image: delete it and evaluate again") from error
