"""What a simulated federation runs: the job, the phantom's patients and the evaluation."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedcmr_client.store.split import SplitFractions
from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.kspace.masks import Sampling
from fedcmr_shared.schemas.job import JobSpec, Pattern
from fedcmr_shared.schemas.problems import problems
from fedcmr_simulations.phantom.protocol import Detail

_FROZEN = ConfigDict(frozen=True, extra="forbid")
Schema = TypeVar("Schema", bound=BaseModel)


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
    """Virtual patients to simulate where no data are given, and their parts at each site."""

    model_config = _FROZEN

    patients: Annotated[int, Field(ge=3)] = 12
    detail: Detail = "quick"
    train: Annotated[float, Field(ge=0, le=1)] = 0.4
    validation: Annotated[float, Field(ge=0, le=1)] = 0.2
    test: Annotated[float, Field(ge=0, le=1)] = 0.4

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            self.split()
        except ConfigurationError as error:
            raise ValueError(str(error)) from error
        return self

    def split(self) -> SplitFractions:
        """Return the parts as the store takes them."""
        return SplitFractions(self.train, self.validation, self.test)


class SiteBudget(BaseModel):
    """What the policy of every simulated site allows one patient in total."""

    model_config = _FROZEN

    epsilon: Annotated[float, Field(gt=0)] = 8.0
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    order: Annotated[int, Field(ge=2)] | None = None


class SimulationConfig(BaseModel):
    """A simulated federation; the first evaluation case is the headline of the summary.

    ``start`` is a bundle with starting weights (relative to the configuration's folder),
    ``packaged`` for those of this package, or null for random ones.
    """

    model_config = _FROZEN

    job: JobSpec = JobSpec()
    start: str | None = None
    budget: SiteBudget = SiteBudget()
    phantom: PhantomSpec = PhantomSpec()
    evaluation: Annotated[tuple[SamplingCase, ...], Field(min_length=1)] = (SamplingCase(),)


def load_config(path: Path | None) -> SimulationConfig:
    """Read a YAML file, or the packaged demonstration when ``path`` is None.

    Raises:
        ConfigurationError: as `read_config`.
    """
    return _with_full_start(read_config(SimulationConfig, path, "demo.yaml"), path)


def read_config(schema: type[Schema], path: Path | None, packaged: str) -> Schema:
    """Read a YAML file, or the ``packaged`` one of this name when ``path`` is None.

    Raises:
        ConfigurationError: the file is missing, is no YAML mapping or has a wrong field, which the
            message names.
    """
    source = path or resources.files("fedcmr_simulations") / "jobs" / packaged
    try:
        content = yaml.safe_load(source.read_text())
    except OSError as error:
        raise ConfigurationError(
            f"configuration {path} cannot be read: {error.strerror}"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"configuration {path} is not valid YAML: {error}") from error
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        raise ConfigurationError(f"configuration {path}: {problems(error)}") from error


def _with_full_start(config: SimulationConfig, path: Path | None) -> SimulationConfig:
    if config.start is None or config.start == "packaged" or path is None:
        return config
    return config.model_copy(update={"start": str(path.absolute().parent / config.start)})
