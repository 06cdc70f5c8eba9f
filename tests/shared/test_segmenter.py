"""The packaged segmenter: what its file says, and that damaged or foreign files are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedcmr_shared.errors import DataError, ModelError
from fedcmr_shared.models.segmenter import (
    Segmenter,
    default_segmenter,
    load_segmenter,
    normalise,
    save_segmenter,
    segment,
)


def chest(size: int = 96) -> np.ndarray:
    """Bright blood in a grey ring and a bright crescent beside it, 2 mm pixels."""
    y, x = np.mgrid[:size, :size] - size / 2
    image = np.full((size, size), 0.3)
    image[np.hypot(x + 16, y) < 15] = 0.9
    image[np.hypot(x, y) < 16] = 0.2
    image[np.hypot(x, y) < 11] = 1.0
    return image + 0.01 * np.random.default_rng(0).normal(size=image.shape)


def test_the_packaged_weights_say_that_no_private_data_made_them() -> None:
    loaded = load_segmenter()
    assert loaded.lineage["privacy"] == "none - public or simulated data only"
    assert set(loaded.lineage) >= {"origin", "command", "seed", "held_out", "versions"}
    said = json.loads(default_segmenter().with_suffix(".json").read_text())
    assert said["sha256"] == loaded.sha256
    assert said["command"] == loaded.lineage["command"]
    assert default_segmenter().stat().st_size < 2_000_000
    assert not set(said["real_patients"]) & set(said["held_out"])
    assert not loaded.model.training


def test_the_heart_of_a_drawing_is_found() -> None:
    labels = segment(load_segmenter().model, chest(), (2.0, 2.0))
    y, x = np.mgrid[:96, :96] - 48
    cavity = np.hypot(x, y) < 11
    overlap = 2 * (cavity & (labels == 1)).sum() / (cavity.sum() + (labels == 1).sum())
    assert overlap > 0.9
    assert (labels == 2).any()


def test_neither_brightness_nor_leading_axes_change_labels() -> None:
    model = load_segmenter().model
    image = chest()
    alone = segment(model, image, (2.0, 2.0))
    stack = segment(model, np.stack([[image, 3e4 * image]]), (2.0, 2.0))
    assert stack.shape == (1, 2, 96, 96)
    assert stack.dtype == np.uint8
    assert np.array_equal(stack[0, 0], alone)
    assert (stack[0, 1] == alone).mean() > 0.999


def test_an_image_on_a_finer_grid_has_the_same_heart() -> None:
    model = load_segmenter().model
    coarse = segment(model, chest(), (2.0, 2.0))
    fine = segment(model, np.kron(chest(), np.ones((2, 3))), (1.0, 2 / 3))
    assert fine.shape == (192, 288)
    same = (fine[::2, ::3] == coarse).mean()
    assert same > 0.98


def test_only_the_largest_piece_stays() -> None:
    two = np.concatenate([chest(), chest()[:, ::-1] * 0.8], axis=1)
    labels = segment(load_segmenter().model, two, (2.0, 2.0))
    halves = [(labels[:, :96] == 1).sum(), (labels[:, 96:] == 1).sum()]
    assert min(halves) == 0 < max(halves)


def test_normalised_images_ignore_scale() -> None:
    images = torch.from_numpy(chest())[None].float()
    assert torch.allclose(normalise(images), normalise(50 * images), atol=1e-5)
    assert torch.isfinite(normalise(torch.zeros(1, 16, 16))).all()


def test_weights_survive_a_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Segmenter()
    digest = save_segmenter(tmp_path / "w.safetensors", model, {"seed": 3, "origin": "simulated"})
    loaded = load_segmenter(tmp_path / "w.safetensors")
    assert loaded.sha256 == digest
    assert loaded.lineage == {"seed": "3", "origin": "simulated"}
    images = torch.randn(2, 32, 48)
    assert torch.equal(model.eval()(images), loaded.model(images))
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_changed_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_segmenter(path, Segmenter(), {})
    digest = load_segmenter(path).sha256
    state = load_file(path)
    state["head.bias"] += 1
    save_file(state, path, {"fedcmr_format": "segmenter 1", "state_sha256": digest})
    with pytest.raises(ModelError, match="do not match their hash"):
        load_segmenter(path)


def test_foreign_and_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.safetensors: weights of a segmenter cannot"):
        load_segmenter(tmp_path / "none.safetensors")
    short = tmp_path / "short.safetensors"
    shutil.copyfile(default_segmenter(), short)
    short.write_bytes(short.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be read"):
        load_segmenter(short)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="holds no weights of a segmenter"):
        load_segmenter(tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="cannot write"):
        save_segmenter(tmp_path / "no" / "w.safetensors", Segmenter(), {})


@pytest.mark.parametrize(
    ("image", "spacing", "message"),
    [
        (np.zeros(5), (2.0, 2.0), r"\(5,\) cannot be segmented"),
        (np.full((8, 8), np.nan), (2.0, 2.0), "finite"),
        (np.zeros((8, 8)), (0.0, 2.0), "must be positive"),
    ],
)
def test_what_is_no_image_is_refused(
    image: np.ndarray, spacing: tuple[float, float], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        segment(load_segmenter().model, image, spacing)
