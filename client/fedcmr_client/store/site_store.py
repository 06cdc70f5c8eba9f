"""The site store: a folder with all scans of one hospital.

::

    <root>/site.toml          format, and the catalogue's URL when it is not the file beside it
    <root>/site.secret        key of the pseudonyms, readable by its owner only
    <root>/catalogue.sqlite   the catalogue, unless it is kept in PostgreSQL
    <root>/scans/<pseudonym>/<scan_id>.h5

A scan's row and its file appear together: the row is inserted, the finished file gets its name,
then the row is committed. Several processes may import into one store at the same time.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self

from sqlalchemy import Engine, select
from sqlalchemy.engine import URL
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from fedcmr_client.store import catalogue, pseudonyms
from fedcmr_client.store.catalogue import PatientRow, ScanRow, SiteRow
from fedcmr_client.store.scan_file import (
    PARTIAL_SUFFIX,
    ScanFile,
    ScanSource,
    StagedScan,
    parse_metadata,
    staged_scan,
    sync,
)
from fedcmr_client.store.split import SPLITS, Split, SplitFractions, split_of, split_position
from fedcmr_shared.errors import AlreadyImported, DataError
from fedcmr_shared.schemas.acquisition import AcquisitionMetadata

CATALOGUE_URL_VARIABLE: Final = "FEDCMR_CATALOGUE_URL"
"""Environment variable that overrides the stored catalogue URL, password included."""

_SETTINGS: Final = "site.toml"
_SECRET: Final = "site.secret"
_CATALOGUE: Final = "catalogue.sqlite"
_FORMAT: Final = "1"
_SCAN_ID_LENGTH: Final = 16
# Two imports can meet in the same new patient or the same scan; the loser looks again.
_ATTEMPTS: Final = 3


@dataclass(frozen=True)
class ScanRecord:
    """One scan of the catalogue; ``patient`` is a pseudonym, ``digest`` that of the samples."""

    scan_id: str
    patient: str
    path: Path
    metadata: AcquisitionMetadata
    split: Split
    digest: str
    has_truth: bool


@dataclass(frozen=True)
class Problem:
    """Something that `SiteStore.verify` found wrong.

    *corrupt*: a file that differs from what was imported; *missing*: a row without a file;
    *orphan*: a file without a row; *partial*: rest of an import that was cut off.
    """

    kind: Literal["corrupt", "missing", "orphan", "partial"]
    path: Path
    message: str


class SiteStore:
    """All scans of one site; made by `create` or `open`. A context manager, too."""

    def __init__(self, root: Path, secret: bytes, engine: Engine) -> None:
        self.root = root
        self._secret = secret
        self._engine = engine

    @classmethod
    def create(
        cls, root: Path | str, secret: bytes | None = None, database_url: str | None = None
    ) -> Self:
        """Make an empty store in the folder ``root``, which may exist.

        ``secret`` (32 bytes) is drawn when not given; the catalogue is SQLite inside ``root``
        unless the environment variable or ``database_url`` names another one. A password in the
        URL is used now but not stored. Raises DataError when ``root`` holds a store, when the
        catalogue holds another site, or when either cannot be written.
        """
        root = Path(root).absolute()
        if (root / _SETTINGS).exists():
            raise DataError(f"{root} is a site store already: open it or choose another folder")
        url = _catalogue_url(root, database_url)
        with _disk_errors(root), ExitStack() as undo:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            (root / "scans").mkdir(exist_ok=True)
            secret = pseudonyms.create_secret(root / _SECRET, secret)
            undo.callback((root / _SECRET).unlink)
            engine = catalogue.connect(url)
            if not (root / _CATALOGUE).exists():
                undo.callback((root / _CATALOGUE).unlink, missing_ok=True)
            catalogue.create_tables(engine)
            _register_site(engine, secret)
            # The settings come last: a folder without them is not a store.
            _write_settings(root, url)
            undo.pop_all()
        return cls(root, secret, engine)

    @classmethod
    def open(cls, root: Path | str) -> Self:
        """Open the store in ``root`` and update its catalogue's tables if they are older.

        Raises DataError when ``root`` is not a store, or when the secret or the catalogue is
        absent, damaged or that of another site.
        """
        root = Path(root).absolute()
        url = _catalogue_url(root, _read_settings(root).get("database_url"))
        secret = pseudonyms.read_secret(root / _SECRET)
        if url == _default_url(root) and not (root / _CATALOGUE).is_file():
            raise DataError(f"{root / _CATALOGUE} is missing: restore it from backup")
        engine = catalogue.connect(url)
        catalogue.update_tables(engine)
        with catalogue.transaction(engine) as session:
            site = _site(session)
            if site.secret_fingerprint != pseudonyms.fingerprint(secret):
                message = "the catalogue was made with another secret: restore the right one"
                raise DataError(f"{root / _SECRET}: {message}")
        return cls(root, secret, engine)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the catalogue."""
        self._engine.dispose()

    def add(self, source: ScanSource) -> ScanRecord:
        """Store one scan; nothing of it remains when that fails.

        Raises AlreadyImported when the store holds the same samples, and DataError when it holds
        them under another patient or when ``source`` cannot be stored (see `staged_scan`).
        """
        patient = pseudonyms.pseudonym(self._secret, source.patient)
        with staged_scan(self.root / "scans", source) as staged:
            row = {
                "scan_id": staged.digest[:_SCAN_ID_LENGTH],
                "patient": patient,
                "digest": staged.digest,
                "modality": source.metadata.modality,
                "has_truth": source.truth is not None,
                "acquisition": source.metadata.model_dump_json(),
            }
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    self._commit(source.source or "scan", staged, row)
                    break
                except IntegrityError as error:
                    # Once the file has its name, there is nothing left to try again with.
                    if attempt == _ATTEMPTS or not staged.path.exists():
                        message = "the catalogue kept refusing the scan: import it again"
                        raise DataError(f"{source.source or 'scan'}: {message}") from error
        return self.scan(str(row["scan_id"]))

    def scan(self, scan_id: str) -> ScanRecord:
        """Return one scan; DataError when there is none of that name."""
        with catalogue.transaction(self._engine) as session:
            row = session.get(ScanRow, scan_id)
            if row is None:
                raise DataError(f"{self.root} has no scan {scan_id}: see `fedcmr data list`")
            return self._record(row, _fractions(_site(session)))

    def scans(
        self, split: Split | None = None, modalities: Collection[str] | None = None
    ) -> list[ScanRecord]:
        """Scans sorted by patient and scan id, of one part or some modalities only if given."""
        query = select(ScanRow).order_by(ScanRow.patient, ScanRow.scan_id)
        if modalities is not None:
            query = query.where(ScanRow.modality.in_(modalities))
        with catalogue.transaction(self._engine) as session:
            fractions = _fractions(_site(session))
            records = [self._record(row, fractions) for row in session.scalars(query)]
        return [record for record in records if split in (None, record.split)]

    def patients(self, split: Split | None = None) -> list[str]:
        """Pseudonyms of all patients, or of one part, sorted."""
        with catalogue.transaction(self._engine) as session:
            fractions = _fractions(_site(session))
            names = session.scalars(select(PatientRow.pseudonym)).all()
        # Sorted here because databases order text by their own rules.
        return sorted(name for name in names if split in (None, self._split(name, fractions)))

    @property
    def split_fractions(self) -> SplitFractions:
        """Expected share of the patients in each part."""
        with catalogue.transaction(self._engine) as session:
            return _fractions(_site(session))

    def set_split(self, fractions: SplitFractions) -> None:
        """Change the shares; a patient moves only if a border passes over its place."""
        with catalogue.transaction(self._engine) as session:
            site = _site(session)
            site.train, site.validation, site.test = (getattr(fractions, name) for name in SPLITS)

    def split_counts(self) -> dict[Split, int]:
        """Number of patients in each part."""
        fractions = self.split_fractions
        counts = Counter(self._split(name, fractions) for name in self.patients())
        return {name: counts[name] for name in SPLITS}

    def verify(self) -> list[Problem]:
        """Hash all scans again and look for strays; an empty list means all is well."""
        found = (self.check_scan(record) for record in self.scans())
        return [*(problem for problem in found if problem is not None), *self.strays()]

    def check_scan(self, record: ScanRecord) -> Problem | None:
        """Compare one scan's file with the catalogue, samples included."""
        if not record.path.is_file():
            message = f"the file of scan {record.scan_id} is gone: restore it from backup"
            return Problem("missing", record.path, message)
        try:
            with ScanFile(record.path) as file:
                if (file.digest, file.metadata) != (record.digest, record.metadata):
                    message = "digest or metadata differ from the catalogue"
                    return Problem("corrupt", record.path, message)
                file.verify()
                # Reading is the check: truth and noise have no digest of their own.
                _ = file.truth, file.noise_covariance
        except DataError as error:
            return Problem("corrupt", record.path, str(error))
        return None

    def strays(self) -> list[Problem]:
        """Files below ``scans`` that no row of the catalogue names, sorted."""
        known = {record.path for record in self.scans()}
        files = sorted(path for path in (self.root / "scans").rglob("*") if path.is_file())
        return [_stray(path) for path in files if path not in known]

    def _commit(self, name: str, staged: StagedScan, row: dict[str, Any]) -> None:
        path = self._path(row["patient"], row["scan_id"])
        with ExitStack() as undo:
            with catalogue.transaction(self._engine) as session:
                _refuse_duplicate(session, name, row)
                if session.get(PatientRow, row["patient"]) is None:
                    session.add(PatientRow(pseudonym=row["patient"]))
                    session.flush()
                session.add(ScanRow(**row))
                session.flush()
                with _disk_errors(path):
                    _make_folder(path.parent)
                    undo.callback(path.unlink, missing_ok=True)
                    staged.publish(path)
            undo.pop_all()

    def _record(self, row: ScanRow, fractions: SplitFractions) -> ScanRecord:
        return ScanRecord(
            scan_id=row.scan_id,
            patient=row.patient,
            path=self._path(row.patient, row.scan_id),
            metadata=parse_metadata(row.acquisition),
            split=self._split(row.patient, fractions),
            digest=row.digest,
            has_truth=row.has_truth,
        )

    def _path(self, patient: str, scan_id: str) -> Path:
        return self.root / "scans" / patient / f"{scan_id}.h5"

    def _split(self, patient: str, fractions: SplitFractions) -> Split:
        return split_of(split_position(self._secret, patient), fractions)


def _default_url(root: Path) -> URL:
    return URL.create("sqlite", database=str(root / _CATALOGUE))


def _catalogue_url(root: Path, named: str | None) -> URL:
    text = os.environ.get(CATALOGUE_URL_VARIABLE) or named
    return catalogue.parse_url(text) if text else _default_url(root)


def _read_settings(root: Path) -> dict[str, str]:
    path = root / _SETTINGS
    if not path.is_file():
        message = "`fedcmr data import` makes one"
        raise DataError(f"{root} is not a site store (no {_SETTINGS}): {message}")
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # text and TOML errors are ValueErrors
        raise DataError(f"{path}: cannot be read: {error}") from error
    if settings.get("format") != _FORMAT or not all(isinstance(v, str) for v in settings.values()):
        raise DataError(f'{path}: not the settings of a site store (format = "{_FORMAT}")')
    return settings


def _write_settings(root: Path, url: URL) -> None:
    lines = [f'format = "{_FORMAT}"']
    if url != _default_url(root):
        stored = _without_password(url).render_as_string(hide_password=False)
        # A JSON string is also a TOML string.
        lines.append(f"database_url = {json.dumps(stored)}")
    path = root / _SETTINGS
    with path.open("x", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
        file.flush()
        os.fsync(file.fileno())
    sync(root)


def _without_password(url: URL) -> URL:
    # URL.set takes None for "as it is".
    return URL.create(
        url.drivername,
        username=url.username,
        host=url.host,
        port=url.port,
        database=url.database,
        query=url.difference_update_query(["password"]).query,
    )


def _register_site(engine: Engine, secret: bytes) -> None:
    default = SplitFractions()
    with catalogue.transaction(engine) as session:
        if session.get(SiteRow, 1) is not None:
            message = "each site store needs a database of its own"
            raise DataError(f"catalogue {engine.url!r} belongs to a site already: {message}")
        session.add(
            SiteRow(
                id=1,
                secret_fingerprint=pseudonyms.fingerprint(secret),
                train=default.train,
                validation=default.validation,
                test=default.test,
            )
        )


def _site(session: Session) -> SiteRow:
    site = session.get(SiteRow, 1)
    if site is None:
        raise DataError("the catalogue holds no site: restore it from backup")
    return site


def _fractions(site: SiteRow) -> SplitFractions:
    return SplitFractions(site.train, site.validation, site.test)


def _refuse_duplicate(session: Session, name: str, row: dict[str, Any]) -> None:
    existing = session.scalar(select(ScanRow).where(ScanRow.digest == row["digest"]))
    if existing is None:
        return
    if existing.patient == row["patient"]:
        raise AlreadyImported(f"{name}: already imported as scan {existing.scan_id}")
    raise DataError(
        f"{name}: patient under two names: scan {existing.scan_id} of {existing.patient} holds the "
        f"same samples, this one names {row['patient']}; map both names to one with --patient-map"
    )


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be made: {error.strerror or error}") from error


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def _stray(path: Path) -> Problem:
    if path.name.endswith(PARTIAL_SUFFIX):
        message = "rest of an import that was cut off (or still runs): delete it"
        return Problem("partial", path, message)
    message = "no scan of the catalogue: delete it, or import it again from its source"
    return Problem("orphan", path, message)
