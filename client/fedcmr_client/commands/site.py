"""`fedcmr site`: set up a site's policy and privacy ledger, look at them and keep them safe."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fedcmr_client.commands.policy_option import policy_option
from fedcmr_client.commands.site_check import SHOWN, check
from fedcmr_client.commands.site_energy import energy
from fedcmr_client.commands.site_evidence import export_evidence, hand_in
from fedcmr_client.commands.site_join import (
    explain_request,
    join,
    leave,
    make_request,
    renew,
    request,
)
from fedcmr_client.commands.site_plan import plan
from fedcmr_client.commands.site_releases import fetch_release, releases
from fedcmr_client.commands.site_roster import roster
from fedcmr_client.commands.site_service import check_connection, jobs, pause, resume, start
from fedcmr_client.commands.site_status import budget, find_job, open_site, status, trust_line
from fedcmr_shared.cli import json_option, print_json, print_table
from fedcmr_shared.errors import ConfigurationError, DataError, LedgerError

if TYPE_CHECKING:
    from fedcmr_client.site_home import SiteHome


@click.group()
def site() -> None:
    """Decide what jobs may do at this site, and see what they have spent."""


for _command in (
    *(plan, check, status, budget, energy, jobs),
    *(request, join, roster, renew, leave),
    *(start, check_connection, pause, resume),
    *(export_evidence, hand_in, releases, fetch_release),
):
    site.add_command(_command)


@site.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--store", required=True, type=click.Path(path_type=Path), help="Folder of the site store."
)
@click.option("--name", required=True, help="Public name of the site.")
@click.option(
    "--second-place",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder on another disk or share; it keeps the newest signed head of the ledger's log.",
)
@click.option("--epsilon", type=float, default=8.0, help="Most that a patient may cost, for ever.")
@click.option("--delta", type=float, default=1e-5, help="Delta of that epsilon.")
@click.option("--order", type=int, help="Order of the Rényi filter; the best one if not given.")
@click.option("--database-url", help="Keep the log in PostgreSQL; a URL without a password.")
@click.option("--coordinator", "coordinators", multiple=True, help="Work for this one; repeatable.")
@click.option(
    "--job", "jobs", multiple=True, help="Allow jobs of this name or pattern; repeatable."
)
@click.option("--model", "models", multiple=True, help="Allow NAME or NAME/SIZE; repeatable.")
@json_option
def init(
    folder: Path,
    store: Path,
    name: str,
    second_place: Path,
    epsilon: float,
    delta: float,
    order: int | None,
    database_url: str | None,
    as_json: bool,
    **allowed: tuple[str, ...],
) -> None:
    """Write FOLDER/policy.yaml, with every field explained, and make the privacy ledger.

    The budget is fixed from here on. Nobody is allowed until the policy names a coordinator, a job
    and a model. Beside it lie agent.yaml, how the agent runs here, and the folder federation with
    the site's keys and its request to join one.
    """
    from fedcmr_client.policy import order_of, parse_policy
    from fedcmr_client.site_home import SiteHome

    if not (store / "site.toml").is_file():
        raise DataError(f"{store} is no site store: import scans with `fedcmr data import` first")
    path = folder / "policy.yaml"
    content = {
        "site": name,
        "store": store.resolve(),
        "ledger": {
            "folder": (folder / "ledger").resolve(),
            "second_place": second_place.resolve(),
            "database_url": database_url,
        },
        "budget": {"epsilon": epsilon, "delta": delta, "order": order},
        **allowed,
    }
    policy = parse_policy(path, content)
    budget = policy.budget.model_copy(update={"order": order_of(policy)})
    home = SiteHome(policy.model_copy(update={"budget": budget}), path)
    _write_home(home)
    with home.open_ledger() as ledger:
        key = ledger.public_key
    asked, request_path = make_request(home), home.membership.request_path
    if as_json:
        made = {"policy": str(path), "site": name, "public_key": key, "order": budget.order}
        print_json({**made, "request": str(request_path), "fingerprint": asked.fingerprint})
        return
    click.echo(f"{path} says what jobs may do here: read it, then name who and what you allow")
    click.echo(f"give this line to your auditors: {trust_line(name, key)}")
    click.echo("to join a federation:")
    explain_request(request_path, asked)


@site.command()
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="Write it as JSON to this file."
)
@policy_option
@json_option
def checkpoint(out: Path | None, policy_path: Path, as_json: bool) -> None:
    """Show the newest checkpoint of the log that others may see.

    Its time and size follow the clock alone, so that they tell nothing about jobs.
    """
    from datetime import UTC, datetime

    _, ledger = open_site(policy_path)
    with ledger:
        newest = ledger.checkpoint()
    if out is not None:
        _write_new(out, newest.model_dump_json(indent=2) + "\n")
    if as_json:
        print_json(newest.model_dump(mode="json"))
        return
    at = datetime.fromtimestamp(newest.at / 1000, UTC).isoformat(timespec="seconds")
    facts = {"site": newest.site, "entries": newest.size, "time": at, "root": newest.root}
    rows = [{"what": what, "value": value} for what, value in facts.items()]
    print_table("Checkpoint", [*rows, {"what": "file", "value": out}], ("what", "value"))


@site.command()
@click.argument("target", type=click.Path(path_type=Path))
@policy_option
@json_option
def backup(target: Path, policy_path: Path, as_json: bool) -> None:
    """Copy the ledger, its key and the results of open jobs into the new folder TARGET.

    The copy holds the site's private key. It is good until the ledger grows: back up after each
    job, and never together with the second place.
    """
    _, ledger = open_site(policy_path)
    with ledger:
        ledger.backup(target)
        entries = ledger.head().size
    if as_json:
        print_json({"target": str(target), "entries": entries})
    else:
        click.echo(f"{target} holds a copy of the ledger's {entries} entries and its private key")


@site.command("second-place")
@click.option(
    "--ledger-is-newest",
    is_flag=True,
    help="Say that this ledger is no restored backup: an older one would forget charges.",
)
@policy_option
@json_option
def second_place(ledger_is_newest: bool, policy_path: Path, as_json: bool) -> None:
    """Write a second place that was lost for good anew."""
    from fedcmr_client.site_home import SiteHome

    if not ledger_is_newest:
        raise click.UsageError(
            "make sure that the ledger was not restored from a backup, then add --ledger-is-newest"
        )
    home = SiteHome.open(policy_path)
    home.restore_second_place()
    if as_json:
        print_json({"second_place": str(home.policy.ledger.second_place)})
    else:
        click.echo(f"{home.policy.ledger.second_place} keeps the ledger's newest head again")


@site.command("move-log")
@click.argument("database_url")
@policy_option
@json_option
def move_log(database_url: str, policy_path: Path, as_json: bool) -> None:
    """Copy the ledger's log into an empty database, such as one in PostgreSQL.

    Stop all training first. The copy is used once `ledger.database_url` in the policy names
    DATABASE_URL; the log where it was stays as it is and must not be used any more.
    """
    from dataclasses import replace

    from fedcmr_client.ledger.moving import copy_log

    _, ledger = open_site(policy_path)
    with ledger:
        entries = copy_log(ledger.place, replace(ledger.place, database_url=database_url))
    if as_json:
        print_json({"entries": entries})
    else:
        click.echo(
            f"{entries} entries are copied: set ledger.database_url in {policy_path}, run "
            "`fedcmr site status`, then move the old log away"
        )


@site.command("set-clock")
@policy_option
@json_option
def set_clock(policy_path: Path, as_json: bool) -> None:
    """Accept this machine's time although the ledger's last entry is from later.

    Only after the clock was wrong and has been set right; the ledger keeps an entry about it.
    """
    from datetime import UTC, datetime

    _, ledger = open_site(policy_path)
    with ledger:
        ledger.set_clock()
        time = datetime.fromtimestamp(ledger.budget.clock / 1000, UTC)
    text = time.isoformat(timespec="seconds")
    if as_json:
        print_json({"time": text})
    else:
        click.echo(f"the ledger goes on at {text}")


@site.command()
@click.argument("job")
@policy_option
@json_option
def cancel(job: str, policy_path: Path, as_json: bool) -> None:
    """Close JOB (its SHA-256 or how that begins) and release what it never started.

    What was started stays spent. The job cannot be admitted again. What it kept of patients,
    encrypted latents, is erased; repeating the command finishes that if it was cut off.
    """
    from fedcmr_client.latents import erase_job

    home, ledger = open_site(policy_path)
    with ledger:
        found = find_job(ledger, job)
        state = ledger.budget.jobs[found]
        if state.closed is not None:
            erase_job(home.latents_folder, found)
            raise LedgerError(f"job {found[:SHOWN]} is {state.closed} already: nothing to cancel")
        released = {phase: state.left(phase) for phase in state.admitted.phases}
        ledger.finish(found, "cancelled")
        erase_job(home.latents_folder, found)
    if as_json:
        print_json({"job": found, "name": state.admitted.name, "released": released})
    else:
        starts = ", ".join(f"{count} starts to {phase}" for phase, count in released.items())
        click.echo(f"{state.admitted.name} ({found[:SHOWN]}) is cancelled; released: {starts}")


def _write_home(home: SiteHome) -> None:
    """Write the policy and the agent's settings, then make the ledger; none is left alone."""
    from fedcmr_client import agent_settings
    from fedcmr_client.policy import policy_text

    try:
        home.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigurationError(f"{home.path.parent}: cannot be made: {error.strerror}") from error
    with ExitStack() as undo:
        _write_new(home.path, policy_text(home.policy))
        undo.callback(home.path.unlink)
        if home.membership.state != "absent":
            folder = home.membership.folder
            raise ConfigurationError(f"{folder} is of another site: move it away")
        settings = home.folder / agent_settings.FILE
        if not settings.exists():
            _write_new(settings, agent_settings.AgentSettings().text())
            undo.callback(settings.unlink)
        home.create_ledger().close()
        undo.pop_all()


def _write_new(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise ConfigurationError(f"{path} exists: move it away or choose another one") from error
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be written: {error.strerror}") from error
