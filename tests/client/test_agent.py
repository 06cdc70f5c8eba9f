"""The order of things at a site: policy, ledger, work, result; and what each refusal leaves."""

import math
import threading
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedcmr_client import agent as agent_module
from fedcmr_client.agent import SiteAgent
from fedcmr_client.site_home import SiteHome
from fedcmr_client.store.site_store import SiteStore
from fedcmr_client.store.split import SplitFractions
from fedcmr_shared.errors import JobRefused
from fedcmr_shared.federation.messages import Task
from fedcmr_shared.identity.keys import SiteKey
from fedcmr_shared.models.bundle import state_sha256
from fedcmr_shared.models.registry import build_model
from fedcmr_shared.privacy import evaluation as evaluation_module
from fedcmr_shared.privacy.evaluation import totals_layout
from fedcmr_shared.privacy.parts import trainable_names
from fedcmr_shared.schemas.job import (
    JobSpec,
    ModelSpec,
    ResourceSpec,
    SamplingSpec,
    TrainingSpec,
)
from fedcmr_shared.schemas.ledger import Admitted, Closed, Refused, Started, Stored
from fedcmr_shared.schemas.privacy import EvaluationSpec, PrivacySpec
from fedcmr_shared.schemas.signed_job import JobAuthorisation

PRIVACY = PrivacySpec(
    cohort_size=10,
    sampling_rate=0.5,
    noise_multiplier=2.0,
    spare_rounds=1,
    evaluation=EvaluationSpec(noise_multiplier=4.0, cohort_size=2),
)
JOB = JobSpec(
    name="private",
    rounds=2,
    model=ModelSpec(text_encoder="hashed"),
    sampling=SamplingSpec(acs_lines=8),
    training=TrainingSpec(local_steps=2, part="adapters"),
    aggregation="plain_with_local_dp",
    privacy=PRIVACY,
)


def make_task(job: JobSpec = JOB, number: int = 1) -> Task:
    torch.manual_seed(job.seed)
    return Task(job, number, build_model(job.model).state_dict())


def entries(home: SiteHome) -> list[Any]:
    with closing(home.open_ledger()) as ledger:
        return [leaf.entry for leaf in ledger.leaves()][1:]


def kinds(home: SiteHome) -> list[str]:
    return [entry.kind for entry in entries(home)]


def test_a_round_trains_the_jobs_part_and_writes_the_ledger(
    make_home: Callable[..., SiteHome],
) -> None:
    home = make_home()
    task = make_task()
    update = SiteAgent(home).train(task)
    names = trainable_names(JOB.model, build_model(JOB.model), "adapters")
    assert sorted(update.delta) == names
    assert update.loss is None
    assert update.model_sha256 == state_sha256(task.state)
    assert any(bool(delta.abs().sum() > 0) for delta in update.delta.values())
    assert [type(entry) for entry in entries(home)] == [Admitted, Started, Stored]


def test_a_whole_job_closes_itself_and_releases_its_spare_rounds(
    make_home: Callable[..., SiteHome],
) -> None:
    home = make_home()
    site = SiteAgent(home)
    for number in (1, 2):
        site.train(make_task(number=number))
    scores = site.evaluate(make_task(number=2))
    assert set(scores.totals) == {"psnr/sum", "psnr/patients"}
    assert isinstance(entries(home)[-1], Closed)
    again = site.evaluate(make_task(number=2))
    assert again.totals == scores.totals
    with closing(home.open_ledger()) as ledger:
        state = ledger.budget.jobs[JOB.sha256]
        for phase, started in (("train", 2), ("evaluate", 1)):
            cohort = state.admitted.phases[phase].cohort
            assert sum(ledger.budget.spent(cohort).values()) == started
            assert sum(ledger.budget.reserved(cohort).values()) == 0


def test_a_repeated_question_gets_the_same_noise_again(make_home: Callable[..., SiteHome]) -> None:
    home = make_home()
    first = SiteAgent(home).train(make_task())
    before = kinds(home)
    again = SiteAgent(home).train(make_task())
    assert kinds(home) == before
    assert all(torch.equal(first.delta[name], again.delta[name]) for name in first.delta)


def test_another_model_for_a_stored_round_gets_the_old_answer(
    make_home: Callable[..., SiteHome],
) -> None:
    site = SiteAgent(make_home())
    first = site.train(make_task())
    task = make_task()
    moved = Task(JOB, 1, {k: v + 1 if v.is_floating_point() else v for k, v in task.state.items()})
    assert site.train(moved).model_sha256 == first.model_sha256


class Killed(BaseException):
    """Ends the work as a power cut would."""


def test_lost_work_costs_a_spare_round_and_then_no_more(
    make_home: Callable[..., SiteHome], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = make_home()
    real = agent_module.train_round

    def killed(*_: object, **__: object) -> None:
        raise Killed

    monkeypatch.setattr(agent_module, "train_round", killed)
    with pytest.raises(Killed):
        SiteAgent(home).train(make_task())
    monkeypatch.setattr(agent_module, "train_round", real)
    SiteAgent(home).train(make_task())
    assert kinds(home) == ["admitted", "started", "started", "stored"]
    monkeypatch.setattr(agent_module, "train_round", killed)
    with pytest.raises(Killed):
        SiteAgent(home).train(make_task(number=2))
    with pytest.raises(JobRefused) as refusal:
        SiteAgent(home).train(make_task(number=2))
    assert refusal.value.code == "declined"
    with closing(home.open_ledger()) as ledger:
        cohort = ledger.budget.jobs[JOB.sha256].admitted.phases["train"].cohort
        assert sum(ledger.budget.spent(cohort).values()) == 3


def test_the_round_is_charged_before_its_first_gradient(
    make_home: Callable[..., SiteHome], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = make_home()
    seen: list[list[str]] = []
    real = agent_module.train_round

    def watched(*args: Any, **options: Any) -> Any:
        seen.append(kinds(home))
        return real(*args, **options)

    monkeypatch.setattr(agent_module, "train_round", watched)
    SiteAgent(home).train(make_task())
    assert seen == [["admitted", "started"]]


@pytest.mark.parametrize(
    ("job", "code"),
    [
        (JOB.model_copy(update={"privacy": None}), "privacy-missing"),
        (JOB.model_copy(update={"coordinator": "stranger"}), "coordinator"),
        (JOB.model_copy(update={"resources": ResourceSpec(device_hours=1000)}), "device-hours"),
    ],
)
def test_a_broken_rule_is_refused_before_the_store_is_opened(
    job: JobSpec, code: str, make_home: Callable[..., SiteHome], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = make_home()

    def opened(*_: object) -> None:
        raise AssertionError("the store was opened")

    monkeypatch.setattr(SiteStore, "open", opened)
    with pytest.raises(JobRefused) as refusal:
        SiteAgent(home).train(make_task(job))
    assert refusal.value.code == code
    (entry,) = entries(home)
    assert isinstance(entry, Refused)
    assert (entry.code, entry.job) == (code, job.sha256)


def test_every_reason_that_depends_on_data_reads_declined(
    make_home: Callable[..., SiteHome], make_site: Callable[..., Path]
) -> None:
    nobody = make_home(make_site("empty", 4, fractions=SplitFractions(0, 0.5, 0.5)))
    unasked = make_home(make_site("unasked"), cohort={"require_consent": True})
    budget = {"epsilon": 0.9, "delta": 1e-5}
    poor = make_home(make_site("poor"), budget=budget, max_epsilon_per_job=1e3)
    codes = set()
    for home in (nobody, unasked, poor):
        with pytest.raises(JobRefused) as refusal:
            SiteAgent(home).train(make_task())
        codes.add(refusal.value.code)
    assert codes == {"declined"}
    assert [entry.rule for home in (nobody, unasked, poor) for entry in entries(home)] == [
        "cohort",
        "cohort",
        "budget",
    ]


def test_that_all_patients_withdrew_does_not_show(make_home: Callable[..., SiteHome]) -> None:
    home = make_home()
    SiteAgent(home).train(make_task())
    with home.open_store() as store, closing(home.open_ledger()) as ledger:
        for patient in store.patients("train"):
            ledger.withdraw(patient)
            store.withdraw(patient)
        assert store.scans("train") == []
    update = SiteAgent(home).train(make_task(number=2))
    assert any(bool(delta.any()) for delta in update.delta.values())


@pytest.mark.parametrize(("phase", "number"), [("train", 3), ("evaluate", 1)])
def test_a_round_that_the_job_does_not_have_is_refused(
    phase: str, number: int, make_home: Callable[..., SiteHome]
) -> None:
    site = SiteAgent(make_home())
    with pytest.raises(JobRefused) as refusal:
        getattr(site, phase)(make_task(number=number))
    assert refusal.value.code == "malformed"


def test_a_site_that_joined_works_for_signed_jobs_alone(
    make_home: Callable[..., SiteHome], tmp_path: Path
) -> None:
    """Also not for one that was signed and then weakened; the refusal goes into the ledger."""
    home, key = make_home(), SiteKey.create(tmp_path / "coordinator.pem")
    federation = "f0" * 32
    now = datetime.now(UTC)
    site = SiteAgent(home, pinned=(federation, key.public_key))
    period = (now - timedelta(hours=1), now + timedelta(hours=1))
    signed = JobAuthorisation.sign(JOB, federation, period, key)
    task = make_task()
    weaker = JOB.model_copy(update={"rounds": 1})
    for job, authorisation in ((JOB, None), (weaker, signed)):
        with pytest.raises(JobRefused) as refusal:
            site.train(Task(job, 1, task.state, authorisation))
        assert refusal.value.code == "signature"
    assert kinds(home) == ["refused", "refused"]
    # The way through Flower's message keeps the signature.
    answer = site.train(Task.unpack(Task(JOB, 1, task.state, signed).pack()))
    assert answer.round == 1


@pytest.mark.parametrize("engine", ["hooks", "functorch"])
def test_an_engine_that_is_not_exact_is_refused_and_costs_nothing(
    engine: str, make_home: Callable[..., SiteHome]
) -> None:
    home = make_home()
    job = JOB.model_copy(update={"privacy": PRIVACY.model_copy(update={"engine": engine})})
    with pytest.raises(JobRefused) as refusal:
        SiteAgent(home).train(make_task(job))
    assert refusal.value.code == "engine"
    assert kinds(home) == ["refused"]


def test_unusable_weights_cost_nothing(make_home: Callable[..., SiteHome]) -> None:
    home = make_home()
    task = make_task()
    state = dict(task.state)
    name = next(key for key, value in state.items() if value.is_floating_point())
    state[name] = torch.full_like(state[name], float("nan"))
    without = {key: value for key, value in task.state.items() if key != name}
    for wrong in (state, without):
        with pytest.raises(JobRefused) as refusal:
            SiteAgent(home).train(Task(JOB, 1, wrong))
        assert refusal.value.code == "model"
    assert kinds(home) == ["refused", "refused"]


def test_used_up_device_hours_end_a_job(make_home: Callable[..., SiteHome]) -> None:
    home = make_home()
    job = JOB.model_copy(update={"resources": ResourceSpec(device_hours=1e-9)})
    site = SiteAgent(home)
    site.train(make_task(job))
    with pytest.raises(JobRefused) as refusal:
        site.train(make_task(job, number=2))
    assert refusal.value.code == "device-hours"


def test_scores_leave_as_noised_totals_and_only_if_listed(
    make_home: Callable[..., SiteHome], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = make_home(evaluation={"metrics": ["ssim"]})
    evaluation = EvaluationSpec(
        noise_multiplier=4.0, cohort_size=2, metrics=("psnr", "ssim"), histogram_bins=2
    )
    privacy = PRIVACY.model_copy(update={"evaluation": evaluation})

    def totals(name: str, draw: float) -> dict[str, list[float]]:
        monkeypatch.setattr(evaluation_module, "gaussian", lambda count: np.full(count, draw))
        job = JOB.model_copy(update={"name": name, "rounds": 1, "privacy": privacy})
        scores = SiteAgent(home).evaluate(make_task(job))
        assert scores.totals.keys() == totals_layout(job).keys()
        return {name: total.tolist() for name, total in scores.totals.items()}

    plain, noised = totals("plain", 0.0), totals("noised", 0.05)
    patients = plain["ssim/patients"][0]
    assert patients >= 1
    assert 0 < plain["ssim/sum"][0] <= patients
    assert sum(plain["ssim/histogram"]) == patients
    for kind, values in plain.items():
        if kind.startswith("psnr/"):
            assert values == [0.0] * len(values)
        # Two metrics with sum, number and histogram: sensitivity sqrt(6).
        assert noised[kind] == pytest.approx([v + 4.0 * 0.05 * math.sqrt(6) for v in values])


def test_scores_that_may_not_leave_are_not_computed(make_home: Callable[..., SiteHome]) -> None:
    home = make_home(evaluation={"metrics": ["ssim"]})
    with pytest.raises(JobRefused) as refusal:
        SiteAgent(home).evaluate(make_task(number=2))
    assert refusal.value.code == "evaluation-noise"
    assert kinds(home) == ["refused"]


def test_scores_without_noise_leave_in_a_sum_and_where_the_policy_allows(
    make_home: Callable[..., SiteHome], make_site: Callable[..., Path]
) -> None:
    evaluation = EvaluationSpec(noise_multiplier=None, cohort_size=2)
    privacy = PRIVACY.model_copy(update={"evaluation": evaluation})
    plain = JOB.model_copy(update={"privacy": privacy, "rounds": 1})
    summed = plain.model_copy(update={"aggregation": "secure_sum"})
    secure = {"aggregation": ["secure_sum"], "minimum_sites": 3}
    allowed = {"evaluation": {"allow_unnoised": True}}
    for name, rules, job in [
        ("east", secure, summed),
        ("west", allowed, plain),
    ]:
        with pytest.raises(JobRefused) as refusal:
            SiteAgent(make_home(make_site(name), **rules)).noised_scores(make_task(job))
        assert refusal.value.code == "evaluation-noise"
    open_minded = SiteAgent(make_home(make_site("south"), **secure, **allowed))
    first = open_minded.noised_scores(make_task(summed))
    other = summed.model_copy(update={"name": "other"})
    assert open_minded.noised_scores(make_task(other)).totals == first.totals


def test_a_damaged_scan_does_not_show(make_home: Callable[..., SiteHome]) -> None:
    home = make_home()
    with home.open_store() as store:
        for record in store.scans("train"):
            record.path.write_bytes(b"damaged")
    update = SiteAgent(home).train(make_task())
    assert all(bool(torch.isfinite(delta).all()) for delta in update.delta.values())
    assert any(bool(delta.abs().sum() > 0) for delta in update.delta.values())


def test_two_processes_of_one_site_train_one_round(make_home: Callable[..., SiteHome]) -> None:
    home = make_home(processes=2)
    update = SiteAgent(home).train(make_task())
    assert sorted(update.delta) == trainable_names(JOB.model, build_model(JOB.model), "adapters")
    assert kinds(home) == ["admitted", "started", "stored"]
    assert not list(home.policy.ledger.folder.glob(".round-*"))


def test_quiet_hours_are_the_sites_own(make_home: Callable[..., SiteHome]) -> None:
    now = datetime.now(UTC).astimezone()
    quiet = f"{now:%H}:00-{(now.hour + 2) % 24:02d}:00"
    with pytest.raises(JobRefused) as refusal:
        SiteAgent(make_home(quiet_hours=[quiet])).train(make_task())
    assert refusal.value.code == "quiet-hours"


def test_two_jobs_at_once_cannot_share_one_budget(make_home: Callable[..., SiteHome]) -> None:
    home = make_home()
    with closing(home.open_ledger()) as ledger:
        limit, order = ledger.limit_rdp, ledger.budget.opened.order
    assert limit > 0
    assert order >= 2
    outcomes: list[str] = []

    def run(job: JobSpec) -> None:
        try:
            SiteAgent(home).train(make_task(job))
            outcomes.append("trained")
        except JobRefused as refusal:
            outcomes.append(refusal.code)

    # Each job alone takes more than half of the budget.
    privacy = PRIVACY.model_copy(update={"noise_multiplier": 1.2})
    jobs = [JOB.model_copy(update={"name": name, "privacy": privacy}) for name in ("one", "two")]
    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["declined", "trained"]
