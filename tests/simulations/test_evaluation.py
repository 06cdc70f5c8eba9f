import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fedcmr_client.dataset import Image, Undersampled, all_images
from fedcmr_client.store.scan_file import ScanSource
from fedcmr_client.store.site_store import ScanRecord, SiteStore
from fedcmr_shared.errors import ConfigurationError, DataError
from fedcmr_shared.kspace.coils import rss
from fedcmr_shared.kspace.fourier import fft2c, ifft2c
from fedcmr_shared.kspace.masks import Sampling
from fedcmr_shared.kspace.sense import SenseSettings
from fedcmr_shared.metrics.image_quality import score
from fedcmr_shared.models.cardiomm import CardioMM
from fedcmr_shared.models.registry import build_model
from fedcmr_shared.schemas import AcquisitionMetadata
from fedcmr_shared.schemas.job import ModelSpec
from fedcmr_shared.text.encoders import load_text_encoder
from fedcmr_simulations.evaluation import (
    METHODS,
    METRICS,
    EvaluationRow,
    NetworkReconstructor,
    SenseReconstructor,
    aggregate,
    append_rows,
    evaluate,
    read_rows,
    reference,
    site_summary,
    tune_sense,
    undersample_for_evaluation,
    zero_filled,
)
from fedcmr_simulations.examples import (
    load_examples,
    make_example,
    representative,
    representative_image,
    save_example,
)

SIZE = 48
UNIFORM = Sampling("uniform", 4, 12)
GAUSSIAN = Sampling("kt-gaussian", 4, 12)


def kspace(seed: int) -> torch.Tensor:
    """Four coils around an ellipse with two chambers; complex64 [coil, phase, readout]."""
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE * 2 - 1
    image = 0.5 * ((x / 0.8) ** 2 + (y / 0.7) ** 2 < 1)
    shift = np.random.default_rng(seed).uniform(-0.1, 0.1)
    image += 0.4 * ((x - 0.2 - shift) ** 2 + y**2 < 0.06) + 0.3 * ((x + 0.3) ** 2 + y**2 < 0.04)
    angles = np.pi / 2 * np.arange(4)[:, None, None]
    coils = np.exp(1j * angles) / ((x - np.cos(angles)) ** 2 + (y - np.sin(angles)) ** 2 + 0.4)
    generator = torch.Generator().manual_seed(seed)
    clean = fft2c(torch.from_numpy(coils * image)).to(torch.complex64)
    return clean + 0.005 * torch.randn(clean.shape, generator=generator, dtype=torch.complex64)


def metadata(modality: str | None = "cine", frames: int = 2) -> AcquisitionMetadata:
    return AcquisitionMetadata(
        origin="simulated",
        source_format="test",
        modality=modality,
        frames=frames,
        slices=1,
        coils=4,
        phase_encodes=SIZE,
        readout_samples=SIZE,
    )


def make_image(
    scan: str = "scan", frame: int = 0, seed: int = 0, modality: str | None = "cine"
) -> Image:
    record = ScanRecord(scan, "patient", Path(scan), metadata(modality), "test", "digest", False)
    return Image(record, frame, 0, kspace(seed))


def network(seed: int = 0) -> tuple[CardioMM, NetworkReconstructor]:
    torch.manual_seed(seed)
    model = build_model(ModelSpec(text_encoder="hashed"))
    assert isinstance(model, CardioMM)
    return model, NetworkReconstructor(model, load_text_encoder("hashed"))


def test_rows_hold_the_score_of_each_method_on_the_same_mask() -> None:
    seen: list[Undersampled] = []

    def spy(item: Undersampled) -> np.ndarray:
        seen.append(item)
        return zero_filled(item)

    image = make_image()
    rows = list(evaluate("north", [image], [UNIFORM], {"zero_filled": zero_filled, "x": spy}, 3))
    (item,) = seen
    expected = score(reference(image), zero_filled(item))
    assert [row.method for row in rows] == ["zero_filled", "x"]
    for row in rows:
        assert (row.psnr, row.ssim, row.nmse) == expected
        assert row.nominal_af == 4
        assert row.realised_af == pytest.approx(item.mask.numel() / int(item.mask.sum()))
    assert rows[0].modality == "cine"


def test_reference_is_the_root_sum_of_squares_of_all_samples() -> None:
    image = make_image()
    coils = ifft2c(image.kspace).numpy()
    np.testing.assert_allclose(
        reference(image), np.sqrt((np.abs(coils) ** 2).sum(0)), rtol=1e-5, atol=1e-6
    )


def test_missing_modality_is_called_unknown() -> None:
    (row,) = evaluate("n", [make_image(modality=None)], [UNIFORM], {"zero_filled": zero_filled}, 0)
    assert row.modality == "unknown"


def test_masks_depend_on_seed_scan_and_frame_only() -> None:
    def mask(seed: int = 1, scan: str = "a", frame: int = 0, pixels: int = 0) -> torch.Tensor:
        return undersample_for_evaluation(make_image(scan, frame, pixels), GAUSSIAN, seed).mask

    assert torch.equal(mask(), mask(pixels=5))
    for other in (mask(seed=2), mask(scan="b"), mask(frame=1)):
        assert not torch.equal(mask(), other)


def test_a_mask_that_measures_everything_is_refused() -> None:
    with pytest.raises(DataError, match="scan scan: uniform 4x with 48 ACS lines measures all"):
        undersample_for_evaluation(make_image(), Sampling("uniform", 4, SIZE), 0)


def test_tuned_sense_beats_zero_filling() -> None:
    settings = tune_sense([make_image("v", seed=9)], [UNIFORM, GAUSSIAN], 0)
    methods = {"zero_filled": zero_filled, "sense": SenseReconstructor(settings)}
    rows = list(evaluate("s", [make_image()], [UNIFORM, GAUSSIAN], methods, 0))
    psnr = {(row.pattern, row.method): row.psnr for row in rows}
    for pattern in ("uniform", "kt-gaussian"):
        assert psnr[pattern, "sense"] > psnr[pattern, "zero_filled"] + 2


def test_tuning_takes_evenly_spread_images() -> None:
    images = [make_image(f"v{index}", seed=index) for index in range(9)]
    assert tune_sense(images, [UNIFORM], 0, limit=3) == tune_sense(
        [images[1], images[4], images[7]], [UNIFORM], 0, limit=3
    )


def test_each_modality_has_its_own_settings_and_others_share_one() -> None:
    quiet = make_image("cine", seed=1)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(quiet.kspace.shape, generator=generator, dtype=torch.complex64)
    loud = dataclasses.replace(
        make_image("lge", modality="LGE"), kspace=quiet.kspace + 0.15 * noise
    )
    tuning = tune_sense([quiet, loud], [UNIFORM], 0)
    assert set(tuning) == {(UNIFORM, None), (UNIFORM, "cine"), (UNIFORM, "LGE")}
    assert tuning[UNIFORM, "cine"] != tuning[UNIFORM, "LGE"]
    item = undersample_for_evaluation(make_image(modality="tagging"), UNIFORM, 0)
    shared = {(UNIFORM, None): tuning[UNIFORM, None]}
    np.testing.assert_array_equal(
        SenseReconstructor(tuning)(item), SenseReconstructor(shared)(item)
    )


def test_tuning_without_images_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="validation image"):
        tune_sense([], [UNIFORM], 0)


def test_sense_refuses_a_sampling_that_was_not_tuned() -> None:
    item = undersample_for_evaluation(make_image(), UNIFORM, 0)
    with pytest.raises(DataError, match="not tuned"):
        SenseReconstructor({(GAUSSIAN, None): SenseSettings()})(item)


def test_network_reconstruction_equals_the_model_and_ignores_unmeasured_samples() -> None:
    model, reconstruct = network()
    item = undersample_for_evaluation(make_image(), UNIFORM, 0)
    encoder = load_text_encoder("hashed")
    texts = [encoder.encode([text]) for text in item.texts]
    with torch.no_grad():
        expected = model(item.measured[None], item.mask[None], item.acs[None], *texts).image[0]
    np.testing.assert_array_equal(reconstruct(item), expected.numpy())
    blind = dataclasses.replace(item.image, kspace=item.measured)
    np.testing.assert_array_equal(
        reconstruct(dataclasses.replace(item, image=blind)), expected.numpy()
    )
    assert not model.training


@pytest.mark.parametrize(
    "method", [zero_filled, SenseReconstructor({(UNIFORM, None): SenseSettings()})]
)
def test_classical_methods_ignore_unmeasured_samples(
    method: Callable[[Undersampled], np.ndarray],
) -> None:
    item = undersample_for_evaluation(make_image(), UNIFORM, 0)
    blind = dataclasses.replace(item.image, kspace=item.measured)
    np.testing.assert_array_equal(method(item), method(dataclasses.replace(item, image=blind)))


def row(**changes: object) -> EvaluationRow:
    base = EvaluationRow(
        site="north",
        patient="p1",
        scan="s1",
        modality="cine",
        frame=0,
        slice=0,
        pattern="uniform",
        nominal_af=4,
        realised_af=2.5,
        method="sense",
        psnr=30.0,
        ssim=0.9,
        nmse=0.01,
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def test_a_patient_with_many_frames_counts_once() -> None:
    rows = [row(psnr=40.0), *(row(patient="p2", scan="s2", frame=n, psnr=20.0) for n in range(9))]
    (cell,) = aggregate(rows)
    assert cell.scores["psnr"] == {"sense": 30.0}
    assert (cell.patients, cell.images) == (2, 10)


def test_cells_part_sites_modalities_patterns_and_accelerations() -> None:
    variants = [{}, {"site": "south"}, {"modality": "LGE"}, {"pattern": "kt-radial"}]
    rows = [row(**variant) for variant in [*variants, {"nominal_af": 8}]]
    cells = aggregate(rows)
    assert len(cells) == 5
    keys = [(cell.site, cell.modality, cell.pattern, cell.nominal_af) for cell in cells]
    assert keys == sorted(keys)


def test_site_summary_is_the_headline_sampling_with_a_place_for_every_method() -> None:
    rows = [
        row(method="zero_filled", psnr=25.0),
        row(psnr=31.0),
        row(method="zero_filled", psnr=27.0, patient="p2", scan="s2", modality="LGE"),
        row(psnr=99.0, nominal_af=8),
        row(psnr=98.0, pattern="kt-radial"),
        row(site="east", psnr=33.0),
    ]
    east, north = site_summary(rows, Sampling("uniform", 4))
    assert (east["name"], north["name"]) == ("east", "north")
    assert (north["patients"], north["scans"], north["images"]) == (2, 2, 2)
    assert north["psnr_zero_filled"] == 26.0
    assert north["psnr_sense"] == 31.0
    assert north["psnr_local"] is None
    assert {f"{metric}_{method}" for metric in METRICS for method in METHODS} <= set(north)
    json.dumps([east, north], allow_nan=False)


def test_rows_survive_the_file_and_a_cut_off_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.jsonl"
    append_rows(path, [row()])
    append_rows(path, [row(site="südstadt")])
    with path.open("a") as stream:
        stream.write('{"site": "cut')
    assert read_rows(path) == [row(), row(site="südstadt")]


@pytest.mark.parametrize("line", ["not json", "[]", '{"site": "x"}'])
def test_foreign_lines_are_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "evaluation.jsonl"
    append_rows(path, [row()])
    with path.open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(DataError, match=r"evaluation\.jsonl line 2"):
        read_rows(path)


def test_the_representative_image_is_the_median_of_zero_filling() -> None:
    rows = [row(method="zero_filled", frame=n, psnr=p) for n, p in enumerate((20.0, 30.0, 25.0))]
    rows += [row(method="federated", frame=n, psnr=50.0 + n) for n in range(3)]
    assert representative(rows, Sampling("uniform", 4)).frame == 2
    with pytest.raises(DataError, match="no zero-filled score"):
        representative(rows, GAUSSIAN)


def test_an_example_shows_the_stored_image_that_was_scored(tmp_path: Path) -> None:
    images = [(frame, 0, kspace(frame).numpy()) for frame in range(2)]
    with SiteStore.create(tmp_path / "store") as store:
        store.add(ScanSource(patient="Ann", metadata=metadata(), images=lambda: iter(images)))
        records = store.scans()
    methods = {
        "zero_filled": zero_filled,
        "sense": SenseReconstructor({(UNIFORM, None): SenseSettings()}),
    }
    rows = list(evaluate("north", all_images(records), [UNIFORM], methods, 0))
    chosen = representative(rows, UNIFORM)
    image = representative_image(chosen, records)
    save_example(tmp_path / "examples", make_example("north", image, UNIFORM, methods, 0))
    save_example(tmp_path / "examples", make_example("east", image, UNIFORM, methods, 0))
    east, north = load_examples(tmp_path / "examples")
    assert (east.site, north.site) == ("east", "north")
    assert north.psnr["zero_filled"] == chosen.psnr
    assert set(north.images) == {"zero_filled", "sense"}
    truth = rss(ifft2c(torch.from_numpy(images[chosen.frame][2])))
    np.testing.assert_array_equal(north.reference, truth.numpy())
    with pytest.raises(DataError, match="not among"):
        representative_image(dataclasses.replace(chosen, scan="other"), records)


def test_foreign_example_files_are_refused_and_no_folder_is_empty(tmp_path: Path) -> None:
    assert load_examples(tmp_path / "absent") == []
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(DataError, match=r"bad\.npz"):
        load_examples(tmp_path)
    np.savez(tmp_path / "bad.npz", reference=np.zeros(3))
    with pytest.raises(DataError, match=r"bad\.npz"):
        load_examples(tmp_path)
