"""Flower ServerApp of a coordinator.

A deployed run names its job in the run configuration; the coordinator's folder is named by
``FEDCMR_COORDINATOR``. However a run ends, the job's row says so: the Flower run is only its
carrier.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedcmr_server.job_run import JobRun, StoredRun
from fedcmr_server.job_states import TransitionRefused
from fedcmr_server.links import FlowerLink, SiteLink, SitesMissing
from fedcmr_server.log_files import log_beside_superlink
from fedcmr_server.rounds import run_job
from fedcmr_server.store import Jobs, StoreUnreachable
from fedcmr_shared.errors import ConfigurationError, FedcmrError

if TYPE_CHECKING:
    from fedcmr_server.home import CoordinatorHome

_PATIENCE_S: Final = 300.0  # a round's answers are worth waiting for a database that restarts

_log = logging.getLogger("fedcmr.server")


def create_server_app(run_of: Callable[[Context], JobRun]) -> ServerApp:
    """Return a ServerApp that runs the job that ``run_of`` finds."""
    server_app = ServerApp()

    @server_app.main()
    def run(grid: Grid, context: Context) -> None:
        run_job(FlowerLink(grid), run_of(context))

    return server_app


def carry_job(link: SiteLink, run: StoredRun) -> None:
    """Take a stored job over, go on with it, and write down how that ended.

    Raises:
        FedcmrError: it did not end well. Too few sites, and a database that does not answer, lose
            only this run: another one goes on. Any other reason fails the job. A run whose job
            was cancelled, or which another run carries by now, changes nothing.
    """
    jobs = Jobs(run.store)
    name = jobs.change(run.job_id, "start", run=run.run).name
    _log.info("job %s: carried by run %s", name, run.run)
    try:
        last = run_job(link, run)
    except (TransitionRefused, StoreUnreachable):
        raise
    except SitesMissing as error:
        jobs.change(run.job_id, "run_lost", run=run.run, reason=str(error))
        raise
    except FedcmrError as error:
        jobs.change(run.job_id, "fail", run=run.run, reason=str(error))
        raise
    over = last.round == run.job.rounds
    jobs.change(run.job_id, "finish" if over else "paused", run=run.run)
    _log.info("job %s: %s after round %d", name, "over" if over else "paused", last.round)


app = ServerApp()


@app.main()
def _main(grid: Grid, context: Context) -> None:
    job = str(context.run_config.get("job", ""))
    if not job:
        raise ConfigurationError("the run configuration names no job")
    home = _home()
    log_beside_superlink(home.logs)
    with home.store(_PATIENCE_S) as store:
        try:
            carry_job(FlowerLink(grid), StoredRun(store, home.jobs, job, str(context.run_id)))
        except TransitionRefused as refusal:  # nothing is wrong: the job is no longer this run's
            _log.info("run %s ends: %s", context.run_id, refusal)


def _home() -> CoordinatorHome:
    from fedcmr_server.home import FOLDER_VARIABLE, CoordinatorHome  # simulations have none

    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        raise ConfigurationError(
            f"{FOLDER_VARIABLE} is not set: start jobs through `fedcmr coordinator`"
        )
    return CoordinatorHome.open(Path(folder))
