"""Overhead of a federated round over a bare PyTorch loop that does the same work.

Both train CardioMM `tiny` on the same phantom site with the same sampler, losses and optimiser.
The federated side runs one round over Flower's simulation engine with one site; the bare side is
the plain loop of forward, backward and step. The round's cost beyond its steps (messages, model
hashes, checkpoint, the process that Flower starts) hardly depends on the number of steps, so it is
measured once and set against a local round of five minutes.

    python benchmarks/federation_overhead.py [--steps 150]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from fedcmr_client.store.site_store import ScanRecord, SiteStore
from fedcmr_client.trainer import Trainer
from fedcmr_server.run_folder import RunFolder
from fedcmr_shared.models.cardiomm import CardioMM
from fedcmr_shared.models.registry import build_model
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.text.encoders import CachedTextEncoder, load_text_encoder
from fedcmr_simulations.centres import simulate_centres
from fedcmr_simulations.config import load_config
from fedcmr_simulations.flower_engine import flower_process

LOCAL_ROUND_S = 300.0


def bare_loop(job: JobSpec, records: list[ScanRecord], name: str) -> float:
    """Seconds of the job's local steps in this process, without any federation."""
    torch.set_num_threads(1)
    torch.manual_seed(job.seed)
    model = build_model(job.model)
    assert isinstance(model, CardioMM)
    encoder = CachedTextEncoder(load_text_encoder(job.model.text_encoder))
    trainer = Trainer(model, job, records, encoder, site=name)
    trainer.run(0, 5)
    started = time.perf_counter()
    trainer.run(0, job.training.local_steps)
    return time.perf_counter() - started


def federated_round(job: JobSpec, store: Path, out: Path) -> float:
    """Seconds of one round as the server sees it, without evaluation and engine start."""
    folder = RunFolder.create(out, job)
    with flower_process(folder.root, [store], workers=1) as process:
        process.wait()
    rounds = [event for event in folder.events() if event["event"] == "round"]
    # The first round also loads the text encoder; the second is like all later ones.
    return float(rounds[-1]["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    steps = parser.parse_args().steps
    job = load_config(None).job
    training = job.training.model_copy(update={"local_steps": steps})
    alone = {"minimum_sites": 1, "aggregation": "plain_with_local_dp"}
    job = job.model_copy(update={"training": training, "rounds": 2, **alone})
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        simulate_centres(root / "sites", 1, 8, seed=0, detail="quick")
        (store,) = (root / "sites").iterdir()
        with SiteStore.open(store) as opened:
            records = opened.scans("train")
        bare = bare_loop(job, records, store.name)
        federated = federated_round(job, store, root / "run")
    overhead = federated - bare
    print(f"bare PyTorch loop, {steps} steps:      {bare:8.2f} s")
    print(f"federated round, same steps:       {federated:8.2f} s  (ratio {federated / bare:.3f})")
    print(f"overhead per round:                {overhead:8.2f} s")
    print(
        f"share of a local round of {LOCAL_ROUND_S:.0f} s: {overhead / LOCAL_ROUND_S:8.2%}  (limit 10 %)"
    )


if __name__ == "__main__":
    main()
