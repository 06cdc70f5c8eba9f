"""One contract for the catalogue in SQLite and in a real PostgreSQL server."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event, get_ident

import numpy as np
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Engine, event, inspect, text

from fedcmr_client.store import catalogue
from fedcmr_client.store.catalogue import Base
from fedcmr_client.store.scan_file import ScanSource
from fedcmr_client.store.site_store import SiteStore
from fedcmr_client.store.split import SplitFractions
from fedcmr_shared.errors import AlreadyImported, DataError
from fedcmr_shared.schemas.acquisition import AcquisitionMetadata

NewDatabase = Callable[[], str]

# Makes each insertion of a scan fail when it is committed, after its file has its name.
FAIL_AT_COMMIT = {
    "sqlite": [
        "CREATE TABLE parent (id INTEGER PRIMARY KEY)",
        "CREATE TABLE child (id INTEGER REFERENCES parent DEFERRABLE INITIALLY DEFERRED)",
        "CREATE TRIGGER late AFTER INSERT ON scans BEGIN INSERT INTO child VALUES (1); END",
    ],
    "postgresql": [
        """CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql
           AS $$ BEGIN RAISE EXCEPTION 'no commits today'; END $$""",
        """CREATE CONSTRAINT TRIGGER late AFTER INSERT ON scans
           DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION fail()""",
    ],
}


def scan(patient: str, seed: int, modality: str | None = "cine") -> ScanSource:
    metadata = AcquisitionMetadata(
        origin="simulated",
        source_format="test",
        modality=modality,
        frames=2,
        slices=1,
        coils=2,
        phase_encodes=4,
        readout_samples=5,
    )
    parts = np.random.default_rng(seed).standard_normal((2, 2, 1, 2, 4, 5))
    samples = (parts[0] + 1j * parts[1]).astype(np.complex64)
    images = [(frame, 0, samples[frame, 0]) for frame in range(2)]
    return ScanSource(patient, metadata, lambda: iter(images), source=f"{patient}-{seed}.mat")


@pytest.fixture
def url(new_database: NewDatabase) -> str:
    return new_database()


@pytest.fixture
def store(tmp_path: Path, url: str) -> SiteStore:
    return SiteStore.create(tmp_path / "store", database_url=url)


def files(store: SiteStore) -> set[Path]:
    return {path for path in (store.root / "scans").rglob("*") if path.is_file()}


def test_scans_come_back_sorted_after_reopening(store: SiteStore) -> None:
    added = [store.add(scan(f"patient {n % 3}", n)) for n in (4, 2, 0, 5, 1, 3)]
    with SiteStore.open(store.root) as again:
        assert again.scans() == sorted(added, key=lambda record: (record.patient, record.scan_id))
        assert again.patients() == sorted({record.patient for record in added})
        assert again.scan(added[0].scan_id) == added[0]
        assert again.verify() == []
    assert len(store.patients()) == 3
    assert files(store) == {record.path for record in added}


def test_filters_select_modality_and_part(store: SiteStore) -> None:
    cine, lge, unknown = (
        store.add(scan(f"{number}", number, modality))
        for number, modality in enumerate(("cine", "LGE", None))
    )
    assert store.scans(modalities={"cine"}) == [cine]
    assert {r.scan_id for r in store.scans(modalities=["LGE", "cine"])} == {
        cine.scan_id,
        lge.scan_id,
    }
    assert store.scans(modalities=[]) == []
    assert unknown in store.scans()
    parts = [store.scans(split=name) for name in ("train", "validation", "test")]
    assert sorted(r.scan_id for part in parts for r in part) == sorted(
        r.scan_id for r in store.scans()
    )


def test_the_same_samples_are_stored_once(store: SiteStore) -> None:
    first = store.add(scan("ann", 1))
    with pytest.raises(AlreadyImported, match=rf"-1\.mat: already .*{first.scan_id}"):
        store.add(scan(" ann ", 1))
    assert files(store) == {first.path}


def test_one_patient_under_two_names_is_refused(store: SiteStore) -> None:
    first = store.add(scan("ann", 1))
    other = store.add(scan("bob", 2)).patient
    message = rf"patient under two names: .*{first.patient}.*{other}.*--patient-map"
    with pytest.raises(DataError, match=message) as refused:
        store.add(scan("bob", 1))
    assert not isinstance(refused.value, AlreadyImported)
    assert len(files(store)) == len(store.scans()) == 2


def test_split_fractions_are_kept(store: SiteStore) -> None:
    assert store.split_fractions == SplitFractions(0.7, 0.1, 0.2)
    store.set_split(SplitFractions(0.1, 0.25, 0.65))
    with SiteStore.open(store.root) as again:
        assert again.split_fractions == SplitFractions(0.1, 0.25, 0.65)


def test_a_failed_commit_leaves_neither_row_nor_file(store: SiteStore, url: str) -> None:
    kept = store.add(scan("ann", 1))
    engine = catalogue.connect(catalogue.parse_url(url))
    with engine.begin() as connection:
        for statement in FAIL_AT_COMMIT[engine.dialect.name]:
            connection.execute(text(statement))
    for patient in ("ann", "new patient"):
        with pytest.raises(DataError, match=r"kept refusing|no commits today"):
            store.add(scan(patient, 2))
    assert files(store) == {kept.path}
    assert store.scans() == [kept]
    assert store.patients() == [kept.patient]


def test_imports_of_the_same_scan_at_once_store_it_once(store: SiteStore) -> None:
    start = Barrier(4)

    def add(_: int) -> str:
        with SiteStore.open(store.root) as own:
            start.wait(timeout=30)
            try:
                return own.add(scan("ann", 1)).scan_id
            except AlreadyImported:
                return "already"

    with ThreadPoolExecutor(4) as pool:
        outcomes = sorted(pool.map(add, range(4)))
    (record,) = store.scans()
    assert outcomes == [record.scan_id, "already", "already", "already"]
    assert store.verify() == []


def test_imports_into_one_new_patient_at_once_all_succeed(store: SiteStore) -> None:
    start = Barrier(4)

    def add(number: int) -> str:
        with SiteStore.open(store.root) as own:
            start.wait(timeout=30)
            return own.add(scan("ann", number)).scan_id

    with ThreadPoolExecutor(4) as pool:
        added = set(pool.map(add, range(4)))
    assert {record.scan_id for record in store.scans()} == added
    assert len(added) == 4
    assert store.verify() == []


def test_migrations_make_the_tables_of_the_models(store: SiteStore, url: str) -> None:
    engine = catalogue.connect(catalogue.parse_url(url))
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_migrations_can_be_undone(store: SiteStore, url: str) -> None:
    engine = catalogue.connect(catalogue.parse_url(url))
    config = catalogue.migration_config()
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
    assert inspect(engine).get_table_names() == ["alembic_version"]
    catalogue.create_tables(engine)
    assert {"site", "patients", "scans"} < set(inspect(engine).get_table_names())


def test_a_catalogue_of_the_first_release_is_updated(store: SiteStore, url: str) -> None:
    kept = store.add(scan("ann", 1))
    engine = catalogue.connect(catalogue.parse_url(url))
    config = catalogue.migration_config()
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "0001")
    columns = {column["name"] for column in inspect(engine).get_columns("patients")}
    assert columns == {"pseudonym"}
    with SiteStore.open(store.root) as again:
        assert again.scans() == [kept]
        assert again.scans()[0].consent is None
        again.set_consent(again.patients(), given=True)
        assert again.scans()[0].consent is True
        assert again.withdraw(kept.patient) == 1
        assert again.verify() == []


def test_a_withdrawal_waits_for_an_import_and_erases_it(store: SiteStore, url: str) -> None:
    store.add(scan("ann", 1))
    importer, reached, go_on = [0], Event(), Event()

    def pause(_: object) -> None:
        if get_ident() == importer[0]:
            reached.set()
            assert go_on.wait(timeout=30)

    def add() -> None:
        importer[0] = get_ident()
        store.add(scan("ann", 2))

    event.listen(Engine, "commit", pause)
    try:
        with ThreadPoolExecutor(2) as pool:
            adding = pool.submit(add)
            assert reached.wait(timeout=30)
            # Row and file of the second scan are there, but nobody else sees the row yet.
            withdrawing = pool.submit(store.withdraw, store.pseudonym("ann"))
            with pytest.raises(TimeoutError):
                withdrawing.result(timeout=0.5)
            go_on.set()
            adding.result(timeout=30)
            assert withdrawing.result(timeout=30) == 2
    finally:
        go_on.set()
        event.remove(Engine, "commit", pause)
    assert files(store) == set()
    with catalogue.connect(catalogue.parse_url(url)).connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM scans")).scalar() == 0
    assert store.verify() == []


def test_a_newer_catalogue_is_refused(store: SiteStore, url: str) -> None:
    engine = catalogue.connect(catalogue.parse_url(url))
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(DataError, match="revision 9999: a newer FedCMR made it"):
        SiteStore.open(store.root)


def test_an_empty_database_is_no_catalogue(
    store: SiteStore, new_database: NewDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDCMR_CATALOGUE_URL", new_database())
    with pytest.raises(DataError, match="holds no catalogue: restore it"):
        SiteStore.open(store.root)


def test_a_catalogue_serves_one_site(store: SiteStore, url: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="belongs to a site already"):
        SiteStore.create(tmp_path / "other", database_url=url)
    assert not (tmp_path / "other" / "site.toml").exists()
    assert not (tmp_path / "other" / "site.secret").exists()


def test_the_catalogue_of_another_site_is_refused(
    store: SiteStore, tmp_path: Path, new_database: NewDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = new_database()
    SiteStore.create(tmp_path / "other", database_url=other)
    monkeypatch.setenv("FEDCMR_CATALOGUE_URL", other)
    with pytest.raises(DataError, match="made with another secret"):
        SiteStore.open(store.root)


@pytest.mark.parametrize(
    "place", ["fedcmr:hunter2@/{}?host={}", "fedcmr@/{}?host={}&password=hunter2"]
)
def test_a_password_is_used_but_not_stored(
    tmp_path: Path, postgresql: str, create_database: Callable[[], str], place: str
) -> None:
    url = f"postgresql+psycopg://{place.format(create_database(), postgresql)}"
    with SiteStore.create(tmp_path / "store", database_url=url) as store:
        store.add(scan("ann", 1))
    kept = [path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert not any(b"hunter2" in content for content in kept)
    with SiteStore.open(tmp_path / "store") as again:
        assert len(again.scans()) == 1


def test_an_unreachable_server_is_named_without_its_password(tmp_path: Path) -> None:
    url = f"postgresql+psycopg://fedcmr:hunter2@/site?host={tmp_path}"
    with pytest.raises(DataError, match=r"^catalogue postgresql\+psycopg://") as refused:
        SiteStore.create(tmp_path / "store", database_url=url)
    assert "hunter2" not in str(refused.value)
    assert not (tmp_path / "store" / "site.secret").exists()


@pytest.mark.parametrize(
    ("url", "message"),
    [("mysql://host/db", "cannot be kept in mysql"), ("not a url", "not a database URL")],
)
def test_other_databases_are_refused(tmp_path: Path, url: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        SiteStore.create(tmp_path / "store", database_url=url)
    assert not (tmp_path / "store").exists()
