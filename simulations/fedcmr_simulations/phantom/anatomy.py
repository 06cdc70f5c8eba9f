"""Paints the chest, the upper abdomen and the beating heart in a short-axis plane."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from fedcmr_simulations.phantom.canvas import Canvas, Plane, ellipse_distance, smooth_minimum
from fedcmr_simulations.phantom.motion import HeartState
from fedcmr_simulations.phantom.patient import Body, HeartPlacement, Patient, Scar, Vessel
from fedcmr_simulations.phantom.tissue import Tissue

LABEL_NAMES: Final = ("background", "LV cavity", "LV myocardium", "RV")
_RV_WALL_MM: Final = 3.0
_HEART_REACH_MM: Final = 115.0


def paint_body(canvas: Canvas, body: Body, z: float, shift_mm: float) -> None:
    """Paint everything but the heart.

    ``z`` is the height over the apex in mm; ``shift_mm`` moves the abdominal organs with breathing.
    """
    x, y = canvas.grid()
    skin = _chest_distance(x, y, body, 0.0)
    canvas.paint("fat", canvas.coverage(skin))
    # Fat is thicker at the sides and over the breast than along the spine.
    angle = np.arctan2(y, x)
    thickness = body.fat * (1 + 0.3 * np.cos(2 * angle) - 0.25 * np.sin(angle))
    wall = np.asarray(skin + thickness, np.float32)
    canvas.paint("muscle", canvas.coverage(wall))
    cavity = np.asarray(wall + body.muscle * (1 + 0.25 * np.sin(angle + 0.4)), np.float32)
    inside = canvas.coverage(cavity)
    _paint_ribs(canvas, cavity, angle, z)
    canvas.paint("lung", inside)
    _paint_vessels(canvas, body.lung_vessels, (0.0, 0.0), inside, z)
    _paint_mediastinum(canvas, body, inside)
    _paint_abdomen(canvas, body, inside, z, shift_mm)
    _paint_spine(canvas, body)


def _chest_distance(x: Plane, y: Plane, body: Body, inset: float) -> Plane:
    width, depth = body.half_width - inset, body.half_depth - inset
    power = np.float32(body.roundness)
    radius = (np.abs(x / width) ** power + np.abs(y / depth) ** power) ** (1 / power)
    angle = np.arctan2(y / depth, x / width)
    first, first_at, second, second_at = body.ripple
    uneven = 3 * (first * np.cos(2 * angle - first_at) + second * np.cos(3 * angle - second_at))
    scale = np.sqrt(x**2 + y**2) / np.maximum(radius, 1e-3)
    return np.asarray((radius - 1) * scale + uneven, np.float32)


def _paint_ribs(canvas: Canvas, cavity: Plane, angle: Plane, z: float) -> None:
    # Ribs run obliquely, so a plane cuts them into long ovals inside the chest wall.
    along = np.abs(np.mod(angle * 3.2 + z * 0.02, np.pi) - np.pi / 2) * 26 - 17
    rib = np.maximum(np.abs(cavity + 5.0) - 4.0, along)
    rib = np.asarray(np.where(np.abs(angle - np.pi / 2) < 0.55, 9.0, rib), np.float32)
    canvas.paint("bone", canvas.coverage(rib))
    canvas.paint("marrow", canvas.coverage(np.asarray(rib + 1.8, np.float32)))


def _paint_vessels(
    canvas: Canvas,
    vessels: tuple[Vessel, ...],
    origin: tuple[float, float],
    within: Plane,
    z: float,
) -> None:
    for vessel in vessels:
        centre = (
            origin[0] + vessel.x + vessel.drift_x * z,
            origin[1] + vessel.y + vessel.drift_y * z,
        )
        radii = (vessel.radius * vessel.elongation, vessel.radius)
        canvas.paint_ellipse(
            "venous blood", centre, radii, angle=vessel.angle, strength=0.6, within=within
        )


def _paint_mediastinum(canvas: Canvas, body: Body, inside: Plane) -> None:
    # Fat between breastbone, heart and spine; the heart is painted over most of it.
    x, y = canvas.grid()
    front = ellipse_distance(x, y, (4.0, -0.66 * body.half_depth), (36, 22))
    back = ellipse_distance(x, y, (12.0, 0.3 * body.half_depth), (30, 44))
    canvas.paint("fat", canvas.coverage(smooth_minimum(front, back, 60)) * inside)
    gullet = (body.spine_x + 10, 0.3 * body.half_depth)
    canvas.paint_ellipse("muscle", gullet, (9, 6), angle=0.3, within=inside)


def _paint_abdomen(canvas: Canvas, body: Body, inside: Plane, z: float, shift: float) -> None:
    x, y = canvas.grid()
    # Planes nearer the apex cut deeper into the abdomen.
    depth = 0.22 * (z - 45)
    liver_x, liver_y, liver_width, liver_depth = body.liver
    liver = (liver_x, liver_y + depth + shift)
    dome = ellipse_distance(x, y, liver, (liver_width, liver_depth), 0.18)
    stomach_x, stomach_y, stomach_radius = body.stomach
    stomach = (stomach_x, stomach_y + depth + shift)
    pad = ellipse_distance(x, y, stomach, (stomach_radius + 20, stomach_radius + 8), -0.3)
    canvas.paint("fat", canvas.coverage(smooth_minimum(dome + 3, pad, 30)) * inside)
    liver_cover = canvas.coverage(dome) * inside
    canvas.paint("liver", liver_cover)
    _paint_vessels(canvas, body.liver_vessels, liver, liver_cover, z)
    cava = (liver_x + 42, liver_y + depth * 0.4 - 6)
    canvas.paint_ellipse("venous blood", cava, (12, 9), angle=0.5, within=inside)
    radii = (stomach_radius * 1.15, stomach_radius * 0.8)
    canvas.paint_ellipse("muscle", stomach, (radii[0] + 3, radii[1] + 3), angle=-0.3, within=inside)
    canvas.paint_ellipse("fluid", stomach, radii, angle=-0.3, strength=0.3, within=inside)
    spleen = (stomach_x + 46, stomach_y + 14 + depth + shift)
    canvas.paint_ellipse("spleen", spleen, (14, 28), angle=0.35, within=inside)


def _paint_spine(canvas: Canvas, body: Body) -> None:
    x, y = canvas.grid()
    back = body.half_depth - body.fat
    muscles = smooth_minimum(
        ellipse_distance(x, y, (body.spine_x - 24, back - 14), (25, 16), 0.15),
        ellipse_distance(x, y, (body.spine_x + 24, back - 14), (25, 16), -0.15),
        6,
    )
    canvas.paint("fat", canvas.coverage(muscles - 2))
    canvas.paint("muscle", canvas.coverage(muscles))
    body_centre = (body.spine_x, back - 42)
    canvas.paint_ellipse("fat", body_centre, (27, 21))
    canvas.paint_ellipse("bone", body_centre, (20.0, 15.5))
    canvas.paint_ellipse("marrow", body_centre, (18.5, 14))
    arch = (body.spine_x, back - 21)
    canvas.paint_ellipse("bone", arch, (15, 10))
    canvas.paint_ellipse("fluid", arch, (9, 7))
    canvas.paint_ellipse("muscle", (arch[0], arch[1] + 1), (5.5, 3.6))
    canvas.paint_ellipse("bone", (body.spine_x, back - 8), (4, 8))
    canvas.paint_ellipse("marrow", (body.spine_x, back - 8), (2.4, 6))
    offset_x, share, radius = body.aorta
    aorta = (body.spine_x + offset_x, back * share)
    canvas.paint_ellipse("fat", aorta, (radius + 4, radius + 4))
    canvas.paint_ellipse("muscle", aorta, (radius + 1.5, radius + 1.5))
    canvas.paint_ellipse("arterial blood", aorta, (radius, radius))


@dataclass(frozen=True)
class HeartPlane:
    """The heart cut at height ``z``; distances in the round frame of the LV (signed, mm)."""

    endocardium: Plane
    epicardium: Plane
    rv: Plane
    x: Plane
    y: Plane
    cavity_centre: tuple[float, float]
    endo_radius: float
    epi_radius: float
    rv_depth: float


def cut_heart(
    x: Plane, y: Plane, placement: HeartPlacement, state: HeartState, z: float, shift_mm: float
) -> HeartPlane:
    """Cut the ventricles at height ``z``; ``x`` and ``y`` are image coordinates in mm.

    The map from image to round frame is a rotation, shears and a stretch of determinant 1, so the
    areas in the image are those of `HeartState`.
    """
    u, v = _round_frame(x, y, placement, z, shift_mm)
    endo, epi = (
        float(state.endocardial_radius(z)),
        float(state.epicardial_radius(z)),
    )
    disc, distance = (float(value) for value in state.rv_disc(z))
    share, direction = placement.cavity_offset
    # Never past the wall: at the apex the cavity is small and the shift with it.
    shift = share * max(epi - endo, 0) * (endo > 0)
    centre = (shift * float(np.cos(direction)), shift * float(np.sin(direction)))
    away = np.float32(_HEART_REACH_MM)
    return HeartPlane(
        endocardium=_circle(u, v, centre, endo) if endo > 0 else np.full_like(u, away),
        epicardium=_circle(u, v, (0, 0), epi) if epi > 0 else np.full_like(u, away),
        rv=_circle(u, v, (-distance, 0), disc) if disc > 0 else np.full_like(u, away),
        x=u,
        y=v,
        cavity_centre=centre,
        endo_radius=endo,
        epi_radius=epi,
        rv_depth=max(disc + distance - epi, 0.0),
    )


def _round_frame(
    x: Plane, y: Plane, placement: HeartPlacement, z: float, shift_mm: float
) -> tuple[Plane, Plane]:
    height = z - 45
    dx = x - np.float32(placement.x + placement.tilt[0] * height)
    dy = y - np.float32(placement.y + placement.tilt[1] * height + shift_mm)
    cos, sin = np.cos(placement.rotation), np.sin(placement.rotation)
    u = np.asarray(cos * dx + sin * dy, np.float32) * np.float32(placement.stretch)
    v = np.asarray(-sin * dx + cos * dy, np.float32) / np.float32(placement.stretch)
    # Each step moves one coordinate by a function of the other, so no area changes.
    first, second, bend = placement.bends
    u = u + np.float32(first) * np.sin(v / 17)
    v = v + np.float32(second) * np.sin(u / 19 + 1)
    u = u + np.float32(bend) * (1 - np.cos(v / 30))
    return np.asarray(u, np.float32), np.asarray(v, np.float32)


def _circle(u: Plane, v: Plane, centre: tuple[float, float], radius: float) -> Plane:
    squared = (u - np.float32(centre[0])) ** 2 + (v - np.float32(centre[1])) ** 2
    return np.asarray(np.sqrt(squared) - np.float32(radius), np.float32)


def labels(
    x: Plane, y: Plane, patient: Patient, state: HeartState, z: float, shift_mm: float
) -> npt.NDArray[np.uint8]:
    """True labels at the pixel centres, as indices into LABEL_NAMES. Papillaries count as cavity."""
    plane = cut_heart(x[None, :], y[:, None], patient.placement, state, z, shift_mm)
    result = np.zeros(plane.rv.shape, np.uint8)
    result[plane.rv < 0] = 3
    result[plane.epicardium < 0] = 2
    result[plane.endocardium < 0] = 1
    return result


def heart_window(canvas: Canvas, patient: Patient) -> Canvas:
    """View of the part of ``canvas`` that the heart can reach."""
    return canvas.window(patient.placement.x, patient.placement.y, _HEART_REACH_MM)


def paint_heart(
    canvas: Canvas, patient: Patient, state: HeartState, z: float, shift_mm: float
) -> None:
    """Paint the heart over the body at height ``z`` (mm over the apex).

    ``canvas`` should be no more than the surroundings of the heart, see `heart_window`.
    """
    placement, part = patient.placement, canvas
    if z > state.base:
        # Above the valves: the atria, a little wider than the ventricles' openings were.
        _paint_base(part, placement, state, z, shift_mm)
        return
    plane = cut_heart(*part.grid(), placement, state, z, shift_mm)
    _paint_fat(part, plane, placement)
    if plane.rv_depth > 0:
        part.paint("myocardium", part.coverage(plane.rv - np.float32(_RV_WALL_MM)))
        part.paint("venous blood", part.coverage(plane.rv))
        _paint_trabeculae(part, plane)
    part.paint("myocardium", part.coverage(plane.epicardium))
    if placement.scar is not None:
        _paint_scar(part, plane, placement.scar, z / state.base)
    if plane.endo_radius > 0:
        _paint_cavity(part, plane, placement, z / state.base)


def _paint_base(
    part: Canvas, placement: HeartPlacement, state: HeartState, z: float, shift_mm: float
) -> None:
    plane = cut_heart(*part.grid(), placement, state, state.base * 0.999, shift_mm)
    shrink = np.float32(0.5 * (z - state.base))
    _paint_fat(part, plane, placement)
    chambers: tuple[tuple[Tissue, Plane], ...] = (
        ("venous blood", plane.rv + shrink),
        ("arterial blood", plane.endocardium - 3 + shrink),
    )
    for blood, distance in chambers:
        part.paint("myocardium", part.coverage(distance - np.float32(2.0)))
        part.paint(blood, part.coverage(distance))


def _paint_fat(part: Canvas, plane: HeartPlane, placement: HeartPlacement) -> None:
    outer = smooth_minimum(plane.epicardium, plane.rv - np.float32(_RV_WALL_MM), 12)
    angle = np.arctan2(plane.y, plane.x + np.float32(0.4 * plane.rv_depth))
    # Mostly over the RV and in the grooves; little on the lateral wall of the LV.
    thickness = placement.fat * (0.7 - 0.5 * np.cos(angle) + 0.3 * np.sin(3 * angle + placement.x))
    cushion = np.asarray(outer - np.maximum(thickness, 0.6), np.float32)
    # The pericardium is a thin dark line around the fat.
    part.paint("bone", part.coverage(cushion - np.float32(1.2)) * np.float32(0.6))
    part.paint("fat", part.coverage(cushion))


def _paint_trabeculae(part: Canvas, plane: HeartPlane) -> None:
    # A comb along the free wall of the RV, deeper towards its apex.
    angle = np.arctan2(plane.y, plane.x + np.float32(0.6 * plane.epi_radius))
    wave = np.sin(9 * angle + 0.7) + 0.8 * np.sin(
        14 * angle + 0.05 * plane.rv_depth * plane.epi_radius
    )
    ridge = np.asarray(2.0 * np.maximum(wave, 0), np.float32)
    comb = part.coverage(-(plane.rv + ridge)) * part.coverage(plane.rv)
    part.paint("myocardium", comb * np.float32(0.6))


def _paint_scar(part: Canvas, plane: HeartPlane, scar: Scar, height: float) -> None:
    if not scar.low < height < scar.high:
        return
    thickness = plane.epicardium - plane.endocardium
    depth = -plane.endocardium / np.minimum(thickness, -1e-3)
    angle = np.arctan2(plane.y, plane.x)
    away = np.abs(np.angle(np.exp(1j * (angle - scar.angle))))
    # Ragged ends and depth: scars are not cut with a knife.
    ragged = 0.12 * np.sin(9 * angle + 5 * height) + 0.08 * np.sin(17 * angle)
    sector = np.clip((scar.half_width - away + ragged) / 0.15 + 0.5, 0, 1)
    inner, outer = (1.0 if scar.outer >= 0.95 else scar.outer), scar.inner
    layer = np.clip((inner + ragged - depth) / 0.15 + 0.5, 0, 1)
    layer = layer * np.clip((depth - outer) / 0.15 + 0.5, 0, 1)
    wall = part.coverage(plane.epicardium)
    part.paint("scar", np.asarray(sector * layer * wall, np.float32))


def _paint_cavity(
    part: Canvas, plane: HeartPlane, placement: HeartPlacement, height: float
) -> None:
    cavity = part.coverage(plane.endocardium)
    part.paint("arterial blood", cavity)
    angle = np.arctan2(plane.y - plane.cavity_centre[1], plane.x - plane.cavity_centre[0])
    wave = np.sin(13 * angle + 3 * height) + np.sin(8 * angle + 1)
    ridge = np.asarray(0.9 * np.maximum(wave, 0), np.float32)
    part.paint("myocardium", part.coverage(-(plane.endocardium + ridge)) * cavity * np.float32(0.5))
    if not 0.25 < height < 0.72:
        return
    for direction, radius in placement.papillaries:
        reach = max(plane.endo_radius - 0.9 * radius, 0.45 * plane.endo_radius)
        size = min(radius, 0.33 * plane.endo_radius)
        centre = (
            plane.cavity_centre[0] + reach * float(np.cos(direction)),
            plane.cavity_centre[1] + reach * float(np.sin(direction)),
        )
        muscle = part.coverage(_circle(plane.x, plane.y, centre, size))
        part.paint("myocardium", muscle * cavity)
