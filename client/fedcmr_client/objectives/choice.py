"""Which objective goes with which network."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import nn

from fedcmr_client.objectives.generation import GenerationObjective
from fedcmr_client.objectives.interface import Objective
from fedcmr_client.objectives.phenotypes import PhenotypeObjective
from fedcmr_client.objectives.reconstruction import ReconstructionObjective
from fedcmr_client.site_home import SiteHome
from fedcmr_shared.errors import ModelError
from fedcmr_shared.models.cardiomm import CardioMM
from fedcmr_shared.models.cpgg import CPGG
from fedcmr_shared.models.phenotype_gaussian import PhenotypeMoments
from fedcmr_shared.models.phenotype_vae import PhenotypeVAE
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.text.encoders import CachedTextEncoder, TextEncoder, load_text_encoder

AnyObjective = Objective[Any]
"""Of some family; only its own examples ever reach its loss."""


@lru_cache(maxsize=4)
def _encoder(name: str) -> TextEncoder:
    return CachedTextEncoder(load_text_encoder(name))


def load_encoder(job: JobSpec) -> TextEncoder:
    """Return the job's text encoder; each process loads it once."""
    return _encoder(job.model.text_encoder)


def checking_objective(model: nn.Module, job: JobSpec) -> AnyObjective:
    """Return the objective of ``model`` for checks of its gradients, which open no data.

    Raises:
        ModelError: sites train no such network.
    """
    return _objective(model, job, "cpu", None)


def training_objective(model: nn.Module, job: JobSpec, home: SiteHome, device: str) -> AnyObjective:
    """Return the objective of ``model`` on the data of a site.

    Raises:
        ModelError: sites train no such network.
        DataError: the store has no secret.
    """
    return _objective(model, job, device, home)


def _objective(model: nn.Module, job: JobSpec, device: str, home: SiteHome | None) -> AnyObjective:
    if isinstance(model, CardioMM):
        return ReconstructionObjective(job, load_encoder(job), device)
    if isinstance(model, CPGG):
        return GenerationObjective(model, job, device, home.latents(job) if home else None)
    if isinstance(model, PhenotypeVAE):
        config = model.config
        return PhenotypeObjective(config.standardisation, config.latents, job, device)
    if isinstance(model, PhenotypeMoments):
        return PhenotypeObjective(model.config.standardisation, 0, job, device)
    raise ModelError(f"model {job.model.name} is none that sites train")
