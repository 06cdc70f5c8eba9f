"""The XML header of ISMRMRD (Inati et al., MRM 77:411, 2017) as metadata fields."""

from __future__ import annotations

from typing import Any, Final

import ismrmrd.xsd

from fedcmr_client.importers import wording
from fedcmr_client.importers.interface import calendar_day, positive
from fedcmr_shared.errors import DataError

# The XML library raises any of these for broken or foreign documents.
_XML_ERRORS: Final = (ValueError, TypeError, KeyError, LookupError, SyntaxError)


def parse_header(text: bytes | str, source: str) -> Any:
    """Header object of ``text``; DataError when it is no ISMRMRD header or has no encoding."""
    from xsdata.exceptions import ParserError

    try:
        header = ismrmrd.xsd.CreateFromDocument(text)
    except (*_XML_ERRORS, ParserError) as error:
        raise DataError(f"{source}: the XML header is not that of ISMRMRD: {error}") from error
    if not header.encoding:
        raise DataError(f"{source}: the XML header has no encoding")
    return header


def patient_of(header: Any) -> str | None:
    """Patient identifier of the header, if it has one."""
    subject = header.subjectInformation
    return str(subject.patientID) if subject is not None and subject.patientID else None


def header_fields(header: Any) -> dict[str, Any]:
    """Metadata fields that the header states; spacing is that without readout oversampling."""
    encoded, recon = header.encoding[0].encodedSpace, header.encoding[0].reconSpace
    fields: dict[str, Any] = {"readout_oversampling": _oversampling(encoded, recon)}
    size, fov = encoded.matrixSize, encoded.fieldOfView_mm
    if min(fov.x, fov.y) > 0 and min(size.x, size.y) > 0:
        fields["pixel_spacing_mm"] = (fov.y / size.y, fov.x / size.x)
        fields["slice_thickness_mm"] = positive(fov.z) if size.z == 1 else None
        fields["spacing_source"] = "header"
    system, sequence = header.acquisitionSystemInformation, header.sequenceParameters
    if system is not None:
        fields["vendor"] = wording.vendor(system.systemVendor or "")
        fields["scanner"] = wording.scanner(system.systemModel or "", fields["vendor"])
        fields["field_strength_t"] = wording.nominal_field(system.systemFieldStrength_T or 0)
    if sequence is not None:
        fields["repetition_time_ms"] = _single(sequence.TR)
        fields["echo_time_ms"] = _single(sequence.TE)
        fields["flip_angle_deg"] = _single(sequence.flipAngle_deg)
    measurement, study = header.measurementInformation, header.studyInformation
    fields["acquired_on"] = calendar_day(getattr(measurement, "seriesDate", None)) or calendar_day(
        getattr(study, "studyDate", None)
    )
    if measurement is not None and measurement.protocolName:
        fields["modality"] = wording.modality(measurement.protocolName)
        fields["view"] = wording.view(measurement.protocolName)
    return fields


def pilot_tone(header: Any) -> bool:
    """Whether the parameter PilotTone is set, as in OCMR (Chen et al., 2008.03410)."""
    parameters = header.userParameters
    longs = parameters.userParameterLong if parameters is not None else []
    return any(item.name == "PilotTone" and item.value == 1 for item in longs)


def _oversampling(encoded: Any, recon: Any) -> float | None:
    if min(encoded.fieldOfView_mm.x, recon.fieldOfView_mm.x) <= 0:
        return None
    factor = float(encoded.fieldOfView_mm.x / recon.fieldOfView_mm.x)
    return round(factor, 4) if 1 <= factor <= 4 else None


def _single(values: list[float]) -> float | None:
    return positive(values[0]) if values else None
