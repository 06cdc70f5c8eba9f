"""A scan file holds what its source said, or there is no file at all."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcmr_client.store.scan_file import ScanFile, ScanSource, Truth, staged_scan, write_scan
from fedcmr_shared.errors import DataError
from fedcmr_shared.schemas.acquisition import AcquisitionMetadata, UnknownVocabularyWarning

FRAMES, SLICES, COILS, PHASE, READOUT = SHAPE = (2, 3, 4, 6, 10)
Images = list[tuple[int, int, np.ndarray]]


def metadata(**changes: Any) -> AcquisitionMetadata:
    fields: dict[str, Any] = {
        "origin": "simulated",
        "source_format": "test",
        "frames": FRAMES,
        "slices": SLICES,
        "coils": COILS,
        "phase_encodes": PHASE,
        "readout_samples": READOUT,
    }
    return AcquisitionMetadata(**(fields | changes))


def kspace(seed: int = 0) -> np.ndarray:
    parts = np.random.default_rng(seed).standard_normal((2, *SHAPE))
    samples: np.ndarray = (parts[0] + 1j * parts[1]).astype(np.complex64)
    return samples


def listed(samples: np.ndarray) -> Images:
    return [(f, s, samples[f, s]) for f in range(FRAMES) for s in range(SLICES)]


def source_of(scan_images: Images, **changes: Any) -> ScanSource:
    fields: dict[str, Any] = {
        "patient": "Ann Clear",
        "metadata": metadata(),
        "images": lambda: iter(scan_images),
        "source": "scan-7.mat",
    }
    return ScanSource(**(fields | changes))


def test_a_stored_scan_gives_back_every_part(tmp_path: Path) -> None:
    samples = kspace()
    labels = np.random.default_rng(1).integers(0, 3, (FRAMES, SLICES, PHASE, READOUT // 2), "u1")
    truth = Truth({"LVEF_percent": 61.5}, labels, ("background", "LV cavity", "myocardium"))
    noise = np.eye(COILS, dtype=np.complex64) * 2
    known = metadata(readout_oversampling=2, modality="cine", frame_times_ms=(0.1, 33.3))
    source = source_of(listed(samples), truth=truth, noise_covariance=noise, metadata=known)
    path = tmp_path / "scan.h5"
    digest = write_scan(path, source)
    with ScanFile(path) as file:
        file.verify()
        assert file.metadata == known
        assert file.digest == digest
        for frame, slice_, image in listed(samples):
            np.testing.assert_array_equal(file.image(frame, slice_), image)
        stored = file.truth
        assert stored is not None
        assert stored.phenotypes == truth.phenotypes
        assert stored.label_names == truth.label_names
        np.testing.assert_array_equal(stored.labels, labels)
        np.testing.assert_array_equal(file.noise_covariance, noise)
    assert list(tmp_path.iterdir()) == [path]
    assert b"Ann Clear" not in path.read_bytes()


def test_the_layout_is_readable_without_fedcmr(tmp_path: Path) -> None:
    samples = kspace()
    write_scan(tmp_path / "scan.h5", source_of(listed(samples)))
    with h5py.File(tmp_path / "scan.h5") as file:
        np.testing.assert_array_equal(file["kspace"], samples)
        assert file["kspace"].chunks == (1, 1, COILS, PHASE, READOUT)
        assert (tmp_path / "scan.h5").stat().st_size < samples.nbytes + 8192
        assert file.attrs["fedcmr_format"] == "1"
        assert json.loads(file.attrs["metadata"])["coils"] == COILS
        assert set(file) == {"kspace"}


@settings(max_examples=10)
@given(order=st.permutations(range(FRAMES * SLICES)))
def test_the_digest_ignores_the_order_of_arrival_and_the_metadata(
    tmp_path_factory: pytest.TempPathFactory, order: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("order")
    images = listed(kspace())
    first = write_scan(folder / "a.h5", source_of(images))
    shuffled = source_of([images[i] for i in order], metadata=metadata(vendor="GE"))
    assert write_scan(folder / "b.h5", shuffled) == first


def test_the_digest_sees_positions_and_shapes(tmp_path: Path) -> None:
    samples = kspace()
    swapped = samples[:, ::-1]
    reshaped = replace(
        source_of([(s, f, samples[f, s]) for f in range(FRAMES) for s in range(SLICES)]),
        metadata=metadata(frames=SLICES, slices=FRAMES),
    )
    sources = [source_of(listed(samples)), source_of(listed(swapped)), reshaped]
    digests = {write_scan(tmp_path / f"{i}.h5", source) for i, source in enumerate(sources)}
    assert len(digests) == 3


def test_images_may_have_any_memory_layout(tmp_path: Path) -> None:
    samples = kspace()
    fortran = [
        (frame, slice_, np.asfortranarray(image)) for frame, slice_, image in listed(samples)
    ]
    write_scan(tmp_path / "scan.h5", source_of(fortran))
    with ScanFile(tmp_path / "scan.h5") as file:
        file.verify()
        np.testing.assert_array_equal(file.image(1, 2), samples[1, 2])


def test_large_finite_and_tiny_values_are_neither_infinite_nor_zero(tmp_path: Path) -> None:
    for value in (3e38, 1e-44):
        samples = np.zeros(SHAPE, np.complex64)
        samples[1, 1, 0, 0, 0] = value
        write_scan(tmp_path / "scan.h5", source_of(listed(samples)))
        with ScanFile(tmp_path / "scan.h5") as file:
            assert file.image(1, 1)[0, 0, 0] == np.complex64(value)


def with_image(position: int, change: Callable[[np.ndarray], np.ndarray]) -> Images:
    images = listed(kspace())
    frame, slice_, image = images[position]
    images[position] = (frame, slice_, change(image.copy()))
    return images


def poisoned(value: complex) -> Callable[[np.ndarray], np.ndarray]:
    def change(image: np.ndarray) -> np.ndarray:
        image[3, 5, 9] = value
        return image

    return change


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (with_image(4, poisoned(np.nan)), "frame 1, slice 1 holds NaN or infinity"),
        (with_image(2, poisoned(1j * np.inf)), "frame 0, slice 2 holds NaN or infinity"),
        (with_image(5, lambda image: image.astype(np.complex128)), "frame 1, slice 2 has type"),
        (with_image(5, lambda image: image.real), "frame 1, slice 2 has type float32"),
        (with_image(0, lambda image: image[1:]), "frame 0, slice 0 has shape"),
        (with_image(0, lambda image: image.swapaxes(1, 2)), "frame 0, slice 0 has shape"),
        (listed(kspace())[:-1], r"frame 1, slice 2 is missing \(1 of 6"),
        ([*listed(kspace()), (1, 0, kspace()[1, 0])], "frame 1, slice 0 comes twice"),
        ([(2, 0, kspace()[0, 0])], "frame 2, slice 0 is outside"),
        ([(0, -1, kspace()[0, 0])], "frame 0, slice -1 is outside"),
        (listed(np.zeros(SHAPE, np.complex64)), "all samples are zero, frame 0 to 1"),
        ([], r"frame 0, slice 0 is missing \(6 of 6"),
    ],
)
def test_a_bad_image_is_refused_and_named(tmp_path: Path, images: Images, message: str) -> None:
    with pytest.raises(DataError, match=rf"^scan-7\.mat: .*{message}"):
        write_scan(tmp_path / "scan.h5", source_of(images))
    assert list(tmp_path.iterdir()) == []


LABELS = np.ones((FRAMES, SLICES, PHASE, READOUT), np.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"truth": Truth({"LVEF_percent": float("nan")})}, "phenotype LVEF_percent is nan"),
        ({"truth": Truth({}, LABELS, ("background",))}, "label 1 has no name"),
        ({"truth": Truth({}, LABELS[..., 1:], ("background", "LV"))}, "labels are uint8"),
        ({"truth": Truth({}, LABELS.astype(int), ("background", "LV"))}, "labels are int64"),
        ({"noise_covariance": np.eye(3, dtype=np.complex64)}, r"not complex64 \[4, 4\]"),
        ({"noise_covariance": np.eye(4)}, "noise_covariance is float64"),
        ({"noise_covariance": np.full((4, 4), np.nan, np.complex64)}, "noise_covariance holds NaN"),
    ],
)
def test_bad_truth_or_noise_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=rf"^scan-7\.mat: .*{message}"):
        write_scan(tmp_path / "scan.h5", source_of(listed(kspace()), **changes))
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_breaks_off_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "scan.h5"
    digest = write_scan(path, source_of(listed(kspace())))

    def broken() -> Iterator[tuple[int, int, np.ndarray]]:
        yield from listed(kspace(1))[:2]
        raise OSError("Unable to read (truncated file)\ndetails")

    with pytest.raises(DataError, match=r"^scan-7\.mat: cannot be read: Unable to read"):
        write_scan(path, source_of([], images=broken))
    with ScanFile(path) as file:
        file.verify()
        assert file.digest == digest
    assert list(tmp_path.iterdir()) == [path]


def test_a_staged_scan_that_is_not_published_disappears(tmp_path: Path) -> None:
    with staged_scan(tmp_path, source_of(listed(kspace()))) as staged:
        assert staged.path.is_file()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot store scan-7\.mat in .*absent"):
        write_scan(tmp_path / "absent" / "scan.h5", source_of(listed(kspace())))


FULL_DISK = """
    import json, os, resource, signal, sys
    from pathlib import Path
    import numpy as np
    from fedcmr_client.store.scan_file import ScanSource, Truth, write_scan
    from fedcmr_shared.errors import DataError
    from fedcmr_shared.schemas.acquisition import AcquisitionMetadata

    path, limit, n_labels = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    metadata = AcquisitionMetadata(
        origin="simulated", source_format="test", frames=20, slices=1, coils=4,
        phase_encodes=50, readout_samples=100, contrast_times_ms=[i / 7 for i in range(20)],
    )
    image = np.ones((4, 50, 100), np.complex64)
    labels = np.random.default_rng(0).integers(0, 256, (20, 1, 50, 100), np.uint8)
    truth = Truth({}, labels, tuple("x" * 300 for _ in range(256))) if n_labels else None
    source = ScanSource("a", metadata, lambda: ((f, 0, image) for f in range(20)), truth, None, "S")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    opened = len(os.listdir("/proc/self/fd"))
    try:
        write_scan(path, source)
        message = "stored"
    except DataError as error:
        message = str(error)
    leaked = len(os.listdir("/proc/self/fd")) - opened
    print(json.dumps([message, os.listdir(path.parent), leaked]))
"""
SAMPLE_BYTES = 20 * 4 * 50 * 100 * 8


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts descriptors in /proc")
@pytest.mark.parametrize(
    ("limit", "labels"),
    [(SAMPLE_BYTES // 2, 0), (SAMPLE_BYTES - 1, 0), (SAMPLE_BYTES + 3000, 1), (500, 0)],
    ids=["in the samples", "in the last sample", "in the truth", "in the header"],
)
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, limit: int, labels: int) -> None:
    target = tmp_path / "store"
    target.mkdir()
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(FULL_DISK),
            target / "x.h5",
            str(limit),
            str(labels),
        ],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    message, files, leaked = json.loads(result.stdout)
    assert message.startswith(f"disk full while storing S in {target}")
    assert files == []
    assert leaked == 0
    assert result.stderr == ""


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "stored.h5"
    write_scan(path, source_of(listed(kspace())))
    return path


def test_verify_finds_one_changed_bit(stored: Path) -> None:
    content = bytearray(stored.read_bytes())
    content[content.index(kspace()[1, 1].tobytes()) + 7] ^= 1
    stored.write_bytes(content)
    with ScanFile(stored) as file, pytest.raises(DataError, match="do not match the digest"):
        file.verify()


def test_a_truncated_file_is_refused(stored: Path) -> None:
    stored.write_bytes(stored.read_bytes()[:-500])
    with pytest.raises(DataError, match=r"stored\.h5: not a readable scan file"):
        ScanFile(stored)


def test_absent_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.h5: there is no such scan file"):
        ScanFile(tmp_path / "absent.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["kspace"] = kspace()
    with pytest.raises(DataError, match=r"other\.h5: not a scan file of format 1"):
        ScanFile(tmp_path / "other.h5")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.attrs.__setitem__("fedcmr_format", "2"), "not a scan file of format 1"),
        (lambda f: f.attrs.__setitem__("metadata", "{"), "cannot read header"),
        (lambda f: f.attrs.__setitem__("metadata", '{"coils": 4}'), "cannot read header"),
        (lambda f: f.attrs.__delitem__("digest"), "cannot read header"),
        (lambda f: f.__delitem__("kspace"), "cannot read header"),
        (
            lambda f: f.attrs.__setitem__("metadata", metadata(coils=5).model_dump_json()),
            r"kspace is complex64 \[2, 3, 4, 6, 10\], its metadata says",
        ),
    ],
)
def test_a_damaged_header_is_named(
    stored: Path, damage: Callable[[h5py.File], None], message: str
) -> None:
    with h5py.File(stored, "a") as file:
        damage(file)
    with pytest.raises(DataError, match=rf"stored\.h5: {message}"):
        ScanFile(stored)


def test_damaged_truth_is_named(stored: Path) -> None:
    with h5py.File(stored, "a") as file:
        file.create_group("truth").attrs["phenotypes"] = "{"
    with ScanFile(stored) as scan, pytest.raises(DataError, match="cannot read truth"):
        _ = scan.truth


@pytest.mark.parametrize("position", [(-1, 0), (FRAMES, 0), (0, -1), (0, SLICES)])
def test_images_outside_the_scan_do_not_exist(stored: Path, position: tuple[int, int]) -> None:
    with ScanFile(stored) as file, pytest.raises(IndexError, match="has no frame"):
        file.image(*position)


def test_unknown_words_warn_at_import_only(tmp_path: Path) -> None:
    with pytest.warns(UnknownVocabularyWarning, match="Aurora"):
        known = metadata(vendor="Aurora")
    write_scan(tmp_path / "scan.h5", source_of(listed(kspace()), metadata=known))
    with ScanFile(tmp_path / "scan.h5") as file:
        assert file.metadata.vendor == "Aurora"


def test_long_metadata_fits(tmp_path: Path) -> None:
    frames = 6000
    times = tuple(float(t) / 7 for t in range(frames))
    known = metadata(frames=frames, slices=1, coils=1, frame_times_ms=times)
    image = np.ones((1, PHASE, READOUT), np.complex64)
    source = source_of([(f, 0, image) for f in range(frames)], metadata=known)
    write_scan(tmp_path / "scan.h5", source)
    with ScanFile(tmp_path / "scan.h5") as file:
        assert file.metadata.frame_times_ms == times
