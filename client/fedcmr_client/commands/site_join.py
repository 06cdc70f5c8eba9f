"""`fedcmr site request`, `join`, `renew` and `leave`: a site's way into a federation and out of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fedcmr_client.commands.policy_option import policy_option
from fedcmr_shared.cli import json_option, print_json, print_table
from fedcmr_shared.errors import ConfigurationError

if TYPE_CHECKING:
    from fedcmr_client.site_home import SiteHome
    from fedcmr_shared.identity.enrolment import EnrolmentRequest, StartupKit


@click.command()
@policy_option
@json_option
def request(policy_path: Path, as_json: bool) -> None:
    """Make the site's keys for a federation and the request to send to its coordinator.

    `fedcmr site init` does so for a new site. The keys stay in the folder `federation` beside the
    policy; the request holds their public halves only and may go by mail.
    """
    from fedcmr_client.site_home import SiteHome

    home = SiteHome.open(policy_path)
    asked = make_request(home)
    path = home.membership.request_path
    if as_json:
        print_json({"request": str(path), "fingerprint": asked.fingerprint})
    else:
        explain_request(path, asked)


def make_request(home: SiteHome) -> EnrolmentRequest:
    """Make the member keys of a site.

    Raises:
        ConfigurationError: it has some already.
        LedgerError: the site has no identity yet.
    """
    from fedcmr_shared.identity.certificates import Member

    member = Member("site", home.policy.site)
    return home.membership.create(
        home.membership.folder, member, home.identity(), with_node_key=True
    )


def explain_request(path: Path, asked: EnrolmentRequest) -> None:
    """Print what to do with a request."""
    click.echo(f"send {path} to the coordinator, and compare by telephone its fingerprint")
    click.echo(f"  {asked.fingerprint}")
    click.echo("when the startup kit comes back: fedcmr site join KIT")


@click.command()
@click.argument("kit", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--fingerprint",
    help="The federation's fingerprint, as the coordinator reads it out; asked for otherwise.",
)
@policy_option
@json_option
def join(kit: Path, fingerprint: str | None, policy_path: Path, as_json: bool) -> None:
    """Pin the federation of the startup kit KIT, once its fingerprint is known to be right.

    From then on this site believes that coordinator's signatures and no other ones, and the way to
    it goes to the kit's address only. What jobs may do is still the policy's alone.
    """
    from fedcmr_client.site_home import SiteHome
    from fedcmr_shared.identity.enrolment import StartupKit

    home = SiteHome.open(policy_path)
    membership, taken = home.membership, StartupKit.read(kit)
    membership.require_of(home.policy.site, home.identity())
    membership.check_kit(taken)
    _confirm(taken, fingerprint, may_ask=not as_json)
    membership.join(taken)
    until = f"{membership.certificate.not_valid_after_utc:%Y-%m-%d}"
    listed = taken.coordinator in home.policy.coordinators
    if as_json:
        print_json(
            {
                "federation": taken.federation,
                "coordinator": taken.coordinator,
                "fingerprint": taken.fingerprint,
                "certificate_until": until,
                "in_policy": listed,
            }
        )
        return
    click.echo(f"joined {taken.federation}; the certificate is valid until {until}")
    if not listed:
        click.echo(
            f"{policy_path} does not list {taken.coordinator} under coordinators: its jobs are "
            "refused until it does"
        )
    click.echo("next: fedcmr site roster fetch, and then fedcmr site start")


def same_digits(given: str, expected: str) -> bool:
    """Whether two fingerprints agree; blanks and case do not count."""
    return "".join(given.split()).lower() == "".join(expected.split()).lower()


def _confirm(kit: StartupKit, given: str | None, *, may_ask: bool) -> None:
    if given is not None:
        if not same_digits(given, kit.fingerprint):
            raise ConfigurationError(
                f"the kit's fingerprint is {kit.fingerprint}, not the one given: do not use this "
                "kit; ask the coordinator by telephone"
            )
        return
    if not may_ask:
        raise click.UsageError("give --fingerprint: with --json nothing is asked")
    facts = {
        "federation": kit.federation,
        "coordinator": kit.coordinator,
        "address": f"{kit.host}:{kit.port}",
        "fingerprint": kit.fingerprint,
    }
    rows = [{"what": what, "value": value} for what, value in facts.items()]
    print_table(f"Startup kit for {kit.member.name}", rows, ("what", "value"))
    question = "Does the coordinator read out the same fingerprint on the telephone?"
    if not click.confirm(question, default=False):
        click.echo("nothing was changed", err=True)
        sys.exit(1)


@click.command()
@click.option("--new-key", is_flag=True, help="Draw a new key, as when the old one may be known.")
@policy_option
@json_option
def renew(new_key: bool, policy_path: Path, as_json: bool) -> None:
    """Fetch a new certificate now; a running agent does so by itself in time.

    The agent need not be restarted. With a new key the old certificate still passes for some days:
    if the old key was stolen, have the coordinator revoke it.
    """
    from fedcmr_client.site_home import SiteHome
    from fedcmr_client.site_link import governance_of
    from fedcmr_client.site_sync import renew_certificate

    home = SiteHome.open(policy_path)
    with governance_of(home) as governance:
        renew_certificate(home, governance, new_key=new_key)
    until = f"{home.membership.certificate.not_valid_after_utc:%Y-%m-%d}"
    if as_json:
        print_json({"certificate_until": until})
    else:
        click.echo(f"the certificate is valid until {until}")


@click.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option(
    "--locally", is_flag=True, help="Do not tell the coordinator, as when it cannot be reached."
)
@policy_option
@json_option
def leave(yes: bool, locally: bool, policy_path: Path, as_json: bool) -> None:
    """Tell the coordinator that this site leaves, and stop taking part.

    A running agent stops. Ledger, keys and kit stay: what was spent stays spent, and auditors can
    still ask for evidence. To come back, ask the coordinator for a kit.
    """
    from fedcmr_client.site_home import SiteHome
    from fedcmr_client.site_link import governance_of

    home = SiteHome.open(policy_path)
    federation = home.membership.kit.federation
    if not yes:
        if as_json:
            raise click.UsageError("give --yes: with --json nothing is asked")
        click.confirm(f"Leave {federation}?", default=False, abort=True)
    if not locally:
        with governance_of(home) as governance:
            governance.leave()
    home.membership.leave()
    if as_json:
        print_json({"left": federation})
    else:
        click.echo(f"{home.policy.site} left {federation}; ledger, keys and kit are kept")
