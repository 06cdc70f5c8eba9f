"""How well the packaged segmenter does on hearts that it was not trained on.

Simulated: patients of the external centres, whose scanners it has not seen; phenotypes of their
whole stacks against those counted in the true labels. Real: the held-out Sunnybrook patients,
Dice with the expert contours and the ejection fraction from the contoured slices. Means are taken
over a patient's images first and over patients then. The experts drew no RV: on real images the RV
is not measured here. Ejection fractions use only slices contoured in both frames or one of them, as
the experts' do.

    python benchmarks/segmenter.py --contours FOLDER [--weights FILE] [--out FILE]

FOLDER holds the contoured images (``*.npz``), for example of the Sunnybrook Cardiac Data.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedcmr_shared.kspace.coils import remove_readout_oversampling, rss
from fedcmr_shared.kspace.fourier import ifft2c
from fedcmr_shared.metrics.phenotypes.measurement import measure
from fedcmr_shared.metrics.phenotypes.short_axis import ShortAxis, Spacing
from fedcmr_shared.models.segmenter import CLASSES, Segmenter, load_segmenter, segment
from fedcmr_simulations.centres import EXTERNAL_CENTRES
from fedcmr_simulations.phantom.patient import PROFILES, draw_patient
from fedcmr_simulations.phantom.protocol import protocol
from fedcmr_simulations.phantom.scan import Scan
from fedcmr_simulations.segmenter_training import HELD_OUT, Example, contoured, simulated

SEED = 1
MEASURED = ("LVEDV", "LVESV", "LVEF", "LVM", "RVEDV", "RVESV", "RVEF", "WT Global")
Scores = dict[str, dict[str, float]]


def dice(first: np.ndarray, second: np.ndarray) -> float:
    return float(2 * (first & second).sum() / max(int(first.sum() + second.sum()), 1))


def overlaps(model: Segmenter, examples: Iterable[Example]) -> Scores:
    """Dice by tissue and frame; images without the tissue or its contour do not count."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for example in examples:
        labels = segment(model, example.image, example.spacing_mm)
        for number, tissue in enumerate(CLASSES[1:], start=1):
            truth = example.codes == number
            if truth.sum() >= 10:
                row = found[f"{tissue} {example.frame}"]
                row[example.patient].append(dice(labels == number, truth))
    return {tissue: summary(rows.values()) for tissue, rows in sorted(found.items())}


def summary(patients: Iterable[Sequence[float]]) -> dict[str, float]:
    means = [statistics.fmean(values) for values in patients]
    return {
        "patients": len(means),
        "mean": round(statistics.fmean(means), 4),
        "worst": round(min(means), 4),
    }


def fractions(model: Segmenter, examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Ejection fraction of each real patient from the experts' slices and from the network."""
    rows = []
    for patient in sorted({example.patient for example in examples}):
        areas: dict[str, int] = defaultdict(int)
        for example in examples:
            if example.patient == patient:
                labels = segment(model, example.image, example.spacing_mm)
                areas[f"expert {example.frame}"] += int((example.codes == 1).sum())
                areas[f"network {example.frame}"] += int((labels == 1).sum())
        ef = {who: 100 * (1 - areas[f"{who} ES"] / areas[f"{who} ED"]) for who in WHO}
        rows.append({"patient": patient, **{who: round(value, 1) for who, value in ef.items()}})
    return rows


WHO = ("expert", "network")


def stack_errors(model: Segmenter, patients: int) -> dict[str, Any]:
    """Phenotypes of whole simulated stacks: network against true labels on the same grid."""
    pairs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    missing = 0
    for index in range(patients):
        scan = whole_scan(index)
        truth = scan.truth().labels
        assert truth is not None
        grid = scan.scanner.grid
        images = np.zeros(truth.shape, np.float32)
        for frame, place, kspace in scan.images():
            cropped = remove_readout_oversampling(torch.from_numpy(kspace), grid.oversampling)
            images[frame, place] = rss(ifft2c(cropped)).numpy()
        spacing = Spacing(*grid.spacing, scan.scanner.slice_pitch_mm)
        expected = measure(ShortAxis(truth, spacing))
        found = measure(ShortAxis(segment(model, images, grid.spacing), spacing))
        missing += any(name not in found for name in MEASURED if name in expected)
        for name in MEASURED:
            if name in found and name in expected:
                pairs[name].append((expected[name], found[name]))
    return {
        "patients": patients,
        "with_a_missing_phenotype": missing,
        **{
            name: {
                "mean_truth": round(statistics.fmean(a for a, _ in values), 2),
                "mean_error": round(statistics.fmean(b - a for a, b in values), 2),
                "mean_absolute_error": round(statistics.fmean(abs(b - a) for a, b in values), 2),
            }
            for name, values in pairs.items()
        },
    }


def whole_scan(index: int) -> Scan:
    rng = np.random.default_rng([SEED, 29, index])
    centre = EXTERNAL_CENTRES[index % len(EXTERNAL_CENTRES)]
    patient = draw_patient(f"simulated-{index}", sorted(PROFILES)[index % len(PROFILES)], rng)
    scanner = centre.equipment("quick")
    scanner = replace(scanner, array=replace(scanner.array, coils=4, front=2))
    sequence = protocol("cine", "standard", centre.field_strength_t)
    top = patient.heart.at(0).base - scanner.slice_pitch_mm / 2
    heights = tuple(float(z) for z in np.arange(top, 0, -scanner.slice_pitch_mm))
    sequence = replace(sequence, phases=(0.0, 0.35))
    return Scan(patient, scanner, sequence, heights, (SEED, 29, index))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contours", type=Path, required=True)
    parser.add_argument("--weights", type=Path, default=None)
    parser.add_argument("--patients", type=int, default=12, help="Simulated ones of each kind.")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load_segmenter(options.weights)
    real = list(contoured(options.contours))
    held_out = [example for example in real if example.patient in HELD_OUT]
    trained = [example for example in real if example.patient not in HELD_OUT]
    rows = fractions(loaded.model, held_out)
    result = {
        "command": "python benchmarks/segmenter.py --contours contoured_png8 "
        "--out benchmarks/results/segmenter.json",
        "weights_sha256": loaded.sha256,
        "dice_simulated_held_out": overlaps(
            loaded.model, simulated(EXTERNAL_CENTRES, 3 * options.patients, SEED)
        ),
        "dice_real_held_out": overlaps(loaded.model, held_out),
        "dice_real_trained_on": overlaps(loaded.model, trained),
        "phenotypes_simulated_held_out": stack_errors(loaded.model, options.patients),
        "lvef_real_held_out": rows,
        "lvef_real_held_out_mean_absolute_error": round(
            statistics.fmean(abs(row["network"] - row["expert"]) for row in rows), 2
        ),
    }
    text = json.dumps(result, indent=2, ensure_ascii=False)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
