"""`fedcmr data`: import scans into a site store, list, show, verify, divide and erase them."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

import click

from fedcmr_shared.cli import json_option, print_json, print_table
from fedcmr_shared.errors import ConfigurationError, DataError

if TYPE_CHECKING:
    from fedcmr_client.importers import ImportSummary
    from fedcmr_client.site_home import SiteHome
    from fedcmr_client.store.site_store import Problem, ScanRecord, SiteStore
    from fedcmr_client.store.split import Split

store_option: Callable[[Callable[..., Any]], Callable[..., Any]] = click.option(
    "--store",
    "root",
    required=True,
    envvar="FEDCMR_STORE",
    show_envvar=True,
    type=click.Path(path_type=Path),
    help="Folder of the site store.",
)
name_option: Callable[[Callable[..., Any]], Callable[..., Any]] = click.option(
    "--name",
    "by_name",
    is_flag=True,
    help="PATIENT is the name in the files, after the patient map, not a pseudonym.",
)

_CANNOT_UNDO: Final = (
    "models already trained keep what they learned, under the privacy of their jobs",
    "updates and scores of earlier rounds stay with those who got them and may be sent again",
    "backups of the store, and the files that were imported: erase the patient there yourself",
)


@click.group()
def data() -> None:
    """Keep a site's scans: they stay in the store and never leave the site.

    The catalogue is a SQLite file in the store. To keep it in PostgreSQL, set the environment
    variable FEDCMR_CATALOGUE_URL to postgresql+psycopg://USER:PASSWORD@HOST/DATABASE when the
    store is made; the store remembers the URL without its password.
    """


@data.command("import")
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@store_option
@click.option("--format", "format_", default="auto", help="Importer, or auto to recognise files.")
@click.option("--patient", help="Name of the one patient that all files belong to.")
@click.option(
    "--patient-map",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="CSV file, columns name,patient: which patient a name in the files stands for.",
)
@click.option("--modality", help="Where a file does not say; as --set modality=…")
@click.option("--view", help="Where a file does not say; as --set view=…")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Metadata where a file does not say; repeatable. Lists: pixel_spacing_mm=1.4,1.4",
)
@click.option("--label-names", help="Names of label values in NIfTI, from 0 on, with commas.")
@click.option("--coils", type=int, default=8, help="Coils of k-space synthesised from images.")
@click.option("--snr", type=float, default=30.0, help="Signal to noise of synthesised k-space.")
@click.option("--seed", type=int, default=0, help="Of the noise of synthesised k-space.")
@click.option(
    "--acquired-fraction",
    nargs=2,
    type=float,
    default=(0.75, 0.75),
    help="Acquired part of an image matrix, phase and readout, where no header says so.",
)
@click.option(
    "--consent",
    type=click.Choice(["given", "refused"]),
    help="What these patients decided; a refusal on record stays. Unknown when left out.",
)
@json_option
def import_(
    path: Path,
    root: Path,
    format_: str,
    patient: str | None,
    patient_map: Path | None,
    modality: str | None,
    view: str | None,
    settings: tuple[str, ...],
    label_names: str | None,
    coils: int,
    snr: float,
    seed: int,
    acquired_fraction: tuple[float, float],
    consent: str | None,
    as_json: bool,
) -> None:
    """Import the file PATH, or everything below the folder PATH; a new store is made if needed.

    Patients get keyed pseudonyms. Samples that the store holds already are skipped. The exit code
    is 1 when nothing was imported or anything failed.
    """
    from fedcmr_client.importers import IMPORTERS, ImportOptions, import_path

    formats = ["auto", *(importer.name for importer in IMPORTERS)]
    if format_ not in formats:
        raise click.BadParameter(f"choose one of {', '.join(formats)}", param_hint="--format")
    options = ImportOptions(
        patient=patient,
        patient_map=_read_patient_map(patient_map) if patient_map else {},
        metadata=_parse_settings(settings, modality=modality, view=view),
        label_names=tuple(name.strip() for name in label_names.split(",")) if label_names else (),
        coils=coils,
        snr=snr,
        seed=seed,
        acquired_fraction=acquired_fraction,
        consent=None if consent is None else consent == "given",
    )
    with _open_or_create(root) as store:
        summary = import_path(store, path, format_, options)
    if as_json:
        print_json(summary.to_json())
    else:
        _print_import(summary, root)
    if summary.failed or not summary.imported:
        sys.exit(1)


@data.command("list")
@store_option
@click.option("--split", type=click.Choice(["train", "validation", "test"]), help="One part only.")
@click.option("--modality", "modalities", multiple=True, help="These only; repeatable.")
@json_option
def list_(root: Path, split: Split | None, modalities: tuple[str, ...], as_json: bool) -> None:
    """List the scans, sorted by patient."""
    from fedcmr_client.store.site_store import SiteStore

    with SiteStore.open(root) as store:
        records = store.scans(split, modalities or None)
    if as_json:
        print_json([_as_json(record) for record in records])
        return
    rows = [{**vars(record), **_described(record)} for record in records]
    columns = ("scan_id", "patient", "split", "consent", "modality", "view", "scanner", "size")
    print_table(f"{len(records)} scans in {root}", rows, (*columns, "origin"))


@data.command()
@click.argument("scan")
@store_option
@json_option
def show(scan: str, root: Path, as_json: bool) -> None:
    """Show all that is known about SCAN (a scan id of `data list`), and what is missing."""
    from fedcmr_client.store.scan_file import ScanFile
    from fedcmr_client.store.site_store import SiteStore

    with SiteStore.open(root) as store:
        record = store.scan(scan)
    with ScanFile(record.path) as file:
        truth = file.truth
    phenotypes = dict(truth.phenotypes) if truth is not None else {}
    label_names = list(truth.label_names) if truth is not None else []
    if as_json:
        print_json({**_as_json(record), "phenotypes": phenotypes, "label_names": label_names})
        return
    known = record.metadata.model_dump(exclude={"missing"}, exclude_none=True)
    facts = {
        "patient": record.patient,
        "split": record.split,
        "consent": _consent(record),
        "file": record.path,
        "digest": record.digest,
        **known,
        "missing": ", ".join(record.metadata.missing) or None,
        **{f"truth: {name}": value for name, value in sorted(phenotypes.items())},
        "truth: labels": ", ".join(label_names) or None,
    }
    rows = [{"what": name, "value": value} for name, value in facts.items()]
    print_table(f"scan {record.scan_id} ({record.metadata.origin})", rows, ("what", "value"))


@data.command()
@store_option
@json_option
def verify(root: Path, as_json: bool) -> None:
    """Hash all scans again; name corrupt, missing and stray files. Exit code 1 if there are any."""
    from fedcmr_client.store.site_store import SiteStore

    with SiteStore.open(root) as store:
        records = store.scans()
        problems = [*_check_scans(store, records), *store.strays()]
    rows = [{"kind": p.kind, "file": str(p.path), "message": p.message} for p in problems]
    if as_json:
        print_json({"scans": len(records), "problems": rows})
    elif rows:
        print_table(f"{len(rows)} problems in {root}", rows, ("kind", "file", "message"))
    else:
        click.echo(f"{root}: all {len(records)} scans are as they were imported")
    if rows:
        sys.exit(1)


@data.command()
@store_option
@click.option("--train", type=float, help="Share of the patients.")
@click.option("--validation", type=float, help="Share of the patients.")
@click.option("--test", type=float, help="Share of the patients.")
@json_option
def split(
    root: Path, train: float | None, validation: float | None, test: float | None, as_json: bool
) -> None:
    """Divide the patients into parts, or show the parts when no share is given.

    A keyed hash places each patient, so that patients stay where they are when others are added
    and all scans of a patient are in the same part. Shares are therefore met on average only.
    """
    from fedcmr_client.store.site_store import SiteStore
    from fedcmr_client.store.split import SplitFractions

    shares = (train, validation, test)
    if None in shares and any(share is not None for share in shares):
        raise click.UsageError("give all of --train, --validation and --test, or none of them")
    with SiteStore.open(root) as store:
        if train is not None and validation is not None and test is not None:
            try:
                fractions = SplitFractions(train, validation, test)
            except ConfigurationError as error:
                raise click.UsageError(str(error)) from error
            store.set_split(fractions)
        fractions, counts = store.split_fractions, store.split_counts()
    empty = [name for name, count in counts.items() if not count and getattr(fractions, name) > 0]
    if as_json:
        print_json({"fractions": vars(fractions), "patients": counts, "empty": empty})
    else:
        rows = [
            {"part": name, "share": getattr(fractions, name), "patients": count}
            for name, count in counts.items()
        ]
        print_table(f"patients in {root}", rows, ("part", "share", "patients"))
    for name in empty:
        click.echo(f"warning: no patient is in the {name} part: change the shares", err=True)


@data.command()
@click.argument("patients", metavar="[PATIENT]...", nargs=-1)
@store_option
@name_option
@click.option("--given/--refused", default=None, help="What the patients decided.")
@click.option(
    "--file", "listed", type=click.File(), help="Text file, one PATIENT a line; - for the input."
)
@json_option
def consent(
    patients: tuple[str, ...],
    root: Path,
    by_name: bool,
    given: bool | None,
    listed: TextIO | None,
    as_json: bool,
) -> None:
    """Record whether each PATIENT consents: all of them, or none when one is unknown.

    No job uses a patient who refused; whether one whose consent is unknown may be used is for the
    site's policy to say.
    """
    from fedcmr_client.store.site_store import SiteStore

    if given is None:
        raise click.UsageError("say what the patients decided: --given or --refused")
    wanted = [*patients, *_read_lines(listed)]
    if not wanted:
        raise click.UsageError("name at least one PATIENT, or give a list with --file")
    with SiteStore.open(root) as store:
        chosen = {store.pseudonym(name) if by_name else name for name in wanted}
        store.set_consent(chosen, given)
    decision = "given" if given else "refused"
    if as_json:
        print_json({"consent": decision, "patients": sorted(chosen)})
    else:
        click.echo(f"{root}: consent {decision} by {len(chosen)} patients")


@data.command()
@click.argument("patient")
@store_option
@name_option
@click.option(
    "--policy",
    envvar="FEDCMR_POLICY",
    show_envvar=True,
    type=click.Path(path_type=Path),
    help="Policy of the site, which says where its privacy ledger is; policy.yaml in the current "
    "folder if there is one.",
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def withdraw(
    patient: str, root: Path, by_name: bool, policy: Path | None, yes: bool, as_json: bool
) -> None:
    """Erase all scans of PATIENT for good; nothing of them is imported or used again.

    The ledger keeps what the patient was charged and leaves them out of every later job. What
    running jobs keep of their scans, encrypted latents, is erased, too. The command can be
    repeated, which finishes a withdrawal that was cut off.
    """
    from contextlib import ExitStack

    from fedcmr_client.latents import erase_patient
    from fedcmr_client.store.site_store import SiteStore

    here = Path("policy.yaml")
    policy = policy or (here if here.exists() else None)
    with ExitStack() as stack:
        store = stack.enter_context(SiteStore.open(root))
        pseudonym = store.pseudonym(patient) if by_name else patient
        scans = store.scans_of(pseudonym)
        home = None if policy is None else _site_of(policy, root)
        ledger = None if home is None else stack.enter_context(home.open_ledger())
        question = f"Erase {len(scans)} scans of {pseudonym}? This cannot be undone"
        if not (yes or click.confirm(question, err=True)):
            raise DataError(f"{pseudonym}: not confirmed, nothing was changed")
        # The ledger comes first: from here on no job can use the patient, whatever happens next.
        if ledger is not None:
            ledger.withdraw(pseudonym)
        # Then the scans, of which a round that runs now would make latents. These go even where a
        # scan cannot be erased.
        try:
            erased = store.withdraw(pseudonym)
        finally:
            if home is not None:
                erase_patient(home.latents_folder, pseudonym)
    _print_withdrawal(pseudonym, erased, policy, as_json=as_json)


def _site_of(policy: Path, root: Path) -> SiteHome:
    from fedcmr_client.site_home import SiteHome

    home = SiteHome.open(policy)
    if home.policy.store != root.resolve():
        message = f"use the --store of the policy, {home.policy.store}"
        raise ConfigurationError(f"policy {policy} is not that of {root}: {message}")
    return home


def _print_withdrawal(patient: str, scans: int, policy: Path | None, *, as_json: bool) -> None:
    if as_json:
        found = None if policy is None else str(policy)
        values = {"patient": patient, "scans": scans, "policy": found, "not_undone": _CANNOT_UNDO}
        print_json(values)
        return
    click.echo(f"{patient}: {scans} scans erased")
    if policy is None:
        click.echo("No ledger was touched. Does the site have one? Repeat this with its --policy.")
    else:
        click.echo("The ledger keeps the charges and leaves the patient out of every later job.")
        click.echo("Latents that running jobs kept of the patient are erased.")
    click.echo("This cannot undo:")
    for line in _CANNOT_UNDO:
        click.echo(f"- {line}")


def _read_lines(file: TextIO | None) -> list[str]:
    if file is None:
        return []
    try:
        return [line.strip() for line in file if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"{file.name}: not a text file with one patient a line") from error


def _open_or_create(root: Path) -> SiteStore:
    from fedcmr_client.store.site_store import SiteStore

    if (root / "site.toml").exists():
        return SiteStore.open(root)
    if root.is_dir() and any(root.iterdir()):
        raise DataError(f"{root} is neither a site store nor empty: choose another --store")
    return SiteStore.create(root)


def _read_patient_map(path: Path) -> dict[str, str]:
    import csv

    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            header, *lines = csv.reader(file)
        except (ValueError, csv.Error) as error:  # an empty file, wrong text
            raise DataError(f"{path}: not a CSV file with the columns name,patient") from error
    if [column.strip() for column in header] != ["name", "patient"]:
        raise DataError(f"{path}: the first line must be name,patient")
    names: dict[str, str] = {}
    for number, line in enumerate(lines, start=2):
        fields = [field.strip() for field in line]
        if not any(fields):
            continue
        if len(fields) != 2 or not all(fields):
            raise DataError(f"{path}: line {number} must hold a name and a patient")
        if names.setdefault(fields[0], fields[1]) != fields[1]:
            raise DataError(f"{path}: line {number} gives a name a second patient")
    return names


def _parse_settings(settings: Iterable[str], **named: str | None) -> dict[str, Any]:
    values: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not (name and equals and value):
            raise click.BadParameter(f"{setting!r} is not FIELD=VALUE", param_hint="--set")
        if name in values:
            raise click.BadParameter(f"{name} is given twice", param_hint="--set")
        listed = name in {"diseases", "pixel_spacing_mm"}
        values[name] = [part.strip() for part in value.split(",")] if listed else value
    return values


def _print_import(summary: ImportSummary, root: Path) -> None:
    rows = [vars(row) for row in summary.rows if row.outcome != "ignored"]
    if rows:
        print_table(f"import into {root}", rows, ("file", "outcome", "scan_id", "reason"))
    click.echo(
        f"{summary.imported} imported, {summary.skipped} skipped, "
        f"{summary.failed} failed, {summary.ignored} other files ignored"
    )
    notes = Counter(warning for row in summary.rows for warning in row.warnings)
    for note, count in sorted(notes.items()):
        click.echo(f"warning ({count} scans): {note}", err=True)


def _check_scans(store: SiteStore, records: list[ScanRecord]) -> list[Problem]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    silent = not sys.stderr.isatty()
    checks = track(records, "Hashing scans", console=console, disable=silent, transient=True)
    found = (store.check_scan(record) for record in checks)
    return [problem for problem in found if problem is not None]


def _as_json(record: ScanRecord) -> dict[str, Any]:
    metadata = record.metadata.model_dump(mode="json")
    return {
        **vars(record),
        "consent": _consent(record),
        "path": str(record.path),
        "metadata": metadata,
    }


def _consent(record: ScanRecord) -> str | None:
    return None if record.consent is None else "given" if record.consent else "refused"


def _described(record: ScanRecord) -> dict[str, Any]:
    m = record.metadata
    field = None if m.field_strength_t is None else f"{m.field_strength_t:g} T"
    return {
        "consent": _consent(record),
        "modality": m.modality,
        "view": m.view,
        "scanner": " ".join(part for part in (m.vendor, m.scanner, field) if part) or None,
        "size": f"{m.frames}x{m.slices}x{m.coils}x{m.phase_encodes}x{m.readout_samples}",
        "origin": m.origin,
    }
