"""A whole simulated federation on small sites, and what an interrupt leaves behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from small_scans import small_store

from fedcmr_client.store.split import SplitFractions
from fedcmr_server.run_folder import RunFolder
from fedcmr_shared.errors import ConfigurationError, DataError, FederationError
from fedcmr_shared.schemas.job import (
    CohortQuery,
    JobSpec,
    ModelSpec,
    SamplingSpec,
    TrainingSpec,
)
from fedcmr_shared.schemas.privacy import PrivacySpec
from fedcmr_simulations.config import SamplingCase, SimulationConfig, load_config
from fedcmr_simulations.drops import Drop
from fedcmr_simulations.progress import SilentProgress
from fedcmr_simulations.runner import SimulationRequest, simulate
from fedcmr_simulations.sites import choose_sites, data_origin

CASE = SamplingCase(pattern="uniform", acceleration=4, acs_lines=8)
JOB = JobSpec(
    name="small",
    rounds=2,
    minimum_sites=1,
    aggregation="plain_with_local_dp",
    model=ModelSpec(text_encoder="hashed"),
    sampling=SamplingSpec(accelerations=(4,), acs_lines=8),
    training=TrainingSpec(local_steps=3),
)
CONFIG = SimulationConfig(job=JOB, evaluation=(CASE,))
PRIVATE = SimulationConfig(
    job=JOB.model_copy(
        update={
            "privacy": PrivacySpec(cohort_size=10, noise_multiplier=3.0),
            "training": TrainingSpec(local_steps=2, part="adapters"),
        }
    ),
    evaluation=(CASE,),
)


class Finished(NamedTuple):
    sites: Path
    run: Path
    summary: dict[str, Any]


HALVES = SplitFractions(0.5, 0.25, 0.25)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run of two rounds with two workers."""
    root = tmp_path_factory.mktemp("finished")
    small_store(root / "sites" / "north", 10, HALVES)
    small_store(root / "sites" / "south", 10, HALVES, coils=4, phase=40, first_seed=77)
    wanted = request(CONFIG, root / "run", root / "sites")
    assert wanted.workers == 2
    return Finished(root / "sites", root / "run", simulate(wanted, SilentProgress()))


@pytest.fixture
def sites(make_site: Callable[..., Path]) -> Path:
    make_site("north", 10)
    return make_site("south", 10, coils=4, phase=40, first_seed=77).parent


def request(config: SimulationConfig, out: Path, data: Path) -> SimulationRequest:
    return SimulationRequest(config, 2, out, data, private=config.job.privacy is not None)


def test_a_run_leaves_everything_that_its_readers_need(finished: Finished) -> None:
    out = finished.run
    written = json.loads((out / "summary.json").read_text())
    assert written == json.loads(json.dumps(finished.summary))
    assert written["status"] == "finished"
    assert (written["rounds"], written["nominal_af"]) == (2, 4)
    assert 1 < written["realised_af"] < 4
    assert written["bytes_up"] > 0
    assert written["bytes_down"] > written["bytes_up"]
    assert [row["name"] for row in written["sites"]] == ["north", "south"]
    methods = ("zero_filled", "sense", "local", "federated")
    for row in written["sites"]:
        assert row["patients"] >= 1
        for metric in ("psnr", "ssim", "nmse"):
            assert all(f"{metric}_{method}" in row for method in methods)
        assert row["psnr_federated"] != row["psnr_local"]
    assert "north" in (out / "report.html").read_text()
    folder = RunFolder(out)
    assert [folder.bundle_path(number).exists() for number in range(3)] == [True] * 3
    # The server's own events hold no figure of a single site.
    for event in folder.events():
        if event["event"] in ("round", "evaluation"):
            assert not {"north", "south"} & set(map(str, event.values()))


def test_a_private_run_accounts_for_every_site_and_round(sites: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    summary = simulate(request(PRIVATE, out, sites), SilentProgress())
    privacy = summary["privacy"]
    assert (privacy["steps"], privacy["noise_multiplier"]) == (4, 3.0)
    events = [e for e in RunFolder(out).events() if e["event"] == "site_privacy"]
    assert [(e["site"], e["round"]) for e in events] == [
        (site, number) for site in ("north", "south") for number in (1, 2)
    ]
    for name in ("north", "south"):
        spent = [e["epsilon"] for e in events if e["site"] == name]
        assert 0 < spent[0] < spent[1] == privacy["sites"][name]["train"]["epsilon"]
        assert privacy["sites"][name]["rounds"] == spent
        assert privacy["sites"][name]["evaluate"]["starts"] == 1
        assert privacy["sites"][name]["train"]["epsilon_if_fixed"] <= spent[1] <= 8
    page = (out / "report.html").read_text()
    assert "certified by the ledger" in page
    assert "NO PRIVACY" not in page
    # No update of a private run carries a loss.
    rounds = [e for e in RunFolder(out).events() if e["event"] == "round"]
    assert [e["train_loss"] for e in rounds] == [None, None]


def test_killed_sites_cost_an_attempt_and_no_second_training(
    make_site: Callable[..., Path], tmp_path: Path
) -> None:
    names = ("east", "north", "south", "west")
    made = [make_site(name, 10, first_seed=50 * n) for n, name in enumerate(names)]
    job = PRIVATE.job.model_copy(update={"aggregation": "secure_sum", "minimum_sites": 3})
    drops = (Drop("north", 1), Drop("east", 2), Drop("west", 2, "consistency"))
    out = tmp_path / "run"
    config = PRIVATE.model_copy(update={"job": job})
    summary = simulate(
        SimulationRequest(config, 4, out, made[0].parent, drops=drops), SilentProgress()
    )
    assert summary["status"] == "finished"
    attempts = [e for e in RunFolder(out).events() if e["event"] == "attempt"]
    trained = [e for e in attempts if e["phase"] == "train"]
    first, ended, opened = trained
    assert (first["outcome"], first["survivors"]) == ("opened", ["east", "south", "west"])
    assert [loss["site"] for loss in first["losses"]] == ["north"]
    assert (ended["outcome"], ended["step"]) == ("ended", "consistency")
    assert {loss["site"] for loss in ended["losses"]} == {"east", "west"}
    assert (opened["round"], opened["attempt"], opened["outcome"]) == (2, 2, "opened")
    for site in summary["privacy"]["sites"].values():
        assert site["train"]["starts"] == 2
    page = (out / "report.html").read_text()
    assert "opened: sum of 3 of 4 sites" in page
    assert "ended: fewer than 3 sites left" in page
    assert "north in step update" in page


@pytest.mark.parametrize(
    ("changes", "sites", "drops", "message"),
    [
        ({}, 2, (), "needs 3 sites for secure_sum, and there are 2"),
        ({}, 4, (Drop("oak", 1),), "--drop oak:1: the sites are alder, birch, cedar, dogwood"),
        ({}, 4, (Drop("alder", 3),), "the rounds 1 to 2"),
        (
            {"aggregation": "plain_with_local_dp"},
            4,
            (Drop("alder", 1),),
            "--drop kills a site in a step of secure aggregation",
        ),
    ],
)
def test_secure_runs_that_cannot_be_are_refused_before_anything_is_written(
    changes: dict[str, str], sites: int, drops: tuple[Drop, ...], message: str, tmp_path: Path
) -> None:
    secure = {"aggregation": "secure_sum", "minimum_sites": 3}
    job = PRIVATE.job.model_copy(update={**secure, **changes})
    wanted = SimulationRequest(
        PRIVATE.model_copy(update={"job": job}), sites, tmp_path / "run", drops=drops
    )
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        simulate(wanted, SilentProgress())
    assert not (tmp_path / "run").exists()


def test_without_privacy_everything_says_so(sites: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = tmp_path / "config.yaml"
    short = JOB.model_copy(update={"rounds": 1})
    config.write_text(yaml.safe_dump({"job": short.model_dump(mode="json")}))
    options = ("--sites", "2", "--data", str(sites), "--out", str(out), "--config", str(config))
    refused = run_command("simulate", "run", *options)
    _, errors = refused.communicate(timeout=120)
    assert refused.returncode == 1
    assert "--no-privacy" in errors
    assert not out.exists()
    process = run_command("simulate", "run", *options, "--no-privacy")
    output, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert "NO PRIVACY" in output
    assert "NO PRIVACY" in errors
    assert "NO PRIVACY" in (out / "report.html").read_text()
    assert json.loads((out / "summary.json").read_text())["private"] is False


def _heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_command(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fedcmr_shared", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Shells start background jobs with Ctrl-C ignored, and children inherit that.
        preexec_fn=_heed_interrupts,  # noqa: PLW1509  # it makes one system call and no lock
    )


def processes_naming(text: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (OSError, UnicodeDecodeError):
                continue
            if text in command:
                found.append(command)
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_ctrl_c_leaves_a_readable_folder_and_no_process(sites: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    long = CONFIG.model_copy(update={"job": JOB.model_copy(update={"rounds": 500})})
    config.write_text(yaml.safe_dump(long.model_dump(mode="json")))
    out = tmp_path / "run"
    command = ("simulate", "run", "--sites", "2", "--data", str(sites), "--out", str(out))
    process = run_command(*command, "--config", str(config), "--no-privacy")
    deadline = time.monotonic() + 120
    while not any(event["event"] == "round" for event in RunFolder(out).events()):
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert summary["rounds"] >= 1
    assert "interrupted" in (out / "report.html").read_text()
    assert RunFolder(out).latest() is not None
    assert processes_naming(str(out)) == []


def test_same_seed_gives_the_same_model(finished: Finished, tmp_path: Path) -> None:
    """Whatever the number of workers, and so the order of the answers."""
    from fedcmr_simulations.flower_engine import flower_process

    again = RunFolder.create(tmp_path / "again", JOB)
    places = choose_sites(finished.sites, 2, CohortQuery())
    with flower_process(again.root, places, 1) as process:
        assert process.wait(180) == 0, (again.root / "flower.log").read_text()
    hashes = [
        [e["model_sha256"] for e in folder.events() if e["event"] == "round"]
        for folder in (RunFolder(finished.run), again)
    ]
    assert hashes[0] == hashes[1]
    assert len(set(hashes[0])) == 2


def test_too_few_sites_are_refused(sites: Path) -> None:
    with pytest.raises(DataError, match="holds 2 sites, not 3"):
        choose_sites(sites, 3, CohortQuery())


def test_missing_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        choose_sites(tmp_path / "nowhere", 1, CohortQuery())
    with pytest.raises(DataError, match="holds no site store"):
        choose_sites(tmp_path, 1, CohortQuery())


def test_a_site_with_an_empty_part_is_refused(make_site: Callable[..., Path]) -> None:
    store = make_site("lone", 3, fractions=SplitFractions(1, 0, 0))
    with pytest.raises(DataError, match="lone has no validation patient"):
        choose_sites(store.parent, 1, CohortQuery())


def test_origin_names_what_the_data_are(sites: Path) -> None:
    assert data_origin(choose_sites(sites, 2, CohortQuery())) == "simulated"


def test_a_failed_run_says_so_in_its_folder(sites: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    # More calibration lines than the images have: every site refuses.
    sampling = JOB.sampling.model_copy(update={"acs_lines": 60})
    config = CONFIG.model_copy(update={"job": JOB.model_copy(update={"sampling": sampling})})
    with pytest.raises(FederationError, match="0 of at least 1 sites"):
        simulate(request(config, out, sites), SilentProgress())
    assert json.loads((out / "summary.json").read_text())["status"] == "failed"
    assert "failed" in (out / "report.html").read_text()


def test_wrong_data_leaves_no_run_folder(sites: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        simulate(SimulationRequest(PRIVATE, 9, tmp_path / "run", sites), SilentProgress())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("job: [", "not valid YAML"),
        ("job: {rounds: 0}", r"job\.rounds"),
        ("jobs: {}", "jobs"),
        ("just text", "the file"),
        ("evaluation: []", "evaluation"),
        ("job: {training: {learning_rate: -1}}", r"job\.training\.learning_rate"),
    ],
)
def test_bad_configuration_names_the_field(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        load_config(path)


def test_missing_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")


def test_packaged_demonstration_is_valid() -> None:
    assert load_config(None).evaluation[0].acceleration == 8
