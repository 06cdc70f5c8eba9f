"""Expert contours and label maps as ground truth of the left ventricle."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from skimage.draw import polygon2mask

from fedcmr_client.importers.synthesis import crop_labels
from fedcmr_client.store.scan_file import Truth
from fedcmr_shared.errors import DataError

LABEL_NAMES: Final = ("background", "LV cavity", "LV myocardium", "RV")
MYOCARDIAL_DENSITY: Final = 1.05
"""Grams per millilitre."""

_FILE_NAME: Final = re.compile(r".*-(\d{4})-([io])contour.*\.txt")


@dataclass(frozen=True)
class Contour:
    """A closed polygon on one image; ``points`` [n, 2] are (x = column, y = row) in pixels."""

    frame: int
    slice: int
    points: np.ndarray

    @property
    def area(self) -> float:
        """Enclosed area in pixels squared, by the shoelace formula."""
        x, y = self.points.astype(np.float64).T
        return float(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2)


def read_contours(folder: Path) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Sunnybrook text contours below ``folder`` by DICOM instance number: (endo, epi).

    Raises DataError for a file that is not pairs of numbers.
    """
    found: dict[str, dict[int, np.ndarray]] = {"i": {}, "o": {}}
    for path in sorted(folder.rglob("*.txt")):
        match = _FILE_NAME.fullmatch(path.name)
        if match:
            found[match.group(2)][int(match.group(1))] = _read_points(path)
    return found["i"], found["o"]


def _read_points(path: Path) -> np.ndarray:
    try:
        points = np.array([line.split() for line in path.read_text().splitlines() if line], float)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: contour cannot be read: {error}") from error
    if points.ndim != 2 or points.shape[1] != 2 or len(points) < 3:
        raise DataError(f"{path}: a contour needs three or more lines `x y`")
    return points


def truth_from_contours(
    endo: Iterable[Contour],
    epi: Iterable[Contour],
    shape: tuple[int, int, int, int],
    voxel: tuple[float, float] | None,
) -> Truth:
    """Phenotypes from contour areas, and labels ``[frame, slice, row, column]`` of ``shape``.

    ``voxel`` is (pixel area in mm2, slice pitch in mm). Frames without contours stay background;
    where only the cavity is contoured, as at end systole, there is no myocardium either.
    """
    endo, epi = list(endo), list(epi)
    labels = np.zeros(shape, np.uint8)
    for value, contours in ((2, epi), (1, endo)):
        for contour in contours:
            inside: np.ndarray = polygon2mask(  # type: ignore[no-untyped-call]  # scikit-image
                shape[2:], contour.points[:, ::-1]
            )
            labels[contour.frame, contour.slice][inside] = value
    cavity, wall = _areas(endo), _wall_areas(endo, epi)
    return Truth(phenotypes(cavity, wall, voxel), labels, LABEL_NAMES)


def phenotypes(
    cavity: Mapping[int, float], wall: Mapping[int, float], voxel: tuple[float, float] | None
) -> dict[str, float]:
    """LVEF (%) and, with ``voxel`` known, LVEDV, LVESV, LVSV (mL) and LVM (g, at end diastole).

    ``cavity`` and ``wall`` are areas in pixels, summed over slices, by frame. End diastole and end
    systole are the frames with the largest and the smallest cavity. Empty with fewer than 2 frames.
    """
    if len(cavity) < 2 or min(cavity.values()) <= 0:
        return {}
    diastole, systole = max(cavity, key=cavity.__getitem__), min(cavity, key=cavity.__getitem__)
    result = {"LVEF": 100 * (1 - cavity[systole] / cavity[diastole])}
    if voxel is None:
        return result
    millilitres = voxel[0] * voxel[1] / 1000
    result["LVEDV"] = cavity[diastole] * millilitres
    result["LVESV"] = cavity[systole] * millilitres
    result["LVSV"] = result["LVEDV"] - result["LVESV"]
    if wall.get(diastole, 0) > 0:
        result["LVM"] = wall[diastole] * millilitres * MYOCARDIAL_DENSITY
    return result


def truth_from_labels(labels: np.ndarray, voxel: tuple[float, float] | None) -> Truth:
    """Phenotypes counted in ``labels`` ``[frame, slice, y, x]``, numbered as LABEL_NAMES."""
    frames = [frame for frame in range(len(labels)) if (labels[frame] == 1).any()]
    cavity = {frame: float((labels[frame] == 1).sum()) for frame in frames}
    wall = {frame: float((labels[frame] == 2).sum()) for frame in frames}
    return Truth(phenotypes(cavity, wall, voxel), labels, LABEL_NAMES)


def on_grid(truth: Truth, matrix: tuple[int, int], *, transposed: bool = False) -> Truth:
    """``truth`` with its labels on the grid of the synthesised k-space."""
    labels = truth.labels
    if labels is None:
        return truth
    turned = labels.swapaxes(-1, -2) if transposed else labels
    grid = np.ascontiguousarray(crop_labels(turned, matrix))
    return Truth(truth.phenotypes, grid, truth.label_names)


def _areas(contours: Iterable[Contour]) -> dict[int, float]:
    areas: dict[int, float] = {}
    for contour in contours:
        areas[contour.frame] = areas.get(contour.frame, 0.0) + contour.area
    return areas


def _wall_areas(endo: list[Contour], epi: list[Contour]) -> dict[int, float]:
    inner = {(c.frame, c.slice): c.area for c in endo}
    areas: dict[int, float] = {}
    for contour in epi:
        wall = contour.area - inner.get((contour.frame, contour.slice), 0.0)
        areas[contour.frame] = areas.get(contour.frame, 0.0) + wall
    return areas
