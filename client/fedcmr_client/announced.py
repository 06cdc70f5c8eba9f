"""What a site would answer to a job that its coordinator announces; opens no data."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

from fedcmr_client.gate import examine
from fedcmr_client.governance import ListedJob
from fedcmr_client.secure_site import summing_group
from fedcmr_client.site_home import SiteHome
from fedcmr_shared.errors import JobRefused
from fedcmr_shared.schemas.signed_job import require_signed

_OVER: Final = ("finished", "failed", "cancelled")


def is_over(job: ListedJob) -> bool:
    """Whether nothing more is to be expected of the job."""
    return job.state in _OVER


def refused_by(home: SiteHome, announced: ListedJob) -> list[str]:
    """Return the rules that the job breaks today: the policy's, signature and roster.

    Budget and patients are not looked at; `fedcmr site check` does.

    Raises:
        ConfigurationError: the site has not joined.
    """
    job = announced.spec
    findings = examine(job, home.policy, datetime.now().astimezone())
    refused: list[str] = [finding.rule for finding in findings if not finding.passed]
    try:
        require_signed(job, announced.authorisation, home.membership.pinned, datetime.now(UTC))
    except JobRefused as refusal:
        refused.append(refusal.rule)
    if job.aggregation != "plain_with_local_dp":
        try:
            summing_group(home, job)
        except JobRefused as refusal:
            refused.append(refusal.rule)
    return refused
