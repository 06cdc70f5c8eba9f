"""Reads jobs that people write, alone in a file or as the `job` of a simulation's configuration."""

from __future__ import annotations

from pathlib import Path

from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.yaml_files import parse, read_yaml


def read_job(path: Path) -> JobSpec:
    """Read a job from a YAML or JSON file.

    Raises:
        ConfigurationError: the file cannot be read, is no mapping, names a field twice or has an
            absent, unknown or wrong field; the message names all of them.
    """
    content = read_yaml(path, "job")
    hint = "correct it, `fedcmr schema show job` explains"
    return parse(JobSpec, content.get("job", content), f"job {path}", hint)
