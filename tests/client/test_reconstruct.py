"""From a stored scan and a bundle to NIfTI and DICOM."""

import errno
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from mr_image_attributes import REQUIRED, nifti_affine, read_strictly
from release_parts import make_card, write_model
from safetensors.torch import save_file

from fedcmr_client import image_export
from fedcmr_client.image_export import ImageSeries, export_images
from fedcmr_client.image_files import NOTICE
from fedcmr_client.reconstruction import ReconstructedScan, reconstruct_scan
from fedcmr_client.store.scan_file import ScanFile, ScanSource, write_scan
from fedcmr_client.store.site_store import SiteStore
from fedcmr_shared.cli import main
from fedcmr_shared.errors import ConfigurationError, DataError, ModelError
from fedcmr_shared.identity.keys import SiteKey
from fedcmr_shared.kspace.coils import remove_readout_oversampling, rss
from fedcmr_shared.kspace.fourier import ifft2c
from fedcmr_shared.kspace.masks import Sampling, make_mask, realised_acceleration
from fedcmr_shared.models.bundle import Bundle, load_bundle, save_bundle
from fedcmr_shared.models.registry import build_model
from fedcmr_shared.models.release import ReleaseBundle
from fedcmr_shared.schemas.acquisition import AcquisitionMetadata
from fedcmr_shared.schemas.job import ModelSpec
from fedcmr_shared.text.encoders import HashedEncoder

FRAMES, SLICES, COILS, PHASE, READOUT = 3, 2, 2, 32, 48
Y, X = 32, 24  # after removal of twofold readout oversampling
SAMPLING = Sampling("uniform", 4, acs_lines=8)
OPTIONS = ("--acceleration", "4", "--acs-lines", "8")
SPEC = ModelSpec(text_encoder="hashed")

KNOWN = {
    "pixel_spacing_mm": (1.5, 2.25),
    "spacing_source": "header",
    "slice_thickness_mm": 8.0,
    "slice_pitch_mm": 10.0,
    "frame_times_ms": (10.0, 50.0, 90.0),
    "field_strength_t": 1.5,
    "vendor": "Siemens",
    "scanner": "Aera",
    "echo_time_ms": 1.25,
    "heart_rate_bpm": 61.4,
}

Kspace = np.ndarray


def metadata(**known: Any) -> AcquisitionMetadata:
    return AcquisitionMetadata(
        origin="simulated",
        source_format="test",
        frames=FRAMES,
        slices=SLICES,
        coils=COILS,
        phase_encodes=PHASE,
        readout_samples=READOUT,
        readout_oversampling=2.0,
        **known,
    )


def kspace(seed: int = 0) -> Kspace:
    """Noise with a bright centre: complex64 [frame, slice, coil, phase, readout]."""
    generator = np.random.default_rng(seed)
    noise = generator.standard_normal((2, FRAMES, SLICES, COILS, PHASE, READOUT))
    y, x = np.mgrid[-PHASE // 2 : PHASE // 2, -READOUT // 2 : READOUT // 2]
    data: Kspace = ((noise[0] + 1j * noise[1]) / (1 + np.hypot(y, x))).astype(np.complex64)
    return data


def source(data: Kspace, **known: Any) -> ScanSource:
    def images() -> Iterator[tuple[int, int, np.ndarray]]:
        for frame, slice_ in np.ndindex(FRAMES, SLICES):
            yield frame, slice_, data[frame, slice_]

    return ScanSource("patient", metadata(**known), images)


def reader(data: Kspace) -> Callable[[int, int], np.ndarray]:
    return lambda frame, slice_: data[frame, slice_]


@pytest.fixture(scope="module")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("bundle") / "model.safetensors"
    save_bundle(path, build_model(SPEC).state_dict(), SPEC, {})
    return path


@pytest.fixture(scope="module")
def bundle(bundle_path: Path) -> Bundle:
    return load_bundle(bundle_path)


@pytest.fixture
def scan_path(tmp_path: Path) -> Path:
    write_scan(tmp_path / "scan.h5", source(kspace(), **KNOWN))
    return tmp_path / "scan.h5"


def reconstruct(
    data: Kspace, bundle: Bundle, sampling: Sampling = SAMPLING, **options: Any
) -> ReconstructedScan:
    return reconstruct_scan(reader(data), metadata(), bundle, HashedEncoder(), sampling, **options)


def series(images: np.ndarray, **known: Any) -> ImageSeries:
    scan = ReconstructedScan(images, SAMPLING, "retrospective", 2.5, 0.125)
    return ImageSeries(scan, metadata(**known), "p-abc", "d" * 64, "a" * 64, 0)


def some_images() -> np.ndarray:
    generator = np.random.default_rng(4)
    return generator.uniform(0, 3e-5, (FRAMES, SLICES, Y, X)).astype(np.float32)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["models", "reconstruct", *map(str, arguments)])
    output = capsys.readouterr()
    return stopped.value.code, output.out, output.err


class TestReconstruction:
    def test_exact_consistency_with_all_lines_gives_the_measured_image(
        self, bundle: Bundle
    ) -> None:
        # With weight 0 the last step puts every measured sample back.
        model = build_model(SPEC)
        model.load_state_dict(bundle.model.state_dict())
        for name, parameter in model.named_parameters():
            if name.endswith("consistency_weight"):
                parameter.data.zero_()
        data = kspace()
        result = reconstruct(data, replace(bundle, model=model), Sampling("uniform", 1, 8))
        expected = rss(ifft2c(remove_readout_oversampling(torch.from_numpy(data), 2.0)))
        np.testing.assert_allclose(result.images, expected.numpy(), rtol=1e-3, atol=1e-5)
        assert result.residual < 1e-6
        assert result.realised_acceleration == 1

    def test_residual_is_that_of_the_returned_kspace(self, bundle: Bundle) -> None:
        data = kspace()
        calls: list[torch.Tensor] = []
        hook = bundle.model.register_forward_hook(
            lambda _module, inputs, output: calls.extend([inputs[0], inputs[1], output.kspace])
        )
        result = reconstruct(data, bundle)
        hook.remove()
        measured, mask, k = (torch.cat(calls[part::3]) for part in range(3))
        expected = torch.linalg.vector_norm((k - measured) * mask)
        expected = expected / torch.linalg.vector_norm(measured)
        assert result.residual == pytest.approx(expected.item(), rel=1e-4)
        assert result.residual > 1e-3

    def test_retrospective_mask_is_the_requested_one(self, bundle: Bundle) -> None:
        result = reconstruct(kspace(), bundle)
        mask = make_mask(SAMPLING, phase_encodes=PHASE, readout=X, frames=FRAMES, seed=0)
        assert result.undersampling == "retrospective"
        assert result.realised_acceleration == realised_acceleration(mask)

    def test_samples_that_are_left_out_do_not_matter(self, bundle: Bundle) -> None:
        mask = make_mask(SAMPLING, phase_encodes=PHASE, readout=READOUT, frames=FRAMES, seed=0)
        data = kspace()
        other = np.where(mask[:, None, None], data, data * 7 + 1).astype(np.complex64)
        np.testing.assert_array_equal(
            reconstruct(data, bundle).images, reconstruct(other, bundle).images
        )

    def test_seed_decides_random_patterns(self, bundle: Bundle) -> None:
        sampling = Sampling("kt-gaussian", 4, acs_lines=8)
        first, again, other = (
            reconstruct(kspace(), bundle, sampling, seed=seed).images for seed in (1, 1, 2)
        )
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, other)

    def test_scan_undersampled_at_the_scanner_keeps_its_lines(self, bundle: Bundle) -> None:
        mask = make_mask(SAMPLING, phase_encodes=PHASE, readout=READOUT, frames=FRAMES, seed=0)
        missing = (kspace() * mask[:, None, None]).astype(np.complex64)
        prospective = reconstruct(missing, bundle)
        retrospective = reconstruct(kspace(), bundle)
        assert prospective.undersampling == "prospective"
        assert prospective.realised_acceleration == retrospective.realised_acceleration
        np.testing.assert_allclose(prospective.images, retrospective.images, rtol=1e-5)

    def test_lines_that_lack_at_the_edge_do_not_count(self, bundle: Bundle) -> None:
        data = kspace()
        data[..., :5, :] = 0
        assert reconstruct(data, bundle).undersampling == "retrospective"

    def test_blank_image_stays_blank(self, bundle: Bundle) -> None:
        data = kspace()
        data[1, 1] = 0
        images = reconstruct(data, bundle).images
        assert not images[1, 1].any()
        assert images[1, 0].any()

    def test_reports_every_image(self, bundle: Bundle) -> None:
        done: list[None] = []
        reconstruct(kspace(), bundle, on_image=lambda: done.append(None))
        assert len(done) == FRAMES * SLICES

    def test_refuses_gap_in_the_calibration_lines(self, bundle: Bundle) -> None:
        data = kspace()
        data[0, 0, :, PHASE // 2] = 0
        with pytest.raises(DataError, match="lacks some of 8 calibration lines"):
            reconstruct(data, bundle)

    def test_refuses_radial_pattern_for_missing_lines(self, bundle: Bundle) -> None:
        data = kspace()
        data[:, :, :, 3] = 0
        with pytest.raises(ConfigurationError, match="name a Cartesian pattern"):
            reconstruct(data, bundle, Sampling("radial", 4, 8))

    def test_refuses_calibration_beyond_the_matrix(self, bundle: Bundle) -> None:
        with pytest.raises(ConfigurationError, match="acs_lines 40 exceeds phase_encodes 32"):
            reconstruct(kspace(), bundle, Sampling("uniform", 4, 40))

    def test_refuses_another_text_encoder(self, bundle: Bundle) -> None:
        spec = SPEC.model_copy(update={"text_encoder": "minilm"})
        with pytest.raises(ModelError, match="trained with 'minilm'"):
            reconstruct(kspace(), replace(bundle, spec=spec))

    def test_refuses_another_kind_of_model(self, bundle: Bundle) -> None:
        with pytest.raises(ModelError, match="does not reconstruct"):
            reconstruct(kspace(), replace(bundle, model=torch.nn.Identity()))

    def test_refuses_weights_that_are_not_finite(self, bundle: Bundle) -> None:
        model = build_model(SPEC)
        state = {name: torch.full_like(t, torch.nan) for name, t in model.state_dict().items()}
        model.load_state_dict(state)
        with pytest.raises(ModelError, match="no finite image for frame 0, slice 0"):
            reconstruct(kspace(), replace(bundle, model=model))

    @pytest.mark.parametrize("device", ["abacus", "cuda:99"])
    def test_refuses_absent_device(self, bundle: Bundle, device: str) -> None:
        with pytest.raises(ConfigurationError, match=f"device '{device}' cannot be used"):
            reconstruct(kspace(), bundle, device=device)


class TestNifti:
    def read(self, folder: Path, **known: Any) -> Any:
        export_images(folder, series(some_images(), **known))
        return nibabel.load(folder / "reconstruction.nii.gz")

    def test_values_and_axes(self, tmp_path: Path) -> None:
        image = self.read(tmp_path / "out", **KNOWN)
        assert image.shape == (X, Y, SLICES, FRAMES)
        np.testing.assert_array_equal(image.get_fdata().transpose(3, 2, 1, 0), some_images())

    def test_known_spacing(self, tmp_path: Path) -> None:
        image = self.read(tmp_path / "out", **KNOWN)
        np.testing.assert_allclose(image.affine, np.diag([-2.25, -1.5, 10, 1]))
        np.testing.assert_allclose(image.header.get_zooms(), (2.25, 1.5, 10, 0.04), rtol=1e-6)
        assert image.header.get_xyzt_units() == ("mm", "sec")
        assert image.header["descrip"].item().startswith(b"RESEARCH USE ONLY; voxel size from")

    def test_unknown_spacing_is_one_millimetre_and_said(self, tmp_path: Path) -> None:
        image = self.read(tmp_path / "out")
        np.testing.assert_allclose(image.affine, np.diag([-1, -1, 1, 1]))
        assert b"y, x, z spacing unknown, set to 1 mm" in image.header["descrip"].item()
        assert image.header.get_xyzt_units() == ("mm", "unknown")

    def test_header_and_sidecar_hold_the_provenance(self, tmp_path: Path) -> None:
        image = self.read(tmp_path / "out", **KNOWN)
        sidecar = json.loads((tmp_path / "out" / "reconstruction.json").read_text())
        (extension,) = image.header.extensions
        assert json.loads(extension.get_content()) == sidecar
        expected = {
            "notice": NOTICE,
            "patient": "p-abc",
            "kspace_origin": "simulated",
            "model_sha256": "a" * 64,
            "undersampling": "retrospective",
            "pattern": "uniform",
            "acceleration_nominal": 4,
            "acceleration_realised": 2.5,
            "acs_lines": 8,
            "data_consistency_residual": 0.125,
        }
        assert expected.items() <= sidecar.items()
        assert "M k - M y" in sidecar["data_consistency_residual_definition"]


class TestDicom:
    @pytest.fixture
    def datasets(self, tmp_path: Path) -> dict[tuple[int, int], pydicom.Dataset]:
        """Files by (slice, frame)."""
        export_images(tmp_path / "out", series(some_images(), **KNOWN))
        read = read_strictly(sorted((tmp_path / "out" / "dicom").iterdir()))
        return {divmod(number, FRAMES): dataset for number, dataset in enumerate(read)}

    def test_pixels(self, datasets: dict[tuple[int, int], pydicom.Dataset]) -> None:
        assert len(datasets) == SLICES * FRAMES
        images = some_images()
        for (slice_, frame), dataset in datasets.items():
            stored = dataset.pixel_array
            assert stored.dtype == np.uint16
            values = stored * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
            tolerance = float(dataset.RescaleSlope) * 0.51
            np.testing.assert_allclose(values, images[frame, slice_], atol=tolerance, rtol=0)
        assert max(int(dataset.pixel_array.max()) for dataset in datasets.values()) == 65535

    def test_identifiers(self, datasets: dict[tuple[int, int], pydicom.Dataset]) -> None:
        instances = {dataset.SOPInstanceUID for dataset in datasets.values()}
        assert len(instances) == len(datasets)
        for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
            (uid,) = {dataset[name].value for dataset in datasets.values()}
            assert uid.is_valid
        for dataset in datasets.values():
            assert dataset.SOPInstanceUID.is_valid
            assert dataset.SOPClassUID == pydicom.uid.MRImageStorage
            assert dataset.file_meta.MediaStorageSOPInstanceUID == dataset.SOPInstanceUID
            assert dataset.PatientID == "p-abc"

    def test_marked_as_derived_research_image(
        self, datasets: dict[tuple[int, int], pydicom.Dataset]
    ) -> None:
        for dataset in datasets.values():
            assert list(dataset.ImageType[:2]) == ["DERIVED", "SECONDARY"]
            assert dataset.SeriesDescription.startswith(NOTICE)
            assert dataset.ImageComments.startswith(NOTICE)
            assert dataset.ContentQualification == "RESEARCH"
            for part in (
                "retrospective undersampling uniform",
                "nominal 4, realised 2.50, 8 ACS lines",
                f"model SHA-256 {'a' * 64}",
                "residual 1.250e-01",
                "simulated k-space",
            ):
                assert part in dataset.DerivationDescription
            assert len(dataset.DerivationDescription) <= 1024

    def test_geometry_and_time(self, datasets: dict[tuple[int, int], pydicom.Dataset]) -> None:
        dataset = datasets[1, 2]
        assert (dataset.Rows, dataset.Columns) == (Y, X)
        assert list(dataset.PixelSpacing) == [1.5, 2.25]
        assert dataset.SliceThickness == 8
        assert dataset.SpacingBetweenSlices == 10
        assert list(dataset.ImagePositionPatient) == [0, 0, 10]
        assert dataset.TriggerTime == 90
        assert dataset.InstanceNumber == FRAMES + 2 + 1
        assert dataset.HeartRate == 61
        assert "not of the patient" in dataset.ImageComments

    def test_nifti_lies_in_the_same_place(
        self, tmp_path: Path, datasets: dict[tuple[int, int], pydicom.Dataset]
    ) -> None:
        first, second = datasets[0, 0], datasets[1, 0]
        image: Any = nibabel.load(tmp_path / "out" / "reconstruction.nii.gz")
        np.testing.assert_allclose(
            image.affine, nifti_affine(first, float(first.SpacingBetweenSlices))
        )
        above = np.array(second.ImagePositionPatient) - np.array(first.ImagePositionPatient)
        np.testing.assert_allclose(image.affine[:3, 2], above)

    def test_all_attributes_that_mr_images_require(
        self, datasets: dict[tuple[int, int], pydicom.Dataset]
    ) -> None:
        dataset = datasets[0, 0]
        assert [name for name in REQUIRED if name not in dataset] == []

    def test_same_reconstruction_same_identifiers(self, tmp_path: Path) -> None:
        def uid(folder: str, given: ImageSeries) -> tuple[str, str]:
            export_images(tmp_path / folder, given)
            dataset = pydicom.dcmread(tmp_path / folder / "dicom" / "IM00001.dcm")
            return dataset.StudyInstanceUID, dataset.SeriesInstanceUID

        first = series(some_images())
        other = uid("c", replace(first, model_sha256="b" * 64))
        assert uid("a", first) == uid("b", first)
        assert other[0] == uid("d", first)[0]
        assert other[1] != uid("e", first)[1]

    def test_blank_scan(self, tmp_path: Path) -> None:
        export_images(tmp_path / "out", series(np.zeros((FRAMES, SLICES, Y, X), np.float32)))
        dataset = pydicom.dcmread(tmp_path / "out" / "dicom" / "IM00001.dcm")
        assert not dataset.pixel_array.any()
        assert float(dataset.RescaleSlope) > 0


class TestOutputFolder:
    def test_refuses_folder_with_content(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "keep.txt").write_text("mine")
        with pytest.raises(ConfigurationError, match="not an empty folder"):
            export_images(tmp_path / "out", series(some_images()))
        assert os.listdir(tmp_path / "out") == ["keep.txt"]

    def test_refuses_file(self, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("mine")
        with pytest.raises(ConfigurationError, match="not an empty folder"):
            export_images(tmp_path / "out", series(some_images()))

    def test_fills_empty_folder_and_names_its_files(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        files = export_images(tmp_path / "out", series(some_images()))
        assert files == sorted(p for p in (tmp_path / "out").rglob("*") if p.is_file())
        assert len(files) == 2 + FRAMES * SLICES

    @pytest.mark.parametrize(
        ("failure", "expected"),
        [(OSError(errno.ENOSPC, "No space left"), DataError), (KeyboardInterrupt(), None)],
    )
    def test_failure_leaves_nothing(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        failure: BaseException,
        expected: type[Exception] | None,
    ) -> None:
        def fail(*_arguments: object) -> None:
            raise failure

        monkeypatch.setattr(image_export, "write_dicom", fail)
        with pytest.raises(expected or type(failure)):
            export_images(tmp_path / "out", series(some_images()))
        assert os.listdir(tmp_path) == []


class TestCommand:
    def test_writes_what_it_says(
        self, scan_path: Path, bundle_path: Path, tmp_path: Path, capsys: Any
    ) -> None:
        out = tmp_path / "out"
        code, text, _ = run(
            capsys, scan_path, "--model", bundle_path, "--out", out, *OPTIONS, "--json"
        )
        assert code == 0
        printed = json.loads(text)
        assert all(Path(name).is_file() for name in printed["files"])
        assert printed["model_sha256"] == load_bundle(bundle_path).sha256
        assert printed["patient"].startswith("scan-")
        mask = make_mask(SAMPLING, phase_encodes=PHASE, readout=X, frames=FRAMES, seed=0)
        assert printed["acceleration_realised"] == realised_acceleration(mask)
        with ScanFile(scan_path) as file:
            expected = reconstruct_scan(
                file.image, file.metadata, load_bundle(bundle_path), HashedEncoder(), SAMPLING
            )
        image: Any = nibabel.load(out / "reconstruction.nii.gz")
        np.testing.assert_array_equal(image.get_fdata().transpose(3, 2, 1, 0), expected.images)

    def test_scan_of_a_store_keeps_its_pseudonym(
        self, bundle_path: Path, tmp_path: Path, capsys: Any
    ) -> None:
        with SiteStore.create(tmp_path / "site") as store:
            record = store.add(source(kspace()))
        out = tmp_path / "out"
        code, text, _ = run(capsys, record.path, "--model", bundle_path, "--out", out, *OPTIONS)
        assert code == 0
        assert NOTICE in text
        assert "retrospective" in text
        dataset = pydicom.dcmread(out / "dicom" / "IM00001.dcm")
        assert dataset.PatientID == record.patient

    def test_missing_scan(self, bundle_path: Path, tmp_path: Path, capsys: Any) -> None:
        scan = tmp_path / "none.h5"
        code, _, err = run(capsys, scan, "--model", bundle_path, "--out", tmp_path / "out")
        assert code == 1
        assert err.startswith(f"error: {scan}: there is no such scan file")
        assert not (tmp_path / "out").exists()

    def test_a_release_gives_the_images_of_its_bundle(
        self, scan_path: Path, tmp_path: Path, capsys: Any
    ) -> None:
        key = SiteKey.create(tmp_path / "identity.pem")
        digest = write_model(tmp_path / "model.safetensors")
        release = tmp_path / "heart.zip"
        ReleaseBundle.write(release, tmp_path / "model.safetensors", make_card(key, digest), key)
        trust = ("--trust", key.public_key)
        arguments = (scan_path, "--model", release, *OPTIONS)
        code, text, _ = run(capsys, *arguments, "--out", tmp_path / "out", *trust, "--json")
        assert code == 0
        assert json.loads(text)["model_sha256"] == digest
        for model, trusted, reason in (
            (release, "ab" * 32, "another coordinator, or forged"),
            (tmp_path / "model.safetensors", key.public_key, "only releases are signed"),
        ):
            out = ("--out", tmp_path / "refused", "--trust", trusted)
            code, _, err = run(capsys, scan_path, "--model", model, *OPTIONS, *out)
            assert code == 1
            assert reason in err
        assert not (tmp_path / "refused").exists()

    def test_missing_bundle(self, scan_path: Path, tmp_path: Path, capsys: Any) -> None:
        model = tmp_path / "none.safetensors"
        code, _, err = run(capsys, scan_path, "--model", model, "--out", tmp_path / "out")
        assert code == 1
        assert err == f"error: model bundle {model} does not exist\n"

    def test_weights_that_are_no_bundle(self, scan_path: Path, tmp_path: Path, capsys: Any) -> None:
        model = tmp_path / "weights.safetensors"
        save_file({"a": torch.zeros(1)}, model)
        code, _, err = run(capsys, scan_path, "--model", model, "--out", tmp_path / "out")
        assert code == 1
        assert err == f"error: {model} is not a model bundle of format 1\n"

    def test_output_is_checked_before_any_work(self, tmp_path: Path, capsys: Any) -> None:
        (tmp_path / "file").write_text("mine")
        code, _, err = run(capsys, "no.h5", "--model", "no", "--out", tmp_path)
        assert code == 1
        assert "not an empty folder" in err

    def test_a_place_that_cannot_be_written_is_found_before_any_work(
        self, tmp_path: Path, capsys: Any
    ) -> None:
        (tmp_path / "file").write_text("mine")
        out = tmp_path / "file" / "out"
        code, _, err = run(capsys, "no.h5", "--model", "no", "--out", out)
        assert code == 1
        assert err.startswith(f"error: output {out}: nothing can be written to {tmp_path}/file: ")

    def test_clip_bundle_needs_the_folder_with_its_encoder(
        self, scan_path: Path, tmp_path: Path, capsys: Any
    ) -> None:
        spec = ModelSpec(text_encoder="clip")
        save_bundle(tmp_path / "m", build_model(spec).state_dict(), spec, {})
        code, _, err = run(
            capsys, scan_path, "--model", tmp_path / "m", "--out", tmp_path / "out", *OPTIONS
        )
        assert code == 1
        assert "needs a local folder" in err

    def test_wrong_pattern_is_wrong_usage(self, capsys: Any) -> None:
        assert run(capsys, "a", "--model", "b", "--out", "c", "--pattern", "spiral")[0] == 2
