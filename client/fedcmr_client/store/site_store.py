"""The site store: a folder with all scans of one hospital.

::

    <root>/site.toml          format, and the catalogue's URL when it is not the file beside it
    <root>/site.secret        key of the pseudonyms, readable by its owner only
    <root>/catalogue.sqlite   the catalogue, unless it is kept in PostgreSQL
    <root>/scans/<pseudonym>/<scan_id>.h5

A scan's row and its file appear together: the row is inserted, the finished file gets its name,
then the row is committed. Several processes may import into one store at the same time.

A withdrawn patient is marked first, then files and rows go; opening a store finishes what was cut
off. The mark stays, so that nothing of the patient is imported again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Final, Literal, Self

from sqlalchemy import Engine, Select, delete, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from fedcmr_client.store import catalogue, pseudonyms, settings
from fedcmr_client.store.catalogue import PatientRow, ScanRow, SiteRow
from fedcmr_client.store.cohort import CohortFilter
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
from fedcmr_shared.schemas.job import CohortQuery

_SECRET: Final = "site.secret"
_SCAN_ID_LENGTH: Final = 16
# Two imports can meet in the same new patient or the same scan; the loser looks again.
_ATTEMPTS: Final = 3
# SQLite takes 32766 values in a statement, PostgreSQL twice as many.
_NAMES_PER_STATEMENT: Final = 10_000


@dataclass(frozen=True)
class ScanRecord:
    """One scan of the catalogue; ``patient`` is a pseudonym, ``digest`` that of the samples.

    ``consent`` is the patient's: given, refused, or None when it is not known.
    """

    scan_id: str
    patient: str
    path: Path
    metadata: AcquisitionMetadata
    split: Split
    digest: str
    has_truth: bool
    consent: bool | None = None


@dataclass(frozen=True)
class Problem:
    """Something that `SiteStore.verify` found wrong.

    *corrupt*: a file that differs from what was imported; *missing*: a row without a file;
    *orphan*: a file without a row; *partial*: rest of an import that was cut off; *withdrawn*: a
    file of a patient who withdrew.
    """

    kind: Literal["corrupt", "missing", "orphan", "partial", "withdrawn"]
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
        if settings.is_store(root):
            raise DataError(f"{root} is a site store already: open it or choose another folder")
        url = settings.catalogue_url(root, database_url)
        with _disk_errors(root), ExitStack() as undo:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            (root / "scans").mkdir(exist_ok=True)
            secret = pseudonyms.create_secret(root / _SECRET, secret)
            undo.callback((root / _SECRET).unlink)
            engine = catalogue.connect(url)
            if not settings.catalogue_file(root).exists():
                undo.callback(settings.catalogue_file(root).unlink, missing_ok=True)
            catalogue.create_tables(engine)
            _register_site(engine, secret)
            # The settings come last: a folder without them is not a store.
            settings.write(root, url)
            undo.pop_all()
        return cls(root, secret, engine)

    @classmethod
    def open(cls, root: Path | str) -> Self:
        """Open the store in ``root`` and update its catalogue's tables if they are older.

        A withdrawal that was cut off is finished. Raises DataError when ``root`` is not a store,
        when the secret or the catalogue is absent, damaged or that of another site, or when a
        withdrawn patient's files cannot be erased.
        """
        root = Path(root).absolute()
        url = settings.catalogue_url(root, settings.read(root).get("database_url"))
        secret = pseudonyms.read_secret(root / _SECRET)
        file = settings.catalogue_file(root)
        if url == settings.default_url(root) and not file.is_file():
            raise DataError(f"{file} is missing: restore it from backup")
        engine = catalogue.connect(url)
        catalogue.update_tables(engine)
        with catalogue.transaction(engine) as session:
            site = _site(session)
            if site.secret_fingerprint != pseudonyms.fingerprint(secret):
                message = "the catalogue was made with another secret: restore the right one"
                raise DataError(f"{root / _SECRET}: {message}")
            unfinished = session.scalars(
                select(ScanRow.patient).join(PatientRow).where(PatientRow.withdrawn).distinct()
            ).all()
        store = cls(root, secret, engine)
        for patient in unfinished:
            store._erase(patient)
        return store

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the catalogue."""
        self._engine.dispose()

    def pseudonym(self, name: str) -> str:
        """Pseudonym of the patient whom sources call ``name``; DataError when it is empty."""
        return pseudonyms.pseudonym(self._secret, name)

    def add(self, source: ScanSource, *, consent: bool | None = None) -> ScanRecord:
        """Store one scan; nothing of it remains when that fails.

        ``consent`` is recorded with it, also for a scan that the store holds already; an earlier
        refusal stays until `set_consent` lifts it.
        Raises AlreadyImported when the store holds the same samples, and DataError when it holds
        them under another patient, when the patient withdrew or when ``source`` cannot be stored
        (see `staged_scan`).
        """
        patient = self.pseudonym(source.patient)
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
                    record = self._commit(source.source or "scan", staged, row, consent)
                    break
                except AlreadyImported:
                    with catalogue.transaction(self._engine) as session:
                        _admit_patient(session, source.source or "scan", patient, consent)
                    raise
                except IntegrityError as error:
                    # Once the file has its name, there is nothing left to try again with.
                    if attempt == _ATTEMPTS or not staged.path.exists():
                        message = "the catalogue kept refusing the scan: import it again"
                        raise DataError(f"{source.source or 'scan'}: {message}") from error
        return record

    def scan(self, scan_id: str) -> ScanRecord:
        """Return one scan; DataError when there is none of that name."""
        records = self._records(select(ScanRow).where(ScanRow.scan_id == scan_id))
        if not records:
            raise DataError(f"{self.root} has no scan {scan_id}: see `fedcmr data list`")
        return records[0]

    def scans(
        self, split: Split | None = None, modalities: Collection[str] | None = None
    ) -> list[ScanRecord]:
        """Scans sorted by patient and scan id, of one part or some modalities only if given."""
        query = select(ScanRow).order_by(ScanRow.patient, ScanRow.scan_id)
        if modalities is not None:
            query = query.where(ScanRow.modality.in_(modalities))
        return [record for record in self._records(query) if split in (None, record.split)]

    def scans_of(self, patient: str) -> list[ScanRecord]:
        """Scans of one patient (a pseudonym), none of a withdrawn one; DataError if unknown."""
        with catalogue.transaction(self._engine) as session:
            if session.get(PatientRow, patient) is None:
                raise self._no_patient(patient)
        query = select(ScanRow).where(ScanRow.patient == patient).order_by(ScanRow.scan_id)
        return self._records(query)

    def cohort(
        self,
        split: Split,
        query: CohortQuery,
        *,
        require_consent: bool = False,
        modalities: Collection[str] | None = None,
        acquired_from: date | None = None,
        acquired_until: date | None = None,
    ) -> list[ScanRecord]:
        """Scans of one part that both a job's ``query`` and the site's own limits admit, sorted.

        Whoever refused consent is never among them; with ``require_consent`` only those are who
        gave it. Dates are inclusive, and a limit leaves out what is not known (see CohortFilter).
        """
        asked = CohortFilter.of(query)
        allowed = CohortFilter(
            modalities=modalities, acquired_from=acquired_from, acquired_until=acquired_until
        )
        consents = (True,) if require_consent else (True, None)
        return [
            record
            for record in self.scans(split)
            if record.consent in consents
            and asked.admits(record.metadata)
            and allowed.admits(record.metadata)
        ]

    def patients(self, split: Split | None = None) -> list[str]:
        """Pseudonyms of all patients, or of one part, sorted; withdrawn ones are left out."""
        with catalogue.transaction(self._engine) as session:
            fractions = _fractions(_site(session))
            names = _pseudonyms(session, withdrawn=False)
        # Sorted here because databases order text by their own rules.
        return sorted(name for name in names if split in (None, self._split(name, fractions)))

    def set_consent(self, patients: Collection[str], given: bool) -> None:
        """Record what patients (pseudonyms) decided, all of them or none.

        Raises DataError when one of them is not in the store or withdrew.
        """
        chosen = sorted(set(patients))
        with catalogue.transaction(self._engine) as session:
            unknown = set(chosen) - _pseudonyms(session, withdrawn=False)
            if unknown:
                raise self._no_patient(min(unknown))
            for start in range(0, len(chosen), _NAMES_PER_STATEMENT):
                some = chosen[start : start + _NAMES_PER_STATEMENT]
                session.execute(
                    update(PatientRow).where(PatientRow.pseudonym.in_(some)).values(consent=given)
                )

    def withdraw(self, patient: str) -> int:
        """Erase all scans of ``patient`` (a pseudonym) for good and return their number.

        From the first commit on the patient is in no list and no cohort, and nothing of theirs can
        be imported; a crash after it leaves files and rows for the next `open` to erase. Repeating
        it erases files that have come back. Raises DataError when the store never had the patient
        or a file cannot be erased.
        """
        with catalogue.transaction(self._engine) as session:
            row = session.get(PatientRow, patient)
            if row is None:
                raise self._no_patient(patient)
            row.withdrawn = True
        return self._erase(patient)

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
        with catalogue.transaction(self._engine) as session:
            withdrawn = _pseudonyms(session, withdrawn=True)
        files = sorted(path for path in (self.root / "scans").rglob("*") if path.is_file())
        return [_stray(path, withdrawn) for path in files if path not in known]

    def _commit(
        self, name: str, staged: StagedScan, row: dict[str, Any], consent: bool | None
    ) -> ScanRecord:
        path = self._path(row["patient"], row["scan_id"])
        with ExitStack() as undo:
            with catalogue.transaction(self._engine) as session:
                _refuse_duplicate(session, name, row)
                if session.get(PatientRow, row["patient"]) is None:
                    session.add(PatientRow(pseudonym=row["patient"]))
                    session.flush()
                added = ScanRow(**row)
                session.add(added)
                session.flush()
                patient = _admit_patient(session, name, row["patient"], consent)
                record = self._record(added, patient.consent, _fractions(_site(session)))
                with _disk_errors(path):
                    _make_folder(path.parent)
                    undo.callback(path.unlink, missing_ok=True)
                    staged.publish(path)
            undo.pop_all()
        return record

    def _erase(self, patient: str) -> int:
        """Erase files, then rows: as long as a row is left, `open` knows that there is work."""
        folder = self.root / "scans" / patient
        with _disk_errors(folder, "erased"), suppress(FileNotFoundError):
            for path in folder.iterdir():
                path.unlink(missing_ok=True)
            folder.rmdir()
            sync(folder.parent)
        with catalogue.transaction(self._engine) as session:
            rows = delete(ScanRow).where(ScanRow.patient == patient).returning(ScanRow.scan_id)
            return len(session.scalars(rows).all())

    def _records(self, query: Select[ScanRow]) -> list[ScanRecord]:
        admitted = query.join(PatientRow).where(~PatientRow.withdrawn)
        with catalogue.transaction(self._engine) as session:
            fractions = _fractions(_site(session))
            rows = session.execute(admitted.add_columns(PatientRow.consent))
            return [self._record(row, consent, fractions) for row, consent in rows]

    def _record(self, row: ScanRow, consent: bool | None, fractions: SplitFractions) -> ScanRecord:
        return ScanRecord(
            scan_id=row.scan_id,
            patient=row.patient,
            path=self._path(row.patient, row.scan_id),
            metadata=parse_metadata(row.acquisition),
            split=self._split(row.patient, fractions),
            digest=row.digest,
            has_truth=row.has_truth,
            consent=consent,
        )

    def _no_patient(self, patient: str) -> DataError:
        message = "see `fedcmr data list`, or add --name if this is the name in the files"
        return DataError(f"{self.root} has no patient {patient}: {message}")

    def _path(self, patient: str, scan_id: str) -> Path:
        return self.root / "scans" / patient / f"{scan_id}.h5"

    def _split(self, patient: str, fractions: SplitFractions) -> Split:
        return split_of(split_position(self._secret, patient), fractions)


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


def _pseudonyms(session: Session, *, withdrawn: bool) -> set[str]:
    query = select(PatientRow.pseudonym).where(PatientRow.withdrawn == withdrawn)
    return set(session.scalars(query))


def _admit_patient(session: Session, name: str, patient: str, consent: bool | None) -> PatientRow:
    """Refuse a withdrawn patient, and record consent unless that would lift a refusal.

    The lock (in SQLite that of the insertion before) holds off a withdrawal until this transaction
    is over; the withdrawal then finds row and file and erases them.
    """
    query = (
        select(PatientRow).where(PatientRow.pseudonym == patient).with_for_update(key_share=True)
    )
    row = session.scalars(query.execution_options(populate_existing=True)).one()
    if row.withdrawn:
        raise DataError(f"{name}: patient {patient} withdrew: leave their files out of the import")
    if consent is not None and row.consent is not False:
        row.consent = consent
    return row


@contextmanager
def _disk_errors(path: Path, task: str = "made") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be {task}: {error.strerror or error}") from error


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def _stray(path: Path, withdrawn: Collection[str]) -> Problem:
    if path.parent.name in withdrawn:
        message = f"the patient withdrew: repeat `fedcmr data withdraw {path.parent.name}`"
        return Problem("withdrawn", path, message)
    if path.name.endswith(PARTIAL_SUFFIX):
        message = "rest of an import that was cut off (or still runs): delete it"
        return Problem("partial", path, message)
    message = "no scan of the catalogue: delete it, or import it again from its source"
    return Problem("orphan", path, message)
