"""What a simulated federation runs: the job, the phantom's patients and the evaluation."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.kspace.masks import Sampling
from fedcmr_shared.schemas.job import JobSpec, Pattern

_FROZEN = ConfigDict(frozen=True, extra="forbid")


class SamplingCase(BaseModel):
    """One undersampling to evaluate."""

    model_config = _FROZEN

    pattern: Pattern = "uniform"
    acceleration: Annotated[float, Field(gt=1, le=64)] = 8.0
    acs_lines: Annotated[int, Field(ge=4, le=64)] = 20

    def sampling(self) -> Sampling:
        """Return the case as the mask functions take it."""
        return Sampling(self.pattern, self.acceleration, self.acs_lines)


class PhantomSpec(BaseModel):
    """Virtual patients to simulate where no data are given."""

    model_config = _FROZEN

    patients: Annotated[int, Field(ge=3)] = 12
    detail: Literal["quick", "standard"] = "quick"


class SimulationConfig(BaseModel):
    """A simulated federation; the first evaluation case is the headline of the summary."""

    model_config = _FROZEN

    job: JobSpec = JobSpec()
    phantom: PhantomSpec = PhantomSpec()
    evaluation: Annotated[tuple[SamplingCase, ...], Field(min_length=1)] = (SamplingCase(),)


def load_config(path: Path | None) -> SimulationConfig:
    """Read a YAML file, or the packaged demonstration when ``path`` is None.

    Raises:
        ConfigurationError: the file is missing, is no YAML mapping or has a wrong field, which the
            message names.
    """
    source = path or resources.files("fedcmr_simulations") / "jobs" / "demo.yaml"
    try:
        content = yaml.safe_load(source.read_text())
    except OSError as error:
        raise ConfigurationError(
            f"configuration {path} cannot be read: {error.strerror}"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"configuration {path} is not valid YAML: {error}") from error
    try:
        return SimulationConfig.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'the file'}: {item['msg']}"
            for item in error.errors()
        )
        raise ConfigurationError(f"configuration {path}: {problems}") from error
