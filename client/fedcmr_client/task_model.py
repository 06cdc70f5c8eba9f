"""The network of a task."""

from __future__ import annotations

import torch
from torch import nn

from fedcmr_shared.errors import JobRefused, ModelError
from fedcmr_shared.federation.messages import Task
from fedcmr_shared.models.cardiomm import CardioMM
from fedcmr_shared.models.registry import build_model, model_entry


def task_model(task: Task) -> nn.Module:
    """Return the task's network with the task's weights.

    Raises:
        JobRefused: the job asks for scores that the network has not, or the weights do not fit or
            are not finite.
    """
    name = task.job.model.name
    try:
        problem = model_entry(name).scoring_problem(task.job)
        if problem is not None:
            raise JobRefused("model", "evaluation", problem)
        model = build_model(task.job.model)
        model.load_state_dict(dict(task.state))
    except (ModelError, RuntimeError) as error:
        message = f"the task's weights cannot be used as {name}: {error}"
        raise JobRefused("model", "weights", message) from error
    for key, value in task.state.items():
        if not bool(torch.isfinite(value).all()):
            raise JobRefused("model", "weights", f"the task's weights are not finite in {key}")
    return model


def reconstructor(task: Task) -> CardioMM:
    """Return the task's network, which must be a reconstructor; as `task_model`."""
    model = task_model(task)
    if not isinstance(model, CardioMM):
        raise JobRefused("model", "kind", f"{task.job.model.name} does not reconstruct images")
    return model
