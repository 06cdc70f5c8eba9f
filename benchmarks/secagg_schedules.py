"""Secure sums under thousands of drop-out schedules, and what the protocol costs beside the vector.

Each schedule loses questions and answers of any sites in any steps, for 3 to 50 sites. The sum must
be exactly that of the survivors, or the attempt must end at the step where fewer than t are left;
all else counts as wrong, and the program then ends with code 1.
Then the CPU seconds of whole attempts on a vector of one word: keys, shares, confirmations,
unmasking, signatures and their verification, of all sites and the server together.

    python benchmarks/secagg_schedules.py [--schedules 10000] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedcmr_shared.secagg.encoding import Encoding, Segment
from fedcmr_shared.secagg.server import TooFewSites
from fedcmr_simulations.rehearsal import (
    RehearsalSite,
    Schedule,
    Setting,
    draw_sites,
    foreseen,
    new_setting,
    random_schedule,
    rehearse,
)

SHARES = {3: 0.3, 4: 0.3, 5: 0.2, 10: 0.17, 25: 0.02, 50: 0.01}
BOUND = 1000


def federation(count: int, words: int, post_quantum: bool) -> tuple[Setting, dict[str, Any]]:
    """Return ``count`` sites that sum ``words`` integers."""
    sites = draw_sites(count)
    encoding = Encoding((Segment("values", (words,), BOUND, integer=True),), 32, count)
    return new_setting(sites, encoding, post_quantum=post_quantum), sites


def run_schedule(setting: Setting, sites: dict[str, RehearsalSite], schedule: Schedule) -> str:
    """Return where an attempt ended: `opened`, a step, or `wrong` if it should have been another."""
    (segment,) = setting.encoding.segments
    values = {name: {"values": torch.randint(-BOUND, BOUND + 1, segment.shape)} for name in sites}
    expected = foreseen(setting, schedule)
    try:
        opened = rehearse(setting, sites, values, schedule)
    except TooFewSites as error:
        return error.step if error.step == expected else "wrong"
    exact = torch.stack([values[name]["values"] for name in opened.survivors]).sum(0)
    right = opened.survivors == expected and torch.equal(opened.sums["values"], exact)
    return "opened" if right else "wrong"


def run_schedules(number: int, seed: int) -> dict[str, dict[str, int]]:
    """Return how many schedules of each number of sites ended where."""
    source = random.Random(seed)
    ended: dict[int, Counter[str]] = {}
    for count, share in SHARES.items():
        for run in range(round(number * share)):
            setting, sites = federation(count, 16, post_quantum=run % 4 == 0)
            where = run_schedule(setting, sites, random_schedule(sites, source))
            ended.setdefault(count, Counter())[where] += 1
    return {f"{count} sites": dict(sorted(counts.items())) for count, counts in ended.items()}


def attempt_seconds(count: int, post_quantum: bool) -> float:
    """Return the CPU seconds of one attempt without losses."""

    def attempt() -> None:
        setting, sites = federation(count, 1, post_quantum)
        run_schedule(setting, sites, {})

    return min(_cpu_seconds(attempt) for _ in range(3))


def _cpu_seconds(action: Callable[[], None]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--schedules", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="draws the schedules, not the keys")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ended = run_schedules(options.schedules, options.seed)
    seconds = {
        f"{count} sites": {
            "x25519": attempt_seconds(count, post_quantum=False),
            "x25519 and ml-kem-768": attempt_seconds(count, post_quantum=True),
        }
        for count in SHARES
    }
    result = {
        "command": f"python benchmarks/secagg_schedules.py --schedules {options.schedules}",
        "schedules": sum(sum(counts.values()) for counts in ended.values()),
        "wrong": sum(counts.get("wrong", 0) for counts in ended.values()),
        "ended": ended,
        "attempt_cpu_seconds": seconds,
    }
    print(json.dumps(result, indent=2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(1 if result["wrong"] else 0)


if __name__ == "__main__":
    main()
