"""What the simulator does at one virtual site outside the federation, in a worker process."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcmr_client.dataset import all_images
from fedcmr_client.store.site_store import ScanRecord, SiteStore
from fedcmr_client.store.split import Split
from fedcmr_client.trainer import Trainer
from fedcmr_server.run_folder import RunFolder
from fedcmr_shared.errors import ModelError
from fedcmr_shared.kspace.masks import Sampling
from fedcmr_shared.models.bundle import load_bundle, save_bundle
from fedcmr_shared.models.cardiomm import CardioMM
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.text.encoders import CachedTextEncoder, TextEncoder, load_text_encoder
from fedcmr_simulations.centres import nth_centre, simulate_centre
from fedcmr_simulations.config import PhantomSpec
from fedcmr_simulations.evaluation import (
    METRICS,
    EvaluationRow,
    Method,
    NetworkReconstructor,
    SenseReconstructor,
    evaluate,
    tune_sense,
    zero_filled,
)
from fedcmr_simulations.examples import (
    make_example,
    representative,
    representative_image,
    save_example,
)


@dataclass(frozen=True)
class SiteTask:
    """One site's part of a simulated run; the first sampling is the headline.

    ``pretrained`` says that the run's first weights are worth a comparison of their own.
    """

    run: Path
    store: Path
    samplings: tuple[Sampling, ...]
    pretrained: bool

    @property
    def site(self) -> str:
        """Name of the site."""
        return self.store.name

    @property
    def local_bundle(self) -> Path:
        """Where the model that this site trains alone is kept."""
        return self.run / "local" / f"{self.site}.safetensors"

    def records(self, part: Split) -> list[ScanRecord]:
        """Scans of one part of the site's patients that the job may use."""
        with SiteStore.open(self.store) as store:
            return store.cohort(part, RunFolder(self.run).job.cohort)


@dataclass(frozen=True)
class PhantomSite:
    """The virtual patients of the hospital of this number, to be made below ``folder``."""

    folder: Path
    number: int
    seed: int
    spec: PhantomSpec


def simulate_site(site: PhantomSite) -> None:
    """Make the store of one hospital and fill it."""
    centre = nth_centre(site.number)
    root, spec = site.folder / centre.name, site.spec
    store = simulate_centre(root, centre, spec.patients, site.seed, spec.detail, split=spec.split())
    store.close()


def train_alone(task: SiteTask) -> None:
    """Train on this site only, without privacy: same start, sampling and number of steps.

    A step takes as many images as a private one expects to draw. The optimiser keeps its state
    over all steps, which favours this comparator: in the federation each round starts afresh.
    """
    folder = RunFolder(task.run)
    job = without_privacy(folder.job, task.site)
    model = _load(folder.bundle_path(0))
    trainer = Trainer(model, job, task.records("train"), _encoder(folder), site=task.site)
    trainer.run(0, job.rounds * job.training.local_steps)
    task.local_bundle.parent.mkdir(exist_ok=True)
    save_bundle(task.local_bundle, model.state_dict(), job.model, {"site": task.site})


def follow_rounds(task: SiteTask) -> list[dict[str, Any]]:
    """Score the federated model after every round on the site's validation patients."""
    folder = RunFolder(task.run)
    events = []
    for number in range(folder.job.rounds + 1):
        network = NetworkReconstructor(_load(folder.bundle_path(number)), _encoder(folder))
        methods: dict[str, Method] = {"federated": network}
        rows = _rows(task, "validation", task.samplings[:1], methods)
        means = {name: statistics.fmean(getattr(row, name) for row in rows) for name in METRICS}
        events.append({"round": number, "site": task.site, **means})
    return events


def evaluate_site(task: SiteTask) -> list[EvaluationRow]:
    """Score all methods on the site's test patients and save its example for the report.

    CG-SENSE is tuned on the site's validation patients, for each sampling and modality.
    """
    folder = RunFolder(task.run)
    seed = folder.job.seed
    encoder = _encoder(folder)
    validation = list(all_images(task.records("validation")))
    methods: dict[str, Method] = {
        "zero_filled": zero_filled,
        "sense": SenseReconstructor(tune_sense(validation, task.samplings, seed)),
        "local": NetworkReconstructor(_load(task.local_bundle), encoder),
        "federated": NetworkReconstructor(_load(folder.bundle_path(folder.job.rounds)), encoder),
    }
    if task.pretrained:
        methods["start"] = NetworkReconstructor(_load(folder.bundle_path(0)), encoder)
    rows = _rows(task, "test", task.samplings, methods)
    headline = task.samplings[0]
    image = representative_image(representative(rows, headline), task.records("test"))
    save_example(task.run / "examples", make_example(task.site, image, headline, methods, seed))
    return rows


def without_privacy(job: JobSpec, site: str) -> JobSpec:
    """Return ``job`` as one that trains on as many images a step, but exactly and in the open."""
    job = job.model_copy(update={"aggregation": "plain_with_local_dp"})
    if job.privacy is None:
        return job
    patients = job.privacy.sampling_rate * job.privacy.cohort_size * job.weight(site)
    images = max(1, round(patients * job.privacy.images_per_patient))
    training = job.training.model_copy(update={"batch_size": images})
    return job.model_copy(update={"privacy": None, "training": training})


def _rows(
    task: SiteTask, part: Split, samplings: tuple[Sampling, ...], methods: dict[str, Method]
) -> list[EvaluationRow]:
    images = all_images(task.records(part))
    seed = RunFolder(task.run).job.seed
    return list(evaluate(task.site, images, samplings, methods, seed))


def _load(path: Path) -> CardioMM:
    model = load_bundle(path).model
    if not isinstance(model, CardioMM):
        raise ModelError(f"{path} holds no reconstructor")
    return model


def _encoder(folder: RunFolder) -> TextEncoder:
    return CachedTextEncoder(load_text_encoder(folder.job.model.text_encoder))
