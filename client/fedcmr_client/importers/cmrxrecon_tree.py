"""Metadata of CMRxRecon files: folder tree, file name and the sidecar ``<name>_info.csv``.

Tree: ``<Modality>/<Set>/FullSample/<CenterNNN>/<Vendor_Field_Model>/<PNNN>/<name>.mat``; the 2023
set has neither centre nor vendor folders.
"""

from __future__ import annotations

import csv
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedcmr_client.importers import wording
from fedcmr_client.importers.interface import ImporterWarning, ImportOptions, positive
from fedcmr_shared.errors import DataError

_VENDOR_FOLDER: Final = re.compile(r"([A-Za-z]+)_(\d{2,3}T)_(.+)")
_OVERSAMPLED_FOV: Final = ("Sola", "Avanto")


@dataclass(frozen=True)
class Facts:
    """Patient name and metadata fields of one file."""

    patient: str
    fields: dict[str, Any]


def describe(path: Path, shape: tuple[int, ...], options: ImportOptions) -> Facts:
    """Collect what the tree and the sidecar say of ``path`` with ``shape`` (nt, nz, nc, ny, nx).

    Raises DataError when no folder names the patient and the user does not either, or when the
    sidecar is damaged. Warns of readout and phase-encoding axes that look exchanged.
    """
    folders = path.absolute().parts[:-1]
    fields = _from_tree(path, folders)
    sidecar = _read_sidecar(path.with_name(f"{path.stem}_info.csv"))
    fields.update(_from_sidecar(sidecar, fields, shape))
    if shape[-1] < shape[-2]:
        axes = f"readout {shape[-1]} is shorter than phase encoding {shape[-2]}"
        warnings.warn(f"{path}: {axes}: check the dimension order", ImporterWarning, stacklevel=3)
    if "readout_oversampling" not in {**fields, **options.metadata}:
        message = "readout oversampling is not stated and taken as 1"
        warnings.warn(f"{path}: {message}", ImporterWarning, stacklevel=3)
    return Facts(_patient(path, folders, fields, options), fields)


def _from_tree(path: Path, folders: tuple[str, ...]) -> dict[str, Any]:
    # The nearest folder wins: folders above the data set may carry any name.
    nearest = tuple(reversed(folders))
    fields: dict[str, Any] = {
        "modality": wording.modality(path.stem, *nearest),
        "view": wording.view(path.stem),
        "centre": next((f for f in nearest if re.fullmatch(r"Center\d+", f)), None),
    }
    for folder in nearest:
        match = _VENDOR_FOLDER.fullmatch(folder)
        if match:
            fields["vendor"] = wording.vendor(match.group(1))
            fields["field_strength_t"] = wording.field_strength(match.group(2))
            fields["scanner"] = wording.scanner(match.group(3), fields["vendor"])
            break
    return {name: value for name, value in fields.items() if value is not None}


def _patient(
    path: Path, folders: tuple[str, ...], fields: dict[str, Any], options: ImportOptions
) -> str:
    if options.patient is not None:
        return options.patient
    number = next((f for f in reversed(folders) if re.fullmatch(r"P\d+", f)), None)
    if number is None:
        raise DataError(f"{path}: no folder such as P001 names the patient: use --patient")
    centre = fields.get("centre", options.metadata.get("centre"))
    if centre is None:
        message = f"no centre is known, so {number} counts as the {number} of any such folder"
        warnings.warn(f"{path}: {message}", ImporterWarning, stacklevel=4)
        return number
    return f"{centre}/{number}"


def _read_sidecar(path: Path) -> dict[str, str]:
    """Rows key,value; a unit suffix such as "(mm)" is cut off the key."""
    if not path.is_file():
        return {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if len(row) >= 2]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: sidecar cannot be read: {error}") from error
    return {re.sub(r"\s*\(.*\)\s*$", "", row[0]).strip(): row[1].strip() for row in rows}


def _from_sidecar(
    sidecar: dict[str, str], fields: dict[str, Any], shape: tuple[int, ...]
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "slice_thickness_mm": positive(sidecar.get("SliceThickness")),
        "readout_oversampling": positive(sidecar.get("ReadOutOversample")),
    }
    strength = positive(sidecar.get("FieldStrength"))
    if strength is not None and "field_strength_t" not in fields:
        found["field_strength_t"] = wording.nominal_field(strength)
    fov_x, fov_y = positive(sidecar.get("FOVx")), positive(sidecar.get("FOVy"))
    lines, oversampling = positive(sidecar.get("ReconMatrix_Y")), found["readout_oversampling"]
    if fov_x and fov_y and lines and oversampling:
        # UIH, Sola and Avanto quote the field of view with the oversampling, the others without.
        whole = fields.get("vendor") == "UIH" or fields.get("scanner") in _OVERSAMPLED_FOV
        readout_fov = fov_x if whole else fov_x * oversampling
        found["pixel_spacing_mm"] = (fov_y / lines, readout_fov / shape[-1])
    if found.get("pixel_spacing_mm") or found["slice_thickness_mm"]:
        found["spacing_source"] = "sidecar"
    return {name: value for name, value in found.items() if value is not None}
