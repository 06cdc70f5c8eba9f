"""`fedcmr models generate`: synthetic clips of hearts from a trained generator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from fedcmr_client.commands.progress import progress
from fedcmr_shared.cli import json_option, print_json, print_table

if TYPE_CHECKING:
    from fedcmr_client.generation import ClipModel, SyntheticClip
    from fedcmr_client.heart_requests import Heart
    from fedcmr_client.synthetic_export import Format, GenerationRun
    from fedcmr_shared.models.masked_generator import SamplingPlan

_FORMATS: Final = ("nifti", "dicom", "gif")
_SHOWN: Final = ("warning", "release_card_sha256", "phenotypes", "seed", "clips", "out", "files")
_COMPLETED: Final = "what a cavity lacks completed by its identities and public priors"


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="New or empty folder.")
@click.option("--phenotype", "settings", metavar="NAME=VALUE", multiple=True, help="Of all clips.")
@click.option("--csv", "table", type=click.Path(path_type=Path), help="One clip for each row.")
@click.option(
    "--phenotypes-from",
    type=click.Path(path_type=Path),
    help="Bundle or release of phenotype-vae or phenotype-gaussian that draws hearts.",
)
@click.option("--count", type=click.IntRange(min=1), help="How many clips; 1 if not given.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Another gives other clips.")
@click.option(
    "--guidance",
    type=click.FloatRange(min=0),
    help="How much to exaggerate what is asked; 1: not at all, 0: ignore it. As all of sampling, by "
    "default what suits the size of MODEL.",
)
@click.option("--steps", type=int, help="Decoding steps.")
@click.option("--diffusion-steps", type=int, help="Steps of each token.")
@click.option(
    "--format",
    "formats",
    type=click.Choice(_FORMATS),
    multiple=True,
    default=_FORMATS,
    help="What to write; may be repeated.",
)
@click.option("--trust", metavar="KEY", help="Public key of the coordinator who released MODEL.")
@click.option("--device", default="cpu", help="torch device")
@json_option
def generate(
    model: Path,
    out: Path,
    settings: tuple[str, ...],
    table: Path | None,
    phenotypes_from: Path | None,
    count: int | None,
    seed: int,
    guidance: float | None,
    steps: int | None,
    diffusion_steps: int | None,
    formats: tuple[Format, ...],
    trust: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Draw synthetic clips of hearts with MODEL, a bundle or release of cpgg. Research use only.

    The hearts are those of --phenotype or --csv. Without either they are drawn as well: by the
    model of --phenotypes-from, or from public priors.
    """
    from fedcmr_client.generation import load_clip_model
    from fedcmr_client.image_files import check_free
    from fedcmr_client.synthetic_export import GenerationRun, export_clips

    if sum(given is not None for given in (settings or None, table, phenotypes_from)) > 1:
        raise click.UsageError("give one of --phenotype, --csv and --phenotypes-from")
    if table is not None and count is not None:
        raise click.UsageError("--csv has one clip for each row: leave out --count")
    check_free(out)
    drawer = load_clip_model(model, trust, device)
    plan = _plan(drawer.size, guidance=guidance, steps=steps, diffusion_steps=diffusion_steps)
    if table is not None:
        hearts, source = _listed(drawer, table)
    elif settings:
        hearts, source = _repeated(drawer, settings, count or 1)
    else:
        hearts, source = _drawn(drawer, phenotypes_from, count or 1, seed)
    run = GenerationRun(drawer, plan, source, seed)
    files = export_clips(out, run, _clips(run, hearts), list(dict.fromkeys(formats)))
    _print({**run.provenance, "clips": len(hearts), "out": out}, files, as_json)


def _plan(size: str, **asked: float | None) -> SamplingPlan:
    from fedcmr_client.generation import PLANS

    changes: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    return replace(PLANS[size], **changes)


def _listed(model: ClipModel, table: Path) -> tuple[list[tuple[Heart, Heart]], str]:
    """Return the hearts of a table, as given and completed, and whose they are."""
    from fedcmr_client.heart_requests import read_requests

    read = read_requests(table, model.names)
    return read.hearts, f"given by the user in a table (SHA-256 {read.sha256}), {_COMPLETED}"


def _repeated(
    model: ClipModel, settings: Sequence[str], count: int
) -> tuple[list[tuple[Heart, Heart]], str]:
    from fedcmr_client.heart_requests import complete, parse_settings

    given = parse_settings(settings, model.names)
    return [(given, complete(given, model.names))] * count, f"given by the user, {_COMPLETED}"


def _drawn(
    model: ClipModel, phenotypes_from: Path | None, count: int, seed: int
) -> tuple[list[tuple[Heart, Heart]], str]:
    from fedcmr_client.generation import clip_seeds, load_phenotype_model
    from fedcmr_client.heart_sampling import PRIOR_SOURCE, sample_model, sample_prior

    seeds = clip_seeds(seed, count)
    if phenotypes_from is None:
        drawn, source = [sample_prior(own) for own in seeds], PRIOR_SOURCE
    else:
        loaded = load_phenotype_model(phenotypes_from)
        drawn = [sample_model(loaded.distribution, own) for own in seeds]
        source = f"drawn by a {loaded.name} model, SHA-256 {loaded.sha256}"
    known = [{name: heart[name] for name in model.names if name in heart} for heart in drawn]
    return [(heart, heart) for heart in known], source


def _clips(run: GenerationRun, hearts: Sequence[tuple[Heart, Heart]]) -> Iterator[SyntheticClip]:
    from fedcmr_client.generation import ClipRequest, clip_seeds, draw_clips

    requests = [
        ClipRequest(*heart, seed)
        for heart, seed in zip(hearts, clip_seeds(run.seed, len(hearts)), strict=True)
    ]
    with progress("Drawing clips", len(requests)) as advance:
        for clip in draw_clips(run.model.network, requests, run.plan):
            yield clip
            advance()


def _print(summary: dict[str, Any], files: Sequence[Path], as_json: bool) -> None:
    if as_json:
        print_json({**summary, "files": files})
        return
    shown = {**summary, "files": len(files)}
    rows = [{"what": name.replace("_", " "), "value": shown[name]} for name in _SHOWN]
    print_table(f"{summary['label']}, {summary['notice']}", rows, ("what", "value"))
    release = summary["release"]
    if release is None:
        click.echo("note: nobody released this model: no gate looked for copies of patients")
    elif not release["trusted"]:
        click.echo(f"note: key {release['signed_by']} signed the release: give it by --trust if it")
        click.echo("is your coordinator's; anybody can sign, and write that gates passed")
