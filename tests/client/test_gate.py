"""The gate: every public rule, at its border, and that no other field of a job matters."""

import inspect
import math
from collections.abc import Mapping
from datetime import date, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcmr_client.gate import Finding, examine, phase_rdp, require
from fedcmr_client.policy import SitePolicy, order_of
from fedcmr_shared.errors import JobRefused
from fedcmr_shared.privacy import accounting
from fedcmr_shared.privacy.budget import phases_of
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.refusals import REFUSAL_CODES

NOON = datetime(2026, 3, 2, 12, 0)

RULES: dict[str, tuple[str, ...]] = {
    # The fields of the job that each rule reads, and no other one.
    "privacy-missing": (),
    "coordinator": ("coordinator",),
    "job-name": ("name",),
    "model": ("model.name", "model.size"),
    "epsilon-per-job": (
        "rounds",
        "training.local_steps",
        "privacy.sampling_rate",
        "privacy.noise_multiplier",
        "privacy.spare_rounds",
        "privacy.evaluation.noise_multiplier",
        "privacy.evaluation.rounds",
    ),
    "delta": ("privacy.delta",),
    "noise-multiplier": (
        "privacy.noise_multiplier",
        "privacy.evaluation.noise_multiplier",
        "privacy.evaluation.rounds",
    ),
    "minimum-sites": ("minimum_sites",),
    "aggregation": ("aggregation",),
    "cohort-query": (
        "cohort.modalities",
        "cohort.views",
        "cohort.vendors",
        "cohort.acquired_from",
        "cohort.acquired_until",
    ),
    "evaluation-noise": (
        "privacy.evaluation.noise_multiplier",
        "privacy.evaluation.rounds",
        "aggregation",
    ),
    "distributed-noise": ("privacy.distributed",),
    "quiet-hours": (),
    "device-hours": ("resources.device_hours",),
    "energy": ("resources.energy_kwh",),
}

OPEN: dict[str, Any] = {
    "site": "north",
    "store": "store",
    "ledger": {"folder": "ledger", "second_place": "elsewhere"},
    "coordinators": ["heart-net"],
    "jobs": ["cardiomm-*"],
    "models": ["cardiomm/tiny"],
    "minimum_sites": 4,
    "max_epsilon_per_job": 8.0,
}
MODEST: dict[str, Any] = {
    "name": "cardiomm-demo",
    "coordinator": "heart-net",
    "minimum_sites": 4,
    "rounds": 3,
    "training": {"local_steps": 10},
    "privacy": {
        "sampling_rate": 0.1,
        "noise_multiplier": 1.0,
        "evaluation": {"noise_multiplier": 8.0},
    },
}
SHARED: dict[str, Any] = {
    "training.local_steps": 1,
    "training.optimiser": "sgd",
    "privacy.distributed": {"unseen_sites": 1},
}


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with the fields named by dotted paths changed."""
    result = {k: merged(v, {}) if isinstance(v, Mapping) else v for k, v in base.items()}
    for path, value in changes.items():
        *parents, name = path.split(".")
        part = result
        for parent in parents:
            part = part.setdefault(parent, {})
        part[name] = value
    return result


def policy(changes: Mapping[str, Any] | None = None) -> SitePolicy:
    return SitePolicy.model_validate(merged(OPEN, changes or {}))


def job(changes: Mapping[str, Any] | None = None) -> JobSpec:
    return JobSpec.model_validate(merged(MODEST, changes or {}))


def failed(job: JobSpec, policy: SitePolicy, now: datetime = NOON) -> list[str]:
    return [finding.rule for finding in examine(job, policy, now) if not finding.passed]


def test_a_modest_job_passes_every_rule() -> None:
    findings = examine(job(), policy(), NOON)
    assert all(finding.passed for finding in findings)
    assert all(finding.text for finding in findings)
    require(findings)


def test_all_rules_are_listed_in_one_order_whatever_the_job() -> None:
    for candidate in (job(), JobSpec(), job({"privacy": None, "rounds": 9_000})):
        assert [finding.rule for finding in examine(candidate, policy(), NOON)] == list(RULES)
    assert set(RULES) <= set(REFUSAL_CODES)


def test_the_default_policy_refuses_every_name() -> None:
    default = SitePolicy.model_validate({k: OPEN[k] for k in ("site", "store", "ledger")})
    assert {"coordinator", "job-name", "model"} <= set(failed(job(), default))


@pytest.mark.parametrize(
    ("rule", "in_job", "in_policy"),
    [
        ("coordinator", {"coordinator": "heart-net-2"}, {}),
        ("coordinator", {}, {"coordinators": []}),
        ("job-name", {"name": "brain-demo"}, {}),
        ("job-name", {}, {"jobs": []}),
        ("model", {"model.size": "paper"}, {}),
        ("model", {"model.name": "other"}, {}),
        ("model", {}, {"models": []}),
        ("epsilon-per-job", {"rounds": 60}, {}),
        ("epsilon-per-job", {"training.local_steps": 20_000}, {}),
        ("epsilon-per-job", {"privacy.sampling_rate": 1.0}, {}),
        ("epsilon-per-job", {"privacy.noise_multiplier": 0.5}, {}),
        ("epsilon-per-job", {"privacy.spare_rounds": 60}, {}),
        ("epsilon-per-job", {"privacy.evaluation.noise_multiplier": 0.6}, {}),
        ("epsilon-per-job", {"training.local_steps": 10**6, "rounds": 10_000}, {}),
        ("epsilon-per-job", {}, {"max_epsilon_per_job": 1.0}),
        ("delta", {"privacy.delta": 1.1e-5}, {}),
        ("delta", {}, {"max_delta": 1e-6, "max_epsilon_per_job": 20}),
        ("noise-multiplier", {"privacy.noise_multiplier": 0.99}, {"noise_multiplier": 1.0}),
        ("noise-multiplier", {}, {"noise_multiplier": 1.01}),
        (
            "noise-multiplier",
            {"privacy.noise_multiplier": 20, "privacy.evaluation.noise_multiplier": 4.0},
            {"noise_multiplier": 8.0},
        ),
        ("minimum-sites", {"minimum_sites": 3}, {}),
        ("minimum-sites", {}, {"minimum_sites": 5}),
        ("aggregation", {}, {"aggregation": ["secure_groups", "plain_with_local_dp"]}),
        ("aggregation", {"aggregation": "plain_with_local_dp"}, {}),
        ("aggregation", {"aggregation": "secure_groups", "minimum_sites": 6}, {}),
        ("cohort-query", {"cohort.views": ["short-axis"]}, {}),
        ("cohort-query", {"cohort.vendors": ["Siemens"]}, {}),
        ("cohort-query", {"cohort.modalities": ["cine"]}, {"cohort.attributes": []}),
        ("cohort-query", {"cohort.modalities": ["cine", "LGE"]}, {"cohort.modalities": ["cine"]}),
        ("cohort-query", {"cohort.acquired_from": "2020-01-01"}, {}),
        (
            "cohort-query",
            {"cohort.acquired_from": "2019-12-31"},
            {"cohort.attributes": ["acquired_from"], "cohort.acquired_from": "2020-01-01"},
        ),
        (
            "cohort-query",
            {"cohort.acquired_until": "2020-01-02"},
            {"cohort.attributes": ["acquired_until"], "cohort.acquired_until": "2020-01-01"},
        ),
        ("evaluation-noise", {"privacy.evaluation.noise_multiplier": None}, {}),
        (
            "evaluation-noise",
            {"privacy.evaluation.noise_multiplier": None, "aggregation": "plain_with_local_dp"},
            {"evaluation.allow_unnoised": True, "aggregation": ["plain_with_local_dp"]},
        ),
        ("distributed-noise", SHARED, {}),
        ("quiet-hours", {}, {"quiet_hours": ["11:00-13:00"]}),
        ("device-hours", {"resources.device_hours": 24.1}, {}),
        ("device-hours", {"resources.device_hours": 1e300}, {}),
        ("energy", {"resources.energy_kwh": 10.1}, {}),
        ("energy", {}, {"max_energy_kwh": 0}),
    ],
)
def test_each_rule_alone_refuses(
    rule: str, in_job: dict[str, Any], in_policy: dict[str, Any]
) -> None:
    assert failed(job(in_job), policy(in_policy)) == [rule]
    with pytest.raises(JobRefused, match=f"^{rule}: ") as refusal:
        require(examine(job(in_job), policy(in_policy), NOON))
    assert (refusal.value.code, refusal.value.rule) == (rule, rule)


@pytest.mark.parametrize(
    ("in_job", "in_policy"),
    [
        ({}, {"models": ["cardiomm"]}),
        ({}, {"jobs": ["brain-*", "cardio??-demo"]}),
        ({"privacy.delta": 1e-5}, {}),
        ({"privacy.noise_multiplier": 1.0}, {"noise_multiplier": 1.0}),
        ({"minimum_sites": 3}, {"minimum_sites": 3}),
        (
            {"aggregation": "plain_with_local_dp", "minimum_sites": 1},
            {"aggregation": ["plain_with_local_dp"], "minimum_sites": 1},
        ),
        (
            {"aggregation": "secure_groups", "minimum_sites": 9, "robust": "median"},
            {"aggregation": ["secure_sum", "secure_groups"]},
        ),
        ({"cohort.modalities": ["cine"]}, {}),
        ({"cohort.modalities": ["cine"]}, {"cohort.modalities": ["LGE", "cine"]}),
        ({}, {"cohort.modalities": ["LGE"]}),
        (
            {"cohort.acquired_from": "2020-01-01", "cohort.acquired_until": "2020-12-31"},
            {
                "cohort.attributes": ["acquired_from", "acquired_until"],
                "cohort.acquired_from": "2020-01-01",
                "cohort.acquired_until": "2020-12-31",
            },
        ),
        ({"privacy.evaluation.noise_multiplier": None}, {"evaluation.allow_unnoised": True}),
        ({"privacy.evaluation": {"noise_multiplier": None, "rounds": "none"}}, {}),
        ({"privacy.evaluation": {"noise_multiplier": 0.01, "rounds": "none"}}, {}),
        (SHARED, {"allow_distributed_noise": True}),
        ({}, {"quiet_hours": ["22:00-06:00", "13:00-14:00"]}),
        ({"resources.device_hours": 24.0, "resources.energy_kwh": 10.0}, {}),
    ],
)
def test_borders_and_alternatives_pass(in_job: dict[str, Any], in_policy: dict[str, Any]) -> None:
    assert failed(job(in_job), policy(in_policy)) == []


def test_a_job_without_privacy_breaks_all_rules_about_it_and_is_named_so() -> None:
    findings = examine(job({"privacy": None}), policy({"evaluation.allow_unnoised": True}), NOON)
    assert [finding.rule for finding in findings if not finding.passed] == [
        "privacy-missing",
        "epsilon-per-job",
        "delta",
        "noise-multiplier",
        "evaluation-noise",
        "distributed-noise",
    ]
    with pytest.raises(JobRefused) as refusal:
        require(findings)
    assert refusal.value.code == "privacy-missing"


def test_the_first_broken_rule_is_the_one_that_leaves() -> None:
    findings = [
        Finding("model", True, ""),
        Finding("energy", False, "x"),
        Finding("delta", False, ""),
    ]
    with pytest.raises(JobRefused, match=r"^energy: x$") as refusal:
        require(findings)
    assert refusal.value.code == "energy"


class TestEpsilon:
    def test_is_the_filters_over_all_rounds_and_spare_ones(self) -> None:
        strict = policy()
        order = order_of(strict)
        release, starts = phases_of(job())["train"]
        assert starts == 4
        total = starts * accounting.rdp(release, order)
        epsilon = accounting.epsilon_from_rdp(total, order, strict.max_delta)
        assert failed(job(), policy({"max_epsilon_per_job": epsilon})) == []
        below = math.nextafter(epsilon, 0)
        assert failed(job(), policy({"max_epsilon_per_job": below})) == ["epsilon-per-job"]

    def test_takes_the_dearer_phase_and_not_their_sum(self) -> None:
        costs = phase_rdp(job({"privacy.evaluation.noise_multiplier": 1.0}), 6)
        assert set(costs) == {"train", "evaluate"}
        worst = accounting.epsilon_from_rdp(max(costs.values()), 6, 1e-5)
        both = accounting.epsilon_from_rdp(sum(costs.values()), 6, 1e-5)
        assert worst < both
        between = policy({"max_epsilon_per_job": (worst + both) / 2, "budget.order": 6})
        assert failed(job({"privacy.evaluation.noise_multiplier": 1.0}), between) == []

    def test_is_meant_at_the_sites_delta(self) -> None:
        tight = policy({"max_epsilon_per_job": 1.0})
        for delta in (1e-9, 1e-5):
            assert failed(job({"privacy.delta": delta}), tight) == ["epsilon-per-job"]

    @pytest.mark.parametrize("noise", [1e-300, 1e-160, 1e-9])
    def test_vanishing_noise_costs_everything(self, noise: float) -> None:
        for rate in (0.1, 1.0):
            weak = job({"privacy.noise_multiplier": noise, "privacy.sampling_rate": rate})
            assert {"epsilon-per-job", "noise-multiplier"} <= set(failed(weak, policy()))


class TestClock:
    def test_a_time_zone_is_turned_into_local_time(self) -> None:
        local = datetime(2026, 3, 2, 12, 0).astimezone()
        quiet = policy({"quiet_hours": ["11:59-12:01"]})
        for shift in (0, 5, -8):
            elsewhere = local.astimezone(timezone(timedelta(hours=shift)))
            assert failed(job(), quiet, elsewhere) == ["quiet-hours"]
        assert failed(job(), quiet, local + timedelta(hours=1)) == []

    @settings(max_examples=25)
    @given(st.datetimes(datetime(2020, 1, 1), datetime(2035, 1, 1)))
    def test_only_quiet_hours_depend_on_it(self, now: datetime) -> None:
        rule = policy({"quiet_hours": ["22:00-06:00"]})
        quiet = now.hour >= 22 or now.hour < 6
        assert failed(job({"minimum_sites": 3}), rule, now) == [
            "minimum-sites",
            *(["quiet-hours"] if quiet else []),
        ]


# Any job that the schema lets through, with values on both sides of each border.
any_job = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["cardiomm-demo", "brain", "x"]),
        "coordinator": st.sampled_from(["heart-net", "other"]),
        "seed": st.integers(0, 9),
        "rounds": st.integers(1, 200),
        "minimum_sites": st.integers(6, 9),
        "round_timeout_s": st.sampled_from([1.0, 1e6]),
        "aggregation": st.sampled_from(["secure_sum", "secure_groups", "plain_with_local_dp"]),
        "model": st.fixed_dictionaries(
            {
                "name": st.sampled_from(["cardiomm", "other"]),
                "size": st.sampled_from(["tiny", "small", "paper"]),
                "variant": st.sampled_from(["SM", "MM"]),
            }
        ),
        "training": st.fixed_dictionaries(
            {
                "local_steps": st.integers(1, 500),
                "batch_size": st.integers(1, 9),
                "learning_rate": st.sampled_from([1e-4, 1.0]),
                "part": st.sampled_from(["full", "decoder"]),
            }
        ),
        "privacy": st.none()
        | st.fixed_dictionaries(
            {
                "delta": st.sampled_from([1e-9, 1e-5, 1e-3, 0.9]),
                "cohort_size": st.sampled_from([10, 300]),
                "sampling_rate": st.sampled_from([0.001, 0.1, 1.0]),
                "noise_multiplier": st.sampled_from([1e-200, 0.4, 0.6, 5.0]),
                "clip_norm": st.sampled_from([0.01, 1e9]),
                "clipping": st.sampled_from(["flat", "per-layer"]),
                "images_per_patient": st.integers(1, 9),
                "spare_rounds": st.integers(0, 50),
                "distributed": st.none(),
                "evaluation": st.fixed_dictionaries(
                    {
                        "noise_multiplier": st.sampled_from([None, 0.3, 8.0]),
                        "rounds": st.sampled_from(["none", "last", "all"]),
                    }
                ),
            }
        ),
        "cohort": st.fixed_dictionaries(
            {
                "modalities": st.sampled_from([None, ("cine",), ("LGE",)]),
                "views": st.sampled_from([None, ("short-axis",)]),
                "vendors": st.sampled_from([None, ("GE",)]),
                "acquired_from": st.sampled_from([None, date(2019, 1, 1), date(2024, 1, 1)]),
                "acquired_until": st.sampled_from([None, date(2030, 1, 1), date(2024, 1, 1)]),
            }
        ),
        "resources": st.fixed_dictionaries(
            {
                "device_hours": st.sampled_from([1.0, 24.0, 1e9]),
                "energy_kwh": st.sampled_from([1.0, 10.0, 1e9]),
            }
        ),
        "site_sizes": st.sampled_from([{}, {"north": "large"}]),
    }
)
GATED = policy(
    {
        "noise_multiplier": 0.5,
        "minimum_sites": 8,
        "aggregation": ["secure_sum", "plain_with_local_dp"],
        "evaluation.allow_unnoised": True,
        "cohort.attributes": ["modalities", "acquired_from", "acquired_until"],
        "cohort.modalities": ["cine"],
        "cohort.acquired_from": "2020-01-01",
        "cohort.acquired_until": "2025-01-01",
        "quiet_hours": ["10:00-11:00"],
    }
)


def at(content: Mapping[str, Any], path: str) -> Any:
    value: Any = content
    for name in path.split("."):
        value = value[name]
    return value


@settings(max_examples=80)
@given(any_job, any_job)
def test_no_other_field_of_a_job_turns_a_rule_off(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    """A rule that ``one`` breaks, ``other`` breaks too once it has the fields that the rule reads."""
    for finding in examine(JobSpec.model_validate(one), GATED, NOON):
        needs_privacy = any(path.startswith("privacy.") for path in RULES[finding.rule])
        if finding.rule == "privacy-missing" or (
            needs_privacy and None in (one["privacy"], other["privacy"])
        ):
            fields = {"privacy": one["privacy"]}
            fields |= {path: at(one, path) for path in RULES[finding.rule] if "privacy" not in path}
        else:
            fields = {path: at(one, path) for path in RULES[finding.rule]}
        mixed = JobSpec.model_validate(merged(other, fields))
        again = next(f for f in examine(mixed, GATED, NOON) if f.rule == finding.rule)
        assert again == finding


@settings(max_examples=100)
@given(any_job)
def test_a_job_that_passes_keeps_the_sites_limits(content: dict[str, Any]) -> None:
    """Said again without the gate's code: what comes through is within the policy."""
    candidate = JobSpec.model_validate(content)
    if failed(candidate, GATED):
        return
    assert candidate.privacy is not None
    assert candidate.privacy.noise_multiplier >= 0.5
    assert candidate.privacy.delta <= 1e-5
    assert candidate.minimum_sites >= 8
    assert candidate.aggregation != "secure_groups"
    assert candidate.coordinator == "heart-net"
    starts = candidate.rounds + candidate.privacy.spare_rounds
    release, _ = phases_of(candidate)["train"]
    spent = accounting.figures({release: starts}, order_of(GATED), 1e-5)
    assert spent.filter_epsilon <= 8.0


def test_the_gate_takes_job_policy_and_clock_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(inspect.signature(examine).parameters) == ["job", "policy", "now"]
    refused = failed(job({"minimum_sites": 3}), policy())
    for name in ("FEDCMR_POLICY", "FEDCMR_STORE", "FEDCMR_SIMULATED", "FEDCMR_NO_PRIVACY"):
        monkeypatch.setenv(name, "1")
    assert failed(job({"minimum_sites": 3}), policy()) == refused == ["minimum-sites"]
