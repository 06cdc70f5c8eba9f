"""What a job's sums look like follows from the job and the site's own roster alone."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.identity.roster import Roster, new_roster
from fedcmr_shared.privacy.distributed import noise_share
from fedcmr_shared.privacy.evaluation import totals_layout
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.ledger import Phase
from fedcmr_shared.secagg.layout import (
    encoding_for,
    following,
    group_of,
    groups,
    header_for,
    trained_shapes,
    weights,
)
from fedcmr_shared.secagg.session import Session

SMALL: dict[str, Any] = {
    "model": {"text_encoder": "hashed"},
    "training": {"part": "prompts"},
    "minimum_sites": 6,
}
GROUPED: dict[str, Any] = {"aggregation": "secure_groups", "minimum_sites": 6}


def job_of(**changes: Any) -> JobSpec:
    return JobSpec.model_validate({**SMALL, **changes})


def roster_of(count: int, first: int = 1) -> Roster:
    return new_roster({f"site-{n:03d}": f"{n:064x}" for n in range(first, first + count)})


def session_of(job: JobSpec, phase: Phase = "train", number: int = 1) -> Session:
    return Session(job=job.sha256, phase=phase, round=number, attempt=1)


# --- groups ------------------------------------------------------------------------------------


@given(st.integers(3, 40), st.integers(3, 12))
def test_groups_are_of_three_or_more_and_of_nearly_one_size(count: int, size: int) -> None:
    changes = {**GROUPED, "minimum_sites": 2 * size, "secure": {"group_size": size}}
    job, roster = job_of(**changes), roster_of(count)
    if count < 2 * size:
        with pytest.raises(ConfigurationError, match="no two groups"):
            groups(job, roster)
        return
    found = groups(job, roster)
    sizes = [len(group.sites) for group in found]
    assert sorted(site for group in found for site in group.sites) == list(roster.names)
    assert min(sizes) >= size
    assert max(sizes) - min(sizes) <= 1
    for group in found:
        assert all(group_of(job, roster, site) == group for site in group.sites)


def test_a_sum_of_all_has_one_group() -> None:
    assert groups(job_of(), roster_of(7)) == (roster_of(7),)


def test_no_job_chooses_a_sites_companions() -> None:
    """Neither by its seed nor by anything else but the size of groups."""
    roster = roster_of(10)
    first, *others = (
        groups(job_of(**GROUPED, seed=seed, name=name, rounds=rounds), roster)
        for seed, name, rounds in product(range(4), ("one", "other"), (1, 2))
    )
    assert [len(group.sites) for group in first] == [4, 3, 3]
    assert all(other == first for other in others)


def test_another_roster_has_other_groups() -> None:
    """Positive control: the order is one of many."""
    job, seen = job_of(**GROUPED), set()
    for key in range(20):
        sites = {**roster_of(6).sites, "site-001": f"{1000 + key:064x}"}
        seen.add(tuple(group.names for group in groups(job, new_roster(sites))))
    assert len(seen) > 3


def test_a_stranger_has_no_group() -> None:
    for job in (job_of(), job_of(**GROUPED)):
        with pytest.raises(ConfigurationError, match="does not list site stranger"):
            group_of(job, roster_of(7), "stranger")


# --- headers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("minimum", "least"), [(3, 5), (5, 5), (6, 6)])
def test_a_sum_is_over_the_threshold_and_the_jobs_least_sites(minimum: int, least: int) -> None:
    job, roster = job_of(minimum_sites=minimum), roster_of(7)
    header = header_for(job, session_of(job), roster)
    assert (header.threshold, header.least_survivors) == (5, least)
    assert (header.roster, header.model) == (roster.sha256, None)


def test_a_groups_sum_is_over_its_threshold() -> None:
    job = job_of(**GROUPED)
    group = group_of(job, roster_of(8), "site-003")
    header = header_for(job, session_of(job), group)
    assert header.threshold == header.least_survivors == group.threshold == 3
    assert header.roster == group.sha256


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 5},
        {"secure": {"word_bits": 24}},
        {"secure": {"update_range": 2.0}},
        {"secure": {"post_quantum": True}},
        {"site_sizes": {"site-001": "large"}},
        {"training": {"part": "decoder"}},
        {"minimum_sites": 7},
    ],
    ids=str,
)
def test_another_job_has_another_header(change: dict[str, Any]) -> None:
    one, other = job_of(), job_of(**change)
    headers = [header_for(job, session_of(job), roster_of(7)) for job in (one, other)]
    assert headers[0].digest() != headers[1].digest()


@pytest.mark.parametrize(
    "change",
    [
        {"secure": {"word_bits": 24}},
        {"secure": {"update_range": 2.0}},
        {"site_sizes": {"site-001": "large"}},
        {"training": {"part": "decoder"}},
    ],
    ids=str,
)
def test_the_encoding_is_in_the_header_by_itself(change: dict[str, Any]) -> None:
    one, other = (encoding_for(job, "train", roster_of(7)) for job in (job_of(), job_of(**change)))
    assert one.sha256 != other.sha256


# --- vectors -----------------------------------------------------------------------------------


def test_an_update_is_clipped_real_numbers_of_what_is_trained() -> None:
    job, roster = job_of(site_sizes={"site-002": "large", "elsewhere": "medium"}), roster_of(7)
    encoding = encoding_for(job, "train", roster)
    assert {s.name: s.shape for s in encoding.segments} == trained_shapes(
        job.model, job.training.part
    )
    assert {(s.bound, s.integer) for s in encoding.segments} == {(job.secure.update_range, False)}
    assert (encoding.word_bits, encoding.total_weight) == (32, 10)
    assert weights(job, "train", roster) == {**dict.fromkeys(roster.names, 1), "site-002": 4}


def test_totals_add_up_as_they_are() -> None:
    """In words of 32 bits and without weights, whatever the update's are."""
    job = job_of(site_sizes={"site-002": "large"}, secure={"word_bits": 24})
    encoding = encoding_for(job, "evaluate", roster_of(7))
    expected = {name: (length,) for name, (length, _) in totals_layout(job).items()}
    assert {s.name: s.shape for s in encoding.segments} == expected
    assert (encoding.word_bits, encoding.total_weight) == (32, 7)
    assert weights(job, "evaluate", roster_of(7)) == dict.fromkeys(roster_of(7).names, 1)


def test_shares_of_noise_travel_as_whole_numbers() -> None:
    job = job_of(
        training={"part": "prompts", "local_steps": 1, "optimiser": "sgd", "learning_rate": 0.5},
        privacy={
            "sampling_rate": 0.1,
            "cohort_size": 200,
            "noise_multiplier": 1.5,
            "clip_norm": 0.25,
            "distributed": {"unseen_sites": 1},
        },
    )
    encoding = encoding_for(job, "train", roster_of(7))
    assert {(s.bound, s.integer) for s in encoding.segments} == {(noise_share(job).bound, True)}


# --- what comes next ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scored", "expected"),
    [
        ("all", ["train 1", "evaluate 1", "train 2", "evaluate 2", "train 3", "evaluate 3"]),
        ("last", ["train 1", "train 2", "train 3", "evaluate 3"]),
        ("none", ["train 1", "train 2", "train 3"]),
    ],
)
def test_sessions_follow_each_other_to_the_jobs_end(scored: str, expected: list[str]) -> None:
    privacy = {"sampling_rate": 0.1, "cohort_size": 200, "noise_multiplier": 1.0}
    job = job_of(rounds=3, privacy={**privacy, "evaluation": {"rounds": scored}})
    session: Session | None = session_of(job)
    seen = []
    while session is not None:
        assert (session.job, session.attempt) == (job.sha256, 1)
        seen.append(f"{session.phase} {session.round}")
        session = following(job, session.model_copy(update={"attempt": 3}))
    assert seen == expected
