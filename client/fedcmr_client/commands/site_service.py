"""`fedcmr site start`, `pause`, `resume`, `jobs`, `test-connection`: a site in its federation."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedcmr_client.commands.policy_option import policy_option
from fedcmr_client.commands.site_check import SHOWN
from fedcmr_shared.cli import json_option, print_json, print_table

if TYPE_CHECKING:
    from fedcmr_client.governance import ListedJob
    from fedcmr_client.site_home import SiteHome


@click.command()
@policy_option
@json_option
def start(policy_path: Path, as_json: bool) -> None:
    """Keep the site connected, until SIGTERM or Ctrl-C; for systemd, Docker or Kubernetes.

    Checks policy, ledger, store, membership and certificate first. Then it tries for ever to stay
    connected, and takes up the jobs that the policy allows. How it is: `fedcmr site status`.
    """
    from fedcmr_client.agent_settings import AgentSettings
    from fedcmr_client.site_home import SiteHome
    from fedcmr_client.site_log import agent_log
    from fedcmr_client.site_service import SiteService

    home = SiteHome.open(policy_path)
    settings = AgentSettings.load(home.folder)
    service = SiteService(home, settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: service.stop())
    with agent_log(settings):
        service.run()
    if as_json:
        print_json({"site": home.policy.site, "stopped": True})


@click.command("test-connection")
@policy_option
@json_option
def check_connection(policy_path: Path, as_json: bool) -> None:
    """Reach the coordinator once, as the agent would, and say what stands in the way if it fails."""
    from fedcmr_client.agent_settings import AgentSettings
    from fedcmr_client.site_home import SiteHome
    from fedcmr_client.tunnel import probe

    home = SiteHome.open(policy_path)
    membership = home.membership
    membership.require_joined()
    route = membership.route(AgentSettings.load(home.folder).forward_proxy())
    probe(route, membership.credentials())
    if as_json:
        print_json({"address": route.address, "reached": True})
    else:
        click.echo(
            f"{route.address} answers, and it is the coordinator of {membership.kit.federation}"
        )


@click.command()
@click.option("--reason", help="For the site's own eyes, in `fedcmr site status`.")
@policy_option
@json_option
def pause(reason: str | None, policy_path: Path, as_json: bool) -> None:
    """Begin nothing new; a running training stops after its current step and waits.

    The site stays connected, answers that it is paused, and still lets sums be opened in which it
    takes part already. What waits goes on unchanged after `fedcmr site resume`; a job does not
    wait for ever for this site.
    """
    from fedcmr_client.site_home import SiteHome

    found = SiteHome.open(policy_path).pause.pause(reason)
    if as_json:
        print_json({"paused": True, "since": found.since.isoformat(), "reason": found.reason})
    else:
        click.echo(
            f"paused since {found.since:%Y-%m-%d %H:%M} UTC; end it with: fedcmr site resume"
        )


@click.command()
@policy_option
@json_option
def resume(policy_path: Path, as_json: bool) -> None:
    """End the pause; what waits goes on within seconds."""
    from fedcmr_client.site_home import SiteHome

    was_paused = SiteHome.open(policy_path).pause.resume()
    if as_json:
        print_json({"paused": False, "was_paused": was_paused})
    else:
        click.echo("the site takes part again" if was_paused else "the site was not paused")


@click.command()
@click.option("--all", "everything", is_flag=True, help="Show jobs that are over, too.")
@policy_option
@json_option
def jobs(everything: bool, policy_path: Path, as_json: bool) -> None:
    """List what the coordinator announces, and what this site would answer today.

    Opens no data. For each rule of one job: `fedcmr site check`.
    """
    from fedcmr_client.announced import is_over
    from fedcmr_client.site_home import SiteHome
    from fedcmr_client.site_link import governance_of

    home = SiteHome.open(policy_path)
    with governance_of(home) as governance:
        announced = [job for job in governance.jobs() if everything or not is_over(job)]
    rows = [_job_row(home, job) for job in announced]
    if as_json:
        print_json(rows)
        return
    if not rows:
        click.echo("the coordinator announces no job")
        return
    shown = [
        {**row, "job": row["job"][:SHOWN], "answer": ", ".join(row["refused"]) or "takes part"}
        for row in rows
    ]
    columns = ("job", "name", "state", "rounds", "aggregation", "answer")
    print_table("Jobs of the coordinator", shown, columns)


def _job_row(home: SiteHome, announced: ListedJob) -> dict[str, Any]:
    from fedcmr_client.announced import refused_by

    job = announced.spec
    return {
        "job": job.sha256,
        "name": job.name,
        "state": announced.state,
        "rounds": job.rounds,
        "aggregation": job.aggregation,
        "refused": refused_by(home, announced),
    }
