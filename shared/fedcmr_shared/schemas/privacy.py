"""What a job declares about privacy; a site's policy decides whether that is enough.

Everything here is public and independent of the data: sampling rate, steps, denominators and
weights come from a coarse cohort size that the job declares, never from a site's catalogue.
"""

from __future__ import annotations

import math
from typing import Annotated, Final, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

_FROZEN = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

Engine = Literal["backward", "hooks", "functorch"]
Clipping = Literal["flat", "per-layer"]
Metric = Literal["psnr", "ssim", "nmse", "memorisation"]
"""Scores of held-out patients, or the outcome of a generator's memorisation gate."""


def _coarse(value: int) -> int:
    digits = str(value)
    if set(digits[1:]) > {"0"}:
        raise ValueError(f"{value} is not coarse: use one digit and zeros, such as 80 or 300")
    return value


def _some_bins(value: int) -> int:
    if value == 1:
        raise ValueError("1 bin shows nothing: use 2 to 50, or 0 for no histogram")
    return value


class EvaluationSpec(BaseModel):
    """How scores on held-out patients leave a site.

    Each patient's scores are clipped to the public ranges of
    :data:`fedcmr_shared.privacy.evaluation.SCORE_RANGES`, then totalled and noised
    (:func:`fedcmr_shared.privacy.evaluation.noisy_totals`). With ``noise_multiplier`` null the
    totals leave without noise, which a site's policy must allow and the job's claim says in words.

    *memorisation* asks for something else: each site searches the last model's samples for copies
    of its patients, and of the outcome only one bit leaves, in a secure sum and without noise.
    """

    model_config = _FROZEN

    noise_multiplier: Annotated[float, Field(gt=0)] | None = Field(
        default=4.0,
        description="noise on the totals of the scores, in units of their bound; null for none",
    )
    rounds: Literal["none", "last", "all"] = Field(
        default="last", description="after which rounds the sites score the model"
    )
    metrics: Annotated[tuple[Metric, ...], Field(min_length=1)] = Field(
        default=("psnr",),
        description="scores of each held-out patient; for a generator memorisation, alone, with "
        "noise_multiplier null and rounds last",
    )
    cohort_size: Annotated[int, Field(ge=1), AfterValidator(_coarse)] = Field(
        default=100,
        description="coarse number of held-out patients of a site of size class small: a public "
        "bound of the totals follows from it",
    )
    histogram_bins: Annotated[int, Field(ge=0, le=50), AfterValidator(_some_bins)] = Field(
        default=0, description="bins of a histogram of each metric over patients; 0 for none"
    )

    energy_total: bool = Field(
        default=False,
        exclude_if=lambda asked: asked is False,  # jobs of before keep their identity
        description="let each site add the energy that the job took, rounded up, to the sum of all "
        "sites; not where each site's figures are seen by themselves",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        plain = (self.noise_multiplier, self.rounds, self.histogram_bins) == (None, "last", 0)
        if "memorisation" in self.metrics and not (len(self.metrics) == 1 and plain):
            raise ValueError(
                "metrics memorisation is one bit after the last round: write it alone, with "
                "noise_multiplier null, rounds last and histogram_bins 0"
            )
        return self

    @property
    def memorisation(self) -> bool:
        """Whether the sites run the memorisation gate instead of scoring patients."""
        return self.metrics == ("memorisation",)


LEAST_SHARE: Final = 16.0
"""Least standard deviation of a site's share, in grid steps: sums of shares are then discrete
Gaussian themselves, with a relative error below 10^-1000."""
MOST_SHARE: Final = 2.0**40


class DistributedNoise(BaseModel):
    """Each site adds its share of discrete Gaussian noise, so that the secure sum has the whole.

    ``noise_multiplier`` of the job is then that of the sum over ``minimum_sites`` less
    ``unseen_sites``. Unlike a site's own noise this protects nobody when secure aggregation fails,
    or when more sites than declared work with the coordinator; every claim says so. See
    :mod:`fedcmr_shared.privacy.distributed`.
    """

    model_config = _FROZEN

    unseen_sites: Annotated[int, Field(ge=0, le=98)] = Field(
        description="at most so many of the summed sites work with the coordinator: their shares "
        "of the noise count nothing"
    )
    levels: Annotated[int, Field(ge=2**14, le=2**24)] = Field(
        default=2**18,
        description="steps of the integer grid in one clip norm: more are finer, and need larger "
        "words",
    )


class NoiseShares(BaseModel):
    """Noise that at least ``sites`` sites make together, ``unseen_sites`` of them not counted.

    One patient moves the integer sum by at most ``levels`` in the Euclidean norm.
    """

    model_config = _FROZEN

    levels: Annotated[int, Field(ge=2**14, le=2**24)]
    sites: Annotated[int, Field(ge=3)]
    unseen_sites: Annotated[int, Field(ge=0)]

    def variance(self, noise_multiplier: float) -> float:
        """Return the variance of one site's share, in squared grid steps.

        The shares of the sites that count add up to (noise multiplier · levels)².
        """
        deviation = noise_multiplier * self.levels
        return deviation * deviation / (self.sites - self.unseen_sites)

    def problem(self, noise_multiplier: float | None) -> str | None:
        """Say why shares cannot make up this noise; None when they can."""
        if noise_multiplier is None:
            return "distributed noise needs a noise multiplier"
        if self.sites - self.unseen_sites < 2:
            return (
                f"{self.sites} sites less {self.unseen_sites} unseen_sites leave fewer than two to "
                "share the noise: raise minimum_sites or lower unseen_sites"
            )
        deviation = math.sqrt(self.variance(noise_multiplier))
        if not LEAST_SHARE <= deviation <= MOST_SHARE:
            return (
                f"a site's share of the noise deviates by {deviation:.4g} grid steps, not by "
                f"{LEAST_SHARE:g} to 2^40: change noise_multiplier or distributed.levels"
            )
        return None


class PrivacySpec(BaseModel):
    """Patient-level DP-SGD (Charles et al., arXiv 2407.07737): the mechanism of every site.

    The unit is the patient over all scans, visits and modalities. The relation is zero-out: one
    patient's contribution is replaced by zero while all public numbers stay.
    """

    model_config = _FROZEN

    unit: Literal["patient"] = Field(
        default="patient", description="who is protected: the patient, over all scans and visits"
    )
    relation: Literal["zero-out"] = Field(
        default="zero-out",
        description="what is hidden: that one patient's contribution is replaced by zero",
    )
    delta: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=1e-5,
        description="delta of epsilon; far below one divided by the number of patients",
    )
    cohort_size: Annotated[int, Field(ge=10), AfterValidator(_coarse)] = Field(
        default=200,
        description="coarse number of training patients of a site of size class small; "
        "sampling_rate times this, times the size class's weight, is the public denominator",
    )
    sampling_rate: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.1, description="probability with which each patient takes part in a step"
    )
    noise_multiplier: Annotated[float, Field(gt=0)] = Field(
        default=1.0,
        description="standard deviation of the noise in units of clip_norm; see `fedcmr site plan`",
    )
    clip_norm: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="largest Euclidean norm of one patient's gradient"
    )
    clipping: Clipping = Field(
        default="flat",
        description="clip the whole gradient (flat) or each layer by itself (per-layer)",
    )
    images_per_patient: Annotated[int, Field(ge=1, le=10_000)] = Field(
        default=1, description="at most this many images of a patient in one step"
    )
    augmentations: Annotated[int, Field(ge=1, le=1000)] = Field(
        default=1, description="undersampling masks per image, averaged inside the patient"
    )
    engine: Engine = Field(
        default="backward",
        description="how gradients of single patients are computed; all give the same ones",
    )
    spare_rounds: Annotated[int, Field(ge=0, le=10_000)] = Field(
        default=1, description="rounds reserved for repeating those whose update was lost"
    )
    distributed: DistributedNoise | None = Field(
        default=None,
        description="sites add shares of the noise; null: each adds the whole, which holds also "
        "when secure aggregation fails",
    )
    evaluation: EvaluationSpec = Field(
        default=EvaluationSpec(), description="how scores on held-out patients leave a site"
    )

    def noise_shares(self, sites: int) -> NoiseShares | None:
        """Return how at least ``sites`` sites share the noise; None when each adds the whole."""
        if self.distributed is None:
            return None
        return NoiseShares(
            levels=self.distributed.levels,
            sites=sites,
            unseen_sites=self.distributed.unseen_sites,
        )
