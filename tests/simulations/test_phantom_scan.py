from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.fft

from fedcmr_simulations.centres import CENTRES
from fedcmr_simulations.phantom import acquisition, anatomy
from fedcmr_simulations.phantom.acquisition import Grid
from fedcmr_simulations.phantom.canvas import Canvas
from fedcmr_simulations.phantom.coils import CoilArray, noise_covariance
from fedcmr_simulations.phantom.patient import draw_patient
from fedcmr_simulations.phantom.protocol import Modality, protocol
from fedcmr_simulations.phantom.scan import Scan

AXES = (-2, -1)


def images_of(kspace: np.ndarray) -> np.ndarray:
    shifted = scipy.fft.ifft2(scipy.fft.ifftshift(kspace, axes=AXES), norm="ortho")
    return scipy.fft.fftshift(shifted, axes=AXES)


def example(modality: Modality = "cine", centre: int = 0, seed: int = 3, snr: float = 40.0) -> Scan:
    site = CENTRES[centre]
    patient = draw_patient("p", "NC", np.random.default_rng(seed))
    scanner = replace(site.equipment("quick"), snr=snr)
    sequence = protocol(modality, "quick", site.field_strength_t)
    return Scan(patient, scanner, sequence, (45.0,), (seed,))


def test_tissue_fractions_stay_fractions() -> None:
    patient = draw_patient("p", "MI", np.random.default_rng(1))
    axis = np.arange(-150, 150, 2.0, dtype=np.float32)
    canvas = Canvas.blank(axis, axis, 2.0)
    anatomy.paint_body(canvas, patient.body, 45.0, 0.0)
    anatomy.paint_heart(
        anatomy.heart_window(canvas, patient), patient, patient.heart.at(0.1), 45.0, 0.0
    )
    assert canvas.weights.min() >= -1e-6
    assert canvas.weights.sum(axis=0).max() <= 1 + 1e-5


def test_a_soft_disc_has_the_area_of_the_disc() -> None:
    axis = np.arange(-40, 40, 1.0, dtype=np.float32)
    canvas = Canvas.blank(axis, axis, 2.0)
    canvas.paint_ellipse("fat", (3.3, -2.1), (20, 12), angle=0.4)
    assert canvas.weights.sum() == pytest.approx(np.pi * 20 * 12, rel=0.01)


@pytest.mark.parametrize("oversampling", [1.0, 2.0])
def test_acquisition_keeps_place_and_brightness(oversampling: float) -> None:
    grid = Grid(48, 40, (3.0, 3.0), oversampling)
    x, y = grid.fine_axes((10.0, -5.0))
    blob = np.exp(-((x[None] - 22) ** 2 + (y[:, None] + 17) ** 2) / (2 * 8.0**2))
    maps = np.ones((1, len(y), len(x)), np.complex64)
    quiet = np.zeros((1, 1), np.complex128)
    kspace = acquisition.acquire(
        blob.astype(np.complex64), maps, grid, quiet, np.random.default_rng(0)
    )
    assert kspace.shape == (1, 48, round(40 * oversampling))
    image = images_of(kspace)[0]
    start = image.shape[1] // 2 - 20
    image = image[:, start : start + 40]
    row, column = np.unravel_index(np.argmax(np.abs(image)), image.shape)
    image_x, image_y = grid.image_axes((10.0, -5.0))
    assert (image_x[column], image_y[row]) == (22.0, -17.0)
    assert np.abs(image[row, column]) == pytest.approx(1, abs=0.01)
    assert np.abs(np.angle(image[row, column])) < 0.02


def test_noise_has_the_stored_covariance() -> None:
    covariance = noise_covariance(5, 0.4, np.random.default_rng(2))
    np.testing.assert_allclose(covariance, covariance.conj().T, atol=1e-12)
    assert np.linalg.eigvalsh(covariance).min() > 0
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() > 0.2
    grid = Grid(96, 96, (2.0, 2.0), 2.0)
    empty = np.zeros((192, 384), np.complex64)
    kspace = acquisition.acquire(
        empty,
        np.ones((5, 192, 384), np.complex64),
        grid,
        np.linalg.cholesky(covariance),
        np.random.default_rng(4),
    ).reshape(5, -1)
    np.testing.assert_allclose(kspace @ kspace.conj().T / kspace.shape[1], covariance, atol=0.05)


def test_coils_are_brightest_near_themselves() -> None:
    body = draw_patient("p", "NC", np.random.default_rng(1)).body
    x = np.linspace(-200, 200, 80, dtype=np.float32)
    y = np.linspace(-150, 150, 60, dtype=np.float32)
    array = CoilArray(coils=6, front=3, radius=60, gap=20, front_arc=1.0, back_arc=1.0)
    maps = np.abs(array.sensitivities(x, y, body))
    rows = maps.sum(axis=2) @ np.arange(60) / maps.sum(axis=(1, 2))
    assert rows[:3].max() < rows[3:].min()


@pytest.mark.parametrize("modality", ["cine", "T1 mapping", "T2 mapping", "LGE", "perfusion"])
def test_every_contrast_is_deterministic_finite_and_marked_simulated(modality: Modality) -> None:
    first, second = example(modality), example(modality)
    pairs = list(zip(first.images(), second.images(), strict=True))
    assert len(pairs) == first.sequence.frames
    for (frame, slice_, kspace), (other_frame, other_slice, other) in pairs:
        assert (frame, slice_) == (other_frame, other_slice)
        assert np.isfinite(kspace).all()
        assert kspace.tobytes() == other.tobytes()
    source = first.source()
    assert source.metadata.origin == "simulated"
    assert source.metadata.modality == modality
    assert source.metadata.coils == kspace.shape[0]


def test_another_seed_gives_another_scan() -> None:
    one, two = (next(iter(example(seed=seed).images()))[2] for seed in (3, 4))
    assert not np.allclose(one, two, rtol=0.1)


def test_labels_lie_on_the_heart_of_the_image() -> None:
    scan = example(snr=1e4)
    _, _, kspace = next(iter(scan.images()))
    image = np.sqrt((np.abs(images_of(kspace)) ** 2).sum(axis=0))
    width = scan.scanner.grid.readout
    start = image.shape[1] // 2 - width // 2
    image = image[:, start : start + width]
    truth = scan.truth()
    assert truth.labels is not None
    label = truth.labels[0, 0]
    cavity, wall, right = (np.median(image[label == value]) for value in (1, 2, 3))
    assert cavity > 1.5 * wall
    assert right > 1.5 * wall


def test_end_systole_is_smaller_than_end_diastole_in_the_labels() -> None:
    scan = example()
    labels = scan.truth().labels
    assert labels is not None
    areas = (labels == 1).sum(axis=(1, 2, 3))
    assert int(np.argmin(areas)) == scan.sequence.phases.index(0.35)
    assert areas.argmax() == 0


def test_noise_in_the_k_space_follows_the_snr() -> None:
    noisy, clean = example(snr=10), example(snr=1e6)
    difference = next(iter(noisy.images()))[2] - next(iter(clean.images()))[2]
    expected = np.trace(noisy.covariance).real / len(difference)
    assert np.mean(np.abs(difference) ** 2) == pytest.approx(expected, rel=0.05)
