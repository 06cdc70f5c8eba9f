"""Runs a job on Flower's simulation engine, in a process of its own.

Flower's engine starts Ray and its own threads, and a Ray driver does not survive an interrupt well.
In a child process both can be stopped from outside at any moment while the run folder stays whole.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

from fedcmr_shared.cli import FLOWER_SILENCE
from fedcmr_simulations.drops import Drop, dropping

_QUIET = {
    **FLOWER_SILENCE,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # One thread a worker; a second one gains little and contends with the other worker.
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}

STOP_PATIENCE_S = 20.0


@contextmanager
def flower_process(
    run_folder: Path, places: list[Path], workers: int, drops: Sequence[Drop] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """Start the engine for the job in ``run_folder``; on leaving, it and its children are gone.

    ``places`` are those of `SimulatedSites`, one per virtual node; ``drops`` kill some of them.

    What Flower and Ray print goes to ``flower.log`` in the run folder.
    """
    plan = {
        "run_folder": str(run_folder),
        "places": [str(place) for place in places],
        "workers": workers,
        "drops": [asdict(drop) for drop in drops],
    }
    with (
        TemporaryDirectory(prefix="fedcmr-flower-") as home,
        (run_folder / "flower.log").open("ab") as log,
    ):
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(plan)],
            env={**os.environ, **_QUIET, "FLWR_HOME": home, "RAY_TMPDIR": home},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_PATIENCE_S)
    with suppress(ProcessLookupError):
        # Ray's helpers share the session of their driver.
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _exit_on_terminate(_signal: int, _frame: FrameType | None) -> None:
    import ray

    ray.shutdown()
    # Flower's server thread may wait for replies for minutes; there is nothing left to save.
    os._exit(128 + signal.SIGTERM)


def main(run_folder: Path, workers: int, places: list[Path], drops: list[Drop]) -> int:
    """Run the job in ``run_folder`` with one virtual node per place; return the exit code."""
    from flwr.server.superlink.fleet.vce.backend.backend import BackendConfig
    from flwr.simulation import run_simulation

    from fedcmr_client.app import create_client_app
    from fedcmr_server.app import create_server_app
    from fedcmr_server.run_folder import RunFolder
    from fedcmr_shared.errors import FedcmrError
    from fedcmr_simulations.sites import SimulatedSites

    signal.signal(signal.SIGTERM, _exit_on_terminate)
    folder = RunFolder(run_folder)
    mods = [dropping(drops, places)] if drops else []
    backend: BackendConfig = {
        "init_args": {"num_cpus": workers, "include_dashboard": False},
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
    }
    try:
        run_simulation(
            create_server_app(lambda _context: folder),
            create_client_app(SimulatedSites(tuple(places)), mods),
            num_supernodes=len(places),
            backend_config=backend,
        )
    except FedcmrError as error:
        folder.record("failed", message=str(error))
        return 1
    except RuntimeError as error:  # Ray did not start, or died
        log = folder.root / "flower.log"
        folder.record("failed", message=f"Flower's engine stopped: {error} See {log}")
        return 1
    return 0


if __name__ == "__main__":
    warnings.simplefilter("ignore", DeprecationWarning)
    plan = json.loads(sys.argv[1])
    code = main(
        Path(plan["run_folder"]),
        plan["workers"],
        [Path(place) for place in plan["places"]],
        [Drop(**drop) for drop in plan["drops"]],
    )
    sys.stdout.flush()
    sys.stderr.flush()
    # After a failed start, threads of Flower and Ray would keep the process for ever.
    os._exit(code)
