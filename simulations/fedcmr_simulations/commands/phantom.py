"""The command `fedcmr simulate phantom`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fedcmr_shared.cli import json_option, print_json, print_table

if TYPE_CHECKING:
    from fedcmr_simulations.phantom.protocol import Detail


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--sites", default=4, type=click.IntRange(1, 100), help="Number of hospitals.")
@click.option("--patients", default=12, type=click.IntRange(3), help="Patients per hospital.")
@click.option("--seed", default=0, type=click.IntRange(0), help="Same seed, same samples.")
@click.option(
    "--detail",
    type=click.Choice(["small", "clip", "quick", "standard"]),
    default="quick",
    help="One tiny image per patient, one beating slice, a few images, or clinical size (1 to 2 GB "
    "per cine scan).",
)
@click.option("--external", is_flag=True, help="Simulate the hospitals that training never sees.")
@json_option
def phantom(
    out: Path, sites: int, patients: int, seed: int, detail: Detail, external: bool, as_json: bool
) -> None:
    """Make hospitals with simulated cardiac k-space in the new folder OUT.

    Each sub-folder is a site store. All data are simulated and say so in their metadata.
    """
    from fedcmr_simulations.centres import simulate_centres
    from fedcmr_simulations.progress import SilentProgress, TerminalProgress

    progress = SilentProgress() if as_json else TerminalProgress()
    with progress.stage("simulating patients", sites * patients) as advance:
        folders = simulate_centres(
            out,
            sites,
            patients,
            seed=seed,
            detail=detail,
            external=external,
            on_patient=advance,
        )
    rows = [_summary(folder) for folder in folders]
    if as_json:
        print_json({"out": str(out), "seed": seed, "detail": detail, "sites": rows})
        return
    columns = ("site", "vendor", "field_strength_t", "patients", "scans", "images", "modalities")
    print_table(f"Simulated hospitals in {out}", rows, columns)


def _summary(folder: Path) -> dict[str, object]:
    from fedcmr_client.store.site_store import SiteStore

    with SiteStore.open(folder) as store:
        records = store.scans()
        patients = len(store.patients())
    metadata = [record.metadata for record in records]
    return {
        "site": folder.name,
        "vendor": metadata[0].vendor,
        "field_strength_t": metadata[0].field_strength_t,
        "patients": patients,
        "scans": len(records),
        "images": sum(scan.frames * scan.slices for scan in metadata),
        "modalities": ", ".join(sorted({scan.modality or "unknown" for scan in metadata})),
        "origin": metadata[0].origin,
    }
