"""What figures of energy rest on, for tests."""

from __future__ import annotations

from fedcmr_client.energy import Circumstances

CIRCUMSTANCES = Circumstances(
    country="DEU",
    g_per_kwh=400.0,
    intensity_year=2023,
    pue=1.5,
    watts_per_thread=4.0,
    hardware="a machine",
    interfaces=(),
    tool="codecarbon 0",
)
