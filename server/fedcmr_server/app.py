"""Flower ServerApp of a coordinator.

A deployed run names its folder in the run configuration: ``run-folder`` holds ``job.json``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedcmr_server.links import FlowerLink
from fedcmr_server.rounds import run_job
from fedcmr_server.run_folder import RunFolder
from fedcmr_shared.errors import ConfigurationError


def create_server_app(folder_of: Callable[[Context], RunFolder]) -> ServerApp:
    """Return a ServerApp that runs the job in the folder that ``folder_of`` finds."""
    server_app = ServerApp()

    @server_app.main()
    def run(grid: Grid, context: Context) -> None:
        run_job(FlowerLink(grid), folder_of(context))

    return server_app


def _folder_from_run_config(context: Context) -> RunFolder:
    folder = str(context.run_config.get("run-folder", ""))
    if not folder:
        raise ConfigurationError("the run configuration names no run-folder")
    return RunFolder(Path(folder))


app = create_server_app(_folder_from_run_config)
