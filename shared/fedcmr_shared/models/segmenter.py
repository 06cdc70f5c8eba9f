"""A small U-Net that finds LV cavity, LV wall and RV in short-axis bSSFP images.

It measures phenotypes on reconstructed and generated images, so it must not have learned from
patients without privacy: the packaged weights come from simulated hearts and from public images of
real ones (`fedcmr_shared/weights`). It is a tool for comparing images, no medical device.

The image enters in blocks of 2 x 2 pixels and leaves the same way: a quarter of the work.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F

from fedcmr_shared.errors import DataError, ModelError
from fedcmr_shared.models.bundle import state_sha256

CLASSES: Final = ("other", "LV cavity", "LV myocardium", "RV")
"""Labels by number, as `fedcmr_shared.metrics.phenotypes` reads them."""
PIXEL_MM: Final = 2.0
"""Pixel size at which the network works."""
WIDTHS: Final = (24, 40, 56, 80)
FORMAT: Final = "segmenter 1"

_BLOCK: Final = 2
_MULTIPLE: Final = _BLOCK * 2 ** (len(WIDTHS) - 1)
_PERCENTILE: Final = 99.5
_BATCH: Final = 16


class ConvBlock(nn.Sequential):
    """Two 3 x 3 convolutions, each with batch statistics, so that the field of view is free."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.SiLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.SiLU(),
        )


class Segmenter(nn.Module):
    """U-Net with 4 levels; sides must be multiples of 16."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        steps = list(pairwise(widths))
        self.stem = ConvBlock(_BLOCK**2, widths[0])
        self.down = nn.ModuleList(ConvBlock(fine, coarse) for fine, coarse in steps)
        self.up = nn.ModuleList(ConvBlock(fine + coarse, fine) for fine, coarse in reversed(steps))
        self.head = nn.Conv2d(widths[0], len(CLASSES) * _BLOCK**2, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images ``[n, y, x]`` to logits ``[n, class, y, x]``."""
        x = self.stem(F.pixel_unshuffle(images[:, None], _BLOCK))
        skips = []
        for block in self.down:
            skips.append(x)
            x = block(F.max_pool2d(x, 2))
        for block in self.up:
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
            x = block(torch.cat([skips.pop(), x], dim=1))
        return F.pixel_shuffle(self.head(x), _BLOCK)


def normalise(images: Tensor) -> Tensor:
    """Divide magnitudes ``[n, y, x]`` by their own 99.5 percentile, at most 1.5."""
    scale = torch.quantile(images.flatten(1), _PERCENTILE / 100, dim=1)[:, None, None]
    return (images / scale.clamp_min(1e-12)).clamp(0, 1.5)


@torch.inference_mode()
def segment(
    model: Segmenter, images: NDArray[np.floating], spacing_mm: tuple[float, float]
) -> NDArray[np.uint8]:
    """Labels of magnitude ``images`` ``[..., y, x]``, numbered as CLASSES, of the same shape.

    ``spacing_mm`` is that of rows and columns. Of the LV and of the RV only the largest connected
    piece of each image stays.

    Raises:
        DataError: an image is no image, has values that are not finite, or a spacing is not
            positive.
    """
    if images.ndim < 2 or 0 in images.shape or not np.isfinite(images).all():
        raise DataError(
            f"images of shape {images.shape} cannot be segmented: use finite magnitudes [..., y, x]"
        )
    if not all(0 < size < np.inf for size in spacing_mm):
        raise DataError(f"spacing_mm {spacing_mm} must be positive, in mm")
    flat = torch.from_numpy(np.ascontiguousarray(images, np.float32))
    flat = flat.reshape(-1, *images.shape[-2:])
    starts = range(0, len(flat), _BATCH)
    labels = [_segment(model, flat[start : start + _BATCH], spacing_mm) for start in starts]
    found = [_largest_pieces(label) for label in torch.cat(labels).numpy().astype(np.uint8)]
    return np.stack(found).reshape(images.shape)


def _segment(model: Segmenter, images: Tensor, spacing_mm: tuple[float, float]) -> Tensor:
    original = images.shape[-2:]
    size = [
        max(round(pixels * mm / PIXEL_MM), 1)
        for pixels, mm in zip(original, spacing_mm, strict=True)
    ]
    scaled = F.interpolate(images[:, None], size, mode="bilinear", antialias=True)[:, 0]
    rows, columns = (-(-pixels // _MULTIPLE) * _MULTIPLE - pixels for pixels in size)
    padded = F.pad(scaled, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
    device = next(model.parameters()).device
    logits = model(normalise(padded).to(device)).cpu()
    logits = logits[..., rows // 2 : rows // 2 + size[0], columns // 2 : columns // 2 + size[1]]
    return F.interpolate(logits, original, mode="bilinear", align_corners=False).argmax(1)


def _largest_pieces(labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    result = np.zeros_like(labels)
    for part in ((1, 2), (3,)):
        pieces, count = ndimage.label(np.isin(labels, part))
        if count:
            largest = np.bincount(pieces.ravel())[1:].argmax() + 1
            result[pieces == largest] = labels[pieces == largest]
    return result


@dataclass(frozen=True)
class LoadedSegmenter:
    """A network in evaluation mode, the SHA-256 of its weights and what is said of their origin."""

    model: Segmenter
    sha256: str
    lineage: Mapping[str, str]


def default_segmenter() -> Path:
    """Return the packaged weights."""
    return Path(str(resources.files("fedcmr_shared") / "weights" / "segmenter.safetensors"))


def save_segmenter(path: Path, model: Segmenter, lineage: Mapping[str, object]) -> str:
    """Write weights and lineage atomically and return the SHA-256 of the weights.

    Raises:
        ModelError: the file cannot be written.
    """
    state = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    digest = state_sha256(state)
    text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in lineage.items()}
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        save_file(state, partial, {**text, "fedcmr_format": FORMAT, "state_sha256": digest})
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot write the weights: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return digest


def load_segmenter(path: Path | None = None) -> LoadedSegmenter:
    """Read weights, the packaged ones when ``path`` is None, and check them against their hash.

    Raises:
        ModelError: the file is absent, damaged, no segmenter, or its weights are not those hashed.
    """
    path = default_segmenter() if path is None else path
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: weights of a segmenter cannot be read: {error}") from error
    if metadata.pop("fedcmr_format", None) != FORMAT:
        raise ModelError(f"{path} holds no weights of a segmenter: use the packaged ones")
    digest = state_sha256(state)
    if metadata.pop("state_sha256", None) != digest:
        raise ModelError(f"{path}: weights do not match their hash: fetch the file again")
    with torch.random.fork_rng(devices=[]):
        model = Segmenter()
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(f"{path}: weights do not fit this version's segmenter") from error
    return LoadedSegmenter(model.eval(), digest, metadata)
