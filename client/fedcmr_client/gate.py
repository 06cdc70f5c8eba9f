"""Holds a job against the site's policy before any data is opened.

The gate takes the job, the policy and the clock; there is no other way in, and so nothing that a
coordinator sends can turn a rule off. Each rule reads a few fields of the job and none of the
others. Rules that depend on data or on other jobs (the budget, the cohort) are the ledger's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from fnmatch import fnmatchcase
from typing import Final, TypeAlias

from fedcmr_client.policy import order_of
from fedcmr_shared.errors import JobRefused
from fedcmr_shared.privacy import accounting
from fedcmr_shared.privacy.budget import phases_of
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.ledger import Phase, Release
from fedcmr_shared.schemas.policy import SitePolicy
from fedcmr_shared.schemas.refusals import RefusalCode

_Check: TypeAlias = Callable[[JobSpec, SitePolicy, datetime], tuple[bool, str]]

_NO_PRIVACY: Final = "the job declares no privacy"


@dataclass(frozen=True)
class Finding:
    """Whether a job keeps one public rule; ``text`` gives the job's value and the site's."""

    rule: RefusalCode
    passed: bool
    text: str


def examine(job: JobSpec, policy: SitePolicy, now: datetime) -> list[Finding]:
    """Return one finding for each public rule, always all of them and in the same order.

    ``now`` without a time zone is the site's local time.
    """
    return [Finding(rule, *check(job, policy, now)) for rule, check in _RULES.items()]


def require(findings: Sequence[Finding]) -> None:
    """Let the job pass when it keeps all rules.

    Raises:
        JobRefused: with the first rule that it breaks.
    """
    for finding in findings:
        if not finding.passed:
            raise JobRefused(finding.rule, finding.rule, f"{finding.rule}: {finding.text}")


def phase_rdp(job: JobSpec, order: int) -> dict[Phase, float]:
    """Return what the phases of ``job`` cost one patient at most: all rounds and spare ones.

    Phases without noise are left out, since no number bounds their cost: the rule
    *evaluation-noise* decides about them.
    """
    if job.privacy is None:
        return {}
    return {
        phase: _cost(release, starts, order)
        for phase, (release, starts) in phases_of(job).items()
        if release.noise_multiplier is not None
    }


def _cost(release: Release, starts: int, order: int) -> float:
    try:
        return starts * accounting.rdp(release, order)
    except OverflowError:  # more steps than a float can count
        return math.inf


def _privacy_missing(job: JobSpec, policy: SitePolicy, now: datetime) -> tuple[bool, str]:
    if job.privacy is None:
        return False, _NO_PRIVACY
    return True, "patient-level differential privacy"


def _coordinator(job: JobSpec, policy: SitePolicy, now: datetime) -> tuple[bool, str]:
    allowed = policy.coordinators
    return job.coordinator in allowed, f"{job.coordinator}; allowed: {_listing(allowed)}"


def _job_name(job: JobSpec, policy: SitePolicy, now: datetime) -> tuple[bool, str]:
    passed = any(fnmatchcase(job.name, pattern) for pattern in policy.jobs)
    return passed, f"{job.name}; allowed: {_listing(policy.jobs)}"


def _model(job: JobSpec, policy: SitePolicy, now: datetime) -> tuple[bool, str]:
    name = f"{job.model.name}/{job.model.size}"
    passed = name in policy.models or job.model.name in policy.models
    return passed, f"{name}; allowed: {_listing(policy.models)}"


def _epsilon(job: JobSpec, policy: SitePolicy, now: datetime) -> tuple[bool, str]:
    if job.privacy is None:
        return False, _NO_PRIVACY
    order = order_of(policy)
    # A patient is trained on or evaluated, never both: the parts are divided by patient.
    worst = max(phase_rdp(job, order).values(), default=0.0)
    # At the site's own delta, so that a job cannot buy epsilon with a larger one.
    epsilon = accounting.epsilon_from_rdp(worst, order, policy.max_delta)
    limit = policy.max_epsilon_per_job
    return epsilon <= limit, f"epsilon {epsilon:.4g} at order {order}; at most {limit:g}"


def _delta(job: JobSpec, policy: SitePolicy, now: datetime) -> tuple[bool, str]:
    if job.privacy is None:
        return False, _NO_PRIVACY
    delta, limit = job.privacy.delta, policy.max_delta
    return delta <= limit, f"{delta:g}; at most {limit:g}"


def _noise(job: JobSpec, policy: SitePolicy, now: datetime) -> tuple[bool, str]:
    if job.privacy is None:
        return False, _NO_PRIVACY
    noise, least = [job.privacy.noise_multiplier], policy.noise_multiplier
    if job.evaluated_rounds() and job.privacy.evaluation.noise_multiplier is not None:
        noise.append(job.privacy.evaluation.noise_multiplier)
    values = " and ".join(f"{value:g}" for value in noise)
    return all(value >= least for value in noise), f"{values}; at least {least:g}"


def _minimum_sites(job: JobSpec, policy: SitePolicy, now: datetime) -> tuple[bool, str]:
    sites, least = job.minimum_sites, policy.minimum_sites
    return sites >= least, f"{sites}; at least {least}"


def _aggregation(job: JobSpec, policy: SitePolicy, now: datetime) -> tuple[bool, str]:
    allowed = policy.aggregation
    return job.aggregation in allowed, f"{job.aggregation}; allowed: {_listing(allowed)}"


def _cohort_query(job: JobSpec, policy: SitePolicy, now: datetime) -> tuple[bool, str]:
    query, offered = job.cohort, policy.cohort
    foreign = sorted(query.attributes() - set(offered.attributes))
    if foreign:
        return False, f"asks about {_listing(foreign)}; allowed: {_listing(offered.attributes)}"
    if query.modalities is not None and offered.modalities is not None:
        other = sorted(set(query.modalities) - set(offered.modalities))
        if other:
            return False, f"asks for {_listing(other)}; allowed: {_listing(offered.modalities)}"
    if _before(query.acquired_from, offered.acquired_from):
        return False, f"from {query.acquired_from}; at the earliest {offered.acquired_from}"
    if _before(offered.acquired_until, query.acquired_until):
        return False, f"until {query.acquired_until}; at the latest {offered.acquired_until}"
    return True, f"restricts {_listing(sorted(query.attributes()))}"


def _evaluation_noise(job: JobSpec, policy: SitePolicy, now: datetime) -> tuple[bool, str]:
    if job.privacy is None:
        return False, _NO_PRIVACY
    if not job.evaluated_rounds():
        return True, "no scores leave"
    noise = job.privacy.evaluation.noise_multiplier
    if noise is not None:
        return True, f"scores leave with noise {noise:g}"
    what = "one bit leaves" if job.privacy.evaluation.memorisation else "scores leave"
    if job.aggregation == "plain_with_local_dp":
        # The figures would be this site's, not the federation's.
        return False, f"{what} without noise, which needs secure aggregation"
    if job.privacy.evaluation.memorisation:
        listed = "memorisation" in policy.evaluation.metrics
        text = "evaluation.metrics lists it" if listed else "evaluation.metrics does not list it"
        return listed, f"one bit leaves: whether the memorisation gate passed; {text}"
    allowed = "allows" if policy.evaluation.allow_unnoised else "does not allow"
    return policy.evaluation.allow_unnoised, f"scores leave without noise; the site {allowed} it"


def _distributed_noise(job: JobSpec, policy: SitePolicy, now: datetime) -> tuple[bool, str]:
    if job.privacy is None:
        return False, _NO_PRIVACY
    distributed = job.privacy.distributed
    if distributed is None:
        return True, "the site adds the whole noise itself"
    allowed = "allows" if policy.allow_distributed_noise else "does not allow"
    return policy.allow_distributed_noise, (
        f"the site adds a share of the noise and trusts all but {distributed.unseen_sites} of the "
        f"others; the site {allowed} it"
    )


def _quiet_hours(job: JobSpec, policy: SitePolicy, now: datetime) -> tuple[bool, str]:
    local = now if now.tzinfo is None else now.astimezone()
    text = f"{local:%H:%M}; quiet: {_listing(policy.quiet_hours)}"
    return not policy.is_quiet(local.time()), text


def _device_hours(job: JobSpec, policy: SitePolicy, now: datetime) -> tuple[bool, str]:
    hours, limit = job.resources.device_hours, policy.max_device_hours
    return hours <= limit, f"{hours:g} h; at most {limit:g} h"


def _energy(job: JobSpec, policy: SitePolicy, now: datetime) -> tuple[bool, str]:
    energy, limit = job.resources.energy_kwh, policy.max_energy_kwh
    return energy <= limit, f"{energy:g} kWh; at most {limit:g} kWh"


def _before(day: date | None, other: date | None) -> bool:
    return day is not None and other is not None and day < other


def _listing(values: Sequence[str]) -> str:
    return ", ".join(values) if values else "none"


_RULES: Final[dict[RefusalCode, _Check]] = {
    "privacy-missing": _privacy_missing,
    "coordinator": _coordinator,
    "job-name": _job_name,
    "model": _model,
    "epsilon-per-job": _epsilon,
    "delta": _delta,
    "noise-multiplier": _noise,
    "minimum-sites": _minimum_sites,
    "aggregation": _aggregation,
    "cohort-query": _cohort_query,
    "evaluation-noise": _evaluation_noise,
    "distributed-noise": _distributed_noise,
    "quiet-hours": _quiet_hours,
    "device-hours": _device_hours,
    "energy": _energy,
}
