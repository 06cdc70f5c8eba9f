"""Imports a file or a whole folder; one bad file never stops the others."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from fedcmr_client.importers.cmrxrecon import CMRxReconImporter
from fedcmr_client.importers.dicom import DicomImporter
from fedcmr_client.importers.fastmri import FastMRIImporter
from fedcmr_client.importers.interface import Importer, ImporterWarning, ImportOptions, Refusal
from fedcmr_client.importers.ismrmrd_h5 import IsmrmrdImporter
from fedcmr_client.importers.nifti import NiftiImporter, is_label_map
from fedcmr_client.importers.sunnybrook import SunnybrookImporter
from fedcmr_client.store.scan_file import ScanSource
from fedcmr_client.store.site_store import SiteStore
from fedcmr_shared.errors import AlreadyImported, ConfigurationError, DataError
from fedcmr_shared.schemas.acquisition import UnknownVocabularyWarning

IMPORTERS: Final[tuple[Importer, ...]] = (
    CMRxReconImporter(),
    IsmrmrdImporter(),
    FastMRIImporter(),
    DicomImporter(),
    NiftiImporter(),
    SunnybrookImporter(),
)
"""All importers, in the order in which ``auto`` asks them."""

Outcome = Literal["imported", "skipped", "failed", "ignored"]

_SUFFIXES: Final = (".mat", ".h5", ".hdf5", ".mrd", ".nii", ".nii.gz", ".npz", ".dcm")


@dataclass(frozen=True)
class ImportRow:
    """What happened to one scan or file; ``reason`` is empty for an imported scan."""

    file: str
    outcome: Outcome
    scan_id: str | None = None
    reason: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImportSummary:
    """All rows of one import, in the order of the walk."""

    rows: tuple[ImportRow, ...]

    @property
    def imported(self) -> int:
        """Number of scans that the store now holds in addition."""
        return self._count("imported")

    @property
    def skipped(self) -> int:
        """Number of scans that the store held already."""
        return self._count("skipped")

    @property
    def failed(self) -> int:
        """Number of scans and files that should have been imported but could not be."""
        return self._count("failed")

    @property
    def ignored(self) -> int:
        """Number of files that hold no scan."""
        return self._count("ignored")

    def to_json(self) -> dict[str, Any]:
        """Counts and rows as JSON-compatible values."""
        counts = {name: self._count(name) for name in ("imported", "skipped", "failed", "ignored")}
        return {**counts, "rows": [asdict(row) for row in self.rows]}

    def _count(self, outcome: str) -> int:
        return sum(row.outcome == outcome for row in self.rows)


@dataclass(frozen=True)
class _Unit:
    """One path with the importer that claims it; without one, ``reason`` says why."""

    path: Path
    importer: Importer | None
    outcome: Outcome = "failed"
    reason: str = ""


def import_path(
    store: SiteStore, path: Path, format: str = "auto", options: ImportOptions | None = None
) -> ImportSummary:
    """Import the file ``path``, or everything below the folder ``path`` in sorted order.

    ``format`` is the name of an importer or ``auto``. Raises DataError when ``path`` does not
    exist or holds no file, and ConfigurationError for an unknown ``format``; everything that is
    wrong with single files becomes a row.
    """
    importers = _select(format)
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    single = path.is_file()
    rows: list[ImportRow] = []
    for unit in _units(path, importers, explicit=format != "auto"):
        name = path.name if single else str(unit.path.relative_to(path))
        if unit.importer is None:
            outcome: Outcome = "failed" if single else unit.outcome
            rows.append(ImportRow(name, outcome, reason=unit.reason))
        else:
            rows.extend(_import_unit(store, unit.path, unit.importer, options or ImportOptions()))
    if not rows:
        raise DataError(f"{path}: the folder holds no file")
    return ImportSummary(tuple(rows))


def _select(format: str) -> tuple[Importer, ...]:
    if format == "auto":
        return IMPORTERS
    selected = tuple(importer for importer in IMPORTERS if importer.name == format)
    if not selected:
        names = ", ".join(importer.name for importer in IMPORTERS)
        raise ConfigurationError(f"format {format!r} is unknown: use auto or one of {names}")
    return selected


def _units(path: Path, importers: tuple[Importer, ...], *, explicit: bool) -> Iterator[_Unit]:
    if path.is_file():
        yield _Unit(path, importers[0]) if explicit else _classify(path, importers)
        return
    unreadable: list[OSError] = []
    for folder, subfolders, names in os.walk(path, onerror=unreadable.append):
        subfolders.sort()
        owner = next((i for i in importers if names and i.claims(Path(folder))), None)
        if owner is not None:
            yield _Unit(Path(folder), owner)
        for name in sorted(names):
            file = Path(folder, name)
            if owner is None or not owner.claims(file):
                yield _classify(file, importers)
    for error in unreadable:
        reason = f"{error.filename}: cannot be opened: {error.strerror}"
        yield _Unit(Path(error.filename), None, "failed", reason)


def _classify(path: Path, importers: tuple[Importer, ...]) -> _Unit:
    for importer in importers:
        try:
            if importer.claims(path):
                return _Unit(path, importer)
        except DataError as error:
            return _Unit(path, None, "failed", str(error))
    if is_label_map(path):
        return _Unit(path, None, "ignored", "label map: read together with its image")
    if path.suffix == ".txt" and "contour" in path.name:
        return _Unit(path, None, "ignored", "contour: read together with its DICOM series")
    if len(importers) == 1:
        return _Unit(path, None, "ignored", f"not recognised as {importers[0].name}")
    if path.name.lower().endswith(_SUFFIXES):
        return _Unit(
            path, None, "failed", f"{path}: damaged, or of a layout that no importer reads"
        )
    return _Unit(path, None, "ignored", "not a file with medical images")


def _import_unit(
    store: SiteStore, path: Path, importer: Importer, options: ImportOptions
) -> Iterator[ImportRow]:
    scans = iter(importer.scans(path, options))
    while True:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                scan = next(scans)
                row = _import_scan(store, scan, options)
            except StopIteration:
                return
            except DataError as error:
                yield ImportRow(str(path), "failed", reason=str(error))
                return
        # Other libraries' warnings quote header values, names of patients among them.
        ours = [w for w in caught if issubclass(w.category, _OWN_WARNINGS)]
        notes = dict.fromkeys(str(warning.message) for warning in ours)
        yield replace(row, warnings=tuple(notes))


_OWN_WARNINGS: Final = (ImporterWarning, UnknownVocabularyWarning)


def _import_scan(store: SiteStore, scan: ScanSource | Refusal, options: ImportOptions) -> ImportRow:
    if isinstance(scan, Refusal):
        return ImportRow(scan.source, "failed", reason=str(scan.error))
    named = replace(scan, patient=options.canonical(scan.patient))
    try:
        record = store.add(named, consent=options.consent)
    except AlreadyImported as error:
        return ImportRow(scan.source, "skipped", reason=str(error))
    except DataError as error:
        return ImportRow(scan.source, "failed", reason=str(error))
    return ImportRow(scan.source, "imported", scan_id=record.scan_id)
