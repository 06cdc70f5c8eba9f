"""What is known about one scan, with everything unknown named as missing."""

from __future__ import annotations

import warnings
from collections.abc import Container
from datetime import date
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, computed_field, model_validator

from fedcmr_shared.schemas import vocabulary

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Origin = Literal["measured", "simulated", "synthesised"]
SpacingSource = Literal["header", "sidecar", "user", "phantom"]


class UnknownVocabularyWarning(UserWarning):
    """A word is not in the vocabulary; it is kept as it is."""


class AcquisitionMetadata(BaseModel):
    """One scan: one patient, modality and view, all frames and slices.

    ``origin`` is never missing: *measured* k-space came from a scanner, *simulated* k-space from
    the phantom, *synthesised* k-space from magnitude images. Only the first may be called clinical.

    ``phase_encodes`` and ``readout_samples`` count stored samples, readout oversampling included.
    Spacings are those of the image after the oversampling is removed; they are untrusted in public
    data sets, so ``spacing_source`` says where they came from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal["1"] = "1"
    origin: Origin
    source_format: str = Field(description="importer or simulator that made the scan")

    modality: str | None = None
    view: str | None = None
    vendor: str | None = None
    scanner: str | None = None
    field_strength_t: Positive | None = None
    centre: str | None = None
    life_span: str | None = None
    diseases: tuple[str, ...] | None = None
    acquired_on: date | None = Field(
        default=None,
        description="day of the acquisition, for the site's own limits and cohort queries; it "
        "never enters a prompt, an exported image or anything else that leaves the site",
    )

    frames: Annotated[int, Field(ge=1)]
    slices: Annotated[int, Field(ge=1)]
    coils: Annotated[int, Field(ge=1)]
    phase_encodes: Annotated[int, Field(ge=1)]
    readout_samples: Annotated[int, Field(ge=1)]
    readout_oversampling: Annotated[float, Field(ge=1, le=4)] = 1.0

    pixel_spacing_mm: tuple[Positive, Positive] | None = Field(
        default=None, description="(phase-encoding direction, readout direction)"
    )
    slice_thickness_mm: Positive | None = None
    slice_pitch_mm: Positive | None = Field(
        default=None, description="distance between slice centres, gap included"
    )
    spacing_source: SpacingSource | None = None

    repetition_time_ms: Positive | None = None
    echo_time_ms: Positive | None = None
    flip_angle_deg: Positive | None = None
    heart_rate_bpm: Positive | None = None
    frame_times_ms: tuple[float, ...] | None = Field(
        default=None, description="time after the R wave of each frame"
    )
    contrast_times_ms: tuple[float, ...] | None = Field(
        default=None, description="inversion, preparation or spin-lock time of each frame"
    )

    @model_validator(mode="before")
    @classmethod
    def _accept_own_dump(cls, data: Any) -> Any:
        # `missing` is computed; a dump that is read back carries it along.
        if isinstance(data, dict) and "missing" in data:
            return {key: value for key, value in data.items() if key != "missing"}
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.pixel_spacing_mm is not None and self.spacing_source is None:
            raise ValueError("spacing_source is required beside pixel_spacing_mm")
        for name in ("frame_times_ms", "contrast_times_ms"):
            values = getattr(self, name)
            if values is not None and len(values) != self.frames:
                raise ValueError(f"{name} has {len(values)} values for {self.frames} frames")
        self._warn_unknown()
        return self

    def _warn_unknown(self) -> None:
        known: list[tuple[str, object, Container[object]]] = [
            ("modality", self.modality, vocabulary.MODALITIES),
            ("view", self.view, vocabulary.VIEWS),
            ("vendor", self.vendor, vocabulary.VENDORS),
            ("field_strength_t", self.field_strength_t, vocabulary.FIELD_STRENGTHS_T),
            ("life_span", self.life_span, vocabulary.LIFE_SPANS),
            *(("diseases", code, vocabulary.DISEASES) for code in self.diseases or ()),
        ]
        if self.vendor in vocabulary.SCANNERS:
            known.append(("scanner", self.scanner, vocabulary.SCANNERS[self.vendor]))
        for name, value, words in known:
            if value is not None and value not in words:
                warnings.warn(
                    f"{name} {value!r} is not in the vocabulary and is kept as it is",
                    UnknownVocabularyWarning,
                    stacklevel=4,
                )

    @computed_field  # type: ignore[prop-decorator]  # mypy cannot see through stacked decorators
    @property
    def missing(self) -> tuple[str, ...]:
        """Names of all fields without a value."""
        return tuple(name for name in type(self).model_fields if getattr(self, name) is None)
