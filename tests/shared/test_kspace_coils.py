"""Laws of coil operators, readout cropping and data consistency."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.kspace.coils import expand, reduce, remove_readout_oversampling, rss
from fedcmr_shared.kspace.consistency import soft_data_consistency, weighted_data_consistency
from fedcmr_shared.kspace.fourier import fft2c, ifft2c


def _complex(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.complex128, generator=generator)


@settings(max_examples=20)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(0, 99))
def test_encoding_operator_and_its_adjoint(rows, columns, coils, seed):
    maps, image = (
        _complex(coils, rows, columns, seed=seed),
        _complex(1, rows, columns, seed=seed + 1),
    )
    data = _complex(coils, rows, columns, seed=seed + 2)
    mask = torch.rand(1, rows, 1, generator=torch.Generator().manual_seed(seed)) < 0.5
    forward = mask * fft2c(expand(image, maps))
    adjoint = reduce(ifft2c(mask * data), maps)
    torch.testing.assert_close(
        torch.vdot(data.flatten(), forward.flatten()),
        torch.vdot(adjoint.flatten(), image.flatten()),
    )


def test_unit_maps_combine_back_to_the_image():
    maps = _complex(2, 4, 6, 5)
    maps = maps / rss(maps)[:, None]
    image = _complex(2, 1, 6, 5, seed=1)
    torch.testing.assert_close(reduce(expand(image, maps), maps), image)
    torch.testing.assert_close(rss(expand(image, maps)), image[:, 0].abs())


def test_rss_of_an_empty_background_has_zero_gradient():
    images = torch.zeros(2, 1, 2, dtype=torch.complex64)
    images[:, 0, 1] = torch.tensor([3.0, 4.0j])
    images.requires_grad_()
    combined = rss(images)
    assert combined.tolist() == [[0.0, 5.0]]
    combined.sum().backward()
    torch.testing.assert_close(
        images.grad[:, 0], torch.tensor([[0, 0.6], [0, 0.8j]], dtype=torch.complex64)
    )


@pytest.mark.parametrize(
    ("samples", "factor", "kept"), [(12, 2, 6), (13, 2, 6), (9, 1.5, 6), (7, 1, 7)]
)
def test_readout_oversampling_crops_the_image(samples, factor, kept):
    image = _complex(2, 3, 5, samples)
    cropped = remove_readout_oversampling(fft2c(image), factor)
    start = samples // 2 - kept // 2
    # The crop only removes pixels, so those that stay keep value and position.
    torch.testing.assert_close(ifft2c(cropped), image[..., start : start + kept])


@pytest.mark.parametrize("factor", [0.5, 0.0, -1.0, 9.0, float("nan")])
def test_impossible_oversampling_is_refused(factor):
    with pytest.raises(ConfigurationError, match="oversampling"):
        remove_readout_oversampling(_complex(2, 3, 8), factor)


MASK = torch.tensor([True, False, True])[:, None]


@pytest.mark.parametrize("weight", [0.5, -0.5, 3.0])
def test_weighted_consistency_minimises_its_objective(weight):
    prediction, measured = _complex(2, 3, 4), _complex(2, 3, 4, seed=1) * MASK
    result = weighted_data_consistency(prediction, measured, MASK, torch.tensor(weight))
    expected = (measured + abs(weight) * prediction) / (1 + abs(weight))
    torch.testing.assert_close(result[:, MASK[:, 0]], expected[:, MASK[:, 0]])
    assert torch.equal(result[:, 1], prediction[:, 1])


def test_weighted_consistency_limits():
    prediction, measured = _complex(2, 3, 4), _complex(2, 3, 4, seed=1) * MASK
    hard = weighted_data_consistency(prediction, measured, MASK, torch.tensor(0.0))
    torch.testing.assert_close(hard, torch.where(MASK, measured, prediction))
    free = weighted_data_consistency(prediction, measured, MASK, torch.tensor(1e18))
    torch.testing.assert_close(free, prediction)


def test_soft_consistency_is_a_gradient_step():
    prediction = _complex(2, 3, 4).requires_grad_()
    measured = _complex(2, 3, 4, seed=1) * MASK
    (0.5 * (MASK * (prediction - measured)).abs().square().sum()).backward()
    step = torch.tensor(0.3)
    result = soft_data_consistency(prediction, measured, MASK, step)
    torch.testing.assert_close(result, prediction - step * prediction.grad)
