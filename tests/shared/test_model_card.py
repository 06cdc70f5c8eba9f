"""What a card must say of gates and energy before anybody believes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from release_parts import JOB, make_card

from fedcmr_shared.identity.keys import SiteKey
from fedcmr_shared.models.card import PURPOSES, Evaluation, GateResult, ModelCard
from fedcmr_shared.models.card_text import card_text
from fedcmr_shared.models.registry import available_models
from fedcmr_shared.schemas.job import JobSpec, ModelSpec
from fedcmr_shared.schemas.privacy import EvaluationSpec, PrivacySpec

PASSED = GateResult(gate="memorisation", passed=True, text="passed at 3 of 3 sites")
MEMORISATION = {"metrics": ("memorisation",), "noise_multiplier": None}


@pytest.fixture
def key(tmp_path: Path) -> SiteKey:
    return SiteKey.create(tmp_path / "identity.pem")


def card(key: SiteKey, *gates: GateResult, energy_total: bool = False, **changes: Any) -> ModelCard:
    """A card of a generator of clips."""
    evaluation = EvaluationSpec.model_validate({**MEMORISATION, "energy_total": energy_total})
    privacy = PrivacySpec(noise_multiplier=2.0, evaluation=evaluation)
    job = JobSpec(name="heart", rounds=2, model=ModelSpec(name="cpgg"), privacy=privacy)
    return make_card(key, "22" * 32, job, gates=gates, evaluation=(), **changes)


def test_every_model_has_a_purpose() -> None:
    assert PURPOSES.keys() == available_models().keys()


def test_models_with_a_memorisation_score_need_its_gate() -> None:
    for name, entry in available_models().items():
        assert ("memorisation" in PURPOSES[name].gates) == ("memorisation" in entry.scores)


def test_a_generator_of_clips_needs_its_gate(key: SiteKey) -> None:
    assert card(key, PASSED).gates == (PASSED,)
    other = PASSED.model_copy(update={"gate": "another"})
    for gates in ((), (other,)):
        with pytest.raises(ValidationError, match="memorisation is missing, and no cpgg is rel"):
            card(key, *gates)
    with pytest.raises(ValidationError, match="memorisation did not pass"):
        card(key, PASSED.model_copy(update={"passed": False}))


def test_a_gates_word_has_no_means(key: SiteKey) -> None:
    job = card(key, PASSED).job
    means = Evaluation(round=2, sites=3, means={"memorisation": 0.5})
    with pytest.raises(ValidationError, match="evaluation: the job asks for its gates' word"):
        make_card(key, "22" * 32, job, gates=(PASSED,), evaluation=(means,))


def test_the_gates_result_is_in_the_text(key: SiteKey) -> None:
    text = card_text(card(key, PASSED))
    assert "- memorisation: passed at 3 of 3 sites" in text
    assert "no ε covers it. What the gates found stands under Gates." in text
    assert "energy" not in text


def test_energy_that_left_is_in_the_text(key: SiteKey) -> None:
    text = card_text(card(key, PASSED, energy_total=True, energy_kwh=1.5))
    assert "rounded up, in a sum without noise: no ε covers it. It adds up to 1.5 kWh." in text
    unknown = card_text(card(key, PASSED, energy_total=True))
    assert "no ε covers it. There is no figure." in unknown


def test_without_evaluation_no_energy_leaves(key: SiteKey) -> None:
    evaluation = EvaluationSpec(rounds="none", energy_total=True)
    job = JOB.model_copy(
        update={"privacy": PrivacySpec(noise_multiplier=2.0, evaluation=evaluation)}
    )
    assert "energy" not in card_text(make_card(key, "22" * 32, job, evaluation=()))
    with pytest.raises(ValidationError, match="energy_kwh: the job asks the sites for no energy"):
        make_card(key, "22" * 32, job, evaluation=(), energy_kwh=1.5)


def test_energy_that_nobody_asked_for_is_refused(key: SiteKey) -> None:
    with pytest.raises(ValidationError, match="energy_kwh: the job asks the sites for no energy"):
        card(key, PASSED, energy_kwh=1.5)
