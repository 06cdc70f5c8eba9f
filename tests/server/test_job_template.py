"""Job files: the template explains every field and reads back, and mistakes are named."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from fedcmr_client.gate import phase_rdp
from fedcmr_server.job_template import TEMPLATES, job_template
from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.models.registry import model_entry
from fedcmr_shared.privacy.accounting import best_order, epsilon_from_rdp
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.job_files import read_job
from fedcmr_shared.schemas.policy import BudgetPolicy, SitePolicy
from fedcmr_shared.schemas.yaml_files import parts


def write(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def error_of(path: Path) -> str:
    with pytest.raises(ConfigurationError) as refusal:
        read_job(path)
    message = str(refusal.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def field_names(schema: type[BaseModel]) -> list[str]:
    names = []
    for name, field in schema.model_fields.items():
        names.append(name)
        names += [each for part in parts(field.annotation) for each in field_names(part)]
    return names


@pytest.mark.parametrize("kind", sorted(TEMPLATES))
def test_a_template_reads_back_as_the_same_job(tmp_path: Path, kind: str) -> None:
    assert read_job(write(tmp_path, job_template(kind))) == TEMPLATES[kind]


@pytest.mark.parametrize("kind", sorted(TEMPLATES))
def test_a_template_explains_every_field(kind: str) -> None:
    text = job_template(kind)
    absent = {"unseen_sites", "levels"}  # of distributed noise, which is off
    for name in set(field_names(JobSpec)) - absent:
        assert re.search(rf"^( *)# .+\n\1{name}:", text, re.MULTILINE), name
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("kind", sorted(TEMPLATES))
def test_a_template_is_private_and_fits_the_policy_that_sites_start_with(kind: str) -> None:
    job, budget = TEMPLATES[kind], BudgetPolicy()
    order = best_order(budget.epsilon, budget.delta)
    limit = SitePolicy.model_fields["max_epsilon_per_job"].default
    costs = phase_rdp(job, order)
    assert "train" in costs
    assert model_entry(job.model.name).scoring_problem(job) is None
    assert all(epsilon_from_rdp(cost, order, budget.delta) <= limit for cost in costs.values())
    assert job.aggregation == "secure_sum"


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no template for 'unet': use one of cardiomm"):
        job_template("unet")


def test_the_job_of_a_simulation_is_read_too(tmp_path: Path) -> None:
    path = write(tmp_path, "job: {name: mine, rounds: 7}\nsites: []\n")
    assert read_job(path) == JobSpec(name="mine", rounds=7)


def test_json_is_read_too_and_what_is_left_out_keeps_its_value(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps({"name": "mine", "rounds": 7}))
    assert read_job(path) == JobSpec(name="mine", rounds=7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("- name", "is no mapping"),
        ("name: [", "is not valid YAML"),
        ("rounds: 1\nrounds: 2\n", "rounds is given twice: keep one"),
        ("privacy: {delta: 0.1, delta: 0.2}", "delta is given twice"),
        ("round: 3", "round is unknown (did you mean rounds?)"),
        ("privacy: {noise: 1}", "privacy.noise is unknown"),
        ("privacy: {noise_multiplyer: 1}", "(did you mean noise_multiplier?)"),
        ("rounds: 0", "rounds: Input should be greater than or equal to 1"),
        ("rounds: many", "rounds: Input should be a valid integer"),
        ("minimum_sites: 2", "minimum_sites is 2; aggregation secure_sum"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, message: str) -> None:
    found = error_of(write(tmp_path, text))
    assert message in found


def test_all_mistakes_come_in_one_message(tmp_path: Path) -> None:
    content: dict[str, Any] = {"rounds": 0, "secur": {}, "model": {"size": "huge"}}
    message = error_of(write(tmp_path, yaml.safe_dump(content)))
    for part in ("rounds:", "secur is unknown (did you mean secure?)", "model.size"):
        assert part in message
    assert message.endswith("`fedcmr schema show job` explains")


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    assert "cannot be read (No such file" in error_of(tmp_path / "job.yaml")
