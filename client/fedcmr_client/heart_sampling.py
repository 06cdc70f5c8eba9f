"""Hearts drawn at random: from the public priors, or from a model of phenotypes.

The priors know nothing of correlations, so a few are put in, all of them ours and no description of
any patients: sizes share a factor, and so do the segments of a strain or of the wall; both
ventricles pump the same volume but for what two measurements differ by; cardiac output follows from
a heart rate, the least area of the aorta from its distensibility. Stroke volumes and ejection
fractions obey their identities.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

import numpy as np
import torch

from fedcmr_client.heart_requests import Heart
from fedcmr_shared.errors import ModelError
from fedcmr_shared.metrics.phenotypes.identities import project
from fedcmr_shared.metrics.phenotypes.table import (
    CAVITIES,
    PHENOTYPES,
    VESSELS,
    Phenotype,
    PhenotypeTable,
    implausible,
)
from fedcmr_shared.models.phenotype_gaussian import PhenotypeMoments
from fedcmr_shared.models.phenotype_vae import PhenotypeVAE

PhenotypeModel = PhenotypeVAE | PhenotypeMoments
"""What draws phenotypes."""

PRIOR_SOURCE: Final = (
    "drawn from the public priors of simulated healthy hearts: no distribution of patients"
)

_SHARED: Final = 0.5  # share of a variance that belongs to the common factor
_BEATS_PER_MIN: Final = (62.0, 6.0)  # mean and deviation; the means of LVCO and LVSV imply 62
_PULSE_PRESSURE_MMHG: Final = 58.0  # which the means of areas and distensibilities imply
_STROKES_DIFFER: Final = 0.03  # deviation of the right stroke volume, relative to the left one
_TRIES: Final = 200


def sample_prior(seed: int) -> Heart:
    """Return all phenotypes of a plausible heart; the same for the same seed."""
    random = np.random.default_rng(seed)
    return _first_plausible(_consistent(_free(random), random) for _ in range(_TRIES))


def sample_model(model: PhenotypeModel, seed: int) -> Heart:
    """Return the phenotypes of a plausible heart that ``model`` draws, made to obey the identities.

    Raises:
        ModelError: the model draws no plausible heart.
    """
    # Not the seed itself: its numbers belong to the clip.
    own = int(np.random.SeedSequence(seed).generate_state(1)[0])
    generator = torch.Generator().manual_seed(own)
    values = model.sample(_TRIES, generator).double().numpy()
    table = project(PhenotypeTable(model.config.standardisation.names, values))
    return _first_plausible(table.rows())


def _first_plausible(hearts: Iterable[Heart]) -> Heart:
    outside = ""
    for heart in hearts:
        wrong = implausible(heart)
        if not wrong:
            return heart
        outside = next(iter(wrong))
    raise ModelError(
        f"none of {_TRIES} hearts is plausible ({outside} lies outside its range): use another "
        "model of phenotypes"
    )


def _free(random: np.random.Generator) -> Heart:
    """Draw every phenotype from its prior; sizes are correlated, segments of one kind too."""
    factors: dict[str, float] = {}
    heart = {}
    for one in PHENOTYPES:
        factor, own = _factor(one), random.standard_normal()
        if factor is not None:
            common = factors.setdefault(factor, random.standard_normal())
            own = math.sqrt(_SHARED) * common + math.sqrt(1 - _SHARED) * own
        mean, deviation = one.prior
        heart[one.name] = mean + deviation * own
    return heart


def _factor(one: Phenotype) -> str | None:
    if one.unit in ("mL", "g", "mm2"):
        return "size"
    return one.group if one.needs_motion or one.group == "wall thickness" else None


def _consistent(heart: Heart, random: np.random.Generator) -> Heart:
    """Compute anew what follows from the ejection fractions and the largest volumes and areas."""
    left, right = CAVITIES[:2]
    stroke = heart[left.largest] * heart[left.fraction] / 100 * random.normal(1, _STROKES_DIFFER)
    heart[right.largest] = 100 * stroke / heart[right.fraction]
    for cavity in CAVITIES:
        heart[cavity.stroke] = heart[cavity.largest] * heart[cavity.fraction] / 100
        heart[cavity.smallest] = heart[cavity.largest] - heart[cavity.stroke]
    heart["LVCO"] = heart[left.stroke] * random.normal(*_BEATS_PER_MIN) / 1000
    for largest, smallest in VESSELS:
        distensibility = heart[f"{largest.split()[0]} distensibility"]
        heart[smallest] = heart[largest] / (1 + distensibility * _PULSE_PRESSURE_MMHG / 1000)
    return heart
