"""Model bundles: weights and what they are for, in one safetensors file.

The file's string metadata holds ``fedcmr_format``, ``model`` (the ModelSpec as JSON),
``state_sha256`` and whatever else the writer wants to say. Loading runs no code from the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fedcmr_shared.errors import ModelError
from fedcmr_shared.models.registry import build_model
from fedcmr_shared.schemas.job import ModelSpec

FORMAT: Final = "1"
_RESERVED: Final = ("fedcmr_format", "model", "state_sha256")


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle; ``model`` is in evaluation mode, ``sha256`` that of `state_sha256`."""

    model: nn.Module
    spec: ModelSpec
    sha256: str
    extra: Mapping[str, str]


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 (hexadecimal) of all names, dtypes, shapes and little-endian values.

    Tensors are taken in the order of their names: neither insertion order, device nor memory
    layout matters. Every header is one JSON line, so no two states share their byte stream.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        header = [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        digest.update(json.dumps(header).encode() + b"\n")
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_bundle(
    path: Path | str, model_state: Mapping[str, Tensor], spec: ModelSpec, extra: Mapping[str, str]
) -> None:
    """Write a bundle atomically: ``path`` holds the old or the complete new file, never a part.

    Raises:
        ModelError: ``extra`` uses a reserved key, or the file cannot be written.
    """
    path = Path(path)
    clashes = sorted(set(extra) & set(_RESERVED))
    if clashes:
        raise ModelError(f"{path}: {clashes[0]} is set by the bundle itself: rename the extra key")
    # Copies, because safetensors refuses tensors that share memory.
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in model_state.items()
    }
    metadata = {
        **extra,
        "fedcmr_format": FORMAT,
        "model": spec.model_dump_json(),
        "state_sha256": state_sha256(tensors),
    }
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        save_file(tensors, partial, metadata)
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot write the bundle: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def load_bundle(path: Path | str) -> Bundle:
    """Read a bundle, build its network and check every weight against the stored hash.

    The global random state of torch is left as it was.

    Raises:
        ModelError: the file is absent, truncated, damaged, no bundle, or does not fit its model.
    """
    path = Path(path)
    metadata, state = _read(path)
    spec = _spec(path, metadata)
    digest = state_sha256(state)
    if metadata.get("state_sha256") != digest:
        raise ModelError(f"{path}: weights do not match their hash: fetch the bundle again")
    with torch.random.fork_rng(devices=[]):
        model = build_model(spec)
    _check_fit(path, spec, model.state_dict(), state)
    model.load_state_dict(state)
    extra = {key: value for key, value in metadata.items() if key not in _RESERVED}
    return Bundle(model.eval(), spec, digest, extra)


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise ModelError(f"model bundle {path} does not exist")
    with _read_errors(path), safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
    if metadata.get("fedcmr_format") != FORMAT:
        raise ModelError(f"{path} is not a model bundle of format {FORMAT}")
    return metadata, state


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} is not a complete model bundle: {error}") from error


def _spec(path: Path, metadata: Mapping[str, str]) -> ModelSpec:
    try:
        return ModelSpec.model_validate_json(metadata.get("model", ""))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(["model", *map(str, first["loc"])])
        raise ModelError(f"{path}: {field}: {first['msg']}") from error


def _check_fit(
    path: Path, spec: ModelSpec, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> None:
    label = f"{path}: weights do not fit {spec.name} {spec.size} {spec.variant}"
    for names, problem in (
        (expected.keys() - found, "missing"),
        (found.keys() - expected, "extra"),
    ):
        if names:
            raise ModelError(f"{label}: {min(names)} is {problem}")
    for name, tensor in sorted(expected.items()):
        if (found[name].shape, found[name].dtype) != (tensor.shape, tensor.dtype):
            raise ModelError(f"{label}: {name} is {_kind(found[name])}, not {_kind(tensor)}")


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
