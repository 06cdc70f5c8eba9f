"""What a verified bundle shows, in words: claims, assumptions and a checklist for the auditor.

The checklist follows the items that NIST SP 800-226 (Guidelines for Evaluating Differential
Privacy Guarantees, doi 10.6028/NIST.SP.800-226) asks a claim to name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from fedcmr_shared.audit.account import Account, JobAccount
from fedcmr_shared.audit.verify import Findings
from fedcmr_shared.privacy.accounting import RELATION, UNIT, Figures
from fedcmr_shared.schemas.privacy import NoiseShares

FILTER: Final = "filter: valid although later jobs depend on earlier results"
FIXED: Final = "PLD: had all jobs been fixed in advance"

ASSUMPTIONS: Final = tuple(
    " ".join(sentence.split())
    for sentence in """
    The site ran the mechanism as its log says: drawing patients, clipping, noise and release happen
    inside the hospital and leave no proof.

    The noise is Gaussian, discrete Gaussian where sites share it, and drawn freshly from the
    operating system's entropy for every step.

    The arithmetic is that of real numbers; attacks on floating-point noise are made harder by
    adding four draws, not excluded.

    All scans of a person carry one pseudonym, over modalities and visits.

    The site keeps one ledger: a second one under another key shows only in the roster's history,
    and in the cosignatures that it lacks.

    Nothing computed from patients left the site by another way: no hyper-parameters tuned on them,
    no statistics of preprocessing, no timing.
    """.strip().split("\n\n")
)
"""What a bundle cannot show."""

NO_EMPIRICAL: Final = (
    "None yet. An empirical figure is a lower bound: above the claim it proves a fault, below the "
    "claim it proves nothing."
)


@dataclass(frozen=True)
class Item:
    """One item of the checklist."""

    name: str
    text: str


def epsilon_text(value: float | None) -> str:
    """Return an epsilon with two decimals, rounded up as an upper bound must be."""
    if value is None:
        return "not computed"
    if not math.isfinite(value):
        return "infinite"
    return f"{math.ceil(value * 100 - 1e-9) / 100:.2f}"


def delta_text(value: float) -> str:
    """Return a delta such as 1e-5."""
    return f"{value:g}".replace("e-0", "e-")


def headline(findings: Findings) -> str:
    """Return the one sentence that a reader should take away."""
    failed, account = findings.failed, findings.account
    if account is None:
        where = f"step {failed.number}, {failed.name}," if failed else "the verification"
        return f"This bundle proves nothing: {where} failed."
    evidence = findings.evidence
    if evidence.job is None:
        subject = f"All that {evidence.site} logged costs"
    else:
        subject = f"Job {account.jobs[0].admitted.name} at {evidence.site} costs"
    exceptions = ""
    if any(job.without_noise for job in account.jobs):
        exceptions += " Figures released without noise are not covered."
    if any(job.shared_noise for job in account.jobs):
        exceptions += (
            " Sites shared the noise, so this holds only if secure aggregation does and enough of "
            "the sites are honest."
        )
    return f"{subject} {_cost(account)}.{exceptions}"


def _cost(account: Account) -> str:
    everybody, worst = account.everything, account.worst
    at = f"at δ = {delta_text(account.opened.delta)}"
    allowed = f"the site allows ε = {account.opened.epsilon:g} for ever"
    if account.within_budget:
        return f"no patient more than ε = {epsilon_text(everybody.filter_epsilon)} {at}; {allowed}"
    return (
        f"a patient of one cohort at most ε = {epsilon_text(worst.filter_epsilon)} {at}; {allowed}."
        f" For patients of all {len(account.cohorts)} cohorts it shows no more than "
        f"ε ≤ {epsilon_text(everybody.filter_epsilon)}"
    )


def claims(findings: Findings) -> tuple[str, ...]:
    """Return what the bundle shows, one sentence each; empty when the verification failed."""
    return tuple(_claims(findings)) if findings.account is not None else ()


def _claims(findings: Findings) -> Iterator[str]:
    account = findings.require()
    opened = account.opened
    yield (
        f"The unit is the {UNIT}, over all scans, visits and modalities. The relation is "
        f"{RELATION}: one patient's contribution is replaced by zero while all public numbers stay."
    )
    yield (
        f"Certified for a patient of any one cohort: {_figures(account.worst)} ({FILTER}). "
        f"Beside it {_pld(account.worst)} ({FIXED})."
    )
    if len(account.cohorts) > 1:
        yield _everybody(account)
    if findings.evidence.job is not None:
        yield (
            "The figures are those of one job. What other jobs cost the same patients is not in "
            "this bundle; ask for the whole ledger."
        )
    yield (
        f"The site declared ε = {opened.epsilon:g} at δ = {delta_text(opened.delta)} as each "
        "patient's budget, for ever; no single cohort ever exceeded it, open reservations included."
    )
    for job in account.jobs:
        yield from _job_caveats(job)
    yield "ε composes over hospitals: for a patient known to several, their figures add up."


def _figures(figures: Figures) -> str:
    return (
        f"ε ≤ {epsilon_text(figures.filter_epsilon)} at δ = {delta_text(figures.delta)}, "
        f"Rényi order {figures.order}"
    )


def _pld(figures: Figures) -> str:
    if figures.pld_epsilon is None:
        return "no other figure, as noise was distributed"
    return f"ε ≤ {epsilon_text(figures.pld_epsilon)} at δ = {delta_text(figures.delta)}"


def _everybody(account: Account) -> str:
    end = (
        "also within the budget."
        if account.within_budget
        else "above the budget. That patients of several cohorts stayed within it is the site's "
        "own count, which this bundle cannot show."
    )
    return (
        f"Cohorts are keyed hashes, so two of them may share patients. Certified for whoever was "
        f"in all {len(account.cohorts)} of them: {_figures(account.everything)}; beside it "
        f"{_pld(account.everything)}; {end}"
    )


def _job_caveats(job: JobAccount) -> Iterator[str]:
    name = f"Job {job.admitted.name} ({job.job[:12]})"
    if job.outcome == "open":
        yield f"{name} is open: it is charged all that it reserved."
    for phase in job.without_noise:
        deed = "may release" if job.outcome == "open" else "released"
        what = "sums of scores" if phase.phase == "evaluate" else "updates"
        often = "once" if phase.charged == 1 else f"{phase.charged} times"
        yield f"{name} {deed} {what} ({phase.phase}) without noise, {often}: no ε covers them."
    if job.shared_noise is not None:
        yield f"{name}: {_shared_noise(job.shared_noise)}"
    if job.opened:
        fewest = min(len(opened.survivors) for opened in job.opened)
        count = "1 secure sum" if len(job.opened) == 1 else f"{len(job.opened)} secure sums"
        yield (
            f"{name}: the site helped to open {count}, each over at least {fewest} sites, and "
            "never a second one for the same round."
        )


def _shared_noise(shares: NoiseShares) -> str:
    return (
        "each site added only its share of the noise. The ε holds only if secure aggregation "
        f"holds and at most {shares.unseen_sites} of the at least {shares.sites} sites in a sum "
        "work with the coordinator. Whoever sees this site's update alone is not covered, and "
        "figures by PLD and PRV do not exist."
    )


def checklist(findings: Findings) -> tuple[Item, ...]:
    """Return the checklist, filled in as far as the bundle goes; empty when it failed."""
    account = findings.account
    if account is None:
        return ()
    worst, delta = account.worst, delta_text(account.opened.delta)
    shared = any(job.shared_noise for job in account.jobs)
    return (
        Item("Unit of privacy", f"the {UNIT}, over all scans, visits and modalities"),
        Item(
            "Neighbours",
            f"{RELATION}: costs what adding or removing a patient costs (unbounded), less than "
            "replacing one (bounded)",
        ),
        Item(
            "Epsilon",
            f"{epsilon_text(worst.filter_epsilon)} certified for patients of one cohort "
            f"({epsilon_text(worst.pld_epsilon)} by PLD), "
            f"{epsilon_text(account.everything.filter_epsilon)} for everybody",
        ),
        Item(
            "Delta and variant", f"{delta}, approximate differential privacy; by Rényi divergence"
        ),
        Item(
            "Composition",
            f"all logged releases of {_jobs(account)}, by a filter at order "
            f"{account.opened.order} fixed when the ledger was opened; over hospitals ε adds up",
        ),
        Item("Query model", "interactive: a coordinator may choose each job after earlier results"),
        Item(
            "Mechanism",
            "DP-SGD with Poisson sampling of patients, one clipped gradient per patient, Gaussian "
            "noise once per step; evaluation as noisy sums of clipped scores"
            + ("; where sites share the noise, integers and discrete Gaussian noise" * shared),
        ),
        Item(
            "Sensitivity",
            f"one patient moves a sum by at most the clipping norm: {_norms(account)}",
        ),
        Item(
            "Threat model",
            "whoever sees every update and model that leaves the site; each site adds its own "
            "noise, so neither the coordinator nor other sites are trusted"
            + ("; where sites share the noise, the claim says whom it trusts instead" * shared),
        ),
        Item("Empirical lower bound", "none yet" if not findings.evidence.empirical else "below"),
        Item(
            "Not covered",
            "what the assumptions below name (floating point and timing among them); security and "
            "access control of the site's data; how data were collected; utility and bias",
        ),
    )


def _norms(account: Account) -> str:
    norms = sorted({job.admitted.clip_norm for job in account.jobs})
    return ", ".join(f"C = {norm:g}" for norm in norms) or "no job yet"


def _jobs(account: Account) -> str:
    return "1 job" if len(account.jobs) == 1 else f"{len(account.jobs)} jobs"
