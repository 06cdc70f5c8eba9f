"""Where real images lie; they are no part of the repository.

FEDCMR_TEST_DATA names the folder that holds one folder for each set.
"""

import os
from pathlib import Path

_BESIDE = Path(__file__).parents[2] / "shared" / "data"

SUNNYBROOK = Path(os.environ.get("FEDCMR_TEST_DATA", _BESIDE)) / "sunnybrook"
"""Sunnybrook Cardiac Data (CC0; Radau et al., 2009)."""

NO_SUNNYBROOK = f"no Sunnybrook data in {SUNNYBROOK}: set FEDCMR_TEST_DATA"
