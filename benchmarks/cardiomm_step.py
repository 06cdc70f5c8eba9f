"""Time and memory of one CardioMM training step, with recomputation off and on.

The peer is the same step without recomputation: the last column shows what the memory option costs.
On a CPU the peak is that of the process, so each row runs in its own process.

    python benchmarks/cardiomm_step.py --size tiny --matrix 96 --coils 8
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time

import torch

from fedcmr_shared.kspace.masks import Sampling, acs_mask, make_mask
from fedcmr_shared.models.cardiomm import CONFIGS, CardioMM

STEPS = 7


def measure(
    size: str, matrix: int, coils: int, device: str, recompute: bool
) -> tuple[float, float]:
    """Return the median seconds and the peak mebibytes above the idle model of one step."""
    if device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    config = CONFIGS[size]
    model = CardioMM(config, recompute=recompute).to(device)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    sampling = Sampling("uniform", 8, 20)
    mask = make_mask(sampling, phase_encodes=matrix, readout=matrix, frames=1, seed=0)
    kspace = torch.randn(1, coils, matrix, matrix, dtype=torch.complex64)
    text = torch.randn(1, config.text_width, device=device)
    inputs = [
        (kspace * torch.from_numpy(mask)).to(device),
        torch.from_numpy(mask)[None].to(device),
        torch.from_numpy(acs_mask(sampling, matrix, matrix))[None, None].to(device),
    ]
    before = _peak(device)
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        optimiser.zero_grad()
        model(*inputs, text, text).image.mean().backward()
        optimiser.step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[STEPS // 2], _peak(device) - before


def _peak(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=sorted(CONFIGS), default="tiny")
    parser.add_argument("--matrix", type=int, default=96)
    parser.add_argument("--coils", type=int, default=8)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    plain = None
    for recompute in (False, True):
        with context.Pool(1) as pool:
            arguments = (options.size, options.matrix, options.coils, options.device, recompute)
            seconds, memory = pool.apply(measure, arguments)
        plain = plain or seconds
        print(
            f"{options.size} {options.matrix}x{options.matrix} {options.coils} coils "
            f"{options.device} recompute={'on' if recompute else 'off'}: "
            f"{seconds:.4f} s/step, {memory:.0f} MiB, {seconds / plain:.2f}x"
        )


if __name__ == "__main__":
    main()
