"""Cost of one securely summed round beside Flower's SecAgg+ functions and a plain sum.

Each row is a whole round on one core: every site makes its upload, the server adds all of them and
opens the sum, which is compared with the exact one. Seconds are CPU time: of the fastest site, and
of the server in the fastest round. Key exchange and shares are left out of all rows.

* plain: float32 vectors, added up without protection;
* keystream: AES-256-CTR streams added to words that encode nothing: the floor for every protocol
  with pairwise masks;
* flower: the functions of Flower's SecAgg+ as secaggplus_mod and SecAggPlusWorkflow call them,
  with the workflow's defaults, up to the opened vector; no signatures;
* flower workflow: the same with what the workflow does next, serialise the vector and average it
  over the sites' results;
* fedcmr: encoding, masks, hash and Ed25519 signature at the site; hash, verification of every
  signature, sum and decoding at the server.

Memory is the most that Python and NumPy hold at once, inputs included, over 4 bytes per parameter.

    python benchmarks/secagg.py [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import cryptography
import flwr
import numpy as np
import torch
from secagg_methods import BOUND, METHODS, Values

LIMITS = {
    "site_seconds": 0.45,
    "server_seconds": 0.55,
    "bytes_per_parameter": 4.0,
    "bytes_per_parameter_20_bits": 2.6,
    "site_vectors": 3.0,
    "server_vectors": 3.0,
}
FASTER_THAN_FLOWER = {"site_seconds": 2.5, "server_seconds": 3.5}
FULL = ((3, 5, 10, 25, 50), (10**5, 10**6, 10**7))
QUICK = ((3, 10), (10**4, 10**5))
T = TypeVar("T")


def updates(size: int) -> Values:
    """Return every site's update, partly beyond the bound."""
    return np.linspace(-1.25 * BOUND, 1.25 * BOUND, size, dtype=np.float32)


def one_round(name: str, sites: int, size: int) -> dict[str, float]:
    """Return CPU seconds and upload of a round whose sum is checked."""
    method, values = METHODS[name](sites, size), updates(size)
    site, server, sent = [], 0.0, 0
    for number in range(sites):
        seconds, upload = timed(method.upload, number, values)
        site.append(seconds)
        server += timed(method.receive, upload)[0]
        sent = sum(memoryview(part).nbytes for part in upload)
        del upload  # one vector at a time, as from a network
    seconds, total = timed(method.open)
    assert np.abs(total - method.exact(values)).max() <= method.tolerance, (
        f"{name} opened a wrong sum"
    )
    return {
        "site_seconds": min(site),
        "server_seconds": server + seconds,
        "bytes_per_parameter": sent / size,
    }


def timed(action: Callable[..., T], *arguments: Any) -> tuple[float, T]:
    start = time.process_time()
    result = action(*arguments)
    return time.process_time() - start, result


def memory(name: str, sites: int, size: int) -> dict[str, float]:
    """Return the most memory that a site and the server hold at once, in float32 vectors."""
    values = updates(size)
    tracemalloc.start()
    method, site, server = METHODS[name](sites, size), 0, 0
    for number in range(sites):
        before = tracemalloc.get_traced_memory()[0]
        held, upload = peak(method.upload, number, values)
        site = max(site, held - before + values.nbytes)
        server = max(server, peak(method.receive, upload)[0])
        del upload
    server = max(server, peak(method.open)[0])
    tracemalloc.stop()
    return {"site_vectors": site / values.nbytes, "server_vectors": server / values.nbytes}


def peak(action: Callable[..., T], *arguments: Any) -> tuple[int, T]:
    tracemalloc.reset_peak()
    result = action(*arguments)
    return tracemalloc.get_traced_memory()[1], result


def compare(sites: int, size: int, repeats: int) -> dict[str, dict[str, float]]:
    """Return the row of every method; rounds alternate, so that all see the same machine."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    for _ in range(repeats):
        for name, run in runs.items():
            run.append(one_round(name, sites, size))
    return {
        name: {key: min(each[key] for each in run) for key in run[0]} | memory(name, sites, size)
        for name, run in runs.items()
    }


def scaling(
    numbers: Sequence[int], sizes: Sequence[int], repeats: int
) -> list[dict[str, float | bool]]:
    """Return our seconds at each size, and at ten times the largest on the line of the last two."""
    rows: list[dict[str, float | bool]] = []
    for sites in numbers:
        measured = []
        for size in sizes:
            runs = [one_round("fedcmr", sites, size) for _ in range(repeats)]
            measured.append([min(run[key] for run in runs) for key in FASTER_THAN_FLOWER])
        share = 9 * sizes[-1] / (sizes[-1] - sizes[-2])
        last_two = zip(*measured[-2:], strict=True)
        measured.append([high + share * (high - low) for low, high in last_two])
        for size, seconds in zip([*sizes, 10 * sizes[-1]], measured, strict=True):
            named = dict(zip(FASTER_THAN_FLOWER, seconds, strict=True))
            rows.append({"sites": sites, "size": size, "measured": size in sizes, **named})
    return rows


def judge(rows: dict[str, dict[str, float]]) -> dict[str, bool]:
    """Return which targets are met."""
    ours = rows["fedcmr"] | {
        "bytes_per_parameter_20_bits": rows["fedcmr, 20 bits"]["bytes_per_parameter"]
    }
    met = {key: round(ours[key], 2) <= limit for key, limit in LIMITS.items()}
    for key, factor in FASTER_THAN_FLOWER.items():
        met[f"{key} {factor} x below flower"] = rows["flower"][key] >= factor * ours[key]
    return met


def show(result: dict[str, Any]) -> None:
    rows = result["methods"]
    print(f"one round of {result['sites']} sites with {result['size']:,} parameters, CPU seconds")
    print(
        f"  {'':17}{'site':>8}{'/floor':>8}{'server':>8}{'/floor':>8}{'B/param':>9}{'memory':>14}"
    )
    for name, row in rows.items():
        ratio = {key: row[key] / rows["keystream"][key] for key in FASTER_THAN_FLOWER}
        print(
            f"  {name:17}{row['site_seconds']:8.3f}{ratio['site_seconds']:8.2f}"
            f"{row['server_seconds']:8.3f}{ratio['server_seconds']:8.2f}"
            f"{row['bytes_per_parameter']:9.2f}"
            f"{row['site_vectors']:7.2f}{row['server_vectors']:7.2f}"
        )
    print("fedcmr, other sizes (* on a straight line)")
    for row in result["scaling"]:
        mark = " " if row["measured"] else "*"
        print(
            f"  {row['sites']:3} sites {row['size']:13,}{mark} "
            f"site {row['site_seconds']:8.3f}  server {row['server_seconds']:8.3f}"
        )
    for name, met in result["targets"].items():
        print(f"{name}: {'met' if met else 'MISSED'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, for tests")
    parser.add_argument("--repeats", type=int, default=3, help="rounds per row")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    numbers, sizes = QUICK if options.quick else FULL
    sites, size = 10, max(sizes)
    rows = compare(sites, size, options.repeats)
    result: dict[str, Any] = {
        "command": f"python benchmarks/secagg.py {' '.join(sys.argv[1:])}".strip(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, one thread",
        "versions": {
            "cryptography": cryptography.__version__,
            "flwr": flwr.__version__,
            "numpy": np.__version__,
            "torch": torch.__version__,
        },
        "sites": sites,
        "size": size,
        "methods": rows,
        "scaling": scaling(numbers, sizes, options.repeats),
        "targets": {} if options.quick else judge(rows),
    }
    show(result)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(0 if all(result["targets"].values()) else 1)


if __name__ == "__main__":
    main()
