"""Does it help a small network on real hearts to be trained on generated ones as well?

The task: from one mid-ventricular slice at end diastole and end systole tell the patient's group
(healthy, hypertrophy, heart failure without and with infarct) and ejection fraction. Real: 30
patients of the Sunnybrook Cardiac Data (CC0 1.0; Radau et al., The MIDAS Journal, 2009), their three
middle contoured slices, expert ejection fractions. Generated: clips of a CPGG that has seen
simulated hearts only, asked for volumes and mass drawn around the groups' published means; no
patient stands behind them. To one real training patient come k generated ones.

Cross-validated by patient, so every patient is tested once for each seed; the network, its number of
steps and its batches are those of every row. With k generated patients to a real one, real images
are therefore seen k + 1 times less often than alone. Both kinds of images have 3 mm pixels, the LV in the
middle, and brightness in units of their own 99.5 percentile. Expert contours place the real ones.
The group means are over all patients, those tested included, and the pixel size of the real images
is assumed (1.35 mm).

    python benchmarks/mixing.py --data FOLDER --out benchmarks/results/mixing.json

FOLDER is that of the Sunnybrook data (index.csv, contoured_png8).
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fedcmr_shared.metrics.phenotypes.table import NAMES, PhenotypeTable
from fedcmr_shared.models.bundle import load_bundle
from fedcmr_shared.models.clips import ClipGrid, clip_grid, make_clip
from fedcmr_shared.models.cpgg import CPGG
from fedcmr_simulations.generator_training import PLAN, default_generator, draw_clips
from fedcmr_simulations.phantom.motion import END_SYSTOLE
from fedcmr_simulations.segmenter_training import SUNNYBROOK_PIXEL_MM

SEED = 0
RATIOS = (0, 1, 2, 5, 10)
FOLDS = 5
STEPS = 240
BATCH = 24


class Group(NamedTuple):
    """Mean and deviation of LVEDV (mL), LVEF (%) and LVM (g) in a group.

    Means are those of the data's own page; where it states no deviation, a quarter of the mean.
    """

    edv: tuple[float, float]
    ef: tuple[float, float]
    mass: tuple[float, float]


GROUPS = {
    "N": Group((115.7, 36.9), (62.9, 3.7), (130.3, 32.7)),
    "HYP": Group((114.4, 28.6), (62.7, 3.7), (175.9, 85.7)),
    "HF": Group((233.7, 63.2), (33.1, 13.1), (193.7, 48.4)),
    "HF-I": Group((244.9, 86.0), (32.0, 12.3), (201.3, 50.3)),
}


@dataclass(frozen=True, eq=False)
class Images:
    """Pairs of images ``[image, 2, y, x]``, their patient, group (number) and ejection fraction."""

    pairs: Tensor
    patient: NDArray[np.int64]
    group: NDArray[np.int64]
    ef: NDArray[np.float64]

    @property
    def firsts(self) -> NDArray[np.int64]:
        """Place of the first image of each patient, in the order of their numbers."""
        return np.asarray(np.unique(self.patient, return_index=True)[1])

    def of(self, patients: Sequence[int]) -> Images:
        """Return those of ``patients``."""
        kept = np.isin(self.patient, patients)
        return Images(
            self.pairs[torch.from_numpy(kept)], self.patient[kept], self.group[kept], self.ef[kept]
        )

    def joined(self, other: Images) -> Images:
        """Return these and the other images."""
        return Images(
            torch.cat([self.pairs, other.pairs]),
            np.concatenate([self.patient, other.patient]),
            np.concatenate([self.group, other.group]),
            np.concatenate([self.ef, other.ef]),
        )


def alike(pairs: NDArray[np.floating]) -> Tensor:
    """Give images ``[n, 2, y, x]`` the brightness of their own: 99.5 percentile to 1, 0.5 to 0."""
    low, high = np.percentile(pairs, (0.5, 99.5), axis=(2, 3), keepdims=True)
    return torch.from_numpy(((pairs - low) / (high - low)).clip(0, 1).astype(np.float32))


def real_images(data: Path, grid: ClipGrid) -> Images:
    """The middle three slices that are contoured at end diastole and end systole."""
    with (data / "index.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["kind"] == "png8"]
    pairs, patients, groups, fractions = [], [], [], []
    two = ClipGrid(2, grid.rows, grid.columns, grid.pixel_mm)
    spacing = (SUNNYBROOK_PIXEL_MM, SUNNYBROOK_PIXEL_MM)
    for number, row in enumerate(rows):
        with np.load(data / "contoured_png8" / f"{row['patient']}.npz") as file:
            arrays = {name: file[name] for name in file.files}
        for images, centre in middle_slices(arrays):
            pairs.append(make_clip(images, (0.0, 0.5), spacing, centre, two))
            patients.append(number)
            groups.append(list(GROUPS).index(row["group"]))
            fractions.append(float(row["EF"]))
    return Images(alike(np.stack(pairs)), *map(np.array, (patients, groups, fractions)))


def middle_slices(
    arrays: dict[str, Any],
) -> list[tuple[NDArray[np.float64], tuple[float, float]]]:
    """(ED and ES image, middle of the cavity at ED) of three slices."""
    places: dict[int, dict[int, int]] = {}
    for index, key in enumerate(zip(arrays["slice_guess"], arrays["frame_guess"], strict=True)):
        places.setdefault(int(key[0]), {})[int(key[1])] = index
    diastole, systole = int(arrays["ed_frame"]), int(arrays["es_frame"])
    both = [p for _, p in sorted(places.items()) if diastole in p and systole in p]
    start = max((len(both) - 3) // 2, 0)
    found = []
    for place in both[start : start + 3]:
        images = arrays["image"][[place[diastole], place[systole]]].astype(np.float64)
        y, x = np.argwhere(arrays["endo_mask"][place[diastole]] > 0).mean(axis=0)
        found.append((images, (float(y), float(x))))
    return found


def generated_images(model: CPGG, count: int) -> Images:
    """``count`` clips for patients of the groups in turn; end systole is where the phantom has it."""
    rng = np.random.default_rng(SEED)
    groups = np.arange(count) % len(GROUPS)
    asked = [request(list(GROUPS.values())[group], rng) for group in groups]
    names = model.config.standardisation.names
    rows = torch.from_numpy(PhenotypeTable.of(asked, NAMES).select(names).values)
    clips = draw_clips(model, rows, PLAN, SEED).numpy()
    pairs = clips[:, [0, round(END_SYSTOLE * clips.shape[1])]]
    ef = np.array([row["LVEF"] for row in asked])
    return Images(alike(pairs), -1 - np.arange(count), groups, ef)


def request(group: Group, rng: np.random.Generator) -> dict[str, float]:
    """Phenotypes of a patient; what hangs together does, and the RV ejects as much as the LV."""
    edv = float(np.clip(rng.normal(*group.edv), 70, 370))
    ef = float(np.clip(rng.normal(*group.ef), 13, 77))
    mass = float(np.clip(rng.normal(*group.mass), 60, 330))
    stroke, rv_ef = edv * ef / 100, 52.0
    rv_edv = float(np.clip(100 * stroke / rv_ef, 50, 330))
    return {
        "LVEDV": edv,
        "LVESV": edv - stroke,
        "LVSV": stroke,
        "LVEF": ef,
        "LVCO": stroke * 70 / 1000,
        "LVM": mass,
        "RVEDV": rv_edv,
        "RVESV": rv_edv * (1 - rv_ef / 100),
        "RVSV": rv_edv * rv_ef / 100,
        "RVEF": rv_ef,
    }


def network() -> nn.Module:
    """Pairs to four group scores and the ejection fraction in units of 100 %."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((2, 16), (16, 24), (24, 32)):
        layers += [
            nn.Conv2d(inputs, outputs, 3, stride=2, padding=1),
            nn.GroupNorm(4, outputs),
            nn.SiLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 5))


def moved(pairs: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, shift and scale each pair a little, and change its contrast."""
    n = len(pairs)
    draws = torch.randn(n, 5, generator=generator)
    angle, zoom = 0.3 * draws[:, 0], torch.exp(0.08 * draws[:, 1])
    cosine, sine = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    shift = 0.06 * draws[:, 2:4]
    theta = torch.stack(
        [torch.stack([cosine, -sine, shift[:, 0]], 1), torch.stack([sine, cosine, shift[:, 1]], 1)],
        1,
    )
    grid = F.affine_grid(theta, list(pairs.shape), align_corners=False)
    seen = F.grid_sample(pairs, grid, align_corners=False)
    return seen.clamp_min(1e-3) ** torch.exp(0.25 * draws[:, 4])[:, None, None, None]


def trained(images: Images, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = network()
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=STEPS)
    groups = torch.from_numpy(images.group)
    fractions = torch.from_numpy(images.ef / 100).float()
    for _ in range(STEPS):
        some = torch.randint(len(groups), (BATCH,), generator=generator)
        found = model(moved(images.pairs[some], generator))
        loss = F.cross_entropy(found[:, :4], groups[some])
        loss = loss + 20 * F.mse_loss(found[:, 4], fractions[some])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch is partly untyped
        optimiser.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def predict(model: nn.Module, images: Images) -> dict[int, tuple[NDArray[np.float64], float]]:
    """Group probabilities and ejection fraction (%) of each patient: means over its slices."""
    found = model(images.pairs).double()
    shares, ef = found[:, :4].softmax(1).numpy(), 100 * found[:, 4].numpy()
    return {
        int(each): (
            shares[images.patient == each].mean(0),
            float(ef[images.patient == each].mean()),
        )
        for each in np.unique(images.patient)
    }


def folds(real: Images, seed: int) -> list[list[int]]:
    """Patients in five parts, each with every group."""
    rng = np.random.default_rng([SEED, seed])
    parts: list[list[int]] = [[] for _ in range(FOLDS)]
    place = 0
    for group in range(len(GROUPS)):
        for patient in rng.permutation(np.unique(real.patient[real.group == group])):
            parts[place % FOLDS].append(int(patient))
            place += 1
    return parts


@dataclass(frozen=True)
class Row:
    """One way to train; ``ratio`` generated patients come to one real one."""

    name: str
    ratio: int
    real: bool = True
    wrong_labels: bool = False


ROWS = (
    *(Row("real" if k == 0 else f"real + {k} x generated", k) for k in RATIOS),
    Row("10 x generated alone", 10, real=False),
    Row("real + 10 x generated, labels mixed up", 10, wrong_labels=True),
)


def training_images(row: Row, real: Images, made: Images, seed: int) -> Images:
    """Repeat what is rarer in images a patient, so that the ratio is one of patients."""
    count = row.ratio * len(np.unique(real.patient))
    if not count:
        return real
    chosen = made.of(made.patient[:count].tolist())
    if row.wrong_labels:
        order = np.random.default_rng(seed).permutation(count)
        chosen = Images(chosen.pairs, chosen.patient, chosen.group[order], chosen.ef[order])
    if not row.real:
        return chosen
    result = real
    for _ in range(round(len(real.patient) / len(np.unique(real.patient)))):
        result = result.joined(chosen)
    return result


def crossed(row: Row, real: Images, made: Images, seed: int) -> tuple[NDArray[np.float64], ...]:
    """Right group (0 or 1) and error of the ejection fraction, each ``[patient]``."""
    patients = np.unique(real.patient)
    hit, error = np.empty(len(patients)), np.empty(len(patients))
    for part in folds(real, seed):
        others = [int(each) for each in patients if each not in part]
        model = trained(training_images(row, real.of(others), made, seed), seed)
        for patient, (shares, ef) in predict(model, real.of(part)).items():
            first = real.firsts[patient]
            hit[patient] = shares.argmax() == real.group[first]
            error[patient] = ef - real.ef[first]
    return hit, error


def summary(
    name: str,
    hits: NDArray[np.float64],
    errors: NDArray[np.float64],
    real: Images,
    base: NDArray[np.float64] | None,
) -> dict[str, Any]:
    """Figures over patients and seeds ``[seed, patient]``, and the change against ``base``.

    Its interval is over the tested patients: it does not cover what other seeds would give.
    """
    groups = real.group[real.firsts]
    recall = [hits[:, groups == group].mean() for group in range(len(GROUPS))]
    result = {
        "trained on": name,
        "ef_mae": round(float(np.abs(errors).mean()), 2),
        "ef_bias": round(float(errors.mean()), 2),
        "ef_mae_by_seed": [round(float(v), 2) for v in np.abs(errors).mean(axis=1)],
        "balanced_accuracy": round(float(np.mean(recall)), 3),
        "recall": {key: round(float(v), 3) for key, v in zip(GROUPS, recall, strict=True)},
    }
    if base is not None:
        rng = np.random.default_rng(SEED)
        change = np.abs(errors).mean(axis=0) - np.abs(base).mean(axis=0)
        means = [rng.choice(change, len(change)).mean() for _ in range(4000)]
        low, high = np.percentile(means, (2.5, 97.5))
        result["ef_mae_change"] = round(float(change.mean()), 2)
        result["ef_mae_change_95"] = [round(float(low), 2), round(float(high), 2)]
    return result


def tested(real: Images, made: Images, seeds: int) -> list[dict[str, Any]]:
    """Train and test every row; each but the first is compared with the first."""
    rows: list[dict[str, Any]] = []
    base = None
    for row in ROWS:
        found = [crossed(row, real, made, seed) for seed in range(seeds)]
        hits, errors = (np.stack(part) for part in zip(*found, strict=True))
        rows.append(summary(row.name, hits, errors, real, base))
        base = errors if base is None else base
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Train and test every row, print the table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, default=default_generator())
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()
    bundle = load_bundle(options.weights)
    if not isinstance(bundle.model, CPGG):
        raise SystemExit(f"{options.weights} holds no CPGG")
    real = real_images(options.data, clip_grid(bundle.model.config))
    patients = len(np.unique(real.patient))
    made = generated_images(bundle.model, max(RATIOS) * patients)
    print(f"{patients} patients, {len(real.patient)} pairs; {len(made.patient)} generated")
    rows = tested(real, made, options.seeds)
    groups, ef = real.group[real.firsts], real.ef[real.firsts]
    result = {
        "command": "python benchmarks/mixing.py --data sunnybrook "
        "--out benchmarks/results/mixing.json",
        "weights_sha256": bundle.sha256,
        "patients": {key: int((groups == n).sum()) for n, key in enumerate(GROUPS)},
        "real_pairs": len(real.patient),
        "generated": len(made.patient),
        "folds": FOLDS,
        "seeds": options.seeds,
        "ef_mae_of_the_mean": round(float(np.abs(ef - ef.mean()).mean()), 2),
        "chance_balanced_accuracy": 1 / len(GROUPS),
        "cpu_seconds": round(time.process_time() - began),
        "rows": rows,
    }
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
