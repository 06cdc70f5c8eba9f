"""What a release is made of, for tests: a job, its authorisation, lineage and card."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedcmr_shared.identity.keys import SiteKey
from fedcmr_shared.models.bundle import save_bundle, state_sha256
from fedcmr_shared.models.card import (
    PURPOSES,
    Evaluation,
    Lineage,
    LineageRound,
    ModelCard,
    Start,
)
from fedcmr_shared.models.registry import build_model
from fedcmr_shared.privacy.job_claim import claim_of
from fedcmr_shared.schemas.job import JobSpec, ModelSpec
from fedcmr_shared.schemas.privacy import EvaluationSpec, PrivacySpec
from fedcmr_shared.schemas.signed_job import JobAuthorisation

NOW = datetime(2030, 5, 1, 12, tzinfo=UTC)
FEDERATION = "f0" * 32
ROSTER = "aa" * 32
JOB = JobSpec(
    name="heart",
    rounds=2,
    model=ModelSpec(text_encoder="hashed"),
    privacy=PrivacySpec(noise_multiplier=2.0, evaluation=EvaluationSpec(rounds="all")),
)


def model_state(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    state: dict[str, Tensor] = build_model(JOB.model).state_dict()
    return state


def write_model(path: Path, seed: int = 2) -> str:
    """Write the bundle of round 2 and return the hash of its weights."""
    state = model_state(seed)
    save_bundle(path, state, JOB.model, {"round": "2"})
    return state_sha256(state)


def make_card(key: SiteKey, model_sha256: str, job: JobSpec = JOB, **changes: Any) -> ModelCard:
    period = (NOW - timedelta(days=9), NOW + timedelta(days=9))
    values: dict[str, Any] = {
        "federation": "hearts",
        "federation_sha256": FEDERATION,
        "job_sha256": job.sha256,
        "job": job,
        "authorisation": JobAuthorisation.sign(job, FEDERATION, period, key),
        "lineage": Lineage(
            start=Start(origin="bundle", model_sha256="00" * 32, notes={"origin": "simulated"}),
            rounds=(
                LineageRound(number=1, sites=4, closed=False, model_sha256="11" * 32),
                LineageRound(number=2, sites=3, closed=False, model_sha256=model_sha256),
            ),
            roster_sha256=ROSTER,
        ),
        "privacy": claim_of(job),
        "evaluation": (
            Evaluation(round=1, sites=4, means={"psnr": 25.5}),
            Evaluation(round=2, sites=3, means={"psnr": 27.25}),
        ),
        "gates": (),
        "software": {"fedcmr": "0.1.0", "python": "3.11.4"},
        "intended_use": PURPOSES["cardiomm"].use,
        "limits": PURPOSES["cardiomm"].limits,
        "created_at": NOW,
    }
    return ModelCard.model_validate({**values, **changes})
