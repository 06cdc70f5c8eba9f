"""Only the coordinator that a site pinned can ask for work, in its time and its federation."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fedcmr_shared.errors import JobRefused
from fedcmr_shared.identity.keys import SiteKey
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.signed_job import LONGEST_DAYS, JobAuthorisation, require_signed

JOB = JobSpec(name="heart")
FEDERATION = "f0" * 32
NOW = datetime(2030, 5, 1, tzinfo=UTC)
PERIOD = (NOW - timedelta(days=1), NOW + timedelta(days=1))


@pytest.fixture
def key(tmp_path: Path) -> SiteKey:
    return SiteKey.create(tmp_path / "coordinator.pem")


def refused(
    authorisation: JobAuthorisation | None, pinned: tuple[str, str], now: datetime = NOW
) -> str:
    with pytest.raises(JobRefused) as refusal:
        require_signed(JOB, authorisation, pinned, now)
    assert refusal.value.code == "signature"
    return str(refusal.value)


def test_a_signed_job_passes_within_its_time(key: SiteKey) -> None:
    signed = JobAuthorisation.sign(JOB, FEDERATION, PERIOD, key)
    read = JobAuthorisation.model_validate_json(signed.model_dump_json())
    for moment in (*PERIOD, NOW):
        require_signed(JOB, read, (FEDERATION, key.public_key), moment)


def test_without_a_signature_nothing_is_done(key: SiteKey) -> None:
    assert "not signed" in refused(None, (FEDERATION, key.public_key))


def test_another_key_or_federation_says_nothing_here(key: SiteKey, tmp_path: Path) -> None:
    signed = JobAuthorisation.sign(JOB, FEDERATION, PERIOD, key)
    other = SiteKey.create(tmp_path / "other.pem")
    assert "not that of key" in refused(signed, (FEDERATION, other.public_key))
    assert "another federation" in refused(signed, ("e0" * 32, key.public_key))


def test_a_changed_job_has_no_signature(key: SiteKey) -> None:
    milder = JOB.model_copy(update={"rounds": 2})
    signed = JobAuthorisation.sign(milder, FEDERATION, PERIOD, key)
    assert "changed the job" in refused(signed, (FEDERATION, key.public_key))


@pytest.mark.parametrize(
    "change",
    [
        {"job": JOB.sha256, "not_after": PERIOD[1] + timedelta(days=1)},
        {"not_before": PERIOD[0] - timedelta(days=1)},
        {"signature": "0" * 128},
    ],
)
def test_what_was_altered_after_signing_is_refused(change: dict[str, Any], key: SiteKey) -> None:
    signed = JobAuthorisation.sign(JOB, FEDERATION, PERIOD, key).model_copy(update=change)
    assert "not that of key" in refused(signed, (FEDERATION, key.public_key))


@pytest.mark.parametrize("days", [-2, 2])
def test_a_job_is_not_replayed_outside_of_its_time(days: int, key: SiteKey) -> None:
    signed = JobAuthorisation.sign(JOB, FEDERATION, PERIOD, key)
    pinned = (FEDERATION, key.public_key)
    assert "valid from" in refused(signed, pinned, NOW + timedelta(days=days))


def test_nobody_signs_for_ever(key: SiteKey) -> None:
    period = (NOW, NOW + timedelta(days=LONGEST_DAYS + 1))
    signed = JobAuthorisation.sign(JOB, FEDERATION, period, key)
    assert f"more than {LONGEST_DAYS} days" in refused(signed, (FEDERATION, key.public_key))
