"""Starting weights from simulated or public data, so that private training is a fine-tune.

The training is not private. Data of patients therefore has no place here unless it is public:
what a network has learned without privacy stays in every model that starts from it.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Final, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedcmr_client.dataset import all_images
from fedcmr_client.store.site_store import ScanRecord, SiteStore
from fedcmr_client.store.split import Split
from fedcmr_client.trainer import Trainer
from fedcmr_shared.errors import ConfigurationError, DataError, ModelError
from fedcmr_shared.kspace.masks import Sampling
from fedcmr_shared.models.bundle import save_bundle, state_sha256
from fedcmr_shared.models.cardiomm import CardioMM
from fedcmr_shared.models.registry import build_model
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.text.encoders import CachedTextEncoder, TextEncoder, load_text_encoder
from fedcmr_simulations.centres import PRETRAINING_CENTRES, simulate_centre
from fedcmr_simulations.config import PhantomSpec, read_config
from fedcmr_simulations.evaluation import (
    EvaluationRow,
    Method,
    NetworkReconstructor,
    evaluate,
    zero_filled,
)
from fedcmr_simulations.progress import Advance, Progress
from fedcmr_simulations.sites import site_folders

PRIVACY: Final = "none - public or simulated data only"
_NAME: Final = "pretraining"
_REPORT_STEPS: Final = 100
_PACKAGES: Final = ("fedcmr", "torch", "numpy")


class PretrainingConfig(BaseModel):
    """What pretraining runs: one job without privacy in one round of ``local_steps`` steps.

    ``phantom`` lists the virtual patients of each pretraining centre, one entry per level of
    detail, so that the weights serve several image sizes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    job: JobSpec = JobSpec(rounds=1)
    phantom: Annotated[tuple[PhantomSpec, ...], Field(min_length=1)] = (PhantomSpec(),)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.job.rounds != 1:
            raise ValueError("job.rounds must be 1: set training.local_steps")
        if self.job.privacy is not None:
            raise ValueError("job.privacy must be null: pretraining has no ledger to charge")
        return self

    def changed(self, steps: int | None, seed: int | None) -> Self:
        """Return the configuration with another number of steps or seed, where given."""
        job = self.job
        if steps is not None:
            training = job.training.model_copy(update={"local_steps": steps})
            job = job.model_copy(update={"training": training})
        if seed is not None:
            job = job.model_copy(update={"seed": seed})
        return self.model_copy(update={"job": job})


@dataclass(frozen=True)
class PretrainingRequest:
    """Where the bundle goes and what it is trained on.

    ``data`` is a sites folder, or None for phantom patients. ``public`` vouches that all data of
    patients in it are public. ``command`` is what the lineage shall say.
    """

    config: PretrainingConfig
    out: Path
    data: Path | None = None
    public: bool = False
    command: str = ""


def default_start() -> Path:
    """Return the packaged starting weights: CardioMM `tiny`, pretrained on simulated patients."""
    weights = resources.files("fedcmr_simulations") / "weights" / "cardiomm-tiny.safetensors"
    return Path(str(weights))


def load_pretraining(path: Path | None) -> PretrainingConfig:
    """Read a YAML file, or the packaged configuration when ``path`` is None.

    Raises:
        ConfigurationError: the file is missing, is no YAML mapping or has a wrong field.
    """
    return read_config(PretrainingConfig, path, "pretrain.yaml")


def pretrain(request: PretrainingRequest, progress: Progress) -> dict[str, Any]:
    """Train without privacy, write the bundle and return what its lineage says.

    The result also holds ``sha256`` (of the weights), ``file_sha256``, ``bytes`` and
    ``parameters``.

    Raises:
        ConfigurationError: the bundle has no folder to go to.
        DataError: the data are not simulated and not declared public, or a part is empty.
        ModelError: the job names no reconstructor, or the bundle cannot be written.
        FederationError: the loss is not finite.
    """
    if not request.out.absolute().parent.is_dir():
        raise ConfigurationError(f"--out {request.out}: its folder does not exist: make it first")
    with TemporaryDirectory() as scratch:
        stores = _stores(request, Path(scratch), progress)
        training, held_out = _records(stores, "train"), _records(stores, "validation", "test")
        _refuse_private([*training, *held_out], request)
        if not held_out:
            raise DataError(f"{request.data} holds no validation or test patient: change its split")
        model, encoder = _train(request.config, training, progress)
        scores = _held_out_scores(request.config.job, model, encoder, held_out)
    lineage = _lineage(request, training, scores)
    extra = {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in lineage.items()
    }
    save_bundle(request.out, model.state_dict(), request.config.job.model, extra)
    content = request.out.read_bytes()
    return {
        **lineage,
        "sha256": state_sha256(model.state_dict()),
        "file_sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _stores(request: PretrainingRequest, scratch: Path, progress: Progress) -> list[Path]:
    if request.data is not None:
        return site_folders(request.data)
    specs = request.config.phantom
    patients = len(PRETRAINING_CENTRES) * sum(spec.patients for spec in specs)
    with progress.stage("simulating patients", patients) as advance:
        return [
            path
            for index, spec in enumerate(specs)
            for path in _simulate(scratch, request.config.job.seed, index, spec, advance)
        ]


def _simulate(
    scratch: Path, seed: int, index: int, spec: PhantomSpec, advance: Advance
) -> list[Path]:
    paths = []
    for centre in PRETRAINING_CENTRES:
        path = scratch / f"{centre.name}-{index}"
        # Another seed for each level of detail: the same patient twice would be no new one.
        simulate_centre(
            path, centre, spec.patients, 1000 * seed + index, spec.detail, advance, spec.split()
        ).close()
        paths.append(path)
    return paths


def _records(stores: Sequence[Path], *parts: Split) -> list[ScanRecord]:
    records = []
    for path in stores:
        with SiteStore.open(path) as store:
            records += [scan for part in parts for scan in store.scans(part)]
    return records


def _refuse_private(records: Sequence[ScanRecord], request: PretrainingRequest) -> None:
    origins = {record.metadata.origin for record in records} - {"simulated"}
    if origins and not request.public:
        raise DataError(
            f"{request.data} holds {' and '.join(sorted(origins))} data: weights trained without "
            "privacy may give patients away; use simulated data, or --public if all of it is public"
        )


def _train(
    config: PretrainingConfig, records: Sequence[ScanRecord], progress: Progress
) -> tuple[CardioMM, TextEncoder]:
    job = config.job
    torch.manual_seed(job.seed)
    model = build_model(job.model)
    if not isinstance(model, CardioMM):
        raise ModelError(f"job.model.name: {job.model.name} is no reconstructor: use cardiomm")
    encoder = CachedTextEncoder(load_text_encoder(job.model.text_encoder))
    trainer = Trainer(model, job, records, encoder, site=_NAME)
    steps = job.training.local_steps
    starts = range(0, steps, _REPORT_STEPS)
    with progress.stage("training", len(starts)) as advance:
        for first in starts:
            done = min(first + _REPORT_STEPS, steps)
            loss = trainer.run(first, done - first)
            advance(f"step {done}/{steps}: loss {loss:.4f}")
    return model, encoder


def _held_out_scores(
    job: JobSpec, model: CardioMM, encoder: TextEncoder, records: Sequence[ScanRecord]
) -> list[dict[str, Any]]:
    """Mean PSNR over held-out patients of the zero-filled image and of the network."""
    spec = job.sampling
    network = NetworkReconstructor(model, encoder)
    methods: dict[str, Method] = {"zero_filled": zero_filled, "network": network}
    scores = []
    for pattern in spec.patterns:
        for acceleration in sorted(set(spec.accelerations)):
            sampling = Sampling(pattern, acceleration, spec.acs_lines)
            rows = list(evaluate(_NAME, all_images(records), [sampling], methods, job.seed))
            means = {f"psnr_{name}": _patient_mean(rows, name) for name in methods}
            case = {"pattern": pattern, "nominal_af": acceleration, "acs_lines": spec.acs_lines}
            scores.append({**case, "patients": len({row.patient for row in rows}), **means})
    return scores


def _patient_mean(rows: Sequence[EvaluationRow], method: str) -> float:
    by_patient: dict[str, list[float]] = {}
    for row in rows:
        if row.method == method:
            by_patient.setdefault(row.patient, []).append(row.psnr)
    return statistics.fmean(statistics.fmean(values) for values in by_patient.values())


def _lineage(
    request: PretrainingRequest, records: Sequence[ScanRecord], held_out: list[dict[str, Any]]
) -> dict[str, Any]:
    """Where the weights come from; paths stay out, for they belong to somebody's machine."""
    job = request.config.job
    origins = sorted({record.metadata.origin for record in records})
    return {
        "origin": " and ".join(f"public {o}" if o != "simulated" else o for o in origins),
        "privacy": PRIVACY,
        "centres": sorted({record.metadata.centre or "unknown" for record in records}),
        "patients": len({record.patient for record in records}),
        "images": sum(scan.metadata.frames * scan.metadata.slices for scan in records),
        "command": request.command,
        "seed": job.seed,
        "steps": job.training.local_steps,
        "configuration": request.config.model_dump(mode="json"),
        "versions": {name: version(name) for name in _PACKAGES},
        "held_out": held_out,
    }
