"""The report of a run: one HTML file that needs nothing else, not even a network.

It reads what lies in the run folder, so an interrupted run has a report too: a part whose files
are missing says so. The Content-Security-Policy of the page forbids every load from outside.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined

from fedcmr_shared import __version__
from fedcmr_shared.errors import DataError
from fedcmr_simulations.evaluation import METHODS, METRICS, Cell, aggregate, read_rows
from fedcmr_simulations.examples import Example, load_examples
from fedcmr_simulations.figures import (
    Chart,
    DotChart,
    dot_chart,
    error_png,
    line_chart,
    magnitude_png,
)

METHOD_NAMES: Final = {
    "zero_filled": "zero-filled",
    "sense": "CG-SENSE",
    "local": "local only",
    "federated": "federated",
}
METRIC_NAMES: Final = {"psnr": "PSNR (dB)", "ssim": "SSIM", "nmse": "NMSE"}
ALL_SITES: Final = "all sites"

_DECIMALS: Final = {"psnr": 2, "ssim": 4, "nmse": 4}
_ORIGINS: Final = {
    "simulated": "simulated k-space from a numerical phantom, not clinical: no patient was scanned",
    "synthesised": "synthesised k-space, not clinical: computed from magnitude images",
    "measured": "measured k-space that the user imported",
}


@dataclass(frozen=True)
class Panel:
    """One method's reconstruction and error map of an example, as base64 PNG."""

    method: str
    name: str
    image: str
    error: str
    psnr: float
    ssim: float


@dataclass(frozen=True)
class ExampleFigure:
    """A reference image and its panels."""

    example: Example
    reference: str
    panels: tuple[Panel, ...]


def write_report(run_folder: Path) -> Path:
    """Write ``report.html`` into ``run_folder`` and return its path.

    Raises:
        DataError: a file of the run exists but cannot be read; a missing file is no error.
    """
    summary = _json(run_folder / "summary.json")
    events = _events(run_folder / "metrics.jsonl")
    rows_path = run_folder / "evaluation.jsonl"
    rows = read_rows(rows_path) if rows_path.exists() else []
    environment = _json(run_folder / "environment.json")
    job = _json(run_folder / "job.json")
    page = _template().render(
        version=__version__,
        summary=summary,
        job=job,
        job_text=json.dumps(job, indent=2, ensure_ascii=False),
        facts=_flatten(environment),
        origin=_origin(summary, environment),
        statement=_statement(summary),
        sites=summary_rows(summary),
        overview=_overview(summary),
        cells=_filled(aggregate(rows)),
        charts=_charts(events),
        rounds=[event for event in events if event["event"] == "round"],
        examples=[_figure(example) for example in load_examples(run_folder / "examples")],
        methods=METHODS,
        method_names=METHOD_NAMES,
        metrics=METRICS,
        metric_names=METRIC_NAMES,
    )
    path = run_folder / "report.html"
    partial = path.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
    return path


def summary_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the headline table: PSNR (dB) per site, then the mean over sites if there are several.

    Columns: site, patients, the four methods, and what the federated model gains over CG-SENSE and
    over local training. A cell whose value is unknown is None.
    """
    rows = [_headline(entry) for entry in summary.get("sites", [])]
    if len(rows) > 1:
        mean: dict[str, Any] = {"site": "mean of sites", "patients": _total(rows, "patients")}
        for column in list(rows[0])[2:]:
            mean[column] = _mean([row[column] for row in rows])
        rows.append(mean)
    return rows


def _headline(entry: Mapping[str, Any]) -> dict[str, Any]:
    values = {METHOD_NAMES[name]: entry.get(f"psnr_{name}") for name in METHODS}
    federated = values["federated"]
    return {
        "site": entry["name"],
        "patients": entry.get("patients"),
        **values,
        "gain over CG-SENSE": _difference(federated, values["CG-SENSE"]),
        "gain over local": _difference(federated, values["local only"]),
    }


def _statement(summary: Mapping[str, Any]) -> str | None:
    """Say in one sentence what the federation achieved, good or bad."""
    rows = summary_rows(summary)
    sites = rows[:-1] if len(rows) > 1 else rows
    if not rows or rows[-1]["federated"] is None:
        return None
    mean = rows[-1]
    parts = [f"The federated model reconstructs at {mean['federated']:.2f} dB PSNR on average"]
    for name, gain in (
        ("zero-filled", _difference(mean["federated"], mean["zero-filled"])),
        ("CG-SENSE", mean["gain over CG-SENSE"]),
        ("local only", mean["gain over local"]),
    ):
        if gain is not None:
            side = "above" if gain >= 0 else "below"
            parts.append(f"{abs(gain):.2f} dB {side} {_PHRASES[name]}")
    wins = sum((row["gain over CG-SENSE"] or 0) > 0 for row in sites)
    return f"{', '.join(parts)}. It beats CG-SENSE at {wins} of {len(sites)} sites."


_PHRASES: Final = {
    "zero-filled": "zero filling",
    "CG-SENSE": "tuned CG-SENSE",
    "local only": "training at one site alone",
}


def _overview(summary: Mapping[str, Any]) -> DotChart | None:
    values = {
        str(entry["name"]): {
            name: float(entry[f"psnr_{name}"])
            for name in METHODS
            if entry.get(f"psnr_{name}") is not None
        }
        for entry in summary.get("sites", [])
    }
    return dot_chart(values) if any(values.values()) else None


def _charts(events: Iterable[Mapping[str, Any]]) -> list[Chart]:
    """Return training loss, PSNR, SSIM and NMSE over rounds, as far as they were recorded."""
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {
        key: {} for key in ("loss", *METRICS)
    }
    for event in events:
        kind, number = event["event"], event.get("round", 0)
        if kind == "round" and event.get("train_loss") is not None:
            curves["loss"].setdefault(ALL_SITES, []).append((number, event["train_loss"]))
        elif kind == "site_loss":
            curves["loss"].setdefault(event["site"], []).append((number, event["loss"]))
        elif kind in ("site_evaluation", "evaluation"):
            for metric in METRICS:
                name = event["site"] if kind == "site_evaluation" else ALL_SITES
                curves[metric].setdefault(name, []).append((number, event[metric]))
    names = {name for lines in curves.values() for name in lines}
    styles = [ALL_SITES, *sorted(names - {ALL_SITES})]
    titles = {
        "loss": ("Training loss", ""),
        "psnr": ("Validation PSNR", "dB"),
        "ssim": ("Validation SSIM", ""),
        "nmse": ("Validation NMSE", ""),
    }
    return [
        line_chart(*titles[key], {name: sorted(lines[name]) for name in sorted(lines)}, styles)
        for key, lines in curves.items()
        if lines
    ]


def _figure(example: Example) -> ExampleFigure:
    panels = tuple(
        Panel(
            method=name,
            name=METHOD_NAMES[name],
            image=magnitude_png(example.images[name]),
            error=error_png(example.reference, example.images[name]),
            psnr=example.psnr[name],
            ssim=example.ssim[name],
        )
        for name in METHODS
        if name in example.images
    )
    return ExampleFigure(example, magnitude_png(example.reference), panels)


def _filled(cells: Iterable[Cell]) -> list[dict[str, Any]]:
    """Give each cell a value for every method, None where there is none, and mark the best."""
    return [
        {
            **vars(cell),
            "scores": {
                metric: {name: values.get(name) for name in METHODS}
                for metric, values in cell.scores.items()
            },
            "best": {
                metric: (min if metric == "nmse" else max)(values, key=values.__getitem__)
                for metric, values in cell.scores.items()
            },
        }
        for cell in cells
    ]


def _origin(summary: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    word = str(summary.get("data_origin") or environment.get("data_origin") or "")
    known = [text for origin, text in _ORIGINS.items() if origin in word]
    return "; ".join(known) or word or "not recorded"


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key} "))
        elif value is not None:
            flat[f"{prefix}{key}".replace("_", " ")] = str(value)
    return flat


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold a JSON object")
    return content


def _events(path: Path) -> list[dict[str, Any]]:
    """Complete lines only: a crash may have cut the last one off."""
    if not path.exists():
        return []
    events = []
    for number, line in enumerate(path.read_text().split("\n")[:-1], start=1):
        try:
            events.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"{path} line {number} is not JSON: {error}") from error
    return events


def _difference(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def _total(rows: Iterable[Mapping[str, Any]], column: str) -> int | None:
    values = [row[column] for row in rows]
    return None if None in values else sum(values)


def _number(value: float | None, decimals: int = 2, signed: bool = False) -> str:
    if value is None:
        return "–"
    text = f"{value:+.{decimals}f}" if signed else f"{value:.{decimals}f}"
    return text.replace("-", "−")  # a true minus sign lines up with the plus sign


def _metric(value: float | None, metric: str) -> str:
    return _number(value, _DECIMALS[metric])


def _bytes(value: float | None) -> str:
    if value is None:
        return "–"
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}" if unit != "B" else f"{value:.0f} B"
        value /= 1000
    return f"{value:.3g} GB"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("fedcmr_simulations"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=_number, metric=_metric, filesize=_bytes, duration=_duration)
    return environment.get_template("report.html.j2")
