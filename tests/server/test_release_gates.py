"""The memorisation gate of the coordinator: it counts, and everything but passing refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedcmr_server.release_gates import GATES, MemorisationGate
from fedcmr_shared.models.bundle import Bundle, load_bundle, save_bundle
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
    torch.manual_seed(0)
    save_bundle(path, build_model(JOB.model).state_dict(), JOB.model, {})
    return load_bundle(path)


def evaluation(passed: int, round_number: int = 2, sites: int = 3) -> dict[str, Any]:
    return {
        "event": "evaluation",
        "round": round_number,
        "sites": sites,
        "closed": False,
        "gates_passed": passed,
    }


def test_every_model_that_sites_train_has_gates() -> None:
    assert set(GATES) == set(available_models())
    assert any(isinstance(gate, MemorisationGate) for gate in GATES["cpgg"])


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
    ],
)
def test_everything_else_refuses(bundle: Bundle, events: list[dict[str, Any]], reason: str) -> None:
    found = MemorisationGate().check(JOB, bundle, events)
    assert not found.passed
    assert reason in found.text
