"""What a coordinator asks the sites to do: model, sampling, training and aggregation.

Everything here changes results. What only changes speed (devices, threads) is the site's own
business and no part of a job.
"""

from __future__ import annotations

import hashlib
from datetime import date
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedcmr_shared.schemas.canonical import canonical_json
from fedcmr_shared.schemas.privacy import PrivacySpec

Pattern = Literal["uniform", "kt-uniform", "kt-gaussian", "kt-radial", "random", "radial"]
SizeClass = Literal["small", "medium", "large"]

Part = Literal["full", "decoder", "adapters", "prompts", "lora"]
"""What of a model a job trains; see `fedcmr_shared.privacy.parts`."""

SIZE_CLASS_WEIGHTS: Final[dict[SizeClass, float]] = {"small": 1.0, "medium": 2.0, "large": 4.0}
"""Public aggregation weights. A site's sample count is never sent, so the classes are coarse."""

_NAME = r"^[a-z0-9][a-z0-9-]{0,62}$"
_FROZEN = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSpec(BaseModel):
    """Which network: registry name, size, text variant and text encoder."""

    model_config = _FROZEN

    name: str = "cardiomm"
    size: Literal["tiny", "small", "paper"] = "tiny"
    variant: Literal["SM", "UT", "MT", "MM"] = "MM"
    text_encoder: Literal["minilm", "clip", "hashed"] = "minilm"
    lora_rank: Annotated[int, Field(ge=0, le=256)] = Field(
        default=0, description="rank of the low-rank updates beside each layer; 0 for none"
    )


class SamplingSpec(BaseModel):
    """Undersampling drawn for each image: one pattern and one nominal acceleration factor."""

    model_config = _FROZEN

    patterns: Annotated[tuple[Pattern, ...], Field(min_length=1)] = ("uniform",)
    accelerations: Annotated[
        tuple[Annotated[float, Field(gt=1, le=64)], ...], Field(min_length=1)
    ] = (4.0, 8.0)
    acs_lines: Annotated[int, Field(ge=4, le=64)] = 20


class TrainingSpec(BaseModel):
    """Local training of one round."""

    model_config = _FROZEN

    part: Part = "full"
    local_steps: Annotated[int, Field(ge=1, le=1_000_000)] = 60
    batch_size: Annotated[int, Field(ge=1)] = Field(
        default=1, description="images in a step without privacy; with it, patients are drawn"
    )
    optimiser: Literal["adam", "adamw", "sgd"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    final_learning_rate_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.1, description="cosine decay over all rounds of the job ends at this fraction"
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(
        default=10, description="linear warm-up each time a site starts its optimiser anew"
    )
    loss: Literal["l1", "ssim"] = "l1"
    gradient_clip: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="norm of a step's gradient without privacy"
    )


class ServerOptimiserSpec(BaseModel):
    """Optimiser that the server applies to the pseudo-gradient (Reddi et al., 2003.00295)."""

    model_config = _FROZEN

    name: Literal["fedavg", "fedavgm", "fedadam", "fedyogi"] = "fedavg"
    learning_rate: Annotated[float, Field(gt=0)] = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: Annotated[float, Field(gt=0)] = 1e-3


class CohortQuery(BaseModel):
    """Which patients' scans a job may use; null does not restrict.

    A site answers only queries on attributes that its policy lists.
    """

    model_config = _FROZEN

    modalities: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    views: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    vendors: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    acquired_from: date | None = None
    acquired_until: date | None = None

    def attributes(self) -> set[str]:
        """Names of the attributes that the query restricts."""
        return set(self.model_dump(exclude_none=True))


class ResourceSpec(BaseModel):
    """The most that the whole job may use at one site."""

    model_config = _FROZEN

    device_hours: Annotated[float, Field(gt=0)] = 24.0
    energy_kwh: Annotated[float, Field(gt=0)] = 10.0


class JobSpec(BaseModel):
    """One federated training job, as the coordinator publishes it.

    ``privacy`` null asks for training without privacy, which only simulated sites do.
    """

    model_config = _FROZEN

    schema_version: Literal["1"] = "1"
    name: Annotated[str, Field(pattern=_NAME)] = "cardiomm"
    coordinator: Annotated[str, Field(pattern=_NAME)] = "coordinator"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    rounds: Annotated[int, Field(ge=1, le=10_000)] = 3
    minimum_sites: Annotated[int, Field(ge=1)] = 1
    round_timeout_s: Annotated[float, Field(gt=0)] = 3600.0
    model: ModelSpec = ModelSpec()
    sampling: SamplingSpec = SamplingSpec()
    training: TrainingSpec = TrainingSpec()
    server_optimiser: ServerOptimiserSpec = ServerOptimiserSpec()
    privacy: PrivacySpec | None = None
    aggregation: Literal["plain", "secure"] = "plain"
    cohort: CohortQuery = CohortQuery()
    resources: ResourceSpec = ResourceSpec()
    site_sizes: dict[str, SizeClass] = Field(
        default_factory=dict, description="public size class of each site; small when not named"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.training.part == "lora") != (self.model.lora_rank > 0):
            raise ValueError("training.part lora and model.lora_rank > 0 belong together")
        return self

    @property
    def sha256(self) -> str:
        """Identity of the job: SHA-256 (hexadecimal) of its canonical JSON."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json"))).hexdigest()

    def weight(self, site: str) -> float:
        """Public aggregation weight of ``site``."""
        return SIZE_CLASS_WEIGHTS[self.site_sizes.get(site, "small")]

    def evaluated_rounds(self) -> tuple[int, ...]:
        """Rounds after which the sites score the model."""
        if self.privacy is None or self.privacy.evaluation.rounds == "all":
            return tuple(range(1, self.rounds + 1))
        return (self.rounds,) if self.privacy.evaluation.rounds == "last" else ()
