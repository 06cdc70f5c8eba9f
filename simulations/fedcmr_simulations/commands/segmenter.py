"""The command `fedcmr simulate segmenter`."""

from __future__ import annotations

from pathlib import Path

import click

from fedcmr_shared.cli import json_option, print_json


@click.command()
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="Weights to write (.safetensors).",
)
@click.option(
    "--contours",
    type=click.Path(file_okay=False, path_type=Path),
    default=None,
    help="Folder with public Sunnybrook images and contours (.npz); else phantoms alone.",
)
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, help="Same seed, same weights.")
@click.option("--steps", type=click.IntRange(min=1), default=None, help="Else as built in.")
@click.option("--patients", type=click.IntRange(min=1), default=None, help="Simulated patients.")
@json_option
def segmenter(
    out: Path,
    contours: Path | None,
    seed: int,
    steps: int | None,
    patients: int | None,
    as_json: bool,
) -> None:
    """Train the network that measures phenotypes, without privacy: simulated and public data only.

    The file says where its weights come from and which patients were held out.
    """
    import torch

    from fedcmr_simulations.progress import SilentProgress, TerminalProgress
    from fedcmr_simulations.segmenter_training import SegmenterTraining, make_segmenter

    # Sums depend on the number of threads: with one, the seed gives the same weights.
    torch.set_num_threads(1)
    chosen = {"seed": seed, "steps": steps, "phantom_patients": patients}
    config = SegmenterTraining.model_validate({k: v for k, v in chosen.items() if v is not None})
    words = ["fedcmr simulate segmenter", f"--out {out.name}", f"--seed {seed}"]
    words += [f"--contours {contours.name}"] if contours else []
    words += [f"--steps {steps}"] if steps else []
    words += [f"--patients {patients}"] if patients else []
    progress = SilentProgress() if as_json else TerminalProgress()
    result = make_segmenter(config, out, contours, " ".join(words), progress)
    if as_json:
        print_json({"out": str(out), **result})
    else:
        click.echo(f"weights: {out} ({result['bytes']} bytes, {result['parameters']} parameters)")
        click.echo(f"origin: {result['origin']}; privacy: {result['privacy']}")
        click.echo(f"sha256: {result['sha256']}")
