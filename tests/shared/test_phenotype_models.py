"""Models of phenotype vectors: public standardisation, the autoencoder and the normal baseline."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from generator_parts import SCALE, seeded
from torch import Tensor, nn

from fedcmr_shared.errors import ConfigurationError, DataError, ModelError
from fedcmr_shared.metrics.phenotypes.table import NAMES as ALL_NAMES
from fedcmr_shared.models.phenotype_gaussian import (
    MomentsConfig,
    PhenotypeGaussian,
    PhenotypeMoments,
    contribution,
)
from fedcmr_shared.models.phenotype_vae import CONFIGS, PhenotypeVAE, PhenotypeVAEConfig
from fedcmr_shared.models.standardisation import Standardisation
from fedcmr_shared.privacy.accounting import figures
from fedcmr_shared.privacy.budget import phases_of
from fedcmr_shared.privacy.engines import engine_for
from fedcmr_shared.privacy.mechanism import Mechanism
from fedcmr_shared.privacy.step import private_gradient
from fedcmr_shared.schemas.job import JobSpec, ModelSpec, TrainingSpec
from fedcmr_shared.schemas.ledger import Release
from fedcmr_shared.schemas.privacy import PrivacySpec

SILENT = 1e-12


def hearts(count: int, seed: int = 0) -> Tensor:
    """LVEDV, LVESV and LVEF, the second one correlated with the first."""
    noise = torch.randn(count, 2, generator=seeded(seed)[0], dtype=torch.float64)
    largest = 150 + 30 * noise[:, 0]
    fraction = 0.58 + 0.05 * noise[:, 1]
    return torch.stack([largest, largest * (1 - fraction), 100 * fraction], 1)


def vae(**changes) -> PhenotypeVAE:
    torch.manual_seed(0)
    config = PhenotypeVAEConfig(**{"standardisation": SCALE, "hidden": 32, "latents": 3, **changes})
    return PhenotypeVAE(config).double()


# Standardisation


def test_constants_are_the_public_priors_of_named_phenotypes() -> None:
    scale = Standardisation.of_priors()
    assert scale.names == ALL_NAMES
    assert len(scale) == 82
    lvef = scale.names.index("LVEF")
    assert (scale.centres[lvef], scale.spreads[lvef]) == (60, 6)


def test_standardising_is_undone() -> None:
    values = hearts(5)
    standard = SCALE.apply(values)
    torch.testing.assert_close(SCALE.undo(standard), values)
    torch.testing.assert_close(SCALE.apply(torch.tensor(SCALE.centres)), torch.zeros(3))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((("a", "b"), (1.0,), (1.0, 1.0)), "2 names, 1 centres and 2 spreads"),
        ((("a", "a"), (1.0, 1.0), (1.0, 1.0)), "give each name once"),
        ((("a",), (1.0,), (0.0,)), "spread 0.0 of a must be positive"),
        (((), (), ()), "0 names"),
    ],
)
def test_impossible_constants_are_refused(fields: tuple, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Standardisation(*fields)
    with pytest.raises(DataError, match="'mass' is unknown"):
        Standardisation.of_priors(("mass",))


@pytest.mark.parametrize(
    "other",
    [
        Standardisation.of_priors(("LVESV", "LVEDV", "LVEF")),
        Standardisation.of_priors(("RVEDV", "LVESV", "LVEF")),
        replace(SCALE, centres=(150.0, *SCALE.centres[1:])),
    ],
    ids=["order", "names", "constants"],
)
def test_weights_for_other_phenotypes_are_refused(other: Standardisation) -> None:
    trained = vae().state_dict()
    vae().load_state_dict(trained)
    with pytest.raises(ModelError, match=r"scale\.digest: the weights were trained with other"):
        vae(standardisation=other).load_state_dict(trained)


def test_weights_without_names_are_refused() -> None:
    state = {name: t for name, t in vae().state_dict().items() if name != "scale.digest"}
    with pytest.raises(RuntimeError, match=r"scale\.digest"):
        vae().load_state_dict(state)


@pytest.mark.parametrize("shape", [(2, 4), (3,)])
def test_rows_of_other_length_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match="give rows of 3 values, LVEDV to LVEF"):
        vae().loss(torch.zeros(shape), seeded(0)[0])


# Autoencoder


def test_paper_size_is_the_published_one() -> None:
    """Layer by layer as described; the published 110,000 is this number, rounded."""
    with torch.device("meta"):
        model = PhenotypeVAE(CONFIGS["paper"])
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [
        *((82, 128), (128, 128), (128, 128)),
        *((128, 32), (128, 32), (32, 128)),
        *((128, 128), (128, 128), (128, 82), (82, 82)),
    ]
    count = sum(p.numel() for p in model.parameters())
    assert count == 107_816
    assert round(count, -4) == 110_000


def test_norms_keep_no_statistics_and_patients_do_not_meet() -> None:
    model = vae().train()
    assert [name for name, _ in model.named_buffers()] == ["scale.digest"]
    values = hearts(4)
    standard, _ = model.scale(values)
    together = model.decode(model.encode(standard)[0])
    torch.testing.assert_close(model.decode(model.encode(standard[1:2])[0]), together[1:2])


def test_loss_is_the_published_one() -> None:
    model, values = vae(), hearts(4)
    standard = SCALE.apply(values)
    mean, log_variance = model.encode(standard)
    noise = torch.randn(mean.shape, generator=seeded(1)[0])
    decoded = model.decode(mean + torch.exp(log_variance / 2) * noise)
    normal = torch.distributions.Normal(mean, torch.exp(log_variance / 2))
    divergence = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    expected = (decoded - standard).square().mean(1) + 0.01 * divergence.sum(1)
    torch.testing.assert_close(model.loss(values, seeded(1)[0]), expected)


def test_missing_phenotypes_are_neither_seen_nor_scored() -> None:
    model, values = vae(), hearts(2)
    values[0, 1] = math.nan
    loss = model.loss(values, seeded(1)[0])
    assert torch.isfinite(loss).all()
    at_centre = values.clone()
    at_centre[0, 1] = SCALE.centres[1]
    known = model.loss(at_centre, seeded(1)[0])
    assert loss[0] != known[0]
    assert loss[1] == known[1]
    nothing = torch.full((1, 3), math.nan, dtype=torch.float64)
    assert torch.isfinite(model.loss(nothing, seeded(1)[0])).all()


def bodies(count: int) -> Tensor:
    """All 82 phenotypes, moved by three hidden factors, and some noise."""
    (generator,) = seeded(0)
    loadings = torch.randn(3, 82, generator=generator, dtype=torch.float64) / math.sqrt(3)
    factors = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, 82, generator=generator, dtype=torch.float64)
    return Standardisation.of_priors().undo(factors @ loadings + 0.2 * noise + 0.5)


def test_learns_means_spreads_and_correlations() -> None:
    torch.manual_seed(0)
    model, values = PhenotypeVAE(CONFIGS["tiny"]), bodies(512).float()
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    (generator,) = seeded(0)
    for _ in range(500):
        optimiser.zero_grad()
        batch = values[torch.randint(512, (64,), generator=generator)]
        model.loss(batch, generator).mean().backward()
        optimiser.step()
    standard = model.config.standardisation.apply
    truth, drawn = standard(values), standard(model.sample(4000, generator))
    assert float((drawn.mean(0) - truth.mean(0)).abs().mean()) < 0.1
    # A decoder gives means: it leaves out the noise of each phenotype.
    assert float((drawn.std(0) / truth.std(0)).mean()) == pytest.approx(0.95, abs=0.12)
    error = torch.corrcoef(drawn.T) - torch.corrcoef(truth.T)
    assert float(error.abs().mean()) < 0.12


def test_temperature_narrows_samples() -> None:
    model = vae()
    wide, narrow = (model.sample(500, seeded(1)[0], t).std(0) for t in (1.0, 0.3))
    assert (narrow < wide).all()


@pytest.mark.parametrize("field", ["hidden", "layers", "latents"])
def test_impossible_configurations_are_refused(field: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{field} 0 must be at least 1"):
        vae(**{field: 0})


# Normal baseline

MOMENTS = MomentsConfig(SCALE)


def noisy_moments(
    patients: Sequence[Tensor],
    config: MomentsConfig,
    *,
    noise_multiplier: float,
    cohort_size: float,
) -> Tensor:
    """Take the one step of a job from zero; everybody is drawn."""
    model = PhenotypeMoments(config).double()

    def loss_of(module: nn.Module) -> Callable[[Sequence[Tensor]], Tensor]:
        return lambda rows: module(torch.stack(list(rows)), torch.zeros(len(rows), 0))

    engine = engine_for("backward", model, list(model.parameters()), loss_of, synthetic=list)
    mechanism = Mechanism(1.0, noise_multiplier, cohort_size)
    step = private_gradient(engine, patients, lambda row: [row], mechanism, 1.0)
    return -step.gradients[0]


def release_of(noise_multiplier: float) -> Release:
    """Return what a round of such a job costs, as ledgers write it down."""
    job = JobSpec(
        rounds=1,
        model=ModelSpec(name="phenotype-gaussian", size="paper"),
        training=TrainingSpec(local_steps=1),
        privacy=PrivacySpec(sampling_rate=1.0, noise_multiplier=noise_multiplier),
    )
    return phases_of(job)["train"][0]


def test_82_phenotypes_are_3485_numbers() -> None:
    assert MomentsConfig(Standardisation.of_priors()).numbers == 82 + 3403


def test_no_patient_counts_more_than_one() -> None:
    values = SCALE.undo(torch.randn(200, 3, generator=seeded(0)[0], dtype=torch.float64) * 5)
    norms = torch.stack([contribution(row, MOMENTS).norm() for row in values])
    assert norms.max() <= 1 + 1e-12
    assert (norms > 1 - 1e-12).any()
    assert norms.min() < 0.9
    hopeless = torch.tensor([1e300, -1e300, 1e300], dtype=torch.float64)
    assert contribution(hopeless, MOMENTS).norm() <= 1 + 1e-12


def test_leaving_a_patient_out_moves_the_sum_by_at_most_one() -> None:
    """With noise far below rounding; the patient's vector is as long as it can be."""
    values = hearts(6)
    values[0] = torch.tensor([900.0, 10.0, 99.0])

    def total(rows: Tensor) -> Tensor:
        return 10 * noisy_moments(rows, MOMENTS, noise_multiplier=SILENT, cohort_size=10)

    move = (total(values) - total(values[1:])).norm()
    assert float(move) == pytest.approx(1.0, abs=1e-9)


def test_release_without_noise_gives_the_sample_moments() -> None:
    values = hearts(400)
    config = MomentsConfig(SCALE, radius=50.0)
    moments = noisy_moments(values, config, noise_multiplier=SILENT, cohort_size=400)
    fitted = PhenotypeGaussian.of(moments, config)
    standard = SCALE.apply(values)
    torch.testing.assert_close(fitted.mean, standard.mean(0), atol=1e-6, rtol=0)
    centred = standard - standard.mean(0)
    covariance = centred.T @ centred / 400
    # A third number that follows from the others leaves one direction almost flat.
    torch.testing.assert_close(fitted.covariance, covariance, atol=2e-4, rtol=0)


@pytest.mark.parametrize("noise_multiplier", [3.0, 30.0])
def test_noise_is_what_the_ledger_is_told(noise_multiplier: float) -> None:
    config = MomentsConfig(Standardisation.of_priors())
    nobody = noisy_moments([], config, noise_multiplier=noise_multiplier, cohort_size=50)
    assert float(nobody.std()) == pytest.approx(noise_multiplier / 50, rel=0.05)
    release = release_of(noise_multiplier)
    assert (release.sampling_rate, release.steps) == (1.0, 1)
    assert release.noise_multiplier == noise_multiplier


def test_samples_come_close_to_the_patients_at_epsilon_one() -> None:
    """2,000 patients and noise multiplier 4, in a single step."""
    figure = figures({release_of(4.0): 1}, 32, 1e-5)
    assert figure.filter_epsilon < 1.25
    assert figure.pld_epsilon is not None
    assert figure.pld_epsilon < 0.95
    values = hearts(2000)
    moments = noisy_moments(values, MOMENTS, noise_multiplier=4.0, cohort_size=2000)
    drawn = PhenotypeGaussian.of(moments, MOMENTS).sample(20_000, seeded(0)[0])
    torch.testing.assert_close(drawn.mean(0), values.mean(0), rtol=0.05, atol=0)
    torch.testing.assert_close(drawn.std(0), values.std(0), rtol=0.25, atol=0)


def test_noise_alone_still_gives_a_distribution() -> None:
    moments = noisy_moments([], MOMENTS, noise_multiplier=4.0, cohort_size=10)
    fitted = PhenotypeGaussian.of(moments, MOMENTS)
    assert torch.linalg.eigvalsh(fitted.covariance).min() > 5e-5
    assert torch.isfinite(fitted.sample(10, seeded(0)[0])).all()


def test_missing_counts_as_centre_and_infinite_as_nobody() -> None:
    values = hearts(2)
    values[0, 1] = math.nan
    filled = values.clone()
    filled[0, 1] = SCALE.centres[1]
    assert torch.equal(contribution(values[0], MOMENTS), contribution(filled[0], MOMENTS))
    values[0, 0] = math.inf
    silent = {"noise_multiplier": SILENT, "cohort_size": 1.0}
    torch.testing.assert_close(
        noisy_moments(values, MOMENTS, **silent), noisy_moments(values[1:], MOMENTS, **silent)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"radius": 0.0}, "radius 0.0 must be positive"),
        ({"mean_share": 1.0}, "mean_share 1.0 must lie between 0 and 1"),
    ],
)
def test_impossible_moments_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        MomentsConfig(SCALE, **change)


def test_vectors_of_other_length_are_refused() -> None:
    with pytest.raises(ModelError, match=r"phenotypes of shape \[2\]: give 3 for each patient"):
        contribution(torch.zeros(2), MOMENTS)
    with pytest.raises(ModelError, match="moments must be 9 finite numbers"):
        PhenotypeGaussian.of(torch.zeros(8), MOMENTS)
    with pytest.raises(ModelError, match="moments must be 9 finite numbers"):
        PhenotypeGaussian.of(torch.full((9,), math.nan), MOMENTS)
