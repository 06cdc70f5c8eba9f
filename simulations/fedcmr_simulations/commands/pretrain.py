"""The command `fedcmr simulate pretrain`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fedcmr_shared.cli import json_option, print_json, print_table


@click.command()
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="Bundle to write (.safetensors).",
)
@click.option(
    "--config",
    "config_path",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    help="YAML file with job and phantom patients; else the packaged one.",
)
@click.option("--steps", type=click.IntRange(1), default=None, help="Steps; else as configured.")
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    default=None,
    help="Folder with one site store per sub-folder; else phantom patients.",
)
@click.option("--seed", type=click.IntRange(0, 2**31), default=None, help="Else as configured.")
@click.option("--public", is_flag=True, help="All data of patients in --data are public.")
@json_option
def pretrain(
    out: Path,
    config_path: Path | None,
    steps: int | None,
    data: Path | None,
    seed: int | None,
    public: bool,
    as_json: bool,
) -> None:
    """Make starting weights from simulated or public data, without privacy.

    Private training is then a fine-tune. The bundle says where its weights come from.
    """
    import torch

    from fedcmr_simulations.pretraining import PretrainingRequest, load_pretraining
    from fedcmr_simulations.pretraining import pretrain as run_pretraining
    from fedcmr_simulations.progress import SilentProgress, TerminalProgress

    # Sums depend on the number of threads: with one, the seed gives the same weights.
    torch.set_num_threads(1)
    config = load_pretraining(config_path).changed(steps, seed)
    command = _command(out, config_path, steps, data, seed, public)
    request = PretrainingRequest(config, out, data, public, command)
    result = run_pretraining(request, SilentProgress() if as_json else TerminalProgress())
    if as_json:
        print_json({"out": str(out), **result})
    else:
        _print(out, result)


def _command(
    out: Path,
    config_path: Path | None,
    steps: int | None,
    data: Path | None,
    seed: int | None,
    public: bool,
) -> str:
    """The command line with names instead of paths."""
    options = {
        "--out": out.name,
        "--config": config_path and config_path.name,
        "--steps": steps,
        "--data": data and data.name,
        "--seed": seed,
    }
    words = [f"{name} {value}" for name, value in options.items() if value is not None]
    return " ".join(["fedcmr simulate pretrain", *words, *(["--public"] if public else [])])


def _print(out: Path, result: dict[str, Any]) -> None:
    title = f"PSNR in dB on held-out patients ({result['origin']} data)"
    print_table(title, result["held_out"], list(result["held_out"][0]))
    click.echo(f"privacy: {result['privacy']}")
    click.echo(f"weights: {out} ({result['bytes']} bytes, {result['parameters']} parameters)")
    click.echo(f"sha256: {result['sha256']}")
