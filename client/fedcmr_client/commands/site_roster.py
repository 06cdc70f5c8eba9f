"""`fedcmr site roster`: who is summed together with this site, and how that is decided."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from fedcmr_client.commands.policy_option import policy_option
from fedcmr_shared.cli import json_option, print_json, print_table
from fedcmr_shared.errors import ConfigurationError

if TYPE_CHECKING:
    from fedcmr_client.roster_news import RosterNews
    from fedcmr_shared.identity.roster_history import RosterVersion


@click.group(invoke_without_command=True)
@policy_option
@json_option
@click.pass_context
def roster(context: click.Context, policy_path: Path, as_json: bool) -> None:
    """Show the sites and keys that the policy's roster pins, its threshold and its fingerprint.

    Compare the fingerprint with the other sites by telephone: a coordinator who could choose the
    keys could read every update. The exit code is 1 if the roster has not this site's own key.

    New versions: `fedcmr site roster fetch`, and then `accept`.
    """
    if context.invoked_subcommand is None:
        _show(policy_path, as_json)
    elif context.get_parameter_source("policy_path") is ParameterSource.COMMANDLINE or as_json:
        raise click.UsageError(f"give options after {context.invoked_subcommand}")


def _show(policy_path: Path, as_json: bool) -> None:
    from fedcmr_client.site_home import SiteHome

    home = SiteHome.open(policy_path)
    pinned, key = home.roster(), home.identity().public_key
    if pinned.sites.get(home.policy.site) != key:
        raise ConfigurationError(
            f"roster {home.policy.roster} does not list this site as it is: the line must read "
            f"{home.policy.site}: {key}"
        )
    if as_json:
        print_json({**pinned.model_dump(), "sha256": pinned.sha256, "site": home.policy.site})
        return
    rows = [{"site": name, "public key": pinned.sites[name]} for name in pinned.names]
    print_table("Sites that are summed together", rows, ("site", "public key"))
    click.echo(f"{pinned.threshold} of {len(rows)} sites open a sum")
    click.echo(f"fingerprint {pinned.fingerprint}")


@roster.command()
@policy_option
@json_option
def fetch(policy_path: Path, as_json: bool) -> None:
    """Download the roster's history, check the coordinator's signatures, and show what is new.

    Nothing is believed yet: the site goes on by the roster that it has accepted.
    """
    from fedcmr_client.roster_news import RosterNews
    from fedcmr_client.site_home import SiteHome
    from fedcmr_client.site_link import governance_of

    home = SiteHome.open(policy_path)
    news = RosterNews(home)
    with governance_of(home) as governance:
        news.take(governance.roster_history())
    newest = news.newest
    if newest is None:
        raise ConfigurationError("the federation has no roster yet: ask the coordinator")
    summary = _summary(news, newest)
    if as_json:
        print_json(summary)
        return
    rows = [
        {"version": version.number, "day": f"{version.at:%Y-%m-%d}", "reason": version.reason}
        for version in news.history
    ]
    print_table("The roster's versions", rows, ("version", "day", "reason"))
    if summary["accepted"]:
        click.echo(f"version {newest.number} is the one that this site goes by")
        return
    for line in summary["changes"]:
        click.echo(f"  {line}")
    click.echo("compare by telephone with the other sites, not with the coordinator:")
    click.echo(f"  {newest.roster.fingerprint}")
    click.echo('if it is the same everywhere: fedcmr site roster accept --fingerprint "…"')


@roster.command()
@click.option(
    "--fingerprint", required=True, help="What the other sites read out; blanks do not count."
)
@policy_option
@json_option
def accept(fingerprint: str, policy_path: Path, as_json: bool) -> None:
    """Go by the newest fetched version, if its fingerprint is the one that is given.

    Writes the file that the policy names under `roster`. Jobs of the former roster lose this site
    for their secure sums: accept between jobs.
    """
    from fedcmr_client.commands.site_join import same_digits
    from fedcmr_client.roster_news import RosterNews
    from fedcmr_client.site_home import SiteHome

    news = RosterNews(SiteHome.open(policy_path))
    newest = news.newest
    if newest is None:
        raise ConfigurationError("no roster was fetched yet: run `fedcmr site roster fetch`")
    if not same_digits(fingerprint, newest.roster.fingerprint):
        raise ConfigurationError(
            f"the fingerprint of version {newest.number} is {newest.roster.fingerprint}, not the "
            "one given: fetch again, and if it still differs the coordinator shows the sites "
            "different rosters"
        )
    summary = _summary(news, newest)
    path = news.accept(newest)
    if as_json:
        print_json({**summary, "accepted": True, "file": str(path)})
    else:
        click.echo(f"{path} holds version {newest.number}: {len(newest.roster.sites)} sites")


def _summary(news: RosterNews, newest: RosterVersion) -> dict[str, Any]:
    from fedcmr_shared.identity.roster_history import changes

    return {
        "version": newest.number,
        "reason": newest.reason,
        "changes": changes(news.accepted, newest.roster),
        "fingerprint": newest.roster.fingerprint,
        "accepted": news.waiting is None,
    }
