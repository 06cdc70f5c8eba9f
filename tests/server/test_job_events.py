"""Events as lines for people, and the public words in them."""

import subprocess
import sys
from typing import Any, get_args

import pytest

from fedcmr_server.job_events import event_text
from fedcmr_server.losses import FAULTS, Loss
from fedcmr_server.words import METRICS
from fedcmr_shared.schemas.privacy import Metric
from fedcmr_shared.secagg.faults import Fault

OPENED = {"phase": "train", "round": 2, "attempt": 1, "outcome": "opened", "losses": []}


def loss(site: str, fault: str, reason: str = "") -> dict[str, str]:
    return {"site": site, "step": "keys", "fault": fault, "reason": reason}


@pytest.mark.parametrize(
    ("name", "values", "text"),
    [
        ("submit", {}, "submitted"),
        ("submit", {"start": {}}, "submitted, from a bundle"),
        ("authorise", {"not_after": "2030"}, "signed anew, until 2030"),
        ("start", {"run": "7", "reason": None}, "run 7 carries it"),
        ("run_lost", {"reason": "too few"}, "lost its run: too few"),
        ("paused", {"reason": None}, "paused"),
        ("fail", {"reason": "too few sites"}, "failed: too few sites"),
        ("cancel", {"reason": None}, "cancelled"),
        ("round", {"round": 2, "closed": True}, "round 2 closed without an update"),
        (
            "round",
            {"round": 3, "sites": 1, "left_out": 2, "seconds": 75},
            "round 3 committed with 1 site, 2 left out in 1 min 15 s",
        ),
        ("evaluation", {"round": 1, "psnr": 31.0, "ssim": "x"}, "round 1 scored: PSNR 31.00 dB"),
        ("evaluation", {"round": 1}, "round 1 scored: no figure"),
        (
            "evaluation",
            {"round": 2, "sites": 3, "gates_passed": 2},
            "memorisation gates after round 2: passed at 2 of 3 sites",
        ),
        (
            "evaluation",
            {"round": 3, "closed": True},
            "round 3 scored: the sum could not be opened",
        ),
        (
            "attempt",
            {
                **OPENED,
                "outcome": "ended",
                "reason": "2 sites are left",
                "losses": [
                    loss("fir", "silent"),
                    loss("elm", "refused", "paused: the site is paused"),
                    loss("fir", "silent"),
                ],
            },
            (
                "round 2, training, attempt 1 ended: 2 sites are left, without "
                "elm (the site is paused), fir (it did not answer in time)"
            ),
        ),
        ("attempt", OPENED, None),
        (
            "attempt",
            {**OPENED, "losses": [loss("elm", "refused", "patient 17: no consent")]},
            "round 2, training, attempt 1 opened, without elm (it answered with a code)",
        ),
        ("unmask_asked", {}, None),
        ("release", {"path": "heart.zip"}, "released as heart.zip"),
        ("release_refused", {"gate": "quality", "text": "worse"}, "not released: quality: worse"),
        ("something_new", {"patient": 17}, "something new"),
    ],
)
def test_an_event_is_a_line(name: str, values: dict[str, Any], text: str | None) -> None:
    assert event_text(name, values) == text


@pytest.mark.parametrize(
    "name", ["submit", "authorise", "start", "round", "evaluation", "attempt", "release"]
)
def test_an_event_without_its_values_is_a_line_all_the_same(name: str) -> None:
    assert event_text(name, {})
    assert event_text(name, {"losses": "none", "seconds": "x", "sites": None})


def test_every_fault_and_score_has_its_words() -> None:
    assert set(FAULTS) == set(get_args(Fault))
    assert set(METRICS) | {"memorisation"} == set(get_args(Metric))  # which is one bit, no score
    assert (
        Loss("elm", "keys", "from-the-future").meaning == "a code that this version does not know"
    )


def test_the_words_need_no_torch() -> None:
    code = "import sys, fedcmr_server.job_events; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
