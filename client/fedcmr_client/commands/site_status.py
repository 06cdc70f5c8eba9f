"""`fedcmr site status` and `budget`: how the site stands, and what its patients have spent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedcmr_client.commands.policy_option import policy_option
from fedcmr_client.commands.site_check import SHOWN
from fedcmr_shared.cli import json_option, print_json, print_table
from fedcmr_shared.errors import ConfigurationError, LedgerError

if TYPE_CHECKING:
    from fedcmr_client.ledger import Ledger, Spending
    from fedcmr_client.site_home import SiteHome
    from fedcmr_shared.schemas.policy import SitePolicy


@click.command()
@policy_option
@json_option
def status(policy_path: Path, as_json: bool) -> None:
    """Show the site's place in its federation, what has been spent, and every job."""
    home, ledger = open_site(policy_path)
    with ledger:
        spending, head, key = ledger.spending(), ledger.head(), ledger.public_key
    federation = _federation(home)
    if as_json:
        print_json(
            {
                "site": home.policy.site,
                "public_key": key,
                "policy_sha256": home.policy.sha256,
                "entries": head.size,
                "jobs": [_job_json(job) for job in spending.jobs],
                **_spending_json(spending),
                **federation,
            }
        )
        return
    _print_federation(home, federation)
    _print_budget(home.policy, spending)
    if spending.jobs:
        columns = ("job", "name", "model", "state", "train", "evaluate", "epsilon", "unnoised")
        print_table("Jobs (starts done / still reserved)", _job_rows(spending), columns)
    click.echo(f"{head.size} entries, signed by {trust_line(home.policy.site, key)}")


@click.command()
@policy_option
@json_option
def budget(policy_path: Path, as_json: bool) -> None:
    """Show what the patient with the most charges has spent of the budget."""
    home, ledger = open_site(policy_path)
    with ledger:
        spending = ledger.spending()
    if as_json:
        print_json({"site": home.policy.site, **_spending_json(spending)})
    else:
        _print_budget(home.policy, spending)


def open_site(policy_path: Path) -> tuple[SiteHome, Ledger]:
    """Return the site of a policy and its open ledger, which the caller closes."""
    from fedcmr_client.site_home import SiteHome

    home = SiteHome.open(policy_path)
    return home, home.open_ledger()


def find_job(ledger: Ledger, name: str) -> str:
    """Return the one admitted job whose SHA-256 begins with ``name``.

    Raises:
        LedgerError: there is none, or there are several.
    """
    found = [job for job in ledger.budget.jobs if job.startswith(name)]
    if len(found) == 1:
        return found[0]
    reason = "the ledger admitted no job of that name" if not found else "that fits several jobs"
    raise LedgerError(f"job {name}: {reason}: see `fedcmr site status --json`")


def trust_line(site: str, key: str) -> str:
    """Return the line by which auditors trust a site."""
    return f'{site} = "{key}"'


def _federation(home: SiteHome) -> dict[str, Any]:
    from fedcmr_client import agent_lock, site_health

    process = agent_lock.agent_process(home.run / agent_lock.FILE)
    pause = home.pause.read()
    return {
        "membership": _membership(home),
        "agent": {
            "running": process is not None,
            "process": process,
            "report": None
            if process is None
            else site_health.read_health(home.run / site_health.FILE),
        },
        "paused": None if pause is None else {"since": pause.since, "reason": pause.reason},
    }


def _membership(home: SiteHome) -> dict[str, Any]:
    from fedcmr_shared.identity.certificates import days_left

    membership = home.membership
    values: dict[str, Any] = {"state": membership.state, "problem": None}
    if membership.state in ("absent", "asked"):
        return values
    try:
        kit, certificate = membership.kit, membership.certificate
        values |= {
            "federation": kit.federation,
            "coordinator": f"{kit.coordinator} at {kit.host}:{kit.port}",
            "fingerprint": kit.fingerprint,
            "certificate_until": f"{certificate.not_valid_after_utc:%Y-%m-%d}",
            "certificate_days": round(days_left(certificate), 1),
        }
        membership.require_joined()
    except ConfigurationError as error:
        values["problem"] = str(error)
    return values


def _print_federation(home: SiteHome, federation: dict[str, Any]) -> None:
    from fedcmr_shared.identity.certificates import WARNING_DAYS

    member, agent, paused = (federation[name] for name in ("membership", "agent", "paused"))
    rows: dict[str, object] = {"membership": _STATES[member["state"]]}
    if "federation" in member:
        days = member["certificate_days"]
        soon = f": in {days:.0f} days" if 0 < days <= WARNING_DAYS else ""
        rows |= {
            "federation": member["federation"],
            "coordinator": member["coordinator"],
            "certificate until": member["certificate_until"] + soon,
            "agent": _agent_text(agent),
        }
    if paused is not None:
        rows["paused"] = (
            f"since {paused['since']:%Y-%m-%d %H:%M} UTC; {paused['reason'] or 'no reason'}"
        )
    report = agent["report"] or {}
    problem = member["problem"] or (report.get("problem") or {}).get("message")
    if problem:
        rows["problem"] = problem
    if report.get("roster_news"):
        rows["roster"] = f"{report['roster_news']}: fedcmr site roster fetch"
    shown = [{"what": what, "value": value} for what, value in rows.items()]
    print_table(f"{home.policy.site} in its federation", shown, ("what", "value"))


_STATES = {
    "absent": "none: `fedcmr site request` begins one",
    "asked": "asked: waits for the startup kit",
    "joined": "joined",
    "left": "left",
}


def _agent_text(agent: dict[str, Any]) -> str:
    from fedcmr_client.site_health import STALE_S

    if not agent["running"]:
        return "does not run: fedcmr site start"
    report = agent["report"]
    if report is None:
        return f"process {agent['process']}, starting"
    if report["age_s"] > STALE_S:
        return f"process {agent['process']} hangs: its last word is {report['age_s']:.0f} s old"
    connected = "connected" if report["connected"] else "not connected"
    return f"process {agent['process']}, {connected}"


def _spending_json(spending: Spending) -> dict[str, Any]:
    figures = spending.figures
    return {"budget": _budget_json(spending), "fixed_in_advance_epsilon": figures.pld_epsilon}


def _budget_json(spending: Spending) -> dict[str, Any]:
    names = ("epsilon", "delta", "order", "spent_epsilon", "committed_epsilon")
    left = max(0.0, spending.limit_rdp - spending.committed_rdp)
    return {
        **{name: getattr(spending, name) for name in names},
        "spent_share": spending.spent_rdp / spending.limit_rdp,
        "reserved_share": (spending.committed_rdp - spending.spent_rdp) / spending.limit_rdp,
        "left_share": left / spending.limit_rdp,
    }


def _print_budget(policy: SitePolicy, spending: Spending) -> None:
    budget = _budget_json(spending)
    rows = [
        {"what": "spent", "share": budget["spent_share"], "epsilon": spending.spent_epsilon},
        {"what": "reserved", "share": budget["reserved_share"]},
        {
            "what": "spent and reserved",
            "share": 1 - budget["left_share"],
            "epsilon": spending.committed_epsilon,
        },
        {"what": "left", "share": budget["left_share"]},
        {"what": "budget", "share": 1.0, "epsilon": spending.epsilon},
    ]
    shown = [{**row, "share": f"{row['share']:.1%}"} for row in rows]
    title = f"{policy.site}: the patient with the most charges, delta {spending.delta:g}"
    # Shares add up; epsilon does not, since its first part pays for delta.
    print_table(title, shown, ("what", "share", "epsilon"))
    pld = spending.figures.pld_epsilon
    click.echo(
        "had all jobs been fixed in advance: no figure, as noise was distributed"
        if pld is None
        else f"had all jobs been fixed in advance: epsilon {pld:.4g} spent and reserved, by "
        "privacy loss distributions"
    )


def _job_json(job: Any) -> dict[str, Any]:
    return {**vars(job), "started": dict(job.started), "left": dict(job.left)}


def _job_rows(spending: Spending) -> list[dict[str, object]]:
    return [
        {
            "job": job.job[:SHOWN],
            "name": job.name,
            "model": job.model,
            "state": job.outcome or "open",
            **{phase: f"{count} / {job.left[phase]}" for phase, count in job.started.items()},
            "epsilon": job.epsilon,
            "unnoised": ", ".join(job.without_noise) or None,
        }
        for job in spending.jobs
    ]
