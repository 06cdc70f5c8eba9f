from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from fedcmr_client.store.pseudonyms import pseudonym
from fedcmr_client.store.scan_file import ScanFile
from fedcmr_client.store.site_store import SiteStore
from fedcmr_client.store.split import SPLITS, SplitFractions, split_of, split_position
from fedcmr_shared.errors import ConfigurationError, DataError
from fedcmr_simulations.balanced_split import balanced_secret
from fedcmr_simulations.centres import (
    CENTRES,
    EXTERNAL_CENTRES,
    PRETRAINING_CENTRES,
    TRAINING_CENTRES,
    Centre,
    simulate_centre,
    simulate_centres,
)
from fedcmr_simulations.commands.phantom import phantom


def contents(root: Path) -> list[tuple[str, str, str]]:
    with SiteStore.open(root) as store:
        return [(scan.patient, scan.digest, scan.split) for scan in store.scans()]


def test_training_centres_differ_and_external_ones_are_held_out() -> None:
    assert len(TRAINING_CENTRES) >= 4
    assert len(EXTERNAL_CENTRES) >= 1
    assert len({centre.name for centre in CENTRES}) == len(CENTRES)
    for what in ("array", "scanner", "snr", "modalities", "diseases", "spacing_mm"):
        values = [repr(getattr(centre, what)) for centre in TRAINING_CENTRES]
        assert len(set(values)) == len(values), what
    assert len({centre.vendor for centre in TRAINING_CENTRES}) >= 3


def test_pretraining_has_seen_no_vendor_field_or_contrast_of_a_hospital() -> None:
    assert len(PRETRAINING_CENTRES) >= 2
    names = [centre.name for centre in (*CENTRES, *PRETRAINING_CENTRES)]
    assert len(set(names)) == len(names)

    def seen(centres: tuple[Centre, ...]) -> list[set[object]]:
        return [
            {centre.vendor for centre in centres},
            {centre.field_strength_t for centre in centres},
            {modality for centre in centres for modality in centre.modalities},
        ]

    for hospitals in (TRAINING_CENTRES, EXTERNAL_CENTRES):
        for before, later in zip(seen(PRETRAINING_CENTRES), seen(hospitals), strict=True):
            assert before.isdisjoint(later)


def test_small_detail_is_one_little_image_per_patient(tmp_path: Path) -> None:
    for centre in (*CENTRES, *PRETRAINING_CENTRES):
        quick, small = centre.equipment("quick"), centre.equipment("small")
        assert min(small.grid.phase, small.grid.readout) >= 64
        assert max(small.grid.phase, small.grid.readout) <= 72
        assert 4 <= small.array.coils <= 5
        assert 0 < small.array.front < small.array.coils
        for axis, size in enumerate((quick.grid.phase, quick.grid.readout)):
            field_of_view = size * quick.grid.spacing[axis]
            pixels = (small.grid.phase, small.grid.readout)[axis]
            assert pixels * small.grid.spacing[axis] == pytest.approx(field_of_view)
    with simulate_centre(tmp_path / "s", CENTRES[0], 12, 5, "small") as store:
        records = store.scans()
    assert len({record.patient for record in records}) == len(records) == 12
    assert {(r.metadata.frames, r.metadata.slices) for r in records} == {(1, 1)}
    cine = [r.metadata.frame_times_ms for r in records if r.metadata.modality == "cine"]
    assert len({(times or ())[0] > 0 for times in cine}) == 2, "cine frames over the heart cycle"


def test_research_scanners_outside_the_vocabulary_are_stored_without_a_warning(
    tmp_path: Path,
) -> None:
    centre = PRETRAINING_CENTRES[0]
    with simulate_centre(tmp_path / "s", centre, 3, 1, "small") as store:
        (metadata, *_) = [record.metadata for record in store.scans()]
    assert (metadata.vendor, metadata.field_strength_t) == (centre.vendor, centre.field_strength_t)
    assert metadata.origin == "simulated"


def test_another_split_changes_no_sample(tmp_path: Path) -> None:
    split = SplitFractions(train=0.8, validation=0.1, test=0.1)
    simulate_centre(tmp_path / "a", CENTRES[0], 10, 7, "small").close()
    with simulate_centre(tmp_path / "b", CENTRES[0], 10, 7, "small", split=split) as store:
        assert store.split_counts() == {"train": 8, "validation": 1, "test": 1}
    digests = [{row[1] for row in contents(tmp_path / name)} for name in ("a", "b")]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("patients", [3, 4, 9])
def test_a_split_that_three_parts_cannot_follow_is_kept_as_far_as_it_goes(patients: int) -> None:
    names = [f"p{index}" for index in range(patients)]
    fractions = SplitFractions(train=0.96, validation=0.02, test=0.02)
    secret = balanced_secret("x", names, fractions)
    places = [split_position(secret, pseudonym(secret, name)) for name in names]
    parts = [split_of(place, fractions) for place in places]
    assert [parts.count(part) for part in SPLITS] == [patients - 2, 1, 1]


def test_the_same_seed_gives_the_same_store_and_every_part_has_a_patient(tmp_path: Path) -> None:
    for name in ("a", "b"):
        simulate_centre(tmp_path / name, CENTRES[0], 4, 7).close()
    simulate_centre(tmp_path / "c", CENTRES[0], 4, 8).close()
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert {digest for _, digest, _ in contents(tmp_path / "a")}.isdisjoint(
        digest for _, digest, _ in contents(tmp_path / "c")
    )
    with SiteStore.open(tmp_path / "a") as store:
        assert all(store.split_counts()[part] > 0 for part in SPLITS)
        assert len(store.patients()) == 4
        assert store.verify() == []


def test_stored_scans_say_what_they_are_and_hold_the_truth(tmp_path: Path) -> None:
    centre = CENTRES[1]
    with simulate_centre(tmp_path / "s", centre, 3, 1) as store:
        records = store.scans()
    for record in records:
        assert record.metadata.origin == "simulated"
        assert record.metadata.source_format == "fedcmr-phantom"
        assert record.metadata.centre == centre.name
        assert record.metadata.field_strength_t == centre.field_strength_t
        with ScanFile(record.path) as scan:
            assert scan.truth is not None
            assert scan.truth.phenotypes["LVEDV"] > scan.truth.phenotypes["LVESV"] > 0
            assert scan.truth.labels is not None
            assert set(scan.truth.labels.flat) >= {0, 1, 2, 3}
            assert scan.noise_covariance is not None


def test_more_sites_than_centres_get_new_names_and_other_patients(tmp_path: Path) -> None:
    advanced: list[str] = []
    folders = simulate_centres(
        tmp_path / "out", 3, 3, seed=0, external=True, on_patient=advanced.append
    )
    assert [folder.name for folder in folders] == ["elm", "fir", "elm-2"]
    assert len(advanced) == 9
    first, again = contents(folders[0]), contents(folders[2])
    assert {row[1] for row in first}.isdisjoint(row[1] for row in again)


def test_an_occupied_folder_and_too_few_patients_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="not an empty folder"):
        simulate_centres(tmp_path, 1, 3, seed=0)
    with pytest.raises(ConfigurationError, match="at least 3"):
        simulate_centre(tmp_path / "s", CENTRES[0], 2, 0)
    with pytest.raises(ConfigurationError, match="at least 1"):
        simulate_centres(tmp_path / "t", 0, 3, seed=0)
    with pytest.raises(ConfigurationError, match="'fine'"):
        simulate_centre(tmp_path / "s", CENTRES[0], 3, 0, "fine")  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_probabilities_must_add_up() -> None:
    with pytest.raises(ConfigurationError, match="diseases add up"):
        replace(CENTRES[0], diseases={"NC": 0.5})


def test_standard_detail_is_larger_over_the_same_field_of_view() -> None:
    for centre in CENTRES:
        quick, fine = centre.equipment("quick"), centre.equipment("standard")
        assert fine.array.coils > quick.array.coils
        assert fine.grid.phase >= 160
        for small, large, step_small, step_large in (
            (quick.grid.phase, fine.grid.phase, quick.grid.spacing[0], fine.grid.spacing[0]),
            (quick.grid.readout, fine.grid.readout, quick.grid.spacing[1], fine.grid.spacing[1]),
        ):
            assert small * step_small == pytest.approx(large * step_large)


def test_command_prints_json_and_refuses_bad_usage(tmp_path: Path) -> None:
    out = tmp_path / "sites"
    options = [str(out), "--sites", "1", "--patients", "3", "--json"]
    result = CliRunner().invoke(phantom, options)
    assert result.exit_code == 0, result.output
    (site,) = json.loads(result.stdout)["sites"]
    assert (site["site"], site["patients"], site["origin"]) == ("alder", 3, "simulated")
    again = CliRunner().invoke(phantom, options)
    assert isinstance(again.exception, DataError)
    for wrong in (["--patients", "0"], ["--sites", "0"], ["--detail", "huge"]):
        assert CliRunner().invoke(phantom, [str(tmp_path / "new"), *wrong]).exit_code == 2
