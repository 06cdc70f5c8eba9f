"""What a coordinator asks the sites to do: model, sampling, training and aggregation.

Everything here changes results. What only changes speed (devices, threads) is the site's own
business and no part of a job.
"""

from __future__ import annotations

import hashlib
import math
from datetime import date
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedcmr_shared.schemas.canonical import canonical_json
from fedcmr_shared.schemas.privacy import PrivacySpec

Pattern = Literal["uniform", "kt-uniform", "kt-gaussian", "kt-radial", "random", "radial"]
SizeClass = Literal["small", "medium", "large"]

Part = Literal["full", "decoder", "adapters", "prompts", "lora"]
"""What of a model a job trains; see `fedcmr_shared.privacy.parts`."""

SIZE_CLASS_WEIGHTS: Final[dict[SizeClass, int]] = {"small": 1, "medium": 2, "large": 4}
"""Public aggregation weights. A site's sample count is never sent, so the classes are coarse."""

Aggregation = Literal["secure_sum", "secure_groups", "plain_with_local_dp"]
"""What the coordinator opens: one sum, the sums of groups, or each site's noised update."""

RobustRule = Literal["mean", "median", "trimmed-mean", "krum"]
"""How the coordinator combines what it opens."""

FEWEST_SITES: Final = 3
"""A secure sum over fewer sites hides nothing from the others."""

_NAME = r"^[a-z0-9][a-z0-9-]{0,62}$"
_FROZEN = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSpec(BaseModel):
    """Which network: registry name, size, text variant and text encoder."""

    model_config = _FROZEN

    name: str = Field(
        default="cardiomm",
        description="registered name of the network, as `fedcmr models list` prints it",
    )
    size: Literal["tiny", "small", "paper"] = Field(
        default="tiny",
        description="tiny runs on a CPU, small on one GPU, paper is that of the publication",
    )
    variant: Literal["SM", "UT", "MT", "MM"] = Field(
        default="MM",
        description="words it is told: SM none, UT on undersampling, MT on the scan, MM both",
    )
    text_encoder: Literal["minilm", "clip", "hashed"] = Field(
        default="minilm",
        description="what reads words: minilm is packaged, clip a local folder, hashed for tests",
    )
    lora_rank: Annotated[int, Field(ge=0, le=256)] = Field(
        default=0, description="rank of the low-rank updates beside each layer; 0 for none"
    )


class SamplingSpec(BaseModel):
    """Undersampling drawn for each image: one pattern and one nominal acceleration factor."""

    model_config = _FROZEN

    patterns: Annotated[tuple[Pattern, ...], Field(min_length=1)] = Field(
        default=("uniform",),
        description="undersampling patterns, of which one is drawn for each image",
    )
    accelerations: Annotated[
        tuple[Annotated[float, Field(gt=1, le=64)], ...], Field(min_length=1)
    ] = Field(
        default=(4.0, 8.0),
        description="nominal acceleration factors, of which one is drawn for each image",
    )
    acs_lines: Annotated[int, Field(ge=4, le=64)] = Field(
        default=20, description="fully sampled lines in the centre of k-space"
    )


class TrainingSpec(BaseModel):
    """Local training of one round."""

    model_config = _FROZEN

    part: Part = Field(
        default="full",
        description="what of the model is trained and sent: fewer values need less noise",
    )
    local_steps: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        default=60, description="optimiser steps of a site in one round"
    )
    batch_size: Annotated[int, Field(ge=1)] = Field(
        default=1, description="images in a step without privacy; with it, patients are drawn"
    )
    optimiser: Literal["adam", "adamw", "sgd"] = Field(
        default="adamw", description="optimiser of the sites"
    )
    learning_rate: Annotated[float, Field(gt=0, le=10)] = Field(
        default=2e-3, description="learning rate of the sites at the first step"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="weight decay of the sites"
    )
    final_learning_rate_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.1, description="cosine decay over all rounds of the job ends at this fraction"
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(
        default=10, description="linear warm-up each time a site starts its optimiser anew"
    )
    loss: Literal["l1", "ssim"] = Field(
        default="l1", description="distance between reconstruction and reference image"
    )
    gradient_clip: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="norm of a step's gradient without privacy"
    )


class ServerOptimiserSpec(BaseModel):
    """Optimiser that the server applies to the pseudo-gradient (Reddi et al., 2003.00295)."""

    model_config = _FROZEN

    name: Literal["fedavg", "fedavgm", "fedadam", "fedyogi"] = Field(
        default="fedavg", description="how the server applies the mean update; fedavg adds it"
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="step along the mean update; 1 with fedavg adds all of it"
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.9, description="first-moment decay; not used by fedavg"
    )
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.99, description="second-moment decay of fedadam and fedyogi"
    )
    tau: Annotated[float, Field(gt=0)] = Field(
        default=1e-3, description="added to the root of the second moment in fedadam and fedyogi"
    )


class CohortQuery(BaseModel):
    """Which patients' scans a job may use; null does not restrict.

    A site answers only queries on attributes that its policy lists.
    """

    model_config = _FROZEN

    modalities: Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        default=None, description="modalities such as cine or LGE; null for all"
    )
    views: Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        default=None, description="views such as short-axis; null for all"
    )
    vendors: Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        default=None, description="vendors of the scanner; null for all"
    )
    acquired_from: date | None = Field(
        default=None, description="first day of acquisition (YYYY-MM-DD); null for any"
    )
    acquired_until: date | None = Field(
        default=None, description="last day of acquisition (YYYY-MM-DD); null for any"
    )

    def attributes(self) -> set[str]:
        """Names of the attributes that the query restricts."""
        return set(self.model_dump(exclude_none=True))


class ResourceSpec(BaseModel):
    """The most that the whole job may use at one site."""

    model_config = _FROZEN

    device_hours: Annotated[float, Field(gt=0)] = Field(
        default=24.0, description="hours of computing, all rounds together"
    )
    energy_kwh: Annotated[float, Field(gt=0)] = Field(
        default=10.0, description="energy, all rounds together"
    )


class SecureSpec(BaseModel):
    """How updates and totals travel through the secure sum; see `fedcmr_shared.secagg`."""

    model_config = _FROZEN

    word_bits: Literal[32, 24, 20, 16] = Field(
        default=32, description="bits on the wire for each value of an update"
    )
    update_range: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="each value of an update is clipped to plus or minus this"
    )
    group_size: Annotated[int, Field(ge=FEWEST_SITES, le=100)] = Field(
        default=FEWEST_SITES, description="fewest sites in a group of secure_groups"
    )
    post_quantum: bool = Field(
        default=False, description="ML-KEM-768 beside X25519 in the agreement of keys"
    )
    attempts: Annotated[int, Field(ge=1, le=10)] = Field(
        default=3, description="most attempts to open one sum; nobody trains again for them"
    )
    step_timeout_s: Annotated[float, Field(gt=0)] = Field(
        default=120.0, description="a site that answers a step later is lost for the attempt"
    )


class JobSpec(BaseModel):
    """One federated training job, as the coordinator publishes it.

    ``privacy`` null asks for training without privacy, which only simulated sites do.
    """

    model_config = _FROZEN

    schema_version: Literal["1"] = Field(default="1", description="version of this format")
    name: Annotated[str, Field(pattern=_NAME)] = Field(
        default="cardiomm", description="name for people: lower-case letters, digits, dashes"
    )
    coordinator: Annotated[str, Field(pattern=_NAME)] = Field(
        default="coordinator",
        description="name of the coordinator, which the policies of the sites allow",
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        default=0,
        description="seed of the first weights and of public randomness; noise never comes from it",
    )
    rounds: Annotated[int, Field(ge=1, le=10_000)] = Field(
        default=3, description="rounds of training"
    )
    minimum_sites: Annotated[int, Field(ge=1)] = Field(
        default=3, description="fewest sites in a round; with fewer the job waits"
    )
    round_timeout_s: Annotated[float, Field(gt=0)] = Field(
        default=3600.0,
        description="seconds that the sites have to train in one round; who is later is left out",
    )
    model: ModelSpec = Field(default=ModelSpec(), description="which network")
    sampling: SamplingSpec = Field(
        default=SamplingSpec(), description="how images are undersampled for training"
    )
    training: TrainingSpec = Field(
        default=TrainingSpec(), description="what a site does in one round"
    )
    server_optimiser: ServerOptimiserSpec = Field(
        default=ServerOptimiserSpec(), description="what the coordinator does with the mean update"
    )
    privacy: PrivacySpec | None = Field(
        default=None,
        description="what protects each patient; null: nothing, which only simulated sites do",
    )
    aggregation: Aggregation = Field(
        default="secure_sum",
        description="what the coordinator opens: secure_sum, one sum of all sites; secure_groups, "
        "the sums of groups of at least three; plain_with_local_dp, each site's noised update",
    )
    robust: RobustRule = Field(
        default="mean", description="how what the coordinator opens is combined"
    )
    max_update_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="updates or means of groups with a larger Euclidean norm are left out; "
        "null for no limit",
    )
    secure: SecureSpec = Field(
        default=SecureSpec(), description="how updates and totals travel through the secure sum"
    )
    cohort: CohortQuery = Field(
        default=CohortQuery(),
        description="whose scans the job uses, as far as the sites' policies let it ask",
    )
    resources: ResourceSpec = Field(
        default=ResourceSpec(), description="the most that the whole job may use at one site"
    )
    site_sizes: dict[str, SizeClass] = Field(
        default_factory=dict, description="public size class of each site; small when not named"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.training.part == "lora") != (self.model.lora_rank > 0):
            raise ValueError("training.part lora and model.lora_rank > 0 belong together")
        if self.aggregation != "plain_with_local_dp":
            self._check_secure()
        elif self.privacy is not None and self.privacy.evaluation.energy_total:
            raise ValueError(
                "privacy.evaluation.energy_total needs a secure sum: a site's own energy tells how "
                "many patients it has"
            )
        if self.privacy is not None and self.privacy.distributed is not None:
            self._check_distributed(self.privacy)
        return self

    def _check_secure(self) -> None:
        mode, least = self.aggregation, FEWEST_SITES
        if self.robust == "krum":
            raise ValueError("robust krum sees single updates: only plain_with_local_dp has them")
        if mode == "secure_sum" and self.robust != "mean":
            raise ValueError(
                f"robust {self.robust} does not fit secure_sum, which opens one sum: write mean, "
                "or aggregation secure_groups"
            )
        if mode == "secure_sum" and self.max_update_norm is not None:
            raise ValueError(
                "max_update_norm does not fit secure_sum, in which nobody sees single updates: "
                "write null, or aggregation secure_groups"
            )
        if mode == "secure_groups":
            # Of two groups, a median or trimmed mean is their mean.
            least = self.secure.group_size * (2 if self.robust == "mean" else 3)
        if self.minimum_sites < least:
            raise ValueError(
                f"minimum_sites is {self.minimum_sites}; aggregation {mode} with robust "
                f"{self.robust} needs at least {least}: write {least}, or plain_with_local_dp"
            )

    def _check_distributed(self, privacy: PrivacySpec) -> None:
        training, what = self.training, "privacy.distributed"
        if self.aggregation != "secure_sum":
            raise ValueError(f"{what} needs aggregation secure_sum: only one sum has all the noise")
        if training.local_steps != 1:
            raise ValueError(
                f"{what} needs training.local_steps 1, not {training.local_steps}: a site that "
                "moves on by itself needs the whole noise"
            )
        if training.optimiser != "sgd" or training.weight_decay != 0:
            raise ValueError(
                f"{what} needs training.optimiser sgd with weight_decay 0: the coordinator takes "
                "the step; choose its server_optimiser"
            )
        if set(self.site_sizes.values()) - {"small"}:
            raise ValueError(f"{what} needs equal shares: leave all sites in size class small")
        shares = privacy.noise_shares(self.minimum_sites)
        problem = shares.problem(privacy.noise_multiplier) if shares else None
        if problem:
            raise ValueError(f"{what}: {problem}")

    @property
    def sha256(self) -> str:
        """Identity of the job: SHA-256 (hexadecimal) of its canonical JSON."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json"))).hexdigest()

    def weight(self, site: str) -> int:
        """Public aggregation weight of ``site``."""
        return SIZE_CLASS_WEIGHTS[self.site_sizes.get(site, "small")]

    def learning_rate(self, step: int) -> float:
        """Cosine decay over all steps of the job, down to the spec's final fraction."""
        spec = self.training
        progress = step / max(1, self.rounds * spec.local_steps)
        low = spec.learning_rate * spec.final_learning_rate_fraction
        return low + (spec.learning_rate - low) * (1 + math.cos(math.pi * min(1.0, progress))) / 2

    def evaluated_rounds(self) -> tuple[int, ...]:
        """Rounds after which the sites score the model."""
        if self.privacy is None or self.privacy.evaluation.rounds == "all":
            return tuple(range(1, self.rounds + 1))
        return (self.rounds,) if self.privacy.evaluation.rounds == "last" else ()
