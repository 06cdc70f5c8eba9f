"""`fedcmr coordinator`: the commands about jobs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from fedcmr_server.commands.coordinator_option import coordinator_option, opened
from fedcmr_shared.cli import json_option, print_json, print_table

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fedcmr_server.store import Store
    from fedcmr_server.store.tables import EventRow, JobRow
    from fedcmr_shared.schemas.job import JobSpec

_SHORT: Final = 12  # digits of a job's id that people see
_VALID_DAYS: Final = click.option(
    "--valid-days",
    default=90,
    type=click.IntRange(1, 365),
    help="Sites accept the job for so many days from now on.",
)
_SHOWN_EVENTS: Final = 12
_POLL_S: Final = 1.0


@click.command("new-job")
@click.option("--kind", default="cardiomm", help="Kind of model that the job trains.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="New file.")
@coordinator_option
@json_option
def new_job(kind: str, out: Path | None, folder: Path, as_json: bool) -> None:
    """Write a job that explains every field, to be edited and submitted."""
    from fedcmr_server.home import CoordinatorHome
    from fedcmr_server.job_template import job_template

    text = job_template(kind, CoordinatorHome.open(folder).settings.name)
    if out is not None:
        _write_new(out, text)
    if as_json:
        print_json({"kind": kind, "out": out, "job": text})
    elif out is None:
        click.echo(text, nl=False)
    else:
        click.echo(f"wrote {out}: edit it, then fedcmr coordinator submit {out}")


@click.command()
@click.argument("job_file", metavar="JOB.yaml", type=click.Path(path_type=Path))
@_VALID_DAYS
@click.option(
    "--start-from",
    type=click.Path(path_type=Path),
    help="Bundle or release whose weights the job begins with; else its seed gives them.",
)
@coordinator_option
@json_option
def submit(
    job_file: Path, valid_days: int, start_from: Path | None, folder: Path, as_json: bool
) -> None:
    """Sign a job and queue it; the running coordinator starts it.

    What it prints are the lines that each site's policy must allow.
    """
    from fedcmr_server import job_control
    from fedcmr_shared.schemas.job_files import read_job

    job = read_job(job_file)
    with opened(folder) as (home, store):
        row = job_control.submit(home, store, job, valid_days=valid_days, start_from=start_from)
    demands = job_control.demands(job)
    if as_json:
        needs = {demand.policy: demand.value for demand in demands}
        print_json({**_summary(row), "policy": needs})
        return
    click.echo(f"submitted {row.name} as {row.id[:_SHORT]}, valid for {valid_days} days")
    rows = [{"policy": demand.policy, "must allow": demand.value} for demand in demands]
    print_table("What each site's policy must allow", rows, ("policy", "must allow"))


@click.command()
@click.argument("job", required=False)
@coordinator_option
@json_option
def status(job: str | None, folder: Path, as_json: bool) -> None:
    """List all jobs, or show what happened in JOB, given by its name or the start of its id."""
    from fedcmr_server.store import Events, Jobs

    with opened(folder) as (_, store):
        if job is not None:
            row = Jobs(store).find(job)
            _print_job(row, store, Events(store).of(row.id), as_json)
            return
        rows = [_summary(row) | {"round": _last_round(store, row)} for row in Jobs(store).all()]
    if as_json:
        print_json(rows)
        return
    short = [{**row, "id": str(row["id"])[:_SHORT]} for row in rows]
    print_table("Jobs", short, ("id", "name", "state", "round", "submitted_at", "reason"))


@click.command()
@click.argument("job")
@coordinator_option
@json_option
@click.pass_context
def watch(context: click.Context, job: str, folder: Path, as_json: bool) -> None:
    """Show what happens in JOB until it ends; Ctrl-C ends the view alone.

    The exit code is 0 when it finished and 1 when it failed or was cancelled. With --json each
    event is one line.
    """
    from fedcmr_server.store import Jobs

    with opened(folder) as (_, store):
        row = Jobs(store).find(job)
        try:
            row = _watch(store, row, as_json)
        except KeyboardInterrupt:
            click.echo(
                f"{row.name} goes on without this view; fedcmr coordinator cancel "
                f"{row.id[:_SHORT]} ends it",
                err=True,
            )
            context.exit(130)
    if row.state != "finished":
        click.echo(f"{row.name} {row.state}: {row.reason or 'no reason given'}", err=True)
        context.exit(1)


@click.command()
@click.argument("job")
@coordinator_option
@json_option
def pause(job: str, folder: Path, as_json: bool) -> None:
    """Have JOB stop after the round that it is in."""
    from fedcmr_server import job_control
    from fedcmr_server.store import Jobs

    with opened(folder) as (_, store):
        row = job_control.pause(store, Jobs(store).find(job).id)
    _print_change(row, as_json)


@click.command()
@click.argument("job")
@_VALID_DAYS
@coordinator_option
@json_option
def resume(job: str, valid_days: int, folder: Path, as_json: bool) -> None:
    """Have JOB go on after a pause or failure; one whose time is over is signed anew."""
    from fedcmr_server import job_control
    from fedcmr_server.store import Jobs

    with opened(folder) as (home, store):
        known = Jobs(store).find(job)
        row, signed = job_control.resume(home, store, known.id, valid_days=valid_days)
        old_roster = job_control.has_old_roster(store, row)
    notes = [f"signed anew for {valid_days} days"] if signed else []
    if old_roster:
        notes.append(
            "the roster has changed since it was submitted: sites that pin the new one refuse it; "
            "cancel it and submit it with another seed if they do"
        )
    _print_change(row, as_json, notes)


@click.command()
@click.argument("job")
@click.option("--reason", help="Is kept with the job.")
@coordinator_option
@json_option
def cancel(job: str, reason: str | None, folder: Path, as_json: bool) -> None:
    """End JOB for ever; what its rounds cost the patients stays spent."""
    from fedcmr_server import job_control
    from fedcmr_server.store import Jobs

    with opened(folder) as (_, store):
        row = job_control.cancel(store, Jobs(store).find(job).id, reason)
    _print_change(row, as_json)


JOB_COMMANDS: Final[tuple[click.Command, ...]] = (
    new_job,
    submit,
    status,
    watch,
    pause,
    resume,
    cancel,
)
"""For the group `fedcmr coordinator`."""


def _write_new(path: Path, text: str) -> None:
    from fedcmr_shared.errors import ConfigurationError

    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise ConfigurationError(f"{path} exists: choose another name with --out") from error
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror}") from error


def _summary(row: JobRow) -> dict[str, Any]:
    from fedcmr_shared.schemas.signed_job import JobAuthorisation

    signed = row.authorisation and JobAuthorisation.model_validate_json(row.authorisation)
    return {
        "id": row.id,
        "name": row.name,
        "state": row.state,
        "reason": row.reason,
        "submitted_at": f"{row.submitted_at:%Y-%m-%d %H:%M} UTC",
        "valid_until": signed.not_after.isoformat() if signed else None,
    }


def _last_round(store: Store, row: JobRow) -> str:
    from fedcmr_server.job_control import spec_of
    from fedcmr_server.store import Rounds

    last = Rounds(store).latest(row.id)
    return f"{last.number if last else 0} of {spec_of(row).rounds}"


def _print_job(row: JobRow, store: Store, events: list[EventRow], as_json: bool) -> None:
    from fedcmr_server.job_control import OUTLOOK

    summary = _summary(row) | {"round": _last_round(store, row), "outlook": OUTLOOK[row.state]}
    if as_json:
        print_json({**summary, "events": [_as_values(event) for event in events]})
        return
    rows = [{"what": name, "value": value} for name, value in summary.items()]
    print_table(row.name, rows, ("what", "value"))
    for line in _lines(events):
        click.echo(line)


def _print_change(row: JobRow, as_json: bool, notes: Iterable[str] = ()) -> None:
    from fedcmr_server.job_control import OUTLOOK

    if as_json:
        print_json(_summary(row) | {"outlook": OUTLOOK[row.state], "notes": list(notes)})
        return
    click.echo(f"{row.name} ({row.id[:_SHORT]}) is {row.state}: {OUTLOOK[row.state]}")
    for note in notes:
        click.echo(note)


def _as_values(event: EventRow) -> dict[str, Any]:
    place = {"number": event.number, "at": event.at.isoformat(), "event": event.name}
    return {**event.content, **place}


def _lines(events: Iterable[EventRow]) -> list[str]:
    from fedcmr_server.job_events import event_text

    texts = ((event, event_text(event.name, event.content)) for event in events)
    return [f"{event.at:%Y-%m-%d %H:%M:%S}  {text}" for event, text in texts if text is not None]


def _watch(store: Store, row: JobRow, as_json: bool) -> JobRow:
    """Show the events until the job has ended, and return it as it is then."""
    from fedcmr_server.job_control import follow, spec_of

    job = spec_of(row)
    if sys.stdout.isatty() and not as_json:
        return _watch_live(store, row, job)
    for latest, events in follow(store, row.id, poll_s=_POLL_S):
        row = latest
        for text in map(_json_line, events) if as_json else _lines(events):
            click.echo(text)
            sys.stdout.flush()
    return row


def _json_line(event: EventRow) -> str:
    return json.dumps(_as_values(event), sort_keys=True)


def _watch_live(store: Store, row: JobRow, job: JobSpec) -> JobRow:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.text import Text

    from fedcmr_server.job_control import OUTLOOK, follow

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(*columns, TimeElapsedColumn())
    task = bar.add_task(f"{row.name}, rounds", total=job.rounds)
    lines: list[str] = []
    with Live(bar, console=Console(), refresh_per_second=4) as live:
        for latest, events in follow(store, row.id, poll_s=_POLL_S):
            row = latest
            lines += _lines(events)
            done = [e.content["round"] for e in events if e.name == "round"]
            if done:
                bar.update(task, completed=done[-1])
            head = Text(f"{row.state}: {OUTLOOK[row.state]}", style="bold")
            live.update(Group(bar, head, Text("\n".join(lines[-_SHOWN_EVENTS:]))))
    return row
