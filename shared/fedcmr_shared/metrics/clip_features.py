"""Features of clips, in which distances between sets of clips are measured.

No network trained on public videos or on hearts of many hospitals comes with a package that may be
shipped here, so the extractors are ours: the packaged segmenter on its way down, for single
frames and for whole beats; the encoder of a CPGG's own autoencoder, which is blind to what
that autoencoder loses; and descriptors of motion, which use no network beyond the labels. A
distance in them is relative: it ranks sets of clips, and no other number compares with it.

A clip is ``[frame, y, x]`` in [-1, 1], one beat, whose last frame is followed by its first; end
diastole is frame 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fedcmr_shared.errors import DataError
from fedcmr_shared.metrics.generation import Clip, FeatureSample, FeatureSpace, project
from fedcmr_shared.metrics.phenotypes.clip import LEAST_AREA_MM2, area_curve
from fedcmr_shared.metrics.phenotypes.motion import FEWEST_FRAMES, track
from fedcmr_shared.metrics.phenotypes.short_axis import CAVITY, Spacing
from fedcmr_shared.metrics.phenotypes.wall import outline
from fedcmr_shared.models.bundle import state_sha256
from fedcmr_shared.models.segmenter import (
    PIXEL_MM,
    LoadedSegmenter,
    Segmenter,
    normalise,
    segment,
)
from fedcmr_shared.models.video_vae import VideoVAE

Floats = NDArray[np.float64]

FRAMES_PER_CLIP: Final = 4
"""Frames of a beat, a quarter apart, that count as images of their own."""

_QUADRANTS: Final = (2, 2)
_PARTS: Final = (4, 2, 2)  # of the latents: time, rows, columns
_HARMONICS: Final = 2  # of a beat: more are hardly above the noise
_MULTIPLE: Final = 16  # of pixels, for the segmenter
_RINGS: Final = 8
_DARK: Final = 1e-6  # power that an empty ring is given
_MARGIN: Final = 4  # pixels around the cavity at end diastole: it only shrinks from there
_STILL: Final = 1e-3  # added to both sides of a ratio, so that a still clip gives a number
_CLIPS_AT_ONCE: Final = 16


class Extractor(Protocol):
    """Turns clips into features of one space."""

    @property
    def space(self) -> FeatureSpace:
        """What its features are."""

    def __call__(self, clips: Sequence[Clip]) -> FeatureSample:
        """Return the features of ``clips``."""


@dataclass(frozen=True, eq=False)
class FrameFeatures:
    """Single frames, as the segmenter sees them on its way down; four samples from a clip."""

    segmenter: LoadedSegmenter
    pixel_mm: float
    dimensions: int = 32

    @property
    def space(self) -> FeatureSpace:
        """What the features are."""
        return FeatureSpace(
            "fedcmr segmenter, all levels on its way down",
            self.dimensions,
            f"{FRAMES_PER_CLIP} frames of a beat, {PIXEL_MM:g} mm pixels, each divided by its 99.5 "
            "percentile; means, deviations, quadrants; fixed random projection",
            self.segmenter.sha256,
        )

    def __call__(self, clips: Sequence[Clip]) -> FeatureSample:
        """Return features ``[4 · clip, dimensions]``."""
        found = [look(self.segmenter.model, _quarters(clip), self.pixel_mm) for clip in clips]
        return FeatureSample(self.space, project(np.concatenate(found), self.dimensions))


@dataclass(frozen=True, eq=False)
class BeatFeatures:
    """Whole beats, as the segmenter sees their frames on its way down, in harmonics over time."""

    segmenter: LoadedSegmenter
    pixel_mm: float
    dimensions: int = 16

    @property
    def space(self) -> FeatureSpace:
        """What the features are."""
        return FeatureSpace(
            f"fedcmr segmenter, all levels on its way down, {_HARMONICS} harmonics of the beat",
            self.dimensions,
            f"all frames, {PIXEL_MM:g} mm pixels, each divided by its 99.5 percentile; means, "
            "deviations, quadrants; fixed random projection",
            self.segmenter.sha256,
        )

    def __call__(self, clips: Sequence[Clip]) -> FeatureSample:
        """Return features ``[clip, dimensions]``."""
        rows = []
        for clip in clips:
            seen = look(self.segmenter.model, clip, self.pixel_mm)
            waves = 2 * np.fft.rfft(seen, axis=0)[1 : 1 + _HARMONICS] / len(clip)
            rows.append(np.concatenate([waves.real, waves.imag], axis=None))
        return FeatureSample(self.space, project(np.stack(rows), self.dimensions))


@torch.inference_mode()
def look(model: Segmenter, frames: Clip, pixel_mm: float) -> Floats:
    """Return what the segmenter sees on its way down, ``[frame, feature]``.

    Of each level the means and deviations of its channels over all pixels, which notice blur and
    noise, and of the deepest one the means over the quadrants as well, which notice anatomy.
    """
    images = torch.from_numpy(np.ascontiguousarray(frames, np.float32))[:, None]
    magnitudes = (images + 1).clamp_min(0) / 2
    size = [round(side * pixel_mm / PIXEL_MM) for side in frames.shape[1:]]
    scaled = F.interpolate(magnitudes, size, mode="bilinear", antialias=True)
    rows, columns = (-side % _MULTIPLE for side in size)
    edges = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    x = model.stem(F.pixel_unshuffle(normalise(F.pad(scaled, edges)[:, 0])[:, None], 2))
    found = [x.mean((2, 3)), x.std((2, 3))]
    for block in model.down:
        x = block(F.max_pool2d(x, 2))
        found += [x.mean((2, 3)), x.std((2, 3))]
    found.append(F.adaptive_avg_pool2d(x, _QUADRANTS).flatten(1))
    return np.asarray(torch.cat(found, 1).double().numpy())


@dataclass(frozen=True, eq=False)
class SpectrumFeatures:
    """Sharpness and noise of single frames, without any network; four samples from a clip."""

    @property
    def space(self) -> FeatureSpace:
        """What the features are."""
        return FeatureSpace(
            "logarithm of the mean power in rings of spatial frequency",
            _RINGS,
            f"{FRAMES_PER_CLIP} frames of a beat, as the generator has them; mean removed",
        )

    def __call__(self, clips: Sequence[Clip]) -> FeatureSample:
        """Return features ``[4 · clip, 8]``."""
        frames = np.concatenate([_quarters(clip) for clip in clips]).astype(np.float64)
        power = np.abs(np.fft.fft2(frames, norm="ortho")) ** 2
        y, x = np.meshgrid(*(np.fft.fftfreq(side) for side in frames.shape[1:]), indexing="ij")
        ring = (np.hypot(y, x) * 2 * _RINGS).astype(int)
        ring[0, 0] = _RINGS  # brightness is no sharpness
        rings = [power[:, ring == number].mean(axis=1) for number in range(_RINGS)]
        return FeatureSample(self.space, np.log(np.stack(rings, axis=1) + _DARK))


def _quarters(clip: Clip) -> Clip:
    return clip[np.arange(FRAMES_PER_CLIP) * len(clip) // FRAMES_PER_CLIP]


@dataclass(frozen=True, eq=False)
class LatentFeatures:
    """Whole beats in the latents of an autoencoder of clips; it cannot see what those lose."""

    autoencoder: VideoVAE
    dimensions: int = 16

    @property
    def space(self) -> FeatureSpace:
        """What the features are."""
        parts = " x ".join(map(str, _PARTS))
        return FeatureSpace(
            f"CPGG autoencoder, mean latents over {parts} parts of the clip",
            self.dimensions,
            "clips as the generator has them; fixed random projection",
            state_sha256(self.autoencoder.state_dict()),
        )

    @torch.inference_mode()
    def __call__(self, clips: Sequence[Clip]) -> FeatureSample:
        """Return features ``[clip, dimensions]``."""
        found = [
            F.adaptive_avg_pool3d(self.autoencoder.encode(batch).mean, _PARTS).flatten(1)
            for batch in torch.split(_tensor(clips), _CLIPS_AT_ONCE)
        ]
        return FeatureSample(
            self.space, project(torch.cat(found).double().numpy(), self.dimensions)
        )


def _tensor(clips: Sequence[Clip]) -> Tensor:
    return torch.from_numpy(np.stack(clips).astype(np.float32))[:, None]


class Descriptors(NamedTuple):
    """How a heart beats, as numbers."""

    area_change: float
    """Of the cavity, % of its area at end diastole."""
    systole: float
    """When the cavity is smallest, in heart cycles."""
    emptying: float
    """Greatest loss of area, in areas at end diastole per heart cycle."""
    filling: float
    """Greatest gain of area, in the same unit."""
    curve_roughness: float
    """Second to first differences of the area curve."""
    displacement: float
    """Mean way of the followed endocardium towards its centre at end systole, mm."""
    strain: float
    """Least circumferential strain of the followed endocardium, %."""
    flow_roughness: float
    """Second to first differences of the followed points' places."""
    closure: float
    """Step from the last frame to the first, in units of the mean step."""
    roughness: float
    """Second to first differences of the image's brightness."""


_SCALES: Final = Descriptors(
    area_change=15.0,
    systole=0.1,
    emptying=1.0,
    filling=1.0,
    curve_roughness=0.3,
    displacement=2.0,
    strain=6.0,
    flow_roughness=0.3,
    closure=0.3,
    roughness=0.2,
)
"""Public constants, about one deviation of hearts, that bring the descriptors to one scale."""


@dataclass(frozen=True, eq=False)
class Beat:
    """The LV of one clip followed through its beat, frame by frame.

    ``area`` of the segmented cavity in mm2; ``displacement`` of the endocardium, followed by optical
    flow from frame 0, towards its centre in mm; ``strain`` of its length in %. ``places`` are the
    followed points ``[frame, point, 2]`` in mm.
    """

    clip: Clip
    area: Floats
    displacement: Floats
    strain: Floats
    places: Floats

    def descriptors(self) -> Descriptors:
        """Return the beat as numbers; those of a still clip are 0 or 1."""
        systole = int(self.area.argmin())
        steps = _steps(self.area) * len(self.area) / self.area[0]
        change = np.abs(_steps(self.clip)).mean(axis=(1, 2)) + _STILL
        return Descriptors(
            area_change=100 * (1 - float(self.area[systole] / self.area[0])),
            systole=systole / len(self.area),
            emptying=float(-steps.min()),
            filling=float(steps.max()),
            curve_roughness=_roughness(self.area / self.area[0]),
            displacement=float(self.displacement[systole]),
            strain=float(self.strain.min()),
            flow_roughness=_roughness(self.places),
            closure=float(change[-1] / change[:-1].mean()),
            roughness=_roughness(self.clip),
        )


def follow(clip: Clip, pixel_mm: float, segmenter: Segmenter) -> Beat:
    """Segment and follow the LV of ``clip``.

    Raises:
        DataError: fewer than 8 frames, or no LV cavity in one of them.
    """
    if len(clip) < FEWEST_FRAMES:
        raise DataError(f"{len(clip)} frames are no beat: give at least {FEWEST_FRAMES}")
    area = area_curve(clip, pixel_mm, segmenter)
    images = (np.asarray(clip, np.float64) + 1) / 2
    cavity = segment(segmenter, images[0], (pixel_mm, pixel_mm)) == CAVITY
    start = outline(cavity, Spacing(pixel_mm, pixel_mm, 1.0))
    if start is None or area.min() < LEAST_AREA_MM2:
        frame = 0 if start is None else int(area.argmin())
        raise DataError(f"no LV cavity in frame {frame}: the clip shows no beating heart")
    places = _track_near(images, start / pixel_mm) * pixel_mm
    reach = np.linalg.norm(places - places.mean(axis=1, keepdims=True), axis=-1).mean(axis=1)
    length = np.linalg.norm(places - np.roll(places, 1, axis=1), axis=-1).sum(axis=1)
    return Beat(
        clip=clip,
        area=area,
        displacement=reach[0] - reach,
        strain=100 * (length / length[0] - 1),
        places=places,
    )


def _track_near(images: Floats, points: Floats) -> Floats:
    """Follow ``points`` (x, y) in pixels in the part of the images where they can come to lie."""
    low = np.maximum(np.floor(points.min(axis=0)).astype(int) - _MARGIN, 0)
    high = np.ceil(points.max(axis=0)).astype(int) + _MARGIN
    near = images[:, low[1] : high[1], low[0] : high[0]]
    return np.asarray(track(near, points - low) + low)


@dataclass(frozen=True, eq=False)
class MotionFeatures:
    """Descriptors of the beat, each divided by a public constant."""

    segmenter: LoadedSegmenter
    pixel_mm: float

    @property
    def space(self) -> FeatureSpace:
        """What the features are."""
        return FeatureSpace(
            "descriptors of motion: " + ", ".join(Descriptors._fields),
            len(Descriptors._fields),
            "labels by the fedcmr segmenter, optical flow; divided by public constants",
            self.segmenter.sha256,
        )

    def __call__(self, clips: Sequence[Clip]) -> FeatureSample:
        """Return features ``[clip with a beating heart, 10]``, and how many clips have none."""
        return self.of(self.beats(clips), len(clips))

    def beats(self, clips: Sequence[Clip]) -> list[Beat]:
        """Follow those of ``clips`` in which there is a beating heart."""
        return [beat for clip in clips if (beat := self._follow(clip))]

    def of(self, beats: Sequence[Beat], clips: int) -> FeatureSample:
        """Return the features of ``beats`` that were followed already, out of so many clips."""
        rows = [np.divide(beat.descriptors(), _SCALES) for beat in beats]
        values = np.array(rows, np.float64).reshape(len(rows), len(Descriptors._fields))
        return FeatureSample(self.space, values, unmeasured=clips - len(rows))

    def _follow(self, clip: Clip) -> Beat | None:
        try:
            return follow(clip, self.pixel_mm, self.segmenter.model)
        except DataError:
            return None


def _steps(values: NDArray[np.floating]) -> Floats:
    """Differences to the next frame; the last one closes the beat."""
    return np.asarray(np.roll(values, -1, axis=0) - values, np.float64)


def _roughness(values: NDArray[np.floating]) -> float:
    first = _steps(values)
    second = _steps(first)
    return float((np.abs(second).mean() + _STILL) / (np.abs(first).mean() + _STILL))
