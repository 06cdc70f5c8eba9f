"""What a round between machines costs beyond the local training, phase by phase.

A real federation on this machine: coordinator, four sites, each in a network namespace where that
is allowed, with TLS, the gateway, Flower's SuperLink and SuperNodes, privacy and a secure sum over
the whole network. A site's local training is the time between the two entries of its ledger around
it; the slowest site's is what the round waits for. All processes share this machine's cores, so
that the four sites' own work for the sum, done side by side in hospitals, adds up here.

    python benchmarks/deployment.py [--models 1M 10M 63M]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from deployment import SITES, Federation, Site
from small_scans import small_store

from fedcmr_client.site_home import SiteHome
from fedcmr_client.store.split import SplitFractions

RESULTS: Final = Path(__file__).with_name("results") / "deployment.json"
LOCAL_ROUND_S: Final = 600.0
STEPS: Final = ("keys", "shares", "update", "consistency", "unmask")
JOB: Final = """\
name: heart
coordinator: coordinator
rounds: 2
minimum_sites: 4
round_timeout_s: 1200
model: {{size: {size}, text_encoder: hashed}}
sampling: {{accelerations: [4.0], acs_lines: 8}}
training: {{part: full, local_steps: 1}}
privacy:
  cohort_size: 10
  sampling_rate: 0.1
  noise_multiplier: 40.0
  evaluation: {{rounds: none, noise_multiplier: 40.0, cohort_size: 2}}
secure: {{step_timeout_s: 300}}
"""


@dataclass(frozen=True)
class Network:
    """A network by its size: a packaged one, or `small` with another number of cascades."""

    size: str
    cascades: int | None = None


NETWORKS: Final = {"1M": Network("small", 3), "10M": Network("small", 29), "63M": Network("paper")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    names = parser.parse_args().models
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in names:
        results[name] = measure(NETWORKS[name])
        show(name, results[name])
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")


def measure(network: Network) -> dict[str, Any]:
    """Run a job of two rounds; return the seconds of the second, which is like all later ones."""
    if network.cascades is not None:
        os.environ["PYTHONPATH"] = str(ROOT / "benchmarks" / "plugins" / "other_sizes")
        os.environ["FEDCMR_CASCADES"] = str(network.cascades)
    else:
        os.environ.pop("PYTHONPATH", None)
    # A short path, for the sockets below it.
    with tempfile.TemporaryDirectory(prefix="fd") as name:
        folder = Path(name)
        with Federation.open(folder) as federation:
            connect(federation)
            text = JOB.format(size=network.size)
            federation.job_file.write_text(text)
            job = federation.fedcmr("coordinator", "submit", str(federation.job_file))["id"]
            found = federation.wait_for(job, "finished", 3000)
            training = {site.name: training_s(site, job) for site in federation.sites.values()}
            isolated = federation.network.isolated
    return {
        **seconds(found["events"], max(training.values())),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "own_namespaces": isolated,
    }


def connect(federation: Federation) -> None:
    """Start the coordinator and four sites, which accept every size of CardioMM."""
    federation.start()
    for name in SITES:
        fractions = SplitFractions(0.5, 0.25, 0.25)
        store = small_store(federation.folder / "stores" / name, 24, fractions)
        site = federation.add_site(name, store)
        policy = site.policy.read_text()
        site.policy.write_text(policy.replace("models: [cardiomm/tiny]", "models: [cardiomm]"))
        site.join()
    for site in federation.sites.values():
        site.pin_roster()
        site.start()
    federation.wait_connected()


def training_s(site: Site, job: str) -> float:
    """Seconds between the ledger's entries around the training of round 2."""
    with closing(SiteHome.open(site.policy).open_ledger()) as ledger:
        at = {
            leaf.entry.kind: leaf.entry.at
            for leaf in ledger.leaves()
            if leaf.entry.kind in ("started", "stored")
            and (leaf.entry.job, leaf.entry.phase, leaf.entry.round) == (job, "train", 2)
        }
    return (at["stored"] - at["started"]) / 1000


def seconds(events: list[dict[str, Any]], training: float) -> dict[str, Any]:
    """The second round's seconds, by phase and without the slowest site's local training."""
    (attempt,) = (e for e in events if e["event"] == "attempt" and e["round"] == 2)
    (whole,) = (e for e in events if e["event"] == "round" and e["round"] == 2)
    assert attempt["outcome"] == "opened"
    assert len(attempt["survivors"]) == len(SITES)
    steps = {step: attempt["step_seconds"][step] for step in STEPS}
    steps["update"] -= training
    steps["new model"] = whole["seconds"] - attempt["seconds"]
    return {
        "round_s": whole["seconds"],
        "local_training_s": training,
        "overhead_s": {**steps, "sum": whole["seconds"] - training},
        "share_of_local_round": (whole["seconds"] - training) / LOCAL_ROUND_S,
        "bytes_up": attempt["bytes_up"],
        "bytes_down": attempt["bytes_down"],
    }


def show(name: str, result: dict[str, Any]) -> None:
    """Print one network's figures."""
    print(f"{name} parameters, {len(SITES)} sites")
    print(f"  round                     {result['round_s']:8.2f} s")
    print(f"  local training (slowest)  {result['local_training_s']:8.2f} s")
    for step, value in result["overhead_s"].items():
        note = ", beside training" if step == "update" else ""
        print(f"  {step + note:24}  {value:8.2f} s")
    megabytes = (result["bytes_up"] + result["bytes_down"]) / 1e6
    print(f"  on the wire, all sites    {megabytes:8.1f} MB")
    share = result["share_of_local_round"]
    print(f"  of a local round of {LOCAL_ROUND_S:.0f} s {share:8.1%}", flush=True)


if __name__ == "__main__":
    main()
