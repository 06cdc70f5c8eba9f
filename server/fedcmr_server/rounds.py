"""The rounds of a job: send the model, combine the updates, commit, evaluate."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from fedcmr_server.answers import SiteAnswers, Updates, answers_of
from fedcmr_server.checkpoint_files import Checkpoint
from fedcmr_server.job_run import JobRun
from fedcmr_server.links import SiteLink
from fedcmr_server.optimisers import ServerOptimiser
from fedcmr_server.robust import combine, euclidean_norm, require_enough, screen
from fedcmr_shared.federation.messages import Task
from fedcmr_shared.models.bundle import state_sha256
from fedcmr_shared.models.registry import build_model
from fedcmr_shared.privacy.evaluation import energy_kwh, gates_passed, histograms, mean_scores
from fedcmr_shared.privacy.parts import trainable_names
from fedcmr_shared.schemas.job import JobSpec

_log = logging.getLogger("fedcmr.server")


def run_job(link: SiteLink, run: JobRun) -> Checkpoint:
    """Run all rounds that are not committed yet and return the last checkpoint.

    It is that of an earlier round when somebody asked the run to stop.

    Raises:
        SitesMissing: too few sites are connected or answer; what was committed stays.
        FederationError: an answer is wrong, or the run cannot be read or written.
        ConfigurationError: the roster has too few sites for the job.
        ModelError: what was committed cannot be read, or a checkpoint not be written.
    """
    job = run.job
    answers = answers_of(link, run, job)
    checkpoint = run.latest() or _start(run, job)
    trainable = trainable_names(job.model, build_model(job.model), job.training.part)
    optimiser = ServerOptimiser(
        job.server_optimiser, {name: checkpoint.state[name] for name in trainable}
    )
    optimiser.restore(checkpoint.optimiser)
    if not _is_evaluated(run, checkpoint.round):
        _evaluate(answers, run, _task(run, checkpoint.round, checkpoint))
    for number in range(checkpoint.round + 1, job.rounds + 1):
        if run.stop_requested():
            break
        run.begin(number)
        checkpoint = _run_round(answers, run, _task(run, number, checkpoint), optimiser)
        if number in job.evaluated_rounds():
            _evaluate(answers, run, _task(run, number, checkpoint))
    return checkpoint


def _task(run: JobRun, number: int, checkpoint: Checkpoint) -> Task:
    return Task(run.job, number, checkpoint.state, run.authorisation)


def _start(run: JobRun, job: JobSpec) -> Checkpoint:
    start = Checkpoint(round=0, state=initial_state(job), optimiser={})
    run.begin(0)
    run.commit(start)
    return start


def _is_evaluated(run: JobRun, number: int) -> bool:
    """Whether round ``number`` was evaluated, or is not to be: a run may end before that."""
    return number not in run.job.evaluated_rounds() or any(
        (event["event"], event.get("round")) == ("evaluation", number) for event in run.events()
    )


def _run_round(
    answers: SiteAnswers, run: JobRun, task: Task, optimiser: ServerOptimiser
) -> Checkpoint:
    started = time.monotonic()
    updates = answers.updates(task)
    mean, left_out = _combined(task.job, updates)
    if mean:
        optimiser.apply(mean)
    else:
        _log.warning("round %d: no update, the model stays", task.round)
    state = {**task.state, **{name: p.clone() for name, p in optimiser.parameters.items()}}
    checkpoint = Checkpoint(task.round, state, optimiser.state())
    run.commit(
        checkpoint,
        sites=updates.sites,
        closed=not updates.by_source,
        left_out=len(left_out),
        seconds=time.monotonic() - started,
        train_loss=updates.train_loss,
        update_norm=euclidean_norm(mean),
        bytes_up=updates.bytes_up,
        bytes_down=updates.bytes_down,
        model_sha256=state_sha256(state),
    )
    _log.info("round %d of %d: %d sites", task.round, task.job.rounds, updates.sites)
    return checkpoint


def _combined(job: JobSpec, updates: Updates) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the combined update, empty when there is none, and whose were too large for it."""
    if not updates.by_source:
        return {}, ()
    require_enough(job.robust, len(updates.by_source))
    kept, left_out = screen(updates.by_source, job.max_update_norm)
    for source in left_out:
        _log.warning("the update of %s is larger than max_update_norm: left out", source)
    return (combine(job.robust, kept) if kept else {}), left_out


def _evaluate(answers: SiteAnswers, run: JobRun, task: Task) -> None:
    started = time.monotonic()
    found = answers.totals(task)
    run.record(
        "evaluation",
        round=task.round,
        sites=found.sites,
        closed=not found.totals,
        seconds=time.monotonic() - started,
        bytes_up=found.bytes_up,
        bytes_down=found.bytes_down,
        model_sha256=state_sha256(task.state),
        **_figures(found.totals),
    )


def _figures(totals: Mapping[str, Tensor]) -> dict[str, Any]:
    """Means over all sites' patients and their histograms, or how many sites' gates passed."""
    energy, passed = energy_kwh(totals), gates_passed(totals)
    # Terms are 0 before the last round, and of sites that count no energy: no figure, not none used.
    found: dict[str, Any] = {"energy_kwh": energy} if energy else {}
    if passed is not None:
        return found | {"gates_passed": passed}
    found |= mean_scores(totals)
    counted = histograms(totals)
    if counted:
        found["histograms"] = {metric: asdict(each) for metric, each in counted.items()}
    return found


def initial_state(job: JobSpec) -> dict[str, Tensor]:
    """Model state before the first round; the same on every machine with the same torch."""
    torch.manual_seed(job.seed)
    state: dict[str, Tensor] = build_model(job.model).state_dict()
    return state
