import itertools

import numpy as np
import pytest
import sigpy.mri
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedcmr_shared.errors import ConfigurationError, DataError
from fedcmr_shared.kspace.coils import expand, reduce, rss
from fedcmr_shared.kspace.fourier import fft2c, ifft2c
from fedcmr_shared.kspace.masks import Sampling, acs_region, make_mask
from fedcmr_shared.kspace.sense import (
    SenseCase,
    SenseSettings,
    cg_iterates,
    cg_sense,
    combine,
    estimate_maps,
    normal_operator,
    reconstruct,
    tune_regularisation,
)
from fedcmr_shared.metrics.image_quality import score

SIZE = 96
COILS = 8


def object_image(seed: int = 0, size: int = SIZE) -> Tensor:
    """A body with lungs, two ventricles and small vessels, smooth phase; complex [y, x]."""
    rng = np.random.default_rng(seed)
    y, x = (np.mgrid[: 4 * size, : 4 * size] + 0.5) / (2 * size) - 1
    image = np.zeros_like(x)
    ellipses = [(0.0, 0.0, 0.8, 0.66, 0.8), (0.0, 0.0, 0.74, 0.6, 0.45)]
    ellipses += [(-0.42, 0.0, 0.24, 0.38, 0.08), (0.45, 0.0, 0.2, 0.36, 0.08)]
    ellipses += [(-0.12, -0.05, 0.18, 0.15, 0.85), (0.08, -0.05, 0.19, 0.19, 0.35)]
    ellipses += [(0.08, -0.05, 0.12, 0.12, 0.95), (0.0, 0.42, 0.09, 0.09, 0.9)]
    for _ in range(14):
        centre = rng.uniform(-0.5, 0.5, 2)
        ellipses.append((*centre, 0.025, 0.03, rng.uniform(0.1, 1)))
    for cx, cy, a, b, value in ellipses:
        image[((x - cx) / a) ** 2 + ((y - cy) / b) ** 2 < 1] = value
    small = image.reshape(size, 4, size, 4).mean((1, 3))
    phase = np.exp(1j * (0.8 * x * y + 0.5 * x)[::4, ::4])
    return torch.from_numpy(small * phase).to(torch.complex64)


def coil_maps(size: int = SIZE, coils: int = COILS) -> Tensor:
    """Smooth sensitivities around the body, unit root-sum-of-squares; [1, coil, y, x]."""
    y, x = np.mgrid[:size, :size] / size * 2 - 1
    maps = []
    for angle in 2 * np.pi * np.arange(coils) / coils:
        squared = (x - 1.1 * np.cos(angle)) ** 2 + (y - np.sin(angle)) ** 2
        turn = angle + 1.2 * (x * np.cos(angle) + y * np.sin(angle))
        maps.append(np.exp(1j * turn) / (squared + 0.35) ** 1.2)
    stacked = torch.from_numpy(np.stack(maps)).to(torch.complex64)[None]
    return stacked / rss(stacked).unsqueeze(-3)


def scan(seed: int = 0, noise: float = 0.01) -> Tensor:
    """Fully sampled k-space [1, coil, phase, readout] with complex Gaussian noise."""
    kspace = fft2c(expand(object_image(seed)[None, None], coil_maps()))
    generator = torch.Generator().manual_seed(seed)
    return kspace + noise * torch.randn(kspace.shape, generator=generator, dtype=torch.complex64)


def undersampling(acceleration: float = 4) -> tuple[Tensor, tuple[slice, slice]]:
    sampling = Sampling("uniform", acceleration, 20)
    mask = make_mask(sampling, phase_encodes=SIZE, readout=SIZE, frames=1, seed=0)
    return torch.from_numpy(mask)[None], acs_region(sampling, SIZE, SIZE)


def case(seed: int, noise: float = 0.01, acceleration: float = 4) -> SenseCase:
    mask, acs = undersampling(acceleration)
    return SenseCase(scan(seed, noise)[0], mask[0], acs)


def psnr(kspace: Tensor, image: Tensor) -> float:
    return score(rss(ifft2c(kspace))[0].numpy(), image[0].numpy()).psnr


def random_complex(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.complex128)


@settings(max_examples=15)
@given(seed=st.integers(0, 2**16), regularisation=st.floats(0, 1))
def test_normal_operator_is_self_adjoint_and_positive(seed: int, regularisation: float) -> None:
    x, z = random_complex(seed, 2, 1, 9, 12), random_complex(seed + 1, 2, 1, 9, 12)
    maps = random_complex(seed + 2, 2, 3, 9, 12)
    mask = torch.rand(2, 1, 9, 12, generator=torch.Generator().manual_seed(seed)) > 0.5
    left = torch.vdot(normal_operator(x, mask, maps, regularisation).flatten(), z.flatten())
    right = torch.vdot(x.flatten(), normal_operator(z, mask, maps, regularisation).flatten())
    torch.testing.assert_close(left, right)
    quotient = torch.vdot(x.flatten(), normal_operator(x, mask, maps, regularisation).flatten())
    assert quotient.real >= regularisation * torch.vdot(x.flatten(), x.flatten()).real - 1e-9
    assert abs(quotient.imag) < 1e-9


def test_unit_maps_keep_the_spectrum_between_zero_and_one() -> None:
    mask, _ = undersampling()
    x = object_image()[None, None]
    for _ in range(10):
        x = normal_operator(x / x.norm(), mask, coil_maps(), 0.0)
    assert 0.5 < float(x.norm()) <= 1 + 1e-5


def test_full_sampling_without_regularisation_is_exact() -> None:
    image = object_image()[None, None]
    kspace = fft2c(expand(image, coil_maps()))
    result = cg_sense(kspace, torch.ones(1, 1, SIZE, SIZE), coil_maps(), 0.0, 5)
    torch.testing.assert_close(result, image, atol=1e-5, rtol=0)


def test_true_maps_remove_moderate_uniform_aliasing() -> None:
    image, maps = object_image()[None, None], coil_maps()
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[:, :, ::2] = 1
    kspace = mask * fft2c(expand(image, maps))
    result = cg_sense(kspace, mask, maps, 0.0, 40)
    assert float((result - image).norm() / image.norm()) < 1e-3


@settings(max_examples=5)
@given(seed=st.integers(0, 100), regularisation=st.sampled_from([0.0, 0.01, 0.3]))
def test_objective_never_grows_and_the_error_to_the_solution_shrinks(
    seed: int, regularisation: float
) -> None:
    mask, acs = undersampling()
    kspace = scan(seed).to(torch.complex128) * mask
    maps = estimate_maps(kspace, acs)
    images = list(itertools.islice(cg_iterates(kspace, mask, maps, regularisation), 15))

    def objective(image: Tensor) -> float:
        misfit = mask * fft2c(expand(image, maps)) - kspace
        return float(misfit.norm() ** 2 + regularisation * image.norm() ** 2)

    values = [objective(image) for image in images]
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(values))
    right_hand_side = reduce(ifft2c(kspace), maps)
    residuals = [
        float((right_hand_side - normal_operator(image, mask, maps, regularisation)).norm())
        for image in (images[0], images[-1])
    ]
    assert residuals[1] < 0.2 * residuals[0]


def test_examples_of_a_batch_do_not_influence_each_other() -> None:
    mask, acs = undersampling()
    kspace = torch.cat([scan(0) * mask, 1e4 * scan(1) * mask])
    chosen = SenseSettings(0.01, 12, 0.1)
    both = reconstruct(kspace, mask, acs, chosen)
    for index in range(2):
        alone = reconstruct(kspace[index : index + 1], mask, acs, chosen)
        torch.testing.assert_close(both[index : index + 1], alone, rtol=1e-3, atol=1e-4)


def test_an_example_without_signal_in_its_calibration_block_is_refused() -> None:
    mask, acs = undersampling()
    with pytest.raises(DataError, match="calibration lines hold no signal"):
        estimate_maps(torch.cat([scan(), torch.zeros_like(scan())]) * mask, acs)


def test_maps_see_the_calibration_block_only() -> None:
    kspace = scan()
    mask, acs = undersampling()
    torch.testing.assert_close(estimate_maps(kspace, acs), estimate_maps(kspace * mask, acs))


def test_maps_match_the_true_sensitivities_inside_the_body() -> None:
    _, acs = undersampling()
    maps = estimate_maps(scan(noise=0.0), acs, crop=0.0)
    body = object_image().abs() > 0.3
    # Each pixel's phase is arbitrary, so compare the projection on the true maps.
    projection = (coil_maps().conj() * maps).sum(1).abs()[0]
    assert float(projection[body].quantile(0.05)) > 0.98
    torch.testing.assert_close(rss(maps), torch.ones(1, SIZE, SIZE), atol=1e-4, rtol=0)


def test_crop_removes_the_maps_outside_the_body_only() -> None:
    _, acs = undersampling()
    strength = rss(estimate_maps(scan(), acs, crop=0.95))[0]
    far = torch.ones(SIZE, SIZE, dtype=torch.bool)
    far[4:-4, 4:-4] = False
    assert float(strength[object_image().abs() > 0.3].mean()) > 0.98
    assert float(strength[far].mean()) < 0.3


def test_a_radial_calibration_square_is_enough() -> None:
    _, (phase, _) = undersampling()
    maps = estimate_maps(scan(), (phase, phase), crop=0.0)
    torch.testing.assert_close(maps, estimate_maps(scan(), undersampling()[1], crop=0.0))


def test_measured_samples_are_put_back() -> None:
    mask, acs = undersampling()
    kspace = scan()
    maps = estimate_maps(kspace * mask, acs)
    everything = torch.ones_like(mask)
    image = cg_sense(kspace, mask, maps, 0.01, 5)
    torch.testing.assert_close(
        combine(image, kspace, everything, maps), rss(ifft2c(kspace)), atol=1e-5, rtol=1e-4
    )


def test_sense_is_far_better_than_zero_filling() -> None:
    mask, acs = undersampling(4)
    for seed in range(3):
        kspace = scan(seed)
        best = tune_regularisation([case(seed + 10)])
        ours = psnr(kspace, reconstruct(kspace * mask, mask, acs, best))
        assert ours > psnr(kspace, rss(ifft2c(kspace * mask))) + 3


def test_tuning_returns_the_best_point_of_the_grid() -> None:
    cases = [case(seed, noise=0.03) for seed in (1, 2)]
    regularisations, iterations, crops = (0.001, 0.03), (5, 15), (0.0, 0.1)
    best = tune_regularisation(
        cases, regularisations=regularisations, iterations=iterations, crops=crops
    )
    scores = {}
    for point in itertools.product(regularisations, iterations, crops):
        images = [
            reconstruct((c.kspace * c.mask)[None], c.mask[None], c.acs, SenseSettings(*point))
            for c in cases
        ]
        scores[point] = sum(psnr(c.kspace[None], i) for c, i in zip(cases, images, strict=True))
    assert (best.regularisation, best.iterations, best.crop) == max(scores, key=scores.__getitem__)


def test_tuning_regularises_noisy_data_more() -> None:
    fixed = {"iterations": (40,), "crops": (0.1,)}
    quiet = tune_regularisation([case(1, noise=0.003)], **fixed)
    loud = tune_regularisation([case(1, noise=0.1)], **fixed)
    assert loud.regularisation > quiet.regularisation


def test_tuning_without_images_or_settings_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="at least one validation image"):
        tune_regularisation([])
    with pytest.raises(ConfigurationError, match="one setting"):
        tune_regularisation([case(0)], crops=())


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ((-1.0, 10, 0.1), "regularisation"),
        ((float("nan"), 10, 0.1), "regularisation"),
        ((0.1, 0, 0.1), "iterations"),
        ((0.1, 10, 1.0), "crop"),
    ],
)
def test_wrong_settings_are_named(values: tuple[float, int, float], field: str) -> None:
    with pytest.raises(ConfigurationError, match=field):
        SenseSettings(*values)


def sigpy_sense(kspace: Tensor, maps: Tensor, lamda: float) -> Tensor:
    app = sigpy.mri.app.SenseRecon(
        kspace[0].numpy(), maps[0].numpy(), lamda=lamda, max_iter=40, tol=0, show_pbar=False
    )
    return torch.from_numpy(app.run())[None, None]


@pytest.mark.parametrize("lamda", [0.003, 0.1])
def test_solution_equals_sigpy_with_the_same_maps(lamda: float) -> None:
    mask, _ = undersampling()
    kspace, maps = scan() * mask, coil_maps()
    expected = sigpy_sense(kspace, maps, lamda)
    result = cg_sense(kspace, mask, maps, lamda, 40)
    assert float((result - expected).norm() / expected.norm()) < 2e-3


def test_maps_equal_those_of_sigpy_up_to_their_phase() -> None:
    kspace, acs = scan(), undersampling()[1]
    app = sigpy.mri.app.EspiritCalib(kspace[0].numpy(), calib_width=20, crop=0, show_pbar=False)
    theirs = torch.from_numpy(app.run())[None]
    overlap = (theirs.conj() * estimate_maps(kspace, acs, crop=0.0)).sum(1).abs()[0]
    assert float(overlap[object_image().abs() > 0.3].min()) > 0.999


@pytest.mark.parametrize("acceleration", [4, 8])
def test_not_worse_than_espirit_sense_of_sigpy(acceleration: float) -> None:
    mask, acs = undersampling(acceleration)
    kspace = scan(3)
    measured = kspace * mask
    ours = tune_regularisation([case(4, acceleration=acceleration)])
    theirs = []
    for crop, lamda in itertools.product((0.0, 0.95), (0.001, 0.003, 0.01, 0.03)):
        calibration = sigpy.mri.app.EspiritCalib(
            measured[0].numpy(), calib_width=20, crop=crop, show_pbar=False
        )
        maps = torch.from_numpy(calibration.run())[None]
        image = sigpy_sense(measured, maps, lamda)
        # Both ways to read sigpy's result: its magnitude, or with the measured samples put back.
        theirs += [psnr(kspace, image[:, 0].abs())]
        theirs += [psnr(kspace, combine(image, measured, mask, maps))]
    assert psnr(kspace, reconstruct(measured, mask, acs, ours)) > max(theirs) - 0.3
