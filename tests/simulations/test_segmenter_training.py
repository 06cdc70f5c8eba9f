"""Training of the segmenter, and what the packaged one finds in hearts it has never seen."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from real_data import NO_SUNNYBROOK, SUNNYBROOK
from torch.nn import functional as F

from fedcmr_shared.cli import cli
from fedcmr_shared.errors import ConfigurationError, DataError
from fedcmr_shared.models.segmenter import load_segmenter, segment
from fedcmr_simulations.centres import EXTERNAL_CENTRES, TRAINING_CENTRES
from fedcmr_simulations.progress import SilentProgress
from fedcmr_simulations.segmenter_training import (
    HELD_OUT,
    NOT_CAVITY,
    NOT_WALL,
    Example,
    SegmenterTraining,
    augmented,
    contoured,
    make_segmenter,
    marginal_loss,
    overlap_loss,
    simulated,
    train,
)

DATA = SUNNYBROOK / "contoured_png8"
QUICK = SegmenterTraining(steps=2, batch=2, phantom_patients=2, crop_pixels=32)


def test_the_loss_of_known_labels_is_the_cross_entropy() -> None:
    logits, codes = torch.randn(2, 4, 5, 6), torch.randint(0, 4, (2, 5, 6))
    assert marginal_loss(logits, codes).item() == pytest.approx(
        F.cross_entropy(logits, codes).item(), rel=1e-5
    )


def test_the_loss_of_a_partly_known_label_is_that_of_the_sum() -> None:
    probability = torch.tensor([0.1, 0.2, 0.3, 0.4])
    logits = probability.log().reshape(1, 4, 1, 1)
    for code, allowed in ((NOT_WALL, 0.5), (NOT_CAVITY, 0.8)):
        loss = marginal_loss(logits, torch.tensor([[[code]]]))
        assert loss.item() == pytest.approx(-math.log(allowed))


def test_what_was_not_drawn_is_not_held_against_the_network() -> None:
    """RV beside the contours of an expert who drew none costs nothing; wall does."""
    codes = torch.full((1, 8, 8), NOT_WALL)
    certain = [torch.full((1, 4, 8, 8), -20.0) for _ in range(4)]
    for label, logits in enumerate(certain):
        logits[:, label] = 20
    losses = [(marginal_loss(x, codes) + overlap_loss(x, codes)).item() for x in certain]
    assert losses[3] == pytest.approx(losses[0], abs=1e-4)
    assert min(losses[1], losses[2]) > 10


def test_views_keep_image_and_labels_together() -> None:
    """Cavity stays bright and wall dark, however a view is turned, scaled and mirrored."""
    example = next(simulated(TRAINING_CENTRES, 1, 0))
    rng = np.random.default_rng(0)
    checked = 0
    for _ in range(20):
        image, codes = augmented(example, 64, rng)
        assert image.shape == codes.shape == (64, 64)
        if (codes == 1).sum() > 20 and (codes == 2).sum() > 20:
            assert image[codes == 1].mean() > 1.3 * image[codes == 2].mean()
            checked += 1
    assert checked > 15


def test_the_same_seed_gives_the_same_weights_and_the_file_says_so(tmp_path: Path) -> None:
    results = [
        make_segmenter(QUICK, tmp_path / f"{name}.safetensors", None, "here", SilentProgress())
        for name in "ab"
    ]
    assert results[0]["sha256"] == results[1]["sha256"]
    assert results[0]["origin"] == "simulated"
    loaded = load_segmenter(tmp_path / "a.safetensors")
    assert loaded.sha256 == results[0]["sha256"]
    assert json.loads(loaded.lineage["configuration"])["steps"] == 2
    other = QUICK.model_copy(update={"seed": 1})
    changed = make_segmenter(other, tmp_path / "c.safetensors", None, "", SilentProgress())
    assert changed["sha256"] != results[0]["sha256"]


def test_the_command_hides_paths(tmp_path: Path) -> None:
    out = tmp_path / "w.safetensors"
    words = ["simulate", "segmenter", "--out", str(out), "--steps", "1", "--patients", "1"]
    result = CliRunner().invoke(cli, [*words, "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["command"] == (
        "fedcmr simulate segmenter --out w.safetensors --seed 0 --steps 1 --patients 1"
    )
    assert str(tmp_path) not in repr(load_segmenter(out).lineage)


def test_no_folder_and_no_contours_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="folder does not exist"):
        make_segmenter(QUICK, tmp_path / "no" / "w.safetensors", None, "", SilentProgress())
    with pytest.raises(DataError, match=r"holds no \.npz"):
        make_segmenter(QUICK, tmp_path / "w.safetensors", tmp_path, "", SilentProgress())
    (tmp_path / "a.npz").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"a\.npz: damaged"):
        list(contoured(tmp_path))


def dice(first: np.ndarray, second: np.ndarray) -> float:
    return float(2 * (first & second).sum() / (first.sum() + second.sum()))


def median_dice(examples: list[Example]) -> dict[int, float]:
    """Dice of each label over the images that have it."""
    model = load_segmenter().model
    found: dict[int, list[float]] = {1: [], 2: [], 3: []}
    for example in examples:
        labels = segment(model, example.image, example.spacing_mm)
        for label, values in found.items():
            truth = example.codes == label
            if truth.sum() >= 10:
                values.append(dice(labels == label, truth))
    return {label: float(np.median(values)) for label, values in found.items() if values}


def test_simulated_hearts_of_scanners_never_seen() -> None:
    found = median_dice(list(simulated(EXTERNAL_CENTRES, 6, 5)))
    assert found[1] > 0.9
    assert found[2] > 0.85
    assert found[3] > 0.88


def test_exchanged_rows_and_columns_are_no_obstacle() -> None:
    examples = [
        replace(e, image=e.image.T, codes=e.codes.T, spacing_mm=e.spacing_mm[::-1])
        for e in simulated(EXTERNAL_CENTRES, 4, 6)
    ]
    assert median_dice(examples)[1] > 0.85


@pytest.mark.skipif(not DATA.is_dir(), reason=NO_SUNNYBROOK)
def test_real_hearts_of_patients_never_seen() -> None:
    """Expert contours; the wall was drawn at end diastole only, and the RV never."""
    examples = [e for e in contoured(DATA) if e.patient in HELD_OUT]
    assert len({e.patient for e in examples}) == 8
    found = median_dice(examples[::2])
    assert set(found) == {1, 2}
    assert found[1] > 0.85
    assert found[2] > 0.65


def test_training_lowers_the_loss() -> None:
    phantoms = list(simulated(TRAINING_CENTRES, 2, 0))
    config = SegmenterTraining(steps=20, batch=4, phantom_patients=2, crop_pixels=64)
    losses: list[float] = []

    class Listening(SilentProgress):
        def stage(self, title: str, steps: int):  # type: ignore[no-untyped-def]  # a test double
            from contextlib import nullcontext

            return nullcontext(lambda note: losses.append(float(note.split()[-1])))

    train(config, phantoms, [], Listening())
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
