"""Flower ClientApp of a site.

The site tells the app where its store is; nothing of that comes from the coordinator. A deployed
site sets ``FEDCMR_SITE`` (its name) and ``FEDCMR_STORE`` (its store), and may set
``FEDCMR_DEVICE`` (``cpu``, ``cuda``, ``cuda:1``).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedcmr_client.dataset import all_images, undersample
from fedcmr_client.store.site_store import SiteStore
from fedcmr_client.trainer import Trainer, collate
from fedcmr_shared.errors import (
    ConfigurationError,
    DataError,
    FedcmrError,
    FederationError,
    ModelError,
)
from fedcmr_shared.federation.messages import Refusal, RefusalCode, Scores, Task, Update
from fedcmr_shared.kspace.masks import Sampling
from fedcmr_shared.metrics.image_quality import score
from fedcmr_shared.models.bundle import state_sha256
from fedcmr_shared.models.cardiomm import CardioMM
from fedcmr_shared.models.registry import build_model
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.text.encoders import CachedTextEncoder, TextEncoder, load_text_encoder

_log = logging.getLogger("fedcmr.site")

_CODES: tuple[tuple[type[FedcmrError], RefusalCode], ...] = (
    (ConfigurationError, "configuration"),
    (DataError, "data"),
    (ModelError, "model"),
    (FederationError, "federation"),
)


@dataclass(frozen=True)
class Site:
    """What a site knows of itself. ``threads`` and ``device`` only change speed."""

    name: str
    store: Path
    device: str = "cpu"
    threads: int | None = None


def create_client_app(site_of: Callable[[Context], Site]) -> ClientApp:
    """Return a ClientApp that works for the site that ``site_of`` finds."""
    client_app = ClientApp()

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        return _answer(message, site_of(context), train_round)

    @client_app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return _answer(message, site_of(context), evaluate_round)

    return client_app


def train_round(task: Task, site: Site) -> Update:
    """Train the task's model for one round on the site's training patients."""
    job = task.job
    model = _model(task)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    with SiteStore.open(site.store) as store:
        records = store.scans("train", job.modalities)
    trainer = Trainer(model, job, records, _encoder(job), site=site.name, device=site.device)
    steps = job.training.local_steps
    loss = trainer.run((task.round - 1) * steps, steps)
    after = dict(model.named_parameters())
    delta = {name: after[name].detach().cpu() - value for name, value in before.items()}
    return Update(site.name, task.round, state_sha256(task.state), delta, loss)


def evaluate_round(task: Task, site: Site) -> Scores:
    """Score the task's model on the site's validation patients, first sampling of the job."""
    job = task.job
    model = _model(task).to(site.device).eval()
    with SiteStore.open(site.store) as store:
        records = store.scans("validation", job.modalities)
    if not records:
        raise DataError("no validation scan: import more patients or change the split fractions")
    spec = job.sampling
    sampling = Sampling(spec.patterns[0], max(spec.accelerations), spec.acs_lines)
    by_patient: dict[str, list[tuple[float, float, float]]] = {}
    for image in all_images(records):
        item = undersample(image, sampling, seed=job.seed)
        (batch,) = collate([item], _encoder(job))
        batch = batch.to(torch.device(site.device))
        with torch.no_grad():
            output = model(
                batch.measured, batch.mask, batch.acs, batch.metadata_text, batch.sampling_text
            )
        quality = score(batch.target[0].cpu().numpy(), output.image[0].cpu().numpy())
        values = (quality.psnr, quality.ssim, quality.nmse)
        by_patient.setdefault(image.record.patient, []).append(values)
    means = [torch.tensor(values, dtype=torch.float64).mean(0) for values in by_patient.values()]
    psnr, ssim, nmse = torch.stack(means).mean(0).tolist()
    return Scores(
        site.name, task.round, state_sha256(task.state), {"psnr": psnr, "ssim": ssim, "nmse": nmse}
    )


def _answer(message: Message, site: Site, work: Callable[[Task, Site], Update | Scores]) -> Message:
    if site.threads is not None:
        torch.set_num_threads(site.threads)
    answer: Update | Scores | Refusal
    try:
        answer = work(Task.unpack(message.content), site)
    except FedcmrError as error:
        # The text may describe data and stays here; the coordinator learns the code alone.
        _log.error("site %s refuses: %s", site.name, error)
        answer = Refusal(site.name, _code(error))
    return Message(answer.pack(), reply_to=message)


def _code(error: FedcmrError) -> RefusalCode:
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return "federation"


def _model(task: Task) -> CardioMM:
    model = build_model(task.job.model)
    if not isinstance(model, CardioMM):
        raise ModelError(
            f"model {task.job.model.name} is not a reconstructor that a site can train"
        )
    try:
        model.load_state_dict(dict(task.state))
    except RuntimeError as error:
        raise ModelError(f"the task's weights do not fit {task.job.model.name}: {error}") from error
    return model


@lru_cache(maxsize=4)
def _load_encoder(name: str) -> TextEncoder:
    return CachedTextEncoder(load_text_encoder(name))


def _encoder(job: JobSpec) -> TextEncoder:
    return _load_encoder(job.model.text_encoder)


def _site_from_environment(context: Context) -> Site:
    try:
        name, store = os.environ["FEDCMR_SITE"], os.environ["FEDCMR_STORE"]
    except KeyError as error:
        raise ConfigurationError(f"set the environment variable {error.args[0]}") from error
    return Site(name, Path(store), os.environ.get("FEDCMR_DEVICE", "cpu"))


app = create_client_app(_site_from_environment)
