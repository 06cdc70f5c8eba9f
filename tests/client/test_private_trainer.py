"""Private training of a site: what moves, what never depends on data, and what is never seeded."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fedcmr_client.dataset import load_image
from fedcmr_client.objectives import ReconstructionObjective
from fedcmr_client.private_round import train_round
from fedcmr_client.private_trainer import PrivateTrainer, gradient_engine
from fedcmr_client.site_home import SiteHome
from fedcmr_client.store.site_store import ScanRecord, SiteStore
from fedcmr_client.trainer import ReconstructionLoss, draw_sampling
from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.federation.messages import Task
from fedcmr_shared.models.cardiomm import CardioMM
from fedcmr_shared.models.registry import build_model
from fedcmr_shared.privacy import distributed
from fedcmr_shared.privacy import step as step_module
from fedcmr_shared.privacy.mechanism import Mechanism
from fedcmr_shared.privacy.parts import trainable_names
from fedcmr_shared.schemas.job import JobSpec, ModelSpec, Part, SamplingSpec, TrainingSpec
from fedcmr_shared.schemas.privacy import PrivacySpec
from fedcmr_shared.text.encoders import CachedTextEncoder, load_text_encoder

ENCODER = CachedTextEncoder(load_text_encoder("hashed"))
PRIVACY = PrivacySpec(cohort_size=10, sampling_rate=0.5, noise_multiplier=1.0, clip_norm=0.1)


def make_job(part: Part = "adapters", **privacy: object) -> JobSpec:
    return JobSpec(
        rounds=1,
        model=ModelSpec(text_encoder="hashed", lora_rank=2 if part == "lora" else 0),
        sampling=SamplingSpec(accelerations=(4,), acs_lines=8),
        training=TrainingSpec(local_steps=4, part=part, optimiser="sgd", warmup_steps=0),
        privacy=PRIVACY.model_copy(update=privacy),
    )


@pytest.fixture
def records(make_site: Callable[..., Path]) -> list[ScanRecord]:
    with SiteStore.open(make_site()) as store:
        return store.scans("train")


def objective(job: JobSpec) -> ReconstructionObjective:
    return ReconstructionObjective(job, ENCODER)


def make_model(job: JobSpec) -> CardioMM:
    torch.manual_seed(0)
    model = build_model(job.model)
    assert isinstance(model, CardioMM)
    return model


def train(job: JobSpec, records: list[ScanRecord], steps: int = 1) -> dict[str, torch.Tensor]:
    """Return what changed, by parameter."""
    model = make_model(job)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    PrivateTrainer(model, job, records, objective(job), site="north").run(0, steps)
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


@pytest.mark.parametrize("part", ["full", "decoder", "adapters", "prompts", "lora"])
def test_exactly_the_jobs_part_moves(part: Part, records: list[ScanRecord]) -> None:
    job = make_job(part)
    changed = {name for name, delta in train(job, records).items() if bool(delta.any())}
    assert sorted(changed) == trainable_names(job.model, build_model(job.model), part)


def test_seeds_do_not_matter(records: list[ScanRecord]) -> None:
    runs = []
    for _ in range(2):
        random.seed(1)
        np.random.seed(1)  # the global generator is the one under test
        job = make_job()
        model = make_model(job)
        torch.manual_seed(1)
        PrivateTrainer(model, job, records, objective(job), site="north").run(0, 1)
        runs.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert not torch.equal(*runs)


def test_a_step_without_patients_is_noise_of_the_declared_size(
    records: list[ScanRecord],
) -> None:
    # Nobody is drawn at this rate, and the step is taken all the same.
    job = make_job("full", sampling_rate=1e-9, noise_multiplier=3.0, clip_norm=0.5)
    delta = torch.cat([d.flatten() for d in train(job, records).values() if bool(d.any())])
    assert job.privacy is not None
    expected = job.training.learning_rate * 3.0 * 0.5 / (1e-9 * 10)
    # Chi-square: 200,000 coordinates have a relative standard error of 0.16 %.
    assert float(delta.std()) == pytest.approx(expected, rel=0.01)
    assert abs(float(delta.mean())) < expected / 50


def test_a_cohort_of_nobody_gives_noise(records: list[ScanRecord]) -> None:
    # All patients of a running job may withdraw; that must not show.
    assert any(bool(delta.any()) for delta in train(make_job(), []).values())


def test_the_denominator_is_public(make_site: Callable[..., Path]) -> None:
    job = make_job()
    assert job.privacy is not None
    assert Mechanism.of(job.privacy, 4.0).expected_patients == 0.5 * 10 * 4
    # Two catalogues, one mechanism: nothing of a site's records enters it.
    for name, patients in (("few", 4), ("many", 9)):
        with SiteStore.open(make_site(name, patients)) as store:
            trainer = PrivateTrainer(
                make_model(job), job, store.scans("train"), objective(job), site=name
            )
        assert trainer.mechanism == Mechanism.of(job.privacy, 1.0)


def shared_noise_job(**privacy: object) -> JobSpec:
    document = make_job("full", **privacy).model_dump()
    document["training"] |= {"local_steps": 1}
    document["privacy"]["distributed"] = {"unseen_sites": 1}
    return JobSpec.model_validate(document | {"minimum_sites": 4})


def test_distributed_noise_gives_integers_of_one_share_and_moves_nothing(
    records: list[ScanRecord],
) -> None:
    # Nobody is drawn at this rate.
    job = shared_noise_job(sampling_rate=1e-9, noise_multiplier=3.0)
    model = make_model(job)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = PrivateTrainer(model, job, records, objective(job), site="north")
    sums = trainer.integers(1)
    assert list(sums) == trainable_names(job.model, model, "full")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        if name in sums:
            assert sums[name].shape == parameter.shape
            assert sums[name].dtype == torch.int64
    values = torch.cat([tensor.flatten() for tensor in sums.values()]).double()
    # Three of the four sites' shares make up 3 · 2^18 grid steps. 200,000 values: error .16 %.
    assert float(values.std()) == pytest.approx(3 * 2**18 / 3**0.5, rel=0.01)


def test_a_round_with_distributed_noise_returns_the_integers_of_the_drawn(
    make_home: Callable[..., SiteHome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "discrete_gaussian", lambda n, _: np.zeros(n, np.int64))
    job = shared_noise_job(sampling_rate=1.0, clip_norm=1e-6)
    model = make_model(job)
    home = make_home()
    with home.open_store() as store:
        records = store.scans("train")
    sums = train_round(Task(job, 1, model.state_dict()), model, records, home)
    patients = len({record.patient for record in records})
    values = torch.cat([tensor.flatten() for tensor in sums.values()])
    assert values.dtype == torch.int64
    assert 0.2 * 2**18 < float(values.double().norm()) <= patients * 2**18


def test_integers_and_steps_do_not_mix(records: list[ScanRecord]) -> None:
    job = shared_noise_job()
    trainer = PrivateTrainer(make_model(job), job, records, objective(job), site="north")
    with pytest.raises(ValueError, match="whole numbers"):
        trainer.run(0, 1)
    whole = make_job("full")
    trainer = PrivateTrainer(make_model(whole), whole, records, objective(whole), site="north")
    with pytest.raises(ConfigurationError, match=r"no privacy\.distributed"):
        trainer.integers(1)


def test_too_few_levels_for_the_model_are_found_before_training(
    records: list[ScanRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = shared_noise_job()
    monkeypatch.setattr("fedcmr_shared.privacy.mechanism._ARITHMETIC", 0.999)
    with pytest.raises(ConfigurationError, match=r"raise distributed\.levels"):
        gradient_engine(make_model(job), job, objective(job))


def test_training_lowers_the_loss_when_the_noise_allows(records: list[ScanRecord]) -> None:
    job = make_job("full", sampling_rate=1.0, noise_multiplier=1e-3, clip_norm=1.0, cohort_size=10)
    training = TrainingSpec(local_steps=12, learning_rate=2e-3, warmup_steps=2)
    job = job.model_copy(update={"training": training})
    model = make_model(job)
    generator = np.random.default_rng(0)
    items = [draw_sampling(load_image(record, 0, 0), job, generator) for record in records]
    loss = ReconstructionLoss(model, job, ENCODER, torch.device("cpu"))
    before = float(loss(items).mean().detach())
    PrivateTrainer(model, job, records, objective(job), site="north").run(0, 12)
    assert float(loss(items).mean().detach()) < 0.9 * before


def test_a_patient_contributes_at_most_k_images_under_m_masks(
    records: list[ScanRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    real = step_module.private_gradient

    def watched(engine, cohort, load, *rest, **options):  # type: ignore[no-untyped-def]  # a spy
        sizes.extend(len(load(patient)) for patient in cohort)
        return real(engine, cohort, load, *rest, **options)

    monkeypatch.setattr("fedcmr_client.private_trainer.private_gradient", watched)
    train(make_job(images_per_patient=50, augmentations=3), records)
    # Each patient of these records has one scan of two images.
    assert set(sizes) == {6}


def test_scans_too_small_for_the_sampling_count_as_zero(records: list[ScanRecord]) -> None:
    job = make_job("full", sampling_rate=1.0)
    job = job.model_copy(update={"sampling": SamplingSpec(accelerations=(4,), acs_lines=60)})
    assert all(bool(torch.isfinite(delta).all()) for delta in train(job, records).values())


def test_a_job_without_privacy_is_refused(records: list[ScanRecord]) -> None:
    job = make_job().model_copy(update={"privacy": None})
    with pytest.raises(ConfigurationError, match="declares no privacy"):
        PrivateTrainer(make_model(job), job, records, objective(job), site="north")
