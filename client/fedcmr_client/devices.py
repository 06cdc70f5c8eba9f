"""Networks on the device that a user names."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from fedcmr_shared.errors import ConfigurationError

M = TypeVar("M", bound=nn.Module)


def on_device(model: M, device: str) -> M:
    """Return ``model`` on ``device`` in evaluation mode.

    Raises:
        ConfigurationError: there is no such torch device here.
    """
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:  # torch raises either for an absent device
        reason = str(error).partition("\n")[0]
        raise ConfigurationError(f"device {device!r} cannot be used: {reason}") from error
