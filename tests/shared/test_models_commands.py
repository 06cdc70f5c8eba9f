"""`fedcmr models list` and `fedcmr models show`."""

import json
from typing import Any

import click
import pytest

from fedcmr_shared.cli import main
from fedcmr_shared.commands.models import models


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["models", *arguments])
    output = capsys.readouterr()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, output.out, output.err


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    code, out, _ = run(capsys, *arguments, "--json")
    assert code == 0
    return json.loads(out)


def test_the_packages_add_their_commands() -> None:
    commands = models.list_commands(click.Context(models))
    assert commands == ["generate", "list", "reconstruct", "release", "show", "verify"]


def test_list_counts_every_size(capsys: pytest.CaptureFixture[str]) -> None:
    rows = run_json(capsys, "list")
    names = ("cardiomm", "cpgg", "phenotype-gaussian", "phenotype-vae")
    sizes = ("tiny", "small", "paper")
    assert [(row["name"], row["size"]) for row in rows] == [(n, s) for n in names for s in sizes]
    for name in names:
        totals = [row["total"] for row in rows if row["name"] == name]
        assert totals == sorted(totals)
    assert all(row["total"] == row["trainable"] + row["frozen"] for row in rows)


def test_list_as_table(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "list")
    assert code == 0
    assert "68,599,888" in out


def test_show_has_a_row_per_variant(capsys: pytest.CaptureFixture[str]) -> None:
    shown = run_json(capsys, "show", "cardiomm", "--size", "paper")
    counts = {row["variant"]: row["trainable"] for row in shown["variants"]}
    assert list(counts) == ["SM", "UT", "MT", "MM"]
    assert counts["SM"] < counts["MT"] < counts["UT"] < counts["MM"]
    listed = [row for row in run_json(capsys, "list") if row["size"] == "paper"]
    assert listed[0]["name"] == "cardiomm"
    assert counts["MM"] == listed[0]["trainable"]


def test_wider_text_needs_wider_projections(capsys: pytest.CaptureFixture[str]) -> None:
    def count(encoder: str) -> int:
        shown = run_json(capsys, "show", "cardiomm", "--text-encoder", encoder)
        return int(shown["variants"][-1]["trainable"])

    # Two projections to 32 values each.
    assert count("clip") - count("minilm") == 2 * 32 * (512 - 384)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("varnet",),
            "model 'varnet' is unknown: use cardiomm, cpgg, phenotype-gaussian, phenotype-vae",
        ),
        (("cardiomm", "--size", "huge"), "size 'huge' is unknown"),
        (("cardiomm", "--text-encoder", "bert"), "text_encoder 'bert' is unknown"),
    ],
)
def test_unknown_choice(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    code, _, err = run(capsys, "show", *arguments)
    assert code == 1
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_missing_name_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "show")[0] == 2
