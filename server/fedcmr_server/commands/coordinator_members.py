"""`fedcmr coordinator enrol`, `revoke`, `leave`, `members`, `roster` and `token`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from fedcmr_server.commands.coordinator_option import coordinator_option, opened
from fedcmr_shared.cli import json_option, print_json, print_table
from fedcmr_shared.errors import ConfigurationError

if TYPE_CHECKING:
    from fedcmr_shared.identity.enrolment import EnrolmentRequest
    from fedcmr_shared.identity.roster_history import RosterVersion

_COLUMNS = ("name", "role", "state", "since", "certificate_ends", "seen", "warning")


@click.command()
@click.argument("request", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--kit",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to write for the member.  [default: NAME.kit.json]",
)
@click.option("--fingerprint", help="The request's, as the member read it out; asks if not given.")
@click.option(
    "--replace", metavar="REASON", help="Let the member have other keys or another certificate."
)
@coordinator_option
@json_option
def enrol(
    request: Path,
    kit: Path | None,
    fingerprint: str | None,
    replace: str | None,
    folder: Path,
    as_json: bool,
) -> None:
    """Make whoever sent the file REQUEST a member, and write its startup kit.

    Call the member before: the fingerprint that it reads out must be the one shown here.
    """
    from fedcmr_server.home import write_private
    from fedcmr_server.members import enrol as enrol_member
    from fedcmr_shared.identity.enrolment import EnrolmentRequest, file_text

    asked = EnrolmentRequest.read(request)
    _require_compared(asked, fingerprint, quiet=as_json)
    path = kit or Path(f"{asked.name}.kit.json")
    if path.exists() or not path.absolute().parent.is_dir():
        raise ConfigurationError(f"{path} exists, or its folder does not: choose with --kit")
    with opened(folder) as (home, store):
        enrolled = enrol_member(home, store, asked, replace)
    write_private(path.absolute(), file_text(enrolled.kit).encode())
    if as_json:
        values: dict[str, Any] = {"name": asked.name, "role": asked.role, "kit": path}
        values["fingerprint"] = enrolled.kit.fingerprint
        print_json({**values, "roster": _version_values(enrolled.roster)})
        return
    click.echo(f"{asked.role} {asked.name} is a member; send it {path}, which holds no secret")
    click.echo(f"fingerprint of the federation {enrolled.kit.fingerprint}")
    _show_change(enrolled.roster)


@click.command()
@click.argument("name")
@click.option("--reason", required=True, help="Why; the roster's history keeps it.")
@coordinator_option
@json_option
def revoke(name: str, reason: str, folder: Path, as_json: bool) -> None:
    """Throw the member NAME out: its next message is refused."""
    _end(folder, name, "revoked", reason, as_json)


@click.command()
@click.argument("name")
@click.option("--reason", default="left by its own wish", help="Why, for the roster's history.")
@coordinator_option
@json_option
def leave(name: str, reason: str, folder: Path, as_json: bool) -> None:
    """Note that the member NAME has left: its next message is refused."""
    _end(folder, name, "left", reason, as_json)


@click.command()
@coordinator_option
@json_option
def members(folder: Path, as_json: bool) -> None:
    """List everybody who is or was a member, and certificates that expire within 30 days."""
    from datetime import UTC, datetime

    from fedcmr_server.members import standings

    now = datetime.now(UTC)
    with opened(folder) as (_, store):
        rows = [
            {
                "name": each.member.name,
                "role": each.member.role,
                "state": each.member.state,
                "since": each.member.since,
                "reason": each.member.reason,
                "identity": each.member.identity,
                "certificate_ends": each.certificate and each.certificate.not_after,
                "seen": each.member.seen_at,
                "software": each.member.software,
                "warning": each.warning(now),
            }
            for each in standings(store)
        ]
    if as_json:
        print_json(rows)
        return
    shown = [{**row, **_short_times(row)} for row in rows]
    print_table("Members", shown, _COLUMNS)


@click.group()
def roster() -> None:
    """Show or renew the roster: the sites that are summed together."""


@roster.command()
@coordinator_option
@json_option
def show(folder: Path, as_json: bool) -> None:
    """Show the roster's versions; sites compare the newest fingerprint before they pin it."""
    from fedcmr_server.store import Rosters
    from fedcmr_shared.identity.roster_history import verify_history

    with opened(folder) as (home, store):
        history = Rosters(store).history()
        verify_history(history, home.identity().public_key)
    if as_json:
        print_json([_version_values(version) for version in history])
        return
    rows = [
        {
            "number": version.number,
            "at": f"{version.at:%Y-%m-%d %H:%M}",
            "sites": len(version.roster.sites),
            "reason": version.reason,
        }
        for version in history
    ]
    print_table("Roster", rows, ("number", "at", "sites", "reason"))
    if history:
        _show_newest(history[-1])


@roster.command()
@click.option("--reason", required=True, help="Why; the roster's history keeps it.")
@coordinator_option
@json_option
def propose(reason: str, folder: Path, as_json: bool) -> None:
    """Make the active sites the newest roster; enrolling and revoking do so by themselves."""
    from fedcmr_server.members import propose_roster

    with opened(folder) as (home, store):
        version = propose_roster(home, store, reason)
    if version is None:
        raise ConfigurationError(
            "no new roster: the active sites are those of the newest one, or fewer than three"
        )
    if as_json:
        print_json(_version_values(version))
    else:
        _show_change(version)


@click.command()
@click.option("--label", required=True, help="For whom it is; the access log says so.")
@coordinator_option
@json_option
def token(label: str, folder: Path, as_json: bool) -> None:
    """Print a link that opens the dashboard once, within an hour."""
    from fedcmr_server.members import dashboard_link

    with opened(folder) as (home, store):
        link = dashboard_link(home, store, label)
    if as_json:
        print_json({"link": link, "label": label})
    else:
        click.echo(link)


def _require_compared(asked: EnrolmentRequest, fingerprint: str | None, *, quiet: bool) -> None:
    if fingerprint is not None:
        if "".join(fingerprint.split()).lower() != "".join(asked.fingerprint.split()):
            raise ConfigurationError(
                "the request has another fingerprint than --fingerprint says: it is another "
                "file, or somebody changed it on the way; ask for it again"
            )
        return
    if quiet:
        raise ConfigurationError(
            "nobody compared the request's fingerprint: add --fingerprint with what the member "
            "reads out"
        )
    click.echo(f"{asked.role} {asked.name} asks to join; fingerprint of its request:")
    click.echo(f"  {asked.fingerprint}")
    click.confirm("Did the member read out exactly this?", abort=True)


def _end(
    folder: Path, name: str, state: Literal["revoked", "left"], reason: str, as_json: bool
) -> None:
    from fedcmr_server.members import end_membership

    with opened(folder) as (home, store):
        version = end_membership(home, store, name, state, reason)
    if as_json:
        print_json({"name": name, "state": state, "roster": _version_values(version)})
        return
    click.echo(f"{name} is no member any more: its next message is refused")
    _show_change(version)


def _version_values(version: RosterVersion | None) -> dict[str, Any] | None:
    if version is None:
        return None
    return {**version.model_dump(mode="json"), "fingerprint": version.roster.fingerprint}


def _show_change(version: RosterVersion | None) -> None:
    if version is None:
        click.echo("the roster stays as it is")
        return
    click.echo(f"roster version {version.number}: {version.reason}")
    _show_newest(version)


def _show_newest(version: RosterVersion) -> None:
    names = ", ".join(version.roster.names)
    click.echo(f"{version.roster.threshold} of {len(version.roster.sites)} sites: {names}")
    click.echo(f"fingerprint {version.roster.fingerprint}")


def _short_times(row: dict[str, Any]) -> dict[str, str]:
    times = {name: row[name] for name in ("since", "certificate_ends", "seen")}
    return {name: f"{at:%Y-%m-%d}" for name, at in times.items() if at is not None}
