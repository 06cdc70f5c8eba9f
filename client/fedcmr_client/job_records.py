"""The scans that a job may use at a site: what the job asks for and the policy allows."""

from __future__ import annotations

from typing import Final

from fedcmr_client.store.site_store import ScanRecord, SiteStore
from fedcmr_client.store.split import Split
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.ledger import Phase
from fedcmr_shared.schemas.policy import SitePolicy

_PARTS: Final[dict[Phase, Split]] = {"train": "train", "evaluate": "validation"}


def job_records(
    store: SiteStore, job: JobSpec, policy: SitePolicy, phase: Phase
) -> list[ScanRecord]:
    """Return the scans for one phase of ``job``, sorted; none is opened."""
    limits = policy.cohort
    return store.cohort(
        _PARTS[phase],
        job.cohort,
        require_consent=limits.require_consent,
        modalities=limits.modalities,
        acquired_from=limits.acquired_from,
        acquired_until=limits.acquired_until,
    )
