"""Starting weights of CPGG `tiny` from simulated hearts: first the autoencoder, then the generator.

The training is not private: it sees the phantom alone. What it leaves to private training are the
styles and hearts of real hospitals.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from fedcmr_client.generation import PLANS, ClipRequest
from fedcmr_client.generation import draw_clips as draw_requests
from fedcmr_shared.errors import ConfigurationError, ModelError
from fedcmr_shared.metrics.generation import Adherence, Clip, adherence
from fedcmr_shared.metrics.phenotypes.clip import measure_clip
from fedcmr_shared.metrics.phenotypes.short_axis import SINGLE_SLICE_UNITS
from fedcmr_shared.models.bundle import save_bundle, state_sha256
from fedcmr_shared.models.clips import clip_grid
from fedcmr_shared.models.cpgg import CPGG
from fedcmr_shared.models.masked_generator import SamplingPlan, draw
from fedcmr_shared.models.registry import build_model
from fedcmr_shared.models.segmenter import Segmenter, load_segmenter
from fedcmr_shared.models.video_vae import Posterior, Size, VideoVAE
from fedcmr_shared.schemas.job import ModelSpec
from fedcmr_simulations.centres import TRAINING_CENTRES
from fedcmr_simulations.hearts import expected_fac, simulate_hearts
from fedcmr_simulations.progress import Progress

PLAN: Final = PLANS["tiny"]
GUIDANCES: Final = (0.0, 1.0, 3.0, 5.0, 10.0)
"""At which the held-out patients' requests are measured; 0 ignores them."""
FEWEST_MEASURED: Final = 3
"""Agreement over fewer clips says nothing."""

_SPEC: Final = ModelSpec(name="cpgg", size="tiny")
_MARGIN: Final = 2  # pixels around a clip, by which views of it are shifted
_BRIGHTNESS: Final = 0.06
_FOCUS: Final = 4.0
_FOCUS_WIDTH: Final = 0.4  # of half a clip
_WARM_UP: Final = 0.05
_LONGEST_GRADIENT: Final = 1.0
_REPORT_STEPS: Final = 50
_ENCODED_AT_ONCE: Final = 16
_DRAWN_AT_ONCE: Final = 32
_PACKAGES: Final = ("fedcmr", "torch", "numpy")


class GeneratorTraining(BaseModel):
    """What the training runs; all that is random comes from ``seed``.

    ``views`` are the shifted copies of each clip that the generator learns from, ``edges`` the
    weight of the error of a clip's differences between neighbouring pixels and frames, and
    ``averaging`` the decay of the moving average of the generator's weights, which is what is kept.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = 0
    patients: int = Field(2000, ge=2)
    held_out: int = Field(100, ge=3)
    views: int = Field(2, ge=1)
    autoencoder_steps: int = Field(1900, ge=1)
    autoencoder_batch: int = Field(4, ge=1)
    autoencoder_rate: float = Field(3e-3, gt=0)
    edges: float = Field(1.0, ge=0)
    generator_steps: int = Field(1700, ge=1)
    generator_batch: int = Field(48, ge=1)
    generator_rate: float = Field(2e-3, gt=0)
    averaging: float = Field(0.995, ge=0, lt=1)


@dataclass(frozen=True, eq=False)
class Hearts:
    """Clips ``[n, frames, rows, columns]``, phenotypes ``[n, 82]`` and true LVFAC in % ``[n]``."""

    clips: Tensor
    phenotypes: Tensor
    fac: NDArray[np.float64]


def default_generator() -> Path:
    """Return the packaged starting weights: CPGG `tiny`, trained on simulated hearts."""
    weights = resources.files("fedcmr_simulations") / "weights" / "cpgg-tiny.safetensors"
    return Path(str(weights))


def gather(
    model: CPGG, numbers: Sequence[int], seed: int, progress: Progress, margin: int = 0
) -> Hearts:
    """Simulate the patients of these numbers on the model's grid, ``margin`` pixels wider."""
    grid = clip_grid(model.config)
    wider = replace(grid, rows=grid.rows + 2 * margin, columns=grid.columns + 2 * margin)
    with progress.stage("simulating hearts", len(numbers)) as advance:
        hearts = []
        for heart in simulate_hearts(numbers, wider, seed):
            hearts.append(heart)
            advance(heart.patient)
    return Hearts(
        torch.from_numpy(np.stack([heart.clip for heart in hearts])),
        torch.from_numpy(np.stack([heart.phenotypes for heart in hearts])).float(),
        np.array([heart.single_slice.get("LVFAC", math.nan) for heart in hearts]),
    )


def view(clips: Tensor, rng: np.random.Generator) -> Tensor:
    """Return shifted and brightened parts ``[n, 1, t, rows, columns]`` of wider clips."""
    rows, columns = (size - 2 * _MARGIN for size in clips.shape[-2:])
    result = []
    for clip in clips:
        y, x = (int(place) for place in rng.integers(2 * _MARGIN + 1, size=2))
        bright = math.exp(rng.normal(0, _BRIGHTNESS))
        magnitude = (clip[:, y : y + rows, x : x + columns] + 1) * bright
        result.append(magnitude.clamp(0, 2) - 1)
    return torch.stack(result)[:, None]


def train_autoencoder(
    autoencoder: VideoVAE, clips: Tensor, config: GeneratorTraining, progress: Progress
) -> None:
    """Train in place on views of ``clips``; its weights need no gradients before or after."""
    rng = np.random.default_rng([config.seed, 41])
    generator = torch.Generator().manual_seed(config.seed + 41)

    weights = _focus(autoencoder.config.clip)

    def loss() -> Tensor:
        some = rng.integers(len(clips), size=config.autoencoder_batch)
        seen = view(clips[torch.from_numpy(some)], rng)
        posterior = autoencoder.encode(seen)
        error = (autoencoder.decode(posterior.sample(generator)) - seen) * weights
        edges = torch.stack([error.diff(dim=axis).abs().mean() for axis in (2, 3, 4)]).mean()
        divergence = posterior.divergence().mean()
        kl_weight = autoencoder.config.kl_weight
        return error.abs().mean() + config.edges * edges + kl_weight * divergence

    autoencoder.requires_grad_(True)
    steps, rate = config.autoencoder_steps, config.autoencoder_rate
    for _ in _optimise(autoencoder, loss, steps, rate, "training autoencoder", progress):
        pass
    autoencoder.requires_grad_(False)


def _focus(clip_size: Size) -> Tensor:
    """Weights ``[rows, columns]`` of errors: larger in the middle, where the LV is; mean 1."""
    _, rows, columns = clip_size
    y, x = torch.linspace(-1, 1, rows)[:, None], torch.linspace(-1, 1, columns)
    weights = 1 + _FOCUS * torch.exp(-(y**2 + x**2) / (2 * _FOCUS_WIDTH**2))
    return weights / weights.mean()


def train_generator(
    model: CPGG, hearts: Hearts, config: GeneratorTraining, progress: Progress
) -> None:
    """Train the generator in place on latents of views of wider ``hearts``."""
    rng = np.random.default_rng([config.seed, 43])
    generator = torch.Generator().manual_seed(config.seed + 43)
    latents = _latents(model, hearts.clips, config.views, rng, progress)
    conditions, _ = model.scale(hearts.phenotypes)
    network = model.generator

    def loss() -> Tensor:
        some = torch.from_numpy(rng.integers(len(conditions), size=config.generator_batch))
        seen = torch.from_numpy(rng.integers(config.views, size=config.generator_batch))
        posterior = Posterior(latents.mean[seen, some], latents.log_variance[seen, some])
        draws = draw(network.config, config.generator_batch, generator)
        return network.loss(posterior.sample(generator), conditions[some], draws).mean()

    average = {name: weight.clone() for name, weight in network.state_dict().items()}
    steps, rate = config.generator_steps, config.generator_rate
    for _ in _optimise(network, loss, steps, rate, "training generator", progress):
        for name, weight in network.state_dict().items():
            average[name].lerp_(weight, 1 - config.averaging)
    network.load_state_dict(average)


@torch.no_grad()
def _latents(
    model: CPGG, clips: Tensor, views: int, rng: np.random.Generator, progress: Progress
) -> Posterior:
    """Posteriors ``[view, n, *latent_shape]``."""
    means, log_variances = [], []
    with progress.stage("encoding clips", views) as advance:
        for index in range(views):
            parts = [model.autoencoder.encode(view(part, rng)) for part in _parts(clips)]
            means.append(torch.cat([part.mean for part in parts]))
            log_variances.append(torch.cat([part.log_variance for part in parts]))
            advance(f"view {index + 1}")
    return Posterior(torch.stack(means), torch.stack(log_variances))


def _parts(clips: Tensor) -> Iterator[Tensor]:
    for start in range(0, len(clips), _ENCODED_AT_ONCE):
        yield clips[start : start + _ENCODED_AT_ONCE]


def _optimise(
    network: nn.Module,
    loss: Callable[[], Tensor],
    steps: int,
    rate: float,
    title: str,
    progress: Progress,
) -> Iterator[int]:
    """Take ``steps`` steps with a rate that rises, then falls as a cosine; yield after each."""
    optimiser = torch.optim.AdamW(network.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, rate, total_steps=steps, pct_start=_WARM_UP
    )
    parts = math.ceil(steps / _REPORT_STEPS)
    with progress.stage(title, parts) as advance:
        losses: list[float] = []
        for step in range(1, steps + 1):
            value = loss()
            optimiser.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]  # torch is partly untyped
            nn.utils.clip_grad_norm_(network.parameters(), _LONGEST_GRADIENT)
            optimiser.step()
            schedule.step()
            losses.append(value.item())
            yield step
            if step % _REPORT_STEPS == 0 or step == steps:
                advance(f"step {step}/{steps}: loss {np.mean(losses):.4f}")
                losses.clear()


def train(config: GeneratorTraining, progress: Progress) -> CPGG:
    """Simulate and train; return the network in evaluation mode.

    The same configuration gives the same network as long as torch uses one thread, on the same kind
    of processor.

    Raises:
        ModelError: the registry holds another kind of model.
    """
    torch.manual_seed(config.seed)
    model = build_model(_SPEC)
    if not isinstance(model, CPGG):
        raise ModelError(f"{_SPEC.name} is no generator of clips")
    hearts = gather(model, range(config.patients), config.seed, progress, _MARGIN)
    train_autoencoder(model.autoencoder, hearts.clips, config, progress)
    train_generator(model, hearts, config, progress)
    return model.eval()


def measure_clips(
    clips: Iterable[Clip], pixel_mm: float, segmenter: Segmenter
) -> dict[str, NDArray[np.float64]]:
    """Measure the phenotypes of a slice on clips ``[frames, rows, columns]``.

    Returns:
        LVEDA, LVESA and LVMA in mm² and LVFAC in %, each ``[clip]``; NaN where a clip shows none.
    """
    rows = [measure_clip(clip, pixel_mm, segmenter) for clip in clips]
    return {
        name: np.array([row.get(name, math.nan) for row in rows]) for name in SINGLE_SLICE_UNITS
    }


def asked_fac(model: CPGG, phenotypes: Tensor) -> NDArray[np.float64]:
    """Return the LVFAC in % that rows of phenotypes ask for."""
    names = model.config.standardisation.names
    return np.array(
        [expected_fac(dict(zip(names, row, strict=True))) for row in phenotypes.tolist()]
    )


def draw_clips(model: CPGG, phenotypes: Tensor, plan: SamplingPlan, seed: int) -> Tensor:
    """Draw one clip ``[n, frames, rows, columns]`` for each row of phenotypes ``[n, 82]``.

    Raises:
        ModelError: the network gives values that are not finite.
    """
    names = model.config.standardisation.names
    requests = []
    for row, values in enumerate(phenotypes.tolist()):
        wanted = dict(zip(names, values, strict=True))
        requests.append(ClipRequest(wanted, wanted, seed * len(phenotypes) + row))
    drawn = draw_requests(model, requests, plan, batch=_DRAWN_AT_ONCE)
    return torch.from_numpy(np.stack([clip.frames for clip in drawn]))


@torch.no_grad()
def evaluate(
    model: CPGG, hearts: Hearts, segmenter: Segmenter, progress: Progress
) -> dict[str, Any]:
    """Measure held-out hearts: true clips, decoded ones, and ones drawn for their phenotypes."""

    def fac(clips: Tensor) -> NDArray[np.float64]:
        return measure_clips(clips.numpy(), model.config.pixel_mm, segmenter)["LVFAC"]

    asked = asked_fac(model, hearts.phenotypes)
    with progress.stage("evaluating", 2 + len(GUIDANCES)) as advance:
        result: dict[str, Any] = {
            "patients": len(asked),
            "true clips": _rounded(hearts.fac, fac(hearts.clips)),
        }
        advance("true clips")
        parts = [
            model.autoencoder.decode(model.autoencoder.encode(part[:, None]).mean)[:, 0]
            for part in _parts(hearts.clips)
        ]
        decoded = torch.cat(parts).clamp(-1, 1)
        error = (decoded - hearts.clips).abs().mean().item()
        result["decoded clips"] = {"error": error, **_rounded(hearts.fac, fac(decoded))}
        advance("decoded clips")
        for guidance in GUIDANCES:
            drawn = draw_clips(model, hearts.phenotypes, replace(PLAN, guidance=guidance), 0)
            result[f"guidance {guidance:g}"] = _rounded(asked, fac(drawn))
            advance(f"guidance {guidance:g}")
    return result


def agreement(asked: NDArray[np.float64], measured: NDArray[np.float64]) -> Adherence | None:
    """Compare one phenotype ``[clip]`` asked for with that measured; clips with NaN are left out.

    Returns None where fewer than three clips are left.

    Raises:
        DataError: all requests are the same.
    """
    both = np.isfinite(asked) & np.isfinite(measured)
    return adherence(asked[both], measured[both]) if both.sum() >= FEWEST_MEASURED else None


def _rounded(asked: NDArray[np.float64], measured: NDArray[np.float64]) -> dict[str, float]:
    """R², mean absolute error and bias of LVFAC (%), over how many clips it was measured."""
    found = agreement(asked, measured)
    if found is None:
        return {"samples": int(np.isfinite(measured).sum())}
    return {name: round(value, 4) for name, value in found._asdict().items()}


def make_generator(
    config: GeneratorTraining, out: Path, command: str, progress: Progress
) -> dict[str, Any]:
    """Simulate, train, write the bundle to ``out`` and return what it says of its origin.

    The result also holds ``sha256`` (of the weights), ``file_sha256``, ``bytes`` and
    ``parameters``; a file of the same name with the ending ``.json`` holds it for programs.

    Raises:
        ConfigurationError: ``out`` has no folder to go to, or has the ending ``.json``.
        ModelError: the weights cannot be written.
    """
    if not out.absolute().parent.is_dir():
        raise ConfigurationError(f"--out {out}: its folder does not exist: make it first")
    if out.suffix == ".json":
        raise ConfigurationError(f"--out {out}: weights end in .safetensors")
    model = train(config, progress)
    numbers = range(config.patients, config.patients + config.held_out)
    held_out = gather(model, numbers, config.seed, progress)
    scores = evaluate(model, held_out, load_segmenter().model, progress)
    return _write(model, config, scores, command, out)


def _write(
    model: CPGG, config: GeneratorTraining, scores: dict[str, Any], command: str, out: Path
) -> dict[str, Any]:
    """Write the bundle and its description, and return the latter; see :func:`make_generator`."""
    said = _lineage(config, command, scores)
    extra = {k: v if isinstance(v, str) else json.dumps(v) for k, v in said.items()}
    save_bundle(out, model.state_dict(), _SPEC, extra)
    content = out.read_bytes()
    result = {
        **said,
        "sha256": state_sha256(model.state_dict()),
        "file_sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    _write_json(out.with_suffix(".json"), result)
    return result


def _write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _lineage(config: GeneratorTraining, command: str, scores: dict[str, Any]) -> dict[str, Any]:
    return {
        "origin": "simulated",
        "privacy": "none - simulated data only",
        "command": command,
        "configuration": config.model_dump(mode="json"),
        "seed": config.seed,
        "centres": [centre.name for centre in TRAINING_CENTRES],
        "patients": config.patients,
        "held_out": scores,
        "versions": {name: version(name) for name in _PACKAGES},
    }
