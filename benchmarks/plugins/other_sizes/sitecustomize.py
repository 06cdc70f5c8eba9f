"""Another depth for CardioMM `small`: for measuring what depends on a model's size alone.

Python imports this file by its name when its folder is on PYTHONPATH; `FEDCMR_CASCADES` says how
many cascades the network gets. This folder is in no wheel.
"""

import os
from dataclasses import replace

from fedcmr_shared.models.cardiomm_config import CONFIGS

CONFIGS["small"] = replace(CONFIGS["small"], cascades=int(os.environ["FEDCMR_CASCADES"]))
