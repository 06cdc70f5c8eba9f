"""`fedcmr site roster`: who is summed together with this site, and whether the file is the right one."""

from __future__ import annotations

from pathlib import Path

import click

from fedcmr_client.commands.policy_option import policy_option
from fedcmr_shared.cli import json_option, print_json, print_table
from fedcmr_shared.errors import ConfigurationError


@click.command()
@policy_option
@json_option
def roster(policy_path: Path, as_json: bool) -> None:
    """Show the sites and keys that the policy's roster pins, its threshold and its fingerprint.

    Compare the fingerprint with the other sites by telephone: a coordinator who could choose the
    keys could read every update. The exit code is 1 if the roster has not this site's own key.
    """
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
