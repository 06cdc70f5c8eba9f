"""`fedcmr site plan`: what it answers, how fast, and what it refuses."""

import json
import resource
import subprocess
import sys
from typing import Any

import pytest
from click.testing import CliRunner, Result

from fedcmr_client.commands.site_plan import plan
from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.privacy.accounting import best_order, rdp_limit, total_rdp
from fedcmr_shared.schemas.ledger import Release


def run(*arguments: object) -> Result:
    return CliRunner().invoke(plan, [str(argument) for argument in arguments])


def answer(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert isinstance(content, dict)
    return content


def reserved(plan: dict[str, Any], order: int) -> float:
    release = Release(
        sampling_rate=plan["sampling_rate"],
        noise_multiplier=plan["noise_multiplier"],
        steps=plan["local_steps"],
    )
    return total_rdp({release: plan["rounds"] + plan["spare_rounds"]}, order)


def test_rounds_ask_for_noise() -> None:
    content = answer("--epsilon", 8, "--rounds", 10, "--local-steps", 20, "--cohort", 300)
    assert content["order"] == best_order(8, 1e-5)
    assert (content["unit"], content["relation"]) == ("patient", "zero-out")
    assert content["remaining_rdp"] == content["limit_rdp"] == rdp_limit(8, 1e-5, content["order"])
    assert len(content["plans"]) >= 4
    for choice in content["plans"]:
        assert (choice["rounds"], choice["spare_rounds"], choice["local_steps"]) == (10, 1, 20)
        assert reserved(choice, content["order"]) <= content["limit_rdp"]
        assert choice["pld_epsilon"] <= choice["filter_epsilon"] <= choice["reserved_epsilon"] <= 8
        assert choice["expected_patients"] == pytest.approx(300 * choice["sampling_rate"])
    assert set(content["versions"]) == {"dp-accounting", "fedcmr", "opacus"}


def test_noise_asks_for_rounds_and_both_for_local_steps() -> None:
    rounds = answer("--sigma", 3, "--q", 0.1, "--local-steps", 10)["plans"][0]["rounds"]
    assert rounds > 1
    steps = answer("--sigma", 3, "--q", 0.1, "--rounds", rounds)["plans"][0]["local_steps"]
    assert steps >= 10
    again = answer("--sigma", 3, "--q", 0.1, "--local-steps", steps)["plans"][0]["rounds"]
    assert again >= rounds


def test_what_is_spent_is_not_there_twice() -> None:
    fresh = answer("--sigma", 3, "--q", 0.1)
    used = answer("--sigma", 3, "--q", 0.1, "--spent-rdp", 2)
    assert used["plans"][0]["rounds"] < fresh["plans"][0]["rounds"]
    assert used["remaining_rdp"] == pytest.approx(fresh["limit_rdp"] - 2)
    assert reserved(used["plans"][0], used["order"]) + 2 <= used["limit_rdp"]


def test_table_states_the_claim_and_what_does_not_fit() -> None:
    result = run("--sigma", 1, "--q", 0.02, "--q", 1, "--order", 5, "--spent-rdp", 0.1)
    assert result.exit_code == 0
    title = " ".join(result.stdout.split())
    for part in ("unit patient", "relation zero-out", "delta 1e-05", "order 5", "epsilon 8"):
        assert part in title
    assert "not one round fits at sampling rate 1" in title
    assert "spent already: RDP 0.1" in title


def test_table_does_not_round_noise_down() -> None:
    asked = ("--rounds", 20, "--q", 0.5)
    sigma = answer(*asked)["plans"][0]["noise_multiplier"]
    assert sigma > 10
    assert f"{sigma:.3f}" in run(*asked).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sigma", 0.01], "not one round fits"),
        (["--rounds", 5, "--epsilon", -1], "epsilon is -1"),
        (["--rounds", 5, "--epsilon", 1e-6], "epsilon 1e-06 is out of reach"),
        (["--rounds", 5, "--epsilon", 1, "--order", 2], "order 2"),
        (["--rounds", 5, "--delta", 0], "delta is 0"),
        (["--rounds", 5, "--spent-rdp", 100], "spent RDP 100"),
        (["--sigma", "nan"], "noise_multiplier is nan"),
        (["--rounds", 5, "--q", "nan"], "sampling rate is nan"),
    ],
)
def test_impossible_budgets_are_refused(arguments: list[object], message: str) -> None:
    error = run(*arguments).exception
    assert isinstance(error, ConfigurationError)
    assert message in str(error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --rounds, --sigma or both"),
        (["--rounds", 5, "--sigma", 1, "--local-steps", 5], "leave out"),
        (["--rounds", 0], "--rounds"),
        (["--rounds", 5, "--q", 1.5], "--q"),
        (["--rounds", 5, "--order", 1], "--order"),
        (["--rounds", 5, "--spent-rdp", -1], "--spent-rdp"),
    ],
)
def test_wrong_usage(arguments: list[object], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_answer_takes_seconds_without_torch() -> None:
    program = (
        "import sys\n"
        "from fedcmr_client.commands.site_plan import plan\n"
        "plan(sys.argv[1:], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules\n"
    )
    arguments = ["--epsilon", "8", "--rounds", "50", "--cohort", "1000"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 5
