"""`fedcmr site releases` and `fetch-release`: the models that jobs left, and the way to them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fedcmr_client.commands.policy_option import policy_option
from fedcmr_client.commands.site_check import SHOWN
from fedcmr_shared.cli import json_option, print_json, print_table
from fedcmr_shared.errors import DataError, FederationError, ModelError

if TYPE_CHECKING:
    from fedcmr_client.governance import Governance, ListedRelease
    from fedcmr_shared.identity.enrolment import StartupKit
    from fedcmr_shared.models.release import ReleaseBundle


@click.command()
@policy_option
@json_option
def releases(policy_path: Path, as_json: bool) -> None:
    """List the models that the coordinator has released.

    The list is what the coordinator says; `fedcmr site fetch-release` checks a model.
    """
    from fedcmr_client.site_home import SiteHome
    from fedcmr_client.site_link import governance_of

    with governance_of(SiteHome.open(policy_path)) as governance:
        names, listed = _job_names(governance), governance.releases()
    if as_json:
        print_json([{"name": names.get(each.job), **vars(each)} for each in listed])
        return
    if not listed:
        click.echo("the coordinator has released no model")
        return
    rows = [
        {
            "job": names.get(each.job),
            "id": each.job[:SHOWN],
            "released": f"{each.released_at:%Y-%m-%d %H:%M} UTC",
            "bytes": f"{each.bytes:,}",
            "SHA-256": each.sha256[:SHOWN],
        }
        for each in listed
    ]
    print_table("Releases of the coordinator", rows, ("job", "id", "released", "bytes", "SHA-256"))


@click.command("fetch-release")
@click.argument("job")
@click.option(
    "--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="New file."
)
@policy_option
@json_option
def fetch_release(job: str, out: Path, policy_path: Path, as_json: bool) -> None:
    """Download the released model of JOB, given by its name or the start of its id, and check it.

    It is checked like `fedcmr models verify` does, against the kit that this site has pinned. Until
    then nothing has the name of --out. A download that broke off goes on where it ended.
    """
    from fedcmr_client.site_home import SiteHome
    from fedcmr_client.site_link import governance_of
    from fedcmr_shared.commands.verify import checks

    if out.exists():
        raise DataError(f"{out} exists: choose another name with --out")
    home, unverified = SiteHome.open(policy_path), out.with_name(f".{out.name}.unverified")
    with governance_of(home) as governance:
        wanted = _find(governance, job)
        governance.fetch_release(wanted.job, unverified, wanted.sha256)
    try:
        release = _verified(unverified, home.membership.kit, wanted)
        os.replace(unverified, out)
    except ModelError as error:
        raise ModelError(f"{out} was not written: {error}") from error
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror}") from error
    finally:
        unverified.unlink(missing_ok=True)
    rows, name = checks(release), release.card.job.name
    if as_json:
        found = {row["checked"]: row["result"] for row in rows}
        summary = {"file": str(out), "name": name, "job": wanted.job, "sha256": release.sha256}
        print_json({**summary, "verified": True, "checks": found})
    else:
        print_table(f"{out} holds the model of {name} and is verified", rows, ("checked", "result"))


def _job_names(governance: Governance) -> dict[str, str]:
    return {job.spec.sha256: job.spec.name for job in governance.jobs()}


def _find(governance: Governance, text: str) -> ListedRelease:
    """Return the newest release of the one job whose id begins with ``text``, or that has it as name.

    Raises:
        FederationError: there is none, or there are several.
    """
    names = _job_names(governance)
    newest = {each.job: each for each in governance.releases()}
    found = [job for job in newest if (text and job.startswith(text)) or names.get(job) == text]
    if len(found) > 1:
        ids = ", ".join(sorted(job[:SHOWN] for job in found))
        raise FederationError(f"{text!r} fits the releases of several jobs: say which one: {ids}")
    if not found:
        raise FederationError(
            f"the coordinator lists no release of job {text!r}: see `fedcmr site releases`"
        )
    return newest[found[0]]


def _verified(path: Path, kit: StartupKit, wanted: ListedRelease) -> ReleaseBundle:
    from fedcmr_shared.commands.verify import verify_by_kit

    release = verify_by_kit(path, kit)
    if release.card.job_sha256 != wanted.job:
        raise ModelError(
            f"the coordinator sent the model of job {release.card.job_sha256[:SHOWN]}, not of "
            f"{wanted.job[:SHOWN]}: tell the coordinator"
        )
    return release
