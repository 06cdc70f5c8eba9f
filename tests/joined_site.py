"""A site that has joined a federation, and a small job that its coordinator has signed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch

from fedcmr_client.membership import Membership
from fedcmr_client.site_home import SiteHome
from fedcmr_shared.federation.messages import Task
from fedcmr_shared.identity.certificates import (
    Member,
    certificate_pem,
    issue_member,
    new_authority,
)
from fedcmr_shared.identity.enrolment import StartupKit
from fedcmr_shared.identity.keys import SiteKey
from fedcmr_shared.models.registry import build_model
from fedcmr_shared.schemas.job import JobSpec, ModelSpec, SamplingSpec, TrainingSpec
from fedcmr_shared.schemas.privacy import PrivacySpec
from fedcmr_shared.schemas.signed_job import JobAuthorisation

JOB = JobSpec(
    rounds=1,
    model=ModelSpec(text_encoder="hashed"),
    sampling=SamplingSpec(acs_lines=8),
    training=TrainingSpec(local_steps=1, part="adapters"),
    aggregation="plain_with_local_dp",
    privacy=PrivacySpec(cohort_size=10, noise_multiplier=3.0),
)


def make_task(job: JobSpec = JOB) -> Task:
    """The first round of ``job``, which nobody has signed."""
    torch.manual_seed(job.seed)
    return Task(job, 1, build_model(job.model).state_dict())


def join(home: SiteHome, folder: Path) -> JobAuthorisation:
    """Make the site a member of a federation new in ``folder``; sign `JOB` as its coordinator."""
    coordinator, authority = SiteKey.create(folder / "coordinator.pem"), new_authority("heart")
    member = Member("site", home.policy.site)
    asked = Membership.create(home.membership.folder, member, home.identity(), with_node_key=True)
    certificate = issue_member(authority, asked.certificate_request, member)
    kit = StartupKit(
        federation="heart",
        coordinator="coordinator",
        coordinator_key=coordinator.public_key,
        host="heart.example",
        port=8443,
        authority=certificate_pem(authority.certificate),
        certificate=certificate_pem(certificate),
    )
    home.membership.join(kit)
    now = datetime.now(UTC)
    period = (now - timedelta(hours=1), now + timedelta(hours=1))
    return JobAuthorisation.sign(JOB, home.membership.pinned[0], period, coordinator)
