"""`fedcmr site export-evidence` and `hand-in`: what auditors check, and the way to them."""

from __future__ import annotations

from pathlib import Path

import click

from fedcmr_client.commands.policy_option import policy_option
from fedcmr_client.commands.site_status import find_job, open_site, trust_line
from fedcmr_shared.cli import json_option, print_json


@click.command("export-evidence")
@click.option(
    "--out",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to write the bundle to.",
)
@click.option("--job", help="Of this job alone: its SHA-256, or how that begins.")
@policy_option
@json_option
def export_evidence(out: Path, job: str | None, policy_path: Path, as_json: bool) -> None:
    """Write what an auditor needs to check the ledger, or one job, without believing the site.

    A bundle of the whole ledger shows every entry, but no patient and no pseudonym.
    """
    from fedcmr_client.evidence import build

    home, ledger = open_site(policy_path)
    with ledger:
        found = None if job is None else find_job(ledger, job)
        evidence = build(ledger, found)
    evidence.write(out)
    key = trust_line(home.policy.site, evidence.public_key)
    if as_json:
        summary = {"scope": evidence.scope, "job": found, "leaves": len(evidence.leaves)}
        print_json({"bundle": str(out), "public_key": evidence.public_key, **summary})
    else:
        click.echo(f"{out} holds {len(evidence.leaves)} leaves; auditors trust it by {key}")


@click.command("hand-in")
@click.argument("bundle", type=click.Path(dir_okay=False, path_type=Path))
@policy_option
@json_option
def hand_in(bundle: Path, policy_path: Path, as_json: bool) -> None:
    """Leave the evidence BUNDLE with the coordinator, where the federation's auditors fetch it.

    The coordinator reads it, too: every entry of the ledger, if the bundle is not of one job alone.
    """
    from fedcmr_client.site_home import SiteHome
    from fedcmr_client.site_link import governance_of

    with governance_of(SiteHome.open(policy_path)) as governance:
        digest = governance.put_evidence(bundle)
    if as_json:
        print_json({"sha256": digest})
    else:
        click.echo(f"the coordinator keeps {bundle} for auditors; its SHA-256 is {digest}")
