"""Schemas: round trips, refusals, and their JSON Schemas."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from fedcmr_shared.cli import main
from fedcmr_shared.commands.schema import exported_schemas, json_schema
from fedcmr_shared.schemas import AcquisitionMetadata, JobSpec, UnknownVocabularyWarning
from fedcmr_shared.schemas import vocabulary as words
from fedcmr_shared.schemas.job import SIZE_CLASS_WEIGHTS, ModelSpec

DOCUMENTS = Path(__file__).parents[2] / "docs" / "schemas"

SMALLEST: dict[str, Any] = {
    "origin": "simulated",
    "source_format": "phantom",
    "frames": 2,
    "slices": 1,
    "coils": 4,
    "phase_encodes": 64,
    "readout_samples": 128,
}

positive = st.floats(0.1, 1e4)
known_words = st.fixed_dictionaries(
    {},
    optional={
        "modality": st.sampled_from(words.MODALITIES),
        "view": st.sampled_from(words.VIEWS),
        "vendor": st.sampled_from(words.VENDORS),
        "field_strength_t": st.sampled_from(words.FIELD_STRENGTHS_T),
        "life_span": st.sampled_from(words.LIFE_SPANS),
        "diseases": st.lists(st.sampled_from(sorted(words.DISEASES)), max_size=3),
        "centre": st.text(max_size=8),
        "slice_thickness_mm": positive,
        "echo_time_ms": positive,
        "frame_times_ms": st.tuples(st.floats(0, 1e3), st.floats(0, 1e3)),
    },
)


def acquisition(**values: Any) -> AcquisitionMetadata:
    return AcquisitionMetadata.model_validate({**SMALLEST, **values})


class TestAcquisition:
    @settings(max_examples=40)
    @given(known_words)
    def test_json_round_trip(self, known: dict[str, Any]) -> None:
        metadata = acquisition(**known)
        assert AcquisitionMetadata.model_validate_json(metadata.model_dump_json()) == metadata

    @settings(max_examples=40)
    @given(known_words)
    def test_a_field_is_missing_or_known(self, known: dict[str, Any]) -> None:
        missing = set(acquisition(**known).missing)
        assert missing.isdisjoint({*SMALLEST, *known})
        fields = set(AcquisitionMetadata.model_fields)
        assert fields - missing - set(SMALLEST) - set(known) == {
            "schema_version",
            "readout_oversampling",
        }

    def test_missing_is_written_and_ignored_on_reading(self) -> None:
        dump = acquisition().model_dump()
        assert "modality" in dump["missing"]
        assert AcquisitionMetadata.model_validate({**dump, "missing": ()}) == acquisition()

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("modality", "4D flow"),
            ("view", "coronal"),
            ("vendor", "Canon"),
            ("field_strength_t", 7.0),
            ("life_span", "elderly"),
            ("diseases", ("HCM", "XYZ")),
        ],
    )
    def test_unknown_word_is_kept_with_a_warning(self, field: str, value: object) -> None:
        with pytest.warns(UnknownVocabularyWarning, match=f"^{field} .*kept as it is"):
            metadata = acquisition(**{field: value})
        assert getattr(metadata, field) == value

    def test_scanner_is_checked_against_its_vendor(self) -> None:
        acquisition(vendor="Siemens", scanner="Vida")
        with pytest.warns(UnknownVocabularyWarning, match="^scanner 'Vida'"):
            acquisition(vendor="GE", scanner="Vida")

    @settings(max_examples=20)
    @given(known_words)
    def test_known_words_do_not_warn(self, known: dict[str, Any]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            acquisition(**known)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("origin", "clinical"),
            ("schema_version", "2"),
            ("colour", "red"),
            ("frames", 0),
            ("readout_oversampling", 0.5),
            ("readout_oversampling", 5),
            ("field_strength_t", 0),
            ("echo_time_ms", math.inf),
            ("repetition_time_ms", math.nan),
            ("spacing_source", "guess"),
        ],
    )
    def test_refusal_names_the_field(self, field: str, value: object) -> None:
        with pytest.raises(ValidationError) as refusal:
            acquisition(**{field: value})
        assert refusal.value.errors()[0]["loc"][0] == field

    @pytest.mark.parametrize("field", sorted(SMALLEST))
    def test_required_field(self, field: str) -> None:
        known = {key: value for key, value in SMALLEST.items() if key != field}
        with pytest.raises(ValidationError, match=field):
            AcquisitionMetadata.model_validate(known)

    def test_spacing_needs_its_source(self) -> None:
        with pytest.raises(ValidationError, match="spacing_source is required"):
            acquisition(pixel_spacing_mm=(1.5, 1.5))

    @pytest.mark.parametrize("field", ["frame_times_ms", "contrast_times_ms"])
    def test_one_time_for_each_frame(self, field: str) -> None:
        with pytest.raises(ValidationError, match=f"{field} has 3 values for 2 frames"):
            acquisition(**{field: (0, 1, 2)})

    def test_cannot_be_changed(self) -> None:
        with pytest.raises(ValidationError, match="frozen"):
            acquisition().frames = 3  # type: ignore[misc]


class TestJob:
    def test_json_round_trip(self) -> None:
        job = JobSpec.model_validate(
            {"name": "demo", "cohort": {"modalities": ["cine"]}, "site_sizes": {"a": "large"}}
        )
        assert JobSpec.model_validate_json(job.model_dump_json()) == job

    def test_an_empty_document_is_the_default_job(self) -> None:
        assert JobSpec.model_validate({}) == JobSpec()

    def test_public_weights(self) -> None:
        job = JobSpec(site_sizes={"a": "large", "b": "medium"})
        assert (job.weight("a"), job.weight("b"), job.weight("c")) == (4, 2, 1)
        assert sorted(SIZE_CLASS_WEIGHTS.values()) == [1, 2, 4]

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            (("name",), "Has Blanks"),
            (("name",), ""),
            (("seed",), -1),
            (("seed",), 2**32),
            (("rounds",), 0),
            (("round_timeout_s",), 0),
            (("colour",), "red"),
            (("modalities",), []),
            (("site_sizes", "a"), 1000),
            (("model", "size"), "huge"),
            (("model", "variant"), "XX"),
            (("sampling", "patterns"), []),
            (("sampling", "patterns"), ["spiral"]),
            (("sampling", "accelerations"), [1.0]),
            (("sampling", "acs_lines"), 2),
            (("training", "learning_rate"), 0),
            (("training", "optimiser"), "lion"),
            (("server_optimiser", "momentum"), 1.0),
        ],
    )
    def test_refusal_names_the_field(self, path: tuple[str, ...], value: object) -> None:
        document: Any = value
        for name in reversed(path):
            document = {name: document}
        with pytest.raises(ValidationError, match=path[-1] if path[-1] != "a" else "site_sizes"):
            JobSpec.model_validate(document)

    @pytest.mark.parametrize(
        "document",
        [
            {"minimum_sites": 3},
            {"aggregation": "secure_groups", "minimum_sites": 6, "max_update_norm": 1.5},
            {"aggregation": "secure_groups", "minimum_sites": 9, "robust": "trimmed-mean"},
            {"aggregation": "plain_with_local_dp", "minimum_sites": 1, "robust": "krum"},
            {"aggregation": "plain_with_local_dp", "minimum_sites": 1, "max_update_norm": 1},
            {"secure": {"word_bits": 16, "update_range": 0.5, "post_quantum": True}},
            {"privacy": {"evaluation": {"histogram_bins": 2}}},
        ],
    )
    def test_aggregation_that_fits_its_sites(self, document: dict[str, Any]) -> None:
        JobSpec.model_validate(document)

    @pytest.mark.parametrize(
        ("document", "message"),
        [
            ({"minimum_sites": 2}, "needs at least 3: write 3, or plain_with_local_dp"),
            ({"robust": "median"}, "robust median does not fit secure_sum"),
            ({"robust": "krum", "aggregation": "secure_groups"}, "only plain_with_local_dp"),
            ({"max_update_norm": 1}, "max_update_norm does not fit secure_sum"),
            ({"max_update_norm": 0}, "max_update_norm"),
            ({"aggregation": "secure_groups", "minimum_sites": 5}, "needs at least 6"),
            (
                {"aggregation": "secure_groups", "minimum_sites": 8, "robust": "median"},
                "needs at least 9",
            ),
            (
                {
                    "aggregation": "secure_groups",
                    "minimum_sites": 7,
                    "secure": {"group_size": 4},
                },
                "needs at least 8",
            ),
            ({"aggregation": "secure"}, "aggregation"),
            ({"secure": {"word_bits": 8}}, "word_bits"),
            ({"secure": {"update_range": 0}}, "update_range"),
            ({"secure": {"attempts": 11}}, "attempts"),
            ({"secure": {"step_timeout_s": 0}}, "step_timeout_s"),
            ({"privacy": {"evaluation": {"histogram_bins": 1}}}, "use 2 to 50, or 0"),
            ({"privacy": {"evaluation": {"histogram_bins": 51}}}, "histogram_bins"),
        ],
    )
    def test_aggregation_that_does_not(self, document: dict[str, Any], message: str) -> None:
        with pytest.raises(ValidationError, match=message):
            JobSpec.model_validate(document)

    def test_model_takes_no_extra_field(self) -> None:
        with pytest.raises(ValidationError, match="Extra inputs"):
            ModelSpec.model_validate({"depth": 3})


def test_every_vendor_has_scanners_and_no_word_comes_twice() -> None:
    assert set(words.SCANNERS) == set(words.VENDORS)
    for names in (words.MODALITIES, words.VIEWS, words.VENDORS, *words.SCANNERS.values()):
        assert len(set(names)) == len(names)
    # MMCMR-427K: 12 modalities, 17 diseases and normal controls, 3 populations.
    assert len(words.MODALITIES) == 12
    assert len(words.DISEASES) == 18
    assert len(words.LIFE_SPANS) == 3


class TestJsonSchema:
    @pytest.mark.parametrize("name", sorted(exported_schemas()))
    def test_is_valid(self, name: str) -> None:
        Draft202012Validator.check_schema(json_schema(exported_schemas()[name]))

    @pytest.mark.parametrize("name", sorted(exported_schemas()))
    def test_documentation_is_current(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stopped:
            main(["schema", "show", name, "--json"])
        assert stopped.value.code == 0
        written = (DOCUMENTS / f"{name}.json").read_text(encoding="utf-8")
        message = f"run `fedcmr schema show {name} > docs/schemas/{name}.json`"
        assert capsys.readouterr().out == written, message

    def test_nothing_else_is_documented(self) -> None:
        assert sorted(path.stem for path in DOCUMENTS.iterdir()) == sorted(exported_schemas())

    @settings(max_examples=20)
    @given(known_words)
    def test_accepts_what_is_written_and_what_may_be_read(self, known: dict[str, Any]) -> None:
        validator = Draft202012Validator(json_schema(AcquisitionMetadata))
        validator.validate(json.loads(acquisition(**known).model_dump_json()))
        validator.validate(json.loads(json.dumps({**SMALLEST, **known})))

    def test_accepts_the_default_job(self) -> None:
        validator = Draft202012Validator(json_schema(JobSpec))
        validator.validate({})
        validator.validate(json.loads(JobSpec().model_dump_json()))

    @pytest.mark.parametrize(
        "change", [{"origin": "clinical"}, {"colour": "red"}, {"frames": 0}, {"frames": None}]
    )
    def test_refuses_what_the_model_refuses(self, change: dict[str, Any]) -> None:
        document = {**SMALLEST, **change}
        assert not Draft202012Validator(json_schema(AcquisitionMetadata)).is_valid(document)
        with pytest.raises(ValidationError):
            AcquisitionMetadata.model_validate(document)


class TestSchemaCommand:
    def run(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["schema", *arguments])
        output = capsys.readouterr()
        return stopped.value.code, output.out, output.err

    def test_list(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, _ = self.run(capsys, "list", "--json")
        assert code == 0
        assert [row["name"] for row in json.loads(out)] == [
            "acquisition",
            "job",
            "policy",
            "release",
        ]
        assert all(row["describes"] for row in json.loads(out))
        assert "acquisition" in self.run(capsys, "list")[1]

    def test_unknown_name(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, _, err = self.run(capsys, "show", "patient")
        assert code == 1
        assert err == "error: schema 'patient' is unknown: use acquisition, job, policy, release\n"
