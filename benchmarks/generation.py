"""What clips of a CPGG are worth, against simulated hearts of patients it was not trained on.

Distances are relative: they rank rows of one table and compare with nothing else. `excess` is what
lies above the floor, which is the distance between two halves of the held-out hearts. Damaged
hearts show what a distance means.

    python benchmarks/generation.py --out benchmarks/results/generation.json

The hearts are drawn with a seed that the packaged weights were not trained with. Two minutes and a
half of CPU time with 48 hearts, of which half are on either side of a distance.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from fedcmr_shared.models.bundle import load_bundle
from fedcmr_shared.models.clips import clip_grid
from fedcmr_shared.models.cpgg import CPGG
from fedcmr_shared.models.segmenter import load_segmenter
from fedcmr_simulations.generator_evaluation import (
    GeneratorEvaluation,
    Obedience,
    evaluate_generator,
)
from fedcmr_simulations.generator_training import default_generator
from fedcmr_simulations.hearts import simulate_hearts

SEED = 20_261


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print one table; figures with three digits behind the point."""
    cells = [list(header)]
    cells += [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f"\n{title}")
    for row in cells:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


def show(found: GeneratorEvaluation) -> None:
    """Print everything that a person looks at first."""
    for each in found.distances:
        sets = [(name, c) for name, c in each.sets.items() if c is not None]
        rows = [
            (name, c.distance.frechet, c.floor.frechet, c.distance.kernel, c.unmeasured)
            for name, c in sets
        ]
        samples = sets[0][1].distance.samples
        header = ("clips", "Fréchet", "floor", "kernel", "no heart")
        table(f"{each.space}; {samples} samples", header, rows)
    table("Diversity (1 - MS-SSIM)", ("clips", "diversity"), found.diversity.items())
    table(
        "Guidance",
        ("guidance", "diversity", *(each.space.extractor for each in found.distances[:2])),
        (
            (
                each.guidance,
                each.diversity,
                *(c.distance.frechet if c else None for c in each.distances.values()),
            )
            for each in found.sweep
        ),
    )
    table(
        "Requested against measured",
        ("clips", "told", "guidance", "phenotype", "R2", "MAE", "bias", "samples"),
        (
            (row.clips, row.told or "-", _guidance(row), row.phenotype, *row.result)
            for row in found.obedience
            if row.result is not None
        ),
    )
    names = list(found.coherence)
    table(
        "Motion, mean and deviation",
        ("descriptor", *names),
        (
            (key, *("{:.2f} ± {:.2f}".format(*found.coherence[n].descriptors[key]) for n in names))
            for key in found.coherence[names[0]].descriptors
        ),
    )
    if found.distribution is not None:
        table(
            "Distribution of phenotypes, generated against held-out (Wasserstein, in deviations)",
            ("phenotype", "distance"),
            found.distribution.wasserstein.items(),
        )


def _guidance(row: Obedience) -> str:
    return "-" if row.guidance is None else f"{row.guidance:g}"


def main() -> None:
    """Evaluate the bundle, print tables and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=default_generator())
    parser.add_argument("--hearts", type=int, default=48)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()
    bundle = load_bundle(options.weights)
    if not isinstance(bundle.model, CPGG):
        raise SystemExit(f"{options.weights} holds no CPGG")
    grid = clip_grid(bundle.model.config)
    hearts = list(simulate_hearts(range(options.hearts), grid, SEED))
    found = evaluate_generator(bundle.model, hearts, load_segmenter())
    show(found)
    said = {
        "command": "python benchmarks/generation.py --out benchmarks/results/generation.json",
        "weights_sha256": bundle.sha256,
        "model": f"{bundle.spec.name} {bundle.spec.size}",
        "seed": SEED,
        "cpu_seconds": round(time.process_time() - began),
        **json.loads(found.to_json()),
    }
    if options.out is not None:
        options.out.write_text(json.dumps(said, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
