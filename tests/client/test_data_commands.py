"""`fedcmr data` on real files: what it prints, what it stores, how it exits."""

import io
import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from fedcmr_client.store.scan_file import ScanSource, Truth
from fedcmr_client.store.site_store import SiteStore
from fedcmr_client.store.split import SPLITS
from fedcmr_shared.cli import main
from fedcmr_shared.schemas.acquisition import AcquisitionMetadata

Run = Callable[..., tuple[int, str, str]]
SECRET = b"s" * 32


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs `fedcmr data` and gives exit code, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(["data", *map(str, arguments)])
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run


def write_mat(path: Path, seed: int) -> Path:
    """Write a cine of the CMRxRecon layout: MATLAB v7.3, [nt, nz, nc, ny, nx] seen from HDF5."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = np.random.default_rng(seed).standard_normal((3, 2, 4, 8, 16, 2)).astype("<f4")
    samples = parts.view([("real", "<f4"), ("imag", "<f4")])[..., 0]
    with h5py.File(path, "w", userblock_size=512) as file:
        file["kspace_full"] = samples
        file["kspace_full"].attrs["MATLAB_class"] = np.bytes_("single")
    head = b"MATLAB 7.3 MAT-file, Platform: GLNXA64"
    with path.open("r+b") as raw:
        raw.write(head.ljust(124) + b"\x00\x02IM")
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "incoming"
    for number in range(3):
        write_mat(root / f"Cine/TrainingSet/FullSample/P00{number}/cine_sax.mat", number)
    return root


def truthful_store(root: Path) -> SiteStore:
    metadata = AcquisitionMetadata(
        origin="simulated",
        source_format="phantom",
        modality="cine",
        view="short-axis",
        frames=1,
        slices=1,
        coils=2,
        phase_encodes=4,
        readout_samples=6,
    )
    labels = np.ones((1, 1, 4, 6), np.uint8)
    truth = Truth({"LVEF_percent": 61.25}, labels, ("background", "LV cavity"))
    image = np.ones((2, 4, 6), np.complex64)
    store = SiteStore.create(root, secret=SECRET)
    store.add(ScanSource("ann", metadata, lambda: iter([(0, 0, image)]), truth, source="ann"))
    return store


def test_import_makes_a_store_of_what_the_files_hold(run: Run, tree: Path, tmp_path: Path) -> None:
    code, out, _ = run("import", tree, "--store", tmp_path / "store")
    assert code == 0
    assert "3 imported, 0 skipped, 0 failed" in out
    with SiteStore.open(tmp_path / "store") as store:
        records = store.scans()
        assert len(store.patients()) == 3
        assert {record.metadata.modality for record in records} == {"cine"}
        assert store.verify() == []
    assert str(records[0].scan_id) in out


def test_a_second_import_skips_and_a_bad_file_fails(run: Run, tree: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    run("import", tree, "--store", store)
    code, out, _ = run("import", tree, "--store", store, "--json")
    summary = json.loads(out)
    assert (code, summary["imported"], summary["skipped"], summary["failed"]) == (1, 0, 3, 0)
    new = write_mat(tree / "Cine/TrainingSet/FullSample/P008/cine_sax.mat", 8)
    assert run("import", tree, "--store", store)[0] == 0
    bad = write_mat(tree / "Cine/TrainingSet/FullSample/P009/cine_sax.mat", 9)
    bad.write_bytes(bad.read_bytes()[:2000])
    write_mat(new, 10)
    code, out, _ = run("import", tree, "--store", store, "--json")
    summary = json.loads(out)
    assert (code, summary["imported"], summary["skipped"], summary["failed"]) == (1, 1, 3, 1)
    (failed,) = [row for row in summary["rows"] if row["outcome"] == "failed"]
    assert "P009" in failed["file"]
    assert failed["reason"]


def test_patient_options_join_names(run: Run, tree: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.csv"
    names.write_text("name,patient\nP000, ann\nP001,ann\n\n")
    assert run("import", tree, "--store", tmp_path / "a", "--patient-map", names)[0] == 0
    assert run("import", tree, "--store", tmp_path / "b", "--patient", "bob")[0] == 0
    with SiteStore.open(tmp_path / "a") as store:
        assert len(store.patients()) == 2
    with SiteStore.open(tmp_path / "b") as store:
        assert len(store.patients()) == 1


def test_settings_fill_in_what_files_leave_out(run: Run, tmp_path: Path) -> None:
    path = write_mat(tmp_path / "unknown" / "scan.mat", 0)
    arguments = ["--modality", "LGE", "--view", "long-axis", "--set", "field_strength_t=3"]
    arguments += ["--set", "pixel_spacing_mm=1.5,1.25", "--set", "diseases=HCM"]
    code, _, _ = run("import", path, "--store", tmp_path / "s", "--patient", "ann", *arguments)
    assert code == 0
    with SiteStore.open(tmp_path / "s") as store:
        (record,) = store.scans()
    assert record.metadata.modality == "LGE"
    assert record.metadata.view == "long-axis"
    assert record.metadata.field_strength_t == 3
    assert record.metadata.pixel_spacing_mm == (1.5, 1.25)
    assert record.metadata.spacing_source == "user"
    assert record.metadata.diseases == ("HCM",)


def test_a_date_can_be_set_and_is_shown(run: Run, tmp_path: Path) -> None:
    path = write_mat(tmp_path / "P001" / "scan.mat", 0)
    store = ("--store", tmp_path / "s")
    assert run("import", path, *store, "--set", "acquired_on=2024-05-01")[0] == 0
    with SiteStore.open(tmp_path / "s") as opened:
        (record,) = opened.scans()
        assert opened.verify() == []
    assert record.metadata.acquired_on == date(2024, 5, 1)
    (listed,) = json.loads(run("list", *store, "--json")[1])
    assert listed["metadata"]["acquired_on"] == "2024-05-01"
    assert "2024-05-01" in run("show", record.scan_id, *store)[1]
    wrong = write_mat(tmp_path / "P002" / "scan.mat", 1)
    code, out, _ = run("import", wrong, *store, "--set", "acquired_on=May", "--json")
    assert code == 1
    assert "acquired_on: " in json.loads(out)["rows"][0]["reason"]


def test_consent_is_set_at_import_and_shown(run: Run, tree: Path, tmp_path: Path) -> None:
    store = ("--store", tmp_path / "store")
    assert run("import", tree, *store, "--consent", "given")[0] == 0
    listed = json.loads(run("list", *store, "--json")[1])
    assert {row["consent"] for row in listed} == {"given"}
    # Everything is skipped, the decision counts nevertheless.
    one = tree / "Cine/TrainingSet/FullSample/P001"
    assert "1 skipped" in run("import", one, *store, "--consent", "refused")[1]
    with SiteStore.open(tmp_path / "store") as opened:
        refused = [record for record in opened.scans() if record.consent is False]
    assert len(refused) == 1
    text = run("list", *store)[1]
    assert (text.count("given"), text.count("refused")) == (2, 1)
    assert "refused" in run("show", refused[0].scan_id, *store)[1]


def test_consent_is_recorded_by_pseudonym_name_or_list(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = truthful_store(tmp_path / "store")
    (patient,) = store.patients()
    place = ("--store", store.root)

    def known() -> bool | None:
        return store.scans()[0].consent

    code, out, _ = run("consent", patient, "--given", *place)
    assert (code, known()) == (0, True)
    assert "consent given by 1 patients" in out
    code, out, _ = run("consent", "ann", "--name", "--refused", *place, "--json")
    assert (code, known()) == (0, False)
    assert json.loads(out) == {"consent": "refused", "patients": [patient]}
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n ann\n")))
    code, _, err = run("consent", "--file", "-", "--name", "--given", *place)
    assert (code, err) == (0, "")
    assert known() is True
    broken = tmp_path / "list.txt"
    broken.write_bytes(b"\xff\xfe")
    code, _, err = run("consent", "--file", broken, "--refused", *place)
    assert (code, "not a text file" in err) == (1, True)
    assert known() is True


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["p-1"], 2, "--given or --refused"),
        (["--given"], 2, "name at least one PATIENT"),
        (["p-1", "--given"], 1, "has no patient p-1: see `fedcmr data list`, or add --name"),
    ],
)
def test_consent_needs_a_patient_and_a_decision(
    run: Run, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    store = truthful_store(tmp_path / "store")
    stopped, _, err = run("consent", *arguments, "--store", store.root)
    assert stopped == code
    assert message in err
    assert store.scans()[0].consent is None


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--format", "tape"], 2, "choose one of auto, cmrxrecon"),
        (["--set", "modality"], 2, "is not FIELD=VALUE"),
        (["--modality", "cine", "--set", "modality=LGE"], 2, "modality is given twice"),
        (["--set", "frames=3"], 1, "'frames' cannot be set"),
        (["--coils", "0"], 1, "coils is 0"),
    ],
)
def test_wrong_options_make_no_store(
    run: Run, tree: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    stopped, _, err = run("import", tree, "--store", tmp_path / "store", *arguments)
    assert stopped == code
    assert message in err
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a CSV file"),
        (b"name,patient\n\xff\xfe,b\n", "not a CSV file"),
        (b"P000,ann\n", "the first line must be name,patient"),
        (b"name,patient\nP000\n", "line 2 must hold a name and a patient"),
        (b"name,patient\nP000,\n", "line 2 must hold a name and a patient"),
        (b"name,patient\nP000,ann\nP000,bob\n", "line 3 gives a name a second patient"),
    ],
)
def test_a_wrong_patient_map_is_named(
    run: Run, tree: Path, tmp_path: Path, content: bytes, message: str
) -> None:
    names = tmp_path / "names.csv"
    names.write_bytes(content)
    code, _, err = run("import", tree, "--store", tmp_path / "store", "--patient-map", names)
    assert code == 1
    assert err.startswith(f"error: {names}: {message}")
    assert not (tmp_path / "store").exists()


def test_import_does_not_turn_a_used_folder_into_a_store(run: Run, tree: Path) -> None:
    code, _, err = run("import", tree, "--store", tree)
    assert code == 1
    assert "is neither a site store nor empty" in err
    assert not (tree / "site.toml").exists()


@pytest.mark.parametrize("command", [["list"], ["show", "x"], ["verify"], ["split"]])
def test_a_wrong_store_is_one_clear_line(run: Run, tmp_path: Path, command: list[str]) -> None:
    for root in (tmp_path, tmp_path / "absent"):
        code, out, err = run(*command, "--store", root)
        assert (code, out) == (1, "")
        assert err.startswith(f"error: {root} is not a site store")
        assert err.count("\n") == 1


def test_list_filters_and_reads_the_store_from_the_environment(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (record,) = truthful_store(tmp_path / "store").scans()
    monkeypatch.setenv("FEDCMR_STORE", str(tmp_path / "store"))
    code, out, _ = run("list", "--split", record.split, "--modality", "cine", "--json")
    assert code == 0
    (listed,) = json.loads(out)
    assert (listed["scan_id"], listed["patient"]) == (record.scan_id, record.patient)
    assert "vendor" in listed["metadata"]["missing"]
    others = [name for name in SPLITS if name != record.split]
    assert json.loads(run("list", "--split", others[0], "--json")[1]) == []
    assert json.loads(run("list", "--modality", "LGE", "--json")[1]) == []
    text = run("list")[1]
    assert record.scan_id in text
    assert "1x1x2x4x6" in text


def test_show_names_what_is_missing_and_the_truth(run: Run, tmp_path: Path) -> None:
    (record,) = truthful_store(tmp_path / "store").scans()
    code, out, _ = run("show", record.scan_id, "--store", tmp_path / "store")
    assert code == 0
    assert "(simulated)" in out
    assert "61.25" in out
    assert "LV cavity" in out
    missing = next(line for line in out.splitlines() if "missing" in line)
    assert "vendor" in missing
    shown = json.loads(run("show", record.scan_id, "--store", tmp_path / "store", "--json")[1])
    assert shown["phenotypes"] == {"LVEF_percent": 61.25}
    assert shown["label_names"] == ["background", "LV cavity"]
    code, _, err = run("show", "nothing", "--store", tmp_path / "store")
    assert code == 1
    assert "has no scan nothing" in err


def test_verify_exits_1_on_any_problem(run: Run, tmp_path: Path) -> None:
    store = truthful_store(tmp_path / "store")
    (record,) = store.scans()
    code, out, _ = run("verify", "--store", store.root)
    assert (code, "all 1 scans are as they were imported" in out) == (0, True)
    (store.root / "scans" / ".0.partial").touch()
    with h5py.File(record.path, "a") as file:
        file["kspace"][0, 0, 0, 0, 0] = 5
    code, out, _ = run("verify", "--store", store.root, "--json")
    report: dict[str, Any] = json.loads(out)
    assert code == 1
    assert report["scans"] == 1
    assert [problem["kind"] for problem in report["problems"]] == ["corrupt", "partial"]
    code, out, _ = run("verify", "--store", store.root)
    assert code == 1
    assert "2 problems" in out


def test_split_counts_patients_and_warns_of_empty_parts(run: Run, tmp_path: Path) -> None:
    store = truthful_store(tmp_path / "store")
    shares = ("--train", "0.5", "--validation", "0.5", "--test", "0")
    code, out, err = run("split", "--store", store.root, *shares, "--json")
    assert code == 0
    report = json.loads(out)
    assert report["fractions"] == {"train": 0.5, "validation": 0.5, "test": 0}
    assert report["patients"] == store.split_counts()
    assert sum(report["patients"].values()) == 1
    (empty,) = report["empty"]
    assert f"warning: no patient is in the {empty} part" in err
    shown = run("split", "--store", store.root)[1]
    assert "validation" in shown
    assert json.loads(run("split", "--store", store.root, "--json")[1]) == report


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        (("--train", "0.5", "--validation", "0.1", "--test", "0.1"), "must add up to 1"),
        (("--train", "1"), "give all of --train, --validation and --test"),
        (("--train", "-1", "--validation", "1", "--test", "1"), "train is -1"),
    ],
)
def test_wrong_shares_are_wrong_usage(
    run: Run, tmp_path: Path, shares: tuple[str, ...], message: str
) -> None:
    store = truthful_store(tmp_path / "store")
    before = store.split_fractions
    code, _, err = run("split", "--store", store.root, *shares)
    assert code == 2
    assert message in err
    assert store.split_fractions == before
