"""Write synthetic clips as NIfTI, DICOM and GIF, every file labelled synthetic.

::

    index.csv           one line per clip: name, label, seed, phenotypes asked for
    provenance.json     model, release, sampling, and per clip also the completed phenotypes
    clip-0001.nii.gz    float32 [x, y, slice, frame] in [-1, 1], provenance in a header extension
    clip-0001/          DICOM, MR Image Storage: IM00001.dcm …, one file per frame, uint16
    clip-0001.gif       moving picture above a strip that says what it is

A clip shows one slice over one heart cycle. It has pixels in mm, but neither a slice thickness nor
a duration, and lies nowhere in a patient.
"""

from __future__ import annotations

import csv
import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydicom.dataset import Dataset
from pydicom.uid import UID

from fedcmr_client.generation import ClipModel, ClipRequest, SyntheticClip
from fedcmr_client.image_files import (
    NOTICE,
    ORIENTATION_NOTE,
    Grey,
    appears_whole,
    check_free,
    decimal,
    files_in,
    mr_image,
    save_nifti,
    uid,
)
from fedcmr_shared import __version__
from fedcmr_shared.metrics.phenotypes.table import phenotype
from fedcmr_shared.models.clips import ClipGrid, clip_grid
from fedcmr_shared.models.masked_generator import SamplingPlan

Format = Literal["nifti", "dicom", "gif"]

LABEL: Final = "SYNTHETIC"
WARNING: Final = (
    "Synthetic images of hearts that do not exist. Research use only; not a medical device: no "
    "diagnosis or treatment may rest on them."
)
NOT_RELEASED: Final = "not released"
_GEOMETRY_NOTE: Final = (
    "one heart cycle of unknown duration; slice thickness unknown, set to 1 mm in NIfTI; "
    + ORIENTATION_NOTE
)
_GREY: Final = Grey.of(-1.0, 1.0)
_LONGEST_DERIVATION: Final = 1024

_PICTURE: Final = 192  # pixels of a picture at least, along its longer side
_LINE: Final = 14
_FONT: Final = 11
_CYCLE_MS: Final = 1000
_SHOWN: Final = 3  # phenotypes beneath a picture


@dataclass(frozen=True)
class GenerationRun:
    """What made all clips: model, plan, the seed of the run, and where phenotypes came from.

    ``phenotypes`` says in words who chose them.
    """

    model: ClipModel
    plan: SamplingPlan
    phenotypes: str
    seed: int

    @property
    def grid(self) -> ClipGrid:
        """Frames and pixels of each clip."""
        return clip_grid(self.model.network.config)

    @property
    def release(self) -> str:
        """SHA-256 of the release's card, or that there is none."""
        return self.model.release["card_sha256"] if self.model.release else NOT_RELEASED

    @property
    def provenance(self) -> dict[str, Any]:
        """How the clips were made, as every format records it."""
        versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
        return {
            "synthetic": True,
            "label": LABEL,
            "notice": NOTICE,
            "warning": WARNING,
            "software": f"FedCMR {__version__}",
            "versions": {"fedcmr": __version__, **versions},
            "model": {"name": "cpgg", "size": self.model.size, "sha256": self.model.sha256},
            "release_card_sha256": self.release,
            "release": self.model.release,
            "sampling": asdict(self.plan),
            "seed": self.seed,
            "phenotypes": self.phenotypes,
            "pixel_mm": self.grid.pixel_mm,
            "frames": self.grid.frames,
            "geometry_note": _GEOMETRY_NOTE,
        }

    def of_clip(self, request: ClipRequest) -> dict[str, Any]:
        """The provenance with what one clip was asked for."""
        return {**self.provenance, **_asked(request)}


def export_clips(
    folder: Path, run: GenerationRun, clips: Iterable[SyntheticClip], formats: Sequence[Format]
) -> list[Path]:
    """Write ``clips``, as they come, into ``folder`` and return the paths of all files.

    The folder appears complete or not at all.

    Raises:
        ConfigurationError: ``folder`` exists and is not empty.
        DataError: the disk refuses.
    """
    check_free(folder)
    requests: dict[str, ClipRequest] = {}
    with appears_whole(folder) as partial:
        for number, clip in enumerate(clips, 1):
            name = f"clip-{number:04d}"
            requests[name] = clip.request
            for wanted in formats:
                _WRITERS[wanted](partial / name, clip, run)
        _write_index(partial / "index.csv", requests)
        _write_provenance(partial / "provenance.json", run, requests)
        names = files_in(partial)
    return [folder / name for name in names]


def write_gif(
    path: Path, clips: Sequence[NDArray[np.floating]], captions: Sequence[Sequence[str]]
) -> None:
    """Write clips side by side, three in a row, as one moving picture that goes round for ever.

    A heart cycle takes a second. Each clip has a strip beneath it with the label and its caption.

    Args:
        path: file to write.
        clips: ``[frame, y, x]`` in [-1, 1], all of one shape.
        captions: lines of text for each clip.
    """
    lines = 1 + max(len(caption) for caption in captions)
    columns = min(len(clips), 3)
    rows = -(-len(clips) // columns)
    tiles = [
        [_tile(frame, caption, lines) for frame in clip]
        for clip, caption in zip(clips, captions, strict=True)
    ]
    width, height = tiles[0][0].size
    pictures = [Image.new("L", (columns * width, rows * height)) for _ in clips[0]]
    for place, moving in enumerate(tiles):
        row, column = divmod(place, columns)
        for picture, tile in zip(pictures, moving, strict=True):
            picture.paste(tile, (column * width, row * height))
    pictures[0].save(
        path,
        format="GIF",
        save_all=True,
        append_images=pictures[1:],
        duration=max(_CYCLE_MS // len(pictures) // 10, 2) * 10,  # browsers slow down what is faster
        loop=0,
        comment=f"{LABEL}. {NOTICE}. {WARNING}".encode(),
    )


def caption(request: ClipRequest) -> list[str]:
    """Return lines that tell the first few phenotypes asked for, with their units."""
    shown = [_worded(name, value) for name, value in request.given.items()]
    more = len(shown) - _SHOWN
    return shown[:_SHOWN] + ([f"and {more} more"] if more > 0 else [])


def _write_nifti(stem: Path, clip: SyntheticClip, run: GenerationRun) -> None:
    pixel = run.grid.pixel_mm
    save_nifti(
        stem.with_name(f"{stem.name}.nii.gz"),
        clip.frames[:, None],
        (pixel, pixel, 1.0),
        None,
        f"{LABEL}; {NOTICE}; slice thickness unknown",
        run.of_clip(clip.request),
    )


def _write_dicom(stem: Path, clip: SyntheticClip, run: GenerationRun) -> None:
    stem.mkdir()
    source = _source(clip, run)
    for frame, image in enumerate(clip.frames):
        dataset = _instance(clip.request, run, source, frame, stem.name)
        _GREY.store(dataset, image)
        dataset.save_as(stem / f"IM{frame + 1:05d}.dcm", enforce_file_format=True)


def _write_gif(stem: Path, clip: SyntheticClip, run: GenerationRun) -> None:
    write_gif(stem.with_name(f"{stem.name}.gif"), [clip.frames], [caption(clip.request)])


_WRITERS: Final[Mapping[Format, Callable[[Path, SyntheticClip, GenerationRun], None]]] = {
    "nifti": _write_nifti,
    "dicom": _write_dicom,
    "gif": _write_gif,
}


def _write_index(path: Path, requests: Mapping[str, ClipRequest]) -> None:
    asked = list(dict.fromkeys(name for one in requests.values() for name in one.given))
    with path.open("x", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["clip", "label", "seed", *asked])
        for name, one in requests.items():
            cells = [one.given.get(phenotype_name, "") for phenotype_name in asked]
            table.writerow([name, LABEL, one.seed, *cells])


def _write_provenance(path: Path, run: GenerationRun, requests: Mapping[str, ClipRequest]) -> None:
    clips = {name: _asked(request) for name, request in requests.items()}
    text = json.dumps({**run.provenance, "clips": clips}, indent=2, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


def _asked(request: ClipRequest) -> dict[str, Any]:
    return {
        "clip_seed": request.seed,
        "phenotypes_given": request.given,
        "phenotypes_completed": request.completed,
    }


def _instance(
    request: ClipRequest, run: GenerationRun, source: list[object], frame: int, name: str
) -> Dataset:
    study = uid("synthetic", "study", *source)
    pixel = decimal(run.grid.pixel_mm)
    attributes = {
        **_identity(request, run, name, study),
        "StudyInstanceUID": study,
        "SeriesInstanceUID": uid("synthetic", "series", *source),
        "FrameOfReferenceUID": uid("synthetic", "frame of reference", *source),
        "InstanceNumber": frame + 1,
        "TemporalPositionIdentifier": frame + 1,
        "NumberOfTemporalPositions": run.grid.frames,
        "RepetitionTime": None,
        "EchoTime": None,
        "PixelSpacing": [pixel, pixel],
        "SliceThickness": None,
        "ImagePositionPatient": [0, 0, 0],
    }
    return mr_image(uid("synthetic", "instance", *source, frame + 1), attributes)


def _identity(request: ClipRequest, run: GenerationRun, name: str, study: UID) -> dict[str, Any]:
    asked = ", ".join(_worded(*one) for one in request.given.items()) or "nothing in particular"
    made = (
        f"Drawn by FedCMR {__version__} from model CPGG {run.model.size}, SHA-256 "
        f"{run.model.sha256}, release card {run.release}, guidance {run.plan.guidance:g}, "
        f"seed {request.seed}; phenotypes {run.phenotypes}"
    )
    return {
        "SyntheticData": "YES",
        "PatientName": f"{LABEL}^{name}",
        "PatientID": f"{LABEL}-{study[-16:]}",
        "DeidentificationMethod": "synthetic: there is no patient",
        "StudyDescription": f"{LABEL}: no patient",
        "SeriesDescription": f"{LABEL}, {NOTICE}: FedCMR clip",
        "ImageComments": f"{LABEL}. {NOTICE}. {WARNING} {_GEOMETRY_NOTE}. Asked for: {asked}.",
        "DerivationDescription": f"{LABEL}. {made}"[:_LONGEST_DERIVATION],
        "Manufacturer": "FedCMR",
        "ManufacturerModelName": f"CPGG {run.model.size}, {LABEL.lower()}",
    }


def _source(clip: SyntheticClip, run: GenerationRun) -> list[object]:
    """What identifies a clip: model, plan, request and seed, and the frames themselves.

    Devices round differently, so that the same request gives other pixels on another one.
    """
    request = clip.request
    plan = list(asdict(run.plan).values())
    asked = sorted(request.completed.items())
    drawn = hashlib.sha256(clip.frames.astype("<f4").tobytes()).hexdigest()
    return [run.model.sha256, plan, asked, request.seed, drawn]


def _worded(name: str, value: float) -> str:
    # Areas reach thousands of mm2, which three significant digits would give as a power of ten.
    digits = f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{name} {digits} {phenotype(name).unit}"


def _tile(frame: NDArray[np.floating], text: Sequence[str], lines: int) -> Image.Image:
    """Return one picture, made larger, above its strip."""
    grey = np.rint((frame + 1) * 127.5).clip(0, 255).astype(np.uint8)
    larger = max(1, -(-_PICTURE // max(grey.shape)))
    height, width = (larger * size for size in grey.shape)
    tile = Image.new("L", (width, height + lines * _LINE + _LINE // 2))
    tile.paste(Image.fromarray(grey).resize((width, height), Image.Resampling.BICUBIC))
    draw = ImageDraw.Draw(tile)
    font = ImageFont.load_default(_FONT)
    for line, words in enumerate((f"{LABEL}, research use only", *text)):
        draw.text((4, height + 2 + line * _LINE), words, fill=255, font=font)
    return tile
