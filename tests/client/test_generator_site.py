"""Generators at a site: what is trained, what is kept of the patients, and what the gate lets out."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from energy_parts import CIRCUMSTANCES
from torch import Tensor, nn

from fedcmr_client import copy_gate
from fedcmr_client.agent import SiteAgent, _pack_scores, _read_scores
from fedcmr_client.cine import Heart, cine_of, heart_cycles, read_heart, read_phenotypes
from fedcmr_client.copy_gate import TRIES, CopyGate
from fedcmr_client.dataset import Cohort
from fedcmr_client.energy import Energy, EnergyLog, JobEnergy
from fedcmr_client.latents import LatentCache, Latents, erase_job, erase_patient
from fedcmr_client.objectives import checking_objective, training_objective
from fedcmr_client.private_round import train_round
from fedcmr_client.private_trainer import PrivateTrainer, gradient_engine
from fedcmr_client.site_home import SiteHome
from fedcmr_client.store.site_store import ScanRecord, SiteStore
from fedcmr_client.store.split import SplitFractions
from fedcmr_shared.errors import DataError, JobRefused, LedgerError
from fedcmr_shared.federation.messages import Scores, Task
from fedcmr_shared.metrics.memorisation import GateConfig, Outcome
from fedcmr_shared.models.clips import ClipGrid, clip_grid
from fedcmr_shared.models.copy_detector import CopyDetectorConfig
from fedcmr_shared.models.cpgg import CONFIGS, CPGG
from fedcmr_shared.models.phenotype_gaussian import MomentsConfig, contribution
from fedcmr_shared.models.registry import build_model
from fedcmr_shared.privacy.evaluation import energy_kwh, gate_totals, gates_passed
from fedcmr_shared.privacy.mechanism import Mechanism
from fedcmr_shared.privacy.parts import trainable_names
from fedcmr_shared.schemas.job import JobSpec, ModelSpec, Part, TrainingSpec
from fedcmr_shared.schemas.privacy import EvaluationSpec, PrivacySpec
from fedcmr_simulations.centres import TRAINING_CENTRES, simulate_centre

GATE = EvaluationSpec(noise_multiplier=None, metrics=("memorisation",))
JOB = JobSpec(
    name="hearts",
    rounds=2,
    model=ModelSpec(name="cpgg"),
    training=TrainingSpec(part="prompts", local_steps=1, optimiser="sgd", warmup_steps=0),
    privacy=PrivacySpec(
        cohort_size=10,
        sampling_rate=0.9,
        noise_multiplier=4.0,
        clip_norm=0.5,
        augmentations=2,
        spare_rounds=4,
        evaluation=GATE,
    ),
)
VECTORS = JOB.model_copy(
    update={
        "name": "vectors",
        "model": ModelSpec(name="phenotype-vae"),
        "training": JOB.training.model_copy(update={"part": "full"}),
        "privacy": JOB.privacy.model_copy(update={"evaluation": EvaluationSpec(rounds="none")}),
    }
)


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six patients of a virtual hospital, each with one beating slice."""
    root = tmp_path_factory.mktemp("clips") / "alder"
    thirds = SplitFractions(0.5, 0.34, 0.16)
    simulate_centre(root, TRAINING_CENTRES[0], 6, 3, "clip", split=thirds).close()
    return root


@pytest.fixture
def home(clips: Path, make_home: Callable[..., SiteHome]) -> SiteHome:
    return open_home(clips, make_home)


def open_home(store: Path, make_home: Callable[..., SiteHome], **changes: Any) -> SiteHome:
    rules: dict[str, Any] = {
        "models": ["cpgg", "phenotype-vae", "phenotype-gaussian"],
        "aggregation": ["secure_sum"],
        "minimum_sites": 3,
        "max_epsilon_per_job": 100.0,
        "budget": {"epsilon": 100.0},
        "evaluation": {"metrics": ["memorisation"]},
        "roster": str(store / "roster.yaml"),
    }
    return make_home(store, **(rules | changes))


def task(job: JobSpec = JOB, number: int = 1) -> Task:
    torch.manual_seed(job.seed)
    return Task(job, number, build_model(job.model).state_dict())


def trained(job: JobSpec) -> nn.Module:
    """A network whose weights are off their first values, of which many are zero."""
    torch.manual_seed(1)
    model = build_model(job.model).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def records(store: Path, part: Any = "train") -> list[ScanRecord]:
    with SiteStore.open(store) as opened:
        return opened.scans(part)


def kept(home: SiteHome) -> list[Path]:
    folder = home.policy.ledger.folder / "latents"
    return sorted(path for path in folder.rglob("*") if path.is_file())


def never() -> Latents:
    """Stand for a computation where none is needed."""
    pytest.fail("the latents lie there already")


# What a patient is


def test_a_heart_is_a_clip_and_the_phenotypes_of_the_report(clips: Path) -> None:
    grid = clip_grid(CONFIGS["tiny"])
    scan = records(clips)[0]
    heart = read_heart([scan], grid)
    assert heart.clip.shape == (grid.frames, grid.rows, grid.columns)
    assert np.abs(heart.clip).max() <= 1
    assert np.ptp(heart.clip) > 1.5
    vector = heart.vector(("LVEDV", "LAV max", "LVEF"))
    assert vector[0] > 50
    assert np.isnan(vector[1])
    assert 5 < vector[2] < 90


def test_frames_lie_where_their_times_say(clips: Path) -> None:
    metadata = records(clips)[0].metadata
    cycles = heart_cycles(metadata)
    np.testing.assert_allclose(cycles, np.arange(12) / 12, atol=1e-9)
    untimed = metadata.model_copy(update={"frame_times_ms": None})
    assert heart_cycles(untimed) == [frame / 12 for frame in range(12)]


def test_a_patient_without_a_cine_is_told_so(clips: Path) -> None:
    scan = records(clips)[0]
    for change in ({"modality": "LGE"}, {"view": "4-chamber"}, {"pixel_spacing_mm": None}):
        metadata = scan.metadata.model_copy(update=change)
        other = ScanRecord(
            scan.scan_id, scan.patient, scan.path, metadata, "train", scan.digest, scan.has_truth
        )
        with pytest.raises(DataError, match="no short-axis cine"):
            cine_of([other])
        assert cine_of([other, scan]) is scan


# Training


def test_a_round_moves_the_jobs_part_alone(home: SiteHome) -> None:
    asked = task()
    update = SiteAgent(home).noised_update(asked)
    assert sorted(update.delta) == trainable_names(JOB.model, build_model(JOB.model), "prompts")
    assert any(bool(delta.abs().sum() > 0) for delta in update.delta.values())
    assert update.loss is None


@pytest.mark.parametrize(
    "model",
    [ModelSpec(name="phenotype-vae"), ModelSpec(name="phenotype-gaussian", size="paper")],
    ids=lambda spec: spec.name,
)
def test_phenotypes_are_trained_by_the_same_way(model: ModelSpec, home: SiteHome) -> None:
    job = VECTORS.model_copy(update={"model": model})
    update = SiteAgent(home).noised_update(task(job))
    assert sorted(update.delta) == trainable_names(model, build_model(model), "full")
    assert kept(home) == []


def test_a_round_of_moments_is_the_mean_of_the_patients(
    home: SiteHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its noise, which is another test's, the sum is that of the contributions."""
    monkeypatch.setattr("fedcmr_shared.privacy.mechanism.gaussian", lambda size: np.zeros(size))
    assert VECTORS.privacy is not None
    job = VECTORS.model_copy(
        update={
            "model": ModelSpec(name="phenotype-gaussian", size="paper"),
            "training": VECTORS.training.model_copy(update={"learning_rate": 1.0}),
            "privacy": VECTORS.privacy.model_copy(update={"sampling_rate": 1.0, "clip_norm": 1.0}),
        }
    )
    update = SiteAgent(home).noised_update(task(job))
    config = MomentsConfig()
    names = config.standardisation.names
    rows = [
        torch.tensor([read_phenotypes([scan]).get(name, np.nan) for name in names])
        for scan in records(home.policy.store)
    ]
    expected = torch.stack([contribution(row, config) for row in rows]).sum(0) / 10
    torch.testing.assert_close(update.delta["moments"].double(), expected, atol=1e-6, rtol=1e-4)


def test_noise_may_be_shared_where_the_policy_lets_it(
    clips: Path, make_home: Callable[..., SiteHome]
) -> None:
    document = JOB.model_dump()
    document["privacy"]["distributed"] = {"unseen_sites": 1}
    job = JobSpec.model_validate(document | {"minimum_sites": 4})
    home = open_home(clips, make_home, allow_distributed_noise=True)
    update = SiteAgent(home).noised_update(task(job))
    assert {delta.dtype for delta in update.delta.values()} == {torch.int64}
    assert any(bool(delta.any()) for delta in update.delta.values())


@pytest.mark.parametrize("part", ["prompts", "adapters", "decoder", "lora"])
def test_a_patient_moves_the_sum_by_the_clip_norm_at_most(part: Part, home: SiteHome) -> None:
    rank = 2 if part == "lora" else 0
    job = JOB.model_copy(
        update={
            "model": ModelSpec(name="cpgg", lora_rank=rank),
            "training": JOB.training.model_copy(update={"part": part}),
        }
    )
    model = trained(job)
    objective = training_objective(model, job, home, "cpu")
    engine = gradient_engine(model, job, objective)
    cohort = Cohort(records(home.policy.store))
    examples = [
        objective.draw(cohort, patient, np.random.default_rng(0)) for patient in cohort.patients
    ]
    mechanism = Mechanism(1e-4, 1.0, 1.0)
    total = engine.clipped_sum(examples, mechanism)
    assert total.clipped == total.patients == 3
    for gone in range(3):
        others = examples[:gone] + examples[gone + 1 :]
        move = (total.vector - engine.clipped_sum(others, mechanism).vector).norm()
        assert float(move) == pytest.approx(1e-4, rel=1e-6)


def test_a_patient_counts_once_whatever_the_number_of_scans(home: SiteHome) -> None:
    first, second, _ = records(home.policy.store)
    cohort = Cohort([first, replace(second, patient=first.patient)])
    objective = training_objective(build_model(JOB.model), JOB, home, "cpu")
    assert JOB.privacy is not None
    drawn = objective.draw(cohort, first.patient, np.random.default_rng(0))
    assert len(drawn) == JOB.privacy.augmentations
    assert len(kept(home)) == 1


def test_a_patient_of_no_use_contributes_zero_and_fails_no_round(
    home: SiteHome, caplog: pytest.LogCaptureFixture
) -> None:
    scans = [
        replace(scan, metadata=scan.metadata.model_copy(update={"modality": "LGE"}))
        for scan in records(home.policy.store)
    ]
    assert JOB.privacy is not None
    everybody = JOB.model_copy(
        update={"privacy": JOB.privacy.model_copy(update={"sampling_rate": 1.0})}
    )
    asked = task(everybody)
    update = train_round(asked, build_model(everybody.model), scans, home)
    assert all(bool(torch.isfinite(delta).all()) for delta in update.values())
    assert any(bool(delta.any()) for delta in update.values())  # noise
    assert caplog.text.count("a drawn patient contributes nothing") == 3


def test_an_objective_for_checks_trains_nobody(home: SiteHome) -> None:
    """It must not end as a round of noise alone, in which all patients count as zero."""
    assert JOB.privacy is not None
    everybody = JOB.model_copy(
        update={"privacy": JOB.privacy.model_copy(update={"sampling_rate": 1.0})}
    )
    model = build_model(JOB.model)
    scans = records(home.policy.store)
    objective = checking_objective(model, everybody)
    trainer = PrivateTrainer(model, everybody, scans, objective, site="alder")
    with pytest.raises(ValueError, match="checks gradients only"):
        trainer.run(0, 1)


# Opacus switches autocast on for all types, and the check of an engine works in float64.
@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
@pytest.mark.parametrize("engine", ["hooks", "functorch"])
def test_batched_engines_agree_with_one_patient_at_a_time(engine: str, home: SiteHome) -> None:
    assert JOB.privacy is not None
    sums = []
    for name in ("backward", engine):
        job = JOB.model_copy(update={"privacy": JOB.privacy.model_copy(update={"engine": name})})
        model = trained(job)
        objective = training_objective(model, job, home, "cpu")
        summing = gradient_engine(model, job, objective)  # which checks itself without patients
        cohort = Cohort(records(home.policy.store))
        examples = [
            objective.draw(cohort, patient, np.random.default_rng(0)) for patient in cohort.patients
        ]
        sums.append(summing.clipped_sum(examples, Mechanism(0.5, 1.0, 1.0)).vector)
    torch.testing.assert_close(sums[1], sums[0], rtol=1e-3, atol=1e-6)


# What is kept of patients


def test_latents_are_sealed_and_read_again(home: SiteHome, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, scans = home.latents(JOB), records(home.policy.store)
    model = build_model(JOB.model)
    objective = training_objective(model, JOB, home, "cpu")
    cohort, patient = Cohort(scans), scans[0].patient
    objective.draw(cohort, patient, np.random.default_rng(0))
    (path,) = kept(home)
    assert path.name.startswith(f"{patient}-")
    assert path.stat().st_mode & 0o077 == 0
    content = path.read_bytes()
    assert b"log_variance" not in content  # as a plain file of tensors would say
    monkeypatch.setattr("fedcmr_client.objectives.generation.read_heart", None)
    objective.draw(cohort, patient, np.random.default_rng(1))  # without opening the scan
    found = cache.latents(patient, scans[:1], objective._autoencoder_sha256, never)
    stranger = LatentCache(cache.folder, cache.job, bytes(32))
    other = Latents(*(tensor + 1 for tensor in found))
    got = stranger.latents(patient, scans[:1], objective._autoencoder_sha256, lambda: other)
    assert torch.equal(got.mean, other.mean)  # none of the file, which it cannot open


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "one bit": lambda content: content[:40] + bytes([content[40] ^ 1]) + content[41:],
    "cut off": lambda content: content[:-1],
    "zeros": lambda content: bytes(len(content)),
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_latents_are_computed_and_written_anew(
    damage: Callable[[bytes], bytes], home: SiteHome, caplog: pytest.LogCaptureFixture
) -> None:
    """A round that failed for them would have cost its privacy, and the next one, too."""
    cache, scan = home.latents(JOB), records(home.policy.store)[0]
    right = Latents(torch.randn(2, 3), torch.randn(2, 3), torch.tensor([60.0, float("nan")]))
    cache.latents(scan.patient, [scan], "a" * 64, lambda: right)
    (path,) = kept(home)
    path.write_bytes(damage(path.read_bytes()))
    computed = cache.latents(scan.patient, [scan], "a" * 64, lambda: right)
    assert computed is right
    (warning,) = caplog.messages
    assert str(path) in warning
    assert "computed and written anew" in warning
    read = cache.latents(scan.patient, [scan], "a" * 64, never)
    for found, expected in zip(read, right, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert len(caplog.messages) == 1


def test_a_disk_that_fails_is_no_damage(home: SiteHome) -> None:
    cache, scan = home.latents(JOB), records(home.policy.store)[0]
    right = Latents(*torch.randn(3, 2))
    cache.latents(scan.patient, [scan], "a" * 64, lambda: right)
    (path,) = kept(home)
    path.unlink()
    path.mkdir()
    with pytest.raises(LedgerError, match=rf"{path.name}: cannot be read: Is a directory"):
        cache.latents(scan.patient, [scan], "a" * 64, never)
    path.rmdir()
    path.with_name(f".{path.name}.partial").mkdir()
    with pytest.raises(LedgerError, match=rf"{path.name}: cannot be written: Is a directory"):
        cache.latents(scan.patient, [scan], "a" * 64, lambda: right)


def test_another_scan_or_autoencoder_means_other_latents(home: SiteHome) -> None:
    torch.manual_seed(1)
    models = [build_model(JOB.model) for _ in range(2)]
    cohort = Cohort(records(home.policy.store))
    for model in models:
        objective = training_objective(model, JOB, home, "cpu")
        objective.draw(cohort, cohort.patients[0], np.random.default_rng(0))
    assert len(kept(home)) == 2


def test_latents_go_with_the_job_and_with_the_patient(
    clips: Path, tmp_path: Path, make_home: Callable[..., SiteHome]
) -> None:
    store = tmp_path / "sites" / "alder"
    shutil.copytree(clips, store)
    home = open_home(store, make_home)
    site = SiteAgent(home)
    given_up = LatentCache(home.policy.ledger.folder / "latents", "0" * 64, bytes(32))
    left = given_up.folder / given_up.job / "p-somebody-0.latents"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"of a job that never ended")
    assert JOB.privacy is not None
    everybody = JOB.model_copy(
        update={"privacy": JOB.privacy.model_copy(update={"sampling_rate": 1.0})}
    )
    site.noised_update(task(everybody))
    assert not left.exists()
    assert len(kept(home)) == 3
    patient = records(store)[0].patient
    with SiteStore.open(store) as opened, closing(home.open_ledger()) as ledger:
        ledger.withdraw(patient)
        opened.withdraw(patient)
    site.noised_update(task(everybody, 2))
    assert len(kept(home)) == 2
    assert not any(path.name.startswith(patient) for path in kept(home))
    site.noised_scores(task(everybody, 2))
    assert kept(home) == []
    assert not home.latents(everybody).folder.joinpath(everybody.sha256).exists()


def test_a_folder_that_cannot_be_read_is_named_and_one_that_is_gone_is_empty(
    home: SiteHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = home.latents(JOB)
    cache.erase_others(set())
    cache.keep_only(set())

    def denied(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(LedgerError, match=r"latents: cannot be read: Permission denied"):
        cache.erase_others(set())


def write_latents(home: SiteHome, job: str, patient: str) -> list[Path]:
    """Write a patient's file in the folder of a job, and one that was cut off."""
    folder = home.latents_folder / job
    folder.mkdir(parents=True, exist_ok=True)
    names = (f"{patient}-0.latents", f".{patient}-1.latents.partial")
    for name in names:
        (folder / name).write_bytes(b"sealed")
    return [folder / name for name in names]


def test_a_patient_is_erased_in_all_jobs_and_a_job_with_all_patients(home: SiteHome) -> None:
    erase_patient(home.latents_folder, "p-a")  # there is nothing yet
    erase_job(home.latents_folder, "1" * 64)
    for job in ("1" * 64, "2" * 64):
        write_latents(home, job, "p-a")
    others = write_latents(home, "1" * 64, "p-ab") + write_latents(home, "2" * 64, "p-b")
    erase_patient(home.latents_folder, "p-a")
    assert kept(home) == sorted(others)
    erase_job(home.latents_folder, "1" * 64)
    assert kept(home) == sorted(others[2:])
    assert not (home.latents_folder / ("1" * 64)).exists()


def test_a_file_that_cannot_be_erased_is_named_and_keeps_no_other(home: SiteHome) -> None:
    obstacle, partial = write_latents(home, "1" * 64, "p-a")
    obstacle.unlink()
    obstacle.mkdir()
    others = write_latents(home, "2" * 64, "p-a")
    with pytest.raises(LedgerError, match=rf"{obstacle}: cannot be erased"):
        erase_patient(home.latents_folder, "p-a")
    assert not any(path.exists() for path in (partial, *others))
    write_latents(home, "1" * 64, "p-b")
    with pytest.raises(LedgerError, match=rf"{obstacle}: cannot be erased"):
        erase_job(home.latents_folder, "1" * 64)
    assert kept(home) == []


def test_latents_that_stay_do_not_keep_the_last_answer(
    home: SiteHome, caplog: pytest.LogCaptureFixture
) -> None:
    site = SiteAgent(home)
    site.noised_update(task())
    obstacle = home.latents_folder / JOB.sha256 / "p-a-0.latents"
    obstacle.mkdir(parents=True)
    scores = site.noised_scores(task(number=2))
    (error,) = [each.getMessage() for each in caplog.records if each.levelname == "ERROR"]
    assert f"{obstacle}: cannot be erased" in error
    assert "remove that by hand" in error
    with closing(home.open_ledger()) as ledger:
        assert ledger.budget.jobs[JOB.sha256].closed == "finished"
    obstacle.rmdir()
    again = site.noised_scores(task(number=2))  # the stored one, and the rest is erased
    assert again.totals.keys() == scores.totals.keys()
    assert not obstacle.parent.exists()


# The gate


def test_too_few_patients_cannot_decide_and_say_nothing_else(
    home: SiteHome, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", "fedcmr.site"):
        scores = SiteAgent(home).noised_scores(task(number=2))
    assert gates_passed(scores.totals) == 0
    assert scores.totals.keys() == gate_totals("passed").keys()
    assert "cannot decide: 2 validation and 3 training patients" in caplog.text


@pytest.mark.parametrize("salted", [True, False])
def test_evidence_does_not_tell_the_bit(
    salted: bool, home: SiteHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log's hash of a result is no answer to who tries out both outcomes."""
    if not salted:
        monkeypatch.setattr("fedcmr_client.agent.token_hex", lambda size: "0" * 2 * size)
    scores = SiteAgent(home).noised_scores(task(number=2))
    with closing(home.open_ledger()) as ledger:
        logged = ledger.budget.jobs[JOB.sha256].stored["evaluate", 2].sha256
    outcomes: tuple[Outcome, ...] = ("passed", "failed")
    tried = [
        hashlib.sha256(
            _pack_scores(Scores(scores.site, 2, scores.model_sha256, gate_totals(outcome)))
        ).hexdigest()
        for outcome in outcomes
    ]
    assert tried[0] != tried[1]
    assert (logged in tried) != salted


def test_the_site_must_list_the_gate(clips: Path, make_home: Callable[..., SiteHome]) -> None:
    home = open_home(clips, make_home, evaluation={"metrics": ["psnr"], "allow_unnoised": True})
    with pytest.raises(JobRefused, match="does not list it") as refused:
        SiteAgent(home).noised_scores(task(number=2))
    assert refused.value.code == "evaluation-noise"


def test_one_sites_outcome_never_leaves_by_itself(
    clips: Path, make_home: Callable[..., SiteHome]
) -> None:
    home = open_home(clips, make_home, aggregation=["plain_with_local_dp"], minimum_sites=1)
    job = JOB.model_copy(update={"aggregation": "plain_with_local_dp"})
    with pytest.raises(JobRefused, match="needs secure aggregation") as refused:
        SiteAgent(home).evaluate(task(job, 2))
    assert refused.value.code == "evaluation-noise"


def test_a_generator_cannot_be_scored_like_a_reconstructor(home: SiteHome) -> None:
    assert JOB.privacy is not None
    scored = JOB.privacy.model_copy(update={"evaluation": EvaluationSpec()})
    job = JOB.model_copy(update={"privacy": scored})
    with pytest.raises(JobRefused, match="psnr is none of cpgg's") as refused:
        SiteAgent(home).noised_update(task(job))
    assert refused.value.code == "model"


def test_the_gate_starts_three_times_at_most(
    home: SiteHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = SiteAgent(home)

    def crash(*_: object) -> None:
        raise LedgerError("the disk is gone")

    monkeypatch.setattr(CopyGate, "outcome", crash)
    for _ in range(TRIES):
        with pytest.raises(LedgerError):
            site.noised_scores(task(number=2))
    with pytest.raises(JobRefused, match="3 times") as refused:
        site.noised_scores(task(number=2))
    assert refused.value.code == "declined"
    monkeypatch.undo()
    restarted = SiteAgent(SiteHome.open(home.path))
    with pytest.raises(JobRefused, match="3 times"):
        restarted.noised_scores(task(number=2))


@pytest.mark.parametrize(
    ("energy", "expected"),
    [
        ({"country": "DEU", "report_total": True}, 0.3),  # rounded up, and once
        ({"country": "DEU"}, 0.0),  # nothing leaves that the policy does not name
        (None, 0.0),
    ],
)
def test_energy_leaves_rounded_and_at_the_end(
    energy: dict[str, Any] | None,
    expected: float,
    clips: Path,
    make_home: Callable[..., SiteHome],
) -> None:
    assert JOB.privacy is not None
    asked = GATE.model_copy(update={"energy_total": True})
    job = JOB.model_copy(update={"privacy": JOB.privacy.model_copy(update={"evaluation": asked})})
    home = open_home(clips, make_home, energy=energy)
    spent = JobEnergy(measured=(joules(0.21),), unmeasured_pieces=0, unmeasured_seconds=0.0)
    EnergyLog.beside(home.policy.ledger.folder).add(job.sha256, spent)
    update = SiteAgent(home).noised_update(task(job))
    assert "energy/kwh" not in update.delta
    scores = SiteAgent(home).noised_scores(task(job, 2))
    assert energy_kwh(scores.totals) == expected


def test_energy_of_the_gate_itself_is_counted(
    clips: Path, make_home: Callable[..., SiteHome], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def metered(_: object, log: EnergyLog, name: str) -> Iterator[None]:
        yield
        log.add(name, JobEnergy(measured=(joules(0.21),)))

    monkeypatch.setattr("fedcmr_client.agent.metered", metered)
    assert JOB.privacy is not None
    asked = GATE.model_copy(update={"energy_total": True})
    job = JOB.model_copy(update={"privacy": JOB.privacy.model_copy(update={"evaluation": asked})})
    home = open_home(clips, make_home, energy={"country": "DEU", "report_total": True})
    scores = SiteAgent(home).noised_scores(task(job, 2))
    assert energy_kwh(scores.totals) == 0.3
    with closing(home.open_ledger()) as ledger:
        stored = ledger.stored(job.sha256, "evaluate", 2)
    assert stored is not None
    again = SiteAgent(home).noised_scores(task(job, 2))  # what is stored, which no work changes
    assert energy_kwh(_read_scores(stored).totals) == energy_kwh(again.totals) == 0.3


def test_a_damaged_figure_of_energy_loses_no_outcome(
    clips: Path, make_home: Callable[..., SiteHome]
) -> None:
    assert JOB.privacy is not None
    asked = GATE.model_copy(update={"energy_total": True})
    job = JOB.model_copy(update={"privacy": JOB.privacy.model_copy(update={"evaluation": asked})})
    home = open_home(clips, make_home, energy={"country": "DEU", "report_total": True})
    folder = EnergyLog.beside(home.policy.ledger.folder).folder
    folder.mkdir()
    (folder / f"{job.sha256}.json").write_text("{")
    scores = SiteAgent(home).noised_scores(task(job, 2))
    assert gates_passed(scores.totals) == 0
    assert energy_kwh(scores.totals) == 0.1  # as of work without a figure


def joules(kwh: float) -> Energy:
    return Energy(
        circumstances=CIRCUMSTANCES,
        seconds=60.0,
        cpu_seconds=60.0,
        processor_kwh=kwh,
        gpu_kwh=0.0,
        memory_kwh=0.0,
        kg_co2e=0.381 * kwh,
    )


class Copier(CPGG):
    """Draws the clips that it is given, one after another."""

    def __init__(self, source: Tensor) -> None:
        super().__init__(CONFIGS["tiny"])
        self._source, self._next = source, 0

    def sample(self, phenotypes: Tensor, *_: object) -> Tensor:
        self._next += len(phenotypes)
        return self._source[self._next - len(phenotypes) : self._next]


def rings(count: int, grid: ClipGrid, seed: int) -> Tensor:
    """Beating rings, no two alike: size, place, beat, brightness."""
    random = torch.Generator().manual_seed(seed)
    draws = torch.rand(count, 8, generator=random)
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, grid.rows), torch.linspace(-1, 1, grid.columns), indexing="ij"
    )
    beat = torch.sin(torch.pi * torch.arange(grid.frames) / grid.frames) ** 2
    clips = []
    for size, up, left, depth, wall, tilt, shade, second in draws.tolist():
        place = (y + 0.5 * up - 0.25) ** 2 * (1 + tilt) + (x + 0.5 * left - 0.25) ** 2
        radius = (0.2 + 0.4 * size) * (1 - (0.1 + 0.4 * depth) * beat)[:, None, None]
        distance = place.sqrt()
        ring = torch.sigmoid(30 * (radius - distance)) - 0.6 * torch.sigmoid(
            30 * (radius + 0.1 + 0.2 * wall - distance)
        )
        blob = torch.exp(-((y - second) ** 2 + (x - 0.7) ** 2) * 20) * shade
        clips.append((ring + blob + 0.6).clamp(0, 1) * 2 - 1)
    return torch.stack(clips)[:, None]


def gate_of_sixty(
    source: Callable[[Tensor], Tensor], home: SiteHome, monkeypatch: pytest.MonkeyPatch
) -> Outcome:
    """Return the gate's outcome on 60 and 60 patients; ``source`` makes samples of the first."""
    grid = clip_grid(CONFIGS["tiny"])
    known, others = (rings(60, grid, seed) for seed in (1, 2))
    hearts = {f"p-{part}{n:02d}": c[0].numpy() for part, cs in (("a", known), ("b", others))
              for n, c in enumerate(cs)}  # fmt: skip

    def heart(scans: Sequence[ScanRecord], _: ClipGrid) -> Heart:
        return Heart(hearts[scans[0].patient], {"LVEF": 60.0})

    monkeypatch.setattr(copy_gate, "read_heart", heart)
    scan = records(home.policy.store)[0]
    training, validation = (
        [
            ScanRecord(name, name, Path(), scan.metadata, "train", "", False)
            for name in hearts
            if name.startswith(f"p-{part}")
        ]
        for part in "ab"
    )
    # Rings are much alike when they are turned, for a detector that is trained so briefly.
    quick = GateConfig(CopyDetectorConfig(width=8, steps=60, batch=16), least_found=0.2)
    gate = CopyGate(Copier(source(known)), "tiny", config=quick)
    return gate.outcome(training, validation)


@pytest.mark.parametrize(("copying", "expected"), [(True, "failed"), (False, "passed")])
def test_copies_fail_the_gate_and_new_hearts_pass(
    copying: bool,
    expected: str,
    home: SiteHome,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fresh = rings(60, clip_grid(CONFIGS["tiny"]), 3)
    with caplog.at_level("INFO", "fedcmr.site"):
        outcome = gate_of_sixty(lambda known: known if copying else fresh, home, monkeypatch)
    assert outcome == expected
    assert f"memorisation gate: {expected}" in caplog.text
    nearer = "100 % of the synthetic clips are nearer to a training patient"
    assert (nearer in caplog.text) == copying


def test_samples_that_are_no_numbers_fail_the_gate_and_not_the_site(
    home: SiteHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether there are any may depend on patients' phenotypes: it must not show as a refusal."""

    def broken(known: Tensor) -> Tensor:
        return known.clone().index_fill_(0, torch.tensor([7]), float("nan"))

    assert gate_of_sixty(broken, home, monkeypatch) == "failed"
