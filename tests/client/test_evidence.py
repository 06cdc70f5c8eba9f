"""Evidence from a real ledger: whole or of one job, and what no checkpoint covers yet."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedcmr_client.evidence import build
from fedcmr_client.ledger import CheckpointSchedule, Ledger, LedgerPlace
from fedcmr_shared.audit.account import Account
from fedcmr_shared.audit.evidence import Evidence
from fedcmr_shared.audit.verify import Findings, verify
from fedcmr_shared.errors import LedgerError
from fedcmr_shared.privacy.accounting import rdp
from fedcmr_shared.schemas.job import JobSpec, TrainingSpec
from fedcmr_shared.schemas.ledger import Release
from fedcmr_shared.schemas.privacy import EvaluationSpec, PrivacySpec

START = 1_790_000_000_000
TICK = 60_000
LEAVES = 16


class Clock:
    """Time that the test sets; UTC milliseconds."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(tmp_path: Path, clock: Clock) -> Iterator[Ledger]:
    place = LedgerPlace(tmp_path / "ledger", tmp_path / "elsewhere" / "head.json")
    place.second_place.parent.mkdir()
    with Ledger.create(
        place,
        site="north",
        secret=b"s" * 32,
        epsilon=8.0,
        delta=1e-5,
        schedule=CheckpointSchedule(every_s=TICK / 1000, leaves=LEAVES),
        clock=clock,
    ) as ledger:
        yield ledger


def make_job(name: str = "demo", rounds: int = 2, noise: float | None = 8.0) -> JobSpec:
    evaluation = EvaluationSpec(noise_multiplier=noise)
    privacy = PrivacySpec(sampling_rate=0.1, noise_multiplier=2.0, evaluation=evaluation)
    return JobSpec(name=name, rounds=rounds, privacy=privacy, training=TrainingSpec(local_steps=5))


def admit(ledger: Ledger, job: JobSpec, first: int = 0) -> None:
    ledger.admit(
        job,
        policy_sha256="0f" * 32,
        training=[f"patient-{first + number}" for number in range(5)],
        evaluation=[f"held-out-{first + number}" for number in range(3)],
    )


def run_round(ledger: Ledger, job: JobSpec, number: int) -> None:
    attempt = ledger.start(job.sha256, "train", number)
    ledger.store(job.sha256, "train", number, attempt, b"update")


def run(ledger: Ledger, job: JobSpec) -> None:
    """Admit, train, evaluate and close: 2 + 2 x rounds + 2 entries."""
    admit(ledger, job)
    for number in range(1, job.rounds + 1):
        run_round(ledger, job, number)
    attempt = ledger.start(job.sha256, "evaluate", job.rounds)
    ledger.store(job.sha256, "evaluate", job.rounds, attempt, b"scores")
    ledger.finish(job.sha256, "finished")


def passed(evidence: Evidence, ledger: Ledger) -> Findings:
    findings = verify(evidence, {"north": ledger.public_key})
    assert findings.failed is None, findings.failed
    return findings


def account(evidence: Evidence, ledger: Ledger) -> Account:
    return passed(evidence, ledger).require()


def test_a_whole_ledger_verifies_and_costs_what_was_started(ledger: Ledger, clock: Clock) -> None:
    first, second = make_job("first"), make_job("second", rounds=3)
    run(ledger, first)
    clock.now += TICK
    run(ledger, second)
    ledger.refuse("ab" * 32, "model", "models")
    clock.now += TICK
    evidence = build(ledger)
    assert evidence.checkpoint.size == 3 * LEAVES
    assert len(evidence.leaves) == 3 * LEAVES
    result = account(evidence, ledger)
    train = Release(sampling_rate=0.1, noise_multiplier=2.0, steps=5)
    order = ledger.budget.opened.order
    assert max(c.figures.rdp for c in result.cohorts) == pytest.approx(5 * rdp(train, order))
    spending = ledger.spending()
    assert result.worst.rdp == pytest.approx(spending.committed_rdp)
    assert result.limit_rdp == pytest.approx(spending.limit_rdp)


def test_a_bundle_survives_its_file(ledger: Ledger, tmp_path: Path) -> None:
    run(ledger, make_job())
    evidence = build(ledger)
    path = tmp_path / "bundle.json"
    evidence.write(path)
    assert Evidence.read(path) == evidence


def test_a_job_is_disclosed_alone(ledger: Ledger, clock: Clock) -> None:
    first, second = make_job("first"), make_job("second", rounds=3)
    admit(ledger, first)
    run(ledger, second)
    clock.now += TICK
    evidence = build(ledger, second.sha256)
    assert first.sha256 not in evidence.model_dump_json()
    assert {leaf.leaf.entry.kind for leaf in evidence.leaves} == {
        "opened",
        "admitted",
        "started",
        "stored",
        "closed",
    }
    findings = passed(evidence, ledger)
    assert findings.complete
    (job,) = findings.require().jobs
    assert (job.admitted.name, job.outcome) == ("second", "finished")
    assert [(phase.phase, phase.charged) for phase in job.phases] == [("train", 3), ("evaluate", 1)]


def test_earlier_checkpoints_come_with_their_proofs(ledger: Ledger, clock: Clock) -> None:
    job = make_job()
    run(ledger, job)
    sizes = []
    for _ in range(3):
        sizes.append(ledger.checkpoint().size)
        clock.now += TICK
    for evidence in (build(ledger), build(ledger, job.sha256)):
        assert [item.checkpoint.size for item in evidence.earlier] == sizes
        assert sizes == [LEAVES, 2 * LEAVES, 3 * LEAVES]
        passed(evidence, ledger)


def test_a_running_job_is_shown_as_far_as_it_is_covered(ledger: Ledger, clock: Clock) -> None:
    job = make_job(rounds=5)
    admit(ledger, job)
    run_round(ledger, job, 1)
    assert ledger.checkpoint().size == LEAVES
    run_round(ledger, job, 2)
    findings = passed(build(ledger, job.sha256), ledger)
    assert not findings.complete
    (shown,) = findings.require().jobs
    assert shown.outcome == "open"
    assert shown.phases[0].started == 1
    assert shown.phases[0].charged == 6
    clock.now += TICK
    (later,) = account(build(ledger, job.sha256), ledger).jobs
    assert later.phases[0].started == 2


def test_the_end_of_a_job_waits_for_its_checkpoint(ledger: Ledger, clock: Clock) -> None:
    job = make_job()
    ledger.checkpoint()
    run(ledger, job)
    with pytest.raises(LedgerError, match=r"the end of job .* 2026-09-21 14:14:20 UTC"):
        build(ledger, job.sha256)
    clock.now = START + TICK - 1
    with pytest.raises(LedgerError, match="no checkpoint covers"):
        build(ledger, job.sha256)
    clock.now = START + TICK
    assert passed(build(ledger, job.sha256), ledger).complete


def test_a_closed_jobs_evidence_waits_for_its_end_and_not_for_its_last_sum(
    ledger: Ledger, clock: Clock
) -> None:
    job = make_job()
    run(ledger, job)
    assert ledger.checkpoint().size == LEAVES
    ledger.mask(job.sha256, "train", 2, 1, "4d" * 32)
    ledger.unmask(job.sha256, "train", 2, 1, ["east", "north", "south"], "5b" * 32)
    before = passed(build(ledger, job.sha256), ledger)
    assert before.complete
    assert before.require().jobs[0].opened == ()
    clock.now += TICK
    findings = passed(build(ledger, job.sha256), ledger)
    assert findings.complete
    (shown,) = findings.require().jobs
    assert [entry.survivors for entry in shown.opened] == [("east", "north", "south")]
    assert shown.figures == before.require().jobs[0].figures


def test_an_admission_waits_for_its_checkpoint(ledger: Ledger) -> None:
    job = make_job()
    ledger.checkpoint()
    admit(ledger, job)
    with pytest.raises(LedgerError, match="covers the admission of job"):
        build(ledger, job.sha256)


def test_the_time_named_is_that_of_the_checkpoint_that_covers(ledger: Ledger, clock: Clock) -> None:
    job = make_job(rounds=20)
    run(ledger, job)  # entries 1 to 44, of which tick 2 covers the last
    with pytest.raises(LedgerError, match="after 2026-09-21 14:15:20 UTC"):
        build(ledger, job.sha256)
    clock.now = START + 2 * TICK
    assert passed(build(ledger, job.sha256), ledger).complete


def test_a_ledger_scope_ends_at_the_checkpoint(ledger: Ledger) -> None:
    ledger.checkpoint()
    run(ledger, make_job())
    evidence = build(ledger)
    assert len(evidence.leaves) == LEAVES < len(ledger.leaves())
    assert passed(evidence, ledger).require().jobs == ()


def test_an_unknown_job_is_named(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="job abababababab was never admitted here"):
        build(ledger, "ab" * 32)


def test_scores_without_noise_are_named(ledger: Ledger, clock: Clock) -> None:
    run(ledger, make_job(noise=None))
    clock.now += TICK
    (job,) = account(build(ledger), ledger).jobs
    assert [phase.phase for phase in job.without_noise] == ["evaluate"]


def test_a_job_over_a_clock_that_was_set_back_verifies(ledger: Ledger, clock: Clock) -> None:
    job = make_job()
    clock.now += 10 * TICK
    admit(ledger, job)
    clock.now -= 5 * TICK
    ledger.set_clock()
    run_round(ledger, job, 1)
    clock.now += 5 * TICK
    findings = passed(build(ledger, job.sha256), ledger)
    assert findings.require().jobs[0].phases[0].started == 1


def test_no_bundle_names_a_patient(ledger: Ledger) -> None:
    job = make_job()
    run(ledger, job)
    ledger.withdraw("patient-1")
    for evidence in (build(ledger), build(ledger, job.sha256)):
        text = evidence.model_dump_json()
        assert "patient-" not in text
        assert "held-out-" not in text
