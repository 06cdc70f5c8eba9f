"""What a coordinator asks the sites to do: model, sampling, training and aggregation.

Everything here changes results. What only changes speed (devices, threads) is the site's own
business and no part of a job.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Pattern = Literal["uniform", "kt-uniform", "kt-gaussian", "kt-radial", "random", "radial"]
SizeClass = Literal["small", "medium", "large"]

SIZE_CLASS_WEIGHTS: Final[dict[SizeClass, float]] = {"small": 1.0, "medium": 2.0, "large": 4.0}
"""Public aggregation weights. A site's sample count is never sent, so the classes are coarse."""

_FROZEN = ConfigDict(frozen=True, extra="forbid")


class ModelSpec(BaseModel):
    """Which network: registry name, size, text variant and text encoder."""

    model_config = _FROZEN

    name: str = "cardiomm"
    size: Literal["tiny", "small", "paper"] = "tiny"
    variant: Literal["SM", "UT", "MT", "MM"] = "MM"
    text_encoder: Literal["minilm", "clip", "hashed"] = "minilm"


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

    local_steps: Annotated[int, Field(ge=1)] = 60
    batch_size: Annotated[int, Field(ge=1)] = 1
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
    gradient_clip: Annotated[float, Field(gt=0)] = 1.0


class ServerOptimiserSpec(BaseModel):
    """Optimiser that the server applies to the pseudo-gradient (Reddi et al., 2003.00295)."""

    model_config = _FROZEN

    name: Literal["fedavg", "fedavgm", "fedadam", "fedyogi"] = "fedavg"
    learning_rate: Annotated[float, Field(gt=0)] = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: Annotated[float, Field(gt=0)] = 1e-3


class JobSpec(BaseModel):
    """One federated training job, as the coordinator publishes it."""

    model_config = _FROZEN

    schema_version: Literal["1"] = "1"
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")] = "cardiomm"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    rounds: Annotated[int, Field(ge=1, le=10_000)] = 3
    minimum_sites: Annotated[int, Field(ge=1)] = 1
    round_timeout_s: Annotated[float, Field(gt=0)] = 3600.0
    model: ModelSpec = ModelSpec()
    sampling: SamplingSpec = SamplingSpec()
    training: TrainingSpec = TrainingSpec()
    server_optimiser: ServerOptimiserSpec = ServerOptimiserSpec()
    modalities: tuple[str, ...] | None = Field(
        default=None, description="train on these modalities only; null for all"
    )
    site_sizes: dict[str, SizeClass] = Field(
        default_factory=dict, description="public size class of each site; small when not named"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.modalities is not None and not self.modalities:
            raise ValueError("modalities must be null (all) or name at least one modality")
        return self

    def weight(self, site: str) -> float:
        """Public aggregation weight of ``site``."""
        return SIZE_CLASS_WEIGHTS[self.site_sizes.get(site, "small")]
