"""Named parts of a model: what a job trains of it, while the rest stays frozen.

Noise has one component for each trained value, so its length grows with the square root of their
number while the clipped signal does not: with privacy, less is often more. Which parameters belong
to a part is written beside the model in :mod:`fedcmr_shared.models.registry`.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from fedcmr_shared.errors import ConfigurationError, ModelError
from fedcmr_shared.models.lora import is_factor
from fedcmr_shared.models.registry import model_entry
from fedcmr_shared.schemas.job import ModelSpec, Part


def trainable_names(spec: ModelSpec, model: nn.Module, part: Part) -> list[str]:
    """Return the sorted names of the parameters of ``model`` that ``part`` trains.

    Raises:
        ConfigurationError: the model has nothing of that part.
        ModelError: there is no model of that name.
    """
    if (part == "lora") != (spec.lora_rank > 0):
        raise ConfigurationError(
            f"training.part {part} does not go with model.lora_rank {spec.lora_rank}: "
            "use part lora with a rank above 0, any other part with rank 0"
        )
    belongs = is_factor if part == "lora" else model_entry(spec.name).parts.get(part)
    names = [name for name, _ in model.named_parameters() if belongs and belongs(name)]
    if not names:
        raise ConfigurationError(
            f"training.part {part}: {spec.name} {spec.variant} has nothing of that part: "
            "use another part or variant"
        )
    return sorted(names)


def freeze(model: nn.Module, names: Collection[str]) -> list[nn.Parameter]:
    """Make ``names`` trainable and all others frozen; return the trainable ones in name order.

    Raises:
        ModelError: the model has no parameter of such a name.
    """
    parameters = dict(model.named_parameters())
    unknown = sorted(set(names) - parameters.keys())
    if unknown:
        raise ModelError(f"the model has no parameter {unknown[0]}")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)
    return [parameters[name] for name in sorted(set(names))]
