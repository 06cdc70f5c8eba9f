"""The command `fedcmr simulate generator-weights`."""

from __future__ import annotations

from pathlib import Path

import click

from fedcmr_shared.cli import json_option, print_json, print_table


@click.command("generator-weights")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="Bundle to write (.safetensors); what it comes from is written beside it (.json).",
)
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, help="Same seed, same weights.")
@click.option("--patients", type=click.IntRange(min=2), default=None, help="Else as built in.")
@click.option(
    "--held-out", type=click.IntRange(min=3), default=None, help="Patients to evaluate with."
)
@click.option(
    "--autoencoder-steps", type=click.IntRange(min=1), default=None, help="Else as built in."
)
@click.option(
    "--generator-steps", type=click.IntRange(min=1), default=None, help="Else as built in."
)
@json_option
def generator_weights(
    out: Path,
    seed: int,
    patients: int | None,
    held_out: int | None,
    autoencoder_steps: int | None,
    generator_steps: int | None,
    as_json: bool,
) -> None:
    """Train the starting weights of CPGG `tiny` on simulated hearts, without privacy."""
    import torch

    from fedcmr_simulations.generator_training import GeneratorTraining, make_generator
    from fedcmr_simulations.progress import SilentProgress, TerminalProgress

    # Sums depend on the number of threads: with one, the seed gives the same weights.
    torch.set_num_threads(1)
    chosen = {
        "patients": patients,
        "held_out": held_out,
        "autoencoder_steps": autoencoder_steps,
        "generator_steps": generator_steps,
    }
    given = {name: value for name, value in chosen.items() if value is not None}
    config = GeneratorTraining.model_validate({"seed": seed, **given})
    words = ["fedcmr simulate generator-weights", f"--out {out.name}", f"--seed {seed}"]
    words += [f"--{name.replace('_', '-')} {value}" for name, value in given.items()]
    progress = SilentProgress() if as_json else TerminalProgress()
    result = make_generator(config, out, " ".join(words), progress)
    if as_json:
        print_json({"out": str(out), **result})
        return
    click.echo(f"weights: {out} ({result['bytes']} bytes, {result['parameters']} parameters)")
    click.echo(f"origin: {result['origin']}; privacy: {result['privacy']}")
    click.echo(f"sha256: {result['sha256']}")
    rows = [
        {"clips": name, **{key: f"{value:.4g}" for key, value in each.items()}}
        for name, each in result["held_out"].items()
        if name != "patients"
    ]
    columns = ("clips", "r2", "mae", "bias", "samples")
    print_table("area change (LVFAC, %) asked against measured", rows, columns)
