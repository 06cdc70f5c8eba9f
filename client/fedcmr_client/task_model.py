"""The network and text encoder of a task."""

from __future__ import annotations

from functools import lru_cache

import torch

from fedcmr_shared.errors import JobRefused, ModelError
from fedcmr_shared.federation.messages import Task
from fedcmr_shared.models.cardiomm import CardioMM
from fedcmr_shared.models.registry import build_model
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.text.encoders import CachedTextEncoder, TextEncoder, load_text_encoder


def task_model(task: Task) -> CardioMM:
    """Return the task's network with the task's weights.

    Raises:
        JobRefused: it is no reconstructor, the weights do not fit or are not finite.
    """
    name = task.job.model.name
    try:
        model = build_model(task.job.model)
        if not isinstance(model, CardioMM):
            raise ModelError(f"model {name} is not a reconstructor that a site can train")
        model.load_state_dict(dict(task.state))
    except (ModelError, RuntimeError) as error:
        message = f"the task's weights cannot be used as {name}: {error}"
        raise JobRefused("model", "weights", message) from error
    for key, value in task.state.items():
        if not bool(torch.isfinite(value).all()):
            raise JobRefused("model", "weights", f"the task's weights are not finite in {key}")
    return model


@lru_cache(maxsize=4)
def _load_encoder(name: str) -> TextEncoder:
    return CachedTextEncoder(load_text_encoder(name))


def load_encoder(job: JobSpec) -> TextEncoder:
    """Return the job's text encoder; each process loads it once."""
    return _load_encoder(job.model.text_encoder)
