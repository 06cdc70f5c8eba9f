"""One private step against a non-private step over the same patients, as ratios.

Both compute gradients of the same examples and take one optimiser step. The non-private step puts
all examples in one batch; the private one has a backward pass per patient, clipping and noise.
Opacus' per-example gradients cannot serve CardioMM (bare parameters, coils in the batch), so all
engines are compared on a U-Net of the size of `tiny` made of convolutions and GroupNorm.

Each row runs in processes of its own with one thread: CPU time is the fastest step of all of them,
memory the peak of resident memory over that of the process with model and data loaded. With CUDA,
time is that on the clock and memory the allocator's.

    python benchmarks/dp_step.py [--json] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedcmr_shared.errors import JobRefused
from fedcmr_shared.kspace.masks import Sampling, acs_mask, make_mask
from fedcmr_shared.models.cardiomm import CONFIGS, CardioMM
from fedcmr_shared.privacy.mechanism import BackwardEngine, Engine, Mechanism, set_gradients
from fedcmr_shared.privacy.per_example import PerExampleEngine
from fedcmr_shared.privacy.step import private_gradient

TARGETS = {"time_ratio": 1.15, "memory_ratio": 1.1}
ROWS = {
    "cardiomm tiny": ("plain", "backward"),
    "cardiomm small": ("plain", "backward"),
    "unet": ("plain", "backward", "hooks", "functorch"),
}
# As in the Makefile: glibc keeps freed memory.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "1000000000"}
THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


class UNet(nn.Module):
    """Two levels of convolutions with GroupNorm; each layer sees one row per example."""

    def __init__(self, width: int = 40) -> None:
        super().__init__()
        self.head = self.block(2, width)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle = self.block(2 * width, 2 * width)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear")
        self.narrow = nn.Conv2d(2 * width, width, 1)
        self.tail = nn.Sequential(self.block(width, width), nn.Conv2d(width, 2, 3, padding=1))

    @staticmethod
    def block(inputs: int, outputs: int) -> nn.Sequential:
        """Return two convolutions at full resolution."""
        conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        again = nn.Conv2d(outputs, outputs, 3, padding=1)
        return nn.Sequential(conv, nn.GroupNorm(8, outputs), nn.ReLU(), again, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[n, 2, y, x]`` to the same shape."""
        fine = self.head(x)
        coarse = self.middle(self.down(fine))
        output: Tensor = self.tail(fine + self.narrow(self.up(coarse)))
        return output


Loss = Callable[[Sequence[Tensor]], Tensor]


def task(name: str, options: argparse.Namespace) -> tuple[nn.Module, Callable[[nn.Module], Loss]]:
    """Return the network and what makes its loss; an example is k-space or an image."""
    torch.manual_seed(0)
    device = options.device
    if name == "unet":
        return UNet().to(
            device
        ), lambda module: lambda images: module(torch.stack(list(images))).abs().flatten(1).mean(1)
    config = CONFIGS[name.split()[1]]
    sampling = Sampling("uniform", 8, 20)
    size = options.matrix
    mask = make_mask(sampling, phase_encodes=size, readout=size, frames=1, seed=0)
    masks = [
        torch.from_numpy(m).reshape(-1, size, size)[0].to(device)
        for m in (mask, acs_mask(sampling, size, size))
    ]
    text = torch.randn(config.text_width, device=device)

    def loss_of(module: nn.Module) -> Loss:
        def loss(examples: Sequence[Tensor]) -> Tensor:
            kspace = torch.stack(list(examples))
            batch = [m.expand(len(kspace), 1, -1, -1) for m in masks]
            texts = text.expand(len(kspace), -1)
            image: Tensor = module(kspace * batch[0], *batch, texts, texts).image
            return image.flatten(1).mean(1)

        return loss

    return CardioMM(config).to(device), loss_of


def cohort(name: str, options: argparse.Namespace) -> list[list[Tensor]]:
    size = options.matrix
    shape = (2, size, size) if name == "unet" else (options.coils, size, size)
    kind = torch.float32 if name == "unet" else torch.complex64
    return [
        [torch.randn(shape, dtype=kind, device=options.device) for _ in range(options.images)]
        for _ in range(options.patients)
    ]


def step_of(name: str, method: str, options: argparse.Namespace) -> Callable[[], None]:
    module, loss_of = task(name, options)
    patients = cohort(name, options)
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(parameters, lr=1e-6)
    mechanism = Mechanism(1.0, 1.0, expected_patients=float(options.patients))

    def plain() -> None:
        optimiser.zero_grad()
        loss_of(module)(
            [example for examples in patients for example in examples]
        ).mean().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()

    if method == "plain":
        return plain
    engine: Engine[Tensor]
    if method == "backward":
        engine = BackwardEngine(parameters, loss_of(module))
    else:
        batch = options.patients * options.images
        engine = PerExampleEngine(module, parameters, loss_of, mode=method, physical_batch=batch)

    def private() -> None:
        optimiser.zero_grad()
        step = private_gradient(engine, patients, lambda patient: patient, mechanism, 1.0)
        set_gradients(parameters, step.gradients)
        optimiser.step()

    return private


def measure(name: str, method: str, options: argparse.Namespace) -> dict[str, float]:
    """Return the fastest step's seconds and the peak mebibytes over the idle process."""
    step = step_of(name, method, options)
    cuda = options.device == "cuda"
    reset_peak(cuda)
    before = memory_mib("VmRSS", cuda)
    step()
    peak = memory_mib("VmHWM", cuda) - before
    seconds = []
    for _ in range(options.steps):
        start = clock(cuda)
        step()
        seconds.append(clock(cuda) - start)
    return {"seconds": min(seconds), "peak_mib": peak}


def clock(cuda: bool) -> float:
    if not cuda:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def reset_peak(cuda: bool) -> None:
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def memory_mib(field: str, cuda: bool) -> float:
    if cuda:
        peak = field == "VmHWM"
        used = torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
        return used / 2**20
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


Row = dict[str, str | float]


def compare(options: argparse.Namespace) -> dict[str, Any]:
    layouts = {layout: rows_of(layout, options) for layout in options.layouts}
    judged = [
        row
        for row in layouts[options.layouts[0]]
        if row["method"] == "backward" and row["network"] != "unet"
    ]
    return {
        "command": f"python benchmarks/dp_step.py {' '.join(sys.argv[1:])}".strip(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, one thread",
        "torch": torch.__version__,
        "device": options.device,
        "matrix": options.matrix,
        "coils": options.coils,
        "repeats": options.repeats,
        "targets": TARGETS,
        "layouts": layouts,
        "refused": {name: refusals(name, options) for name in ROWS if name != "unet"},
        "passed": all(float(row[key]) <= limit for row in judged for key, limit in TARGETS.items()),
    }


def rows_of(layout: str, options: argparse.Namespace) -> list[Row]:
    pairs = [(name, method) for name, methods in ROWS.items() for method in methods]
    runs: dict[tuple[str, str], list[dict[str, float]]] = {pair: [] for pair in pairs}
    for _ in range(options.repeats):
        for pair in pairs:  # alternating, so that all see the same machine
            runs[pair].append(in_process(layout, *pair))
    best = {
        pair: {key: min(run[key] for run in runs[pair]) for key in ("seconds", "peak_mib")}
        for pair in pairs
    }
    return [
        {
            "network": name,
            "method": method,
            **{key: round(value, 3) for key, value in best[name, method].items()},
            "time_ratio": round(best[name, method]["seconds"] / best[name, "plain"]["seconds"], 3),
            "memory_ratio": round(
                best[name, method]["peak_mib"] / best[name, "plain"]["peak_mib"], 3
            ),
        }
        for name, method in pairs
    ]


def in_process(layout: str, name: str, method: str) -> dict[str, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--task", layout, name, method]
    environment = {**os.environ, **MALLOC, **THREADS}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def refusals(name: str, options: argparse.Namespace) -> dict[str, str]:
    """Why Opacus' engines do not serve a network."""
    module, loss_of = task(name, options)
    reasons = {}
    for mode in ("hooks", "functorch"):
        try:
            parameters = [p for p in module.parameters() if p.requires_grad]
            PerExampleEngine(module, parameters, loss_of, mode=mode)
        except JobRefused as refused:
            reasons[mode] = str(refused)
    return reasons


def show(layouts: dict[str, list[Row]], refused: dict[str, dict[str, str]]) -> None:
    for layout, rows in layouts.items():
        patients, images = layout.split("x")
        print(f"{patients} patients with {images} images each: one step")
        print(f"  {'network':16}{'method':10} {'seconds':>8} {'ratio':>6} {'MiB':>8} {'ratio':>6}")
        for row in rows:
            print(
                f"  {row['network']:16}{row['method']:10} {row['seconds']:8.3f} "
                f"{row['time_ratio']:6.2f} {row['peak_mib']:8.1f} {row['memory_ratio']:6.2f}"
            )
    for name, reasons in refused.items():
        for reason in reasons.values():
            print(f"{name}: {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layouts", nargs="+", default=["4x4", "16x1"], help="PATIENTSxIMAGES")
    parser.add_argument("--matrix", type=int, default=128)
    parser.add_argument("--coils", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="in one process")
    parser.add_argument("--repeats", type=int, default=3, help="processes per row")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--task", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        torch.set_num_threads(1)
        layout, name, method = options.task
        options.patients, options.images = map(int, layout.split("x"))
        print(json.dumps(measure(name, method, options)))
        return
    result = compare(options)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        show(result["layouts"], result["refused"])
        print(f"targets for CardioMM {TARGETS}: {'met' if result['passed'] else 'MISSED'}")
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    main()
