"""What all importers share: options, the protocol, and metadata with the user's additions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Final, Protocol

from pydantic import ValidationError

from fedcmr_client.store.scan_file import ScanSource
from fedcmr_shared.errors import ConfigurationError, DataError
from fedcmr_shared.schemas.acquisition import AcquisitionMetadata

SETTABLE: Final = (
    "modality",
    "view",
    "vendor",
    "scanner",
    "field_strength_t",
    "centre",
    "life_span",
    "diseases",
    "acquired_on",
    "readout_oversampling",
    "pixel_spacing_mm",
    "slice_thickness_mm",
    "slice_pitch_mm",
    "repetition_time_ms",
    "echo_time_ms",
    "flip_angle_deg",
    "heart_rate_bpm",
)
"""Metadata fields that the user may fill in where a file says nothing."""

_SPACING: Final = ("pixel_spacing_mm", "slice_thickness_mm", "slice_pitch_mm")


class ImporterWarning(UserWarning):
    """A file was imported, but something in it was missing or was taken as assumed."""


@dataclass(frozen=True)
class ImportOptions:
    """What the user says beside the files.

    ``patient`` names the patient of everything that is imported. ``patient_map`` maps the names
    that sources use to one canonical name per patient; it is applied before pseudonyms are made.
    ``metadata`` fills fields of AcquisitionMetadata that a file leaves out (see `SETTABLE`); it
    never overrides a file. ``label_names`` gives the meaning of the values of NIfTI label maps,
    background first. ``consent`` is recorded for every patient of the import; see `SiteStore.add`.

    ``coils``, ``snr`` and ``seed`` steer the synthesis of k-space from magnitude images, and
    ``acquired_fraction`` says which part of the stored matrix (phase, readout) was acquired where
    no header says so. Raises ConfigurationError for values that cannot be used.
    """

    patient: str | None = None
    patient_map: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    label_names: tuple[str, ...] = ()
    coils: int = 8
    snr: float = 30.0
    seed: int = 0
    acquired_fraction: tuple[float, float] = (0.75, 0.75)
    consent: bool | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.metadata) - set(SETTABLE))
        if unknown:
            raise ConfigurationError(
                f"metadata {unknown[0]!r} cannot be set: {', '.join(SETTABLE)}"
            )
        if not 1 <= self.coils <= 64:
            raise ConfigurationError(f"coils is {self.coils}: use 1 to 64")
        if not (self.snr > 0 and math.isfinite(self.snr)):
            raise ConfigurationError(f"snr is {self.snr}: use a positive number")
        if self.seed < 0:
            raise ConfigurationError(f"seed is {self.seed}: use 0 or more")
        if not all(0 < fraction <= 1 for fraction in self.acquired_fraction):
            message = "use values above 0 and up to 1"
            raise ConfigurationError(f"acquired_fraction is {self.acquired_fraction}: {message}")
        if self.patient == "" or "" in self.patient_map.values():
            raise ConfigurationError("a patient name is empty: give every patient a name")

    def canonical(self, name: str) -> str:
        """The patient behind the source's ``name``."""
        patient = self.patient if self.patient is not None else name
        return self.patient_map.get(patient, patient)


@dataclass(frozen=True)
class Refusal:
    """One scan among several of the same path that cannot be imported."""

    source: str
    error: DataError


class Importer(Protocol):
    """Reads one format.

    ``claims`` is a cheap look at a file (at a folder for importers of file series).
    ``scans`` yields the scans of a path; a scan that cannot be imported while others of the path
    can is yielded as a Refusal. It raises DataError when nothing of the path can be read.
    """

    @property
    def name(self) -> str:
        """Name of the format in `--format`."""

    def claims(self, path: Path) -> bool:
        """Whether ``path`` looks like this format."""

    def scans(self, path: Path, options: ImportOptions) -> Iterator[ScanSource | Refusal]:
        """Yield the scans of ``path``; samples are read only when a scan is stored."""


def build_metadata(
    fields: Mapping[str, Any], options: ImportOptions, source: str
) -> AcquisitionMetadata:
    """Validated metadata from what a file says, with the user's values where it says nothing.

    Raises DataError naming the first field that is wrong.
    """
    known = {name: value for name, value in fields.items() if value is not None}
    added = {name: value for name, value in options.metadata.items() if name not in known}
    if any(name in added for name in _SPACING) and "spacing_source" not in known:
        added["spacing_source"] = "user"
    try:
        return AcquisitionMetadata.model_validate({**known, **added})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "metadata"
        raise DataError(f"{source}: {name}: {first['msg']}") from error


def positive(value: object) -> float | None:
    """``value`` as a positive finite number, or None: headers write 0 for what they do not know."""
    try:
        number = float(str(value))
    except ValueError:
        return None
    return number if number > 0 and math.isfinite(number) else None


def calendar_day(value: object) -> date | None:
    """``value`` (2024-05-01, or 20240501 as in DICOM) as a date, or None when it is none."""
    try:
        return date.fromisoformat(str(value)[:10])
    except ValueError:
        return None
