"""`fedcmr site plan`: what noise, rounds or local steps fit a budget."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Final

import click

from fedcmr_shared.cli import json_option, print_json, print_table

if TYPE_CHECKING:
    from fedcmr_shared.privacy.planning import Allowance, Plan

_LOCAL_STEPS: Final = 60
_COLUMNS: Final = (
    "sampling_rate",
    "noise_multiplier",
    "rounds",
    "local_steps",
    "patients_per_step",
    "filter_epsilon",
    "pld_epsilon",
    "reserved_epsilon",
    "relative_noise",
)


@click.command()
@click.option("--epsilon", type=float, default=8.0, help="Budget of a patient.")
@click.option("--delta", type=float, default=1e-5, help="Delta of that epsilon.")
@click.option(
    "--order", type=click.IntRange(min=2), help="Order of the Rényi filter; the best if not given."
)
@click.option(
    "--spent-rdp",
    type=click.FloatRange(min=0),
    default=0.0,
    help="Rényi divergence at that order that the patients have spent already.",
)
@click.option("--rounds", type=click.IntRange(min=1), help="Rounds of the job, without spare ones.")
@click.option(
    "--spare-rounds",
    type=click.IntRange(min=0),
    default=1,
    help="Rounds reserved for repeating those whose update was lost.",
)
@click.option(
    "--local-steps",
    type=click.IntRange(min=1),
    help=f"Private steps of a round; {_LOCAL_STEPS}, unless --rounds and --sigma ask for it.",
)
@click.option(
    "--sigma",
    type=click.FloatRange(min=0, min_open=True),
    help="Noise multiplier: noise per clip norm.",
)
@click.option(
    "--cohort",
    "cohort_size",
    type=click.IntRange(min=1),
    default=200,
    help="Coarse number of training patients, as the job declares it.",
)
@click.option(
    "--q",
    "sampling_rates",
    type=click.FloatRange(min=0, min_open=True, max=1),
    multiple=True,
    help="Sampling rate; repeatable; some common ones if not given.",
)
@json_option
def plan(
    epsilon: float,
    delta: float,
    order: int | None,
    spent_rdp: float,
    rounds: int | None,
    spare_rounds: int,
    local_steps: int | None,
    sigma: float | None,
    cohort_size: int,
    sampling_rates: tuple[float, ...],
    as_json: bool,
) -> None:
    """Compute what fits a patient's budget, before any job is written.

    \b
    --rounds            the least noise multiplier
    --sigma             how many rounds
    --rounds --sigma    how many local steps of a round

    The certified epsilon is the filter's, fixed at one Rényi order; beside it the PLD figure, had
    all jobs been fixed in advance. The relative noise is that in the mean of all steps, per clip
    norm: compare choices by it, and by the patients per step, which cost computing time.
    """
    from fedcmr_shared.privacy.planning import Allowance, Outline, make_plans, sensible_rates

    if rounds is None and sigma is None:
        raise click.UsageError("give --rounds, --sigma or both")
    if rounds is not None and sigma is not None and local_steps is not None:
        raise click.UsageError("leave out --rounds, --sigma or --local-steps: it is the answer")
    if rounds is None or sigma is None:
        local_steps = local_steps or _LOCAL_STEPS
    allowance = Allowance.of(epsilon, delta, order, spent_rdp)
    outline = Outline(rounds, local_steps, sigma, cohort_size, spare_rounds)
    rates = list(sampling_rates) or sensible_rates(cohort_size)
    plans = make_plans(allowance, outline, rates)
    without = sorted(set(rates) - {plan.sampling_rate for plan in plans})
    if as_json:
        print_json(_as_json(allowance, cohort_size, plans, without))
    else:
        _print(allowance, cohort_size, plans, without)


def _as_json(
    allowance: Allowance, cohort_size: int, plans: list[Plan], without: list[float]
) -> dict[str, object]:
    from fedcmr_shared.privacy.accounting import RELATION, UNIT, accountant_versions

    return {
        "unit": UNIT,
        "relation": RELATION,
        **asdict(allowance),
        "limit_rdp": allowance.limit_rdp,
        "remaining_rdp": allowance.remaining_rdp,
        "cohort_size": cohort_size,
        "plans": [asdict(plan) for plan in plans],
        "nothing_fits_at": without,
        "versions": accountant_versions(),
    }


def _print(allowance: Allowance, cohort_size: int, plans: list[Plan], without: list[float]) -> None:
    from fedcmr_shared.privacy.accounting import RELATION, UNIT

    title = (
        f"What fits epsilon {allowance.epsilon:g}: unit {UNIT}, relation {RELATION}, "
        f"delta {allowance.delta:g}, order {allowance.order}; cohort of {cohort_size}, "
        f"spare rounds {plans[0].spare_rounds}"
    )
    print_table(title, [_row(plan) for plan in plans], _COLUMNS)
    if without:
        rates = ", ".join(f"{rate:g}" for rate in without)
        click.echo(f"not one round fits at sampling rate {rates}")
    if allowance.spent_rdp:
        click.echo(
            f"spent already: RDP {allowance.spent_rdp:g} of {allowance.limit_rdp:.4g}; "
            "reserved epsilon includes it"
        )


def _row(plan: Plan) -> dict[str, object]:
    # All decimals: a noise multiplier rounded down would no longer fit.
    noise = f"{plan.noise_multiplier:.10g}"
    return {
        **asdict(plan),
        "noise_multiplier": noise,
        "patients_per_step": plan.expected_patients,
    }
