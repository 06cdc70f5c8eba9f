"""`policy.yaml`: what loads, what is refused and with which words, and what the page says."""

import datetime
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from fedcmr_client.policy import SitePolicy, load_policy, order_of, policy_text, read_yaml
from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.privacy import accounting
from fedcmr_shared.schemas.policy import CohortPolicy

PAGE = Path(__file__).parents[2] / "docs" / "sites" / "policy.md"
SMALLEST: dict[str, Any] = {
    "site": "north",
    "store": "store",
    "ledger": {"folder": "ledger", "second_place": "../elsewhere"},
}


def policy(**values: Any) -> SitePolicy:
    return SitePolicy.model_validate({**SMALLEST, **values})


def write(folder: Path, text: str) -> Path:
    path = folder / "policy.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def error_of(path: Path) -> str:
    with pytest.raises(ConfigurationError) as refusal:
        load_policy(path)
    message = str(refusal.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_the_default_lets_nobody_in() -> None:
    strict = policy()
    assert (strict.coordinators, strict.jobs, strict.models) == ((), (), ())
    assert strict.cohort.require_consent
    assert strict.cohort.attributes == ("modalities",)
    assert not strict.evaluation.allow_unnoised
    assert strict.minimum_sites == 3
    assert strict.aggregation == ("secure_sum",)
    assert not strict.allow_distributed_noise
    assert strict.roster is None
    assert strict.max_epsilon_per_job <= strict.budget.epsilon
    assert strict.max_delta <= strict.budget.delta


def test_folders_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    write(home, yaml.safe_dump({**SMALLEST, "roster": "../shared/roster.yaml"}))
    monkeypatch.chdir(tmp_path)
    loaded = load_policy(Path("home/policy.yaml"))
    assert loaded.roster == tmp_path / "shared" / "roster.yaml"
    assert loaded.store == home / "store"
    assert loaded.ledger.folder == home / "ledger"
    assert loaded.ledger.second_place == tmp_path / "elsewhere"
    assert loaded.sha256 == policy().sha256


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("- site\n", "is no mapping"),
        ("north", "is no mapping"),
        ("site: [", "is not valid YAML"),
        ("site: north\nsite: south\n", "site is given twice"),
        ("site: !!python/object:os.system {}\n", "is not valid YAML"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    assert message in error_of(write(tmp_path, text))


def test_a_repeated_key_in_a_part_is_refused(tmp_path: Path) -> None:
    text = yaml.safe_dump(SMALLEST) + "budget:\n  epsilon: 8\n  delta: 1.0e-5\n  epsilon: 80\n"
    message = error_of(write(tmp_path, text))
    assert "epsilon is given twice: keep one" in message
    assert "line 9" in message


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_bytes(b"site: \xff\n")
    assert "is not valid YAML" in error_of(path)


def test_an_absent_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert "cannot be read (No such file" in error_of(tmp_path / "policy.yaml")
    (tmp_path / "folder.yaml").mkdir()
    assert "cannot be read (Is a directory" in error_of(tmp_path / "folder.yaml")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_forbidden_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, yaml.safe_dump(SMALLEST))
    path.chmod(0)
    assert "cannot be read (Permission denied" in error_of(path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("budget.epsilon", -8, "greater than 0"),
        ("budget.epsilon", 0, "greater than 0"),
        ("budget.epsilon", "eight", "valid number"),
        ("budget.epsilon", True, "not yes or no"),
        ("budget.epsilon", float("inf"), "finite number"),
        ("budget.epsilon", float("nan"), "budget.epsilon"),
        ("budget.delta", 1, "less than 1"),
        ("budget.delta", 0, "greater than"),
        ("budget.order", 1, "greater than or equal to 2"),
        ("budget.order", 8.5, "integer"),
        ("max_epsilon_per_job", -1, "greater than 0"),
        ("max_delta", -1e-5, "greater than"),
        ("noise_multiplier", 0, "greater than 0"),
        ("minimum_sites", 0, "greater than or equal to 1"),
        ("minimum_sites", False, "not yes or no"),
        ("max_device_hours", float("nan"), "max_device_hours"),
        ("max_energy_kwh", -1, "greater than or equal to 0"),
        ("device_watts", 0, "greater than 0"),
        ("reply_tick_s", 0, "greater than 0"),
        ("reply_tick_s", 1e5, "less than or equal to 3600"),
        ("processes", 0, "greater than or equal to 1"),
        ("device", "tpu", "'cpu' or 'cuda'"),
        ("aggregation", "secure_sum", "tuple"),
        ("aggregation", ["secure"], "'secure_sum', 'secure_groups' or 'plain_with_local_dp'"),
        ("aggregation", [], "at least 1 item"),
        ("minimum_sites", 2, "aggregation lists secure_sum: write at least 3"),
        ("roster", "", "is no path"),
        ("roster", "~/roster.yaml", "~ is not understood"),
        ("allow_distributed_noise", 1, "valid boolean"),
        ("coordinators", "north", "tuple"),
        ("coordinators", [""], "at least 1 character"),
        ("models", ["cardiomm/huge"], "pattern"),
        ("quiet_hours", ["22-6"], "is not HH:MM-HH:MM"),
        ("quiet_hours", ["24:00-06:00"], "is not HH:MM-HH:MM"),
        ("quiet_hours", ["08:00-08:00"], "is empty"),
        ("cohort.require_consent", 0, "valid boolean"),
        ("cohort.require_consent", "no", "valid boolean"),
        ("cohort.attributes", ["age"], "'modalities'"),
        ("cohort.acquired_from", "yesterday", "valid date"),
        ("evaluation.metrics", ["dice"], "'psnr', 'ssim', 'nmse' or 'memorisation'"),
        ("evaluation.allow_unnoised", 1, "valid boolean"),
        ("site", "two words", "pattern"),
        ("site", None, "valid string"),
        ("store", "", "is no path"),
        ("store", "~/store", "~ is not understood"),
        ("ledger.second_place", 3, "path"),
    ],
)
def test_a_wrong_value_is_refused_by_name(
    tmp_path: Path, field: str, value: object, message: str
) -> None:
    content = {**SMALLEST, "ledger": dict(SMALLEST["ledger"])}
    *parents, name = field.split(".")
    part = content
    for parent in parents:
        part = part.setdefault(parent, {})
    part[name] = value
    text = error_of(write(tmp_path, yaml.safe_dump(content)))
    assert field in text
    assert message in text


def test_all_problems_come_in_one_message(tmp_path: Path) -> None:
    text = "site: north\nbudgt: {epsilon: 8}\nbudget: {epsilon: -1}\nledger: {folder: ledger}\n"
    message = error_of(write(tmp_path, text))
    for part in ("budgt is unknown (did you mean budget?)", "budget.epsilon", "store is missing"):
        assert part in message
    assert "ledger.second_place is missing" in message


@pytest.mark.parametrize("second", ["ledger", "ledger/second", "./a/../ledger/second"])
def test_the_second_place_lies_elsewhere(tmp_path: Path, second: str) -> None:
    content = {**SMALLEST, "ledger": {"folder": "ledger", "second_place": second}}
    assert "ledger.second_place lies in ledger.folder" in error_of(
        write(tmp_path, yaml.safe_dump(content))
    )


def test_a_second_place_behind_a_link_is_seen_through(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "ledger")
    content = {**SMALLEST, "ledger": {"folder": "ledger", "second_place": "link/second"}}
    assert "ledger.second_place lies in ledger.folder" in error_of(
        write(tmp_path, yaml.safe_dump(content))
    )


def test_a_password_in_the_file_is_refused(tmp_path: Path) -> None:
    content = {**SMALLEST, "ledger": dict(SMALLEST["ledger"])}
    content["ledger"]["database_url"] = "postgresql+psycopg://site:hush@db/ledger"
    message = error_of(write(tmp_path, yaml.safe_dump(content)))
    assert "ledger.database_url holds a password" in message
    assert "hush" not in message
    content["ledger"]["database_url"] = "postgresql+psycopg://site@db:5432/ledger"
    assert load_policy(write(tmp_path, yaml.safe_dump(content))).ledger.database_url is not None


def test_a_budget_that_no_order_can_keep_is_refused(tmp_path: Path) -> None:
    content = {**SMALLEST, "budget": {"epsilon": 1.0, "delta": 1e-5, "order": 2}}
    assert "budget: epsilon 1 is out of reach" in error_of(write(tmp_path, yaml.safe_dump(content)))


def test_dates_that_fit_no_scan_are_refused() -> None:
    with pytest.raises(ValidationError, match="no scan fits"):
        CohortPolicy(
            acquired_from=datetime.date(2025, 1, 2), acquired_until=datetime.date(2025, 1, 1)
        )


def test_order_is_the_written_one_or_the_best() -> None:
    assert order_of(policy(budget={"epsilon": 8, "delta": 1e-5, "order": 7})) == 7
    assert order_of(policy()) == accounting.best_order(8.0, 1e-5)


def test_plain_aggregation_alone_may_have_few_sites() -> None:
    assert policy(aggregation=["plain_with_local_dp"], minimum_sites=1).minimum_sites == 1
    for modes in (["secure_groups"], ["plain_with_local_dp", "secure_sum"]):
        with pytest.raises(ValidationError, match=f"minimum_sites is 2.*{modes[-1]}"):
            policy(aggregation=modes, minimum_sites=2)


def test_the_hash_covers_the_rules_and_not_the_paths() -> None:
    base = policy()
    ledger = {"folder": "a", "second_place": "b"}
    moved = policy(store="other", ledger=ledger, device="cuda", roster="roster.yaml")
    assert moved.sha256 == base.sha256
    changes: dict[str, Any] = {
        "site": "south",
        "budget": {"epsilon": 7},
        "max_epsilon_per_job": 3,
        "max_delta": 1e-6,
        "noise_multiplier": 1,
        "minimum_sites": 4,
        "aggregation": ["secure_groups"],
        "allow_distributed_noise": True,
        "coordinators": ["c"],
        "jobs": ["*"],
        "models": ["cardiomm"],
        "cohort": {"require_consent": False},
        "quiet_hours": ["22:00-06:00"],
        "max_device_hours": 1,
        "max_energy_kwh": 1,
        "device_watts": 1,
        "evaluation": {"allow_unnoised": True},
        "energy": {"country": "DEU"},
        "reply_tick_s": 1,
    }
    assert set(changes) == set(SitePolicy.model_fields) - {
        "store",
        "ledger",
        "roster",
        "device",
        "processes",
    }
    hashes = {policy(**{name: value}).sha256 for name, value in changes.items()}
    assert len(hashes | {base.sha256}) == len(changes) + 1


def test_energy_leaves_only_where_the_policy_says_so() -> None:
    """It has no noise, so that a site must name it, as all else that leaves."""
    energy = policy(energy={"country": "DEU"}).energy
    assert energy is not None
    assert not energy.report_total


def test_a_policy_of_before_keeps_its_hash() -> None:
    """Ledgers and auditors hold it: a new field counts only where it is used."""
    before = "a998399b5238c80f41e9137d4a5060ae21fb0e3e2447270f86dba0a8e9e5a0de"
    assert policy().sha256 == policy(energy=None).sha256 == before


def test_nothing_can_be_changed_afterwards() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        policy().max_delta = 0.5
    with pytest.raises(ValidationError, match="frozen"):
        policy().evaluation.allow_unnoised = True


policies = st.builds(
    policy,
    site=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True),
    store=st.sampled_from(["store", "a: b # c", "/data/scans of 2024", "no", "'quoted'", "7"]),
    roster=st.none() | st.sampled_from(["roster.yaml", "/srv/our sites: #1.yaml"]),
    coordinators=st.lists(st.text(min_size=1, max_size=6), max_size=3),
    models=st.lists(st.sampled_from(["cardiomm", "cardiomm/tiny", "other/paper"]), max_size=2),
    max_delta=st.floats(1e-12, 0.1),
    quiet_hours=st.lists(st.sampled_from(["22:00-06:00", "12:00-12:30"]), max_size=2),
    cohort=st.builds(
        dict,
        modalities=st.none() | st.lists(st.sampled_from(["cine", "LGE", "T1 mapping"])),
        acquired_from=st.none() | st.dates(),
    ),
)


@settings(max_examples=60)
@given(policies)
def test_the_written_file_reads_back_and_explains_every_field(value: SitePolicy) -> None:
    text = policy_text(value)
    assert SitePolicy.model_validate(yaml.safe_load(text)) == value
    for name in field_names(SitePolicy):
        explained = re.search(rf"^( *)# .+\n\1{name}:", text, re.MULTILINE)
        assert explained is not None, name


def test_the_written_file_stays_narrow() -> None:
    assert max(map(len, policy_text(policy()).splitlines())) <= 100


@pytest.mark.parametrize(
    ("hours", "quiet", "busy"),
    [
        ([], [], ["00:00", "12:00", "23:59"]),
        (["22:00-06:00"], ["22:00", "23:59", "00:00", "05:59"], ["06:00", "12:00", "21:59"]),
        (["12:00-13:00"], ["12:00", "12:59"], ["11:59", "13:00"]),
        (["00:00-12:00", "12:00-00:00"], ["00:00", "11:59", "12:00", "23:59"], []),
        (["01:00-02:00", "03:00-04:00"], ["01:30", "03:30"], ["02:30", "04:00"]),
    ],
)
def test_quiet_hours(hours: list[str], quiet: list[str], busy: list[str]) -> None:
    rule = policy(quiet_hours=hours)
    assert all(rule.is_quiet(datetime.time.fromisoformat(clock)) for clock in quiet)
    assert not any(rule.is_quiet(datetime.time.fromisoformat(clock)) for clock in busy)


def test_energy_is_power_times_time() -> None:
    assert policy(device_watts=250).energy_kwh(8) == pytest.approx(2.0)


def test_json_is_yaml(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_text('{"name": "demo", "rounds": 2}')
    assert read_yaml(path, "job") == {"name": "demo", "rounds": 2}


def field_names(model: type[BaseModel]) -> list[str]:
    names = []
    for name, field in model.model_fields.items():
        names.append(name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += field_names(field.annotation)
    return names


def fields(model: type[BaseModel], prefix: str = "") -> list[str]:
    paths = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            paths += fields(field.annotation, f"{prefix}{name}.")
        else:
            paths.append(f"{prefix}{name}")
    return paths


class TestPage:
    def test_every_field_has_a_row_with_its_default(self) -> None:
        rows = dict(
            re.findall(r"^\| `([\w.]+)` \| `?([^|`]+)`? \|", PAGE.read_text(), re.MULTILINE)
        )
        assert sorted(rows) == sorted(fields(SitePolicy))
        for path, shown in rows.items():
            if shown.strip() == "required":
                continue
            value: Any = policy()
            for name in path.split("."):
                value = getattr(value, name)
            expected = list(value) if isinstance(value, tuple) else value
            assert yaml.safe_load(shown) == expected, path

    def test_required_fields_are_marked(self) -> None:
        text = PAGE.read_text()
        required = re.findall(r"^\| `([\w.]+)` \| required \|", text, re.MULTILINE)
        with pytest.raises(ValidationError) as refusal:
            SitePolicy.model_validate({"ledger": {}})
        missing = {".".join(map(str, item["loc"])) for item in refusal.value.errors()}
        assert set(required) == missing

    def test_example_loads(self, tmp_path: Path) -> None:
        (block,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
        loaded = load_policy(write(tmp_path, block))
        assert loaded.coordinators
        assert loaded.quiet_hours
