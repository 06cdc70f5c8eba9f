import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcmr_shared.errors import DataError
from fedcmr_shared.metrics.image_quality import nmse, normalise, psnr, score, ssim


def pair(seed: int = 0, shape: tuple[int, int] = (24, 31)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    reference = rng.gamma(2.0, 1.0, shape)
    return reference, np.abs(reference + 0.2 * rng.normal(size=shape))


def ssim_by_definition(reference: np.ndarray, image: np.ndarray) -> float:
    """Equation 13 of Wang et al. 2004 in every full 7x7 window, unbiased variances."""
    c1, c2 = (0.01 * reference.max()) ** 2, (0.03 * reference.max()) ** 2
    x = np.lib.stride_tricks.sliding_window_view(reference, (7, 7)).reshape(-1, 49)
    y = np.lib.stride_tricks.sliding_window_view(image, (7, 7)).reshape(-1, 49)
    mean_x, mean_y = x.mean(1), y.mean(1)
    covariance = ((x - mean_x[:, None]) * (y - mean_y[:, None])).sum(1) / 48
    numerator = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    variances = x.var(1, ddof=1) + y.var(1, ddof=1)
    return float((numerator / ((mean_x**2 + mean_y**2 + c1) * (variances + c2))).mean())


def test_scores_equal_their_definitions_after_percentile_normalisation() -> None:
    reference, image = pair()
    quality = score(reference, image)
    x = reference / np.percentile(reference, 99.5)
    y = image / np.percentile(image, 99.5)
    squared_error = (x - y) ** 2
    assert quality.psnr == pytest.approx(10 * math.log10(x.max() ** 2 / squared_error.mean()))
    assert quality.nmse == pytest.approx(squared_error.sum() / (x**2).sum())
    assert quality.ssim == pytest.approx(ssim_by_definition(x, y), abs=1e-12)


def test_normalised_images_are_not_clipped() -> None:
    reference, _ = pair()
    assert normalise(reference).max() > 1
    assert np.percentile(normalise(reference), 99.5) == pytest.approx(1)


@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**16),
    scale=st.floats(1e-6, 1e6),
    other=st.floats(1e-6, 1e6),
)
def test_scores_do_not_depend_on_either_scale(seed: int, scale: float, other: float) -> None:
    reference, image = pair(seed)
    assert score(scale * reference, other * image) == pytest.approx(score(reference, image))


@settings(max_examples=10)
@given(seed=st.integers(0, 2**16))
def test_more_noise_scores_worse_everywhere(seed: int) -> None:
    reference, _ = pair(seed)
    noise = np.random.default_rng(seed + 1).normal(size=reference.shape)
    better, worse = (score(reference, np.abs(reference + s * noise)) for s in (0.05, 0.5))
    assert better.psnr > worse.psnr
    assert better.ssim > worse.ssim
    assert better.nmse < worse.nmse


def test_equal_images_are_perfect() -> None:
    reference, _ = pair()
    quality = score(reference, 3.0 * reference)
    assert quality.psnr > 250
    assert quality.ssim == pytest.approx(1)
    assert quality.nmse == pytest.approx(0, abs=1e-25)
    normal = normalise(reference)
    assert psnr(normal, normal) == math.inf
    assert ssim(normal, normal) == 1
    assert nmse(normal, normal) == 0


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (np.zeros((16, 16)), "percentile"),
        (np.full((16, 16), np.nan), "not finite"),
        (np.full((16, 16), np.inf), "not finite"),
    ],
)
def test_zero_and_non_finite_images_are_refused(broken: np.ndarray, message: str) -> None:
    reference, _ = pair(shape=(16, 16))
    with pytest.raises(DataError, match=message):
        score(reference, broken)
    with pytest.raises(DataError, match=r"percentile|not finite|constant"):
        score(broken, reference)


def test_an_image_with_one_bright_pixel_is_refused() -> None:
    reference, image = pair()
    image[:] = 0
    image[3, 4] = 1
    with pytest.raises(DataError, match="almost"):
        score(reference, image)


def test_a_constant_reference_is_refused() -> None:
    _, image = pair()
    with pytest.raises(DataError, match="constant"):
        score(np.ones_like(image), image)


def test_shapes_must_agree_and_hold_the_window() -> None:
    reference, image = pair()
    with pytest.raises(DataError, match="differ in shape"):
        score(reference, image[1:])
    with pytest.raises(DataError, match="at least 7"):
        score(reference[:6], image[:6])
    with pytest.raises(DataError, match="2D"):
        score(reference[None], image[None])
