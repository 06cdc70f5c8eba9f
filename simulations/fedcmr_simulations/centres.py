"""Virtual hospitals with different scanners, sequences and patients, simulated by the phantom.

The hospitals are invented. What differs between them is what differs between real ones: vendor,
field strength, coil array, matrix, noise, contrasts and diseases.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Final, TypeVar

import numpy as np

from fedcmr_client.store.site_store import SiteStore
from fedcmr_client.store.split import SPLITS, SplitFractions
from fedcmr_shared.errors import ConfigurationError, DataError
from fedcmr_simulations.balanced_split import balanced_secret
from fedcmr_simulations.phantom.acquisition import Grid
from fedcmr_simulations.phantom.coils import CoilArray
from fedcmr_simulations.phantom.patient import Patient, draw_patient
from fedcmr_simulations.phantom.protocol import DETAILS, Detail, Modality, protocol
from fedcmr_simulations.phantom.scan import Scan, Scanner

SPLIT: Final = SplitFractions(train=0.4, validation=0.2, test=0.4)
"""Much to evaluate and little to train on, as at a hospital that needs others."""
MID_VENTRICLE: Final = 0.55
"""Height of a mid-ventricular slice over the apex, as a share of that of the base at ED."""
CLIP_COILS: Final = 4
"""Coils for a clip: few, as it is shown on coarse pixels."""
_STANDARD_SLICES: Final = 8
# Matrix and coils relative to those of detail `quick`.
_ENLARGEMENT: Final = {"small": (2 / 3, 0.5), "standard": (1.8, 1.5)}
_FEWEST_COILS: Final = 4
_Word = TypeVar("_Word", bound=str)


@dataclass(frozen=True)
class Centre:
    """One virtual hospital. ``modalities`` and ``diseases`` map words to probabilities.

    ``matrix`` (phase, readout) and ``coils`` are those of detail `quick`; `standard` has about
    1.8 times the matrix and 1.5 times the coils, `small` two thirds of the matrix and half of the
    coils, `clip` the same matrix, four coils and no readout oversampling. ``external`` centres are
    held out of training.

    Raises:
        ConfigurationError: probabilities do not add up to 1.
    """

    name: str
    vendor: str
    scanner: str
    field_strength_t: float
    array: CoilArray
    matrix: tuple[int, int]
    spacing_mm: tuple[float, float]
    readout_oversampling: float
    modalities: Mapping[Modality, float]
    diseases: Mapping[str, float]
    snr: float
    noise_correlation: float = 0.3
    life_span: str = "adult"
    external: bool = False

    def __post_init__(self) -> None:
        for field in ("modalities", "diseases"):
            total = sum(getattr(self, field).values())
            if not np.isclose(total, 1):
                raise ConfigurationError(
                    f"centre {self.name}: probabilities of {field} add up to {total:g}, not 1"
                )

    def equipment(self, detail: Detail) -> Scanner:
        """Scanner settings at a level of detail."""
        array, phase, readout, spacing = self.array, *self.matrix, self.spacing_mm
        oversampling = self.readout_oversampling
        if detail == "clip":
            array, oversampling = replace(array, coils=CLIP_COILS, front=CLIP_COILS // 2), 1.0
        elif detail != "quick":
            pixels, loops = _ENLARGEMENT[detail]
            coils = max(round(loops * array.coils), _FEWEST_COILS)
            array = replace(array, coils=coils, front=round(loops * array.front))
            # The field of view stays.
            other = (8 * round(phase * pixels / 8), 8 * round(readout * pixels / 8))
            spacing = (spacing[0] * phase / other[0], spacing[1] * readout / other[1])
            phase, readout = other
        return Scanner(
            name=self.name,
            vendor=self.vendor,
            model=self.scanner,
            field_strength_t=self.field_strength_t,
            array=array,
            grid=Grid(phase, readout, spacing, oversampling),
            slice_thickness_mm=8.0,
            slice_pitch_mm=10.0,
            snr=self.snr,
            noise_correlation=self.noise_correlation,
            life_span=self.life_span,
        )


CENTRES: Final[tuple[Centre, ...]] = (
    Centre(
        name="alder",
        vendor="Siemens",
        scanner="Aera",
        field_strength_t=1.5,
        array=CoilArray(coils=8, front=5, radius=58, gap=32, front_arc=1.15, back_arc=0.8),
        matrix=(96, 96),
        spacing_mm=(2.6, 2.75),
        readout_oversampling=2.0,
        modalities=MappingProxyType(
            {"cine": 0.4, "LGE": 0.3, "T1 mapping": 0.15, "perfusion": 0.15}
        ),
        diseases=MappingProxyType({"NC": 0.25, "MI": 0.6, "DCM": 0.15}),
        snr=34.0,
    ),
    Centre(
        name="birch",
        vendor="UIH",
        scanner="umr790",
        field_strength_t=3.0,
        array=CoilArray(coils=10, front=6, radius=50, gap=30, front_arc=1.3, back_arc=1.0),
        matrix=(104, 96),
        spacing_mm=(2.4, 2.7),
        readout_oversampling=1.0,
        modalities=MappingProxyType(
            {"cine": 0.4, "T1 mapping": 0.3, "LGE": 0.15, "T2 mapping": 0.15}
        ),
        diseases=MappingProxyType({"NC": 0.4, "HCM": 0.6}),
        snr=52.0,
        noise_correlation=0.45,
    ),
    Centre(
        name="cedar",
        vendor="GE",
        scanner="Voyager",
        field_strength_t=1.5,
        array=CoilArray(coils=6, front=4, radius=72, gap=38, front_arc=1.0, back_arc=0.6),
        matrix=(96, 104),
        spacing_mm=(2.65, 2.65),
        readout_oversampling=1.0,
        modalities=MappingProxyType(
            {"cine": 0.4, "perfusion": 0.3, "T2 mapping": 0.15, "LGE": 0.15}
        ),
        diseases=MappingProxyType({"NC": 0.2, "DCM": 0.4, "MI": 0.2, "PAH": 0.2}),
        snr=36.0,
        noise_correlation=0.2,
    ),
    Centre(
        name="dogwood",
        vendor="Siemens",
        scanner="Free.Max",
        field_strength_t=0.55,
        array=CoilArray(coils=8, front=4, radius=62, gap=31, front_arc=1.1, back_arc=1.1),
        matrix=(96, 96),
        spacing_mm=(2.65, 2.85),
        readout_oversampling=2.0,
        modalities=MappingProxyType(
            {"cine": 0.4, "T2 mapping": 0.3, "T1 mapping": 0.15, "perfusion": 0.15}
        ),
        diseases=MappingProxyType({"NC": 0.5, "HHD": 0.35, "PAH": 0.15}),
        snr=18.0,
        noise_correlation=0.35,
    ),
    Centre(
        name="elm",
        vendor="UIH",
        scanner="Jupiter",
        field_strength_t=5.0,
        array=CoilArray(coils=10, front=5, radius=48, gap=30, front_arc=1.4, back_arc=1.2),
        matrix=(104, 104),
        spacing_mm=(2.35, 2.5),
        readout_oversampling=1.0,
        modalities=MappingProxyType({"cine": 0.6, "T1 mapping": 0.2, "LGE": 0.2}),
        diseases=MappingProxyType({"NC": 0.5, "HCM": 0.25, "DCM": 0.25}),
        snr=80.0,
        noise_correlation=0.5,
        external=True,
    ),
    Centre(
        name="fir",
        vendor="Philips",
        scanner="Ingenia",
        field_strength_t=3.0,
        array=CoilArray(coils=8, front=4, radius=66, gap=34, front_arc=0.9, back_arc=0.9),
        matrix=(96, 104),
        spacing_mm=(2.6, 2.6),
        readout_oversampling=1.0,
        modalities=MappingProxyType({"cine": 0.6, "T2 mapping": 0.2, "perfusion": 0.2}),
        diseases=MappingProxyType({"NC": 0.3, "MI": 0.3, "HHD": 0.2, "DCM": 0.2}),
        snr=48.0,
        external=True,
    ),
)
"""All virtual hospitals; SNR grows roughly with the field."""
PRETRAINING_CENTRES: Final[tuple[Centre, ...]] = (
    Centre(
        name="hazel",
        vendor="Hitachi",
        scanner="Oasis",
        field_strength_t=1.2,
        array=CoilArray(coils=8, front=4, radius=64, gap=36, front_arc=1.0, back_arc=0.9),
        matrix=(96, 104),
        spacing_mm=(2.7, 2.65),
        readout_oversampling=1.0,
        modalities=MappingProxyType({"black blood": 0.3, "T1rho mapping": 0.4, "T1 weighted": 0.3}),
        diseases=MappingProxyType({"NC": 0.4, "MI": 0.3, "HHD": 0.3}),
        snr=28.0,
        noise_correlation=0.25,
    ),
    Centre(
        name="juniper",
        vendor="Elscint",
        scanner="Prestige",
        field_strength_t=2.0,
        array=CoilArray(coils=10, front=6, radius=54, gap=32, front_arc=1.25, back_arc=0.8),
        matrix=(96, 96),
        spacing_mm=(2.5, 2.8),
        readout_oversampling=2.0,
        modalities=MappingProxyType({"T2 weighted": 0.3, "T1rho mapping": 0.4, "black blood": 0.3}),
        diseases=MappingProxyType({"NC": 0.3, "DCM": 0.4, "PAH": 0.3}),
        snr=42.0,
        noise_correlation=0.4,
    ),
    Centre(
        name="larch",
        vendor="Bruker",
        scanner="MedSpec",
        field_strength_t=4.0,
        array=CoilArray(coils=8, front=5, radius=60, gap=30, front_arc=1.3, back_arc=0.7),
        matrix=(104, 96),
        spacing_mm=(2.45, 2.65),
        readout_oversampling=1.0,
        modalities=MappingProxyType(
            {"T1 weighted": 0.35, "T1rho mapping": 0.35, "T2 weighted": 0.3}
        ),
        diseases=MappingProxyType({"NC": 0.4, "HCM": 0.4, "MI": 0.2}),
        snr=64.0,
        noise_correlation=0.35,
    ),
)
"""Research centres for starting weights: their vendors, fields and contrasts occur in no hospital."""
TRAINING_CENTRES: Final = tuple(centre for centre in CENTRES if not centre.external)
EXTERNAL_CENTRES: Final = tuple(centre for centre in CENTRES if centre.external)


def simulate_centres(
    out: Path,
    n_sites: int,
    n_patients: int,
    *,
    seed: int,
    detail: Detail = "quick",
    external: bool = False,
    on_patient: Callable[[str], None] | None = None,
) -> list[Path]:
    """Simulate ``n_sites`` hospitals below ``out``, one store each, and return their folders.

    More sites than named centres reuse the equipment with other patients (alder-2, ...).
    ``external`` takes the held-out centres instead. ``on_patient`` is called after each patient.

    Raises:
        ConfigurationError: an unknown detail, or fewer than 1 site or 3 patients.
        DataError: ``out`` is not empty or cannot be written.
    """
    if n_sites < 1:
        raise ConfigurationError(f"sites must be at least 1, not {n_sites}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and is not an empty folder: choose another one")
    folders = []
    for index in range(n_sites):
        centre = nth_centre(index, external=external)
        folder = out / centre.name
        simulate_centre(folder, centre, n_patients, seed, detail, on_patient).close()
        folders.append(folder)
    return folders


def nth_centre(index: int, *, external: bool = False) -> Centre:
    """Return the hospital of a number; those beyond the named ones reuse equipment (alder-2, ...)."""
    base = EXTERNAL_CENTRES if external else TRAINING_CENTRES
    centre = base[index % len(base)]
    if index < len(base):
        return centre
    return replace(centre, name=f"{centre.name}-{index // len(base) + 1}")


def simulate_centre(
    root: Path,
    centre: Centre,
    n_patients: int,
    seed: int,
    detail: Detail = "quick",
    on_patient: Callable[[str], None] | None = None,
    split: SplitFractions = SPLIT,
) -> SiteStore:
    """Make the store of one virtual hospital in ``root`` and fill it; the caller closes it.

    The same arguments give the same samples, pseudonyms and split; another ``split`` changes no
    sample.

    Raises:
        ConfigurationError: an unknown detail, or fewer than 3 patients (one for each part).
        DataError: ``root`` holds a store already or cannot be written.
    """
    if detail not in DETAILS:
        raise ConfigurationError(f"detail {detail!r} is unknown; use {', '.join(DETAILS)}")
    if n_patients < len(SPLITS):
        raise ConfigurationError(
            f"patients must be at least {len(SPLITS)} (one per part of the split), not {n_patients}"
        )
    names = [f"simulated-{centre.name}-{index:04d}" for index in range(1, n_patients + 1)]
    store = SiteStore.create(root, secret=balanced_secret(f"{centre.name} {seed}", names, split))
    store.set_split(split)
    scanner = centre.equipment(detail)
    for index, name in enumerate(names):
        root_seed = (seed, _number(centre.name), index)
        for scan in _draw_scans(centre, scanner, name, root_seed, detail):
            store.add(scan.source())
        if on_patient is not None:
            on_patient(f"{centre.name} {index + 1}/{n_patients}")
    return store


def _draw_scans(
    centre: Centre, scanner: Scanner, name: str, seed: tuple[int, ...], detail: Detail
) -> list[Scan]:
    rng = np.random.default_rng(seed)
    patient = draw_patient(name, _draw(centre.diseases, rng), rng)
    # Quick: one sequence for most patients, two for the others. Small: one frame of one sequence.
    # Clip: the beat of one slice, which every hospital has.
    chosen: list[Modality] = ["cine"] if detail == "clip" else [_draw(centre.modalities, rng)]
    others = [modality for modality in centre.modalities if modality not in chosen]
    if others and detail not in ("small", "clip") and (detail == "standard" or rng.random() < 0.3):
        chosen.append(others[int(rng.integers(len(others)))])
    heights = _slice_heights(patient, scanner, detail, rng)
    sequences = [protocol(modality, detail, centre.field_strength_t) for modality in chosen]
    if detail == "small":
        sequences = [sequence.only(int(rng.integers(sequence.frames))) for sequence in sequences]
    return [
        Scan(patient, scanner, sequence, heights, (*seed, _number(sequence.modality)))
        for sequence in sequences
    ]


def _slice_heights(
    patient: Patient, scanner: Scanner, detail: Detail, rng: np.random.Generator
) -> tuple[float, ...]:
    """Slice centres in mm over the apex, base first."""
    base = patient.heart.at(0).base
    if detail == "clip":
        return (MID_VENTRICLE * base,)
    if detail == "small":
        return (float(rng.uniform(0.3, 0.85) * base),)
    if detail == "quick":
        return (float(rng.uniform(0.5, 0.85) * base), float(rng.uniform(0.3, 0.5) * base))
    # As many slices as needed to reach the apex, at least eight; the first one just below the base.
    count = max(_STANDARD_SLICES, int(np.ceil(base / scanner.slice_pitch_mm)))
    top = base - scanner.slice_pitch_mm / 2
    return tuple(float(top - index * scanner.slice_pitch_mm) for index in range(count))


def _draw(probabilities: Mapping[_Word, float], rng: np.random.Generator) -> _Word:
    words = list(probabilities)
    return words[int(rng.choice(len(words), p=list(probabilities.values())))]


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
