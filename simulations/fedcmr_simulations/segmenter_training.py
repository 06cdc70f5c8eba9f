"""Training of the segmenter on simulated hearts and on public images with expert contours.

The training is not private, so no data of patients has a place here unless it is public. The real
images are those of the Sunnybrook Cardiac Data (Radau et al., The MIDAS Journal, 2009; CC0 1.0),
repacked as ``.npz``. Their experts drew no RV, and no epicardium at end systole: there the loss
counts the sum of the probabilities of all labels that a pixel may have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

from fedcmr_shared.errors import ConfigurationError, DataError
from fedcmr_shared.kspace.coils import remove_readout_oversampling, rss
from fedcmr_shared.kspace.fourier import ifft2c
from fedcmr_shared.models.segmenter import CLASSES, PIXEL_MM, Segmenter, normalise, save_segmenter
from fedcmr_simulations.centres import TRAINING_CENTRES, Centre
from fedcmr_simulations.phantom.patient import PROFILES, draw_patient
from fedcmr_simulations.phantom.protocol import protocol
from fedcmr_simulations.phantom.scan import Scan
from fedcmr_simulations.progress import Progress

HELD_OUT: Final = (
    "SC-HF-I-02",
    "SC-HF-I-04",
    "SC-HF-I-09",
    "SC-HF-NI-12",
    "SC-HF-NI-33",
    "SC-HYP-03",
    "SC-HYP-10",
    "SC-N-03",
    "SC-N-07",
)
"""Real patients that are never trained on: about a quarter of each group."""
SUNNYBROOK_PIXEL_MM: Final = 1.35
"""Of the repacked images, which say nothing of it; those with a header have 1.29 to 1.37 mm."""
NOT_WALL: Final = 4
"""Code of a pixel that is no LV: other or RV, as experts drew no RV."""
NOT_CAVITY: Final = 5
"""Code of a pixel that is anything but LV cavity, where no epicardium was drawn."""

_ALLOWED: Final = torch.tensor(
    [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 0, 1], [1, 0, 1, 1]]
).bool()
_COILS: Final = 4
_PACKAGES: Final = ("fedcmr", "torch", "numpy")


class SegmenterTraining(BaseModel):
    """What the training runs; all that is random comes from ``seed``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = 0
    phantom_patients: int = Field(240, ge=1)
    steps: int = Field(2000, ge=1)
    batch: int = Field(12, ge=2)
    learning_rate: float = Field(4e-3, gt=0)
    crop_pixels: int = Field(96, ge=32, multiple_of=16)
    real_share: float = Field(0.5, ge=0, le=1)


@dataclass(frozen=True, eq=False)
class Example:
    """One magnitude image with its codes [y, x] and pixel size (rows, columns) in mm."""

    patient: str
    image: NDArray[np.float32]
    codes: NDArray[np.uint8]
    spacing_mm: tuple[float, float]
    frame: str
    """``ED`` or ``ES``, or empty."""


def simulated(centres: Sequence[Centre], patients: int, seed: int) -> Iterator[Example]:
    """Yield four cine images of each simulated patient: two slices at ED and two at ES."""
    rng = np.random.default_rng([seed, 17])
    diseases = sorted(PROFILES)
    for index in range(patients):
        centre = centres[index % len(centres)]
        disease = diseases[int(rng.integers(len(diseases)))]
        patient = draw_patient(f"simulated-{index:04d}", disease, rng)
        base = patient.heart.at(0).base
        heights = tuple(float(rng.uniform(*part) * base) for part in ((0.5, 1.03), (0.08, 0.5)))
        scanner = centre.equipment("quick")
        scanner = replace(scanner, array=replace(scanner.array, coils=_COILS, front=_COILS // 2))
        sequence = protocol("cine", "standard", centre.field_strength_t)
        sequence = replace(sequence, phases=(float(rng.uniform(0, 0.1)), 0.35))
        scan = Scan(patient, scanner, sequence, heights, (seed, 17, index))
        labels = scan.truth().labels
        if labels is None:
            raise DataError("the phantom gave no labels")
        for frame, place, kspace in scan.images():
            cropped = remove_readout_oversampling(
                torch.from_numpy(kspace), scanner.grid.oversampling
            )
            image = rss(ifft2c(cropped)).numpy().astype(np.float32)
            codes, name = labels[frame, place], ("ED", "ES")[frame]
            yield Example(patient.name, image, codes, scanner.grid.spacing, name)


def contoured(folder: Path) -> Iterator[Example]:
    """Yield the contoured Sunnybrook images below ``folder`` (``*.npz``).

    Raises:
        DataError: there are none, or a file is damaged.
    """
    files = sorted(folder.glob("*.npz"))
    if not files:
        raise DataError(f"{folder} holds no .npz with contours: name the folder that does")
    for path in files:
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            yield from _drawn(path.stem, arrays)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path}: damaged or incomplete file: {error}") from error


def _drawn(patient: str, arrays: dict[str, Any]) -> Iterator[Example]:
    spacing = (SUNNYBROOK_PIXEL_MM, SUNNYBROOK_PIXEL_MM)
    for index, image in enumerate(arrays["image"]):
        endo, epi = arrays["endo_mask"][index] > 0, arrays["epi_mask"][index] > 0
        drawn = bool(arrays["epi_available"][index])
        codes = np.full(endo.shape, NOT_WALL if drawn else NOT_CAVITY, np.uint8)
        if drawn:
            codes[epi] = CLASSES.index("LV myocardium")
        codes[endo] = CLASSES.index("LV cavity")
        diastole = int(arrays["frame_guess"][index]) == int(arrays["ed_frame"])
        yield Example(patient, image.astype(np.float32), codes, spacing, "ED" if diastole else "ES")


def marginal_loss(logits: Tensor, codes: Tensor) -> Tensor:
    """Mean −log of the probability that a pixel has one of the labels that its code allows."""
    allowed = _ALLOWED.to(logits.device)[codes].movedim(-1, 1)
    log_probability = F.log_softmax(logits, dim=1)
    return -log_probability.masked_fill(~allowed, -torch.inf).logsumexp(1).mean()


def overlap_loss(logits: Tensor, codes: Tensor) -> Tensor:
    """1 − soft Dice, mean over the three tissues, each where it is known to be or not to be."""
    probability = logits.softmax(1)
    losses = []
    for label in (1, 2, 3):
        known = _ALLOWED.to(logits.device)[codes].movedim(-1, 1)
        certain = ~known[:, label] | (known.sum(1) == 1)
        truth = (codes == label).float()
        guess = probability[:, label] * certain
        shared = (guess * truth).sum()
        losses.append(1 - (2 * shared + 1) / (guess.sum() + truth.sum() + 1))
    return torch.stack(losses).mean()


def augmented(example: Example, pixels: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A random view of ``pixels`` x ``pixels`` at the network's pixel size: (image, codes)."""
    image = torch.from_numpy(example.image)[None, None]
    codes = torch.from_numpy(example.codes.astype(np.float32))[None, None]
    grid = _random_grid(example, pixels, rng)
    view = F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    seen = F.grid_sample(codes, grid, mode="nearest", padding_mode="border", align_corners=False)
    # Brightness is changed as coils, contrast and noise change it.
    bright = view[0] / max(float(torch.quantile(view, 0.995)), 1e-12)
    bright = bright.clamp_min(0) ** float(np.exp(rng.normal(0, 0.25)))
    ramp = torch.linspace(-1, 1, pixels)
    tilt = rng.normal(0, 0.25, 2)
    bright = bright * torch.exp(float(tilt[0]) * ramp[:, None] + float(tilt[1]) * ramp)
    noise = torch.from_numpy(rng.normal(0, abs(rng.normal(0, 0.04)), (pixels, pixels)))
    return (bright + noise.float()).clamp_min(0)[0], seen[0, 0].long()


def _random_grid(example: Example, pixels: int, rng: np.random.Generator) -> Tensor:
    """Sampling grid [1, y, x, 2] of a turned, scaled, sometimes mirrored view near the heart."""
    rows, columns = example.image.shape
    heart = np.argwhere((example.codes == 1) | (example.codes == 2))
    middle = heart.mean(axis=0) if len(heart) else np.array([rows, columns]) / 2
    middle = middle + rng.normal(0, 14, 2) / example.spacing_mm
    if rng.random() < 0.25:  # anywhere, to learn what is no heart
        middle = rng.uniform(0.15, 0.85, 2) * (rows, columns)
    angle = rng.normal(0, math.radians(20))
    zoom = PIXEL_MM * np.exp(rng.normal(0, 0.13))
    steps = (np.arange(pixels) - (pixels - 1) / 2) * zoom
    y, x = np.meshgrid(steps, steps, indexing="ij")
    if rng.random() < 0.2:  # rows and columns exchanged, as some stores keep images
        y, x = x, y
    turned = (np.cos(angle) * y - np.sin(angle) * x, np.sin(angle) * y + np.cos(angle) * x)
    place = [turned[i] / example.spacing_mm[i] + middle[i] for i in (0, 1)]
    grid = [(2 * place[1] + 1) / columns - 1, (2 * place[0] + 1) / rows - 1]
    return torch.from_numpy(np.stack(grid, axis=-1)[None]).float()


def train(
    config: SegmenterTraining,
    phantoms: Sequence[Example],
    real: Sequence[Example],
    progress: Progress,
) -> Segmenter:
    """Train from random weights; ``real`` may be empty. The same arguments give the same weights."""
    torch.manual_seed(config.seed)
    rng = np.random.default_rng([config.seed, 23])
    model = Segmenter()
    optimiser = torch.optim.AdamW(model.parameters(), config.learning_rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, config.learning_rate, total_steps=config.steps, pct_start=0.1
    )
    from_real = round(config.batch * config.real_share) if real else 0
    with progress.stage("training", config.steps) as advance:
        for step in range(config.steps):
            drawn = [real[i] for i in rng.integers(len(real), size=from_real)] if real else []
            others = rng.integers(len(phantoms), size=config.batch - from_real)
            drawn += [phantoms[i] for i in others]
            views = [augmented(example, config.crop_pixels, rng) for example in drawn]
            images, codes = (torch.stack(part) for part in zip(*views, strict=True))
            logits = model(normalise(images))
            loss = marginal_loss(logits, codes) + overlap_loss(logits, codes)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch is partly untyped
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            advance(f"step {step + 1}/{config.steps}: loss {loss.item():.4f}")
    return model.eval()


def make_segmenter(
    config: SegmenterTraining,
    out: Path,
    contours: Path | None,
    command: str,
    progress: Progress,
) -> dict[str, Any]:
    """Simulate, train, write the weights to ``out`` and return what they say of their origin.

    The result also holds ``sha256`` (of the weights), ``bytes`` and ``parameters``.

    Raises:
        ConfigurationError: ``out`` has no folder to go to.
        DataError: ``contours`` holds no images, or damaged ones.
        ModelError: the weights cannot be written.
    """
    if not out.absolute().parent.is_dir():
        raise ConfigurationError(f"--out {out}: its folder does not exist: make it first")
    real = [] if contours is None else list(contoured(contours))
    real = [example for example in real if example.patient not in HELD_OUT]
    with progress.stage("simulating patients", config.phantom_patients) as advance:
        phantoms: list[Example] = []
        for example in simulated(TRAINING_CENTRES, config.phantom_patients, config.seed):
            if not phantoms or phantoms[-1].patient != example.patient:
                advance(example.patient)
            phantoms.append(example)
    model = train(config, phantoms, real, progress)
    said = _lineage(config, len(phantoms), real, command)
    digest = save_segmenter(out, model, said)
    return {
        **said,
        "sha256": digest,
        "bytes": out.stat().st_size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _lineage(
    config: SegmenterTraining, phantoms: int, real: Sequence[Example], command: str
) -> dict[str, Any]:
    """What the weights say of their origin; paths stay out."""
    patients = sorted({example.patient for example in real})
    source = "public (Sunnybrook Cardiac Data, CC0 1.0)"
    return {
        "origin": f"simulated and {source}" if real else "simulated",
        "privacy": "none - public or simulated data only",
        "command": command,
        "configuration": config.model_dump(mode="json"),
        "seed": config.seed,
        "centres": [centre.name for centre in TRAINING_CENTRES],
        "simulated_images": phantoms,
        "real_images": len(real),
        "real_patients": patients,
        "held_out": list(HELD_OUT),
        "versions": {name: version(name) for name in _PACKAGES},
    }
