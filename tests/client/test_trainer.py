"""Local training: losses, determinism, schedules and what the samplers draw."""

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from fedcmr_client.dataset import Cohort, all_images, load_image, undersample
from fedcmr_client.store.scan_file import ScanFile
from fedcmr_client.store.site_store import ScanRecord, SiteStore
from fedcmr_client.trainer import Trainer, collate, l1_loss, ssim_loss
from fedcmr_shared.errors import DataError, FederationError
from fedcmr_shared.kspace.coils import rss
from fedcmr_shared.kspace.fourier import ifft2c
from fedcmr_shared.kspace.masks import Sampling
from fedcmr_shared.models.cardiomm import CardioMM
from fedcmr_shared.models.registry import build_model
from fedcmr_shared.schemas.job import JobSpec, ModelSpec, SamplingSpec, TrainingSpec
from fedcmr_shared.text.encoders import load_text_encoder

ENCODER = load_text_encoder("hashed")
JOB = JobSpec(
    model=ModelSpec(text_encoder="hashed"),
    sampling=SamplingSpec(acs_lines=8),
    training=TrainingSpec(local_steps=4),
)


@pytest.fixture
def records(make_site: Callable[..., Path]) -> list[ScanRecord]:
    with SiteStore.open(make_site()) as store:
        return store.scans()


def trainer(records: list[ScanRecord], job: JobSpec = JOB) -> tuple[Trainer, CardioMM]:
    torch.manual_seed(0)
    model = build_model(job.model)
    assert isinstance(model, CardioMM)
    return Trainer(model, job, records, ENCODER, site="north"), model


def test_same_seed_gives_same_weights(records: list[ScanRecord]) -> None:
    results = []
    for _ in range(2):
        run, model = trainer(records)
        loss = run.run(0, 3)
        results.append((loss, model.state_dict()))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][k], results[1][1][k]) for k in results[0][1])


def test_seed_and_step_change_what_is_drawn(records: list[ScanRecord]) -> None:
    losses = {trainer(records, JOB.model_copy(update={"seed": s}))[0].run(0, 2) for s in (0, 1)}
    losses.add(trainer(records)[0].run(2, 2))
    assert len(losses) == 3


def test_training_lowers_the_loss(records: list[ScanRecord]) -> None:
    training = TrainingSpec(local_steps=40, learning_rate=4e-3)
    run, _ = trainer(records, JOB.model_copy(update={"training": training, "rounds": 1}))
    first = run.run(0, 8)
    run.run(8, 24)
    assert run.run(32, 8) < 0.8 * first


def test_mixed_shapes_share_a_step(
    records: list[ScanRecord], make_site: Callable[..., Path]
) -> None:
    with SiteStore.open(make_site("wide", 4, coils=5, phase=40, readout=36)) as store:
        mixed = [*records, *store.scans()]
    training = TrainingSpec(local_steps=2, batch_size=6)
    run, _ = trainer(mixed, JOB.model_copy(update={"training": training}))
    assert run.run(0, 2) > 0
    sampling = Sampling("uniform", 4.0, 8)
    items = [undersample(load_image(record, 0, 0), sampling, 0) for record in mixed]
    batches = collate(items, ENCODER)
    assert sorted(batch.measured.shape for batch in batches) == [
        (4, 5, 40, 36),
        (len(records), 3, 32, 32),
    ]


def test_learning_rate_decays_from_full_to_final() -> None:
    job = JobSpec(rounds=2, training=TrainingSpec(local_steps=50, learning_rate=1e-2))
    rates = [job.learning_rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(1e-2)
    assert rates[-1] == pytest.approx(1e-3)
    assert all(a >= b for a, b in pairwise(rates))


def test_a_new_optimiser_starts_with_small_steps(records: list[ScanRecord]) -> None:
    def first_change(warmup: int) -> float:
        training = TrainingSpec(optimiser="sgd", warmup_steps=warmup)
        run, model = trainer(records, JOB.model_copy(update={"training": training}))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        run.run(0, 1)
        changes = [(p - before[name]).detach().norm() for name, p in model.named_parameters()]
        return float(torch.stack(changes).norm())

    assert first_change(9) == pytest.approx(first_change(0) / 10, rel=1e-3)


def test_ssim_loss_is_one_minus_skimage() -> None:
    generator = np.random.default_rng(0)
    target, image = generator.random((2, 24, 31))
    expected = 1 - structural_similarity(target, image, data_range=target.max())
    loss = ssim_loss(torch.from_numpy(image)[None], torch.from_numpy(target)[None])
    assert float(loss) == pytest.approx(expected, abs=1e-9)


def test_l1_loss_does_not_depend_on_the_scale() -> None:
    image, target = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(l1_loss(image, target), l1_loss(50 * image, 50 * target))
    assert bool((l1_loss(target, target) == 0).all())


def test_images_are_drawn_without_replacement_over_all_scans(records: list[ScanRecord]) -> None:
    owner = records[0].patient
    scans = [ScanRecord(**{**vars(record), "patient": owner}) for record in records[:3]]
    cohort = Cohort(scans)
    assert cohort.patients == [owner]
    generator = np.random.default_rng(0)
    listed = {(image.record.scan_id, image.frame) for image in all_images(scans)}
    assert len(listed) == 6
    for at_most in (1, 4, 6, 50):
        drawn = [(i.record.scan_id, i.frame) for i in cohort.draw(owner, at_most, generator)]
        assert len(set(drawn)) == len(drawn) == min(at_most, 6)
        assert set(drawn) <= listed


def test_every_image_can_be_drawn(records: list[ScanRecord]) -> None:
    cohort = Cohort(records[:1])
    generator = np.random.default_rng(0)
    (patient,) = cohort.patients
    drawn = Counter(cohort.draw(patient, 1, generator)[0].frame for _ in range(60))
    assert set(drawn) == {0, 1}
    assert min(drawn.values()) > 10


def test_undersampling_keeps_what_the_mask_says(records: list[ScanRecord]) -> None:
    image = load_image(records[0], 1, 0)
    with ScanFile(records[0].path) as scan:
        assert torch.equal(image.kspace, torch.from_numpy(scan.image(1, 0)))
    item = undersample(image, Sampling("uniform", 4.0, 8), seed=3)
    assert torch.equal(item.measured, torch.where(item.mask, image.kspace, 0))
    assert item.acs.sum() == 8 * 32
    assert bool((item.mask | ~item.acs).all())
    assert 1 < item.realised_acceleration < 4
    batch = collate([item], ENCODER)[0]
    torch.testing.assert_close(batch.target[0], rss(ifft2c(image.kspace)))


def test_no_scan_is_a_data_error() -> None:
    with pytest.raises(DataError, match="no scan to train on"):
        trainer([])


def test_a_diverged_training_says_so(records: list[ScanRecord]) -> None:
    run, model = trainer(records)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(FederationError, match="learning_rate"):
        run.run(0, 1)
