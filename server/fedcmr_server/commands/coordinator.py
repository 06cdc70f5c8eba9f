"""`fedcmr coordinator`: make a federation, run it, and decide who belongs to it."""

from __future__ import annotations

from pathlib import Path

import click

from fedcmr_server.commands.coordinator_jobs import JOB_COMMANDS
from fedcmr_server.commands.coordinator_members import (
    enrol,
    leave,
    members,
    revoke,
    roster,
    token,
)
from fedcmr_server.commands.coordinator_option import coordinator_option
from fedcmr_shared.cli import json_option, print_json


@click.group()
def coordinator() -> None:
    """Run a federation: its members, its jobs and the one port that hospitals reach."""


for _command in (*JOB_COMMANDS, enrol, leave, members, revoke, roster, token):
    coordinator.add_command(_command)


@coordinator.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--federation", required=True, help="Name of the federation.")
@click.option("--host", required=True, help="Name or IP address by which sites will reach it.")
@click.option("--name", default="coordinator", help="Name of the coordinator.")
@click.option("--port", default=8443, help="The one public port.")
@click.option("--listen", default="0.0.0.0", help="Address that the port is opened on.")
@click.option("--database-url", help="Use PostgreSQL; a URL without a password.")
@json_option
def init(
    folder: Path,
    federation: str,
    host: str,
    name: str,
    port: int,
    listen: str,
    database_url: str | None,
    as_json: bool,
) -> None:
    """Make FOLDER with the keys of a new federation and an explained coordinator.yaml."""
    from fedcmr_server.home import CoordinatorHome, CoordinatorSettings
    from fedcmr_shared.schemas.yaml_files import parse

    content = {
        "federation": federation,
        "host": host,
        "name": name,
        "port": port,
        "listen": listen,
        "database_url": database_url,
    }
    settings = parse(CoordinatorSettings, content, "options", "see --help")
    home = CoordinatorHome.create(folder, settings)
    if as_json:
        values = {"folder": home.folder, "address": home.address, "fingerprint": home.fingerprint}
        print_json({**values, "coordinator_key": home.identity().public_key})
        return
    click.echo(f"{home.folder}: federation {federation}, {home.address}")
    click.echo(f"fingerprint {home.fingerprint}")
    click.echo("Read it out to every member that joins. Keep a backup of the folder keys.")


@coordinator.command()
@coordinator_option
@json_option
def start(folder: Path, as_json: bool) -> None:
    """Run the coordinator until SIGTERM or Ctrl-C; logs go to its folder."""
    import signal
    import threading

    from fedcmr_server.home import CoordinatorHome
    from fedcmr_server.supervisor import supervise

    home = CoordinatorHome.open(folder)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())

    def ready() -> None:
        if as_json:
            print_json({"ready": True, "address": home.address, "federation": home.fingerprint})
        else:
            click.echo(f"ready: federation {home.settings.federation} at {home.address}")

    supervise(home, stop, ready)
