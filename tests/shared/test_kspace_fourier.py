"""Laws of the centred Fourier transform."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcmr_shared.kspace.fourier import fft2c, ifft2c

SIZES = st.integers(1, 13)


def _complex(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.complex128, generator=generator)


@settings(max_examples=25)
@given(SIZES, SIZES, st.integers(0, 99))
def test_unitary(rows, columns, seed):
    x, y = _complex((2, 3, rows, columns), seed), _complex((2, 3, rows, columns), seed + 100)
    torch.testing.assert_close(ifft2c(fft2c(x)), x)
    torch.testing.assert_close(fft2c(ifft2c(x)), x)
    forward = torch.vdot(fft2c(x).flatten(), y.flatten())
    torch.testing.assert_close(forward, torch.vdot(x.flatten(), ifft2c(y).flatten()))
    torch.testing.assert_close(fft2c(x).norm(), x.norm())


@pytest.mark.parametrize("shape", [(8, 6), (7, 5), (8, 5), (1, 4)])
def test_centre_sample_is_the_constant_image(shape):
    delta = torch.zeros(shape, dtype=torch.complex128)
    delta[shape[0] // 2, shape[1] // 2] = 1
    constant = torch.full_like(delta, (shape[0] * shape[1]) ** -0.5)
    torch.testing.assert_close(ifft2c(delta), constant)
    torch.testing.assert_close(fft2c(delta), constant)


def test_leading_axes_are_independent():
    x = _complex((3, 2, 6, 5), 0)
    torch.testing.assert_close(fft2c(x)[2, 1], fft2c(x[2, 1]))
