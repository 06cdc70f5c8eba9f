"""Image quality of one reconstructed 2D frame, as CardioMM measures it (arXiv 2512.21652).

Reference and reconstruction are each divided by their own 99.5 percentile, without clipping; the
data range of PSNR and SSIM is the maximum of the normalised reference; SSIM uses scikit-image's
uniform 7x7 window (Wang et al. 2004). The scores do not depend on the scale of either image.
Scores taken with another normalisation or crop must never stand in the same table.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from fedcmr_shared.errors import DataError

Image = NDArray[np.floating]
NormalisedImage = NDArray[np.float64]

PERCENTILE: Final = 99.5
SSIM_WINDOW: Final = 7


class Quality(NamedTuple):
    """Scores of one frame: PSNR in dB, SSIM at most 1 and NMSE, a ratio of energies."""

    psnr: float
    ssim: float
    nmse: float


def score(reference: Image, image: Image) -> Quality:
    """Score the magnitude ``image`` ``[y, x]`` against ``reference`` of the same shape.

    Raises:
        DataError: shapes differ, an image is smaller than the SSIM window, has a value that is not
            finite or a 99.5 percentile of zero, or the reference is constant.
    """
    _check_pair(reference, image)
    normal_reference, normal_image = normalise(reference), normalise(image)
    return Quality(
        psnr=psnr(normal_reference, normal_image),
        ssim=ssim(normal_reference, normal_image),
        nmse=nmse(normal_reference, normal_image),
    )


def normalise(image: Image, percentile: float = PERCENTILE) -> NormalisedImage:
    """Divide a magnitude ``image`` by its own percentile, without clipping.

    Raises:
        DataError: a value is not finite, or the percentile is not positive.
    """
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise DataError("image has values that are not finite: it cannot be scored")
    scale = float(np.percentile(values, percentile))
    if scale <= 0:
        raise DataError(
            f"image has a {percentile} percentile of {scale:g}: an image that is (almost) all zero "
            "cannot be scored"
        )
    return values / scale


def psnr(reference: NormalisedImage, image: NormalisedImage) -> float:
    """Return the peak signal-to-noise ratio in dB of normalised images; infinite for equal ones."""
    if np.array_equal(reference, image):
        return math.inf
    data_range = float(reference.max())
    value = peak_signal_noise_ratio(  # type: ignore[no-untyped-call]  # scikit-image is untyped
        reference, image, data_range=data_range
    )
    return float(value)


def ssim(reference: NormalisedImage, image: NormalisedImage) -> float:
    """Return the mean structural similarity of normalised images, uniform 7x7 window."""
    data_range = float(reference.max())
    value = structural_similarity(  # type: ignore[no-untyped-call]  # scikit-image is untyped
        reference, image, win_size=SSIM_WINDOW, data_range=data_range
    )
    return float(value)


def nmse(reference: NormalisedImage, image: NormalisedImage) -> float:
    """Return ``||reference - image||² / ||reference||²`` of normalised images."""
    return float(np.sum((reference - image) ** 2) / np.sum(reference**2))


def _check_pair(reference: Image, image: Image) -> None:
    if reference.shape != image.shape:
        raise DataError(
            f"reconstruction {image.shape} and reference {reference.shape} differ in shape"
        )
    if reference.ndim != 2 or min(reference.shape) < SSIM_WINDOW:
        raise DataError(
            f"images of shape {reference.shape} cannot be scored: use 2D frames of at least "
            f"{SSIM_WINDOW} x {SSIM_WINDOW} pixels"
        )
    if reference.min() == reference.max():
        raise DataError("reference is constant: there is nothing to compare with")
