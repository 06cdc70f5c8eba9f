"""Hearts that a user asks a generator for: phenotypes by name, checked and completed.

Volumes, stroke volume and ejection fraction of a cavity follow from any two of them. With two the
others are computed; with one they are those of the plausible cavity nearest to the public priors'
means, in prior deviations, so that a low ejection fraction comes with volumes that have it. What is
given is used as it is. Everything else stays missing, which a generator takes for the prior's mean.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedcmr_shared.errors import ConfigurationError, DataError
from fedcmr_shared.metrics.phenotypes.identities import project
from fedcmr_shared.metrics.phenotypes.table import (
    CAVITIES,
    NAMES,
    VESSELS,
    Cavity,
    PhenotypeTable,
    implausible,
    phenotype,
)

Heart = dict[str, float]
"""Phenotypes by name, in the units of the table; what is missing is absent."""

_ROUNDING: Final = 1.0  # people write whole mL and per cent, and a stroke volume has two of them
_HINTS: Final = 3
_CHOICES: Final = 1001  # values of a second phenotype that are tried where only one is given


def known_name(name: str, names: Sequence[str] = NAMES) -> str:
    """Return that one of ``names`` which is ``name`` but for upper and lower case.

    Raises:
        ConfigurationError: there is none; the message names near ones.
    """
    by_lower = {known.lower(): known for known in names}
    lower = name.strip().lower()
    if lower in by_lower:
        return by_lower[lower]
    near = get_close_matches(lower, by_lower)
    if lower and not near:
        near = [known for known in by_lower if lower in known][:_HINTS]
    hint = f"did you mean {', '.join(by_lower[n] for n in near)}?" if near else f"try {names[0]}"
    raise ConfigurationError(f"phenotype {name!r} is unknown to the model: {hint}")


def parse_settings(settings: Iterable[str], names: Sequence[str] = NAMES) -> Heart:
    """Return the phenotypes in texts of the form NAME=VALUE.

    Raises:
        ConfigurationError: a text has another form, or a phenotype is unknown or there twice.
    """
    heart: Heart = {}
    for setting in settings:
        name, equals, text = setting.rpartition("=")
        value = _number(text)
        if not equals or value is None:
            raise ConfigurationError(f"phenotype {setting!r} is not NAME=VALUE, like LVEF=35")
        name = known_name(name, names)
        if name in heart:
            raise ConfigurationError(f"phenotype {name} is given twice")
        heart[name] = value
    return heart


@dataclass(frozen=True)
class RequestTable:
    """For each row of a table what is given, and the same completed; ``sha256`` is the file's."""

    hearts: list[tuple[Heart, Heart]]
    sha256: str


def read_requests(path: Path, names: Sequence[str] = NAMES) -> RequestTable:
    """Read a table with a header of names and a heart in each row; an empty cell is missing.

    Raises:
        DataError: file, line and column of what is wrong.
    """
    try:
        content = path.read_bytes()  # once, since a pipe gives its bytes only once
        text = io.StringIO(content.decode("utf-8-sig"), newline="")
        rows = list(_rows(csv.reader(text, strict=True)))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a table of comma-separated values: {error}") from error
    if len(rows) < 2:
        raise DataError(f"{path}: give a line of phenotype names and one line for each clip")
    _check_commas(path, rows[0])
    header = _header(path, rows[0], names)
    hearts = [_request(f"{path}, line {line}", header, cells) for line, cells in rows[1:]]
    return RequestTable(hearts, hashlib.sha256(content).hexdigest())


def complete(given: Mapping[str, float], names: Sequence[str] = NAMES) -> Heart:
    """Return ``given`` with what follows from it, in the order of ``names``.

    Raises:
        ConfigurationError: a value lies outside its plausible range, or values contradict an
            identity.
    """
    _check_ranges(given)
    heart = dict(given)
    for cavity in CAVITIES:
        part = {name: given[name] for name in cavity if name in given}
        if part:
            heart |= _complete_cavity(cavity, part)
    for largest, smallest in VESSELS:
        if heart.get(smallest, -math.inf) > heart.get(largest, math.inf):
            raise ConfigurationError(
                f"{_listed(heart, (largest, smallest))} contradict each other: the smallest area "
                "must not exceed the largest"
            )
    return {name: heart[name] for name in names if name in heart}


def _rows(reader: Iterable[list[str]]) -> Iterator[tuple[int, list[str]]]:
    """Yield rows that are not blank with the numbers of their last lines."""
    for row in reader:
        line: int = reader.line_num  # type: ignore[attr-defined]  # of a csv reader
        if row:
            yield line, [cell.strip() for cell in row]


def _check_commas(path: Path, first: tuple[int, list[str]]) -> None:
    # Spreadsheets write semicolons, and decimal commas with them, where a country does so.
    line, cells = first
    if ";" in "".join(cells):
        raise DataError(
            f"{path}, line {line}: semicolons divide the columns: use commas, and decimal points"
        )


def _header(path: Path, first: tuple[int, list[str]], names: Sequence[str]) -> list[str]:
    line, cells = first
    header: list[str] = []
    for column, cell in enumerate(cells, 1):
        with _placed(f"{path}, line {line}, column {column}"):
            name = known_name(cell, names)
            if name in header:
                raise ConfigurationError(f"phenotype {name} has two columns")
        header.append(name)
    return header


def _request(place: str, header: list[str], cells: list[str]) -> tuple[Heart, Heart]:
    if len(cells) != len(header):
        raise DataError(f"{place}: {len(cells)} cells, the header has {len(header)}")
    given: Heart = {}
    for name, cell in zip(header, cells, strict=True):
        if cell:
            value = _number(cell)
            if value is None:
                raise DataError(f"{place}, column {name}: {cell!r} is not a number")
            given[name] = value
    with _placed(place):
        return given, complete(given)


@contextmanager
def _placed(place: str) -> Iterator[None]:
    try:
        yield
    except ConfigurationError as error:
        raise DataError(f"{place}: {error}") from error


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _check_ranges(heart: Mapping[str, float], because: str = "") -> None:
    for name, plausible in implausible(heart).items():
        unit = phenotype(name).unit
        raise ConfigurationError(
            f"{name} {heart[name]:g} {unit} lies outside its plausible range "
            f"{plausible.low:g} to {plausible.high:g} {unit}{because}"
        )


def _complete_cavity(cavity: Cavity, given: Heart) -> Heart:
    """Return all four numbers of a cavity of which one or more are given."""
    pair = _likeliest(cavity, given) if len(given) == 1 else dict(list(given.items())[:2])
    (found,) = project(PhenotypeTable.of([pair], cavity)).rows()
    if any(abs(found[name] - value) > _ROUNDING for name, value in given.items()):
        raise ConfigurationError(
            f"{_listed(given, given)} contradict one another: {cavity.stroke} = {cavity.largest} - "
            f"{cavity.smallest} and {cavity.fraction} = 100 {cavity.stroke} / {cavity.largest}; "
            "leave one out"
        )
    heart = {**found, **pair, **given}
    _check_ranges(heart, f", which follows from {_listed(pair, pair)}")
    return heart


def _likeliest(cavity: Cavity, given: Heart) -> Heart:
    """Return the one number of a cavity and another one that fits it best."""
    ((name, value),) = given.items()
    other = cavity.smallest if name == cavity.largest else cavity.largest
    plausible = phenotype(other).plausible
    tried = np.linspace(plausible.low, plausible.high, _CHOICES)
    table = project(PhenotypeTable.of([{name: value, other: float(x)} for x in tried], cavity))
    usable = np.isclose(table.column(name), value) & np.isclose(table.column(other), tried)
    for column in set(cavity) - {name, other}:
        within = phenotype(column).plausible
        usable &= (table.column(column) >= within.low) & (table.column(column) <= within.high)
    if not usable.any():
        raise ConfigurationError(
            f"no {other} makes a plausible heart with {_listed(given, given)}: "
            "ask for a less extreme one"
        )
    distance: NDArray[np.float64] = np.zeros(len(tried))
    for column in cavity:
        mean, deviation = phenotype(column).prior
        distance += ((table.column(column) - mean) / deviation) ** 2
    return {name: value, other: float(tried[np.where(usable, distance, np.inf).argmin()])}


def _listed(heart: Mapping[str, float], names: Iterable[str]) -> str:
    return ", ".join(f"{name}={heart[name]:g}" for name in names)
