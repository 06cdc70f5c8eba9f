"""From a job's rows and events to what its page shows: no database, no HTML."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Final

from pydantic import ValidationError

from fedcmr_server.dashboard.charts import Chart, Points, chart
from fedcmr_server.dashboard.history import (
    CUT_OFF,
    UNDER_WAY,
    Attempt,
    Evaluation,
    History,
    Training,
)
from fedcmr_server.job_states import JobState
from fedcmr_server.losses import Loss
from fedcmr_server.store.tables import EventRow, JobRow, ReleaseRow, RoundRow
from fedcmr_server.words import (
    METRICS,
    NOTHING,
    PHASES,
    ago,
    bytes_text,
    plural,
    seconds_text,
    utc,
)
from fedcmr_shared.audit.claims import delta_text, epsilon_text
from fedcmr_shared.errors import ConfigurationError, JobRefused
from fedcmr_shared.privacy.job_claim import JobClaim, PhaseClaim, claim_of
from fedcmr_shared.schemas.job import Aggregation, JobSpec
from fedcmr_shared.schemas.ledger import Phase
from fedcmr_shared.schemas.signed_job import JobAuthorisation

MOST_ROWS: Final = 100
"""Rows of a table; a longer one shows the newest."""

LIVE: Final[tuple[JobState, ...]] = ("submitted", "running", "pausing")
"""States that may change without anybody doing anything."""

TONES: Final[Mapping[JobState, str]] = {
    "submitted": "quiet",
    "running": "live",
    "pausing": "live",
    "paused": "wait",
    "finished": "good",
    "failed": "bad",
    "cancelled": "quiet",
}
"""How a state is drawn; its word always stands beside."""

_AGGREGATION: Final[Mapping[Aggregation, str]] = {
    "secure_sum": "secure sum of all sites",
    "secure_groups": "secure sums of groups of sites",
    "plain_with_local_dp": "each site's noised update, in the open",
}
_ROUND_TONES: Final = {"committed": "good", "closed": "warn", "started": "live"}


@dataclass(frozen=True)
class JobCard:
    """A job in a few words. ``score`` is the newest mean, ``doing`` what happens at the moment."""

    id: str
    name: str
    state: JobState
    tone: str
    done: int
    rounds: int
    score: str
    drop_outs: str
    submitted_at: datetime
    changed_at: datetime
    doing: str
    reason: str

    @property
    def live(self) -> bool:
        """Whether it may change by itself."""
        return self.state in LIVE


@dataclass(frozen=True)
class Figure:
    """A number with its name, and perhaps a word about it."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class RoundLine:
    """A round in a table."""

    number: int
    state: str
    tone: str
    sites: str
    attempts: str
    lost: str
    seconds: str
    bytes_up: str
    bytes_down: str
    scores: tuple[str, ...]
    model: str
    at: datetime


@dataclass(frozen=True)
class AttemptLine:
    """An attempt at a secure sum in a table."""

    phase: str
    round: int
    number: int
    outcome: str
    tone: str
    step: str
    survivors: str
    losses: tuple[Loss, ...]
    seconds: str
    bytes_up: str
    bytes_down: str
    at: datetime


@dataclass(frozen=True)
class ClaimView:
    """What a job declares about privacy; ``problem`` says why there is no figure."""

    figures: tuple[Figure, ...]
    sentences: tuple[str, ...]
    problem: str = ""


@dataclass(frozen=True)
class JobPage:
    """Everything on a job's page."""

    card: JobCard
    totals: tuple[Figure, ...]
    facts: tuple[Figure, ...]
    claim: ClaimView
    score_note: str
    score_charts: tuple[Chart, ...]
    cost_charts: tuple[Chart, ...]
    scores: tuple[str, ...]
    rounds: tuple[RoundLine, ...]
    rounds_left_out: int
    attempts: tuple[AttemptLine, ...]
    attempts_left_out: int
    outcomes: tuple[Figure, ...]
    losses: tuple[tuple[str, Loss, int], ...]
    releases: tuple[ReleaseRow, ...]
    secure: bool


@dataclass(frozen=True)
class JobRows:
    """What the store has of one job."""

    job: JobRow
    rounds: Sequence[RoundRow]
    events: Sequence[EventRow]
    releases: Sequence[ReleaseRow] = ()


@lru_cache(maxsize=256)
def spec_of(text: str) -> JobSpec | None:
    """Return a job's specification; None for one that this version cannot read."""
    try:
        return JobSpec.model_validate_json(text)
    except ValidationError:
        return None


def job_card(job: JobRow, rounds: Iterable[RoundRow], history: History, now: datetime) -> JobCard:
    """Return a job in a few words."""
    spec, rounds = spec_of(job.spec), list(rounds)
    total = spec.rounds if spec else 0
    return JobCard(
        id=job.id,
        name=job.name,
        state=job.state,
        tone=TONES[job.state],
        done=sum(row.number > 0 and row.state != "started" for row in rounds),
        rounds=total,
        score=_newest_score(history.evaluations),
        drop_outs=_drop_outs(spec, history),
        submitted_at=job.submitted_at,
        changed_at=job.changed_at,
        doing=_doing(job, rounds, history, now),
        reason=job.reason or "",
    )


def job_page(rows: JobRows, now: datetime) -> JobPage:
    """Return everything that a job's page shows."""
    history, job = History.of(rows.events), rows.job
    spec = spec_of(job.spec)
    metrics = tuple(name for name in METRICS if any(name in e.values for e in history.evaluations))
    lines = _round_lines([row for row in rows.rounds if row.number], history, metrics)
    attempts = [_attempt_line(attempt) for attempt in reversed(history.attempts)]
    return JobPage(
        card=job_card(job, rows.rounds, history, now),
        totals=_totals(spec, history),
        facts=_facts(job, spec),
        claim=_claim_view(job.spec),
        score_note=_score_note(spec),
        score_charts=_score_charts(history.evaluations, metrics),
        cost_charts=_cost_charts(history),
        scores=tuple(METRICS[name].head for name in metrics),
        rounds=tuple(lines[:MOST_ROWS]),
        rounds_left_out=max(0, len(lines) - MOST_ROWS),
        attempts=tuple(attempts[:MOST_ROWS]),
        attempts_left_out=max(0, len(attempts) - MOST_ROWS),
        outcomes=_outcomes(history.attempts),
        losses=tuple(history.loss_counts()),
        releases=tuple(rows.releases),
        secure=spec is None or spec.aggregation != "plain_with_local_dp",
    )


def _newest_score(evaluations: Sequence[Evaluation]) -> str:
    for evaluation in reversed(evaluations):
        for name, metric in METRICS.items():
            value = evaluation.values.get(name, math.nan)
            if math.isfinite(value):
                return f"{metric.name} {metric.text(value)} after round {evaluation.round}"
    return NOTHING


def _doing(job: JobRow, rounds: Sequence[RoundRow], history: History, now: datetime) -> str:
    if job.state == "submitted":
        return "Waits for its first run"
    if job.state not in ("running", "pausing"):
        return ""
    if job.run is None:
        lost = f" after {plural(job.losses, 'lost run')}" if job.losses else ""
        return f"Waits for its next run{lost}"
    newest = history.attempts[-1] if history.attempts else None
    if newest is not None and newest.outcome == UNDER_WAY:
        what = f"Round {newest.round}, {PHASES.get(newest.phase, newest.phase)}"
        asked = ", opening the sum" if newest.unmask_asked else ""
        return f"{what}: attempt {newest.number} began {ago(newest.at, now)}{asked}"
    started = [row for row in rounds if row.state == "started"]
    if started:
        row = started[-1]
        return f"Round {row.number} began {ago(row.started_at, now)}"
    return "A run is at work"


def _drop_outs(spec: JobSpec | None, history: History) -> str:
    """Only attempts at secure sums say whom they lost."""
    open_sums = spec is not None and spec.aggregation == "plain_with_local_dp"
    return NOTHING if open_sums else f"{history.drop_outs:,}"


def _totals(spec: JobSpec | None, history: History) -> tuple[Figure, ...]:
    up, down = history.bytes
    seconds = [each.seconds for each in history.rounds if math.isfinite(each.seconds)]
    mean = seconds_text(math.fsum(seconds) / len(seconds)) if seconds else NOTHING
    return (
        Figure("drop-outs", _drop_outs(spec, history), "a site lost to a phase of a round"),
        Figure("sent by sites", bytes_text(up) if up else NOTHING, "all sites together"),
        Figure("sent to sites", bytes_text(down) if down else NOTHING, "all sites together"),
        Figure("mean round", mean, f"over {plural(len(seconds), 'round')}" if seconds else ""),
        _energy(spec, history),
        *_gate(history),
    )


def _energy(spec: JobSpec | None, history: History) -> Figure:
    used = [e.energy_kwh for e in history.evaluations if math.isfinite(e.energy_kwh)]
    if used:
        return Figure("energy", f"{used[-1]:.1f} kWh", "all sites together, rounded up")
    if spec is None:
        return Figure("energy", NOTHING)
    return Figure(
        "energy", f"≤ {spec.resources.energy_kwh:g} kWh", "at each site, which stops there"
    )


def _gate(history: History) -> Iterable[Figure]:
    found = [each for each in history.evaluations if each.gates_passed is not None]
    if found:
        last = found[-1]
        told = f"{last.gates_passed} of {last.sites}"
        yield Figure("memorisation gates", told, "sites where it passed")


def _facts(job: JobRow, spec: JobSpec | None) -> tuple[Figure, ...]:
    facts = [Figure("submitted", utc(job.submitted_at)), Figure("signed until", _signed_until(job))]
    if spec is not None:
        model, training = spec.model, spec.training
        facts += [
            Figure("model", f"{model.name}, {model.size}, variant {model.variant}"),
            Figure("trained part", training.part),
            Figure(
                "local training",
                f"{plural(training.local_steps, 'step')} a round, {training.optimiser}, "
                f"learning rate {training.learning_rate:g}",
            ),
            Figure(
                "server optimiser",
                f"{spec.server_optimiser.name}, learning rate "
                f"{spec.server_optimiser.learning_rate:g}",
            ),
            Figure("what is opened", _AGGREGATION[spec.aggregation]),
            Figure("combined by", spec.robust),
            Figure("fewest sites", f"{spec.minimum_sites}"),
            Figure("coordinator", spec.coordinator),
        ]
    facts.append(Figure("job", job.id, "code"))
    if job.roster_sha256:
        facts.append(Figure("roster", job.roster_sha256, "code"))
    if job.run:
        facts.append(Figure("carried by run", job.run, "code"))
    return tuple(facts)


def _signed_until(job: JobRow) -> str:
    if job.authorisation is None:
        return "not signed: deployed sites refuse it"
    try:
        return utc(JobAuthorisation.model_validate_json(job.authorisation).not_after)
    except ValidationError:
        return "its signature cannot be read"


@lru_cache(maxsize=256)
def _claim_view(text: str) -> ClaimView:
    """Cached by the job's text: the best order is looked for among a hundred."""
    spec = spec_of(text)
    if spec is None:
        return ClaimView((), (), "The job cannot be read by this version.")
    if spec.privacy is None:
        return ClaimView((), (), "The job declares no privacy. Only simulated sites work for it.")
    try:
        claim = claim_of(spec)
    except (JobRefused, ConfigurationError) as error:
        return ClaimView((), (), f"No epsilon bounds what the job costs a patient: {error}")
    return ClaimView(_claim_figures(claim), tuple(_claim_sentences(spec, claim)))


def _claim_figures(claim: JobClaim) -> tuple[Figure, ...]:
    return (
        Figure(
            "ε for a patient, at most",
            epsilon_text(claim.epsilon),
            f"whole job with spare rounds; Rényi order {claim.order}",
        ),
        Figure("δ", delta_text(claim.delta)),
        *(
            Figure(
                f"ε of {PHASES[phase]}",
                "none" if each.epsilon is None else epsilon_text(each.epsilon),
                _mechanism(phase, each),
            )
            for phase, each in claim.phases.items()
        ),
    )


def _mechanism(phase: Phase, claim: PhaseClaim) -> str:
    release, starts = claim.release, plural(claim.starts, "start")
    if release.noise_multiplier is None:
        return f"{starts} without noise"
    noise = f"σ = {release.noise_multiplier:g}"
    if phase == "evaluate":
        return f"{starts}, {noise}"
    steps = plural(release.steps, "step")
    return f"{starts} of {steps}, q = {release.sampling_rate:g}, {noise}"


def _claim_sentences(spec: JobSpec, claim: JobClaim) -> Iterable[str]:
    privacy = spec.privacy
    assert privacy is not None  # there is a claim
    yield (
        f"The unit is the {claim.unit}, over all scans and visits. In each step a patient takes "
        f"part with probability {privacy.sampling_rate:g}; the gradient of one patient is clipped "
        f"to norm {claim.clip_norm:g} ({claim.clipping}), and Gaussian noise is added."
    )
    yield (
        "The figures follow from the job's published numbers and hold at every site. What a site "
        "has spent stands in its own ledger, which the coordinator does not see. A patient known "
        "to several sites pays at each."
    )
    shared = claim.shared_noise
    if shared is not None:
        yield (
            f"The noise is shared: at least {shared.sites} sites make it together, of which "
            f"{shared.unseen_sites} may work with the coordinator. It protects nobody when secure "
            "aggregation fails."
        )
    for phase in claim.without_noise:
        yield f"Results of {PHASES[phase]} leave without noise: no ε bounds what they reveal."


def _score_note(spec: JobSpec | None) -> str:
    note = "Means over the held-out patients of all sites together"
    privacy = None if spec is None else spec.privacy
    if spec is None or privacy is None:
        return f"{note}."
    if not spec.evaluated_rounds():
        return "The job asks for no scores."
    if privacy.evaluation.memorisation:
        return (
            "No patient is scored: after the last round each site searches samples of the model for "
            "copies of its patients, and how many sites' gates passed leaves as a sum without noise."
        )
    noise = privacy.evaluation.noise_multiplier
    if noise is None:
        return f"{note}, from totals without noise."
    return f"{note}, from totals with noise (σ = {noise:g}): they scatter even for one model."


def _score_charts(evaluations: Sequence[Evaluation], metrics: Sequence[str]) -> tuple[Chart, ...]:
    charts = []
    for name in metrics:
        points = [(each.round, each.values.get(name, math.nan)) for each in evaluations]
        metric = METRICS[name]
        charts.append(chart(name, metric.name, metric.unit, {metric.name: points}))
    return tuple(each for each in charts if each is not None)


def _cost_charts(history: History) -> tuple[Chart, ...]:
    rounds, scored = history.rounds, history.evaluations
    seconds: dict[str, Points] = {"training": [(each.round, each.seconds) for each in rounds]}
    if scored:
        seconds["scoring"] = [(each.round, each.seconds) for each in scored]
    most = max((max(each.bytes_up, each.bytes_down) for each in rounds), default=0)
    unit, size = next((u, s) for u, s in _SIZES if most < 1000 * s or u == "GB")
    traffic = {
        "from sites": [(each.round, each.bytes_up / size) for each in rounds],
        "to sites": [(each.round, each.bytes_down / size) for each in rounds],
    }
    charts = (
        chart("seconds", "Time a round", "s", seconds, from_zero=True),
        chart("traffic", "Training traffic", unit, traffic, from_zero=True),
    )
    return tuple(each for each in charts if each is not None)


_SIZES: Final = (("kB", 1e3), ("MB", 1e6), ("GB", 1e9))


def _round_lines(
    rows: Sequence[RoundRow], history: History, metrics: Sequence[str]
) -> list[RoundLine]:
    """Return a line for each round, the newest first."""
    trained = {each.round: each for each in history.rounds}
    scored = {each.round: each for each in history.evaluations}
    attempts: dict[int, list[Attempt]] = {}
    for attempt in history.attempts:
        attempts.setdefault(attempt.round, []).append(attempt)
    return [
        _round_line(
            row,
            trained.get(row.number),
            scored.get(row.number),
            attempts.get(row.number, []),
            metrics,
        )
        for row in sorted(rows, key=lambda row: row.number, reverse=True)
    ]


def _round_line(
    row: RoundRow,
    trained: Training | None,
    scored: Evaluation | None,
    attempts: Sequence[Attempt],
    metrics: Sequence[str],
) -> RoundLine:
    lost = {(attempt.phase, loss.site) for attempt in attempts for loss in attempt.losses}
    values = {} if scored is None else scored.values
    return RoundLine(
        number=row.number,
        state="under way" if row.state == "started" else row.state,
        tone=_ROUND_TONES[row.state],
        sites=NOTHING if trained is None or not trained.sites else f"{trained.sites}",
        attempts=f"{len(attempts)}" if attempts else NOTHING,
        lost=f"{len(lost)}" if attempts else NOTHING,
        seconds=NOTHING if trained is None else seconds_text(trained.seconds),
        bytes_up=NOTHING if trained is None else bytes_text(trained.bytes_up),
        bytes_down=NOTHING if trained is None else bytes_text(trained.bytes_down),
        scores=tuple(METRICS[name].number(values.get(name, math.nan)) for name in metrics),
        model=(row.model_sha256 or "")[:10] or NOTHING,
        at=row.committed_at or row.started_at,
    )


_OUTCOME_TONES: Final = {"opened": "good", "ended": "warn", "closed": "bad", CUT_OFF: "warn"}


def _attempt_line(attempt: Attempt) -> AttemptLine:
    measured = attempt.outcome not in (UNDER_WAY, CUT_OFF)
    return AttemptLine(
        phase=PHASES.get(attempt.phase, attempt.phase),
        round=attempt.round,
        number=attempt.number,
        outcome=attempt.outcome,
        tone=_OUTCOME_TONES.get(attempt.outcome, "live"),
        step=attempt.step or NOTHING,
        survivors=f"{attempt.survivors} of {attempt.sites}" if attempt.survivors else NOTHING,
        losses=attempt.losses,
        seconds=seconds_text(attempt.seconds),
        bytes_up=bytes_text(attempt.bytes_up) if measured else NOTHING,
        bytes_down=bytes_text(attempt.bytes_down) if measured else NOTHING,
        at=attempt.at,
    )


def _outcomes(attempts: Sequence[Attempt]) -> tuple[Figure, ...]:
    meanings = {
        "opened": "the sum was opened",
        "ended": "too few sites; another attempt could follow",
        "closed": "too few sites after shares were asked for; the round has no update",
        CUT_OFF: "its run ended before it had an outcome; another attempt could follow",
        UNDER_WAY: "no outcome yet",
    }
    counts = {name: sum(each.outcome == name for each in attempts) for name in meanings}
    return tuple(
        Figure(name, f"{count:,}", meanings[name])
        for name, count in counts.items()
        if count or name not in (CUT_OFF, UNDER_WAY)
    )
