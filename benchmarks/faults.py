"""Plays faults against a real federation of four hospitals on this machine, and notes the outcomes.

Each case breaks one thing, asserts what must come of it and has a bound of time: see
`tests/fault_cases.py`. Cases that went well before are left out, so that a run that was broken
off goes on where it ended.

    python benchmarks/faults.py --all
    python benchmarks/faults.py --case kill-site-update --case cut-30s --again

Faults that need no whole federation are tests:

- an expired, foreign or self-signed certificate, a revoked one on an open connection, messages
  above the size limit: `tests/server/test_gateway.py`; what a site says of a certificate:
  `tests/client/test_tunnel_probe.py`
- a second member of the same name or with the same key: `tests/server/test_members.py`
- wrong, damaged and contradictory answers of a site: `tests/server/test_secure_sums.py`
- disks that are full and files that are damaged, byte by byte: `tests/client/test_ledger_damage.py`
- a kill at each step within a process: `tests/client/test_agent_crash.py`,
  `tests/client/test_secure_site_crash.py`, `tests/server/test_job_run_crash.py`

The six faults that matter most, in one job: `tests/system/test_faults.py`.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fault_cases import CASES, CannotRun, FaultCase
from fault_lab import Lab

RESULTS = Path(__file__).with_name("results") / "faults.json"


def main() -> None:
    """Play the cases that are asked for; exit with 1 if an outcome was not the stated one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [case.name for case in CASES]
    parser.add_argument("--case", action="append", choices=names, default=[])
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--again", action="store_true", help="also those that went well before")
    options = parser.parse_args()
    asked = names if options.all else options.case
    well = {name for name, result in _read().items() if result["outcome"] == "as stated"}
    done = set() if options.again else well
    _play_all([case for case in CASES if case.name in asked and case.name not in done])
    results = _read()
    _print(results)
    if any(results[name]["outcome"] == "failed" for name in asked):
        sys.exit(1)


def _play_all(cases: list[FaultCase]) -> None:
    while cases:
        with _lab() as lab:
            while cases:
                case = cases.pop(0)
                result = _play(case, lab)
                # The same wherever it was run.
                place = str(lab.federation.folder)
                _note(case, json.loads(json.dumps(result).replace(place, "FOLDER")))
                if case.spoils or result["outcome"] == "failed":
                    break


@contextmanager
def _lab() -> Iterator[Lab]:
    with (
        tempfile.TemporaryDirectory(prefix="ff", ignore_cleanup_errors=True) as folder,
        Lab.open(Path(folder)) as lab,
    ):
        yield lab


def _play(case: FaultCase, lab: Lab) -> dict[str, Any]:
    print(f"{case.name} …", flush=True)
    began = time.monotonic()
    try:
        seen = case.play(lab)
    except CannotRun as error:
        return {"outcome": "not run", "reason": str(error)}
    except Exception as error:  # noqa: BLE001  # whatever it was is this case's result
        traceback.print_exc()
        _keep_logs(case, lab)
        return {
            "outcome": "failed",
            "seconds": round(time.monotonic() - began, 1),
            "reason": f"{type(error).__name__}: {error}"[:500],
        }
    seconds = round(time.monotonic() - began, 1)
    outcome = "as stated" if seconds <= case.bound_s else "failed"
    return {"outcome": outcome, "seconds": seconds, **seen}


def _keep_logs(case: FaultCase, lab: Lab) -> None:
    kept = Path(tempfile.mkdtemp(prefix=f"fault-{case.name}-"))
    logs = [*lab.federation.folder.glob("*.out"), *lab.home.logs.glob("*.log")]
    for log in logs:
        (kept / log.name).write_bytes(log.read_bytes())
    print(f"logs are in {kept}", flush=True)


def _read() -> dict[str, Any]:
    return dict(json.loads(RESULTS.read_text())) if RESULTS.exists() else {}


def _note(case: FaultCase, result: dict[str, Any]) -> None:
    """Add a result to the file, which another run may be writing, too."""
    folder = os.open(RESULTS.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        results = {
            **_read(),
            case.name: {**result, "stated": case.outcome, "bound_s": case.bound_s},
        }
        written = RESULTS.with_suffix(".new")
        written.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
        written.replace(RESULTS)
    finally:
        os.close(folder)


def _print(results: dict[str, Any]) -> None:
    width = max(map(len, results), default=0)
    for case in CASES:
        if case.name in results:
            result = results[case.name]
            seconds = f"{result.get('seconds', 0):6.1f} s of {case.bound_s:g} s"
            print(f"{case.name:{width}}  {result['outcome']:9}  {seconds}  {case.outcome}")


if __name__ == "__main__":
    main()
