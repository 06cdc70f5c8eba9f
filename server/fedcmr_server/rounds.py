"""The rounds of a job: send the model, average the updates, commit, evaluate."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from fedcmr_server.links import Action, SiteLink
from fedcmr_server.optimisers import ServerOptimiser, weighted_mean
from fedcmr_server.run_folder import Checkpoint, RunFolder
from fedcmr_shared.errors import FederationError
from fedcmr_shared.federation.messages import (
    Refusal,
    Scores,
    Task,
    Update,
    content_bytes,
    unpack_answer,
)
from fedcmr_shared.models.bundle import state_sha256
from fedcmr_shared.models.registry import build_model
from fedcmr_shared.privacy.parts import trainable_names
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.refusals import REFUSAL_CODES

_log = logging.getLogger("fedcmr.server")

CONNECT_TIMEOUT_S = 300.0

Answer = TypeVar("Answer", Update, Scores)


@dataclass(frozen=True)
class _Answers(Generic[Answer]):
    by_site: Mapping[str, Answer]
    bytes_up: int
    bytes_down: int


def run_job(link: SiteLink, folder: RunFolder) -> Checkpoint:
    """Run all rounds that are not committed yet and return the last checkpoint.

    Raises:
        FederationError: too few sites are connected or answered; what was committed stays.
    """
    job = folder.job
    checkpoint = folder.latest() or _start(folder, job)
    trainable = trainable_names(job.model, build_model(job.model), job.training.part)
    optimiser = ServerOptimiser(
        job.server_optimiser, {name: checkpoint.state[name] for name in trainable}
    )
    optimiser.restore(checkpoint.optimiser)
    for number in range(checkpoint.round + 1, job.rounds + 1):
        checkpoint = _run_round(link, folder, Task(job, number, checkpoint.state), optimiser)
        if number in job.evaluated_rounds():
            _evaluate(link, folder, Task(job, number, checkpoint.state))
    return checkpoint


def _start(folder: RunFolder, job: JobSpec) -> Checkpoint:
    start = Checkpoint(round=0, state=initial_state(job), optimiser={})
    folder.commit(start)
    return start


def _run_round(
    link: SiteLink, folder: RunFolder, task: Task, optimiser: ServerOptimiser
) -> Checkpoint:
    started = time.monotonic()
    answers = _ask(link, "train", task, Update)
    weights = {site: task.job.weight(site) for site in answers.by_site}
    mean = weighted_mean({site: u.delta for site, u in answers.by_site.items()}, weights)
    optimiser.apply(mean)
    state = {**task.state, **{name: p.clone() for name, p in optimiser.parameters.items()}}
    checkpoint = Checkpoint(task.round, state, optimiser.state())
    folder.commit(checkpoint)
    losses = {s: update.loss for s, update in answers.by_site.items() if update.loss is not None}
    folder.record(
        "round",
        round=task.round,
        sites=len(answers.by_site),
        seconds=time.monotonic() - started,
        train_loss=_weighted(losses, weights) if losses else None,
        update_norm=math.sqrt(sum(float((delta**2).sum()) for delta in mean.values())),
        bytes_up=answers.bytes_up,
        bytes_down=answers.bytes_down,
        model_sha256=state_sha256(state),
    )
    return checkpoint


def _evaluate(link: SiteLink, folder: RunFolder, task: Task) -> None:
    started = time.monotonic()
    answers = _ask(link, "evaluate", task, Scores)
    weights = {site: task.job.weight(site) for site in answers.by_site}
    names = set.intersection(*(set(scores.values) for scores in answers.by_site.values()))
    means = {
        name: _weighted({site: s.values[name] for site, s in answers.by_site.items()}, weights)
        for name in sorted(names)
    }
    folder.record(
        "evaluation",
        round=task.round,
        sites=len(weights),
        seconds=time.monotonic() - started,
        bytes_up=answers.bytes_up,
        bytes_down=answers.bytes_down,
        **means,
    )


def _weighted(values: Mapping[str, float], weights: Mapping[str, float]) -> float:
    total = sum(weights[site] for site in sorted(values))
    return sum(values[site] * weights[site] for site in sorted(values)) / total


def _ask(link: SiteLink, action: Action, task: Task, kind: type[Answer]) -> _Answers[Answer]:
    """Send ``task`` to every connected site; keep the answers that belong to it."""
    sites = link.connected(task.job.minimum_sites, CONNECT_TIMEOUT_S)
    content = task.pack()
    replies = link.exchange(action, content, sites, task.job.round_timeout_s)
    base = state_sha256(task.state)
    by_site: dict[str, Answer] = {}
    refusals: list[str] = []
    bytes_up = 0
    for node in sorted(replies):
        answer = unpack_answer(replies[node])
        if isinstance(answer, Refusal):
            refusals.append(f"{answer.site} ({answer.code}: {REFUSAL_CODES[answer.code]})")
            _log.warning("round %d refused by %s", task.round, refusals[-1])
            continue
        if not isinstance(answer, kind):
            raise FederationError(f"site {answer.site} sent another answer than `{action}` asks")
        if (answer.round, answer.model_sha256) != (task.round, base):
            raise FederationError(f"site {answer.site} answered for another round or model")
        if answer.site in by_site:
            raise FederationError(f"two nodes answered as site {answer.site}")
        by_site[answer.site] = answer
        bytes_up += content_bytes(replies[node])
    if len(by_site) < max(task.job.minimum_sites, 1):
        raise FederationError(
            f"round {task.round}: {len(by_site)} of at least {task.job.minimum_sites} sites "
            f"answered `{action}`; refused by {', '.join(refusals) or 'none'}; see the sites' logs"
        )
    return _Answers(by_site, bytes_up, content_bytes(content) * len(sites))


def initial_state(job: JobSpec) -> dict[str, Tensor]:
    """Model state before the first round; the same on every machine with the same torch."""
    torch.manual_seed(job.seed)
    state: dict[str, Tensor] = build_model(job.model).state_dict()
    return state
