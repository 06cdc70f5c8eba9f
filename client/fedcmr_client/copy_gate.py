"""The memorisation gate at a site: does a generator repeat the patients it was trained on?

It trains a copy detector on the site's own patients and searches as many new samples as there are
validation patients; see :mod:`fedcmr_shared.metrics.memorisation`. Samples are asked for with
phenotypes of training patients, whose copies they would most likely be. Detector, samples and
figures stay here: the outcome alone may leave, and inside a secure sum only.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Final

import numpy as np
import torch
from torch import Tensor

from fedcmr_client.cine import Heart, read_heart
from fedcmr_client.generation import PLANS, ClipRequest, draw_clips
from fedcmr_client.store.site_store import ScanRecord
from fedcmr_shared.errors import DataError, ModelError
from fedcmr_shared.metrics.memorisation import (
    LEAST_HELD_OUT,
    Findings,
    GateConfig,
    Outcome,
    examine,
)
from fedcmr_shared.models.clips import clip_grid
from fedcmr_shared.models.cpgg import CPGG

TRIES: Final = 3
"""How often a job's gate may start at a site: each further try is a further look at the patients."""

_log = logging.getLogger("fedcmr.site")


@dataclass(frozen=True)
class CopyGate:
    """Searches samples of ``model`` for copies; ``config`` is public."""

    model: CPGG
    size: str
    device: str = "cpu"
    config: GateConfig = field(default_factory=GateConfig)

    def outcome(self, training: Sequence[ScanRecord], validation: Sequence[ScanRecord]) -> Outcome:
        """Return what the gate says; figures go into the site's own log.

        ``training`` and ``validation`` are the scans of the patients that the job trained on and of
        others. Too few of either give *undecided*, before anything is trained. A model whose
        samples cannot be examined has *failed*.
        """
        known, others = self._hearts(training), self._hearts(validation)
        if len(others) < LEAST_HELD_OUT or len(known) < 2:
            _log.warning(
                "the memorisation gate cannot decide: %d validation and %d training patients with "
                "a heart, and it needs %d and 2",
                len(others),
                len(known),
                LEAST_HELD_OUT,
            )
            return "undecided"
        random = torch.Generator().manual_seed(int.from_bytes(os.urandom(8)) >> 1)
        try:
            found = examine(
                _clips(known),
                _clips(others),
                self._samples(known, len(others), random),
                self.config,
                random,
            )
        except (DataError, ModelError) as error:
            # The samples depend on patients' phenotypes. A refusal would tell of them under this
            # site's name, and the bit tells it in the sum alone.
            _log.error("the memorisation gate fails the model: %s", error)
            return "failed"
        _log.info("memorisation gate: %s", found.text)
        if found.findings is not None:
            _log.info("memorisation gate, without a vote: %s", _beside(found.findings))
        return found.outcome

    def _hearts(self, records: Sequence[ScanRecord]) -> list[Heart]:
        grid = clip_grid(self.model.config)
        hearts = []
        ordered = sorted(records, key=lambda record: record.patient)
        for _, scans in groupby(ordered, key=lambda record: record.patient):
            try:
                hearts.append(read_heart(list(scans), grid))
            except DataError as error:
                _log.error("a patient is left out of the memorisation gate: %s", error)
        return hearts

    def _samples(self, known: Sequence[Heart], count: int, random: torch.Generator) -> Tensor:
        """Draw ``count`` clips asked for with the phenotypes of training patients."""
        model = self.model.to(torch.device(self.device)).eval()
        order = torch.randperm(len(known), generator=random).repeat(-(-count // len(known)))
        seeds = torch.randint(2**32, (count,), generator=random).tolist()
        requests = [
            ClipRequest(known[index].phenotypes, known[index].phenotypes, seed)
            for index, seed in zip(order[:count].tolist(), seeds, strict=True)
        ]
        # Drawn as those draw them who get the model.
        drawn = draw_clips(model, requests, PLANS[self.size])
        return torch.from_numpy(np.stack([clip.frames for clip in drawn]))[:, None]


def _beside(found: Findings) -> str:
    made, others = found.made, found.held_out
    return (
        f"{100 * found.nearer_to_training:.0f} % of the synthetic clips are nearer to a training "
        f"patient than to a held-out one; ratio of distances {made.ratio:.2f} (held-out patients "
        f"{others.ratio:.2f}); authentic {100 * made.authenticity:.0f} % (held-out patients "
        f"{100 * others.authenticity:.0f} %)"
    )


def _clips(hearts: Sequence[Heart]) -> Tensor:
    return torch.from_numpy(np.stack([heart.clip for heart in hearts]))[:, None]
