"""`fedcmr models verify`: whether a released model is whole, and whose it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from fedcmr_shared.cli import json_option, print_json, print_table

if TYPE_CHECKING:
    from fedcmr_shared.identity.enrolment import StartupKit
    from fedcmr_shared.models.release import ReleaseBundle

_KEY: Final = re.compile(r"[0-9a-f]{64}")


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--trust", metavar="KEY", help="Public key of the coordinator, 64 digits.")
@click.option("--kit", type=click.Path(path_type=Path), help="Startup kit that names this key.")
@json_option
def verify(file: Path, trust: str | None, kit: Path | None, as_json: bool) -> None:
    """Check the release FILE: signature, every part of it, privacy claim, lineage and weights.

    Nothing that the file says of itself is believed: the key comes from you, the epsilon is
    computed again from the job. The exit code is 1 with the first thing that is wrong.
    """
    from fedcmr_shared.models.release import ReleaseBundle

    if (trust is None) == (kit is None):
        raise click.UsageError("give one of --trust KEY and --kit FILE: whom do you trust?")
    if trust is not None and not _KEY.fullmatch(trust):
        raise click.UsageError("--trust takes a public key: 64 hexadecimal digits, lower case")
    if kit is None:
        release = ReleaseBundle.verify(file, trust or "")
    else:
        release = verify_by_kit(file, _read_kit(kit))
    rows = checks(release)
    if as_json:
        found = {row["checked"]: row["result"] for row in rows}
        card = release.card.model_dump(mode="json")
        print_json({"verified": True, "sha256": release.sha256, "checks": found, "card": card})
    else:
        print_table(f"{file.name} is verified", rows, ("checked", "result"))


def verify_by_kit(file: Path, kit: StartupKit) -> ReleaseBundle:
    """Read the release of the coordinator and the federation that ``kit`` names.

    Raises:
        ModelError: with the first thing that is wrong.
    """
    from fedcmr_shared.errors import ModelError
    from fedcmr_shared.identity.certificates import fingerprint, read_certificate
    from fedcmr_shared.models.release import ReleaseBundle

    release = ReleaseBundle.verify(file, kit.coordinator_key)
    if release.card.federation_sha256 != fingerprint(read_certificate(kit.authority)):
        raise ModelError(
            f"release {file}: it is of another federation ({release.card.federation}) than the kit "
            f"({kit.federation})"
        )
    return release


def checks(release: ReleaseBundle) -> list[dict[str, str]]:
    """Return what was checked of a verified release, and with what result, in rows of a table."""
    from fedcmr_shared.models.card_text import privacy_sentence

    card, lineage = release.card, release.card.lineage
    gates = ", ".join(found.gate for found in card.gates)
    return [
        {"checked": name, "result": result}
        for name, result in (
            ("signature", f"by key {release.signature.key}, the one that you trust"),
            ("file", f"{release.size:,} bytes, SHA-256 {release.sha256}; all parts as signed"),
            ("job", f"{card.job.name} {card.job_sha256}, signed by the same key"),
            ("privacy", f"{privacy_sentence(card.privacy)} Computed again from the job."),
            ("lineage", f"{len(lineage.rounds)} rounds from {lineage.start.model_sha256}"),
            ("weights", f"{release.bundle.sha256}, the end of the lineage"),
            ("gates", f"{gates} passed" if gates else "none apply to this kind of model"),
        )
    ]


def _read_kit(path: Path) -> StartupKit:
    from fedcmr_shared.identity.enrolment import StartupKit

    return StartupKit.read(path)
