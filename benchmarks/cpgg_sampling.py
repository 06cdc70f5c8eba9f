r"""Cost of drawing clips with CPGG, and what faster samplers lose.

First table: network evaluations, seconds and memory for one plan a row, weights untrained. The
peers are raster order (one token a step) and, for ordered attention, decoding without kept keys
and values. Each row runs in a process of its own, so that its peak memory is its own. The first row
also decodes the latents. On a CPU seconds are those of one thread's work, which other work on the
machine hardly changes.

Second table (``--quality-seconds``): a tiny generator learns beating rings for so long; then each
sampler draws the same tokens from the same noise and contexts. The truth is `ddim` in 900 steps.

    python benchmarks/cpgg_sampling.py --size tiny --quality-seconds 60
    python benchmarks/cpgg_sampling.py --size paper --rows masked raster ordered "ordered raster" \
        --method dpm --diffusion-steps 20

``--json benchmarks/results/cpgg_sampling.json`` keeps what they print.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedcmr_shared.models.cpgg import CONFIGS, CPGG
from fedcmr_shared.models.masked_generator import (
    Attention,
    MaskedGenerator,
    SamplingPlan,
    draw,
    patchify,
    unpatchify,
)

ROWS: dict[str, tuple[Attention, dict[str, Any]]] = {
    "masked": ("full", {}),
    "masked, no guidance": ("full", {"guidance": 1.0}),
    "masked, dpm 20": ("full", {"method": "dpm", "diffusion_steps": 20}),
    "raster": ("full", {"order": "raster", "steps": None}),
    "ordered": ("ordered", {}),
    "ordered, nothing kept": ("ordered", {"reuse": False}),
    "ordered raster": ("ordered", {"order": "raster", "steps": None}),
    "ordered raster, nothing kept": ("ordered", {"order": "raster", "steps": None, "reuse": False}),
}
PHENOTYPES = 82
LATENT_SCALE = 1.5
LATENT_SHAPE = CONFIGS["tiny"].generator.latent_shape
FOLD = (2, 2, 2)
POINTS = (2 * LATENT_SHAPE[1], 2 * LATENT_SHAPE[2], 2 * LATENT_SHAPE[3])
SAMPLERS = [
    ("ancestral", 100),
    ("ancestral", 20),
    *(("ddim", n) for n in (100, 50, 20, 10, 5)),
    *(("dpm", n) for n in (100, 50, 20, 10, 5)),
]


def measure(
    size: str, row: str, clips: int, device: str, decode: bool, common: dict[str, Any]
) -> dict[str, float]:
    """Draw ``clips`` clips at once by the plan of ``row``; ``common`` holds for all plans."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    attention, own = ROWS[row]
    changes = {**common, **own}
    config = CONFIGS[size]
    config = replace(config, generator=replace(config.generator, attention=attention))
    with torch.device(device):
        model = CPGG(config).eval()
    steps = changes.get("steps", min(16, config.generator.tokens)) or config.generator.tokens
    plan = SamplingPlan(**{**changes, "steps": steps})
    counts = count_evaluations(model.generator)
    conditions = torch.zeros(clips, PHENOTYPES, device=device)
    generators = [torch.Generator().manual_seed(seed) for seed in range(clips)]
    before = peak_mib(device)
    start = now(device)
    latents = model.generator.sample(conditions, generators, plan)
    drawn = now(device)
    found = {
        **counts,
        "seconds per clip": (drawn - start) / clips,
        "MiB above weights": peak_mib(device) - before,
    }
    if decode:
        with torch.no_grad():
            model.autoencoder.decode(latents)
        found["decoder seconds per clip"] = (now(device) - drawn) / clips
        found["decoder MiB above weights"] = peak_mib(device) - before
    return found


def count_evaluations(generator: MaskedGenerator) -> dict[str, int]:
    """Return a mapping that fills while ``generator`` works; both branches of guidance count."""
    counts = {"transformer calls": 0, "tokens through it": 0, "diffusion calls": 0}

    def transformer(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        counts["tokens through it"] += inputs[0].shape[0] * inputs[0].shape[1]

    def decoder(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        counts["transformer calls"] += 1
        transformer(module, inputs)

    def diffusion(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        counts["diffusion calls"] += 1

    generator.encoder.register_forward_pre_hook(transformer)
    generator.decoder.register_forward_pre_hook(decoder)
    generator.diffusion.time.register_forward_pre_hook(diffusion)
    return counts


def now(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak_mib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def rings(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Latents of beating rings on 16 x 12 x 12 points and their two conditions.

    The conditions are the cavity's largest radius and how far it contracts, both in [-1, 1].
    """
    generator = torch.Generator().manual_seed(seed)
    told = 2 * torch.rand(count, 2, generator=generator) - 1
    frames, rows, columns = POINTS
    phase = torch.sin(torch.pi * torch.arange(frames) / frames) ** 2
    radius = (0.5 + 0.15 * told[:, :1]) * (1 - (0.3 + 0.2 * told[:, 1:]) * phase)
    y, x = torch.linspace(-1, 1, rows)[:, None], torch.linspace(-1, 1, columns)
    inside = torch.sigmoid((radius[..., None, None] - (y**2 + x**2).sqrt()) * 8)
    clips = (2 * inside - 1)[:, None]
    # Neighbouring frames, rows and columns become channels: a public, exact "autoencoder".
    folded = patchify(clips, FOLD).transpose(1, 2).reshape(count, *LATENT_SHAPE)
    return folded, torch.cat([told, torch.zeros(count, PHENOTYPES - 2)], 1)


def first_area(latents: Tensor) -> Tensor:
    """Return the cavity's share of the first frame."""
    frames = unpatchify(latents.flatten(2).transpose(1, 2), (1, *POINTS), FOLD)
    return (frames[:, 0, 0].clamp(-1, 1) + 1).mean((1, 2)) / 2


def trained(seconds: float) -> MaskedGenerator:
    config = replace(CONFIGS["tiny"].generator, latent_scale=LATENT_SCALE)
    torch.manual_seed(0)
    model = MaskedGenerator(config)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    latents, told = rings(512, 0)
    start = now("cpu")
    while (passed := (now("cpu") - start) / seconds) < 1:
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min(1.0, 20 * passed, 2 * (1 - passed))
        some = torch.randint(len(latents), (16,), generator=generator)
        optimiser.zero_grad()
        loss = model.loss(latents[some], told[some], draw(config, 16, generator)).mean()
        loss.backward()  # type: ignore[no-untyped-call]  # torch is partly untyped
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    return model.eval()


@torch.no_grad()
def quality(model: MaskedGenerator, clips: int = 24) -> list[dict[str, float | str | int]]:
    """Compare samplers on the same contexts, and as part of whole clips."""
    config = model.config
    latents, told = rings(clips, 1)
    draws = draw(config, clips, torch.Generator().manual_seed(1))
    known = torch.full_like(draws.visible, config.tokens // 4)
    draws = draws._replace(visible=known, dropped=torch.zeros_like(draws.dropped))
    tokens = patchify(latents * config.latent_scale, config.patch)
    tokens = tokens.gather(1, draws.order[..., None].expand_as(tokens))
    prefix = model._prefix(told, draws.dropped)
    contexts = model._contexts(tokens, prefix, draws, int(known[0]))

    def normals() -> Callable[[], Tensor]:
        generator = torch.Generator().manual_seed(2)
        shape = (*contexts.shape[:2], config.token_width)
        return lambda: torch.randn(shape, generator=generator)

    def sampled(method: Any, steps: int) -> Tensor:
        return model.diffusion.sample(contexts, normals(), steps=steps, method=method)

    truth = sampled("ddim", 900)
    rows: list[dict[str, float | str | int]] = []
    for method, steps in SAMPLERS:
        start = now("cpu")
        plan = SamplingPlan(guidance=1.0, diffusion_steps=steps, method=method)  # type: ignore[arg-type]
        generators = [torch.Generator().manual_seed(seed) for seed in range(clips)]
        clip = model.sample(told, generators, plan)
        seconds = (now("cpu") - start) / clips
        found = sampled(method, steps)
        areas = torch.stack([first_area(latents), first_area(clip)])
        rows.append(
            {
                "sampler": method,
                "steps": steps,
                "seconds per clip": seconds,
                "token error": float((found - truth).abs().mean() / truth.std()),
                "token deviation": float(found.std() / truth.std()),
                "area correlation": float(torch.corrcoef(areas)[0, 1]),
                "area error": float((areas[0] - areas[1]).abs().mean()),
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    names = list(rows[0])
    print(" | ".join(names))
    for row in rows:
        values = [row.get(name, "") for name in names]
        cells = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in values]
        print(" | ".join(cell.rjust(len(name)) for cell, name in zip(cells, names, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=sorted(CONFIGS), default="tiny")
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--clips", type=int, default=1, help="drawn at once")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--method", choices=["ancestral", "ddim", "dpm"], default="ancestral")
    parser.add_argument("--diffusion-steps", type=int, default=100)
    parser.add_argument("--no-decoder", action="store_true", help="do not decode the latents")
    parser.add_argument("--quality-seconds", type=float, default=0.0)
    parser.add_argument("--json", type=Path, help="also write the tables here; others in it stay")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    common = {"method": options.method, "diffusion_steps": options.diffusion_steps}
    cost: list[dict[str, Any]] = []
    tables: dict[str, Any] = {options.size: {"clips": options.clips, **common, "cost": cost}}

    def write() -> None:
        if options.json:
            known = json.loads(options.json.read_text()) if options.json.exists() else {}
            options.json.write_text(json.dumps({**known, **tables}, indent=1) + "\n")

    for row in options.rows:
        with context.Pool(1) as pool:
            decode = not (cost or options.no_decoder)
            arguments = (options.size, row, options.clips, options.device, decode, common)
            found = pool.apply(measure, arguments)
        cost.append({"plan": row, **found})
        print(f"{row}: {found['seconds per clip']:.2f} s per clip", flush=True)
        write()
    if cost:
        print(
            f"\n{options.size}, {options.clips} clips at once, {options.device}, 1 thread, {common}"
        )
        show(cost)
    if options.quality_seconds:
        torch.set_num_threads(1)
        name = f"tiny, trained on rings for {options.quality_seconds:g} s"
        tables[name] = quality(trained(options.quality_seconds))
        print(f"\n{name}")
        show(tables[name])
        write()


if __name__ == "__main__":
    main()
