"""What the coordinator's people do with jobs: submit, pause, resume, cancel, and look at them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import torch
from pydantic import ValidationError

from fedcmr_server.checkpoint_files import Checkpoint, CheckpointFiles
from fedcmr_server.folder_lock import locked
from fedcmr_server.home import CoordinatorHome
from fedcmr_server.job_states import JobState, after
from fedcmr_server.store import Events, Jobs, Releases, Rosters, Rounds, Store
from fedcmr_server.store.jobs import JobStart, standing_of
from fedcmr_server.store.tables import EventRow, JobRow
from fedcmr_shared.audit.claims import delta_text, epsilon_text
from fedcmr_shared.errors import ConfigurationError, FederationError
from fedcmr_shared.identity.roster import Roster
from fedcmr_shared.models.bundle import Bundle, state_sha256
from fedcmr_shared.models.card import PURPOSES, bounded_notes
from fedcmr_shared.models.lora import adopt, has_lora, merge_lora
from fedcmr_shared.models.registry import build_model, model_entry
from fedcmr_shared.models.release import load_model
from fedcmr_shared.privacy.job_claim import claim_of
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.signed_job import LONGEST_DAYS, JobAuthorisation

VALID_DAYS: Final = 90
"""So long sites accept a job, unless its coordinator says otherwise."""

ENDED: Final[tuple[JobState, ...]] = ("finished", "failed", "cancelled")

_RENEW_AHEAD: Final = timedelta(days=7)
_CLOCKS: Final = timedelta(minutes=5)  # a site's clock may be behind ours


def check_job(job: JobSpec, coordinator: str, roster: Roster | None) -> None:
    """Return if the federation's sites could take part in ``job``; each has its own say later.

    Raises:
        ConfigurationError: they could not; the message names the field.
    """
    if job.privacy is None:
        raise ConfigurationError(
            f"job {job.name}: privacy is null, which only simulations allow: fill it in, "
            "`fedcmr coordinator new-job` shows how"
        )
    if job.coordinator != coordinator:
        raise ConfigurationError(
            f"job {job.name}: coordinator is {job.coordinator}, and the sites know this one as "
            f"{coordinator}: write coordinator: {coordinator}"
        )
    claim_of(job)
    problem = model_entry(job.model.name).scoring_problem(job)
    if problem is not None:
        raise ConfigurationError(f"job {job.name}: {problem}")
    if roster is None:
        raise ConfigurationError(
            f"job {job.name}: the federation has no roster yet: enrol at least three sites"
        )
    if job.minimum_sites > len(roster.sites):
        raise ConfigurationError(
            f"job {job.name}: minimum_sites is {job.minimum_sites}, and the roster has "
            f"{len(roster.sites)} sites: enrol more, or write fewer"
        )
    strangers = sorted(set(job.site_sizes) - set(roster.sites))
    if strangers:
        raise ConfigurationError(
            f"job {job.name}: site_sizes names {strangers[0]}, which is not on the roster: "
            f"it has {', '.join(roster.names)}"
        )


def submit(
    home: CoordinatorHome,
    store: Store,
    job: JobSpec,
    *,
    valid_days: int = VALID_DAYS,
    start_from: Path | None = None,
    now: datetime | None = None,
) -> JobRow:
    """Sign ``job`` and queue it for the sites on the newest roster.

    ``start_from`` is a bundle or release whose weights it begins with.

    Raises:
        ConfigurationError: the job does not fit the federation, see `check_job`, or ``valid_days``
            is out of range.
        FederationError: it was submitted before, or would begin with weights that no release gate
            has let pass.
        ModelError: the weights do not fit its model, or cannot be read or written.
    """
    newest = Rosters(store).newest()
    roster = None if newest is None else newest.roster
    check_job(job, home.settings.name, roster)
    authorisation = authorise(home, job, valid_days, now)
    # Under the lock nobody else writes the start of the same job.
    with locked(home.jobs):
        _require_new(job, store)
        start = None
        if start_from is not None:
            bundle = load_model(start_from)
            _require_released(store, bundle.sha256, start_from)
            start = _place_start(home.jobs, job, bundle)
        return Jobs(store).submit(job, authorisation, roster, start=start)


def authorise(
    home: CoordinatorHome, job: JobSpec, valid_days: int, now: datetime | None = None
) -> JobAuthorisation:
    """Sign ``job`` for so many days from now on.

    Raises:
        ConfigurationError: the days are out of range.
    """
    if not 1 <= valid_days < LONGEST_DAYS:
        raise ConfigurationError(
            f"valid days are {valid_days}: sites accept 1 to {LONGEST_DAYS - 1}"
        )
    now = (now or datetime.now(UTC)).replace(microsecond=0)
    period = now - _CLOCKS, now + timedelta(days=valid_days)
    return JobAuthorisation.sign(job, home.federation_sha256, period, home.identity())


def pause(store: Store, job: str) -> JobRow:
    """Have a job stop after its round; TransitionRefused when it does not run or wait."""
    return Jobs(store).change(job, "pause")


def resume(
    home: CoordinatorHome,
    store: Store,
    job: str,
    *,
    valid_days: int = VALID_DAYS,
    now: datetime | None = None,
) -> tuple[JobRow, bool]:
    """Have a job go on; return it and whether it was signed anew, its time being nearly over.

    Raises:
        TransitionRefused: the job is neither paused nor failed, nor about to pause.
        ConfigurationError: ``valid_days`` is out of range.
    """
    jobs = Jobs(store)
    row = jobs.get(job)
    after(standing_of(row), "resume")  # nothing is signed for a job that cannot go on
    renew = _ends_soon(row, now or datetime.now(UTC))
    if renew:
        # Signed before it goes on: its next run may start at once.
        jobs.authorise(job, authorise(home, spec_of(row), valid_days, now))
    return jobs.change(job, "resume"), renew


def cancel(store: Store, job: str, reason: str | None = None) -> JobRow:
    """End a job for ever; TransitionRefused when it is over already."""
    return Jobs(store).change(job, "cancel", reason=reason)


def spec_of(row: JobRow) -> JobSpec:
    """Return the job of a row.

    Raises:
        FederationError: it is not the one that the row was made for.
    """
    try:
        job = JobSpec.model_validate_json(row.spec)
    except ValidationError as error:
        raise FederationError(f"job {row.name} cannot be read from the database") from error
    if job.sha256 != row.id:
        raise FederationError(f"job {row.name} was changed in the database: restore it from backup")
    return job


def has_old_roster(store: Store, row: JobRow) -> bool:
    """Whether the roster changed since the job was submitted, so that sites may refuse its own."""
    newest = Rosters(store).newest()
    return newest is not None and newest.roster.sha256 != row.roster_sha256


@dataclass(frozen=True)
class Demand:
    """What a job asks of a site's policy: the line that must allow it, and the job's value."""

    policy: str
    value: str


def demands(job: JobSpec) -> list[Demand]:
    """Return what the sites' policies must allow for ``job``, which has privacy.

    Raises:
        ConfigurationError: no epsilon bounds what the job costs.
    """
    claim, privacy = claim_of(job), job.privacy
    assert privacy is not None  # `claim_of` refuses the others
    noises = [privacy.noise_multiplier]
    found = [
        Demand("coordinators", job.coordinator),
        Demand("jobs", job.name),
        Demand("models", f"{job.model.name}/{job.model.size}"),
        Demand("aggregation", job.aggregation),
        Demand("minimum_sites", f"at most {job.minimum_sites}"),
        Demand(
            "max_epsilon_per_job",
            f"at least {epsilon_text(claim.epsilon)} at delta {delta_text(claim.delta)}, "
            "more at another order",
        ),
        Demand("max_delta", f"at least {claim.delta:g}"),
        Demand("max_device_hours", f"at least {job.resources.device_hours:g}"),
        Demand("max_energy_kwh", f"at least {job.resources.energy_kwh:g}"),
    ]
    if job.evaluated_rounds():
        if privacy.evaluation.memorisation:
            found.append(Demand("evaluation.metrics", "with memorisation"))
        elif privacy.evaluation.noise_multiplier is None:
            found.append(Demand("evaluation.allow_unnoised", "true"))
        else:
            noises.append(privacy.evaluation.noise_multiplier)
    if privacy.distributed is not None:
        found.append(Demand("allow_distributed_noise", "true"))
    if job.cohort.attributes():
        found.append(Demand("cohort.attributes", ", ".join(sorted(job.cohort.attributes()))))
    return [*found, Demand("noise_multiplier", f"at most {min(noises):g}")]


def follow(
    store: Store,
    job: str,
    *,
    poll_s: float = 1.0,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[tuple[JobRow, list[EventRow]]]:
    """Yield the job with its new events, all so far first, until it has ended.

    Nothing comes between two changes; the last one yielded has a state in `ENDED`.

    Raises:
        FederationError: the job is unknown, or the database cannot be read.
    """
    last, seen = 0, None
    while True:
        # The row first: whatever happened before its state is among the events.
        row = Jobs(store).get(job)
        events = Events(store).of(job, after=last)
        if events or row.changed_at != seen:
            yield row, events
        last = events[-1].number if events else last
        seen = row.changed_at
        if row.state in ENDED:
            return
        sleep(poll_s)


OUTLOOK: Final[dict[JobState, str]] = {
    "submitted": "it waits for its first run",
    "running": "it runs, or waits for its next run",
    "pausing": "it stops after this round",
    "paused": "it waits until it is resumed",
    "finished": "it is over: `fedcmr models release` releases its model",
    "failed": "once the reason is mended it can be resumed",
    "cancelled": "it is over",
}
"""What comes next for a job, as long as the coordinator runs."""


def _require_new(job: JobSpec, store: Store) -> None:
    if any(row.id == job.sha256 for row in Jobs(store).all()):
        raise FederationError(
            f"job {job.name} ({job.sha256[:12]}) was submitted before: change its name or seed to "
            "run it again"
        )


def _require_released(store: Store, model_sha256: str, path: Path) -> None:
    """Refuse what a job with release gates made and did not release.

    A gate searches for the patients of its own job alone. Passed on to another job, a model would
    leave that copies those of the first.
    """
    released = {row.job for row in Releases(store).all()}
    for made in Rounds(store).that_made(model_sha256):
        row = Jobs(store).get(made.job)
        if PURPOSES[spec_of(row).model.name].gates and row.id not in released:
            raise FederationError(
                f"{path} was made in round {made.number} of job {row.name} ({row.id[:12]}), which "
                "no release gate has let pass: release that job's model and start from it, or "
                "start from what the job started from"
            )


def _place_start(jobs: Path, job: JobSpec, bundle: Bundle) -> JobStart:
    """Write the files of round 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        model = build_model(job.model)
    plain = merge_lora(bundle.model) if has_lora(bundle.model) else bundle.model
    adopt(model, plain.state_dict())
    checkpoint = Checkpoint(round=0, state=model.state_dict(), optimiser={})
    folder = jobs / job.sha256
    folder.mkdir(mode=0o700, exist_ok=True)
    CheckpointFiles(folder).save(checkpoint, job.model)
    return JobStart(
        state_sha256(checkpoint.state), state_sha256({}), bounded_notes(dict(bundle.extra))
    )


def _ends_soon(row: JobRow, now: datetime) -> bool:
    if row.authorisation is None:
        return True
    signed = JobAuthorisation.model_validate_json(row.authorisation)
    return signed.not_after < now + _RENEW_AHEAD
