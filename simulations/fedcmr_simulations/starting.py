"""Weights that a run starts from, and how many of them it trains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fedcmr_shared.errors import ModelError
from fedcmr_shared.models.bundle import load_bundle
from fedcmr_shared.models.lora import adopt
from fedcmr_shared.models.registry import build_model
from fedcmr_shared.privacy.parts import trainable_names
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_simulations.generator_training import default_generator
from fedcmr_simulations.pretraining import default_start


def starting_state(start: str | None, job: JobSpec) -> Mapping[str, Tensor] | None:
    """Return the weights of the bundle ``start`` as the job's model takes them; None for none.

    Raises:
        ModelError: the bundle cannot be read or does not fit the job's model.
    """
    if start is None:
        return None
    bundle = load_bundle(starting_bundle(start, job))
    torch.manual_seed(job.seed)
    model = build_model(job.model)
    adopt(model, bundle.model.state_dict())
    state: Mapping[str, Tensor] = model.state_dict()
    return state


def starting_bundle(start: str, job: JobSpec) -> Path:
    """Return where the weights lie that a run begins with; ``packaged`` are those of this package.

    Raises:
        ModelError: the package has none for the job's model.
    """
    if start != "packaged":
        return Path(start)
    packaged = {"cardiomm": default_start, "cpgg": default_generator}
    if job.model.name not in packaged:
        raise ModelError(
            f"start: there are no packaged weights for {job.model.name}: name a bundle, or write "
            "null for random ones"
        )
    return packaged[job.model.name]()


def trained_counts(job: JobSpec) -> dict[str, int]:
    """Return the numbers of ``trainable``, ``frozen`` and ``total`` values for the job's part."""
    spec = job.model
    with torch.device("meta"):
        model = build_model(spec)
    names = set(trainable_names(spec, model, job.training.part))
    trained = sum(p.numel() for name, p in model.named_parameters() if name in names)
    total = sum(tensor.numel() for tensor in model.state_dict().values())
    return {"trainable": trained, "frozen": total - trained, "total": total}
