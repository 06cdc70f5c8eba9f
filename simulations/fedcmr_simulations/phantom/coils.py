"""Receive coils: sensitivities of circular loops around the chest, and their correlated noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.interpolate import CubicSpline

from fedcmr_simulations.phantom.canvas import Plane
from fedcmr_simulations.phantom.patient import Body

_SEGMENTS = 24
_COARSE = 20


@dataclass(frozen=True)
class CoilArray:
    """A vendor's loops: how many lie on the front, the rest on the back; sizes in mm.

    ``front_arc`` and ``back_arc`` are the half angles (radians) that the loops of a side span;
    ``rows`` is the number of rows along the patient.
    """

    coils: int
    front: int
    radius: float
    gap: float
    front_arc: float
    back_arc: float
    rows: int = 2

    def loops(self, body: Body) -> list[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
        """Centre and inward normal (x, y, z) of each loop around ``body``."""
        result = []
        sides = (
            (self.front, self.front_arc, -np.pi / 2),
            (self.coils - self.front, self.back_arc, np.pi / 2),
        )
        for count, arc, middle in sides:
            for index in range(count):
                place = 0.0 if count == 1 else 2 * index / (count - 1) - 1
                angle = middle + arc * place
                row = (index % self.rows - (self.rows - 1) / 2) * 1.4 * self.radius
                direction = np.array([np.cos(angle), np.sin(angle), 0.0])
                centre = direction * [body.half_width + self.gap, body.half_depth + self.gap, 0]
                result.append((centre + np.array([0.0, 0.0, row]), -direction))
        return result

    def sensitivities(self, x: Plane, y: Plane, body: Body) -> npt.NDArray[np.complex64]:
        """Coil sensitivities ``[coil, y, x]`` in the plane z = 0 for axes in mm.

        Biot-Savart law for unit current; the receive field is Bx − iBy, conjugated. The maps are
        scaled so that their root sum of squares is 1 on average over the inner chest.
        """
        # The maps are smooth: a coarse grid and cubic interpolation lose nothing that shows.
        coarse_x = np.linspace(x[0], x[-1], 2 * _COARSE)
        coarse_y = np.linspace(y[0], y[-1], _COARSE)
        maps = np.stack(
            [_loop_field(coarse_x, coarse_y, *loop, self.radius) for loop in self.loops(body)]
        )
        inner = (np.abs(coarse_x) < 0.5 * body.half_width)[None, :] & (
            np.abs(coarse_y) < 0.5 * body.half_depth
        )[:, None]
        power = (np.abs(maps) ** 2).sum(axis=0)
        maps /= np.sqrt(power[inner].mean())
        along_x = CubicSpline(coarse_x, np.eye(len(coarse_x)))(x)
        along_y = CubicSpline(coarse_y, np.eye(len(coarse_y)))(y)
        fine = (
            along_y.astype(np.complex64)
            @ maps.astype(np.complex64)
            @ along_x.T.astype(np.complex64)
        )
        return np.asarray(fine, np.complex64)


def _loop_field(
    x: npt.NDArray[np.float64],
    y: npt.NDArray[np.float64],
    centre: npt.NDArray[np.float64],
    normal: npt.NDArray[np.float64],
    radius: float,
) -> npt.NDArray[np.complex128]:
    """Transverse field Bx − iBy of one loop of straight segments on the plane z = 0."""
    turn = 2 * np.pi * np.arange(_SEGMENTS) / _SEGMENTS
    across = np.cross(normal, [0.0, 0.0, 1.0])
    along = np.array([0.0, 0.0, 1.0])
    wire = centre + radius * (np.outer(np.cos(turn), across) + np.outer(np.sin(turn), along))
    step = np.roll(wire, -1, axis=0) - wire
    middle = wire + step / 2
    dx = x[None, None, :] - middle[:, 0, None, None]
    dy = y[None, :, None] - middle[:, 1, None, None]
    dz = -middle[:, 2, None, None]
    # A wire inside the picture would give an infinite field; real conductors have a width.
    cubed = (dx**2 + dy**2 + dz**2 + 35.0**2) ** 1.5
    field_x = (step[:, 1, None, None] * dz - step[:, 2, None, None] * dy) / cubed
    field_y = (step[:, 2, None, None] * dx - step[:, 0, None, None] * dz) / cubed
    return np.asarray((field_x - 1j * field_y).sum(axis=0), np.complex128)


def noise_covariance(
    coils: int, correlation: float, rng: np.random.Generator
) -> npt.NDArray[np.complex128]:
    """Covariance ``[coil, coil]`` of unit mean variance: neighbours share noise, gains differ.

    Hermitian and positive definite for 0 <= ``correlation`` < 1.
    """
    distance = np.abs(np.subtract.outer(np.arange(coils), np.arange(coils)))
    phase = rng.uniform(-0.6, 0.6, coils)
    gain = rng.uniform(0.85, 1.15, coils)
    factors = gain * np.exp(1j * phase)
    covariance = correlation**distance * np.outer(factors, factors.conj())
    return np.asarray(covariance / np.trace(covariance).real * coils)
