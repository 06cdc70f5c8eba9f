"""The 82 phenotypes of UK Biobank category 157 (Bai et al., Nat Med 2020;26:1654) by name.

A number without its name is worthless here: public files order the groups differently. So tables
of phenotypes carry their names (`PhenotypeTable`), and a missing phenotype is NaN, never 0.

Plausible ranges and priors are no clinical reference. Each range says where it comes from:

=====  ===========================================================================================
ACDC   extremes of the patients of the ACDC challenge, as its data card states them
logic  what the definition of the quantity allows
ours   chosen by us, wide enough for disease: for simulated hearts, no clinical reference
=====  ===========================================================================================

The priors (mean, standard deviation) describe simulated healthy hearts of both sexes. They are ours
and serve to scale numbers; nothing is known here about correlations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Final, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from fedcmr_shared.errors import DataError

Unit = Literal["mL", "%", "L/min", "g", "mm", "mm2", "1e-3/mmHg"]
View = Literal["short-axis", "2-chamber", "4-chamber", "aortic"]
Group = Literal[
    "LV",
    "RV",
    "LA",
    "RA",
    "ascending aorta",
    "descending aorta",
    "wall thickness",
    "circumferential strain",
    "radial strain",
    "longitudinal strain",
]
RangeSource = Literal["ACDC", "logic", "ours"]

FIRST_FIELD: Final = 24100
AHA_SEGMENTS: Final = (
    "basal anterior",
    "basal anteroseptal",
    "basal inferoseptal",
    "basal inferior",
    "basal inferolateral",
    "basal anterolateral",
    "mid anterior",
    "mid anteroseptal",
    "mid inferoseptal",
    "mid inferior",
    "mid inferolateral",
    "mid anterolateral",
    "apical anterior",
    "apical septal",
    "apical inferior",
    "apical lateral",
)
"""The 16 segments of Cerqueira et al., Circulation 2002;105:539, without the apical cap."""
LONGITUDINAL_SEGMENTS: Final = (
    "basal septal",
    "basal lateral",
    "mid septal",
    "mid lateral",
    "apical septal",
    "apical lateral",
)


@dataclass(frozen=True)
class PlausibleRange:
    """Closed interval ``low`` to ``high`` in the unit of its phenotype, and its source."""

    low: float
    high: float
    source: RangeSource

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Phenotype:
    """One phenotype; ``prior`` is (mean, standard deviation) in simulated healthy hearts.

    ``derived_from`` names the two phenotypes that it is a function of, or is empty. ``needs_motion``
    tells the strains, for which one needs to follow the muscle over the heart cycle.
    """

    name: str
    field_id: int
    unit: Unit
    group: Group
    views: tuple[View, ...]
    plausible: PlausibleRange
    prior: tuple[float, float]
    derived_from: tuple[str, ...] = ()
    needs_motion: bool = False


class Cavity(NamedTuple):
    """Names of the four phenotypes of one cavity, tied by SV = max − min and EF = 100 SV / max."""

    largest: str
    smallest: str
    stroke: str
    fraction: str


CAVITIES: Final = (
    Cavity("LVEDV", "LVESV", "LVSV", "LVEF"),
    Cavity("RVEDV", "RVESV", "RVSV", "RVEF"),
    Cavity("LAV max", "LAV min", "LASV", "LAEF"),
    Cavity("RAV max", "RAV min", "RASV", "RAEF"),
)
VESSELS: Final = (("AAo max area", "AAo min area"), ("DAo max area", "DAo min area"))

_SAX: Final[tuple[View, ...]] = ("short-axis",)
_Row = tuple[str, Unit, Group, tuple[View, ...], PlausibleRange, tuple[float, float]]


def _acdc(low: float, high: float) -> PlausibleRange:
    return PlausibleRange(low, high, "ACDC")


def _ours(low: float, high: float) -> PlausibleRange:
    return PlausibleRange(low, high, "ours")


_PERCENT: Final = PlausibleRange(0, 100, "logic")
_VENTRICLES: Final[tuple[_Row, ...]] = (
    ("LVEDV", "mL", "LV", _SAX, _acdc(49, 374), (146, 34)),
    ("LVESV", "mL", "LV", _SAX, _acdc(19, 334), (59, 19)),
    ("LVSV", "mL", "LV", _SAX, _ours(10, 200), (87, 19)),
    ("LVEF", "%", "LV", _SAX, _acdc(11, 82), (60, 6)),
    ("LVCO", "L/min", "LV", _SAX, _ours(1, 15), (5.4, 1.2)),
    ("LVM", "g", "LV", _SAX, _ours(30, 400), (86, 22)),
    ("RVEDV", "mL", "RV", _SAX, _acdc(47, 295), (155, 37)),
    ("RVESV", "mL", "RV", _SAX, _acdc(10, 263), (67, 21)),
    ("RVSV", "mL", "RV", _SAX, _ours(5, 200), (88, 20)),
    ("RVEF", "%", "RV", _SAX, _acdc(2, 86), (57, 6)),
)
_LA_VIEWS: Final[tuple[View, ...]] = ("2-chamber", "4-chamber")
_RA_VIEWS: Final[tuple[View, ...]] = ("4-chamber",)
_ATRIA: Final[tuple[_Row, ...]] = (
    ("LAV max", "mL", "LA", _LA_VIEWS, _ours(15, 300), (72, 23)),
    ("LAV min", "mL", "LA", _LA_VIEWS, _ours(3, 280), (28, 14)),
    ("LASV", "mL", "LA", _LA_VIEWS, _ours(2, 150), (44, 13)),
    ("LAEF", "%", "LA", _LA_VIEWS, _PERCENT, (61, 9)),
    ("RAV max", "mL", "RA", _RA_VIEWS, _ours(15, 350), (85, 27)),
    ("RAV min", "mL", "RA", _RA_VIEWS, _ours(3, 320), (46, 19)),
    ("RASV", "mL", "RA", _RA_VIEWS, _ours(2, 150), (39, 14)),
    ("RAEF", "%", "RA", _RA_VIEWS, _PERCENT, (46, 9)),
)
_AORTIC: Final[tuple[View, ...]] = ("aortic",)
_AORTA: Final[tuple[_Row, ...]] = (
    ("AAo max area", "mm2", "ascending aorta", _AORTIC, _ours(250, 2500), (860, 190)),
    ("AAo min area", "mm2", "ascending aorta", _AORTIC, _ours(200, 2400), (780, 180)),
    ("AAo distensibility", "1e-3/mmHg", "ascending aorta", _AORTIC, _ours(0, 12), (1.7, 0.9)),
    ("DAo max area", "mm2", "descending aorta", _AORTIC, _ours(150, 1500), (500, 100)),
    ("DAo min area", "mm2", "descending aorta", _AORTIC, _ours(120, 1400), (440, 90)),
    ("DAo distensibility", "1e-3/mmHg", "descending aorta", _AORTIC, _ours(0, 15), (2.4, 1.1)),
)


def _segments() -> list[_Row]:
    """Rows of wall thickness, Ecc and Err (16 segments and a global value each) and of Ell."""
    kinds: tuple[
        tuple[str, Unit, Group, PlausibleRange, tuple[float, float], tuple[float, float]], ...
    ] = (
        ("WT", "mm", "wall thickness", _ours(2, 35), (6.0, 0.75), (5.7, 0.8)),
        ("Ecc", "%", "circumferential strain", _ours(-45, 5), (-21, 3.5), (-22, 3.5)),
        ("Err", "%", "radial strain", _ours(-10, 200), (42.5, 8.75), (45, 8)),
    )
    rows: list[_Row] = []
    for short, unit, group, plausible, segment, whole in kinds:
        for number in range(1, len(AHA_SEGMENTS) + 1):
            rows.append((segment_name(short, number), unit, group, _SAX, plausible, segment))
        rows.append((f"{short} Global", unit, group, _SAX, plausible, whole))
    longitudinal: Group = "longitudinal strain"
    for number in range(1, len(LONGITUDINAL_SEGMENTS) + 1):
        name = f"Ell_{number}"
        rows.append((name, "%", longitudinal, _RA_VIEWS, _ours(-45, 5), (-18.5, 2.8)))
    rows.append(("Ell Global", "%", longitudinal, _RA_VIEWS, _ours(-45, 5), (-18.5, 2.8)))
    return rows


def segment_name(kind: str, number: int) -> str:
    """Name of AHA segment ``number`` (from 1) of ``WT``, ``Ecc`` or ``Err``."""
    return f"{kind}_AHA_{number}"


def _table() -> tuple[Phenotype, ...]:
    derived = {
        name: (cavity.largest, cavity.smallest)
        for cavity in CAVITIES
        for name in (cavity.stroke, cavity.fraction)
    }
    return tuple(
        Phenotype(
            name=row[0],
            field_id=FIRST_FIELD + index,
            unit=row[1],
            group=row[2],
            views=row[3],
            plausible=row[4],
            prior=row[5],
            derived_from=derived.get(row[0], ()),
            needs_motion=row[2].endswith("strain"),
        )
        for index, row in enumerate((*_VENTRICLES, *_ATRIA, *_AORTA, *_segments()))
    )


PHENOTYPES: Final = _table()
"""All 82, in the order of their field ids."""
_BY_NAME: Final = MappingProxyType({phenotype.name: phenotype for phenotype in PHENOTYPES})
NAMES: Final = tuple(_BY_NAME)


def phenotype(name: str) -> Phenotype:
    """Return one phenotype.

    Raises:
        DataError: there is no phenotype of that name.
    """
    if name not in _BY_NAME:
        raise DataError(f"phenotype {name!r} is unknown: use a name of UK Biobank category 157")
    return _BY_NAME[name]


def implausible(values: Mapping[str, float]) -> dict[str, PlausibleRange]:
    """Return those of ``values`` (by name) that lie outside their plausible range, with it."""
    ranges = {name: phenotype(name).plausible for name in values}
    return {name: ranges[name] for name, value in values.items() if value not in ranges[name]}


@dataclass(frozen=True, eq=False)
class PhenotypeTable:
    """``values`` [heart, phenotype] with the name of each column; NaN where missing.

    Raises:
        DataError: a name is unknown or twice there, or the shape does not fit the names.
    """

    names: tuple[str, ...]
    values: NDArray[np.float64]

    def __post_init__(self) -> None:
        for name in self.names:
            phenotype(name)
        if len(set(self.names)) != len(self.names):
            raise DataError("a phenotype stands in two columns: give each name once")
        if self.values.ndim != 2 or self.values.shape[1] != len(self.names):
            raise DataError(
                f"phenotypes of shape {self.values.shape} do not fit {len(self.names)} names: "
                "one row per heart, one column per name"
            )

    @classmethod
    def of(cls, hearts: Sequence[Mapping[str, float]], names: Sequence[str] = NAMES) -> Self:
        """Table of ``hearts`` (phenotypes by name); other names than ``names`` are left out."""
        rows = [[heart.get(name, np.nan) for name in names] for heart in hearts]
        return cls(tuple(names), np.array(rows, np.float64).reshape(len(hearts), len(names)))

    @cached_property
    def _place(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.names)}

    def column(self, name: str) -> NDArray[np.float64]:
        """Values of one phenotype.

        Raises:
            DataError: the table has no such column.
        """
        if name not in self._place:
            raise DataError(f"the table has no phenotype {name!r}: it has {', '.join(self.names)}")
        return self.values[:, self._place[name]]

    def select(self, names: Sequence[str]) -> Self:
        """Columns in the order of ``names``.

        Raises:
            DataError: the table lacks one of them.
        """
        columns = [self.column(name) for name in names]
        return type(self)(tuple(names), np.stack(columns, axis=1))

    def rows(self) -> list[dict[str, float]]:
        """One mapping per heart, without what is missing."""
        return [
            {name: float(v) for name, v in zip(self.names, row, strict=True) if np.isfinite(v)}
            for row in self.values
        ]
