"""`fedcmr site energy`: what jobs have used here, for the site's own report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedcmr_client.commands.policy_option import policy_option
from fedcmr_client.commands.site_check import SHOWN
from fedcmr_client.commands.site_status import open_site
from fedcmr_shared.cli import json_option, print_json, print_table

if TYPE_CHECKING:
    from fedcmr_client.energy import Energy, EnergyLog, JobEnergy

_HOW = (
    "No job's energy has been counted. To count it, name the site's country in policy.yaml, such as\n"
    "energy: {country: DEU}, and restart the agent."
)
_COLUMNS = ("job", "name", "kWh", "kg_CO2e", "method", "hours", "CPU_hours", "2nd_kWh", "note")


@click.command()
@policy_option
@json_option
def energy(policy_path: Path, as_json: bool) -> None:
    """Show the energy and emissions of every job here. The figures are the site's own.

    They tell how long rounds took, and so how many patients they had: pass them on with care.
    """
    from fedcmr_client.energy import EnergyLog

    home, ledger = open_site(policy_path)
    with ledger:
        names = {job.job: job.name for job in ledger.spending().jobs}
    log = EnergyLog.beside(home.policy.ledger.folder)
    jobs = _jobs(log)
    if as_json:
        shown = [_job_json(job, names.get(job), found) for job, found in jobs.items()]
        print_json({"site": home.policy.site, "jobs": shown})
    elif not jobs:
        click.echo(_HOW)
    else:
        rows = [row for job, found in jobs.items() for row in _rows(job, names.get(job), found)]
        print_table(f"{home.policy.site}: energy of jobs, PUE included", rows, _COLUMNS)
        for line in _explanations(jobs):
            click.echo(line)


def _jobs(log: EnergyLog) -> dict[str, JobEnergy]:
    return {job: log.read(job) for job in log.jobs()}


def _job_json(job: str, name: str | None, found: JobEnergy) -> dict[str, Any]:
    return {
        "job": job,
        "name": name,
        "kwh": found.kwh,
        "measured": [_energy_json(energy) for energy in found.measured],
        "unmeasured_pieces": found.unmeasured_pieces,
        "unmeasured_seconds": found.unmeasured_seconds,
    }


def _energy_json(energy: Energy) -> dict[str, Any]:
    return {
        **energy.model_dump(),
        "kwh": energy.kwh,
        "second_kwh": energy.second_kwh,
        "disagrees": energy.disagrees,
        "method": energy.circumstances.method,
    }


def _rows(job: str, name: str | None, found: JobEnergy) -> list[dict[str, object]]:
    about = {"job": job[:SHOWN], "name": name}
    rows: list[dict[str, object]] = [
        {
            **about,
            "kWh": energy.kwh,
            "kg_CO2e": energy.kg_co2e,
            "method": energy.circumstances.method,
            "hours": energy.seconds / 3600,
            "CPU_hours": energy.cpu_seconds / 3600,
            "2nd_kWh": energy.second_kwh,
            "note": "estimates disagree" if energy.disagrees else None,
        }
        for energy in found.measured
    ]
    if found.unmeasured_pieces:
        hours = found.unmeasured_seconds / 3600
        note = f"{found.unmeasured_pieces} pieces"
        rows.append({**about, "method": "not measured", "hours": hours, "note": note})
    return rows


def _explanations(jobs: dict[str, JobEnergy]) -> list[str]:
    every = [energy for found in jobs.values() for energy in found.measured]
    lines = [
        f"{under.hardware}: {under.country}, {under.g_per_kwh:g} g CO2e/kWh "
        f"({under.intensity_year}), PUE {under.pue:g}, {under.tool}"
        for under in dict.fromkeys(energy.circumstances for energy in every)
    ]
    watts = sorted({energy.circumstances.watts_per_thread for energy in every})
    if watts:
        lines.append(
            "kWh counts the whole machine while the job ran: jobs side by side are counted twice. "
            f"2nd kWh is CPU hours at {' or '.join(f'{each:g}' for each in watts)} W a thread, and "
            "GPUs as measured."
        )
    if any(energy.disagrees for energy in every):
        lines.append(
            "Estimates that disagree differ by more than twice: take the figure as an order of "
            "magnitude."
        )
    return lines
