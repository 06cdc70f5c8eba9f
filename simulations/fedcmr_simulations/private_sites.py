"""Policies and privacy ledgers of virtual sites, made anew for every run.

A virtual site trains exactly as a hospital does: the same agent, gate and ledger, under a policy
that allows the run's own job. Its ledger lies in the run folder, so that two runs on the same
virtual patients do not share a budget; a hospital's ledger lives as long as its patients' data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedcmr_client.policy import policy_text
from fedcmr_client.site_home import SiteHome
from fedcmr_shared.identity.roster import Roster, new_roster
from fedcmr_shared.privacy.accounting import Figures, figures
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.ledger import Phase, Release, Started
from fedcmr_shared.schemas.policy import (
    BudgetPolicy,
    CohortPolicy,
    EvaluationPolicy,
    LedgerPolicy,
    SitePolicy,
)
from fedcmr_simulations.config import SiteBudget
from fedcmr_simulations.unprotected import SIMULATED_TICK_S


def open_site(folder: Path, store: Path, job: JobSpec, budget: SiteBudget, roster: Path) -> Path:
    """Write the policy of the site in ``store``, make its ledger and return the policy file.

    ``roster`` is where `roster_of` all sites will be written.

    Raises:
        ConfigurationError: the budget admits no training at all.
    """
    (folder / "second-place").mkdir(parents=True)
    unnoised = job.privacy is not None and job.privacy.evaluation.noise_multiplier is None
    gated = job.privacy is not None and job.privacy.evaluation.memorisation
    policy = SitePolicy(
        site=store.name,
        store=store,
        ledger=LedgerPolicy(folder=folder / "ledger", second_place=folder / "second-place"),
        budget=BudgetPolicy(**budget.model_dump()),
        max_epsilon_per_job=budget.epsilon,
        max_delta=budget.delta,
        noise_multiplier=1e-3,
        minimum_sites=job.minimum_sites,
        aggregation=(job.aggregation,),
        roster=None if job.aggregation == "plain_with_local_dp" else roster,
        allow_distributed_noise=job.privacy is not None and job.privacy.distributed is not None,
        coordinators=(job.coordinator,),
        jobs=(job.name,),
        models=(job.model.name,),
        # Virtual patients were never asked; everything else a job may query.
        cohort=CohortPolicy(
            require_consent=False,
            attributes=("modalities", "views", "vendors", "acquired_from", "acquired_until"),
        ),
        max_device_hours=job.resources.device_hours,
        max_energy_kwh=job.resources.energy_kwh,
        evaluation=EvaluationPolicy(
            metrics=("memorisation",) if gated else ("psnr", "ssim", "nmse"),
            allow_unnoised=unnoised and not gated,
        ),
        reply_tick_s=SIMULATED_TICK_S,
    )
    path = folder / "policy.yaml"
    path.write_text(policy_text(policy), encoding="utf-8")
    SiteHome.open(path).create_ledger().close()
    return path


def roster_of(policies: Sequence[Path]) -> Roster:
    """Return names and keys of the sites with these policy files, as each would give them.

    Raises:
        ConfigurationError: there are fewer than three.
    """
    homes = [SiteHome.open(path) for path in policies]
    return new_roster({home.policy.site: home.identity().public_key for home in homes})


@dataclass(frozen=True)
class Account:
    """What a site's ledger says about one job.

    ``rounds`` holds one event per started round; ``totals`` the figures of trained and evaluated
    patients at the end.
    """

    site: str
    rounds: list[dict[str, Any]]
    totals: dict[str, Any]


def read_account(policy: Path, job: JobSpec) -> Account:
    """Read the ledger of the site with this policy file.

    Raises:
        LedgerError: the ledger cannot be trusted.
    """
    home = SiteHome.open(policy)
    with closing(home.open_ledger()) as ledger:
        opened, state = ledger.budget.opened, ledger.budget.jobs[job.sha256]
        entries = [leaf.entry for leaf in ledger.leaves()]
    done: dict[Phase, Counter[Release]] = {"train": Counter(), "evaluate": Counter()}
    events = []
    for entry in entries:
        if not isinstance(entry, Started) or entry.job != job.sha256:
            continue
        release = state.admitted.phases[entry.phase].release
        if release.noise_multiplier is not None:
            done[entry.phase][release] += 1
        if entry.phase == "train":
            spent = _figures(frozenset(done["train"].items()), opened.order, opened.delta)
            event = {"site": opened.site, "round": entry.round, "attempt": entry.attempt}
            events.append({**event, **_shown(spent)})
    totals: dict[str, Any] = {
        "order": opened.order,
        "rounds": [event["epsilon"] for event in events],
    }
    for phase, counts in done.items():
        spent = _figures(frozenset(counts.items()), opened.order, opened.delta)
        totals[phase] = {"starts": sum(counts.values()), **_shown(spent)}
    return Account(opened.site, events, totals)


@lru_cache(maxsize=256)
def _figures(releases: frozenset[tuple[Release, int]], order: int, delta: float) -> Figures:
    # Sites of one size class spend the same, so most figures are computed once for all of them.
    return figures(dict(releases), order, delta)


def _shown(spent: Figures) -> dict[str, float | None]:
    return {"epsilon": spent.filter_epsilon, "epsilon_if_fixed": spent.pld_epsilon}
