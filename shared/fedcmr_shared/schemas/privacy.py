"""What a job declares about privacy; a site's policy decides whether that is enough.

Everything here is public and independent of the data: sampling rate, steps, denominators and
weights come from a coarse cohort size that the job declares, never from a site's catalogue.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

_FROZEN = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

Engine = Literal["backward", "hooks", "functorch"]
Clipping = Literal["flat", "per-layer"]
Metric = Literal["psnr", "ssim", "nmse"]


def _coarse(value: int) -> int:
    digits = str(value)
    if set(digits[1:]) > {"0"}:
        raise ValueError(f"{value} is not coarse: use one digit and zeros, such as 80 or 300")
    return value


class EvaluationSpec(BaseModel):
    """How scores on held-out patients leave a site.

    Each patient's scores are clipped to the public ranges of
    :data:`fedcmr_shared.privacy.evaluation.SCORE_RANGES`, summed and noised. With
    ``noise_multiplier`` null the sums leave without noise, which a site's policy must allow and
    the job's claim says in words.
    """

    model_config = _FROZEN

    noise_multiplier: Annotated[float, Field(gt=0)] | None = 4.0
    rounds: Literal["none", "last", "all"] = Field(
        default="last", description="after which rounds the sites score the model"
    )
    metrics: Annotated[tuple[Metric, ...], Field(min_length=1)] = ("psnr",)
    cohort_size: Annotated[int, Field(ge=1), AfterValidator(_coarse)] = Field(
        default=100,
        description="coarse number of held-out patients of a site of size class small: the "
        "public denominator of the means",
    )


class PrivacySpec(BaseModel):
    """Patient-level DP-SGD (Charles et al., arXiv 2407.07737): the mechanism of every site.

    The unit is the patient over all scans, visits and modalities. The relation is zero-out: one
    patient's contribution is replaced by zero while all public numbers stay.
    """

    model_config = _FROZEN

    unit: Literal["patient"] = "patient"
    relation: Literal["zero-out"] = "zero-out"
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    cohort_size: Annotated[int, Field(ge=10), AfterValidator(_coarse)] = Field(
        default=200,
        description="coarse number of training patients of a site of size class small; "
        "sampling_rate times this, times the size class's weight, is the public denominator",
    )
    sampling_rate: Annotated[float, Field(gt=0, le=1)] = 0.1
    noise_multiplier: Annotated[float, Field(gt=0)] = 1.0
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    clipping: Clipping = "flat"
    images_per_patient: Annotated[int, Field(ge=1, le=10_000)] = Field(
        default=1, description="at most this many images of a patient in one step"
    )
    augmentations: Annotated[int, Field(ge=1, le=1000)] = Field(
        default=1, description="undersampling masks per image, averaged inside the patient"
    )
    engine: Engine = "backward"
    spare_rounds: Annotated[int, Field(ge=0, le=10_000)] = Field(
        default=1, description="rounds reserved for repeating those whose update was lost"
    )
    evaluation: EvaluationSpec = EvaluationSpec()
