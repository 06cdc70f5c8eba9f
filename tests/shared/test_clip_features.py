"""Features of clips: known motion is found, and each extractor notices the damage that it is for."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from drawn_hearts import PIXEL_MM, drawn_heart, drawn_hearts
from scipy.ndimage import gaussian_filter

from fedcmr_shared.errors import DataError
from fedcmr_shared.metrics.clip_features import (
    BeatFeatures,
    Extractor,
    FrameFeatures,
    LatentFeatures,
    MotionFeatures,
    SpectrumFeatures,
    follow,
)
from fedcmr_shared.metrics.generation import FeatureSample, distance
from fedcmr_shared.models.segmenter import load_segmenter
from fedcmr_shared.models.video_vae import VideoVAE, VideoVAEConfig

SEGMENTER = load_segmenter()
FIRST, SECOND = drawn_hearts(8, seed=1), drawn_hearts(8, seed=2)
Damage = Callable[[np.ndarray], np.ndarray]


def autoencoder() -> VideoVAE:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = VideoVAEConfig((8, 48, 48), (4, 8), ((2, 4, 4),), blocks=1, groups=2, latents=2)
        return VideoVAE(config).eval()


EXTRACTORS: dict[str, Extractor] = {
    "frames": FrameFeatures(SEGMENTER, PIXEL_MM, dimensions=16),
    "beats": BeatFeatures(SEGMENTER, PIXEL_MM, dimensions=8),
    "latents": LatentFeatures(autoencoder(), dimensions=8),
    "spectrum": SpectrumFeatures(),
    "motion": MotionFeatures(SEGMENTER, PIXEL_MM),
}


@cache
def undamaged(name: str) -> tuple[FeatureSample, FeatureSample]:
    return EXTRACTORS[name](FIRST), EXTRACTORS[name](SECOND)


def own_seed(clip: np.ndarray) -> int:
    """Another one for each clip, whatever was drawn before."""
    return int(1e6 * abs(clip[0, 0, 0]))


def blurred(clip: np.ndarray) -> np.ndarray:
    return gaussian_filter(clip, (0, 1.2, 1.2))


def noisy(clip: np.ndarray) -> np.ndarray:
    return clip + np.random.default_rng(own_seed(clip)).normal(0, 0.15, clip.shape)


def frozen(clip: np.ndarray) -> np.ndarray:
    return np.repeat(clip[:1], len(clip), axis=0)


def shuffled(clip: np.ndarray) -> np.ndarray:
    return clip[[0, 4, 1, 6, 3, 7, 2, 5]]


def mirrored(clip: np.ndarray) -> np.ndarray:
    return clip[:, :, ::-1]


def too_small(clip: np.ndarray) -> np.ndarray:
    """Hearts of another phenotype than the one asked for."""
    return drawn_heart(15.0, 0.2, seed=own_seed(clip))


class TestDamage:
    @pytest.mark.parametrize(
        ("name", "damage"),
        [
            ("frames", blurred),
            ("frames", noisy),
            ("frames", mirrored),
            ("frames", too_small),
            ("beats", frozen),
            ("beats", shuffled),
            ("beats", mirrored),
            ("beats", too_small),
            ("latents", mirrored),
            ("latents", too_small),
            ("spectrum", blurred),
            ("spectrum", noisy),
            ("motion", noisy),
            ("motion", frozen),
            ("motion", shuffled),
        ],
    )
    def test_is_noticed(self, name: str, damage: Damage) -> None:
        extractor = EXTRACTORS[name]
        real, others = undamaged(name)
        floor = distance(real, others)
        found = distance(real, extractor([damage(clip) for clip in SECOND]))
        assert found.frechet > 1.3 * floor.frechet
        assert found.kernel > floor.kernel

    def test_the_spectrum_is_blind_to_the_order_of_frames(self) -> None:
        """Why one extractor is not enough: the same frames at other times."""
        extractor = EXTRACTORS["spectrum"]
        turned = [np.roll(clip, 2, axis=0) for clip in SECOND]
        found = distance(extractor(SECOND), extractor(turned))
        assert found.frechet == pytest.approx(0, abs=1e-6)
        seen = distance(undamaged("beats")[1], EXTRACTORS["beats"](turned))
        assert seen.frechet > 3 * distance(*undamaged("beats")).frechet

    @pytest.mark.parametrize("name", ["frames", "spectrum"])
    def test_more_blur_is_further_away(self, name: str) -> None:
        extractor = EXTRACTORS[name]
        real, _ = undamaged(name)
        found = [
            distance(real, extractor([gaussian_filter(c, (0, w, w)) for c in SECOND]))
            for w in (0.6, 1.2, 2.4)
        ]
        assert found[0] < found[1] < found[2]

    def test_the_less_a_heart_moves_the_further_it_is_away(self) -> None:
        real, _ = undamaged("beats")
        found = [
            distance(real, EXTRACTORS["beats"]([share * c + (1 - share) * c[:1] for c in SECOND]))
            for share in (1.0, 0.6, 0.2)
        ]
        assert found[0] < found[1] < found[2]


class TestMotion:
    @pytest.mark.parametrize(("radius", "shortening"), [(20.0, 0.1), (28.0, 0.25)])
    def test_a_drawn_heart_is_followed(self, radius: float, shortening: float) -> None:
        beat = follow(drawn_heart(radius, shortening, frames=12), PIXEL_MM, SEGMENTER.model)
        found = beat.descriptors()
        assert beat.area[0] == pytest.approx(np.pi * radius**2, rel=0.12)
        assert found.area_change == pytest.approx(100 * (1 - (1 - shortening) ** 2), abs=4)
        assert found.strain == pytest.approx(-100 * shortening, abs=3)
        assert found.displacement == pytest.approx(radius * shortening, abs=0.8)
        assert found.systole == pytest.approx(0.5, abs=1 / 12)
        assert found.emptying == pytest.approx(found.filling, rel=0.2)

    def test_a_still_heart_does_not_move(self) -> None:
        found = follow(frozen(drawn_heart()), PIXEL_MM, SEGMENTER.model).descriptors()
        for name in ("area_change", "emptying", "filling", "displacement", "strain"):
            assert getattr(found, name) == pytest.approx(0, abs=1e-6)
        for name in ("curve_roughness", "flow_roughness", "closure", "roughness"):
            assert getattr(found, name) == pytest.approx(1, abs=1e-6)

    def test_half_a_beat_does_not_close(self) -> None:
        whole = drawn_heart(frames=16)
        closed, half = (
            follow(clip, PIXEL_MM, SEGMENTER.model).descriptors() for clip in (whole, whole[:9])
        )
        assert closed.closure < 1.5
        assert half.closure > 2 * closed.closure

    def test_shuffled_and_noisy_beats_are_rough(self) -> None:
        beat = drawn_heart(frames=8)
        smooth, mixed, grainy = (
            follow(clip, PIXEL_MM, SEGMENTER.model).descriptors()
            for clip in (beat, shuffled(beat), noisy(beat))
        )
        assert mixed.curve_roughness > 1.5 * smooth.curve_roughness
        assert mixed.flow_roughness > 1.3 * smooth.flow_roughness
        assert grainy.roughness > 1.5 * smooth.roughness

    def test_clips_without_a_heart_are_counted_and_left_out(self) -> None:
        empty = np.full((8, 48, 48), -1.0)
        with pytest.raises(DataError, match="no LV cavity"):
            follow(empty, PIXEL_MM, SEGMENTER.model)
        with pytest.raises(DataError, match="4 frames are no beat"):
            follow(drawn_heart(frames=4), PIXEL_MM, SEGMENTER.model)
        sample = EXTRACTORS["motion"]([SECOND[0], empty, SECOND[1]])
        assert sample.unmeasured == 1
        assert sample.values.shape == (2, 10)
        np.testing.assert_allclose(sample.values, undamaged("motion")[1].values[:2])


class TestSpaces:
    @pytest.mark.parametrize(("length", "frames"), [(8, [0, 2, 4, 6]), (11, [0, 2, 5, 8])])
    def test_four_frames_are_spread_over_the_beat(self, length: int, frames: list[int]) -> None:
        clip = drawn_heart(frames=length)
        found, wanted = (EXTRACTORS["spectrum"]([c]) for c in (clip, clip[frames]))
        np.testing.assert_allclose(found.values, wanted.values)

    @pytest.mark.parametrize("name", sorted(EXTRACTORS))
    def test_a_clip_has_the_same_features_alone_and_among_others(self, name: str) -> None:
        extractor = EXTRACTORS[name]
        alone, among = extractor(SECOND[:1]), undamaged(name)[1]
        assert alone.space == among.space == extractor.space
        assert alone.values.shape[1] == extractor.space.dimensions
        assert len(among.values) == len(SECOND) * len(alone.values)
        np.testing.assert_allclose(alone.values, among.values[: len(alone.values)], atol=1e-5)

    def test_extractors_and_weights_are_spaces_of_their_own(self) -> None:
        spaces = {extractor.space for extractor in EXTRACTORS.values()}
        assert len(spaces) == len(EXTRACTORS)
        assert EXTRACTORS["frames"].space.sha256 == SEGMENTER.sha256
        assert EXTRACTORS["spectrum"].space.sha256 == ""
        other = FrameFeatures(replace(SEGMENTER, sha256="0" * 64), PIXEL_MM, dimensions=16)
        with pytest.raises(DataError, match="have no distance"):
            distance(undamaged("frames")[0], other(SECOND[:1]))
