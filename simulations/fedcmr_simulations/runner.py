"""A simulated federation from data to report, in stages that an interrupt may end at any point.

1. data: the sites folder that was given, or phantom patients; each site gets a policy and a
   privacy ledger of its own, made for this run, and all are on one roster
2. federation: the job's rounds on Flower's simulation engine
3. local: each site alone, from the same weights and for the same number of steps
4. evaluation: all methods on each site's test patients; the model of every round on its
   validation patients
5. report

For a generator, the memorisation gate, the release, how well it does what it is asked for, and six
hearts take the place of stages 3 and 4.

Stages 3 and 4 look at each site from outside the federation. Only a simulation can do that: a
coordinator never sees a figure of one site.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from fedcmr_server.run_folder import RunFolder
from fedcmr_shared.errors import ConfigurationError, FederationError
from fedcmr_shared.identity.roster import roster_text
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_simulations.centres import nth_centre
from fedcmr_simulations.config import SimulationConfig
from fedcmr_simulations.drops import Drop
from fedcmr_simulations.evaluation import EvaluationRow, append_rows, site_summary
from fedcmr_simulations.flower_engine import flower_process
from fedcmr_simulations.generator_run import finish_generator
from fedcmr_simulations.private_sites import open_site, read_account, roster_of
from fedcmr_simulations.progress import Progress
from fedcmr_simulations.provenance import environment
from fedcmr_simulations.report import write_report
from fedcmr_simulations.site_work import (
    PhantomSite,
    SiteTask,
    evaluate_site,
    follow_rounds,
    simulate_site,
    train_alone,
    without_privacy,
)
from fedcmr_simulations.sites import choose_sites, data_origin
from fedcmr_simulations.starting import starting_state, trained_counts
from fedcmr_simulations.workers import each_in_pool

Status = Literal["running", "finished", "interrupted", "failed"]
Result = TypeVar("Result")

_EVALUATED: Final = ("cardiomm", "cpgg")


@dataclass(frozen=True)
class SimulationRequest:
    """What to simulate: ``data`` is a sites folder, or None for phantom patients.

    ``private`` false trains without privacy, whatever the configuration says.
    """

    config: SimulationConfig
    sites: int
    out: Path
    data: Path | None = None
    workers: int = 2
    private: bool = True
    drops: tuple[Drop, ...] = ()

    @property
    def job(self) -> JobSpec:
        """The job to run.

        Raises:
            ConfigurationError: the configuration declares no privacy, yet the run is to be private,
                or no simulated run can evaluate such a model.
        """
        job = self.config.job
        if job.model.name not in _EVALUATED:
            raise ConfigurationError(
                f"job.model.name {job.model.name}: simulated runs evaluate "
                f"{' and '.join(_EVALUATED)} alone; train it between machines"
            )
        if not self.private:
            if job.model.name != "cardiomm":
                raise ConfigurationError(
                    f"--no-privacy: {job.model.name} is trained privately only: leave it out"
                )
            return without_privacy(job, "")
        if job.privacy is None:
            raise ConfigurationError(
                f"job {job.name} declares no privacy: give job.privacy, or simulate without with "
                "--no-privacy"
            )
        return job


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
    job = request.job
    # Wrong data is refused before anything is written.
    stores = _given_sites(request)
    _check_secure(request, [store.name for store in stores] or _phantom_names(request))
    folder = RunFolder.create(request.out, job, starting_state(request.config.start, job))
    summary = Summary(folder.root / "summary.json")
    started = time.monotonic()
    with _always_readable(summary, folder, started):
        summary.update(**_opening(request))
        stores = stores or _phantom_sites(request, progress)
        (folder.root / "environment.json").write_text(
            json.dumps(environment(job.seed, data_origin(stores)), indent=2) + "\n"
        )
        summary.update(data_origin=data_origin(stores))
        places = _open_sites(request, folder, stores)
        _federate(request, folder, places, progress)
        summary.update(**_federation_figures(folder))
        summary.update(**_account(request, folder, places))
        if job.model.name == "cpgg":
            for found in finish_generator(folder, request.config.start, progress):
                summary.update(**found)
        else:
            _compare(request, folder, stores, summary, progress)
    return summary.values


def _check_secure(request: SimulationRequest, names: Sequence[str]) -> None:
    job = request.job
    if job.aggregation == "plain_with_local_dp":
        if request.drops:
            raise ConfigurationError(
                "--drop kills a site in a step of secure aggregation, which this run does not use: "
                "leave it out, or give the job aggregation secure_sum"
            )
        return
    if len(names) < job.minimum_sites:
        raise ConfigurationError(
            f"job {job.name} needs {job.minimum_sites} sites for {job.aggregation}, and there are "
            f"{len(names)}: raise --sites, or write aggregation plain_with_local_dp and "
            "minimum_sites 1 in the configuration"
        )
    for drop in request.drops:
        if drop.site not in names or drop.round > job.rounds:
            raise ConfigurationError(
                f"--drop {drop.site}:{drop.round}: the sites are {', '.join(names)}, the rounds 1 "
                f"to {job.rounds}"
            )


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
    job, model = request.job, request.job.model
    headline = request.config.evaluation[0]
    sampling = {"nominal_af": headline.acceleration, "pattern": headline.pattern}
    return {
        "status": "running",
        "name": job.name,
        **({} if model.name == "cpgg" else sampling),
        "model": {**model.model_dump(), **trained_counts(job)},
        "start": request.config.start,
        "private": request.private,
        "sites": [],
    }


def _given_sites(request: SimulationRequest) -> list[Path]:
    if request.data is None:
        return []
    return choose_sites(request.data, request.sites, request.job.cohort)


def _phantom_names(request: SimulationRequest) -> list[str]:
    return [nth_centre(number).name for number in range(request.sites)]


def _phantom_sites(request: SimulationRequest, progress: Progress) -> list[Path]:
    folder = request.out / "data"
    seed = request.job.seed
    sites = [PhantomSite(folder, n, seed, request.config.phantom) for n in range(request.sites)]
    with progress.stage("simulating patients", request.sites) as advance:
        for site, _ in each_in_pool(simulate_site, sites, request.workers):
            advance(f"{nth_centre(site.number).name}: {site.spec.patients} patients")
    return choose_sites(folder, request.sites, request.job.cohort)


def _open_sites(request: SimulationRequest, folder: RunFolder, stores: list[Path]) -> list[Path]:
    """Return who answers for each store: a policy file, or the store where nothing is private."""
    if not request.private:
        return stores
    homes = folder.root / "sites"
    roster = folder.root / "roster.yaml"
    places = [
        open_site(homes / store.name, store, request.job, request.config.budget, roster)
        for store in stores
    ]
    if request.job.aggregation != "plain_with_local_dp":
        roster.write_text(roster_text(roster_of(places)), encoding="utf-8")
    return places


def _account(request: SimulationRequest, folder: RunFolder, places: list[Path]) -> dict[str, Any]:
    """Read every site's ledger; return what the summary says about privacy."""
    privacy = request.job.privacy
    if privacy is None:
        return {}
    sites = {}
    for place in places:
        account = read_account(place, request.job)
        for event in account.rounds:
            folder.record("site_privacy", **event)
        sites[account.site] = account.totals
    return {
        "privacy": {
            **privacy.model_dump(),
            "steps": request.job.rounds * request.job.training.local_steps,
            "budget": request.config.budget.model_dump(),
            "sites": sites,
        }
    }


def _federate(
    request: SimulationRequest, folder: RunFolder, places: list[Path], progress: Progress
) -> None:
    rounds = request.job.rounds
    with (
        progress.stage("federated rounds", rounds) as advance,
        flower_process(folder.root, places, request.workers, request.drops) as process,
    ):
        done = 0
        while process.poll() is None:
            time.sleep(0.2)
            events = folder.events()
            rounds_done = [event for event in events if event["event"] == "round"]
            for event in rounds_done[done:]:
                advance(_round_text(event, events))
            done = len(rounds_done)
    failures = [event["message"] for event in folder.events() if event["event"] == "failed"]
    if failures:
        raise FederationError(failures[-1])
    latest = folder.latest()
    if process.returncode != 0 or latest is None or latest.round < rounds:
        raise FederationError(
            f"Flower's engine ended with code {process.returncode} before the last round: "
            f"see {folder.root / 'flower.log'}"
        )


def _round_text(event: dict[str, Any], events: list[dict[str, Any]]) -> str:
    loss = event["train_loss"]
    shown = f"update norm {event['update_norm']:.3g}" if loss is None else f"loss {loss:.4f}"
    lost = [
        f"attempt {attempt['attempt']} {attempt['outcome']}, lost "
        + ", ".join(f"{loss['site']} in step {loss['step']}" for loss in attempt["losses"])
        for attempt in events
        if attempt["event"] == "attempt"
        and (attempt["phase"], attempt["round"]) == ("train", event["round"])
        and attempt["losses"]
    ]
    return "; ".join([f"round {event['round']}: {shown}", *lost])


def _compare(
    request: SimulationRequest,
    folder: RunFolder,
    stores: list[Path],
    summary: Summary,
    progress: Progress,
) -> None:
    """Stages 3 and 4: what the federation gained at each site."""
    samplings = tuple(case.sampling() for case in request.config.evaluation)
    pretrained = request.config.start is not None
    tasks = [SiteTask(folder.root, store, samplings, pretrained) for store in stores]
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
