"""A job's claim is what the auditor's code computes from its published numbers."""

from __future__ import annotations

from typing import Any

import pytest

from fedcmr_shared.errors import ConfigurationError, JobRefused
from fedcmr_shared.models.card_text import privacy_sentence
from fedcmr_shared.privacy.accounting import epsilon_from_rdp, figures, total_rdp
from fedcmr_shared.privacy.budget import phases_of
from fedcmr_shared.privacy.job_claim import ORDERS, JobClaim, claim_of
from fedcmr_shared.schemas.job import JobSpec, TrainingSpec
from fedcmr_shared.schemas.privacy import DistributedNoise, EvaluationSpec, PrivacySpec


def job(training: TrainingSpec | None = None, **privacy: Any) -> JobSpec:
    spec = PrivacySpec(**{"noise_multiplier": 2.0, **privacy})
    return JobSpec(privacy=spec, training=training or TrainingSpec())


def test_figures_are_those_of_the_filter() -> None:
    spec = job()
    claim = claim_of(spec)
    for name, (release, starts) in phases_of(spec).items():
        expected = figures({release: starts}, claim.order, claim.delta)
        assert claim.phases[name].epsilon == expected.filter_epsilon
        assert claim.phases[name].steps == starts * release.steps
    # The larger one counts: a patient is trained on or evaluated, never both.
    assert claim.epsilon == max(phase.epsilon or 0.0 for phase in claim.phases.values())
    assert spec.privacy is not None
    assert claim.phases["train"].starts == spec.rounds + spec.privacy.spare_rounds


def test_no_other_order_claims_less() -> None:
    spec = job()
    claim = claim_of(spec)
    for order in ORDERS:
        at_order = [
            epsilon_from_rdp(total_rdp({release: starts}, order), order, claim.delta)
            for release, starts in phases_of(spec).values()
        ]
        assert max(at_order) >= claim.epsilon


def test_scores_without_noise_are_named_and_not_counted() -> None:
    claim = claim_of(job(evaluation=EvaluationSpec(noise_multiplier=None)))
    assert claim.without_noise == ("evaluate",)
    assert claim.epsilon == claim.phases["train"].epsilon
    assert "without noise and are not covered" in privacy_sentence(claim)
    assert "without noise" not in privacy_sentence(claim_of(job()))


def test_shared_noise_says_whom_it_trusts() -> None:
    training = TrainingSpec(local_steps=1, optimiser="sgd")
    claim = claim_of(job(training, distributed=DistributedNoise(unseen_sites=1)))
    assert claim.shared_noise is not None
    assert "at most 1 of the at least 3 sites" in privacy_sentence(claim)
    assert claim_of(job()).shared_noise is None


def test_a_claim_reads_back_and_agrees_with_itself() -> None:
    claim = claim_of(job())
    again = JobClaim.model_validate_json(claim.model_dump_json())
    assert again == claim
    assert again.agrees_with(claim)
    rounded = claim.model_copy(update={"epsilon": claim.epsilon * (1 + 1e-12)})
    assert rounded.agrees_with(claim)


@pytest.mark.parametrize("change", [{"epsilon": 0.1}, {"delta": 1e-9}, {"order": 7}])
def test_another_claim_does_not_agree(change: dict[str, Any]) -> None:
    claim = claim_of(job())
    assert not claim.model_copy(update=change).agrees_with(claim)


def test_other_phases_do_not_agree() -> None:
    claim = claim_of(job())
    train = {"train": claim.phases["train"]}
    silent = claim.phases["evaluate"].model_copy(update={"epsilon": None})
    for phases in (train, {**train, "evaluate": silent}):
        assert not claim.model_copy(update={"phases": phases}).agrees_with(claim)
    with pytest.raises(ValueError, match="a job trains"):
        JobClaim.model_validate({**claim.model_dump(), "phases": {}})


def test_refusals() -> None:
    with pytest.raises(JobRefused, match="declares no privacy"):
        claim_of(JobSpec())
    with pytest.raises(ConfigurationError, match="no epsilon bounds"):
        claim_of(job(noise_multiplier=1e-9))
    with pytest.raises(ConfigurationError, match="delta is 1e-13"):
        claim_of(job(delta=1e-13))
