"""Local training of a reconstructor on a site's own images."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedcmr_client.dataset import Cohort, Image, Undersampled, undersample
from fedcmr_client.store.site_store import ScanRecord
from fedcmr_shared.errors import DataError, FederationError
from fedcmr_shared.kspace.coils import rss
from fedcmr_shared.kspace.fourier import ifft2c
from fedcmr_shared.kspace.masks import Sampling
from fedcmr_shared.models.cardiomm import CardioMM
from fedcmr_shared.privacy.parts import freeze, trainable_names
from fedcmr_shared.schemas.job import JobSpec, TrainingSpec
from fedcmr_shared.text.encoders import TextEncoder

SSIM_WINDOW = 7


@dataclass(frozen=True)
class Batch:
    """Images of one matrix size and coil count, stacked; see `CardioMM.forward` for the shapes."""

    measured: Tensor
    mask: Tensor
    acs: Tensor
    metadata_text: Tensor
    sampling_text: Tensor
    target: Tensor

    def to(self, device: torch.device) -> Batch:
        """Return the batch on ``device``."""
        moved = {name: tensor.to(device) for name, tensor in vars(self).items()}
        return replace(self, **moved)


def by_shape(items: Sequence[Undersampled]) -> list[list[Undersampled]]:
    """Group ``items`` by the shape of their k-space; order within a shape is kept."""
    groups: dict[torch.Size, list[Undersampled]] = {}
    for item in items:
        groups.setdefault(item.image.kspace.shape, []).append(item)
    return list(groups.values())


def collate(items: Sequence[Undersampled], encoder: TextEncoder) -> list[Batch]:
    """Stack ``items`` into one batch per shape; order within a shape is kept."""
    return [_stack(group, encoder) for group in by_shape(items)]


def _stack(group: Sequence[Undersampled], encoder: TextEncoder) -> Batch:
    texts = [item.texts for item in group]
    kspace = torch.stack([item.image.kspace for item in group])
    real = kspace.real.dtype
    return Batch(
        measured=torch.stack([item.measured for item in group]),
        mask=torch.stack([item.mask for item in group]),
        acs=torch.stack([item.acs for item in group]),
        metadata_text=encoder.encode([metadata for metadata, _ in texts]).to(real),
        sampling_text=encoder.encode([sampling for _, sampling in texts]).to(real),
        target=rss(ifft2c(kspace)),
    )


class ReconstructionLoss:
    """The job's loss of undersampled images; the loss of one image does not depend on others."""

    def __init__(
        self, model: nn.Module, job: JobSpec, encoder: TextEncoder, device: torch.device
    ) -> None:
        self._model = model
        self._loss = LOSSES[job.training.loss]
        self._encoder = encoder
        self._device = device

    def __call__(self, examples: Sequence[Undersampled], /) -> Tensor:
        """Return one loss for each image, those of one shape after another."""
        batches = (batch.to(self._device) for batch in collate(examples, self._encoder))
        return torch.cat([self._of_batch(batch) for batch in batches])

    def _of_batch(self, batch: Batch) -> Tensor:
        output = self._model(
            batch.measured, batch.mask, batch.acs, batch.metadata_text, batch.sampling_text
        )
        return self._loss(output.image, batch.target)


class LocalOptimiser:
    """The job's optimiser with its schedule: cosine decay over the job, warm-up after a start."""

    def __init__(self, job: JobSpec, parameters: list[nn.Parameter]) -> None:
        self._job = job
        self._optimiser = _optimiser(job.training, parameters)
        self._steps_taken = 0

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self._optimiser.zero_grad()

    def step(self, step: int) -> None:
        """Take one step along the gradients; ``step`` counts from the start of the job."""
        # An adaptive optimiser without history takes steps of full size in random directions.
        warmup = min(1.0, (self._steps_taken + 1) / (self._job.training.warmup_steps + 1))
        for group in self._optimiser.param_groups:
            group["lr"] = warmup * self._job.learning_rate(step)
        self._optimiser.step()
        self._steps_taken += 1


class Trainer:
    """Trains one model without privacy; keeps the optimiser's state between calls of `run`.

    Only simulations, pretraining and comparisons do that. Everything random is a function of the
    job's seed, the site's name and the step number, so that a round can be repeated and the same
    seed gives the same weights on a CPU. Private training: :mod:`fedcmr_client.private_trainer`.

    Raises:
        DataError: there is no scan.
    """

    def __init__(
        self,
        model: CardioMM,
        job: JobSpec,
        records: Sequence[ScanRecord],
        encoder: TextEncoder,
        *,
        site: str,
        device: str = "cpu",
    ) -> None:
        if not records:
            raise DataError("no scan to train on: import data or relax the job's cohort")
        place = torch.device(device)
        self._model = model.to(place)
        self._job = job
        self._site = zlib.crc32(site.encode())
        self._cohort = Cohort(records)
        self._parameters = freeze(model, trainable_names(job.model, model, job.training.part))
        self._loss = ReconstructionLoss(model, job, encoder, place)
        self._optimiser = LocalOptimiser(job, self._parameters)

    def run(self, first_step: int, steps: int) -> float:
        """Take ``steps`` optimiser steps; ``first_step`` counts from the start of the job.

        Returns:
            Mean training loss over the steps.

        Raises:
            FederationError: the loss is not finite.
        """
        self._model.train()
        losses = [self._step(step) for step in range(first_step, first_step + steps)]
        return math.fsum(losses) / len(losses)

    def _step(self, step: int) -> float:
        generator = np.random.default_rng([self._job.seed, self._site, step])
        items = [self._draw(generator) for _ in range(self._job.training.batch_size)]
        self._optimiser.zero_grad()
        total = 0.0
        for group in by_shape(items):
            loss = self._loss(group).sum() / len(items)
            loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
            total += float(loss.detach())
        if not math.isfinite(total):
            raise FederationError(f"training loss is {total} at step {step}: lower learning_rate")
        nn.utils.clip_grad_norm_(self._parameters, self._job.training.gradient_clip)
        self._optimiser.step(step)
        return total

    def _draw(self, generator: np.random.Generator) -> Undersampled:
        patients = self._cohort.patients
        patient = patients[generator.integers(len(patients))]
        (image,) = self._cohort.draw(patient, 1, generator)
        return draw_sampling(image, self._job, generator)


def trained_values(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the values that are being trained, on the CPU, by name."""
    return {n: p.detach().cpu().clone() for n, p in model.named_parameters() if p.requires_grad}


def change_since(before: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return how far ``model`` has moved from what `trained_values` returned: its update."""
    return {name: value - before[name] for name, value in trained_values(model).items()}


def draw_sampling(image: Image, job: JobSpec, generator: np.random.Generator) -> Undersampled:
    """Undersample ``image`` with a pattern, acceleration factor and mask drawn from the job's."""
    spec = job.sampling
    sampling = Sampling(
        pattern=spec.patterns[generator.integers(len(spec.patterns))],
        acceleration=spec.accelerations[generator.integers(len(spec.accelerations))],
        acs_lines=spec.acs_lines,
    )
    return undersample(image, sampling, seed=int(generator.integers(2**31)))


def l1_loss(image: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error [B] of [B, y, x] magnitudes in units of the target's 99.5 percentile."""
    return ((image - target).abs() / _scale(target)).mean((-2, -1))


def ssim_loss(image: Tensor, target: Tensor) -> Tensor:
    """1 - SSIM [B] of [B, y, x] magnitudes, uniform 7×7 window (Wang et al., 10.1109/TIP.2003.819861).

    The data range is the maximum of each target image.
    """
    data_range = target.amax((-2, -1), keepdim=True)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    samples = SSIM_WINDOW**2
    unbiased = samples / (samples - 1)

    mean_x, mean_y = _window_mean(image), _window_mean(target)
    variance_x = unbiased * (_window_mean(image * image) - mean_x * mean_x)
    variance_y = unbiased * (_window_mean(target * target) - mean_y * mean_y)
    covariance = unbiased * (_window_mean(image * target) - mean_x * mean_y)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return 1 - (luminance * structure).mean((-2, -1))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": l1_loss, "ssim": ssim_loss}


def _window_mean(image: Tensor) -> Tensor:
    return functional.avg_pool2d(image[:, None], SSIM_WINDOW, stride=1)[:, 0]


def _scale(target: Tensor) -> Tensor:
    return torch.quantile(target.flatten(1), 0.995, dim=1)[:, None, None]


def _optimiser(spec: TrainingSpec, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    rate, decay = spec.learning_rate, spec.weight_decay
    if spec.optimiser == "sgd":
        return torch.optim.SGD(parameters, lr=rate, weight_decay=decay, momentum=0.9)
    if spec.optimiser == "adam":
        return torch.optim.Adam(parameters, lr=rate, weight_decay=decay)
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
