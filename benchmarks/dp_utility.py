"""What patient-level privacy costs: PSNR against epsilon for full and partial training.

Four virtual hospitals fine-tune the packaged starting weights, which have never seen their
vendors, fields or contrasts. Each draws its own patients and adds its own noise, as in a real
federation, with the trainers that sites use; only Flower's messages between them are left out. The
rows differ in the budget and in the part of the network that is trained. Without privacy (epsilon
inf) a step takes the same number of images exactly.

*gain* is the mean PSNR over test patients minus that of the starting weights on the same images,
with a 95 % bootstrap interval over patients, drawn within sites. *recovered* is the gain divided
by the larger of the two gains without privacy. *alone* trains each hospital by itself, without
noise, from the same weights. Epsilon is what the filter of a ledger made for this budget certifies.

The settings were chosen on simulated patients of another seed: searching among a hospital's own
patients would be a release, too.

    python benchmarks/dp_utility.py [--quick] [--sites FOLDER] [--out FILE]

`--sites` takes site stores that exist (`fedcmr simulate partition`) in place of the phantom.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedcmr_client.dataset import all_images
from fedcmr_client.objectives import ReconstructionObjective
from fedcmr_client.objectives.choice import load_encoder
from fedcmr_client.private_trainer import PrivateTrainer
from fedcmr_client.store.site_store import ScanRecord, SiteStore
from fedcmr_client.store.split import Split
from fedcmr_client.trainer import Trainer, change_since, trained_values
from fedcmr_server.optimisers import ServerOptimiser, weighted_mean
from fedcmr_shared.kspace.masks import Sampling
from fedcmr_shared.models.bundle import load_bundle
from fedcmr_shared.models.cardiomm import CardioMM
from fedcmr_shared.models.registry import build_model
from fedcmr_shared.privacy.accounting import best_order, figures
from fedcmr_shared.privacy.budget import phases_of
from fedcmr_shared.privacy.parts import trainable_names
from fedcmr_shared.privacy.planning import Allowance, noise_multiplier_for
from fedcmr_shared.schemas.job import JobSpec, Part, SamplingSpec, TrainingSpec
from fedcmr_shared.schemas.privacy import EvaluationSpec, PrivacySpec
from fedcmr_simulations.config import PhantomSpec
from fedcmr_simulations.evaluation import Method, NetworkReconstructor, evaluate, zero_filled
from fedcmr_simulations.pretraining import default_start
from fedcmr_simulations.site_work import PhantomSite, simulate_site, without_privacy
from fedcmr_simulations.sites import site_folders

State = Mapping[str, Tensor]
Scores = dict[str, dict[str, float]]
"""PSNR in dB by site and patient."""

DELTA = 1e-5
EPSILONS = (1.0, 3.0, 8.0, math.inf)
SAMPLING = SamplingSpec(patterns=("uniform",), accelerations=(8.0,), acs_lines=16)
PHANTOM = PhantomSpec(patients=800, detail="small", train=0.75, validation=0.05, test=0.2)
QUICK = PhantomSpec(patients=40, detail="small", train=0.75, validation=0.05, test=0.2)
ROUNDS, LOCAL_STEPS, SAMPLING_RATE = 3, 4, 0.2
BOOTSTRAPS = 2000


@dataclass(frozen=True)
class Choice:
    """Settings of a part: clip norm and learning rate."""

    clip_norm: float
    learning_rate: float


CHOICES: dict[Part, Choice] = {
    "full": Choice(clip_norm=0.025, learning_rate=8e-3),
    "adapters": Choice(clip_norm=0.015, learning_rate=8e-3),
}


@dataclass(frozen=True)
class Row:
    """One line of the result."""

    part: str
    epsilon: float
    pld_epsilon: float
    noise_multiplier: float
    trained_parameters: int
    psnr: float
    gain: float
    gain_low: float
    gain_high: float
    seconds: float


@dataclass(frozen=True)
class Work:
    """Training of one site: ``rounds`` rounds of ``job`` in one go, from ``state``."""

    store: Path
    job: JobSpec
    first_round: int
    rounds: int
    state: State


def make_job(part: Part, epsilon: float, patients: int) -> JobSpec:
    """Return the job of a row for sites of about ``patients`` training patients."""
    choice, noise = CHOICES[part], 1.0
    if math.isfinite(epsilon):
        allowance = Allowance(epsilon, DELTA, best_order(epsilon, DELTA))
        noise = noise_multiplier_for(
            allowance, sampling_rate=SAMPLING_RATE, local_steps=LOCAL_STEPS, starts=ROUNDS
        )
    job = JobSpec(
        name="utility",
        rounds=ROUNDS,
        sampling=SAMPLING,
        training=TrainingSpec(
            part=part,
            local_steps=LOCAL_STEPS,
            optimiser="adam",
            learning_rate=choice.learning_rate,
            warmup_steps=2,
        ),
        privacy=PrivacySpec(
            delta=DELTA,
            cohort_size=patients,
            sampling_rate=SAMPLING_RATE,
            noise_multiplier=noise,
            clip_norm=choice.clip_norm,
            spare_rounds=0,
            evaluation=EvaluationSpec(rounds="none"),
        ),
    )
    return job if math.isfinite(epsilon) else without_privacy(job, "")


def records(store: Path, part: Split) -> list[ScanRecord]:
    with SiteStore.open(store) as opened:
        return opened.scans(part)


def network(job: JobSpec, state: State) -> CardioMM:
    model = build_model(job.model)
    assert isinstance(model, CardioMM)
    model.load_state_dict(dict(state))
    return model


def train(work: Work) -> dict[str, Tensor]:
    """Return a site's update."""
    job = work.job
    model = network(job, work.state)
    scans, encoder, site = records(work.store, "train"), load_encoder(job), work.store.name
    trainer = (
        Trainer(model, job, scans, encoder, site=site)
        if job.privacy is None
        else PrivateTrainer(model, job, scans, ReconstructionObjective(job, encoder), site=site)
    )
    before = trained_values(model)
    steps = job.training.local_steps
    trainer.run((work.first_round - 1) * steps, work.rounds * steps)
    return change_since(before, model)


def federate(job: JobSpec, start: State, stores: Sequence[Path], pool: Executor) -> State:
    """Return the state after all rounds of FedAvg with equal weights."""
    names = trainable_names(job.model, build_model(job.model), job.training.part)
    optimiser = ServerOptimiser(job.server_optimiser, {name: start[name] for name in names})
    state = dict(start)
    for number in range(1, job.rounds + 1):
        works = [Work(store, job, number, 1, state) for store in stores]
        updates = {w.store.name: u for w, u in zip(works, pool.map(train, works), strict=True)}
        optimiser.apply(weighted_mean(updates, dict.fromkeys(updates, 1.0)))
        state |= {name: value.clone() for name, value in optimiser.parameters.items()}
    return state


def psnr_of_patients(task: tuple[Path, JobSpec, State | None]) -> dict[str, float]:
    """Return the mean PSNR of each test patient of a site; zero-filled without a state."""
    store, job, state = task
    method: Method = zero_filled
    if state is not None:
        method = NetworkReconstructor(network(job, state), load_encoder(job))
    sampling = Sampling(SAMPLING.patterns[0], SAMPLING.accelerations[0], SAMPLING.acs_lines)
    by_patient: dict[str, list[float]] = {}
    images = all_images(records(store, "test"))
    for row in evaluate(store.name, images, [sampling], {"it": method}, seed=0):
        by_patient.setdefault(row.patient, []).append(row.psnr)
    return {patient: statistics.fmean(values) for patient, values in by_patient.items()}


def score(
    states: Mapping[Path, State | None], stores: Sequence[Path], job: JobSpec, pool: Executor
) -> Scores:
    tasks = [(store, job, states[store]) for store in stores]
    return {t[0].name: s for t, s in zip(tasks, pool.map(psnr_of_patients, tasks), strict=True)}


def mean(scores: Scores) -> float:
    return statistics.fmean(statistics.fmean(site.values()) for site in scores.values())


def interval(scores: Scores, base: Scores) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean gain; patients are drawn within sites."""
    generator = np.random.default_rng(0)
    total = np.zeros(BOOTSTRAPS)
    for site, own in scores.items():
        gains = np.array([value - base[site][patient] for patient, value in own.items()])
        total += gains[generator.integers(len(gains), size=(BOOTSTRAPS, len(gains)))].mean(1)
    low, high = np.quantile(total / len(scores), [0.025, 0.975])
    return float(low), float(high)


def make_row(
    part: str, budget: float, job: JobSpec, scores: Scores, base: Scores, started: float
) -> Row:
    epsilon = pld = math.inf
    noise = 0.0
    if job.privacy is not None:
        release, starts = phases_of(job)["train"]
        spent = figures({release: starts}, best_order(budget, DELTA), DELTA)
        epsilon, pld, noise = spent.filter_epsilon, spent.pld_epsilon, job.privacy.noise_multiplier
    names = trainable_names(job.model, build_model(job.model), job.training.part)
    sizes = {name: p.numel() for name, p in build_model(job.model).named_parameters()}
    low, high = interval(scores, base)
    return Row(
        part=part,
        epsilon=epsilon,
        pld_epsilon=pld,
        noise_multiplier=noise,
        trained_parameters=sum(sizes[name] for name in names),
        psnr=mean(scores),
        gain=mean(scores) - mean(base),
        gain_low=low,
        gain_high=high,
        seconds=time.monotonic() - started,
    )


@contextmanager
def workers() -> Iterator[Executor]:
    os.environ["OMP_NUM_THREADS"] = "1"
    context = get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context, initializer=one_thread) as pool:
        yield pool


def one_thread() -> None:
    torch.set_num_threads(1)


def study(stores: Sequence[Path], patients: int, pool: Executor) -> dict[str, Any]:
    """Return all rows and the scores that they are compared with."""
    start = dict(load_bundle(default_start()).model.state_dict())
    plain = make_job("full", math.inf, patients)
    everywhere: dict[Path, State | None] = dict.fromkeys(stores, start)
    base = score(everywhere, stores, plain, pool)
    rows = []
    for part in CHOICES:
        for epsilon in EPSILONS:
            started = time.monotonic()
            job = make_job(part, epsilon, patients)
            state = federate(job, start, stores, pool)
            scores = score(dict.fromkeys(stores, state), stores, job, pool)
            rows.append(make_row(part, epsilon, job, scores, base, started))
            print(line(rows[-1]), flush=True)
    rows.append(train_alone(plain, start, stores, base, pool))
    print(line(rows[-1]), flush=True)
    return {
        "zero_filled_psnr": mean(score(dict.fromkeys(stores), stores, plain, pool)),
        "start_psnr": mean(base),
        "rows": [asdict(row) for row in rows],
        **verdict(rows),
    }


def train_alone(
    job: JobSpec, start: State, stores: Sequence[Path], base: Scores, pool: Executor
) -> Row:
    """Return the row of hospitals that train alone, without noise."""
    started = time.monotonic()
    works = [Work(store, job, 1, job.rounds, start) for store in stores]
    states: dict[Path, State | None] = {
        work.store: {**start, **{name: start[name] + u for name, u in update.items()}}
        for work, update in zip(works, pool.map(train, works), strict=True)
    }
    return make_row("alone", math.inf, job, score(states, stores, job, pool), base, started)


def verdict(rows: Sequence[Row]) -> dict[str, Any]:
    """Return what the study is about: the best private row at epsilon 8 against the others."""
    open_rows = [row for row in rows if math.isinf(row.epsilon)]
    without = max((row for row in open_rows if row.part != "alone"), key=lambda row: row.gain)
    alone = next(row for row in open_rows if row.part == "alone")
    private = [row for row in rows if 3 < row.epsilon <= 8]
    best = max(private, key=lambda row: row.gain)
    return {
        "best_part_at_8": best.part,
        "gain_at_8": best.gain,
        "interval_above_zero": best.gain_low > 0,
        "recovered": best.gain / without.gain,
        "gain_alone": alone.gain,
        "above_alone": best.gain > alone.gain,
    }


def line(row: Row) -> str:
    return (
        f"{row.part:9} epsilon {row.epsilon:6.2f} (PLD {row.pld_epsilon:6.2f})  "
        f"sigma {row.noise_multiplier:6.3f}  {row.trained_parameters:7,} trained  "
        f"PSNR {row.psnr:6.2f} dB  gain {row.gain:+.2f} [{row.gain_low:+.2f}, {row.gain_high:+.2f}]"
        f"  {row.seconds:5.0f} s"
    )


def make_stores(folder: Path, spec: PhantomSpec, pool: Executor) -> list[Path]:
    list(pool.map(simulate_site, [PhantomSite(folder, n, 20, spec) for n in range(4)]))
    return site_folders(folder)


def training_patients(stores: Sequence[Path]) -> int:
    """The coarse cohort size: the mean number of training patients, to one digit."""
    count = statistics.fmean(len({r.patient for r in records(s, "train")}) for s in stores)
    power = 10 ** int(math.log10(count))
    return max(10, round(count / power) * power)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the patients")
    parser.add_argument("--sites", type=Path, help="folder of site stores")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, workers() as pool:
        stores = (
            site_folders(options.sites)
            if options.sites
            else make_stores(Path(scratch), QUICK if options.quick else PHANTOM, pool)
        )
        patients = training_patients(stores)
        print(f"{len(stores)} sites of about {patients} training patients", flush=True)
        result = study(stores, patients, pool)
    result |= {
        "command": " ".join(["python", *sys.argv]),
        "cohort_size": patients,
        "rounds": ROUNDS,
        "local_steps": LOCAL_STEPS,
        "sampling_rate": SAMPLING_RATE,
        "delta": DELTA,
        "relation": "zero-out",
        "unit": "patient",
        "seconds": time.monotonic() - started,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("fedcmr", "torch", "dp-accounting")},
    }
    print(
        f"at epsilon 8, {result['best_part_at_8']} gains {result['gain_at_8']:+.2f} dB: "
        f"{result['recovered']:.0%} of the gain without privacy (goal 60 %), "
        f"{'above' if result['above_alone'] else 'below'} training alone without noise "
        f"({result['gain_alone']:+.2f} dB); {result['seconds']:.0f} s"
    )
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
