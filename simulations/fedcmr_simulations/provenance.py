"""Where a run came from: versions, machine and command line."""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

_PACKAGES = ("fedcmr", "flwr", "torch", "numpy", "h5py", "ray", "transformers")


def environment(seed: int, data_origin: str) -> dict[str, Any]:
    """Return what the run's environment.json says."""
    import torch

    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["fedcmr", *sys.argv[1:]]),
        "seed": seed,
        "data_origin": data_origin,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: version(name) for name in _PACKAGES},
    }
