"""The memorisation gate of the coordinator: it counts, and everything but passing refuses."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcmr_server.release_gates import GATES, MemorisationGate
from fedcmr_shared.models.bundle import Bundle, load_bundle, save_bundle, state_sha256
from fedcmr_shared.models.card import PURPOSES
from fedcmr_shared.models.registry import available_models, build_model
from fedcmr_shared.schemas.job import JobSpec, ModelSpec
from fedcmr_shared.schemas.privacy import EvaluationSpec, PrivacySpec

JOB = JobSpec(
    name="hearts",
    rounds=2,
    model=ModelSpec(name="phenotype-vae"),  # the gate looks at events alone
    privacy=PrivacySpec(
        evaluation=EvaluationSpec(noise_multiplier=None, metrics=("memorisation",))
    ),
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path: Path = tmp_path_factory.mktemp("bundle") / "model.safetensors"
    save_bundle(path, weights(), JOB.model, {})
    return load_bundle(path)


@cache
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    state: dict[str, Tensor] = build_model(JOB.model).state_dict()
    return state


def evaluation(passed: int, round_number: int = 2, sites: int = 3) -> dict[str, Any]:
    """The sites' word about the model in `bundle`."""
    return {
        "event": "evaluation",
        "round": round_number,
        "sites": sites,
        "closed": False,
        "model_sha256": state_sha256(weights()),
        "gates_passed": passed,
    }


def attempt(
    phase: str, round_number: int, sites: str, outcome: str = "opened", number: int = 1
) -> dict[str, Any]:
    """An attempt at a secure sum over ``sites``, a letter each."""
    return {
        "event": "attempt",
        "phase": phase,
        "round": round_number,
        "attempt": number,
        "outcome": outcome,
        "survivors": list(sites),
    }


def test_every_model_that_sites_train_has_gates() -> None:
    assert set(GATES) == set(available_models())
    assert any(isinstance(gate, MemorisationGate) for gate in GATES["cpgg"])


@pytest.mark.parametrize("name", GATES)
def test_what_a_card_needs_some_gate_of_the_model_gives(bundle: Bundle, name: str) -> None:
    given = {gate.check(JOB, bundle, []).gate for gate in GATES[name]}
    assert given >= set(PURPOSES[name].gates)


def test_all_sites_must_pass(bundle: Bundle) -> None:
    found = MemorisationGate().check(JOB, bundle, [evaluation(3)])
    assert found.passed
    assert found.text == "passed at 3 of 3 sites; epsilon does not cover this"


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        ([], "not opened"),
        ([evaluation(2)], "passed at 2 of 3 sites"),
        ([evaluation(0)], "passed at 0 of 3 sites"),
        ([evaluation(2, sites=2)], "2 sites answered; the job asks for 3"),
        ([evaluation(3, round_number=1)], "not opened"),
        ([evaluation(3) | {"closed": True}], "not opened"),
        ([{"event": "evaluation", "round": 2, "sites": 3, "psnr": 30.0}], "not opened"),
        # The newest word counts.
        ([evaluation(3), evaluation(2)], "passed at 2 of 3 sites"),
        # It must be about these weights.
        ([evaluation(3) | {"model_sha256": "0" * 64}], "about other weights"),
        ([evaluation(3), evaluation(3) | {"model_sha256": None}], "about other weights"),
    ],
)
def test_everything_else_refuses(bundle: Bundle, events: list[dict[str, Any]], reason: str) -> None:
    found = MemorisationGate().check(JOB, bundle, events)
    assert not found.passed
    assert reason in found.text


def test_every_site_in_the_model_must_have_answered(bundle: Bundle) -> None:
    trained = [attempt("train", 1, "abcd"), attempt("train", 2, "abc")]
    answered = [attempt("evaluate", 2, "abcd"), evaluation(4, sites=4)]
    assert MemorisationGate().check(JOB, bundle, [*trained, *answered]).passed
    fewer = [attempt("evaluate", 2, "abc"), evaluation(3)]
    found = MemorisationGate().check(JOB, bundle, [*trained, *fewer])
    assert not found.passed
    assert found.text.startswith("1 site that trained the model, such as d, did not say")
    # An answer about an earlier round, or in a sum that was not opened, is none.
    for other in (attempt("evaluate", 1, "abcd"), attempt("evaluate", 2, "abcd", "ended")):
        assert not MemorisationGate().check(JOB, bundle, [*trained, other, *fewer]).passed


def test_a_site_that_is_in_no_sum_need_not_answer(bundle: Bundle) -> None:
    lost = attempt("train", 1, "abcd", "ended")
    events = [lost, attempt("train", 1, "abc", number=2), attempt("evaluate", 2, "abc")]
    assert MemorisationGate().check(JOB, bundle, [*events, evaluation(3)]).passed


def test_the_reason_fits_a_card_however_many_are_silent(bundle: Bundle) -> None:
    many = attempt("train", 1, "") | {"survivors": [f"{number:063}" for number in range(100)]}
    assert not MemorisationGate().check(JOB, bundle, [many, evaluation(3)]).passed
