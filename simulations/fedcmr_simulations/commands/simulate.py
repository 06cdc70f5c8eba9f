"""`fedcmr simulate`: virtual patients and federations on one machine."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from fedcmr_shared.cli import json_option, print_json, print_table
from fedcmr_simulations.commands.generator_weights import generator_weights
from fedcmr_simulations.commands.phantom import phantom
from fedcmr_simulations.commands.pretrain import pretrain
from fedcmr_simulations.commands.segmenter import segmenter

NO_PRIVACY = "NO PRIVACY: this run protects nobody's data; never do this with patients"


@click.group()
def simulate() -> None:
    """Simulate patients, hospitals and federations on one machine."""


simulate.add_command(phantom)
simulate.add_command(pretrain)
simulate.add_command(segmenter)
simulate.add_command(generator_weights)


@simulate.command()
@click.option("--sites", type=click.IntRange(min=1), default=4, help="Number of virtual hospitals.")
@click.option(
    "--rounds", type=click.IntRange(1, 10_000), default=None, help="Rounds; else as configured."
)
@click.option(
    "--config",
    "config_path",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    help="YAML file with the job; else the packaged demonstration.",
)
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    default=None,
    help="Folder with one site store per sub-folder; else phantom patients.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=None,
    help="New run folder; else runs/NAME-TIME.",
)
@click.option(
    "--workers", type=click.IntRange(min=1), default=2, help="Processes that train at once."
)
@click.option(
    "--no-privacy",
    is_flag=True,
    help="Train without differential privacy. Only simulations can do that.",
)
@click.option(
    "--drop",
    "drops",
    multiple=True,
    metavar="SITE:ROUND[:STEP]",
    help="Kill this site in this round, in step keys, shares, update (unless given), consistency "
    "or unmask of the secure sum. May be given several times.",
)
@json_option
def run(
    sites: int,
    rounds: int | None,
    config_path: Path | None,
    data: Path | None,
    out: Path | None,
    workers: int,
    no_privacy: bool,
    drops: tuple[str, ...],
    as_json: bool,
) -> None:
    """Run a whole federation and write its report.

    Each virtual site trains with patient-level differential privacy under a policy and a budget
    of its own, as a hospital does, and the coordinator opens only sums over sites.

    The run folder holds summary.json, report.html, the metrics and a checkpoint per round.
    """
    from fedcmr_simulations.config import load_config
    from fedcmr_simulations.drops import Drop
    from fedcmr_simulations.progress import SilentProgress, TerminalProgress
    from fedcmr_simulations.runner import SimulationRequest
    from fedcmr_simulations.runner import simulate as run_simulation

    config = load_config(config_path)
    if rounds is not None:
        job = config.job.model_copy(update={"rounds": rounds})
        config = config.model_copy(update={"job": job})
    if out is None:
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        out = Path("runs") / f"{config.job.name}-{stamp}"
    request = SimulationRequest(
        config,
        sites,
        out.absolute(),
        data,
        workers,
        private=not no_privacy,
        drops=tuple(Drop.parse(drop) for drop in drops),
    )
    if no_privacy:
        click.secho(NO_PRIVACY, fg="red", bold=True, err=True)
    try:
        summary = run_simulation(request, SilentProgress() if as_json else TerminalProgress())
    except KeyboardInterrupt:
        click.echo(f"interrupted: what was done so far is in {out}", err=True)
        raise
    if as_json:
        print_json({**summary, "run": str(out), "report": str(out / "report.html")})
    else:
        _print_summary(summary, out)


@simulate.command()
@click.argument("store", type=click.Path(file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--sites", type=click.IntRange(min=1), default=2, help="Number of virtual hospitals.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Order of the patients.")
@json_option
def partition(store: Path, out: Path, sites: int, seed: int, as_json: bool) -> None:
    """Divide the patients of STORE among virtual sites below OUT, for `simulate run --data OUT`."""
    from fedcmr_client.store.site_store import SiteStore
    from fedcmr_simulations.partition import partition as divide
    from fedcmr_simulations.progress import SilentProgress, TerminalProgress

    progress = SilentProgress() if as_json else TerminalProgress()
    with SiteStore.open(store) as opened:
        patients = len(opened.patients())
    with progress.stage("dividing patients", patients) as advance:
        roots = divide(store, out, sites, seed, advance)
    rows: list[dict[str, object]] = []
    for root in roots:
        with SiteStore.open(root) as site:
            counts = {str(part): count for part, count in site.split_counts().items()}
        rows.append({"site": root.name, "path": str(root), **counts})
    if as_json:
        print_json(rows)
    else:
        print_table("patients by part", rows, ("site", "train", "validation", "test", "path"))


def _print_summary(summary: dict[str, Any], out: Path) -> None:
    from fedcmr_simulations.report import generator_statement, privacy_text, summary_rows

    if summary["model"]["name"] == "cpgg":
        for gate in summary["gates"]:
            click.echo(f"gate {gate['gate']}: {gate['text']}")
        _print_spent(summary)
        click.echo(generator_statement(summary))
        if summary["release"]:
            click.echo(f"release: {out / summary['release']['path']}")
        click.echo(f"hearts: {out / 'hearts.gif'}\nreport: {out / 'report.html'}")
        return
    title = (
        f"PSNR in dB on test patients, {summary['pattern']} {summary['nominal_af']:g}× "
        f"({summary['data_origin']} data)"
    )
    rows = [
        {name: f"{cell:.2f}" if isinstance(cell, float) else cell for name, cell in row.items()}
        for row in summary_rows(summary)
    ]
    # The number of patients is in the report; without it the table fits 120 columns.
    print_table(title, rows, [name for name in rows[0] if name not in ("patients", "epsilon")])
    if summary["private"]:
        _print_spent(summary)
        click.echo(privacy_text(summary))
    else:
        click.secho(NO_PRIVACY, fg="red", bold=True)
    click.echo(f"report: {out / 'report.html'}")


def _print_spent(summary: dict[str, Any]) -> None:
    sites = summary["privacy"]["sites"]
    spent = [{"site": name, **_by_round(site["rounds"])} for name, site in sites.items()]
    # A site that died has started more often than the others.
    columns = list(dict.fromkeys(column for row in spent for column in row))
    print_table("certified epsilon of a trained patient, spent so far", spent, columns)


def _by_round(epsilons: list[float]) -> dict[str, str]:
    # Rounded up, as an upper bound must be.
    return {
        f"round {number}": f"{math.ceil(epsilon * 100) / 100:.2f}"
        for number, epsilon in enumerate(epsilons, start=1)
    }
