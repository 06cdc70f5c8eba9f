r"""Energy of drawing clips with CPGG against that of training it, and what the meter itself costs.

Each row works for a while on one thread under the site's own meter (`fedcmr_client.energy_meter`:
codecarbon, offline, for the whole machine) and is scaled to 1,000 samples or training steps.
Weights are untrained: the arithmetic is the same. Training is plain, on latents, as at a site after
its clips have been encoded; private training clips each patient's gradient and costs more.

The first figure is the machine's mean power times the CPU-seconds of the work, which is how long it
takes where nothing else runs. Without a power interface that power is modelled: a constant for
memory, and for the processor one by the load of the whole machine, other programs' included. The
second figure is the same CPU-seconds at a fixed power. Emissions are the first figure at the mean
intensities of three countries.

    python benchmarks/generation_energy.py --json benchmarks/results/generation_energy.json
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedcmr_client.energy import J_PER_KWH, Energy, EnergySettings, Intensity
from fedcmr_client.energy_meter import GRACE_S, CodeCarbon, EnergyMeter, used_cpu_seconds
from fedcmr_shared.models.cpgg import CONFIGS, CPGG
from fedcmr_shared.models.masked_generator import SamplingPlan, draw

COUNTRIES = ("SWE", "DEU", "POL")
SETTINGS = EnergySettings("DEU")
PLANS = [
    SamplingPlan(),
    *(SamplingPlan(method="dpm", diffusion_steps=steps) for steps in (50, 20, 10, 5)),
]
CLIPS = 8  # drawn at once
BATCH = 16
TRAINING_STEPS = 10_000


def metered(work: Callable[[], int], seconds: float) -> tuple[int, Energy]:
    """Repeat ``work`` for so long; return how much it did in all and the energy of that."""
    meter = EnergyMeter(SETTINGS)
    meter.start()
    end, done = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        done += work()
    measured = meter.stop().measured
    if not measured:
        raise SystemExit(
            f"{seconds:g} s were not measured, and the log says why if the meter failed: it starts "
            f"after {GRACE_S:g} s, so give --seconds at least {2 * GRACE_S:g}"
        )
    return done, measured[0]


def row(about: dict[str, Any], done: int, energy: Energy) -> dict[str, Any]:
    """The cost of a thousand samples or steps."""
    each = energy.cpu_seconds / done
    watts = J_PER_KWH * energy.kwh / energy.seconds
    kwh = 1000 * each * watts / J_PER_KWH
    return {
        **about,
        "done": done,
        "cpu_seconds_each": each,
        "seconds_each": energy.seconds / done,
        "watts": watts,
        "memory_share": energy.memory_kwh / energy.kwh,
        "kwh_per_1000": kwh,
        "second_kwh_per_1000": 1000 * energy.second_kwh / done,
        "kg_co2e_per_1000": {
            country: kwh * Intensity.of(country).g_per_kwh / 1000 for country in COUNTRIES
        },
    }


def sampling(model: CPGG, plan: SamplingPlan, seconds: float) -> dict[str, Any]:
    phenotypes = torch.full((CLIPS, len(model.config.standardisation)), torch.nan)

    def work() -> int:
        model.sample(phenotypes, [torch.Generator().manual_seed(k) for k in range(CLIPS)], plan)
        return CLIPS

    work()
    about = {"what": "samples", "sampler": plan.method, "diffusion_steps": plan.diffusion_steps}
    return row(about, *metered(work, seconds))


def training(model: CPGG, seconds: float) -> dict[str, Any]:
    config = model.config.generator
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(BATCH, *config.latent_shape, generator=generator)
    phenotypes = torch.full((BATCH, config.conditions), torch.nan)
    optimiser = torch.optim.AdamW(model.generator.parameters(), 1e-4)

    def work() -> int:
        optimiser.zero_grad()
        model(latents, phenotypes, draw(config, BATCH, generator)).mean().backward()
        optimiser.step()
        return 1

    work()
    return row({"what": "training steps", "batch": BATCH}, *metered(work, seconds))


def meter_cost(seconds: float) -> tuple[dict[str, float], dict[str, Any]]:
    """What starting the meter and letting it run costs, and on what its figures rest.

    To be called first in a process: later it starts at once.
    """
    found: dict[str, float] = {}
    for name in ("first_start", "next_start"):
        began, cpu = time.monotonic(), used_cpu_seconds()
        CodeCarbon.start(SETTINGS).stop()
        found[f"{name}_seconds"] = time.monotonic() - began
        found[f"{name}_cpu_seconds"] = used_cpu_seconds() - cpu
    meter, cpu = CodeCarbon.start(SETTINGS), used_cpu_seconds()
    time.sleep(seconds)
    found["cpu_share_while_running"] = (used_cpu_seconds() - cpu) / seconds
    under = meter.stop().circumstances
    names = ("hardware", "tool", "pue", "watts_per_thread")
    about = {name: getattr(under, name) for name in names}
    return found, {"method": under.method, **about}


def measure(seconds: float) -> dict[str, Any]:
    cost, about = meter_cost(seconds)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = CPGG(CONFIGS["tiny"])
    steps = training(model.train(), seconds)
    samples = [sampling(model.eval(), plan, seconds) for plan in PLANS]
    per_step = steps["cpu_seconds_each"]
    for each in samples:
        each["samples_worth_training"] = TRAINING_STEPS * per_step / each["cpu_seconds_each"]
    return {
        "model": "cpgg/tiny, one thread",
        **about,
        "g_per_kwh": {country: Intensity.of(country).g_per_kwh for country in COUNTRIES},
        "load_of_last_minute": os.getloadavg()[0],
        "training_steps_compared": TRAINING_STEPS,
        "meter": cost,
        "training": steps,
        "sampling": samples,
    }


def show(found: dict[str, Any]) -> None:
    print(f"{found['model']}, {found['hardware']}, {found['method']}")
    print(
        f"per 1,000 | kWh | 2nd kWh | kg CO2e in {', '.join(COUNTRIES)} | as much as the training"
    )
    for each in (found["training"], *found["sampling"]):
        name = f"{each.get('sampler', each['what'])} {each.get('diffusion_steps', '')}".rjust(15)
        kg = ", ".join(f"{value:.3g}" for value in each["kg_co2e_per_1000"].values())
        worth = each.get("samples_worth_training", TRAINING_STEPS)
        kwh = f"{each['kwh_per_1000']:.3g} | {each['second_kwh_per_1000']:.3g}"
        print(f"{name} | {kwh} | {kg} | {worth:,.0f}")
    print(", ".join(f"{name} {value:.3g}" for name, value in found["meter"].items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="work of each row")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    found = measure(options.seconds)
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
