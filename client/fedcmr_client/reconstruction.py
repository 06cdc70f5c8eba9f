"""Reconstruct all images of one scan with a trained network; numbers in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedcmr_client.devices import on_device
from fedcmr_shared.errors import ConfigurationError, DataError, ModelError
from fedcmr_shared.kspace.coils import remove_readout_oversampling
from fedcmr_shared.kspace.masks import Sampling, acs_mask, make_mask, realised_acceleration
from fedcmr_shared.models.bundle import Bundle
from fedcmr_shared.models.cardiomm import CardioMM
from fedcmr_shared.schemas.acquisition import AcquisitionMetadata
from fedcmr_shared.text.encoders import TextEncoder
from fedcmr_shared.text.prompts import metadata_text, sampling_text

Undersampling = Literal["retrospective", "prospective"]
"""Lines left out of a fully sampled scan by us, or by the scanner."""

ReadImage = Callable[[int, int], np.ndarray]
"""Gives the stored k-space of (frame, slice), complex64 ``[coil, phase, readout]``."""

RESIDUAL_DEFINITION: Final = (
    "||M k - M y|| / ||M y|| over all coils and images of the scan, "
    "M = sampling mask, k = k-space of the reconstruction, y = measured k-space"
)


@dataclass(frozen=True)
class ReconstructedScan:
    """Images of a scan and how they came about.

    Attributes:
        images: root-sum-of-squares magnitude, float32 ``[frame, slice, y, x]``, in the units of
            the stored k-space under a centred orthonormal transform.
        sampling: pattern and nominal acceleration factor, as told to the network.
        undersampling: who left the lines out.
        realised_acceleration: all samples over measured ones, calibration lines included.
        residual: relative data-consistency residual, see :data:`RESIDUAL_DEFINITION`.
    """

    images: np.ndarray
    sampling: Sampling
    undersampling: Undersampling
    realised_acceleration: float
    residual: float


def reconstruct_scan(
    read: ReadImage,
    metadata: AcquisitionMetadata,
    bundle: Bundle,
    encoder: TextEncoder,
    sampling: Sampling,
    *,
    seed: int = 0,
    device: str = "cpu",
    on_image: Callable[[], None] = lambda: None,
) -> ReconstructedScan:
    """Reconstruct every frame and slice of a scan, after removal of readout oversampling.

    A fully sampled scan is undersampled with ``sampling``. A scan whose stored k-space lacks
    lines between its first and its last one was undersampled at the scanner: the lines it has are
    used, and ``sampling`` only says what to tell the network. Lines that lack at the edges
    (partial Fourier, zero filling) do not make a scan undersampled. An image without any measured
    sample stays zero.

    Args:
        read: source of the k-space; called twice for each image, first to find missing lines.
        metadata: of the scan.
        bundle: a trained CardioMM.
        encoder: the text encoder that the bundle names.
        sampling: pattern, nominal acceleration factor and calibration lines.
        seed: of the random patterns.
        device: torch device for the network.
        on_image: called after each image.

    Raises:
        ConfigurationError: the sampling does not fit the scan, or the device does not exist.
        DataError: calibration lines are missing in a scan undersampled at the scanner.
        ModelError: the bundle holds another kind of model or gives values that are not finite.
    """
    model = _reconstructor(bundle, device)
    texts = _texts(bundle, encoder, metadata, sampling, device)
    masks, undersampling = _masks(read, metadata, sampling, seed)
    acs = torch.from_numpy(acs_mask(sampling, *masks.shape[-2:]))[None, None].to(device)
    images = np.zeros((*masks.shape[:2], *masks.shape[-2:]), dtype=np.float32)
    error = energy = 0.0
    for frame, slice_ in np.ndindex(masks.shape[:2]):
        mask = torch.from_numpy(masks[frame, slice_])[None, None].to(device)
        kspace = torch.from_numpy(read(frame, slice_))
        kspace = remove_readout_oversampling(kspace, metadata.readout_oversampling)
        measured = kspace[None].to(device) * mask
        if measured.any():  # of nothing measured, a network would still make an image
            with torch.inference_mode():
                output = model(measured, mask, acs, *texts)
            images[frame, slice_] = _finite(output.image[0], frame, slice_)
            error += _energy((output.kspace - measured) * mask)
            energy += _energy(measured)
        on_image()
    residual = math.sqrt(error / energy) if energy else 0.0
    return ReconstructedScan(
        images, sampling, undersampling, realised_acceleration(masks), residual
    )


class _Texts(NamedTuple):
    metadata: Tensor
    sampling: Tensor


def _reconstructor(bundle: Bundle, device: str) -> CardioMM:
    if not isinstance(bundle.model, CardioMM):
        raise ModelError(f"model {bundle.spec.name} does not reconstruct: use a CardioMM bundle")
    return on_device(bundle.model, device)


def _texts(
    bundle: Bundle,
    encoder: TextEncoder,
    metadata: AcquisitionMetadata,
    sampling: Sampling,
    device: str,
) -> _Texts:
    if encoder.name != bundle.spec.text_encoder:
        raise ModelError(
            f"text encoder {encoder.name!r} given: "
            f"the bundle was trained with {bundle.spec.text_encoder!r}"
        )
    rows = encoder.encode([metadata_text(metadata), sampling_text(sampling)]).to(device)
    return _Texts(rows[:1], rows[1:])


def _masks(
    read: ReadImage, metadata: AcquisitionMetadata, sampling: Sampling, seed: int
) -> tuple[np.ndarray, Undersampling]:
    """Return bool masks ``[frame, slice, phase, readout]`` and who undersampled."""
    readout = round(metadata.readout_samples / metadata.readout_oversampling)
    shape = (metadata.frames, metadata.slices, metadata.phase_encodes, readout)
    lines = _acquired_lines(read, metadata)
    if not _has_gap(lines):
        masks = make_mask(
            sampling, phase_encodes=shape[2], readout=readout, frames=shape[0], seed=seed
        )
        return np.broadcast_to(masks[:, None], shape).copy(), "retrospective"
    if sampling.is_radial:
        raise ConfigurationError(
            f"pattern {sampling.pattern}: the scan was undersampled in whole lines; "
            "name a Cartesian pattern"
        )
    calibration = acs_mask(sampling, shape[2], readout)[:, 0]
    lacking = (lines.any(-1) & ~lines[..., calibration].all(-1)).any()
    if lacking:
        raise DataError(
            f"the scan was undersampled at the scanner and lacks some of {sampling.acs_lines} "
            "calibration lines: lower --acs-lines"
        )
    return np.broadcast_to(lines[..., None], shape).copy(), "prospective"


def _acquired_lines(read: ReadImage, metadata: AcquisitionMetadata) -> np.ndarray:
    """Return which lines hold any sample: bool ``[frame, slice, phase]``."""
    lines = np.empty((metadata.frames, metadata.slices, metadata.phase_encodes), dtype=np.bool_)
    for frame, slice_ in np.ndindex(lines.shape[:2]):
        lines[frame, slice_] = read(frame, slice_).any(axis=(0, 2))
    return lines


def _has_gap(lines: np.ndarray) -> bool:
    """Whether a line lacks between the first and the last one of any image."""
    forwards = np.logical_or.accumulate(lines, axis=-1)
    backwards = np.logical_or.accumulate(lines[..., ::-1], axis=-1)[..., ::-1]
    return bool((forwards & backwards & ~lines).any())


def _finite(image: Tensor, frame: int, slice_: int) -> np.ndarray:
    if not torch.isfinite(image).all():
        raise ModelError(f"the model gives no finite image for frame {frame}, slice {slice_}")
    values: np.ndarray = image.cpu().numpy()
    return values


def _energy(values: Tensor) -> float:
    # Sums of millions of squares lose digits in single precision.
    return float(values.abs().double().square().sum())
