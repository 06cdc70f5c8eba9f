"""A simulated federation from data to report, in stages that an interrupt may end at any point.

1. data: the sites folder that was given, or phantom patients
2. federation: the job's rounds on Flower's simulation engine
3. local: each site alone, from the same weights and for the same number of steps
4. evaluation: all methods on each site's test patients; the model of every round on its
   validation patients
5. report

Stages 3 and 4 look at each site from outside the federation. Only a simulation can do that: a
coordinator never sees a figure of one site.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from fedcmr_server.run_folder import RunFolder
from fedcmr_shared.errors import FederationError
from fedcmr_shared.models.registry import parameter_counts
from fedcmr_simulations.centres import simulate_centres
from fedcmr_simulations.config import SimulationConfig
from fedcmr_simulations.evaluation import EvaluationRow, append_rows, site_summary
from fedcmr_simulations.flower_engine import flower_process
from fedcmr_simulations.progress import Progress
from fedcmr_simulations.provenance import environment
from fedcmr_simulations.report import write_report
from fedcmr_simulations.site_work import SiteTask, evaluate_site, follow_rounds, train_alone
from fedcmr_simulations.sites import choose_sites, data_origin
from fedcmr_simulations.workers import each_in_pool

Status = Literal["running", "finished", "interrupted", "failed"]
Result = TypeVar("Result")


@dataclass(frozen=True)
class SimulationRequest:
    """What to simulate: ``data`` is a sites folder, or None for phantom patients."""

    config: SimulationConfig
    sites: int
    out: Path
    data: Path | None = None
    workers: int = 2


@dataclass
class Summary:
    """The run's summary.json, rewritten whole after every stage."""

    path: Path
    values: dict[str, Any] = field(default_factory=dict)

    def update(self, **values: Any) -> None:
        """Set ``values`` and write the file atomically."""
        self.values.update(values)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.values, indent=2) + "\n")
        os.replace(partial, self.path)


def simulate(request: SimulationRequest, progress: Progress) -> dict[str, Any]:
    """Run all stages; return the summary. `report.html` lies in the run folder.

    Raises:
        FedcmrError: a stage failed. The folder then holds what was done before, a summary with
            status ``failed`` and the report of it; likewise ``interrupted`` after Ctrl-C.
    """
    job = request.config.job
    # Wrong data is refused before anything is written.
    stores = _given_sites(request)
    folder = RunFolder.create(request.out, job)
    summary = Summary(folder.root / "summary.json")
    started = time.monotonic()
    with _always_readable(summary, folder, started):
        summary.update(**_opening(request))
        stores = stores or _phantom_sites(request, progress)
        (folder.root / "environment.json").write_text(
            json.dumps(environment(job.seed, data_origin(stores)), indent=2) + "\n"
        )
        summary.update(data_origin=data_origin(stores))
        _federate(request, folder, stores, progress)
        summary.update(**_federation_figures(folder))
        _compare(request, folder, stores, summary, progress)
    return summary.values


@contextmanager
def _always_readable(summary: Summary, folder: RunFolder, started: float) -> Iterator[None]:
    status: Status = "failed"
    try:
        yield
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        figures = _federation_figures(folder)
        summary.update(status=status, seconds=time.monotonic() - started, **figures)
        write_report(folder.root)


def _opening(request: SimulationRequest) -> dict[str, Any]:
    model = request.config.job.model
    headline = request.config.evaluation[0]
    return {
        "status": "running",
        "name": request.config.job.name,
        "nominal_af": headline.acceleration,
        "pattern": headline.pattern,
        "model": {**model.model_dump(), **parameter_counts(model.name, model.size)},
        "sites": [],
    }


def _given_sites(request: SimulationRequest) -> list[Path]:
    if request.data is None:
        return []
    return choose_sites(request.data, request.sites, request.config.job.modalities)


def _phantom_sites(request: SimulationRequest, progress: Progress) -> list[Path]:
    folder = request.out / "data"
    phantom = request.config.phantom
    with progress.stage("simulating patients", request.sites * phantom.patients) as advance:
        simulate_centres(
            folder,
            request.sites,
            phantom.patients,
            seed=request.config.job.seed,
            detail=phantom.detail,
            on_patient=advance,
        )
    return choose_sites(folder, request.sites, request.config.job.modalities)


def _federate(
    request: SimulationRequest, folder: RunFolder, stores: list[Path], progress: Progress
) -> None:
    rounds = request.config.job.rounds
    with (
        progress.stage("federated rounds", rounds) as advance,
        flower_process(folder.root, stores, request.workers) as process,
    ):
        done = 0
        while process.poll() is None:
            time.sleep(0.2)
            events = [event for event in folder.events() if event["event"] == "round"]
            for event in events[done:]:
                advance(f"round {event['round']}: loss {event['train_loss']:.4f}")
            done = len(events)
    failures = [event["message"] for event in folder.events() if event["event"] == "failed"]
    if failures:
        raise FederationError(failures[-1])
    latest = folder.latest()
    if process.returncode != 0 or latest is None or latest.round < rounds:
        raise FederationError(
            f"Flower's engine ended with code {process.returncode} before the last round: "
            f"see {folder.root / 'flower.log'}"
        )


def _compare(
    request: SimulationRequest,
    folder: RunFolder,
    stores: list[Path],
    summary: Summary,
    progress: Progress,
) -> None:
    """Stages 3 and 4: what the federation gained at each site."""
    samplings = tuple(case.sampling() for case in request.config.evaluation)
    tasks = [SiteTask(folder.root, store, samplings) for store in stores]
    for _ in _each_site("training each site alone", train_alone, tasks, request, progress):
        pass
    for events in _each_site("following the rounds", follow_rounds, tasks, request, progress):
        for event in events:
            folder.record("site_evaluation", **event)
    rows: list[EvaluationRow] = []
    for own in _each_site("scoring test patients", evaluate_site, tasks, request, progress):
        rows.extend(own)
        append_rows(folder.root / "evaluation.jsonl", own)
        sites = site_summary(rows, samplings[0])
        realised = statistics.fmean(site["realised_af"] for site in sites)
        summary.update(sites=sites, realised_af=realised)


def _each_site(
    title: str,
    work: Callable[[SiteTask], Result],
    tasks: list[SiteTask],
    request: SimulationRequest,
    progress: Progress,
) -> Iterator[Result]:
    with progress.stage(title, len(tasks)) as advance:
        for task, result in each_in_pool(work, tasks, request.workers):
            advance(task.site)
            yield result


def _federation_figures(folder: RunFolder) -> dict[str, Any]:
    events = folder.events()
    rounds = [event for event in events if event["event"] == "round"]
    exchanges = [event for event in events if event["event"] in ("round", "evaluation")]
    return {
        "rounds": len(rounds),
        "bytes_up": sum(event["bytes_up"] for event in exchanges),
        "bytes_down": sum(event["bytes_down"] for event in exchanges),
        "round_seconds": [event["seconds"] for event in rounds],
        "model_sha256": rounds[-1]["model_sha256"] if rounds else None,
    }
