"""Networks on the device that a user names."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from fedcmr_shared.errors import ConfigurationError

M = TypeVar("M", bound=nn.Module)


def on_device(model: M, device: str) -> M:
    """Return ``model`` on ``device`` in evaluation mode.

    Raises:
        ConfigurationError: there is no such torch device here, it computes nothing or is too small.
    """
    try:
        # Some devices take a model and give no number back, such as meta.
        torch.ones(1, device=device).item()
        return model.to(device).eval()
    except (RuntimeError, AssertionError, ImportError) as error:  # torch raises any of them
        reason = str(error).partition("\n")[0]
        raise ConfigurationError(
            f"device {device!r} cannot be used: {reason.rstrip('.')}: use cpu, or cuda where there "
            "is a GPU"
        ) from error
