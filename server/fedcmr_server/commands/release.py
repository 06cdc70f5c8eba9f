"""`fedcmr models release`: a finished job's model as a signed file."""

from __future__ import annotations

from pathlib import Path

import click

from fedcmr_server.commands.coordinator_option import coordinator_option, opened
from fedcmr_shared.cli import json_option, print_json


@click.command()
@click.argument("job")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="New file: a copy.")
@coordinator_option
@json_option
def release(job: str, out: Path | None, folder: Path, as_json: bool) -> None:
    """Sign and release the model of JOB, given by its name or the start of its id.

    It is kept in the coordinator's folder, where members can fetch it. A job is released once; for
    one that was released before, --out copies that file.
    """
    from fedcmr_server import releases
    from fedcmr_server.store import Jobs

    with opened(folder) as (home, store):
        row = Jobs(store).find(job)
        found = releases.of_job(store, row.id) if out is not None else None
        found = found or releases.release(home, store, row.id)
        key = home.identity().public_key
    path = home.releases / found.path
    if out is not None:
        releases.copy_release(home, found, out)
    summary = {
        "job": row.id,
        "name": row.name,
        "path": path,
        "out": out,
        "sha256": found.sha256,
        "size": found.size,
        "signed_by": key,
    }
    if as_json:
        print_json(summary)
        return
    click.echo(f"released {row.name} as {out or path}")
    click.echo(f"SHA-256 {found.sha256}, signed by {key}")
    click.echo(
        "whoever has a startup kit checks it: fedcmr models verify "
        f"{(out or path).name} --kit kit.json"
    )
