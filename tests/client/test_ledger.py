"""A site's ledger: what a job may do, what it costs each patient, and how a ledger is made."""

from __future__ import annotations

import hashlib
import random
import shutil
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from fedcmr_client.ledger import CheckpointSchedule, LedgerPlace
from fedcmr_client.store.pseudonyms import keyed_hash
from fedcmr_shared.errors import ConfigurationError, JobRefused, LedgerError
from fedcmr_shared.identity.keys import verify_signature
from fedcmr_shared.privacy.accounting import best_order, epsilon_from_rdp, rdp_limit
from fedcmr_shared.privacy.budget import patient_rdp, replay
from fedcmr_shared.privacy.merkle import MerkleTree, leaf_hash
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.ledger import Checkpoint, Release
from fedcmr_shared.schemas.privacy import EvaluationSpec

if TYPE_CHECKING:
    from conftest import LedgerSite

WARD = frozenset(f"p-{number}" for number in range(6))
HELD_OUT = frozenset({"p-8", "p-9"})
POLICY = "0" * 64

# A job's life


def test_a_job_lives_and_is_remembered(north: LedgerSite) -> None:
    job = north.admit()
    assert north.ledger.stored(job, "train", 1) is None
    assert north.ledger.start(job, "train", 1) == 1
    path = north.ledger.store(job, "train", 1, 1, b"update")
    assert path == north.place.folder / "results" / job / "train-1.bin"
    assert north.ledger.start(job, "train", 2) == 1
    assert north.ledger.start(job, "train", 2) == 2
    north.ledger.store(job, "train", 2, 2, b"second")
    assert north.ledger.start(job, "evaluate", 2) == 1
    north.ledger.store(job, "evaluate", 2, 1, b"scores")
    north.ledger.finish(job, "finished")
    with north.open() as again:
        assert again.stored(job, "train", 1) == path
        assert path.read_bytes() == b"update"
        assert again.budget == north.ledger.budget == replay(leaf.entry for leaf in again.leaves())
        state = again.budget.jobs[job]
        assert (state.closed, state.starts) == ("finished", {"train": 3, "evaluate": 1})
        assert again.public_key == north.ledger.public_key
        assert north.kinds(again) == [
            "opened",
            "admitted",
            *["started", "stored", "started", "started", "stored"],
            *["started", "stored", "closed"],
        ]


def test_every_entry_is_in_the_second_place_when_a_call_returns(north: LedgerSite) -> None:
    sizes = []

    def kept() -> None:
        head = Checkpoint.model_validate_json(north.place.second_place.read_bytes())
        assert head == north.ledger.head()
        verify_signature(north.ledger.public_key, head.signature, head.signed_bytes())
        tree = MerkleTree(leaf_hash(leaf.content()) for leaf in north.ledger.leaves())
        assert (head.size, head.root) == (tree.size, tree.root().hex())
        sizes.append(head.size)

    kept()
    job = north.admit()
    kept()
    north.ledger.start(job, "train", 1)
    kept()
    north.ledger.store(job, "train", 1, 1, b"update")
    kept()
    north.ledger.withdraw("p-0")
    north.ledger.refuse("9" * 64, "declined", "budget")
    north.ledger.finish(job, "cancelled")
    north.ledger.set_clock()
    kept()
    north.ledger.checkpoint()
    kept()
    assert sizes == [1, 2, 3, 4, 8, 10]


def test_the_second_place_may_be_a_folder(new_site: LedgerSite) -> None:
    share = new_site.place.second_place.parent
    place = LedgerPlace(new_site.place.folder, share)
    new_site.create(place).close()
    assert (share / "ledger.head").is_file()
    new_site.open(place=place).close()


def test_an_admitted_job_keeps_its_first_cohorts(north: LedgerSite) -> None:
    job = north.admit()
    assert north.admit(training=frozenset({"p-77"})) == job
    assert north.ledger.cohort(job, "train") == WARD
    assert north.ledger.cohort(job, "evaluate") == HELD_OUT
    assert north.kinds() == ["opened", "admitted"]


def test_entries_name_no_patient_and_cohorts_are_keyed(north: LedgerSite) -> None:
    job = north.admit()
    north.ledger.withdraw("p-0")
    log = b"".join(leaf.content() for leaf in north.ledger.leaves())
    assert b"p-0" not in log
    reservation = north.ledger.budget.jobs[job].admitted.phases["train"]
    members = "\n".join(sorted(WARD))
    assert reservation.cohort == keyed_hash(north.secret, "cohort", members).hex()
    assert reservation.cohort != keyed_hash(b"s" * 32, "cohort", members).hex()
    assert reservation.cohort != hashlib.sha256(members.encode()).hexdigest()
    salts = {leaf.salt for leaf in north.ledger.leaves()}
    assert len(salts) == 3


def test_an_admission_says_what_the_job_declared(north: LedgerSite) -> None:
    job = north.job("heart", rounds=3, sampling_rate=0.2, clip_norm=0.5, delta=1e-6, spare_rounds=2)
    name = north.admit(job)
    entry = north.ledger.budget.jobs[name].admitted
    assert (entry.name, entry.coordinator, entry.model) == ("heart", "coordinator", "cardiomm")
    assert (entry.rounds, entry.spare_rounds, entry.clip_norm) == (3, 2, 0.5)
    assert (entry.delta, entry.policy, entry.part) == (1e-6, POLICY, "full")
    train = entry.phases["train"]
    assert train.release == Release(sampling_rate=0.2, noise_multiplier=2.0, steps=10)
    assert (train.starts, entry.phases["evaluate"].starts) == (5, 3)


def test_a_lost_attempt_costs_a_spare_round(north: LedgerSite) -> None:
    job = north.admit()
    attempts = [north.ledger.start(job, "train", 1) for _ in range(3)]
    assert attempts == [1, 2, 3]
    with pytest.raises(JobRefused, match=r"all starts to train .* are used up") as refused:
        north.ledger.start(job, "train", 1)
    assert (refused.value.code, refused.value.rule) == ("declined", "spare-rounds")
    with pytest.raises(JobRefused):
        north.ledger.start(job, "train", 2)
    assert north.ledger.start(job, "evaluate", 2) == 1
    assert north.kinds().count("started") == 4


def test_a_stored_round_is_not_started_again(north: LedgerSite) -> None:
    job = north.admit()
    north.ledger.start(job, "train", 1)
    north.ledger.store(job, "train", 1, 1, b"update")
    with pytest.raises(LedgerError, match=r"result of round 1 \(train\) is stored already"):
        north.ledger.start(job, "train", 1)
    with pytest.raises(LedgerError, match="is stored already"):
        north.ledger.store(job, "train", 1, 1, b"another")
    path = north.ledger.stored(job, "train", 1)
    assert path is not None
    assert path.read_bytes() == b"update"


def test_rounds_that_the_job_does_not_have_are_not_started(north: LedgerSite) -> None:
    job = north.admit(north.job(evaluation=EvaluationSpec(rounds="none")))
    with pytest.raises(LedgerError, match="no round 3 to train"):
        north.ledger.start(job, "train", 3)
    with pytest.raises(LedgerError, match="no round 1 to evaluate"):
        north.ledger.start(job, "evaluate", 1)
    with pytest.raises(LedgerError, match=r"job .* does not evaluate"):
        north.ledger.cohort(job, "evaluate")
    with pytest.raises(LedgerError, match="attempt 1 of round 1 was never started"):
        north.ledger.store(job, "train", 1, 1, b"update")
    assert north.kinds() == ["opened", "admitted"]
    assert not (north.ledger.place.folder / "results").exists()


def test_an_unknown_job_can_do_nothing(north: LedgerSite) -> None:
    unknown: list[Callable[[], object]] = [
        lambda: north.ledger.start("9" * 64, "train", 1),
        lambda: north.ledger.store("9" * 64, "train", 1, 1, b""),
        lambda: north.ledger.cohort("9" * 64, "train"),
        lambda: north.ledger.mask("9" * 64, "train", 1, 1, HEADER),
        lambda: north.ledger.unmask("9" * 64, "train", 1, 1, SURVIVORS, ANSWER),
        lambda: north.ledger.finish("9" * 64, "finished"),
    ]
    for call in unknown:
        with pytest.raises(LedgerError, match="999999999999… was never admitted"):
            call()
    assert north.ledger.stored("9" * 64, "train", 1) is None
    assert north.kinds() == ["opened"]


def test_a_closed_job_stays_closed(north: LedgerSite) -> None:
    job = north.admit()
    north.ledger.start(job, "train", 1)
    north.ledger.finish(job, "finished")
    north.ledger.finish(job, "finished")
    refused: list[Callable[[], object]] = [
        lambda: north.admit(),
        lambda: north.ledger.start(job, "train", 2),
        lambda: north.ledger.store(job, "train", 1, 1, b"late"),
    ]
    for call in refused:
        with pytest.raises(JobRefused, match="job job is over at this site") as found:
            call()
        assert (found.value.code, found.value.rule) == ("declined", "closed")
    with pytest.raises(LedgerError, match="is closed, not open"):
        north.ledger.finish(job, "cancelled")
    assert north.kinds() == ["opened", "admitted", "started", "closed"]


def test_the_end_releases_what_was_never_started(north: LedgerSite) -> None:
    job = north.admit()
    cohort = north.ledger.budget.jobs[job].admitted.phases["train"].cohort
    north.ledger.start(job, "train", 1)
    before = north.ledger.budget.committed_rdp(cohort)
    north.ledger.finish(job, "cancelled")
    assert north.ledger.budget.committed_rdp(cohort) == pytest.approx(before / 3)


# Secure sums

SURVIVORS = ("east", "north", "south")
HEADER, ANSWER = "4" * 64, "5" * 64


def store_round(north: LedgerSite, job: str, number: int = 1) -> None:
    north.ledger.start(job, "train", number)
    north.ledger.store(job, "train", number, 1, b"update")


def test_a_stored_round_is_masked_for_each_attempt_and_opened_once(north: LedgerSite) -> None:
    job = north.admit()
    store_round(north, job)
    before = north.ledger.spending().committed_rdp
    north.ledger.mask(job, "train", 1, 1, HEADER)
    north.ledger.mask(job, "train", 1, 3, HEADER)
    north.ledger.unmask(job, "train", 1, 3, ["south", "north", "east"], ANSWER)
    with north.open() as again:
        state = again.budget.jobs[job]
        assert state.masked == {("train", 1): 3}
        entry = state.unmasked["train", 1]
        assert (entry.attempt, entry.survivors, entry.answer) == (3, SURVIVORS, ANSWER)
        assert north.kinds(again)[-3:] == ["masked", "masked", "unmasked"]
        assert again.spending().committed_rdp == before


def test_the_last_round_is_masked_after_the_job_is_closed(north: LedgerSite) -> None:
    job = north.admit()
    store_round(north, job)
    north.ledger.finish(job, "finished")
    north.ledger.mask(job, "train", 1, 1, HEADER)
    north.ledger.unmask(job, "train", 1, 1, SURVIVORS, ANSWER)
    assert north.kinds()[-3:] == ["closed", "masked", "unmasked"]


@pytest.mark.parametrize(
    ("breach", "rule", "problem"),
    [
        (("mask", 2, 1), "attempt", "round 2 .train. has no stored result to mask"),
        (("mask", 1, 1), "attempt", "attempt 1 of round 1 .train. does not follow attempt 1"),
        (("mask", 1, 0), "attempt", "attempt 0 of round 1 .train. does not follow attempt 1"),
        (("unmask", 1, 2), "unmask", "cannot be opened: attempt 1 was masked"),
        (("unmask", 2, 1), "unmask", "cannot be opened: nothing was masked"),
    ],
)
def test_sums_out_of_order_are_refused_and_nothing_is_written(
    north: LedgerSite, breach: tuple[str, int, int], rule: str, problem: str
) -> None:
    job = north.admit()
    store_round(north, job)
    north.ledger.mask(job, "train", 1, 1, HEADER)
    before = north.kinds()
    what, number, attempt = breach
    more = {"mask": (HEADER,), "unmask": (SURVIVORS, ANSWER)}[what]
    with pytest.raises(JobRefused, match=problem) as refused:
        getattr(north.ledger, what)(job, "train", number, attempt, *more)
    assert (refused.value.code, refused.value.rule) == ("protocol", rule)
    assert north.kinds() == before


def test_after_an_unmasking_share_left_there_is_no_further_attempt(north: LedgerSite) -> None:
    job = north.admit()
    store_round(north, job)
    north.ledger.mask(job, "train", 1, 1, HEADER)
    north.ledger.unmask(job, "train", 1, 1, SURVIVORS, ANSWER)
    with pytest.raises(JobRefused, match=r"share of round 1 .* no further attempt"):
        north.ledger.mask(job, "train", 1, 2, HEADER)
    with pytest.raises(JobRefused, match=r"share of round 1 .* left before"):
        north.ledger.unmask(job, "train", 1, 1, SURVIVORS, ANSWER)
    store_round(north, job, 2)
    north.ledger.mask(job, "train", 2, 1, HEADER)
    assert north.kinds().count("masked") == 2


@pytest.mark.parametrize("survivors", [[], ["north"], ["north", "south", "north"]])
def test_a_sum_of_fewer_than_three_sites_is_never_opened(
    north: LedgerSite, survivors: list[str]
) -> None:
    job = north.admit()
    store_round(north, job)
    north.ledger.mask(job, "train", 1, 1, HEADER)
    with pytest.raises(JobRefused, match="is never opened") as refused:
        north.ledger.unmask(job, "train", 1, 1, survivors, ANSWER)
    assert (refused.value.code, refused.value.rule) == ("protocol", "survivors")
    assert north.kinds()[-1] == "masked"


def test_a_job_without_privacy_is_refused(north: LedgerSite) -> None:
    with pytest.raises(JobRefused, match="declares no privacy"):
        north.admit(JobSpec())
    assert north.kinds() == ["opened"]


def test_a_refusal_names_its_rule(north: LedgerSite) -> None:
    north.ledger.refuse(north.job().sha256, "declined", "budget")
    entry = north.ledger.leaves()[-1].entry
    assert entry.model_dump(exclude={"at", "kind"}) == {
        "job": north.job().sha256,
        "code": "declined",
        "rule": "budget",
    }


# The budget of each patient


def test_no_patient_exceeds_the_budget(north: LedgerSite) -> None:
    admitted = 0
    refused = None
    while refused is None:
        try:
            north.admit(north.job(f"job-{admitted}"))
            admitted += 1
        except JobRefused as refusal:
            refused = refusal
    assert "over the site's budget" in str(refused)
    assert (refused.code, refused.rule) == ("declined", "budget")
    spending = north.ledger.spending()
    assert admitted > 3
    assert len(spending.jobs) == admitted
    share = spending.committed_rdp / admitted
    assert spending.committed_rdp <= north.ledger.limit_rdp < spending.committed_rdp + share * 1.001
    assert spending.committed_epsilon <= 8.0
    with north.open() as again:
        assert again.budget == north.ledger.budget


def test_others_may_go_on_when_one_patient_has_no_budget_left(north: LedgerSite) -> None:
    north.admit(north.job("large", noise=0.9), frozenset({"p-0", "p-1"}))
    large = north.job("second", noise=0.9)
    with pytest.raises(JobRefused):
        north.admit(large, frozenset({"p-1", "p-2"}))
    job = north.admit(large, frozenset({"p-2", "p-3"}))
    assert north.ledger.cohort(job, "train") == {"p-2", "p-3"}


def test_a_patient_pays_in_training_and_in_evaluation(north: LedgerSite) -> None:
    one = north.job("one", evaluation=EvaluationSpec(noise_multiplier=2.0))
    two = north.job("two", evaluation=EvaluationSpec(noise_multiplier=2.0))
    north.admit(one, frozenset({"p-0", "p-1"}), frozenset({"p-2"}))
    north.admit(two, frozenset({"p-1", "p-2"}), frozenset({"p-1"}))
    jobs = north.ledger.budget.jobs
    trained, scored = (
        [jobs[job.sha256].admitted.phases[phase].cohort for job in (one, two)]
        for phase in ("train", "evaluate")
    )
    prices = {
        "p-0": patient_rdp(north.ledger.budget, trained[:1]),
        "p-1": patient_rdp(north.ledger.budget, [*trained, scored[1]]),
        "p-2": patient_rdp(north.ledger.budget, [trained[1], scored[0]]),
    }
    assert north.ledger.spending().committed_rdp == pytest.approx(prices["p-1"], rel=1e-12)
    assert prices["p-0"] < prices["p-2"] < prices["p-1"]


def test_the_same_cohort_in_two_jobs_pays_twice(north: LedgerSite) -> None:
    first = north.admit(north.job("one"))
    alone = north.ledger.spending().committed_rdp
    second = north.admit(north.job("two"))
    jobs = north.ledger.budget.jobs
    assert (
        jobs[first].admitted.phases["train"].cohort == jobs[second].admitted.phases["train"].cohort
    )
    assert north.ledger.spending().committed_rdp == pytest.approx(2 * alone)


def test_scores_without_noise_reserve_nothing_but_are_named(north: LedgerSite) -> None:
    bare = EvaluationSpec(noise_multiplier=None)
    north.admit(north.job(evaluation=bare), frozenset(), HELD_OUT)
    spending = north.ledger.spending()
    assert spending.committed_rdp == 0
    assert spending.jobs[0].without_noise == ("evaluate",)
    assert spending.jobs[0].left == {"train": 3, "evaluate": 2}


def test_spending_shows_budget_figures_and_jobs(north: LedgerSite) -> None:
    empty = north.ledger.spending()
    assert (empty.committed_rdp, empty.committed_epsilon, empty.jobs) == (0, 0, ())
    assert empty.figures.pld_epsilon == 0
    job = north.admit()
    north.ledger.start(job, "train", 1)
    spending = north.ledger.spending()
    order = best_order(8.0, 1e-5)
    assert (spending.epsilon, spending.delta, spending.order) == (8.0, 1e-5, order)
    assert spending.limit_rdp == rdp_limit(8.0, 1e-5, order) == north.ledger.limit_rdp
    assert spending.spent_rdp == pytest.approx(spending.committed_rdp / 3)
    assert 0 < spending.spent_epsilon < spending.committed_epsilon < 8
    assert spending.committed_epsilon == epsilon_from_rdp(spending.committed_rdp, order, 1e-5)
    train = Release(sampling_rate=0.1, noise_multiplier=2.0, steps=10)
    assert spending.releases == {train: 3}
    assert spending.figures.filter_epsilon == spending.committed_epsilon
    assert 0 < spending.figures.pld_epsilon < spending.committed_epsilon
    row = spending.jobs[0]
    assert (row.job, row.name, row.model, row.outcome) == (job, "job", "cardiomm", None)
    assert (row.started, row.left) == ({"train": 1, "evaluate": 0}, {"train": 2, "evaluate": 2})
    assert row.epsilon == spending.committed_epsilon


def test_withdrawn_patients_are_left_out_and_stay_charged(north: LedgerSite) -> None:
    job = north.admit()
    before = north.ledger.spending().committed_rdp
    north.ledger.withdraw("p-0")
    north.ledger.withdraw("p-0")
    assert north.kinds() == ["opened", "admitted", "withdrawn"]
    assert north.ledger.withdrawn(["p-0", "p-1", "p-0"]) == {"p-0"}
    assert north.ledger.cohort(job, "train") == WARD - {"p-0"}
    later = north.admit(north.job("later"))
    assert north.ledger.cohort(later, "train") == WARD - {"p-0"}
    jobs = north.ledger.budget.jobs
    cohorts = [jobs[name].admitted.phases["train"].cohort for name in (job, later)]
    assert cohorts[0] != cohorts[1]
    assert north.ledger.spending().committed_rdp > before
    north.ledger.finish(later, "cancelled")
    assert north.ledger.spending().committed_rdp == before


def test_many_patients_in_many_jobs_are_admitted_quickly(north: LedgerSite) -> None:
    chooser = random.Random(1)
    everyone = [f"p-{number}" for number in range(3000)]
    for number in range(10):
        north.admit(north.job(f"j-{number}", noise=20.0), frozenset(chooser.sample(everyone, 1500)))
    begun = time.process_time()
    north.admit(north.job("last", noise=20.0), frozenset(everyone))
    assert time.process_time() - begun < 2


# Making a ledger


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"epsilon": -1.0}, "epsilon is -1: it must be positive"),
        ({"epsilon": 0.0}, "epsilon is 0"),
        ({"epsilon": float("nan")}, "epsilon is nan"),
        ({"epsilon": float("inf")}, "epsilon is inf"),
        ({"epsilon": -1.0, "order": 8}, "epsilon is -1: it must be positive"),
        ({"delta": 0.0}, "delta is 0"),
        ({"delta": 1.0}, "delta is 1"),
        ({"order": 1}, "order is 1"),
        ({"epsilon": 0.5, "order": 2}, "epsilon 0.5 is out of reach at .*order 2"),
    ],
)
def test_impossible_budgets_are_refused_and_nothing_is_made(
    new_site: LedgerSite, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        new_site.create(**changes)
    assert not new_site.place.folder.exists()
    assert not new_site.place.second_place.exists()


def test_a_ledger_is_made_once(north: LedgerSite) -> None:
    with pytest.raises(LedgerError, match=r"north\.head exists: .*restore that one from backup"):
        north.create()
    north.place.second_place.unlink()
    with pytest.raises(LedgerError, match="newest head is missing"):
        north.admit()
    elsewhere = LedgerPlace(north.place.folder, north.place.second_place.with_name("another.head"))
    with pytest.raises(LedgerError, match="holds a ledger already"):
        north.create(elsewhere, epsilon=9.0)
    assert not elsewhere.second_place.exists()


def test_a_new_ledger_beside_a_lost_one_is_refused(north: LedgerSite) -> None:
    north.admit()
    shutil.rmtree(north.place.folder)
    with pytest.raises(LedgerError, match="holds the head of an earlier ledger"):
        north.create()
    with pytest.raises(LedgerError, match=r"ledger\.sqlite: no ledger is there: .*from backup"):
        north.open()


def test_a_second_place_that_is_not_mounted_is_named(new_site: LedgerSite) -> None:
    share = new_site.place.second_place.parent
    share.rmdir()
    with pytest.raises(LedgerError, match="share is no folder: mount or make the second place"):
        new_site.create()
    assert not share.exists()


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("no url", "is not a database URL"),
        ("mysql://root@host/x", "cannot be kept in mysql: use sqlite:///FILE or postgresql"),
    ],
)
def test_other_databases_are_refused(new_site: LedgerSite, url: str, problem: str) -> None:
    with pytest.raises(LedgerError, match=problem):
        new_site.create(LedgerPlace(new_site.place.folder, new_site.place.second_place, url))


def test_an_explicit_order_and_schedule_are_kept(new_site: LedgerSite) -> None:
    new_site.create(order=12, schedule=CheckpointSchedule(every_s=60, leaves=3)).close()
    with new_site.open() as ledger:
        opened = ledger.budget.opened
    assert (opened.order, opened.checkpoint_interval_ms, opened.checkpoint_leaves) == (12, 60000, 3)
