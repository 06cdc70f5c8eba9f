"""`fedcmr audit init`, `join` and `fetch`: an auditor's own way to what the coordinator keeps."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from fedcmr_shared.cli import json_option, print_json, print_table
from fedcmr_shared.errors import ConfigurationError, DataError, LedgerError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedcmr_client.governance import Governance, ListedRelease
    from fedcmr_client.membership import Membership
    from fedcmr_shared.identity.roster_history import RosterVersion
    from fedcmr_shared.models.refusal import ReleaseRefusal
    from fedcmr_shared.schemas.receipt import Receipt

_SHOWN: Final = 12  # digits of a hash in file names

_folder = click.argument("folder", type=click.Path(file_okay=False, path_type=Path))


@click.command()
@_folder
@click.option("--name", required=True, help="The auditor's name in the federation.")
@json_option
def init(folder: Path, name: str, as_json: bool) -> None:
    """Make an auditor's keys in FOLDER and the request to send to the coordinator."""
    from pydantic import TypeAdapter, ValidationError

    from fedcmr_client.ledger.place import make_folder
    from fedcmr_client.membership import Membership
    from fedcmr_shared.identity.certificates import Member
    from fedcmr_shared.identity.keys import SiteKey
    from fedcmr_shared.schemas.policy import SiteName

    try:
        TypeAdapter(SiteName).validate_python(name)
    except ValidationError as error:
        raise ConfigurationError(
            f"--name {name!r}: use letters, digits, dots and hyphens, such as audit-office"
        ) from error
    try:
        make_folder(folder)
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be made: {error.strerror}") from error
    key = folder / "identity.pem"
    identity = SiteKey.load(key) if key.exists() else SiteKey.create(key)
    asked = Membership.create(folder, Member("auditor", name), identity, with_node_key=False)
    path = Membership(folder).request_path
    if as_json:
        print_json({"request": str(path), "fingerprint": asked.fingerprint})
        return
    click.echo(f"send {path} to the coordinator, and compare by telephone its fingerprint")
    click.echo(f"  {asked.fingerprint}")
    click.echo(f"when the startup kit comes back: fedcmr audit join {folder} KIT --fingerprint …")


@click.command()
@_folder
@click.argument("kit", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--fingerprint",
    required=True,
    help="The federation's fingerprint, as the coordinator reads it out on the telephone.",
)
@json_option
def join(folder: Path, kit: Path, fingerprint: str, as_json: bool) -> None:
    """Pin the federation of the startup kit KIT for the auditor in FOLDER."""
    from fedcmr_client.commands.site_join import same_digits
    from fedcmr_shared.identity.enrolment import StartupKit

    membership, taken = _auditor(folder), StartupKit.read(kit)
    if not same_digits(fingerprint, taken.fingerprint):
        raise ConfigurationError(
            f"the kit's fingerprint is {taken.fingerprint}, not the one given: do not use this "
            "kit; ask the coordinator by telephone"
        )
    membership.join(taken)
    until = f"{membership.certificate.not_valid_after_utc:%Y-%m-%d}"
    if as_json:
        print_json({"federation": taken.federation, "certificate_until": until})
        return
    click.echo(f"joined {taken.federation}; the certificate is valid until {until}")
    click.echo(f"next: fedcmr audit fetch {folder} --out DIR")


@click.command()
@_folder
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to write to; what it holds already is not fetched again.",
)
@click.option(
    "--proxy", help="Forward proxy on the way out, as http://HOST:PORT; none when not given."
)
@json_option
def fetch(folder: Path, out: Path, proxy: str | None, as_json: bool) -> None:
    """Download evidence, checkpoints, receipts, jobs, roster, lists of releases and refusals to DIR.

    The roster, the receipts and the refusals are checked here; evidence is for `fedcmr audit
    verify`, with keys that the sites themselves gave you.
    """
    from fedcmr_client.site_link import governance_as
    from fedcmr_client.tunnel import Proxy

    membership = _auditor(folder)
    with governance_as(membership, None if proxy is None else Proxy.parse(proxy)) as governance:
        counts = _fetch_all(governance, membership.pinned, out)
    if as_json:
        print_json({"folder": str(out), **counts})
        return
    rows = [{"what": what, "number": number} for what, number in counts.items()]
    print_table(f"Fetched to {out}", rows, ("what", "number"))
    click.echo(f"next: fedcmr audit verify {out}/evidence/FILE --trust KEYS.toml")


def _auditor(folder: Path) -> Membership:
    from fedcmr_client.membership import Membership

    membership = Membership(folder)
    if membership.state == "absent":
        raise ConfigurationError(
            f"{folder} is no auditor's folder: make one with `fedcmr audit init`"
        )
    if membership.member.role != "auditor":
        raise ConfigurationError(f"{folder} is that of a {membership.member.role}, not an auditor")
    return membership


def _fetch_all(governance: Governance, pinned: tuple[str, str], out: Path) -> dict[str, int]:
    """Write everything below ``out``; return how many there are of each kind.

    ``pinned`` holds the SHA-256 of the federation's authority and the coordinator's public key.
    """
    from fedcmr_shared.identity.roster_history import verify_history

    history = governance.roster_history()
    verify_history(history, pinned[1])
    jobs, releases = governance.jobs(), governance.releases()
    refusals, withheld = _refusals(governance, pinned, out / "refusals.json")
    _write(out / "roster.json", [version.model_dump(mode="json") for version in history])
    _write(out / "jobs.json", [_job(job) for job in jobs])
    _write(out / "releases.json", [asdict(release) for release in releases])
    _write(out / "refusals.json", [refusal.model_dump(mode="json") for refusal in refusals])
    counts = {"roster versions": len(history), "jobs": len(jobs), "releases": len(releases)}
    counts["refusals"] = len(refusals)
    counts["checkpoints"] = sum(
        _fetch_checkpoints(governance, site, out) for site in sorted(_keys(history))
    )
    counts["receipts"] = sum(
        _fetch_receipts(governance, job.spec.sha256, _keys(history), out) for job in jobs
    )
    counts["evidence"] = _fetch_evidence(governance, out)
    # Last, so that the auditor holds both lists and all the rest when they contradict each other.
    _require_kept_back(refusals, releases, out)
    _require_listed(withheld, out)
    return counts


def _refusals(
    governance: Governance, pinned: tuple[str, str], path: Path
) -> tuple[list[ReleaseRefusal], list[ReleaseRefusal]]:
    """Return all refusals, and those of an earlier call that are not listed any more."""
    listed = governance.refusals()
    withheld = [held for held in _held_refusals(path) if held not in listed]
    for refusal in (found := [*withheld, *listed]):
        _require_refusal(refusal, pinned)
    return found, withheld


def _held_refusals(path: Path) -> list[ReleaseRefusal]:
    """Return what an earlier call wrote; the auditor keeps it whatever the coordinator lists."""
    from pydantic import TypeAdapter, ValidationError

    from fedcmr_shared.models.refusal import ReleaseRefusal

    try:
        return TypeAdapter(list[ReleaseRefusal]).validate_json(path.read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, ValidationError) as error:
        raise DataError(f"{path} holds no refusals that can be read: move it away") from error


def _require_refusal(refusal: ReleaseRefusal, pinned: tuple[str, str]) -> None:
    try:
        refusal.verify(pinned)
    except LedgerError as error:
        what = f"refusal of job {refusal.job_sha256[:_SHOWN]} by {refusal.gate.gate}"
        raise LedgerError(f"{what}: {error}") from error


def _require_kept_back(
    refusals: Sequence[ReleaseRefusal], releases: Sequence[ListedRelease], out: Path
) -> None:
    """Refuse a coordinator that released what a gate had kept back."""
    released = {release.job: release for release in releases}
    for refusal in refusals:
        found = released.get(refusal.job_sha256)
        if found is not None:
            raise LedgerError(
                f"job {refusal.job_sha256[:_SHOWN]}: the gate {refusal.gate.gate} refused its "
                f"release on {refusal.refused_at:%Y-%m-%d}, and it was released on "
                f"{found.released_at:%Y-%m-%d}: keep {out}/refusals.json and {out}/releases.json, "
                "and ask the coordinator why"
            )


def _require_listed(withheld: Sequence[ReleaseRefusal], out: Path) -> None:
    for refusal in withheld:
        raise LedgerError(
            f"job {refusal.job_sha256[:_SHOWN]}: the coordinator no longer lists a refusal that it "
            f"signed on {refusal.refused_at:%Y-%m-%d}: keep {out}/refusals.json, which still holds "
            "it, and ask the coordinator why"
        )


def _fetch_checkpoints(governance: Governance, site: str, out: Path) -> int:
    found = governance.checkpoints(site)
    content = {
        "published": [each.checkpoint.model_dump(mode="json") for each in found.published],
        "refused": [each.model_dump(mode="json") for each in found.refused],
    }
    _write(out / "checkpoints" / f"{site}.json", content)
    return len(found.published)


def _fetch_receipts(governance: Governance, job: str, keys: dict[str, set[str]], out: Path) -> int:
    found = governance.receipts(job)
    for receipt in found:
        _require_receipt(receipt, job, keys.get(receipt.site, set()))
    _write(out / "receipts" / f"{job}.json", [each.model_dump(mode="json") for each in found])
    return len(found)


def _require_receipt(receipt: Receipt, job: str, keys: set[str]) -> None:
    if receipt.job != job:
        raise LedgerError(f"the coordinator shows a receipt of another job for {job[:_SHOWN]}")
    for key in keys:
        try:
            receipt.verify(key)
        except LedgerError:
            continue
        return
    raise LedgerError(
        f"receipt of site {receipt.site} for job {job[:_SHOWN]}, {receipt.phase} round "
        f"{receipt.round}: no key that the site had on the roster signed it"
    )


def _fetch_evidence(governance: Governance, out: Path) -> int:
    found = governance.evidence()
    folder = out / "evidence"
    _make(folder)
    for entry in found:
        scope = entry.job[:_SHOWN] if entry.job else "ledger"
        path = folder / f"{entry.site}-{scope}-{entry.leaves}-{entry.sha256[:_SHOWN]}.json"
        if not path.exists():
            governance.fetch_evidence(entry, path)
    return len(found)


def _keys(history: Sequence[RosterVersion]) -> dict[str, set[str]]:
    """Return all keys that each site ever had on the roster."""
    keys: dict[str, set[str]] = {}
    for version in history:
        for site, key in version.roster.sites.items():
            keys.setdefault(site, set()).add(key)
    return keys


def _job(job: Any) -> dict[str, Any]:
    signed = job.authorisation
    return {
        "job": job.spec.sha256,
        "spec": job.spec.model_dump(mode="json"),
        "authorisation": None if signed is None else signed.model_dump(mode="json"),
        "state": job.state,
        "roster_sha256": job.roster_sha256,
    }


def _write(path: Path, content: object) -> None:
    from fedcmr_client.ledger.place import write_durably

    _make(path.parent)
    try:
        write_durably(path, json.dumps(content, indent=1, default=str).encode() + b"\n")
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}") from error


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder} cannot be made: {error.strerror}") from error
