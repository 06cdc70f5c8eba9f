"""CMRxRecon files as MATLAB writes them: v7.3 with a user block, and v5."""

from __future__ import annotations

import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io

from fedcmr_client.importers import ImporterWarning, ImportOptions, cmrxrecon, wording
from fedcmr_client.importers.cmrxrecon import CMRxReconImporter
from fedcmr_client.store.scan_file import ScanFile, ScanSource, write_scan
from fedcmr_shared.errors import ConfigurationError, DataError

TREE = "MultiCoil/Cine/TrainingSet/FullSample/Center002/Siemens_30T_Vida/P007"
pytestmark = pytest.mark.filterwarnings("ignore:.*readout oversampling is not stated")


def kspace(*shape: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(np.complex64)


def write_v73(
    path: Path,
    array: np.ndarray,
    key: str = "kspace_full",
    *,
    double: bool = False,
    chunks: tuple[int, ...] | None = None,
) -> Path:
    """Compound (real, imag), MATLAB_class attribute and 512-byte user block, as MATLAB writes."""
    real = np.dtype(np.float64 if double else np.float32)
    compound = np.empty(array.shape, [("real", real), ("imag", real)])
    compound["real"], compound["imag"] = array.real, array.imag
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w", userblock_size=512) as file:
        compression = "gzip" if chunks else None
        dataset = file.create_dataset(key, data=compound, chunks=chunks, compression=compression)
        dataset.attrs["MATLAB_class"] = np.bytes_("double" if double else "single")
    with path.open("r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM")
    return path


def only(path: Path, options: ImportOptions | None = None) -> ScanSource:
    (scan,) = CMRxReconImporter().scans(path, options or ImportOptions())
    return scan


def stacked(scan: ScanSource) -> np.ndarray:
    m = scan.metadata
    shape = (m.frames, m.slices, m.coils, m.phase_encodes, m.readout_samples)
    result = np.zeros(shape, np.complex64)
    for frame, slice_, image in scan.images():
        result[frame, slice_] = image
    return result


@pytest.mark.parametrize("key", ["kspace_full", "kspace"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("chunks", [None, (1, 1, 3, 8, 12), (3, 2, 1, 8, 6), (5, 3, 3, 8, 12)])
def test_v73_samples_arrive_unchanged(
    tmp_path: Path, key: str, double: bool, chunks: tuple[int, ...] | None
) -> None:
    array = kspace(5, 3, 3, 8, 12)
    path = write_v73(tmp_path / TREE / "cine_sax.mat", array, key, double=double, chunks=chunks)
    assert CMRxReconImporter().claims(path)
    np.testing.assert_array_equal(stacked(only(path)), array)


def test_four_axes_are_slices_of_one_frame(tmp_path: Path) -> None:
    array = kspace(4, 3, 8, 12)
    path = write_v73(tmp_path / TREE / "T1w.mat", array, chunks=(2, 3, 8, 12))
    np.testing.assert_array_equal(stacked(only(path)), array[None])


@pytest.mark.parametrize("dimensions", [4, 5])
def test_v5_is_transposed_from_matlab_order(tmp_path: Path, dimensions: int) -> None:
    array = kspace(5, 2, 3, 8, 12)[-dimensions + 5 if dimensions == 5 else 0 :]
    array = array if dimensions == 5 else array[0]
    path = tmp_path / TREE / "cine_lax.mat"
    path.parent.mkdir(parents=True)
    scipy.io.savemat(path, {"kspace_full": array.transpose()})
    assert CMRxReconImporter().claims(path)
    np.testing.assert_array_equal(stacked(only(path)), array if dimensions == 5 else array[None])


def test_metadata_and_patient_come_from_the_tree(tmp_path: Path) -> None:
    scan = only(write_v73(tmp_path / TREE / "cine_sax.mat", kspace(2, 1, 2, 8, 12)))
    m = scan.metadata
    assert (m.modality, m.view, m.vendor, m.scanner) == ("cine", "short-axis", "Siemens", "Vida")
    assert (m.field_strength_t, m.centre, m.origin) == (3.0, "Center002", "measured")
    assert scan.patient == "Center002/P007"
    other = TREE.replace("Center002", "Center003")
    elsewhere = only(write_v73(tmp_path / other / "cine_sax.mat", kspace(2, 1, 2, 8, 12)))
    assert elsewhere.patient != scan.patient


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("T1map", "T1 mapping"),
        ("T1mappost", "T1 mapping post"),
        ("T1rho", "T1rho mapping"),
        ("blackblood", "black blood"),
        ("something", None),
    ],
)
def test_modality_words_are_whole_words(text: str, expected: str | None) -> None:
    assert wording.modality(text) == expected


@pytest.mark.parametrize(("token", "tesla"), [("055T", 0.55), ("15T", 1.5), ("50T", 5.0)])
def test_field_tokens(token: str, tesla: float) -> None:
    assert wording.field_strength(token) == tesla


@pytest.mark.parametrize(
    ("folder", "readout_spacing"),
    [("Siemens_30T_Vida", 300 * 2 / 12), ("UIH_30T_umr790", 300 / 12)],
)
def test_sidecar_spacing(tmp_path: Path, folder: str, readout_spacing: float) -> None:
    place = tmp_path / TREE.replace("Siemens_30T_Vida", folder)
    path = write_v73(place / "cine_sax.mat", kspace(2, 1, 2, 8, 12))
    (place / "cine_sax_info.csv").write_text(
        "FOVx (mm),300\nFOVy(mm),240\nReconMatrix_Y,8\nReadOutOversample,2\nSliceThickness,8.0\n"
    )
    m = only(path).metadata
    assert m.pixel_spacing_mm == pytest.approx((30, readout_spacing))
    assert (m.slice_thickness_mm, m.slice_pitch_mm) == (8.0, None)
    assert (m.spacing_source, m.readout_oversampling) == ("sidecar", 2.0)


def test_options_fill_gaps_but_do_not_override(tmp_path: Path) -> None:
    path = write_v73(tmp_path / TREE / "cine_sax.mat", kspace(2, 1, 2, 8, 12))
    filled = {"life_span": "adult", "vendor": "GE", "slice_pitch_mm": 12.0}
    m = only(path, ImportOptions(metadata=filled)).metadata
    assert (m.life_span, m.vendor) == ("adult", "Siemens")
    assert (m.slice_pitch_mm, m.spacing_source) == (12.0, "user")
    with pytest.raises(ConfigurationError, match="origin"):
        ImportOptions(metadata={"origin": "measured"})
    with pytest.raises(DataError, match="echo_time_ms"):
        only(path, ImportOptions(metadata={"echo_time_ms": -1}))


@pytest.mark.parametrize("chunk_frames", [1, 4, 16])
def test_memory_stays_below_two_frame_stacks_of_a_slice(tmp_path: Path, chunk_frames: int) -> None:
    array = kspace(16, 4, 6, 64, 96)
    path = write_v73(tmp_path / TREE / "cine_sax.mat", array, chunks=(chunk_frames, 2, 6, 64, 96))
    frame_stack, whole = array[:, 0].nbytes, array.nbytes
    del array
    scan = only(path)
    tracemalloc.start()
    try:
        for _ in scan.images():
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * frame_stack < whole


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero_alternate_lines(array: np.ndarray) -> np.ndarray:
    array[..., ::2, :] = 0
    return array


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: write_v73(p, kspace(2, 1, 2, 8, 12), "mask"), "kspace_full or kspace"),
        (lambda p: write_v73(p, kspace(12, 246, 200, 2, 3)), "wrong dimension order"),
        (lambda p: write_v73(p, kspace(2, 8, 12)), "has shape"),
        (lambda p: halve(write_v73(p, kspace(4, 2, 2, 16, 24))), "damaged"),
        (
            lambda p: write_v73(p, zero_alternate_lines(kspace(2, 1, 2, 8, 12))),
            r"undersampled acquisition, 4 of 8",
        ),
    ],
)
def test_refusals(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    path = tmp_path / TREE / "cine_sax.mat"
    make(path)
    with pytest.raises(DataError, match=message):
        write_scan(tmp_path / "scan.h5", only(path))
    assert [p.name for p in tmp_path.iterdir()] == ["MultiCoil"]


@pytest.mark.parametrize("value", [np.nan, np.inf, 0])
def test_bad_samples_are_refused_by_the_writer(tmp_path: Path, value: float) -> None:
    array = kspace(2, 1, 2, 8, 12)
    array[:] = value if value == 0 else array
    array[0, 0, 0, 0, 0] = value
    path = write_v73(tmp_path / TREE / "cine_sax.mat", array)
    with pytest.raises(DataError, match=r"NaN or infinity|all samples are zero"):
        write_scan(tmp_path / "scan.h5", only(path))


def test_a_real_array_is_not_kspace(tmp_path: Path) -> None:
    path = tmp_path / TREE / "cine_sax.mat"
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        file["kspace"] = np.ones((2, 1, 2, 8, 12))
    with pytest.raises(DataError, match="not complex"):
        only(path)


def test_v5_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / TREE / "cine_sax.mat"
    path.parent.mkdir(parents=True)
    scipy.io.savemat(path, {"kspace": kspace(12, 8, 2, 1, 2)}, do_compression=True)
    monkeypatch.setattr(cmrxrecon, "MAX_V5_BYTES", 100)
    with pytest.raises(DataError, match=r"-v7\.3"):
        only(path)
    monkeypatch.undo()
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"cannot be read|damaged"):
        list(only(path).images())
    scipy.io.savemat(path, {"kspace": np.array(["text"])})
    with pytest.raises(DataError, match="not complex"):
        only(path)


def test_patient_needs_a_folder_or_an_option(tmp_path: Path) -> None:
    path = write_v73(tmp_path / "cine.mat", kspace(2, 1, 2, 8, 12))
    with pytest.raises(DataError, match="--patient"):
        only(path)
    assert only(path, ImportOptions(patient="A")).patient == "A"


@pytest.fixture
def caught() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        yield record


def test_doubts_are_warnings(tmp_path: Path, caught: list[warnings.WarningMessage]) -> None:
    path = write_v73(tmp_path / "FullSample/P001/cine_sax.mat", kspace(2, 1, 2, 12, 8))
    assert only(path).patient == "P001"
    texts = [str(w.message) for w in caught if w.category is ImporterWarning]
    for part in ("dimension order", "oversampling", "no centre"):
        assert any(part in text for text in texts), part


def test_partial_fourier_is_accepted(tmp_path: Path) -> None:
    array = kspace(1, 1, 2, 8, 12)
    array[..., :3, :] = 0
    path = write_v73(tmp_path / TREE / "cine_sax.mat", array)
    write_scan(tmp_path / "scan.h5", only(path))
    with ScanFile(tmp_path / "scan.h5") as scan:
        np.testing.assert_array_equal(scan.image(0, 0), array[0, 0])
