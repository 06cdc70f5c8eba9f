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
    known = None if kit is None else _read_kit(kit)
    release = ReleaseBundle.verify(file, trust or (known.coordinator_key if known else ""))
    if known is not None:
        _check_federation(release, known, file)
    rows = _verified(release)
    if as_json:
        checks = {row["checked"]: row["result"] for row in rows}
        card = release.card.model_dump(mode="json")
        print_json({"verified": True, "sha256": release.sha256, "checks": checks, "card": card})
    else:
        print_table(f"{file.name} is verified", rows, ("checked", "result"))


def _read_kit(path: Path) -> StartupKit:
    from fedcmr_shared.identity.enrolment import StartupKit

    return StartupKit.read(path)


def _check_federation(release: ReleaseBundle, kit: StartupKit, file: Path) -> None:
    from fedcmr_shared.errors import ModelError
    from fedcmr_shared.identity.certificates import fingerprint, read_certificate

    if release.card.federation_sha256 != fingerprint(read_certificate(kit.authority)):
        raise ModelError(
            f"release {file}: it is of another federation ({release.card.federation}) than the kit "
            f"({kit.federation})"
        )


def _verified(release: ReleaseBundle) -> list[dict[str, str]]:
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
