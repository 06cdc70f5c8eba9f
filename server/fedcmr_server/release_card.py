"""The card of a model, from the events that its job left behind.

Whoever releases adds what it alone knows: who signs, and which model came from which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from fedcmr_shared.models.card import (
    PURPOSES,
    Evaluation,
    GateResult,
    Lineage,
    ModelCard,
    software,
)
from fedcmr_shared.privacy.job_claim import claim_of
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.signed_job import JobAuthorisation


def card_of(
    federation: tuple[str, str],
    job: JobSpec,
    authorisation: JobAuthorisation,
    lineage: Lineage,
    gates: Sequence[GateResult],
    events: Sequence[Mapping[str, Any]],
    now: datetime,
) -> ModelCard:
    """Return the card of the last model of ``job``, whose ``events`` are the oldest first.

    ``federation`` is its name and the SHA-256 of its authority's certificate.

    Raises:
        pydantic.ValidationError: these do not fit together.
    """
    purpose = PURPOSES[job.model.name]
    return ModelCard(
        federation=federation[0],
        federation_sha256=federation[1],
        job_sha256=job.sha256,
        job=job,
        authorisation=authorisation,
        lineage=lineage,
        privacy=claim_of(job),
        evaluation=_evaluation(job, events),
        gates=tuple(gates),
        software=software(),
        energy_kwh=next((e["energy_kwh"] for e in events[::-1] if "energy_kwh" in e), None),
        intended_use=purpose.use,
        limits=purpose.limits,
        created_at=now,
    )


def _evaluation(job: JobSpec, events: Sequence[Mapping[str, Any]]) -> tuple[Evaluation, ...]:
    """Return the means of each evaluated round whose sum could be opened."""
    privacy = job.privacy
    metrics = () if privacy is None else privacy.evaluation.metrics
    found = {
        event["round"]: Evaluation(
            round=event["round"],
            sites=event["sites"],
            means={metric: event[metric] for metric in metrics if metric in event},
        )
        for event in events
        if event["event"] == "evaluation" and not event.get("closed")
        if "gates_passed" not in event
    }
    return tuple(found[number] for number in sorted(found))
