"""`fedcmr audit epsilon`: three figures, composition, and errors that name the option."""

import json
from typing import Any

import pytest

from fedcmr_shared.cli import main


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["audit", *arguments])
    output = capsys.readouterr()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, output.out, output.err


def epsilon(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code, out, _ = run(capsys, "epsilon", *arguments, "--json")
    assert code == 0
    result = json.loads(out)
    assert isinstance(result, dict)
    return result


RECONSTRUCTOR = ("--q", ".05", "--sigma", "1.2", "--steps", "400")
GENERATOR = ("--q", ".1", "--sigma", "2", "--steps", "1000")
CLASSIFIER = ("--q", ".02", "--sigma", ".8", "--steps", "300")
DELTA = ("--delta", "1e-5")


def test_epsilon_prints_three_figures_with_unit_relation_and_versions(
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = epsilon(capsys, *RECONSTRUCTOR, *DELTA)
    assert result["pld"]["epsilon"] == pytest.approx(4.80, abs=0.01)
    assert result["prv"]["epsilon"] == pytest.approx(4.81, abs=0.01)
    assert result["rdp"]["epsilon"] > result["pld"]["epsilon"]
    assert (result["unit"], result["relation"]) == ("patient", "zero-out")
    assert set(result["versions"]) == {"dp-accounting", "fedcmr", "opacus"}
    assert all(result[name]["meaning"] for name in ("pld", "rdp", "prv"))


def test_releases_on_the_same_patients_compose(capsys: pytest.CaptureFixture[str]) -> None:
    result = epsilon(capsys, *RECONSTRUCTOR, *GENERATOR, *CLASSIFIER, *DELTA)
    assert result["pld"]["epsilon"] == pytest.approx(10.70, abs=0.02)
    assert len(result["releases"]) == 3
    halves = ("--q", ".05", "--sigma", "1.2", "--steps", "200") * 2
    twice = epsilon(capsys, *halves, *DELTA)
    assert [release["count"] for release in twice["releases"]] == [2]
    assert twice["rdp"] == epsilon(capsys, *RECONSTRUCTOR, *DELTA)["rdp"]


def test_the_best_order_is_taken_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    best = epsilon(capsys, *RECONSTRUCTOR, *DELTA)
    others = [
        epsilon(capsys, *RECONSTRUCTOR, *DELTA, "--order", str(best["order"] + shift))
        for shift in (-1, 1)
    ]
    assert all(other["rdp"]["epsilon"] > best["rdp"]["epsilon"] for other in others)
    _, out, _ = run(capsys, "epsilon", *RECONSTRUCTOR, *DELTA)
    assert f"RDP, order {best['order']}" in out
    assert "unit patient, relation zero-out" in out
    assert "dp-accounting" in out


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--q", "1.5"),
        ("--q", "0"),
        ("--sigma", "0"),
        ("--sigma", "nan"),
        ("--sigma", "inf"),
        ("--steps", "0"),
        ("--steps", "1.5"),
        ("--delta", "1"),
        ("--delta", "nan"),
        ("--order", "1"),
    ],
)
def test_a_wrong_number_names_its_option(
    capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    given = {"--q": ".1", "--sigma": "1", "--steps": "10", "--delta": "1e-5", option: value}
    code, _, error = run(capsys, "epsilon", *(part for pair in given.items() for part in pair))
    assert code == 2
    assert f"'{option}'" in error


def test_an_incomplete_triple_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = run(capsys, "epsilon", *RECONSTRUCTOR, "--q", ".2", *DELTA)
    assert code == 2
    assert "2 of --q, 1 of --sigma and 1 of --steps" in error
