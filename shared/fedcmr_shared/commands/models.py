"""`fedcmr models`: which networks there are and how large they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedcmr_shared.cli import EntryPointGroup, json_option, print_json, print_table

if TYPE_CHECKING:
    from fedcmr_shared.models.release import ReleaseBundle

_COUNTS = ("trainable", "frozen", "total")


@click.group(cls=EntryPointGroup, entry_point_group="fedcmr.commands.models")
def models() -> None:
    """List networks and use trained ones."""


@models.command("list")
@json_option
def list_models(as_json: bool) -> None:
    """List all networks and sizes with the parameter counts of the full variant."""
    from fedcmr_shared.models.registry import available_models, parameter_counts

    # The last variant of a model uses all its inputs.
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "size": size,
            "variants": list(entry.variants),
            "description": entry.description,
            **parameter_counts(name, size, variant=entry.variants[-1]),
        }
        for name, entry in available_models().items()
        for size in entry.sizes
    ]
    if as_json:
        print_json(rows)
    else:
        cells = [_cells({**row, "variants": ", ".join(row["variants"])}) for row in rows]
        print_table("Models", cells, ("name", "size", "variants", *_COUNTS, "description"))


@models.command()
@click.argument("name")
@click.option("--size", default="tiny", help="tiny, small or paper")
@click.option("--text-encoder", default="minilm", help="minilm, clip or hashed")
@json_option
def show(name: str, size: str, text_encoder: str, as_json: bool) -> None:
    """Show the parameter counts of network NAME, or the card of the release in file NAME.

    The text encoder is frozen and no part of the counts; it sets the width of the projections. A
    release is checked for damage here, and `fedcmr models verify` says whose it is.
    """
    from fedcmr_shared.models.registry import model_entry, parameter_counts
    from fedcmr_shared.models.release import ReleaseBundle, is_release

    if is_release(Path(name)):
        _show_release(ReleaseBundle.read(Path(name)), as_json)
        return
    entry = model_entry(name)
    rows = [
        {
            "variant": variant,
            **parameter_counts(name, size, variant=variant, text_encoder=text_encoder),
        }
        for variant in entry.variants
    ]
    if as_json:
        heading = {"name": name, "size": size, "text_encoder": text_encoder}
        print_json({**heading, "description": entry.description, "variants": rows})
    else:
        title = f"{name} {size}, text encoder {text_encoder}"
        print_table(title, [_cells(row) for row in rows], ("variant", *_COUNTS))


def _show_release(release: ReleaseBundle, as_json: bool) -> None:
    from fedcmr_shared.models.card_text import card_text

    if as_json:
        key = release.signature.key
        print_json({"signed_by": key, "card": release.card.model_dump(mode="json")})
    else:
        click.echo(card_text(release.card))
        click.echo(f"signed by key {release.signature.key}, which nobody checked here")


def _cells(row: Mapping[str, object]) -> dict[str, object]:
    return {key: f"{value:,}" if isinstance(value, int) else value for key, value in row.items()}
