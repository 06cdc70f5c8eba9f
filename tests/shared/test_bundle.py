"""Model bundles: what they keep and what they refuse."""

import errno
import os
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fedcmr_shared.errors import ModelError
from fedcmr_shared.models.bundle import load_bundle, save_bundle, state_sha256
from fedcmr_shared.models.registry import build_model
from fedcmr_shared.schemas.job import ModelSpec

SPEC = ModelSpec(text_encoder="hashed")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(3)
    return build_model(SPEC)


@pytest.fixture
def path(tmp_path: Path, model: nn.Module) -> Path:
    path = tmp_path / "model.safetensors"
    save_bundle(path, model.state_dict(), SPEC, {"round": "7"})
    return path


def rewrite(path: Path, *, metadata: dict[str, str] | None = None, drop: str = "") -> None:
    """Write the bundle again with other metadata, outside `save_bundle`."""
    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        kept = {key: value for key, value in file.metadata().items() if key != drop}
    save_file(state, path, {**kept, **(metadata or {})})


class TestRoundTrip:
    def test_keeps_weights_spec_and_extras(self, path: Path, model: nn.Module) -> None:
        bundle = load_bundle(path)
        assert bundle.spec == SPEC
        assert bundle.extra == {"round": "7"}
        assert bundle.sha256 == state_sha256(model.state_dict())
        for name, tensor in bundle.model.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name]), name

    def test_model_is_in_evaluation_mode(self, path: Path) -> None:
        assert not any(module.training for module in load_bundle(path).model.modules())

    def test_loading_leaves_the_random_state_alone(self, path: Path) -> None:
        torch.manual_seed(5)
        before = torch.random.get_rng_state()
        load_bundle(path)
        assert torch.equal(before, torch.random.get_rng_state())

    def test_replaces_an_older_bundle(self, path: Path, model: nn.Module) -> None:
        save_bundle(path, model.state_dict(), SPEC, {"round": "8"})
        assert load_bundle(path).extra == {"round": "8"}
        assert os.listdir(path.parent) == [path.name]

    def test_tensors_that_share_memory_are_kept(self, tmp_path: Path) -> None:
        shared = torch.arange(6.0)
        state = {"a": shared, "b": shared, "c": shared[::2]}
        save_bundle(tmp_path / "m", state, SPEC, {})
        with safe_open(tmp_path / "m", framework="pt") as file:
            assert torch.equal(file.get_tensor("c"), torch.tensor([0.0, 2.0, 4.0]))


class TestRefusals:
    def test_absent_file(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"none\.safetensors does not exist"):
            load_bundle(tmp_path / "none.safetensors")

    def test_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="does not exist"):
            load_bundle(tmp_path)

    @pytest.mark.parametrize("kept", [0, 5, 200, -1])
    def test_truncated_file(self, path: Path, kept: int) -> None:
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(ModelError, match="not a complete model bundle"):
            load_bundle(path)

    def test_foreign_file(self, path: Path) -> None:
        path.write_bytes(b"PK\x03\x04 this is no bundle at all")
        with pytest.raises(ModelError, match="not a complete model bundle"):
            load_bundle(path)

    def test_plain_safetensors_file(self, path: Path) -> None:
        save_file({"a": torch.zeros(2)}, path)
        with pytest.raises(ModelError, match="not a model bundle of format 1"):
            load_bundle(path)

    def test_other_format(self, path: Path) -> None:
        rewrite(path, metadata={"fedcmr_format": "2"})
        with pytest.raises(ModelError, match="not a model bundle of format 1"):
            load_bundle(path)

    def test_changed_weight(self, path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[-2] ^= 1
        path.write_bytes(content)
        with pytest.raises(ModelError, match="do not match their hash"):
            load_bundle(path)

    def test_missing_hash(self, path: Path) -> None:
        rewrite(path, drop="state_sha256")
        with pytest.raises(ModelError, match="do not match their hash"):
            load_bundle(path)

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("not json", "model: Invalid JSON"),
            ('{"size": "huge"}', r"model\.size: Input should be"),
            ('{"colour": "red"}', r"model\.colour: Extra inputs"),
            ('{"name": "varnet"}', "'varnet' is unknown"),
        ],
    )
    def test_bad_spec(self, path: Path, text: str, reason: str) -> None:
        rewrite(path, metadata={"model": text})
        with pytest.raises(ModelError, match=reason):
            load_bundle(path)

    def test_missing_weight(self, tmp_path: Path, model: nn.Module) -> None:
        state = model.state_dict()
        name = min(state)
        del state[name]
        save_bundle(tmp_path / "m", state, SPEC, {})
        with pytest.raises(ModelError, match=f"{name} is missing"):
            load_bundle(tmp_path / "m")

    def test_extra_weight(self, tmp_path: Path, model: nn.Module) -> None:
        save_bundle(tmp_path / "m", {**model.state_dict(), "zz": torch.zeros(1)}, SPEC, {})
        with pytest.raises(ModelError, match="zz is extra"):
            load_bundle(tmp_path / "m")

    @pytest.mark.parametrize(
        ("change", "found"),
        [
            (lambda t: t[None], r"float32 \[1, "),
            (lambda t: t.double(), "float64"),
        ],
    )
    def test_other_shape_or_type(
        self, tmp_path: Path, model: nn.Module, change: object, found: str
    ) -> None:
        assert callable(change)
        state = model.state_dict()
        name = min(state)
        state[name] = change(state[name])
        save_bundle(tmp_path / "m", state, SPEC, {})
        with pytest.raises(ModelError, match=f"{name} is {found}"):
            load_bundle(tmp_path / "m")

    def test_weights_of_another_size(self, tmp_path: Path, model: nn.Module) -> None:
        other = SPEC.model_copy(update={"size": "small"})
        save_bundle(tmp_path / "m", model.state_dict(), other, {})
        with pytest.raises(ModelError, match="weights do not fit cardiomm small MM"):
            load_bundle(tmp_path / "m")

    def test_reserved_key(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="state_sha256 is set by the bundle itself"):
            save_bundle(tmp_path / "m", {}, SPEC, {"state_sha256": "0"})


class TestAtomicWrite:
    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="cannot write the bundle"):
            save_bundle(tmp_path / "none" / "m", {"a": torch.zeros(1)}, SPEC, {})

    def test_failure_keeps_the_old_bundle(
        self, path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = path.read_bytes()

        def full(_descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(ModelError, match="No space left"):
            save_bundle(path, model.state_dict(), SPEC, {"round": "8"})
        assert path.read_bytes() == before
        assert os.listdir(path.parent) == [path.name]


class TestStateHash:
    STATE: ClassVar[dict[str, Tensor]] = {
        "b": torch.arange(6.0).reshape(2, 3),
        "a": torch.tensor(True),
    }

    def test_known_value(self) -> None:
        # Hashes in records of past rounds must stay valid: the byte stream never changes.
        import hashlib

        stream = b'["a", "bool", []]\n\x01' + b'["b", "float32", [2, 3]]\n'
        stream += self.STATE["b"].numpy().astype("<f4").tobytes()
        assert state_sha256(self.STATE) == hashlib.sha256(stream).hexdigest()

    @settings(max_examples=20)
    @given(st.permutations(["a", "b", "c", "d"]))
    def test_insertion_order_does_not_matter(self, order: list[str]) -> None:
        values = {name: torch.full((2,), float(ord(name))) for name in "abcd"}
        assert state_sha256({name: values[name] for name in order}) == state_sha256(values)

    def test_memory_layout_does_not_matter(self) -> None:
        transposed = self.STATE["b"].t().contiguous().t()
        assert not transposed.is_contiguous()
        assert state_sha256({**self.STATE, "b": transposed}) == state_sha256(self.STATE)

    @pytest.mark.parametrize(
        "other",
        [
            {"b": torch.arange(6.0).reshape(3, 2)},
            {"b": torch.arange(6.0).reshape(2, 3).view(torch.int32)},
            {"b": torch.arange(6.0).reshape(2, 3).nextafter(torch.tensor(9.0))},
            {"c": torch.zeros(0)},
        ],
        ids=["shape", "dtype", "last bit", "empty tensor"],
    )
    def test_every_difference_shows(self, other: dict[str, Tensor]) -> None:
        assert state_sha256({**self.STATE, **other}) != state_sha256(self.STATE)

    def test_values_may_not_change_names(self) -> None:
        one = torch.ones(1)
        assert state_sha256({"a": one, "b": one * 2}) != state_sha256({"b": one, "a": one * 2})
