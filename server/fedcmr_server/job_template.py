"""A job file to begin with, which explains every field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.schemas.explained import explained_yaml
from fedcmr_shared.schemas.job import JobSpec, ModelSpec, SamplingSpec, TrainingSpec
from fedcmr_shared.schemas.privacy import EvaluationSpec, PrivacySpec

_HEADER: Final = (
    "A job: what the sites are asked to do. Every field is here with what it means; one that is "
    "left out keeps the value shown by `fedcmr schema show job`. Each site's own policy decides "
    "whether it takes part, and its `fedcmr site check` says so before the job is submitted."
)

_ONE_STEP: Final = TrainingSpec(
    local_steps=1,
    optimiser="sgd",
    learning_rate=1.0,
    final_learning_rate_fraction=1.0,
    warmup_steps=0,
)
"""One plain step a round: the update is the noised mean gradient times the learning rate."""

TEMPLATES: Final[Mapping[str, JobSpec]] = {
    "cardiomm": JobSpec(
        name="cardiomm-tiny",
        rounds=10,
        model=ModelSpec(name="cardiomm", size="tiny", variant="MM", text_encoder="minilm"),
        sampling=SamplingSpec(patterns=("uniform",), accelerations=(4.0, 8.0), acs_lines=16),
        training=TrainingSpec(
            local_steps=4,
            optimiser="adam",
            learning_rate=8e-3,
            warmup_steps=2,
        ),
        privacy=PrivacySpec(
            cohort_size=300,
            sampling_rate=0.1,
            noise_multiplier=1.5,
            clip_norm=0.025,
            spare_rounds=2,
            evaluation=EvaluationSpec(noise_multiplier=4.0, cohort_size=40, energy_total=True),
        ),
    ),
    "cpgg": JobSpec(
        name="cpgg-tiny",
        rounds=10,
        model=ModelSpec(name="cpgg", size="tiny"),
        training=_ONE_STEP.model_copy(update={"part": "prompts", "learning_rate": 0.1}),
        privacy=PrivacySpec(
            cohort_size=300,
            sampling_rate=0.5,
            noise_multiplier=4.0,
            clip_norm=1.0,
            augmentations=4,
            spare_rounds=2,
            evaluation=EvaluationSpec(
                noise_multiplier=None, metrics=("memorisation",), energy_total=True
            ),
        ),
    ),
    "phenotype-gaussian": JobSpec(
        name="phenotype-gaussian",
        rounds=1,
        model=ModelSpec(name="phenotype-gaussian", size="paper"),
        training=_ONE_STEP,
        privacy=PrivacySpec(
            cohort_size=300,
            sampling_rate=1.0,
            noise_multiplier=3.0,
            clip_norm=1.0,
            evaluation=EvaluationSpec(rounds="none"),
        ),
    ),
}
"""Realistic private jobs by the kind of model that they train."""


def job_template(kind: str, coordinator: str = "coordinator") -> str:
    """Return the YAML of a ``coordinator``'s job that trains a ``kind`` of model.

    :func:`fedcmr_shared.schemas.job_files.read_job` reads it.

    Raises:
        ConfigurationError: there is no template of this kind.
    """
    if kind not in TEMPLATES:
        known = ", ".join(sorted(TEMPLATES))
        raise ConfigurationError(f"there is no template for {kind!r}: use one of {known}")
    job = TEMPLATES[kind].model_copy(update={"coordinator": coordinator})
    return explained_yaml(job, _HEADER)
