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


def evaluation(round_number: int = 2, sites: int = 3, **outcomes: int) -> dict[str, Any]:
    counts = {"passed": 0, "failed": 0, "undecided": 0} | outcomes
    return {
        "event": "evaluation",
        "round": round_number,
        "sites": sites,
        "closed": False,
        "memorisation": counts,
    }


def test_every_model_that_sites_train_has_gates() -> None:
    assert set(GATES) == set(available_models())
    assert any(isinstance(gate, MemorisationGate) for gate in GATES["cpgg"])


def test_all_sites_must_pass(bundle: Bundle) -> None:
    found = MemorisationGate().check(JOB, bundle, [evaluation(passed=3)])
    assert found.passed
    assert found.text == "of 3 sites: 3 passed; epsilon does not cover this"


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        ([], "not opened"),
        ([evaluation(passed=2, failed=1)], "2 passed, 1 failed"),
        ([evaluation(passed=2, undecided=1)], "2 passed, 1 undecided"),
        ([evaluation(undecided=3)], "3 undecided"),
        ([evaluation(passed=2)], "2 passed"),  # one of the three said nothing
        ([evaluation(sites=2, passed=2)], "2 sites answered; the job asks for 3"),
        ([evaluation(round_number=1, passed=3)], "not opened"),
        ([evaluation(passed=3) | {"closed": True}], "not opened"),
        ([{"event": "evaluation", "round": 2, "sites": 3, "psnr": 30.0}], "not opened"),
        # The newest word counts.
        ([evaluation(passed=3), evaluation(passed=2, failed=1)], "1 failed"),
    ],
)
def test_everything_else_refuses(bundle: Bundle, events: list[dict[str, Any]], reason: str) -> None:
    found = MemorisationGate().check(JOB, bundle, events)
    assert not found.passed
    assert reason in found.text
