"""The report of a run: one HTML file that needs nothing else, not even a network.

It reads what lies in the run folder, so an interrupted run has a report too: a part whose files
are missing says so. The Content-Security-Policy of the page forbids every load from outside.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

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
    "start": "starting weights",
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
    generates = summary.get("model", {}).get("name") == "cpgg"
    page = _generator_page(run_folder) if generates else _reconstructor_page(run_folder)
    path = run_folder / "report.html"
    partial = path.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
    return path


def _generator_page(run_folder: Path) -> str:
    summary, job = _json(run_folder / "summary.json"), _json(run_folder / "job.json")
    environment = _json(run_folder / "environment.json")
    events = _events(run_folder / "metrics.jsonl")
    picture = run_folder / "hearts.gif"
    return _template("generator.html.j2").render(
        version=__version__,
        summary={"hearts": [], "adherence": None, "gates": [], "release": None} | summary,
        job=job,
        job_text=json.dumps(job, indent=2, ensure_ascii=False),
        facts=_flatten(environment),
        origin=_origin(summary, environment),
        statement=generator_statement(summary),
        picture=b64encode(picture.read_bytes()).decode() if picture.exists() else None,
        attempts=[_attempt(event) for event in events if event["event"] == "attempt"],
        aggregation=_aggregation(job),
        privacy=summary.get("privacy"),
        privacy_statement=privacy_text(summary) if summary.get("privacy") else None,
    )


def generator_statement(summary: Mapping[str, Any]) -> str:
    """Say in one sentence how a generator's run came out."""
    adherence = summary.get("adherence")
    if not adherence:
        return f"The run is {summary.get('status', 'unknown')}: it has no result yet."
    before, after = (adherence[name]["r2"] for name in ("start", "federated"))
    released = "was released" if summary.get("release") else "was not released"
    if before is None and after is None:
        return f"The generator {released}. It draws no hearts, and its starting weights drew none."
    shown = ["no heart" if r2 is None else f"R² {r2:.2f}" for r2 in (before, after)]
    return (
        f"The generator {released}. Fractional area change asked against measured: "
        f"{shown[0]} with the starting weights, {shown[1]} after private training."
    )


def _reconstructor_page(run_folder: Path) -> str:
    summary = _json(run_folder / "summary.json")
    events = _events(run_folder / "metrics.jsonl")
    rows_path = run_folder / "evaluation.jsonl"
    rows = read_rows(rows_path) if rows_path.exists() else []
    environment = _json(run_folder / "environment.json")
    job = _json(run_folder / "job.json")
    return _template("report.html.j2").render(
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
        methods=_methods(summary),
        aggregation=_aggregation(job),
        attempts=[_attempt(event) for event in events if event["event"] == "attempt"],
        privacy=summary.get("privacy"),
        unprotected=summary.get("private") is False,
        privacy_statement=privacy_text(summary) if summary.get("privacy") else None,
        method_names=METHOD_NAMES,
        metrics=METRICS,
        metric_names=METRIC_NAMES,
    )


def summary_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the headline table: PSNR (dB) per site, then the mean over sites if there are several.

    Columns: site, patients, the methods, what the federated model gains over CG-SENSE, over local
    training and over the starting weights if these were pretrained, and the certified epsilon of
    a training patient if training was private. A cell whose value is unknown is None.
    """
    methods, privacy = _methods(summary), summary.get("privacy")
    rows = [_headline(entry, methods) for entry in summary.get("sites", [])]
    if privacy:
        for row in rows:
            trained = privacy["sites"].get(row["site"], {}).get("train", {})
            row["epsilon"] = trained.get("epsilon")
    if len(rows) > 1:
        mean: dict[str, Any] = {"site": "mean of sites", "patients": _total(rows, "patients")}
        for column in list(rows[0])[2:]:
            # Sites' patients are different people: the worst figure counts, not the mean.
            combine = _largest if column == "epsilon" else _mean
            mean[column] = combine([row[column] for row in rows])
        rows.append(mean)
    return rows


def _headline(entry: Mapping[str, Any], methods: Iterable[str]) -> dict[str, Any]:
    values = {METHOD_NAMES[name]: entry.get(f"psnr_{name}") for name in methods}
    federated = values["federated"]
    row = {
        "site": entry["name"],
        "patients": entry.get("patients"),
        **values,
        "gain over CG-SENSE": _difference(federated, values["CG-SENSE"]),
        "gain over local": _difference(federated, values["local only"]),
    }
    if METHOD_NAMES["start"] in values:
        row["gain over start"] = _difference(federated, values[METHOD_NAMES["start"]])
    return row


def _methods(summary: Mapping[str, Any]) -> list[str]:
    """Return the methods to show: starting weights only where a run had pretrained ones."""
    pretrained = summary.get("start") is not None
    return [name for name in METHODS if pretrained or name != "start"]


def privacy_text(summary: Mapping[str, Any]) -> str:
    """Say in one sentence what a patient of the run may have lost, at most."""
    privacy = summary["privacy"]
    trained = [site["train"] for site in privacy["sites"].values()]
    scored = [site["evaluate"] for site in privacy["sites"].values()]
    budget = privacy["budget"]
    text = (
        f"Privacy: epsilon {_bound(max(site['epsilon'] for site in trained))} for the worst "
        f"trained patient at delta {budget['delta']:g} (certified by the ledger's filter; "
        f"{_if_fixed(trained)}), of {budget['epsilon']:g} allowed; unit patient, relation "
        f"{privacy['relation']}; noise multiplier {privacy['noise_multiplier']:g}, sampling rate "
        f"{privacy['sampling_rate']:g}, {privacy['steps']} steps, "
        f"{summary['model']['trainable']:,} trained parameters."
    )
    if privacy["evaluation"]["rounds"] == "none":
        return text
    if privacy["evaluation"]["noise_multiplier"] is None:
        if list(privacy["evaluation"]["metrics"]) == ["memorisation"]:
            return text + " What the memorisation gates let out, one bit a site, has no epsilon."
        return text + " Scores of held-out patients left WITHOUT noise: they have no epsilon."
    worst = max(site["epsilon"] for site in scored)
    return text + f" Scoring cost the held-out patients epsilon {_bound(worst)}."


def _if_fixed(sites: Sequence[Mapping[str, Any]]) -> str:
    epsilons = [site["epsilon_if_fixed"] for site in sites]
    if None in epsilons:
        return "no figure by PLD, as noise was distributed"
    return f"{_bound(max(epsilons))} by PLD, had all jobs been fixed in advance"


def _aggregation(job: Mapping[str, Any]) -> str:
    mode = job.get("aggregation")
    if mode == "secure_sum":
        return (
            "Secure aggregation: the coordinator opened the sums below and could open nothing "
            "else, neither a single site's update nor its scores. A site that dies or is late is "
            "lost for an attempt; a sum of too few sites is never opened. The sites then mask "
            "their stored, already noised results again: nobody trains twice."
        )
    if mode == "secure_groups":
        return (
            "Secure aggregation in groups: the coordinator opened one sum of each group of at "
            "least three sites and combined these by a rule that bounds what one group can do."
        )
    if mode == "plain_with_local_dp":
        if job.get("privacy") is None:
            return "No secure aggregation: the coordinator saw every site's exact update."
        return (
            "No secure aggregation: the coordinator saw every site's update, with the noise that "
            "the site had added."
        )
    return "The job is not recorded."


def _attempt(event: Mapping[str, Any]) -> dict[str, Any]:
    """Return an attempt's row of the table, in words."""
    outcomes = {
        "opened": f"opened: sum of {len(event['survivors'])} of {event['sites']} sites",
        "ended": f"ended: fewer than {event['threshold']} sites left",
        "closed": "closed without a sum, the model stays",
    }
    losses = (
        f"{loss['site']} in step {loss['step']}"
        + ("" if loss["fault"] == "silent" else f": {loss['reason']}")
        for loss in event["losses"]
    )
    return {
        "phase": event["phase"],
        "round": event["round"],
        "attempt": event["attempt"],
        "outcome": outcomes[event["outcome"]],
        "survivors": ", ".join(event["survivors"]) or "–",
        "losses": "; ".join(losses) or "–",
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
        ("starting weights", mean.get("gain over start")),
    ):
        if gain is not None:
            side = "above" if gain >= 0 else "below"
            parts.append(f"{abs(gain):.2f} dB {side} {_PHRASES[name]}")
    wins = sum((row["gain over CG-SENSE"] or 0) > 0 for row in sites)
    return f"{', '.join(parts)}. It beats CG-SENSE at {wins} of {len(sites)} sites."


_PHRASES: Final = {
    "zero-filled": "zero filling",
    "CG-SENSE": "tuned CG-SENSE",
    "local only": "training at one site alone without privacy",
    "starting weights": "the starting weights",
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
        key: {} for key in ("loss", *METRICS, "epsilon")
    }
    for event in events:
        kind, number = event["event"], event.get("round", 0)
        if kind == "round" and event.get("train_loss") is not None:
            curves["loss"].setdefault(ALL_SITES, []).append((number, event["train_loss"]))
        elif kind == "site_loss":
            curves["loss"].setdefault(event["site"], []).append((number, event["loss"]))
        elif kind in ("site_evaluation", "evaluation"):
            for metric in (name for name in METRICS if name in event):
                name = event["site"] if kind == "site_evaluation" else ALL_SITES
                curves[metric].setdefault(name, []).append((number, event[metric]))
        elif kind == "site_privacy":
            curves["epsilon"].setdefault(event["site"], []).append((number, event["epsilon"]))
    names = {name for lines in curves.values() for name in lines}
    styles = [ALL_SITES, *sorted(names - {ALL_SITES})]
    titles = {
        "loss": ("Training loss", ""),
        "psnr": ("Validation PSNR", "dB"),
        "ssim": ("Validation SSIM", ""),
        "nmse": ("Validation NMSE", ""),
        "epsilon": ("Certified epsilon of a trained patient", ""),
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


def _largest(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if known and len(known) == len(values) else None


def _total(rows: Iterable[Mapping[str, Any]], column: str) -> int | None:
    values = [row[column] for row in rows]
    return None if None in values else sum(values)


def _number(value: float | None, decimals: int = 2, signed: bool = False) -> str:
    if value is None:
        return "–"
    text = f"{value:+.{decimals}f}" if signed else f"{value:.{decimals}f}"
    return text.replace("-", "−")  # a true minus sign lines up with the plus sign


def _bound(value: float | None) -> str:
    """Return two decimals, rounded up as an upper bound must be."""
    return "–" if value is None else f"{math.ceil(value * 100 - 1e-9) / 100:.2f}"


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


def _template(name: str) -> Template:
    environment = Environment(
        loader=PackageLoader("fedcmr_simulations"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        bound=_bound, number=_number, metric=_metric, filesize=_bytes, duration=_duration
    )
    return environment.get_template(name)
