"""Laws of the synthesis of k-space from magnitude images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcmr_client.importers import ImportOptions
from fedcmr_client.importers.synthesis import (
    MagnitudeStack,
    Synthesis,
    coil_maps,
    crop_bandwidth,
    crop_labels,
    noise_covariance,
)
from fedcmr_shared.errors import ConfigurationError, DataError
from fedcmr_shared.kspace.fourier import ifft2c


def heart(size: tuple[int, int] = (64, 64)) -> np.ndarray:
    y, x = np.ogrid[-1 : 1 : size[0] * 1j, -1 : 1 : size[1] * 1j]
    image: np.ndarray = (100 * np.exp(-8 * (y**2 + x**2)) + 5).astype(np.float32)
    return image


def stack(image: np.ndarray, matrix: tuple[int, int], frames: int = 2) -> MagnitudeStack:
    return MagnitudeStack(frames, 1, matrix, lambda t, z: image * (1 + t), "test")


@settings(max_examples=20)
@given(st.integers(1, 16), st.integers(4, 40), st.integers(4, 40), st.integers(0, 2**32))
def test_coil_maps_have_unit_root_sum_of_squares(c: int, ny: int, nx: int, seed: int) -> None:
    maps = coil_maps(c, (ny, nx), np.random.default_rng(seed))
    np.testing.assert_allclose((np.abs(maps) ** 2).sum(axis=0), 1)


def test_coil_maps_are_smooth() -> None:
    maps = coil_maps(8, (64, 64), np.random.default_rng(0))
    for axis in (1, 2):
        assert np.abs(np.diff(maps, axis=axis)).max() < 0.15


@settings(max_examples=20)
@given(st.integers(1, 32), st.integers(0, 2**32))
def test_noise_covariance_is_positive_definite(coils: int, seed: int) -> None:
    covariance = noise_covariance(coils, 2.0, np.random.default_rng(seed))
    np.testing.assert_allclose(covariance, covariance.conj().T)
    assert np.linalg.eigvalsh(covariance).min() > 0


def test_root_sum_of_squares_gives_the_image_back() -> None:
    image = heart()
    synthesis = Synthesis(stack(image, (64, 64)), ImportOptions(snr=1e5))
    for frame, _, kspace in synthesis.images():
        coils = ifft2c(torch.from_numpy(kspace))
        magnitude = coils.abs().square().sum(dim=0).sqrt().numpy()
        np.testing.assert_allclose(magnitude, image * (1 + frame), rtol=0.01)


def test_noise_has_the_stated_covariance() -> None:
    options = ImportOptions(coils=4, snr=20)
    noisy = Synthesis(stack(heart(), (64, 64), 20), options)
    clean = Synthesis(stack(heart(), (64, 64), 20), ImportOptions(coils=4, snr=1e9))
    pairs = zip(noisy.images(), clean.images(), strict=True)
    noise = np.concatenate([(a[2] - b[2]).reshape(4, -1) for a, b in pairs], axis=1)
    measured = noise @ noise.conj().T / noise.shape[1]
    scale = np.abs(noisy.noise_covariance).max()
    np.testing.assert_allclose(measured, noisy.noise_covariance, atol=0.02 * scale)


def test_cropping_keeps_a_band_limited_image() -> None:
    """A wave below the new band limit has the same values at the common points."""
    y = np.arange(64)[:, None] / 64
    x = np.arange(48)[None, :] / 48
    wave = 10 + np.cos(2 * np.pi * 3 * y) + np.sin(2 * np.pi * 5 * x)
    cropped = crop_bandwidth(wave.astype(np.float32), (32, 24))
    np.testing.assert_allclose(cropped, wave[::2, ::2], atol=1e-4)


def test_labels_follow_the_image() -> None:
    image = np.zeros((64, 48), np.float32)
    image[20:30, 16:32] = 1
    cropped = crop_labels(image.astype(np.uint8), (32, 24))
    assert (crop_bandwidth(image, (32, 24))[cropped == 1] > 0.4).all()
    assert cropped.sum() == image.sum() / 4


def test_content_and_seed_decide_the_samples() -> None:
    def samples(image: np.ndarray, seed: int) -> np.ndarray:
        synthesis = Synthesis(stack(image, (48, 48)), ImportOptions(coils=2, seed=seed))
        return np.array([kspace for _, _, kspace in synthesis.images()])

    first = samples(heart(), 1)
    np.testing.assert_array_equal(first, samples(heart(), 1))
    assert not np.allclose(first, samples(heart(), 2))
    assert not np.allclose(first, samples(heart() + 1, 1))


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_unusable_images_are_refused(value: float) -> None:
    image = np.full((16, 16), value, np.float32)
    with pytest.raises(DataError, match=r"empty|NaN"):
        Synthesis(stack(image, (16, 16)), ImportOptions())


@pytest.mark.parametrize(
    "wrong",
    [
        {"coils": 0},
        {"coils": 65},
        {"snr": 0.0},
        {"snr": float("inf")},
        {"seed": -1},
        {"acquired_fraction": (0.0, 1.0)},
        {"patient": ""},
        {"patient_map": {"a": ""}},
    ],
)
def test_options_name_what_is_wrong(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong)).split("_")[0]):
        ImportOptions(**wrong)  # type: ignore[arg-type]  # wrong on purpose
