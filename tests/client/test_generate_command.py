"""Synthetic clips as files: what is in them, that each says what it is, and the command."""

from __future__ import annotations

import csv
import errno
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import nibabel
import numpy as np
import pydicom
import pytest
import torch
from generator_parts import MICRO, NAMES, discs, micro
from mr_image_attributes import REQUIRED, nifti_affine, read_strictly
from PIL import Image, ImageSequence
from release_parts import make_card, write_model

from fedcmr_client import synthetic_export
from fedcmr_client.commands.generate import generate
from fedcmr_client.generation import ClipModel, ClipRequest, SyntheticClip
from fedcmr_client.heart_requests import complete
from fedcmr_client.image_files import NOTICE, check_free
from fedcmr_client.synthetic_export import (
    LABEL,
    Format,
    GenerationRun,
    caption,
    export_clips,
    write_gif,
)
from fedcmr_shared.errors import ConfigurationError, DataError, FedcmrError, ModelError
from fedcmr_shared.identity.keys import SiteKey
from fedcmr_shared.models.bundle import load_bundle, save_bundle
from fedcmr_shared.models.card import GateResult
from fedcmr_shared.models.cpgg import CONFIGS
from fedcmr_shared.models.masked_generator import SamplingPlan
from fedcmr_shared.models.registry import build_model
from fedcmr_shared.models.release import CARD, ReleaseBundle
from fedcmr_shared.schemas.job import JobSpec, ModelSpec
from fedcmr_shared.schemas.privacy import EvaluationSpec, PrivacySpec

FRAMES, ROWS, COLUMNS = MICRO.video.clip
PIXEL = MICRO.pixel_mm
PLAN = SamplingPlan(steps=2, diffusion_steps=3, guidance=2.5)
ALL: tuple[Format, ...] = ("nifti", "dicom", "gif")
FAST = ("--steps", 2, "--diffusion-steps", 2)


def clips(count: int = 2) -> list[SyntheticClip]:
    frames = discs(count, MICRO.video.clip)[0][:, 0].numpy()
    given = {"LVEDV": 180.0, "LVESV": 90.0}
    made = ClipRequest(given, complete(given, NAMES), 5)
    return [SyntheticClip(made, one) for one in frames]


def run_of(**release: Any) -> GenerationRun:
    model = ClipModel(micro(), "tiny", "a" * 64, release or None)
    return GenerationRun(model, PLAN, "given by the user", 3)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "out"
    export_clips(folder, run_of(), clips(), ALL)
    return folder


@pytest.fixture
def datasets(out: Path) -> list[pydicom.Dataset]:
    """Frames of the first clip."""
    return read_strictly(sorted((out / "clip-0001").iterdir()))


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def label_of(path: Path) -> str:
    """What a file says that it is, read as somebody would who got this file alone."""
    match path.suffixes:
        case [".nii", ".gz"]:
            image: Any = nibabel.load(path)
            (extension,) = image.header.extensions
            assert image.header["descrip"].item().startswith(LABEL.encode())
            return str(json.loads(extension.get_content())["label"])
        case [".gif"]:
            with Image.open(path) as picture:
                comment: bytes = picture.info["comment"]
                return comment.decode().partition(".")[0]
        case [".dcm"]:
            return str(pydicom.dcmread(path).PatientName.family_name)
        case [".json"]:
            return str(json.loads(path.read_text())["label"])
        case _:
            (label,) = {row["label"] for row in rows_of(path)}
            return label


class TestFiles:
    def test_every_file_is_labelled_synthetic(self, out: Path) -> None:
        files = [path for path in out.rglob("*") if path.is_file()]
        assert len(files) == 2 + 2 * (2 + FRAMES)
        assert {label_of(path) for path in files} == {LABEL}

    def test_names_of_the_files_are_returned(self, tmp_path: Path) -> None:
        files = export_clips(tmp_path / "out", run_of(), clips(1), ("gif", "nifti"))
        names = ["clip-0001.gif", "clip-0001.nii.gz", "index.csv", "provenance.json"]
        assert files == [tmp_path / "out" / name for name in names]
        assert all(path.is_file() for path in files)

    def test_index(self, out: Path) -> None:
        rows = rows_of(out / "index.csv")
        assert [row["clip"] for row in rows] == ["clip-0001", "clip-0002"]
        assert rows[0].items() >= {"seed": "5", "LVEDV": "180.0", "LVESV": "90.0"}.items()
        assert "LVEF" not in rows[0]

    def test_provenance(self, out: Path) -> None:
        found = json.loads((out / "provenance.json").read_text())
        assert found["synthetic"] is True
        assert found["notice"] == NOTICE
        assert "not a medical device" in found["warning"]
        assert found["model"] == {"name": "cpgg", "size": "tiny", "sha256": "a" * 64}
        assert found["release_card_sha256"] == "not released"
        assert found["sampling"]["guidance"] == 2.5
        assert found["seed"] == 3
        asked = found["clips"]["clip-0001"]
        assert asked["phenotypes_given"] == {"LVEDV": 180, "LVESV": 90}
        assert asked["phenotypes_completed"] == {"LVEDV": 180, "LVESV": 90, "LVEF": 50}
        assert asked["clip_seed"] == 5


class TestNifti:
    def test_values_and_geometry(self, out: Path) -> None:
        image: Any = nibabel.load(out / "clip-0002.nii.gz")
        assert image.shape == (COLUMNS, ROWS, 1, FRAMES)
        assert image.get_data_dtype() == np.float32
        written = image.get_fdata()[:, :, 0].transpose(2, 1, 0)
        np.testing.assert_array_equal(written, clips()[1].frames)
        np.testing.assert_allclose(image.affine, np.diag([-PIXEL, -PIXEL, 1, 1]))
        assert image.header.get_zooms()[:3] == (PIXEL, PIXEL, 1)
        assert image.header.get_xyzt_units() == ("mm", "unknown")

    def test_header_holds_what_the_clip_was_asked_for(self, out: Path) -> None:
        image: Any = nibabel.load(out / "clip-0001.nii.gz")
        (extension,) = image.header.extensions
        found = json.loads(extension.get_content())
        whole = json.loads((out / "provenance.json").read_text())
        assert found == {**whole.pop("clips")["clip-0001"], **whole}


class TestDicom:
    def test_pixels_are_those_of_the_clip_to_a_grey_level(
        self, datasets: list[pydicom.Dataset]
    ) -> None:
        assert len(datasets) == FRAMES
        for dataset, frame in zip(datasets, clips()[0].frames, strict=True):
            assert dataset.pixel_array.dtype == np.uint16
            slope, intercept = float(dataset.RescaleSlope), float(dataset.RescaleIntercept)
            values = dataset.pixel_array * slope + intercept
            np.testing.assert_allclose(values, frame, atol=0.51 * slope, rtol=0)
        assert float(datasets[0].WindowCenter) == pytest.approx(0, abs=1e-6)

    def test_marked_as_derived_and_synthetic(self, datasets: list[pydicom.Dataset]) -> None:
        for dataset in datasets:
            assert dataset.SyntheticData == "YES"
            assert list(dataset.ImageType[:2]) == ["DERIVED", "SECONDARY"]
            assert dataset.PatientIdentityRemoved == "YES"
            assert dataset.ContentQualification == "RESEARCH"
            for name in ("PatientID", "StudyDescription", "SeriesDescription", "ImageComments"):
                assert dataset[name].value.startswith(LABEL)
            assert NOTICE in dataset.SeriesDescription
            assert "LVEDV 180 mL, LVESV 90 mL" in dataset.ImageComments
            assert f"SHA-256 {'a' * 64}, release card not released" in dataset.DerivationDescription

    def test_all_attributes_that_mr_images_require(self, datasets: list[pydicom.Dataset]) -> None:
        assert [name for name in REQUIRED if name not in datasets[0]] == []

    def test_geometry_and_order(self, datasets: list[pydicom.Dataset]) -> None:
        for number, dataset in enumerate(datasets, 1):
            assert (dataset.Rows, dataset.Columns) == (ROWS, COLUMNS)
            assert list(dataset.PixelSpacing) == [PIXEL, PIXEL]
            assert dataset.InstanceNumber == dataset.TemporalPositionIdentifier == number
            assert dataset.NumberOfTemporalPositions == FRAMES

    def test_nifti_lies_in_the_same_place(self, out: Path, datasets: list[pydicom.Dataset]) -> None:
        image: Any = nibabel.load(out / "clip-0001.nii.gz")
        np.testing.assert_allclose(image.affine, nifti_affine(datasets[0], 1.0))

    def test_identifiers(self, out: Path, tmp_path: Path) -> None:
        def read(folder: Path) -> list[pydicom.Dataset]:
            return [pydicom.dcmread(path) for path in sorted(folder.glob("clip-0001/*.dcm"))]

        export_clips(tmp_path / "again", run_of(), clips(), ("dicom",))
        other = GenerationRun(run_of().model, SamplingPlan(), "given by the user", 3)
        export_clips(tmp_path / "other", other, clips(), ("dicom",))
        first, again, elsewhere = map(read, (out, tmp_path / "again", tmp_path / "other"))
        instances = [dataset.SOPInstanceUID for dataset in first]
        assert len(set(instances)) == FRAMES
        assert [dataset.SOPInstanceUID for dataset in again] == instances
        assert not {dataset.SOPInstanceUID for dataset in elsewhere} & set(instances)
        for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
            (identifier,) = {dataset[name].value for dataset in first}
            assert identifier.is_valid
        assert len({dataset.StudyInstanceUID for dataset in (first[0], elsewhere[0])}) == 2

    def test_clips_that_differ_by_rounding_have_other_identifiers(
        self, datasets: list[pydicom.Dataset], tmp_path: Path
    ) -> None:
        (first,) = clips(1)
        frames = first.frames.copy()
        frames[0, 0, 0] = np.nextafter(frames[0, 0, 0], np.float32(0))
        export_clips(tmp_path / "out", run_of(), [replace(first, frames=frames)], ("dicom",))
        others = read_strictly(sorted((tmp_path / "out" / "clip-0001").iterdir()))
        for name in (
            "SOPInstanceUID",
            "StudyInstanceUID",
            "SeriesInstanceUID",
            "FrameOfReferenceUID",
            "PatientID",
        ):
            one, other = ({dataset[name].value for dataset in both} for both in (datasets, others))
            assert not one & other, name

    def test_82_phenotypes_fit(self, tmp_path: Path) -> None:
        given = dict.fromkeys(CONFIGS["tiny"].standardisation.names, 1 / 3)
        clip = SyntheticClip(ClipRequest(given, given, 1), clips()[0].frames)
        export_clips(tmp_path / "out", run_of(), [clip], ALL)
        dataset = pydicom.dcmread(tmp_path / "out" / "clip-0001" / "IM00001.dcm")
        assert "Ell Global 0.333 %" in dataset.ImageComments
        assert len(dataset.DerivationDescription) <= 1024


class TestGif:
    def test_goes_round_for_ever_once_a_second(self, tmp_path: Path) -> None:
        shown = discs(1, (20, 16, 16))[0][0].numpy()
        write_gif(tmp_path / "a.gif", list(shown), [["LVEF 35 %"]])
        with Image.open(tmp_path / "a.gif") as picture:
            assert picture.info["loop"] == 0
            frames = list(ImageSequence.Iterator(picture))
            assert sum(frame.info["duration"] for frame in frames) == pytest.approx(1000, abs=50)

    def test_shows_the_clip_and_beneath_it_a_strip_with_words(self, tmp_path: Path) -> None:
        def pixels(captions: list[list[str]], shown: np.ndarray) -> np.ndarray:
            write_gif(tmp_path / "a.gif", list(shown), captions)
            with Image.open(tmp_path / "a.gif") as picture:
                return np.asarray(picture.convert("L"))

        black = np.full((1, 3, 16, 16), -1.0, np.float32)
        dark = pixels([["LVEF 35 %"]], black)
        picture, strip = dark[:192], dark[192:]
        assert not picture.any()
        assert strip.max() > 200
        assert (pixels([["LVEF 36 %"]], black)[192:] != strip).any()
        assert (pixels([[]], black)[192:207] == strip[:15]).all()  # the label comes first
        assert pixels([[]], -black)[:192].min() == 255

    def test_several_clips_lie_side_by_side(self, tmp_path: Path) -> None:
        levels = np.linspace(-1, 1, 5, dtype=np.float32)
        shown = np.broadcast_to(levels[:, None, None, None], (5, 2, 96, 96))
        write_gif(tmp_path / "a.gif", list(shown), [["x"]] * 5)
        with Image.open(tmp_path / "a.gif") as picture:
            found = np.asarray(picture.convert("L"))
        height = found.shape[0] // 2
        middles = [found[96 + height * row, 96 + 192 * column] for row, column in np.ndindex(2, 3)]
        assert all(a < b for a, b in pairwise(middles[:5]))
        assert found.shape[1] == 3 * 192
        assert middles[5] == 0

    def test_captions_tell_the_first_few(self) -> None:
        given = {"LVEDV": 180.4, "LVEF": 35.0, "LVM": 100.0, "RVEF": 50.0}
        assert caption(ClipRequest(given, given, 1)) == [
            "LVEDV 180 mL",
            "LVEF 35 %",
            "LVM 100 g",
            "and 1 more",
        ]
        assert caption(ClipRequest({}, {}, 1)) == []

    def test_captions_have_no_powers_of_ten(self) -> None:
        given = {"AAo max area": 1254.0, "LVEDV": 99.96, "LVCO": 5.25}
        assert caption(ClipRequest(given, given, 1)) == [
            "AAo max area 1254 mm2",
            "LVEDV 100 mL",
            "LVCO 5.25 L/min",
        ]


class TestOutputFolder:
    def test_refuses_folder_with_content(self, tmp_path: Path) -> None:
        (tmp_path / "keep.txt").write_text("mine")
        with pytest.raises(ConfigurationError, match="not an empty folder"):
            export_clips(tmp_path, run_of(), clips(), ALL)
        assert os.listdir(tmp_path) == ["keep.txt"]

    @pytest.mark.parametrize(
        ("failure", "expected"),
        [(OSError(errno.ENOSPC, "No space left"), DataError), (KeyboardInterrupt(), None)],
    )
    def test_a_writer_that_fails_leaves_nothing(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        failure: BaseException,
        expected: type[Exception] | None,
    ) -> None:
        def fail(*_arguments: object) -> None:
            raise failure

        monkeypatch.setattr(synthetic_export, "write_gif", fail)
        with pytest.raises(expected or type(failure)):
            export_clips(tmp_path / "out", run_of(), clips(), ALL)
        assert os.listdir(tmp_path) == []

    def test_a_link_to_an_empty_folder_leads_to_the_clips(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "link").symlink_to("empty")
        files = export_clips(tmp_path / "link", run_of(), clips(1), ("gif",))
        assert all(path.is_file() for path in files)
        assert sorted(os.listdir(tmp_path)) == ["empty", "link"]
        assert (tmp_path / "empty" / "clip-0001.gif").is_file()

    def test_a_link_that_leads_nowhere_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to("nowhere")
        with pytest.raises(ConfigurationError, match="link is not an empty folder"):
            check_free(tmp_path / "link")

    def test_mount_points_are_refused_before_any_work(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
        with pytest.raises(ConfigurationError, match=r"is a mount point, .*: name a new folder"):
            check_free(tmp_path)
        check_free(tmp_path / "out")

    def test_folders_that_cannot_be_read_are_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(_path: Path) -> Iterator[Path]:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(Path, "iterdir", refuse)
        with pytest.raises(DataError, match="cannot be read: Permission denied"):
            check_free(tmp_path)

    @pytest.mark.parametrize("name", ["out", "new/deeper/out"])
    def test_where_nothing_can_be_written_is_refused_before_any_work(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        check_free(tmp_path / name)
        assert os.listdir(tmp_path) == []

        def refuse(path: Path) -> None:
            assert path.parent == tmp_path
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(Path, "mkdir", refuse)
        with pytest.raises(
            DataError, match=f"to {tmp_path}: Read-only file system: choose another"
        ):
            check_free(tmp_path / name)

    def test_a_model_that_fails_in_the_middle_leaves_nothing(self, tmp_path: Path) -> None:
        def drawn() -> Iterator[SyntheticClip]:
            yield from clips(1)
            raise ModelError("broken")

        with pytest.raises(ModelError, match="broken"):
            export_clips(tmp_path / "out", run_of(), drawn(), ALL)
        assert os.listdir(tmp_path) == []


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "cpgg.safetensors"
    write_untrained(path, ModelSpec(name="cpgg"))
    return path


def write_untrained(path: Path, spec: ModelSpec) -> str:
    torch.manual_seed(0)
    save_bundle(path, build_model(spec).state_dict(), spec, {})
    return load_bundle(path).sha256


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A release, and the key that signed it."""
    folder = tmp_path_factory.mktemp("release")
    key = SiteKey.create(folder / "identity.pem")
    digest = write_untrained(folder / "model", ModelSpec(name="cpgg"))
    evaluation = EvaluationSpec(metrics=("memorisation",), noise_multiplier=None)
    privacy = PrivacySpec(noise_multiplier=2.0, evaluation=evaluation)
    job = JobSpec(name="heart", rounds=2, model=ModelSpec(name="cpgg"), privacy=privacy)
    gates = (GateResult(gate="memorisation", passed=True, text="3 of 3 sites passed"),)
    card = make_card(key, digest, job, gates=gates, evaluation=())
    ReleaseBundle.write(folder / "heart.zip", folder / "model", card, key)
    return folder / "heart.zip", key.public_key


def invoke(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """Run the command and return the JSON that it prints."""
    generate.main([*map(str, arguments), "--json"], "generate", standalone_mode=False)
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return printed


def pixels(folder: Path, name: str = "clip-0001") -> np.ndarray:
    image: Any = nibabel.load(folder / f"{name}.nii.gz")
    return np.asarray(image.dataobj)


class TestCommand:
    def test_phenotypes_by_flag(self, bundle: Path, tmp_path: Path, capsys: Any) -> None:
        out = tmp_path / "out"
        asked = ("--phenotype", "lvef=35", "--phenotype", "LVEDV=200", "--count", 2)
        printed = invoke(capsys, bundle, "--out", out, *asked, *FAST)
        assert all(Path(name).is_file() for name in printed["files"])
        assert printed["model"]["sha256"] == load_bundle(bundle).sha256
        assert printed["clips"] == 2
        found = json.loads((out / "provenance.json").read_text())["clips"]["clip-0002"]
        assert found["phenotypes_given"] == {"LVEF": 35, "LVEDV": 200}
        assert found["phenotypes_completed"]["LVESV"] == pytest.approx(130)
        grid = CONFIGS["tiny"].video.clip
        assert pixels(out).shape == (grid[2], grid[1], 1, grid[0])
        assert not np.array_equal(pixels(out), pixels(out, "clip-0002"))

    def test_the_same_seed_gives_the_same_pixels(
        self, bundle: Path, tmp_path: Path, capsys: Any
    ) -> None:
        drawn = {}
        for name, seed in (("first", 4), ("again", 4), ("other", 5)):
            quick = ("--format", "nifti", *FAST)
            invoke(capsys, bundle, "--out", tmp_path / name, "--seed", seed, *quick)
            drawn[name] = pixels(tmp_path / name).tobytes()
        assert drawn["first"] == drawn["again"] != drawn["other"]

    def test_phenotypes_by_table(self, bundle: Path, tmp_path: Path, capsys: Any) -> None:
        (tmp_path / "hearts.csv").write_text("LVEF,LVM\n35,\n,120\n60,90\n")
        out = tmp_path / "out"
        quick = ("--format", "gif", "--format", "gif", *FAST)
        printed = invoke(capsys, bundle, "--out", out, "--csv", tmp_path / "hearts.csv", *quick)
        assert "in a table (SHA-256" in printed["phenotypes"]
        rows = rows_of(out / "index.csv")
        asked = [(row["LVEF"], row["LVM"]) for row in rows]
        assert asked == [("35.0", ""), ("", "120.0"), ("60.0", "90.0")]

    def test_phenotypes_from_the_prior(self, bundle: Path, tmp_path: Path, capsys: Any) -> None:
        out = tmp_path / "out"
        printed = invoke(capsys, bundle, "--out", out, "--format", "dicom", *FAST)
        assert "public priors of simulated healthy hearts" in printed["phenotypes"]
        (row,) = rows_of(out / "index.csv")
        assert len(row) == 3 + 82

    @pytest.mark.parametrize("name", ["phenotype-vae", "phenotype-gaussian"])
    def test_phenotypes_from_a_model(
        self, bundle: Path, tmp_path: Path, capsys: Any, name: str
    ) -> None:
        digest = write_untrained(tmp_path / "model", ModelSpec(name=name))
        given = ("--phenotypes-from", tmp_path / "model", "--format", "gif", *FAST)
        printed = invoke(capsys, bundle, "--out", tmp_path / "out", *given)
        assert printed["phenotypes"] == f"drawn by a {name} model, SHA-256 {digest}"

    def test_a_release_is_named_with_its_card(
        self, released: tuple[Path, str], tmp_path: Path, capsys: Any
    ) -> None:
        path, key = released
        release = ReleaseBundle.read(path)
        given = ("--trust", key, "--format", "dicom", *FAST)
        printed = invoke(capsys, path, "--out", tmp_path / "out", *given)
        assert printed["release_card_sha256"] == release.signature.members[CARD]
        assert printed["release"]["gates"] == {"memorisation": "3 of 3 sites passed"}
        assert printed["release"]["signed_by"] == key
        dataset = pydicom.dcmread(tmp_path / "out" / "clip-0001" / "IM00001.dcm")
        assert release.signature.members[CARD] in dataset.DerivationDescription
        with pytest.raises(ModelError, match="another coordinator, or forged"):
            invoke(capsys, path, "--out", tmp_path / "no", "--trust", "ab" * 32)

    def test_says_whether_the_users_coordinator_released_the_model(
        self, bundle: Path, released: tuple[Path, str], tmp_path: Path, capsys: Any
    ) -> None:
        path, key = released
        notes = []
        for name, given in (
            ("bundle", (bundle,)),
            ("anybody", (path,)),
            ("trusted", (path, "--trust", key)),
        ):
            arguments = (*given, "--out", tmp_path / name, "--format", "gif", *FAST)
            generate.main([*map(str, arguments)], "generate", standalone_mode=False)
            printed = capsys.readouterr().out
            assert LABEL in printed
            assert NOTICE in printed
            notes.append(printed.partition("note: ")[2])
        assert notes[0].startswith("nobody released this model")
        assert notes[1].startswith(f"key {key} signed the release: give it by --trust")
        assert notes[2] == ""
        for name, trusted in (("anybody", False), ("trusted", True)):
            found = json.loads((tmp_path / name / "provenance.json").read_text())
            assert found["release"]["trusted"] is trusted

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            (("--phenotype", "LVFE=35"), "did you mean LVEF"),
            (("--phenotype", "LVEF=99"), "plausible range 11 to 82 %"),
            (("--steps", 0), "steps 0 must be at least 1"),
            (("--guidance", "nan"), "guidance nan must be finite"),
            (("--device", "meta"), "device 'meta' cannot be used"),
            (("--steps", 500), "500 decoding steps for 18 tokens"),
            (("--device", "abacus"), "device 'abacus' cannot be used"),
            (("--trust", "ab" * 32), "only releases are signed"),
            (("--phenotypes-from", "MODEL"), "cpgg draws no phenotypes"),
        ],
    )
    def test_what_cannot_be_done_is_refused_and_leaves_nothing(
        self, bundle: Path, tmp_path: Path, capsys: Any, arguments: tuple[Any, ...], reason: str
    ) -> None:
        given = (bundle if argument == "MODEL" else argument for argument in arguments)
        with pytest.raises(FedcmrError, match=reason):
            invoke(capsys, bundle, "--out", tmp_path / "out", *given)
        assert os.listdir(tmp_path) == []

    def test_a_reconstructor_is_refused(self, tmp_path: Path, capsys: Any) -> None:
        write_model(tmp_path / "model")
        with pytest.raises(ModelError, match="model cardiomm draws no clips: use a cpgg model"):
            invoke(capsys, tmp_path / "model", "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_the_folder_is_checked_before_any_work(self, tmp_path: Path, capsys: Any) -> None:
        (tmp_path / "file").write_text("mine")
        with pytest.raises(ConfigurationError, match="not an empty folder"):
            invoke(capsys, "none", "--out", tmp_path)

    @pytest.mark.parametrize(
        "arguments",
        [
            ("--phenotype", "LVEF=35", "--csv", "hearts.csv"),
            ("--csv", "hearts.csv", "--count", 3),
            ("--format", "png"),
            ("--count", 0),
            ("--guidance", -1),
        ],
    )
    def test_wrong_usage(self, bundle: Path, capsys: Any, arguments: tuple[Any, ...]) -> None:
        with pytest.raises(click.UsageError):
            invoke(capsys, bundle, "--out", "out", *arguments)
