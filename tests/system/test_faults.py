"""One job through the faults that matter most, in a real federation with PostgreSQL.

In each round something else breaks. `benchmarks/faults.py` plays every case by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from deployment import SITES, missing_programs, short_folder
from fault_cases import (
    Act,
    cut,
    kill_coordinator,
    kill_site,
    kill_superlink,
    restart_database,
    revoke,
)
from fault_lab import Lab

__all__ = ["short_folder"]

pytestmark = pytest.mark.skipif(bool(missing_programs()), reason=missing_programs())

FAULTS: dict[int, Act] = {
    1: kill_site("cedar", "update"),
    2: kill_superlink("update"),
    3: restart_database(5),
    4: kill_coordinator("unmask"),
    5: cut("birch", 30),
    6: revoke("dogwood"),
}
"""What breaks in which round."""

MAY_REPEAT = [("cedar", "train", 1)]
"""Nobody else may be charged twice for a round: whoever was not killed has a stored result."""


@pytest.fixture
def lab(short_folder: Path) -> Iterator[Lab]:
    with Lab.open(short_folder) as lab:
        yield lab


def test_a_job_survives_what_breaks_in_each_round(lab: Lab) -> None:
    job = lab.submit(rounds=len(FAULTS), evaluated="last")
    for number, act in FAULTS.items():
        lab.wait_round(job, number)
        act(lab, job)
    attempts = lab.finish(job)
    starts = lab.account(job, MAY_REPEAT)
    _require_outcomes(attempts)
    # Of the sites that were up all the time none missed a round, and none trained one twice.
    assert starts["alder"] == len(FAULTS)
    _require_released(lab, job)


def _require_outcomes(attempts: list[dict[str, Any]]) -> None:
    last = {
        (attempt["phase"], attempt["round"]): (attempt["outcome"], attempt["survivors"])
        for attempt in attempts
    }
    assert "cedar" not in attempts[0]["survivors"]
    assert last["train", 4] == ("closed", [])
    # In round 6 its vector may have been on its way when dogwood was thrown out.
    assert last["evaluate", 6] == ("opened", [name for name in SITES if name != "dogwood"])
    for number in (1, 2, 3, 5, 6):
        outcome, survivors = last["train", number]
        assert outcome == "opened"
        assert len(survivors) >= 3


def _require_released(lab: Lab, job: str) -> None:
    """The model leaves signed, and a hospital verifies it."""
    released = lab.federation.fedcmr("models", "release", job)
    alder = lab.site("alder")
    kit = alder.folder / "federation" / "kit.json"
    verified = alder.fedcmr("models", "verify", released["path"], "--kit", str(kit))
    rounds = verified["card"]["lineage"]["rounds"]
    assert len(rounds) == len(FAULTS)
    assert [each["number"] for each in rounds if each["closed"]] == [4]
