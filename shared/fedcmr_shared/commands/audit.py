"""`fedcmr audit`: compute what a mechanism costs, check a site's evidence, write its report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from fedcmr_shared.cli import EntryPointGroup, json_option, print_json, print_table

if TYPE_CHECKING:
    from fedcmr_shared.audit.account import Account
    from fedcmr_shared.audit.verify import Findings
    from fedcmr_shared.schemas.ledger import Release


_FIXED = "holds when all steps were fixed in advance"
_MEANINGS: Final = {
    "pld": f"upper bound by privacy loss distributions; {_FIXED}",
    "rdp": "upper bound at one Rényi order, as a site's filter counts: valid although later steps "
    "depend on earlier results, when the order was fixed before the first one",
    "prv": f"cross-check by a second implementation; {_FIXED}",
}


@click.group(cls=EntryPointGroup, entry_point_group="fedcmr.commands.audit")
def audit() -> None:
    """Check privacy claims without believing the site or the coordinator."""


class FiniteRange(click.FloatRange):
    """A range that refuses NaN and infinity, which the comparisons of its base let through."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return ``value`` as a number inside the range."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


@audit.command()
@click.option(
    "--q",
    "rates",
    multiple=True,
    required=True,
    type=FiniteRange(0, 1, min_open=True),
    help="Chance that a step draws a patient; repeatable with --sigma and --steps.",
)
@click.option(
    "--sigma",
    "multipliers",
    multiple=True,
    required=True,
    type=FiniteRange(0.01, 1e6),
    help="Noise multiplier: standard deviation of the noise over the clipping norm.",
)
@click.option(
    "--steps",
    multiple=True,
    required=True,
    type=click.IntRange(1, 10**9),
    help="Noisy steps: rounds times local steps.",
)
@click.option(
    "--delta",
    required=True,
    type=FiniteRange(1e-12, 1, max_open=True),
    help="Chance that the bound does not hold.",
)
@click.option(
    "--order",
    type=click.IntRange(2, 4096),
    help="Integer Rényi order of the filter; the best one for these steps when not given.",
)
@json_option
def epsilon(
    rates: tuple[float, ...],
    multipliers: tuple[float, ...],
    steps: tuple[int, ...],
    delta: float,
    order: int | None,
    as_json: bool,
) -> None:
    """Print epsilon of Poisson-subsampled Gaussian steps by three accountants.

    Several triples --q --sigma --steps compose: they touched the same patients.
    """
    from fedcmr_shared.privacy.accounting import RELATION, UNIT, accountant_versions, figures
    from fedcmr_shared.schemas.ledger import Release

    if not len(rates) == len(multipliers) == len(steps):
        raise click.UsageError(
            f"{len(rates)} of --q, {len(multipliers)} of --sigma and {len(steps)} of --steps "
            "were given: every release needs one of each"
        )
    releases = Counter(
        Release(sampling_rate=q, noise_multiplier=sigma, steps=count)
        for q, sigma, count in zip(rates, multipliers, steps, strict=True)
    )
    order = _best_order(releases, delta) if order is None else order
    result = figures(releases, order, delta, prv=True)
    values = {"pld": result.pld_epsilon, "rdp": result.filter_epsilon, "prv": result.prv_epsilon}
    versions = accountant_versions()
    if as_json:
        composed = [{**release.model_dump(), "count": n} for release, n in releases.items()]
        rows = {name: {"epsilon": values[name], "meaning": _MEANINGS[name]} for name in values}
        setting = {"unit": UNIT, "relation": RELATION, "delta": delta, "order": order}
        print_json({**setting, **rows, "releases": composed, "versions": versions})
        return
    names = {"pld": "PLD", "rdp": f"RDP, order {order}", "prv": "PRV"}
    table = [
        {"figure": names[name], "epsilon": values[name], "meaning": _MEANINGS[name]}
        for name in values
    ]
    title = f"Epsilon at delta {delta:g}; unit {UNIT}, relation {RELATION}"
    print_table(title, table, ("figure", "epsilon", "meaning"))
    click.echo(", ".join(f"{name} {text}" for name, text in versions.items()))


def _best_order(releases: Mapping[Release, int], delta: float) -> int:
    from fedcmr_shared.privacy.accounting import epsilon_from_rdp, total_rdp
    from fedcmr_shared.privacy.job_claim import ORDERS

    def cost(order: int) -> float:
        return epsilon_from_rdp(total_rdp(releases, order), order, delta)

    return min(ORDERS, key=cost)


bundle_argument: Callable[[Callable[..., Any]], Callable[..., Any]] = click.argument(
    "bundle", type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
trust_option: Callable[[Callable[..., Any]], Callable[..., Any]] = click.option(
    "--trust",
    "keys",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='TOML file with one line per site that you trust: north = "PUBLIC KEY"',
)


@audit.command()
@bundle_argument
@trust_option
@json_option
def verify(bundle: Path, keys: Path, as_json: bool) -> None:
    """Check the evidence BUNDLE of a site against keys that you trust; compute its epsilon.

    Believes neither the bundle nor whoever delivered it. The exit code is 1 when a step fails.
    """
    findings = _findings(bundle, keys)
    if as_json and findings.failed is None:
        print_json(_as_json(findings))
    elif not as_json:
        _print_steps(findings)
    account = findings.require()
    if not as_json:
        _print_account(findings, account)


@audit.command()
@bundle_argument
@trust_option
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("report.html"),
    help="The page to write.",
)
@json_option
def report(bundle: Path, keys: Path, out: Path, as_json: bool) -> None:
    """Check BUNDLE as `audit verify` does and write one HTML page about it.

    The page is written also when a step fails, and says so; the exit code is 1 then.
    """
    from fedcmr_shared.audit.report import write_report

    findings = _findings(bundle, keys)
    path = write_report(findings, out)
    if as_json and findings.failed is None:
        print_json({"report": str(path)})
    elif not as_json:
        click.echo(f"wrote {path}")
    findings.require()


def _findings(bundle: Path, keys: Path) -> Findings:
    from fedcmr_shared.audit.evidence import Evidence
    from fedcmr_shared.audit.verify import read_trusted
    from fedcmr_shared.audit.verify import verify as verify_evidence

    return verify_evidence(Evidence.read(bundle), read_trusted(keys))


def _as_json(findings: Findings) -> dict[str, Any]:
    from fedcmr_shared.audit.claims import ASSUMPTIONS, claims, headline
    from fedcmr_shared.privacy.accounting import RELATION, UNIT, accountant_versions

    account, evidence = findings.require(), findings.evidence
    opened = account.opened
    return {
        "site": evidence.site,
        "scope": evidence.scope,
        "job": evidence.job,
        "complete": findings.complete,
        "cosigners": [asdict(each) for each in findings.cosigners],
        "unit": UNIT,
        "relation": RELATION,
        "budget": {"epsilon": opened.epsilon, "delta": opened.delta, "order": opened.order},
        "remaining_share": account.remaining,
        "steps": [asdict(step) for step in findings.steps],
        "summary": headline(findings),
        "claims": claims(findings),
        "assumptions": ASSUMPTIONS,
        "jobs": [
            {
                "job": job.job,
                "name": job.admitted.name,
                "model": job.admitted.model,
                "part": job.admitted.part,
                "coordinator": job.admitted.coordinator,
                "outcome": job.outcome,
                "phases": [
                    {**asdict(phase), "release": phase.release.model_dump()} for phase in job.phases
                ],
                "without_noise": [phase.phase for phase in job.without_noise],
                "opened_sums": [
                    opened.model_dump(include={"phase", "round", "attempt", "survivors"})
                    for opened in job.opened
                ],
                **asdict(job.figures),
            }
            for job in account.jobs
        ],
        "cohorts": [
            {"cohort": cohort.cohort, "jobs": cohort.jobs, **asdict(cohort.figures)}
            for cohort in account.cohorts
        ],
        "all_cohorts": asdict(account.everything),
        "versions": accountant_versions(),
    }


def _print_steps(findings: Findings) -> None:
    marks = {True: ("pass", "green"), False: ("FAIL", "red"), None: ("–", "yellow")}
    for step in findings.steps:
        mark, colour = marks[step.passed]
        click.echo(f"{step.number:>2} {click.style(mark, fg=colour):4} {step.name:<12} {step.text}")


def _print_account(findings: Findings, account: Account) -> None:
    from fedcmr_shared.audit.claims import ASSUMPTIONS, claims, headline

    rows = [
        {
            "job": f"{job.admitted.name} ({job.job[:12]})",
            "model": f"{job.admitted.model}, {job.admitted.part}",
            "state": job.outcome,
            "charged_rounds": ", ".join(f"{phase.charged} {phase.phase}" for phase in job.phases),
            "delta": job.figures.delta,
            "filter": job.figures.filter_epsilon,
            "PLD": job.figures.pld_epsilon,
            "PRV": job.figures.prv_epsilon,
            "without_noise": ", ".join(phase.phase for phase in job.without_noise) or None,
        }
        for job in account.jobs
    ]
    click.echo()
    print_table("Epsilon of each job, for a patient of all its phases", rows, _JOB_COLUMNS)
    sums = [
        {
            "job": f"{job.admitted.name} ({job.job[:12]})",
            "phase": opened.phase,
            "round": opened.round,
            "attempt": opened.attempt,
            "sites": len(opened.survivors),
            "names": ", ".join(opened.survivors),
        }
        for job in account.jobs
        for opened in job.opened
    ]
    if sums:
        print_table("Secure sums that the site helped to open", sums, tuple(sums[0]))
    click.echo(headline(findings))
    for sentence in claims(findings):
        click.echo(f"- {sentence}")
    click.echo("Assumed, not checked:")
    for sentence in ASSUMPTIONS:
        click.echo(f"- {sentence}")


_JOB_COLUMNS: Final = (
    "job",
    "model",
    "state",
    "charged_rounds",
    "delta",
    "filter",
    "PLD",
    "PRV",
    "without_noise",
)
