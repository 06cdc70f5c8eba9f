"""The registry of networks."""

from typing import Any, get_args

import pytest
import torch

from fedcmr_shared.errors import ModelError
from fedcmr_shared.models.cardiomm import CardioMM
from fedcmr_shared.models.registry import (
    available_models,
    build_model,
    model_entry,
    parameter_counts,
)
from fedcmr_shared.schemas.job import JobSpec, ModelSpec
from fedcmr_shared.schemas.privacy import EvaluationSpec, PrivacySpec


def spec(**values: Any) -> ModelSpec:
    return ModelSpec(**{"text_encoder": "hashed", **values})


@pytest.mark.parametrize("variant", ["SM", "UT", "MT", "MM"])
def test_builds_the_variant_with_the_encoder_width(variant: str) -> None:
    model = build_model(spec(variant=variant))
    assert isinstance(model, CardioMM)
    assert model.config.variant == variant
    assert model.config.text_width == 32


def test_the_callers_seed_decides_the_weights() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in build_model(spec()).parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_counts_are_those_of_a_real_network() -> None:
    model = build_model(spec())
    counts = parameter_counts("cardiomm", "tiny", text_encoder="hashed")
    assert counts["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counts["total"] == sum(t.numel() for t in model.state_dict().values())
    assert counts["frozen"] == counts["total"] - counts["trainable"] > 0


def test_paper_size_is_the_published_architecture() -> None:
    # A recount of arXiv 2512.21652 with 10 cascades and a 512-value text encoder: 63.2 M trainable
    # without and 63.5 M with the two used projections of 0.13 M each; 5.2 M frozen prompt banks.
    counts = parameter_counts("cardiomm", "paper", text_encoder="clip")
    assert counts["trainable"] == pytest.approx(63.45e6, rel=1e-3)
    assert counts["frozen"] == pytest.approx(5.2e6, rel=1e-2)


def test_variants_without_sampling_text_have_no_frozen_banks() -> None:
    frozen = {
        variant: parameter_counts("cardiomm", "paper", variant=variant)["frozen"]
        for variant in ("SM", "UT", "MT", "MM")
    }
    assert frozen["SM"] == frozen["MT"] == 0
    assert frozen["UT"] == frozen["MM"] > 0


def test_counting_leaves_the_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    parameter_counts("cardiomm", "small")
    assert torch.equal(before, torch.random.get_rng_state())


def test_every_size_of_a_job_is_known() -> None:
    sizes = get_args(ModelSpec.model_fields["size"].annotation)
    assert list(available_models()) == ["cardiomm", "cpgg", "phenotype-gaussian", "phenotype-vae"]
    for entry in available_models().values():
        assert sorted(sizes) == sorted(entry.sizes)


def test_generators_have_their_published_sizes() -> None:
    counts = parameter_counts("cpgg", "paper")
    assert counts["trainable"] == pytest.approx(193.3e6, rel=0.01)
    # Phenotypes' names and constants stand in the state as a digest of 32 numbers.
    assert parameter_counts("phenotype-vae", "paper")["frozen"] == 32


def test_the_tiny_generator_weighs_less_than_eight_megabytes() -> None:
    assert 4 * parameter_counts("cpgg", "tiny")["total"] < 8e6


def test_models_without_words_have_one_variant() -> None:
    with pytest.raises(ModelError, match="cpgg has no variant 'SM': use MM"):
        build_model(spec(name="cpgg", variant="SM"))


def test_unknown_model_lists_the_known_ones() -> None:
    with pytest.raises(
        ModelError,
        match="'varnet' is unknown: use cardiomm, cpgg, phenotype-gaussian, phenotype-vae",
    ):
        build_model(spec(name="varnet"))
    with pytest.raises(
        ModelError,
        match="'varnet' is unknown: use cardiomm, cpgg, phenotype-gaussian, phenotype-vae",
    ):
        parameter_counts("varnet", "tiny")


def test_moments_have_no_layers_to_update() -> None:
    with pytest.raises(ModelError, match="lora_rank 4: the model has no linear"):
        build_model(spec(name="phenotype-gaussian", lora_rank=4))


class TestScores:
    """What a family can be evaluated by at sites."""

    def problem(self, name: str, **evaluation: Any) -> str | None:
        privacy = PrivacySpec(noise_multiplier=1.0, evaluation=EvaluationSpec(**evaluation))
        job = JobSpec(name="job", model=ModelSpec(name=name), privacy=privacy)
        return model_entry(name).scoring_problem(job)

    def test_what_fits_is_no_problem(self) -> None:
        gate = {"metrics": ("memorisation",), "noise_multiplier": None}
        assert self.problem("cardiomm", metrics=("psnr", "nmse")) is None
        assert self.problem("cardiomm", rounds="none") is None
        assert self.problem("cpgg", **gate) is None
        assert self.problem("phenotype-vae", rounds="none") is None
        assert self.problem("phenotype-gaussian", rounds="none") is None

    @pytest.mark.parametrize(
        ("name", "evaluation", "reason"),
        [
            ("cpgg", {"rounds": "none"}, "can be released only when the sites' gates find no cop"),
            ("cpgg", {}, "psnr is none of cpgg's: use memorisation"),
            (
                "cardiomm",
                {"metrics": ("memorisation",), "noise_multiplier": None},
                "memorisation is none of cardiomm's: use psnr, ssim, nmse",
            ),
            ("phenotype-vae", {}, "psnr is none of phenotype-vae's: write rounds none"),
            ("phenotype-gaussian", {}, "psnr is none of phenotype-gaussian's: write rounds none"),
        ],
    )
    def test_what_does_not_fit(self, name: str, evaluation: dict[str, Any], reason: str) -> None:
        assert reason in (self.problem(name, **evaluation) or "")


@pytest.mark.parametrize("field", ["size", "variant", "text_encoder"])
def test_unknown_choice_is_named(field: str) -> None:
    choice: dict[str, Any] = {"size": "tiny", field: "huge"}
    with pytest.raises(ModelError, match=f"{field} 'huge' is unknown"):
        parameter_counts("cardiomm", **choice)
