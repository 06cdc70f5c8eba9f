r"""What the memorisation gate finds on simulated hearts.

Copies: three groups of patients take turns as training, held-out and new patients. Clips of the
training patients, changed in several ways, play the synthetic ones; so do those of new patients,
which nobody copied.

Generators: the packaged starting weights, which saw none of these patients, and the same network
after its generator was trained on eight of the training patients alone, without privacy and for
much too long. Each draws as many clips as patients are held out, for phenotypes of training patients
as at a site: the starting weights of all, the over-trained one of its eight. The latter is examined
twice: against all training patients, of whom it knows eight, and against these eight.

Seconds are those of one thread's work.

    python benchmarks/memorisation.py copies --out benchmarks/results/memorisation.json
    python benchmarks/memorisation.py generators --out benchmarks/results/memorisation.json
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from clip_copies import noisy, turned

from fedcmr_shared.metrics.memorisation import Examination, Findings, GateConfig, compare, examine
from fedcmr_shared.models.bundle import load_bundle
from fedcmr_shared.models.copy_detector import train_detector
from fedcmr_shared.models.cpgg import CONFIGS, CPGG
from fedcmr_shared.models.masked_generator import draw
from fedcmr_simulations.generator_training import (
    PLAN,
    Hearts,
    default_generator,
    draw_clips,
    gather,
)
from fedcmr_simulations.progress import TerminalProgress

COMMAND = "python benchmarks/memorisation.py {} --out benchmarks/results/memorisation.json"
SEED = 77
MEMORISED = 8
RATE = 1e-3


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "exact": lambda clips: clips,
    "mirrored left and right": lambda clips: clips.flip(-1),
    "mirrored up and down": lambda clips: clips.flip(-2),
    "turned by 5 degrees": lambda clips: turned(clips, 5),
    "turned by -10 degrees": lambda clips: turned(clips, -10),
    "noise of deviation 0.1": lambda clips: noisy(clips, 0.1, SEED),
    "noise of deviation 0.2": lambda clips: noisy(clips, 0.2, SEED),
    "brightness and contrast": lambda clips: 0.7 * clips - 0.2,
    "begun a third of a beat later": lambda clips: torch.roll(clips, clips.shape[2] // 3, 2),
    "shifted by 1 pixel": lambda clips: torch.roll(clips, 1, -1),
    "shifted by 2 pixels": lambda clips: torch.roll(clips, 2, -1),
    "mirrored, turned by 8 degrees, noise 0.1": lambda clips: noisy(
        turned(clips.flip(-1), 8), 0.1, SEED
    ),
}


def told(found: Findings) -> dict[str, Any]:
    """Rounded findings."""
    result: dict[str, Any] = {"tau": round(found.tau, 4)}
    for name in ("training", "synthetic"):
        share, chance, interval = getattr(found, name)
        result[f"{name} share"] = round(share, 4)
        result[f"{name} chance"] = round(chance, 4)
        result[f"{name} excess, interval"] = [round(bound, 4) for bound in interval]
    for name in ("made", "held_out"):
        neighbours = getattr(found, name)._asdict().items()
        result.update({f"{name} {key}": round(value, 4) for key, value in neighbours})
    result["nearer to training"] = round(found.nearer_to_training, 4)
    return result


def copies(
    training: Tensor, held_out: Tensor, new: Tensor, config: GateConfig, seed: int
) -> dict[str, Any]:
    """Shares of changed training clips that are flagged, and what new patients give."""
    generator = torch.Generator().manual_seed(seed)
    start = time.process_time()
    detector = train_detector(training, config.detector, generator)
    seconds = time.process_time() - start
    known, others = detector.embed(training), detector.embed(held_out)

    def found(clips: Tensor) -> Findings:
        return compare(known, others, detector.embed(clips), config, generator)

    flagged = {name: found(change(training)).synthetic.share for name, change in CHANGES.items()}
    row = {
        "detector seconds": round(seconds, 1),
        "flagged": {name: round(share, 4) for name, share in flagged.items()},
        "new patients": told(found(new)),
    }
    print(json.dumps(row, indent=1), flush=True)
    return row


def over_trained(model: CPGG, hearts: Hearts, steps: int) -> CPGG:
    """Return a copy whose generator was trained on ``hearts`` alone."""
    model = copy.deepcopy(model)
    network = model.generator
    with torch.no_grad():
        latents = model.autoencoder.encode(hearts.clips[:, None]).mean
    conditions, _ = model.scale(hearts.phenotypes)
    optimiser = torch.optim.AdamW(network.parameters(), RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    generator = torch.Generator().manual_seed(SEED)
    for step in range(1, steps + 1):
        draws = draw(network.config, len(latents), generator)
        loss = network.loss(latents, conditions, draws).mean()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch is partly untyped
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 0:
            print(f"over-training, step {step}: loss {loss.item():.3f}", flush=True)
    return model


def part(hearts: Hearts, rows: slice) -> Hearts:
    return Hearts(hearts.clips[rows], hearts.phenotypes[rows], hearts.fac[rows])


def generators(
    model: CPGG, training: Hearts, held_out: Hearts, config: GateConfig, steps: int
) -> dict[str, Any]:
    few = part(training, slice(MEMORISED))
    count = len(held_out.clips)
    asked = few.phenotypes.repeat(-(-count // MEMORISED), 1)[:count]
    start = time.process_time()
    memorising = over_trained(model, few, steps)
    seconds = time.process_time() - start
    honest_clips = draw_clips(model, training.phenotypes, PLAN, SEED)  # as sites do
    copied_clips = draw_clips(memorising, asked, PLAN, SEED)
    result: dict[str, Any] = {"over-training": {"steps": steps, "seconds": round(seconds, 1)}}
    for name, patients, clips in (
        ("starting weights, all training patients", training, honest_clips),
        ("over-trained, all training patients", training, copied_clips),
        ("over-trained, the eight patients", few, copied_clips),
    ):
        start = time.process_time()
        examination = examined(patients, held_out, clips, config)
        row = {
            "outcome": examination.outcome,
            "seconds": round(time.process_time() - start, 1),
            "text": examination.text,
            "plain copies found": examination.found,
        }
        if examination.findings is not None:
            row.update(told(examination.findings))
        result[name] = row
        print(name, json.dumps(row, indent=1), flush=True)
    return result


def examined(training: Hearts, held_out: Hearts, clips: Tensor, config: GateConfig) -> Examination:
    generator = torch.Generator().manual_seed(SEED)
    batches = (training.clips[:, None], held_out.clips[:, None], clips[:, None])
    return examine(*batches, config, generator)


def all_copies(patients: int) -> dict[str, Any]:
    """Copies and new patients, the three groups in each role once."""
    clips = gathered(CPGG(CONFIGS["tiny"]), 3 * patients).clips[:, None]
    first, second, third = torch.split(clips, patients)
    turns = ((first, second, third), (second, third, first), (third, first, second))
    rows = [copies(*turn, GateConfig(), SEED + i) for i, turn in enumerate(turns)]
    return {"patients in each group": patients, "turns": rows}


def all_generators(patients: int, steps: int, weights: Path) -> dict[str, Any]:
    bundle = load_bundle(weights)
    if not isinstance(bundle.model, CPGG):
        raise SystemExit(f"{weights} holds no CPGG")
    hearts = gathered(bundle.model, 2 * patients)
    training, held_out = (part(hearts, slice(start, start + patients)) for start in (0, patients))
    rows = generators(bundle.model, training, held_out, GateConfig(), steps)
    return {"patients in each group": patients, "weights_sha256": bundle.sha256, **rows}


def gathered(model: CPGG, count: int) -> Hearts:
    return gather(model, range(count), SEED, TerminalProgress())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("copies", "generators"))
    parser.add_argument("--patients", type=int, default=60, help="In each group.")
    parser.add_argument("--steps", type=int, default=2000, help="Of over-training.")
    parser.add_argument("--weights", type=Path, default=default_generator())
    parser.add_argument("--out", type=Path, default=None, help="The other part in it stays.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.part == "copies":
        rows = all_copies(options.patients)
    else:
        rows = all_generators(options.patients, options.steps, options.weights)
    if options.out is not None:
        known = json.loads(options.out.read_text()) if options.out.exists() else {}
        known[options.part] = {"command": COMMAND.format(options.part), **rows}
        options.out.write_text(json.dumps(known, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
