"""`fedcmr site check`: which rules of the policy a job keeps, and what it would cost."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from fedcmr_client.commands.policy_option import policy_option
from fedcmr_shared.cli import json_option, print_json, print_table
from fedcmr_shared.errors import JobRefused

if TYPE_CHECKING:
    from fedcmr_client.ledger import Ledger
    from fedcmr_client.site_home import SiteHome
    from fedcmr_shared.schemas.job import JobSpec

SHOWN: Final = 12  # characters of a job's SHA-256 in tables


@click.command()
@click.argument("job", type=click.Path(dir_okay=False, path_type=Path))
@policy_option
@json_option
def check(job: Path, policy_path: Path, as_json: bool) -> None:
    """Hold the file JOB (YAML or JSON, alone or under `job:`) against the policy and the budget.

    Opens no data and changes nothing. The budget is that of the patient with the most charges.
    The exit code is 1 if a rule fails now.
    """
    from datetime import datetime

    from fedcmr_client.gate import examine
    from fedcmr_client.site_home import SiteHome
    from fedcmr_shared.schemas.job_files import read_job

    spec = read_job(job)
    home = SiteHome.open(policy_path)
    rows: list[dict[str, Any]] = [
        {"rule": finding.rule, "passed": finding.passed, "text": finding.text}
        for finding in examine(spec, home.policy, datetime.now().astimezone())
    ]
    if spec.aggregation != "plain_with_local_dp":
        rows.append(_roster_row(spec, home))
    if spec.privacy is not None and spec.privacy.evaluation.energy_total:
        rows.append(_energy_row(home))
    with home.open_ledger() as ledger:
        budget = _forecast(spec, ledger)
    rows.append({"rule": "budget", "passed": budget["passed"], "text": _budget_text(budget)})
    passed = all(row["passed"] for row in rows)
    if as_json:
        summary = {"name": spec.name, "sha256": spec.sha256, "passed": passed}
        print_json({**summary, "rules": rows, "budget": budget})
    else:
        _print_rules(spec, rows)
    if not passed:
        sys.exit(1)


def _roster_row(job: JobSpec, home: SiteHome) -> dict[str, Any]:
    from fedcmr_client.secure_site import summing_group

    try:
        group = summing_group(home, job)
    except JobRefused as refusal:
        return {"rule": "roster", "passed": False, "text": str(refusal)}
    text = f"summed with {len(group.sites) - 1} other sites; {group.threshold} open a sum"
    return {"rule": "roster", "passed": True, "text": text}


def _energy_row(home: SiteHome) -> dict[str, Any]:
    """Return what leaves of the energy that the job asks about; any answer suits the job."""
    energy = home.policy.energy
    if energy is None:
        text = "this site gives none, 0 leaves: the policy has no energy section"
    elif not energy.report_total:
        text = "this site gives none, 0 leaves: energy.report_total is false"
    else:
        text = "this site's leaves, rounded up, inside a secure sum: energy.report_total is true"
    return {"rule": "energy-total", "passed": True, "text": f"the job asks for it; {text}"}


def _forecast(job: JobSpec, ledger: Ledger) -> dict[str, Any]:
    """Return what ``job`` would reserve for one patient, and what the worst one would then have."""
    from fedcmr_client.gate import phase_rdp
    from fedcmr_shared.privacy.accounting import epsilon_from_rdp

    spending = ledger.spending()
    known = job.sha256 in ledger.budget.jobs

    def epsilon(rdp: float) -> float:
        return epsilon_from_rdp(rdp, spending.order, spending.delta)

    cost = max(phase_rdp(job, spending.order).values(), default=math.inf)
    after = spending.committed_rdp + (0.0 if known else cost)
    left = max(0.0, spending.limit_rdp - spending.committed_rdp)
    return {
        "passed": after <= spending.limit_rdp,
        "admitted_before": known,
        "reserves_epsilon": _finite(epsilon(cost)),
        "committed_epsilon": spending.committed_epsilon,
        "after_epsilon": _finite(epsilon(after)),
        "limit_epsilon": spending.epsilon,
        "left_share": left / spending.limit_rdp,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no infinity


def _budget_text(budget: Mapping[str, Any]) -> str:
    if budget["admitted_before"]:
        return "admitted before: its budget is reserved"
    if budget["after_epsilon"] is None:
        return "the job has no finite cost"
    return (
        f"reserves epsilon {budget['reserves_epsilon']:.4g} for a patient; then at most "
        f"{budget['after_epsilon']:.4g} of {budget['limit_epsilon']:g} are committed "
        f"(now {budget['committed_epsilon']:.4g}, {budget['left_share']:.0%} left)"
    )


def _print_rules(job: JobSpec, rows: list[dict[str, Any]]) -> None:
    shown = [{**row, "result": "pass" if row["passed"] else "FAIL"} for row in rows]
    print_table(f"{job.name} ({job.sha256[:SHOWN]})", shown, ("rule", "result", "text"))
    failed = [row["rule"] for row in rows if not row["passed"]]
    if failed:
        click.echo(f"refused: {', '.join(failed)}")
    else:
        click.echo("every rule passes; admission also needs patients that fit the job's query")
