"""The copy detector: what it does not see by construction, and what it learns."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from clip_copies import different_hearts

from fedcmr_shared.errors import ConfigurationError, DataError
from fedcmr_shared.models.copy_detector import (
    CopyDetector,
    CopyDetectorConfig,
    altered,
    contrastive_loss,
    correlations,
    train_detector,
    viewed,
)

QUICK = CopyDetectorConfig(width=8, steps=80, batch=20)
STEP = CopyDetectorConfig(width=4, steps=2, batch=4)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def fresh() -> CopyDetector:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CopyDetector(QUICK).eval()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("width", 3),
        ("width", 6),
        ("embedding", 1),
        ("steps", 0),
        ("batch", 1),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("temperature", math.inf),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(field: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=f"^{field} "):
        CopyDetectorConfig(**{field: value})  # type: ignore[arg-type]


class TestByConstruction:
    """Holds for any weights, so for those before training."""

    @pytest.mark.parametrize("axes", [(-1,), (-2,), (-2, -1)])
    def test_mirror_images_are_the_same_clip(
        self, fresh: CopyDetector, axes: tuple[int, ...]
    ) -> None:
        clips = different_hearts(6)
        torch.testing.assert_close(
            fresh.embed(clips.flip(axes)), fresh.embed(clips), rtol=1e-3, atol=1e-5
        )

    def test_brightness_and_contrast_do_not_count(self, fresh: CopyDetector) -> None:
        clips = different_hearts(6)
        torch.testing.assert_close(
            fresh.embed(0.4 * clips - 0.3), fresh.embed(clips), rtol=1e-3, atol=1e-5
        )

    def test_a_beat_may_begin_anywhere(self, fresh: CopyDetector) -> None:
        """The network sees 8 frames and halves them: a quarter of a beat is a whole step."""
        clips = different_hearts(6)
        later = torch.cat([clips[:, :, 3:], clips[:, :, :3]], 2)
        torch.testing.assert_close(fresh.embed(later), fresh.embed(clips), rtol=1e-3, atol=1e-5)

    def test_what_a_clip_says_does_not_depend_on_the_others(self, fresh: CopyDetector) -> None:
        clips = different_hearts(70)
        torch.testing.assert_close(
            fresh.embed(clips)[[3, 68]], fresh.embed(clips[[3, 68]]), rtol=1e-3, atol=1e-5
        )

    def test_different_hearts_differ(self, fresh: CopyDetector) -> None:
        """Without this, a network that always says the same would pass all the above."""
        found = fresh.embed(different_hearts(6))
        gaps = (found[:, None] - found).norm(dim=-1) + torch.eye(6)
        assert gaps.min() > 0.01


class TestAlterations:
    def test_they_keep_shape_and_range_and_differ_from_clip_to_clip(self) -> None:
        one = viewed(different_hearts(1)).repeat(8, 1, 1, 1, 1)
        found = altered(one, seeded())
        assert found.shape == one.shape
        assert found.abs().max() < 1 + 6 * 0.1
        assert (found[:, None] - found).abs().mean((2, 3, 4, 5))[0, 1:].min() > 0.02

    def test_equal_generators_give_equal_alterations(self) -> None:
        clips = viewed(different_hearts(4))
        assert torch.equal(altered(clips, seeded(1)), altered(clips, seeded(1)))
        assert not torch.equal(altered(clips, seeded(1)), altered(clips, seeded(2)))

    def test_all_four_mirror_images_occur(self) -> None:
        """A corner that is bright in the clip turns up in each corner."""
        clip = torch.full((64, 1, 8, 32, 32), -1.0)
        clip[..., 4:14, 4:14] = 1
        found = altered(clip, seeded()).mean((1, 2))
        quarters = found.reshape(64, 2, 16, 2, 16).mean((2, 4)).flatten(1)
        assert set(quarters.argmax(1).tolist()) == {0, 1, 2, 3}

    def test_the_order_of_frames_is_only_turned(self) -> None:
        """Uniform frames of rising brightness: after the brightest comes the darkest."""
        levels = torch.linspace(-0.9, 0.9, 8)[:, None, None].expand(16, 1, 8, 32, 32)
        found = altered(levels, seeded()).mean((1, 3, 4))
        starts = found.argmin(1)
        assert len(set(starts.tolist())) > 4
        for row, start in zip(found, starts, strict=True):
            assert (row.roll(-int(start)).diff() > 0).all()


class TestLoss:
    def test_correlations_are_pearsons(self) -> None:
        first, second = torch.randn(5, 9, generator=seeded()), torch.randn(4, 9, generator=seeded())
        expected = np.corrcoef(first.numpy(), second.numpy())[:5, 5:]
        np.testing.assert_allclose(correlations(first, second).numpy(), expected, atol=1e-6)

    def test_it_is_least_for_equal_pairs_and_largest_for_wrong_ones(self) -> None:
        first = torch.randn(12, 32, generator=seeded())
        equal = contrastive_loss(first, first, 0.1)
        near = contrastive_loss(first, first + torch.randn(12, 32, generator=seeded(1)), 0.1)
        wrong = contrastive_loss(first, first.roll(1, 0), 0.1)
        assert equal < near < wrong
        assert equal < 0.1

    def test_it_is_the_formula(self) -> None:
        """Two clips whose views agree and oppose each other: log(1 + 2 exp(-2 / temperature))."""
        first = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0]])
        found = contrastive_loss(first, first, 0.5)
        assert float(found) == pytest.approx(math.log(1 + 2 * math.exp(-4)), rel=1e-5)


class TestTraining:
    def test_equal_arguments_give_equal_weights_and_leave_other_draws_alone(self) -> None:
        clips = different_hearts(5)
        before = torch.get_rng_state()
        models = [train_detector(clips, STEP, seeded(seed)) for seed in (1, 1, 2)]
        assert torch.equal(torch.get_rng_state(), before)
        one, same, other = (each.head[0].weight for each in models)
        assert torch.equal(one, same)
        assert not torch.equal(one, other)

    def test_one_clip_is_refused(self) -> None:
        with pytest.raises(DataError, match="1 clips teach no difference"):
            train_detector(different_hearts(1), STEP, seeded())

    def test_it_learns_to_find_altered_clips_again(self, fresh: CopyDetector) -> None:
        clips = different_hearts(40)
        trained = train_detector(clips, QUICK, seeded())
        copies = altered(viewed(clips.repeat(3, 1, 1, 1, 1)), seeded(1))

        def found_again(model: CopyDetector) -> float:
            nearest = correlations(model.embed(copies), model.embed(clips)).argmax(1)
            return float((nearest == torch.arange(len(clips)).repeat(3)).float().mean())

        assert found_again(trained) > found_again(fresh) + 0.15
