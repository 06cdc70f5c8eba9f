"""A grid of tissue fractions that shapes are painted on with soft edges."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedcmr_simulations.phantom.tissue import TISSUES, Tissue

Plane = npt.NDArray[np.float32]
_INDEX = {tissue: index for index, tissue in enumerate(TISSUES)}


@dataclass(frozen=True)
class Canvas:
    """Tissue fractions ``weights`` [tissue, y, x] on a grid with axes ``x`` and ``y`` in mm.

    The fractions of a pixel add up to at most 1; the rest is air. Painting puts a tissue over what
    was there. Edges are ``edge_mm`` wide, so pixels on a border hold fractions of both sides.
    """

    x: Plane
    y: Plane
    weights: Plane
    edge_mm: float

    @classmethod
    def blank(cls, x: Plane, y: Plane, edge_mm: float) -> Canvas:
        """Return a canvas full of air."""
        weights = np.zeros((len(TISSUES), len(y), len(x)), np.float32)
        return cls(x.astype(np.float32), y.astype(np.float32), weights, edge_mm)

    def copy(self) -> Canvas:
        """Return an independent canvas with the same content."""
        return Canvas(self.x, self.y, self.weights.copy(), self.edge_mm)

    def window(self, x: float, y: float, reach: float) -> Canvas:
        """View of the square of half width ``reach`` around (x, y); painting it paints this."""
        columns = slice(*np.searchsorted(self.x, [x - reach, x + reach]))
        rows = slice(*np.searchsorted(self.y, [y - reach, y + reach]))
        return Canvas(self.x[columns], self.y[rows], self.weights[:, rows, columns], self.edge_mm)

    def grid(self) -> tuple[Plane, Plane]:
        """Coordinates (x [1, n], y [n, 1]) that broadcast to the plane."""
        return self.x[None, :], self.y[:, None]

    def coverage(self, distance: Plane) -> Plane:
        """Share of each pixel inside a shape, given the signed distance in mm (negative inside)."""
        inside = np.clip(0.5 - distance / np.float32(self.edge_mm), 0, 1)
        return np.asarray(inside * inside * (3 - 2 * inside), np.float32)

    def paint(self, tissue: Tissue, coverage: Plane) -> None:
        """Put ``tissue`` over the content where ``coverage`` (0 to 1) says so."""
        weights = self.weights
        weights *= 1 - coverage
        weights[_INDEX[tissue]] += coverage

    def paint_ellipse(
        self,
        tissue: Tissue,
        centre: tuple[float, float],
        radii: tuple[float, float],
        *,
        angle: float = 0.0,
        strength: float = 1.0,
        within: Plane | None = None,
    ) -> None:
        """Paint an ellipse (centre and radii in mm, angle in radians), only ``within`` if given."""
        reach = max(radii) + 2 * self.edge_mm
        part = self.window(*centre, reach)
        if part.weights.size == 0:
            return
        coverage = part.coverage(ellipse_distance(*part.grid(), centre, radii, angle))
        if within is not None:
            rows = slice(*np.searchsorted(self.y, [centre[1] - reach, centre[1] + reach]))
            columns = slice(*np.searchsorted(self.x, [centre[0] - reach, centre[0] + reach]))
            coverage = coverage * within[rows, columns]
        part.paint(tissue, coverage * np.float32(strength))


def ellipse_distance(
    x: Plane, y: Plane, centre: tuple[float, float], radii: tuple[float, float], angle: float = 0.0
) -> Plane:
    """Approximate signed distance in mm to an ellipse, exact for a circle."""
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    dx, dy = x - np.float32(centre[0]), y - np.float32(centre[1])
    along = (cos * dx + sin * dy) / np.float32(radii[0])
    across = (-sin * dx + cos * dy) / np.float32(radii[1])
    norm = np.sqrt(along**2 + across**2)
    # Divided by the gradient, the level set is a distance near the border.
    gradient = np.sqrt((along / radii[0]) ** 2 + (across / radii[1]) ** 2) / np.maximum(norm, 1e-6)
    return np.asarray((norm - 1) / np.maximum(gradient, 1e-6), np.float32)


def smooth_minimum(first: Plane, second: Plane, radius: float) -> Plane:
    """Union of two distances whose corner is filled with a fillet about ``radius`` mm wide."""
    overlap = np.maximum(radius - np.abs(first - second), 0) / np.float32(radius)
    return np.asarray(np.minimum(first, second) - overlap**2 * np.float32(radius / 4), np.float32)
