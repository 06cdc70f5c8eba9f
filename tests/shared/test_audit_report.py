"""`fedcmr audit verify` and `fedcmr audit report` on bundles of a real ledger."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from html_page import Page
from other_host import other_host

from fedcmr_client.evidence import build
from fedcmr_client.ledger import CheckpointSchedule, Ledger, LedgerPlace
from fedcmr_shared.audit.charts import time_chart, utc
from fedcmr_shared.audit.claims import epsilon_text
from fedcmr_shared.audit.evidence import EmpiricalBound, Evidence
from fedcmr_shared.audit.report import write_report
from fedcmr_shared.audit.timeline import Moment
from fedcmr_shared.audit.verify import read_trusted, verify
from fedcmr_shared.cli import main
from fedcmr_shared.errors import ConfigurationError, LedgerError
from fedcmr_shared.privacy.merkle import node_hash
from fedcmr_shared.schemas.job import JobSpec, TrainingSpec
from fedcmr_shared.schemas.privacy import EvaluationSpec, PrivacySpec

CHROMIUM = shutil.which("chromium")


def make_bundle(folder: Path, name: str = "first") -> tuple[Path, Path]:
    """Write bundle and keys of a ledger with a closed job, scored without noise, and an open one."""
    now = 1_790_000_000_000
    place = LedgerPlace(folder / "ledger", folder / "head.json")
    schedule = CheckpointSchedule(every_s=60, leaves=64)
    setting = {"site": "north", "secret": b"s" * 32, "epsilon": 8.0, "delta": 1e-5}
    patients = [f"patient-{number}" for number in range(5)]
    with Ledger.create(place, **setting, schedule=schedule, clock=lambda: now) as ledger:
        for job in (make_job(name, noise=None), make_job("second", noise=8.0)):
            ledger.admit(
                job, policy_sha256="0f" * 32, training=patients[:3], evaluation=patients[3:]
            )
            ledger.store(job.sha256, "train", 1, ledger.start(job.sha256, "train", 1), b"update")
            ledger.start(job.sha256, "evaluate", 2)
            if job.name == name:
                ledger.mask(job.sha256, "train", 1, 2, "4d" * 32)
                ledger.unmask(job.sha256, "train", 1, 2, ["east", "north", "south"], "5b" * 32)
                ledger.finish(job.sha256, "finished")
        evidence = build(ledger)
        (folder / "keys.toml").write_text(f'north = "{ledger.public_key}"\n')
    evidence.write(folder / "bundle.json")
    return folder / "bundle.json", folder / "keys.toml"


def make_job(name: str, noise: float | None) -> JobSpec:
    evaluation = EvaluationSpec(noise_multiplier=noise)
    privacy = PrivacySpec(sampling_rate=0.1, noise_multiplier=2.0, evaluation=evaluation)
    return JobSpec(name=name, rounds=2, privacy=privacy, training=TrainingSpec(local_steps=5))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_bundle(tmp_path_factory.mktemp("site"))


@pytest.fixture
def bundle(pristine: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A copy that the test may change."""
    source, keys = pristine
    return Path(shutil.copy(source, tmp_path)), Path(shutil.copy(keys, tmp_path))


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["audit", *map(str, arguments)])
    output = capsys.readouterr()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, output.out, output.err


def edit(path: Path, place: str, value: object) -> None:
    """Set the field at a path such as leaves.3.content in a JSON file."""
    document = json.loads(path.read_text())
    target: Any = document
    *parents, last = place.split(".")
    for part in parents:
        target = target[int(part) if part.isdigit() else part]
    target[last] = value
    path.write_text(json.dumps(document))


def test_verify_prints_steps_figures_claims_and_assumptions(
    bundle: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "verify", bundle[0], "--trust", bundle[1])
    assert code == 0
    assert len(re.findall(r"^ *\d+ pass ", out, re.MULTILINE)) == 11
    for words in ("first", "Assumed, not checked", "filter: valid", "no ε covers them", "zero-out"):
        assert words in out
    assert re.search(r"train +│ 1 +│ 2 +│ 3 +│ east, north, south", out)


def test_verify_gives_the_same_as_json(
    bundle: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "verify", bundle[0], "--trust", bundle[1], "--json")
    assert code == 0
    result = json.loads(out)
    assert [step["passed"] for step in result["steps"]] == [True] * 11
    assert [(job["name"], job["outcome"]) for job in result["jobs"]] == [
        ("first", "finished"),
        ("second", "open"),
    ]
    assert result["jobs"][0]["without_noise"] == ["evaluate"]
    survivors = ["east", "north", "south"]
    opened = {"phase": "train", "round": 1, "attempt": 2, "survivors": survivors}
    assert [job["opened_sums"] for job in result["jobs"]] == [[opened], []]
    assert [phase["charged"] for phase in result["jobs"][1]["phases"]] == [3, 2]
    assert result["budget"]["epsilon"] == 8
    assert result["all_cohorts"]["rdp"] >= max(c["rdp"] for c in result["cohorts"])
    assert 0 < result["remaining_share"] < 1


@pytest.mark.parametrize(
    ("place", "value", "step"),
    [
        ("format", "fedcmr-evidence-2", "1, format"),
        ("leaves.1.content", '{"entry":{"kind":"padding"}}', "1, format"),
        ("leaves.1.content", "no JSON", "1, format"),
        ("leaves.1.index", 0, "1, format"),
        ("scope", "job", "1, format"),
        ("surprise", 1, "1, format"),
        ("site", "south", "2, trust"),
        ("checkpoint.at", 1, "3, signatures"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_a_changed_file_exits_1_and_names_the_step(
    bundle: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    place: str,
    value: object,
    step: str,
    as_json: bool,
) -> None:
    edit(bundle[0], place, value)
    flags = ["--json"] if as_json else []
    code, out, error = run(capsys, "verify", bundle[0], "--trust", bundle[1], *flags)
    assert code == 1
    assert f"step {step}, failed: " in error
    assert "certified" not in out.lower()
    if as_json:
        assert f"step {step}, failed: " in json.loads(out)["error"]


def test_a_key_given_twice_in_a_leaf_is_refused(bundle: tuple[Path, Path]) -> None:
    content = json.loads(bundle[0].read_text())["leaves"][1]["content"]
    edit(bundle[0], "leaves.1.content", '{"salt":"' + "00" * 32 + '",' + content[1:])
    with pytest.raises(LedgerError, match="not written in canonical JSON"):
        Evidence.read(bundle[0])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("north: 0f5e", "is not TOML"),
        ('north = "0f5e"', "north is no public key"),
        ("north = 5", "north is no public key"),
        ('[north]\nkey = "' + "00" * 32 + '"', "north is no public key"),
        ('north = "' + "00" * 32 + '"\nnorth = "' + "11" * 32 + '"', "is not TOML"),
        ("\ud800", "is not text"),
    ],
)
def test_a_wrong_file_of_keys_says_what_to_write(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigurationError, match=f"{problem}.*write one line per site"):
        read_trusted(path)


def test_files_that_are_not_there_are_named(
    tmp_path: Path, bundle: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(LedgerError, match="cannot read the bundle"):
        Evidence.read(tmp_path)
    with pytest.raises(ConfigurationError, match="cannot read the keys"):
        read_trusted(tmp_path)
    out = tmp_path / "missing" / "report.html"
    code, _, error = run(capsys, "report", bundle[0], "--trust", bundle[1], "--out", out)
    assert code == 1
    assert "cannot write the page" in error
    with pytest.raises(LedgerError, match="cannot write the bundle"):
        Evidence.read(bundle[0]).write(out)


@pytest.mark.skipif(
    not all(shutil.which(tool) for tool in ("sh", "openssl", "jq", "basenc")),
    reason="openssl, jq or basenc is not installed",
)
def test_the_documented_shell_commands_verify_a_bundle(bundle: tuple[Path, Path]) -> None:
    evidence = Evidence.read(bundle[0])
    page = Path(__file__).parents[2] / "docs" / "auditors" / "evidence.md"
    script = "\n".join(re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL))
    left, right = (evidence.leaves[index].hash.hex() for index in (0, 1))
    names = {"KEY": read_trusted(bundle[1])["north"], "LEFT": left, "RIGHT": right}
    finished = subprocess.run(
        ["sh", "-e", "-c", script],
        cwd=bundle[0].parent,
        env={**os.environ, **names},
        capture_output=True,
        text=True,
        check=True,
    )
    verified, leaf, node = finished.stdout.splitlines()
    assert verified == "Signature Verified Successfully"
    assert leaf.split()[0] == evidence.leaves[3].hash.hex()
    assert node.split()[0] == node_hash(bytes.fromhex(left), bytes.fromhex(right)).hex()


def render(bundle: tuple[Path, Path]) -> tuple[str, Page, Mapping[str, str]]:
    """Return the page's source, the page, and what it should say."""
    findings = verify(Evidence.read(bundle[0]), read_trusted(bundle[1]))
    source = write_report(findings, bundle[0].parent / "report.html").read_text(encoding="utf-8")
    expected = {}
    if findings.account is not None:
        expected = {
            "worst": epsilon_text(findings.account.worst.filter_epsilon),
            "everything": epsilon_text(findings.account.everything.filter_epsilon),
        }
    return source, Page(source), expected


def test_the_page_shows_claim_steps_jobs_cohorts_and_entries(bundle: tuple[Path, Path]) -> None:
    _, page, expected = render(bundle)
    assert f"no patient more than ε = {expected['everything']} at δ = 1e-5" in page.text
    assert page.text.count("pass") >= 10
    for words in (
        "Certified for a patient of any one cohort",
        "None yet. An empirical figure",
        "Assumed, not checked",
        "Threat model",
        "unbounded",
        "released sums of scores (evaluate) without noise, once",
        "Job second",
        "leaves of padding",
        "dp-accounting",
    ):
        assert words in page.text
    named = [row for row in page.rows if row and row[0].startswith(("first", "second"))]
    jobs = [row for row in named if len(row) == 10]
    assert [row[1:6] for row in jobs] == [
        ["finished", "train", "5 steps, q = 0.1, σ = 2", "1 of 3", "1"],
        ["open", "train", "5 steps, q = 0.1, σ = 2", "1 of 3", "3"],
    ]
    scored = [row for row in page.rows if row and row[0] == "evaluate"]
    assert [row[1] for row in scored] == ["1 step, q = 1, no noise", "1 step, q = 1, σ = 8"]
    kinds = [row[2] for row in page.rows if len(row) == 6 and row[0].isdigit()]
    life = ["admitted", "started", "stored", "started"]
    assert kinds == ["opened", *life, "masked", "unmasked", "closed", *life]
    cohorts = [row for row in page.rows if len(row) == 7 and row[0] != "cohort"]
    assert cohorts[0][2] == expected["worst"]
    sums = [row for row in page.rows if row and row[-1] == "east, north, south"]
    assert sums == [["first", "train", "1", "2", "3", "east, north, south"]]
    assert (
        "train, round 1, attempt 2 of the secure sum: opened over 3 sites: east, north, south"
        in page.text
    )
    assert cohorts[-1][0] == "all together"


def test_the_page_is_self_contained_and_accessible(bundle: tuple[Path, Path]) -> None:
    source, page, _ = render(bundle)
    assert "//" not in source
    forbidden = {"script", "link", "iframe", "object", "embed", "img"}
    assert not forbidden & {tag for tag, _ in page.elements}
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")
    policies = [dict(a)["content"] for t, a in page.elements if t == "meta" and "http-equiv" in a]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
    identifiers = [a["id"] for _, a in page.elements if "id" in a]
    assert len(set(identifiers)) == len(identifiers)
    for tag, attributes in page.elements:
        if tag == "a":
            assert str(attributes["href"]).removeprefix("#") in identifiers
        if tag == "svg":
            assert "aria-hidden" in attributes or "aria-label" in attributes


def test_a_failed_bundle_has_a_page_without_figures(
    bundle: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    edit(bundle[0], "checkpoint.at", 1)
    out = bundle[0].parent / "failed.html"
    code, _, error = run(capsys, "report", bundle[0], "--trust", bundle[1], "--out", out)
    assert code == 1
    assert "step 3, signatures, failed" in error
    page = Page(out.read_text())
    assert "This bundle proves nothing: step 3, signatures, failed." in page.text
    assert "certified" not in page.text.lower()
    assert page.rows == []


def test_the_command_writes_the_page(
    bundle: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = bundle[0].parent / "page.html"
    code, text, _ = run(capsys, "report", bundle[0], "--trust", bundle[1], "--out", out, "--json")
    assert code == 0
    assert json.loads(text) == {"report": str(out)}
    assert "verified" in Page(out.read_text()).text


def test_text_from_the_bundle_stays_text(bundle: tuple[Path, Path]) -> None:
    evil = '</title><script>alert("x")</script><img src=x onerror=alert(1)>'
    edit(bundle[0], "software", evil)
    _, page, _ = render(bundle)
    assert not {"script", "img"} & {tag for tag, _ in page.elements}
    assert evil in page.text
    edit(bundle[0], "site", evil)
    _, page, _ = render(bundle)
    assert not {"script", "img"} & {tag for tag, _ in page.elements}
    assert page.text.count(evil) >= 2


def test_empirical_bounds_are_shown_as_the_sites_own(bundle: tuple[Path, Path]) -> None:
    bound = EmpiricalBound(
        job="ab" * 32,
        epsilon=0.5,
        delta=1e-5,
        confidence=0.95,
        method="one run",
        canaries=1000,
        canary_type="gradient",
        threat_model="white-box updates",
    )
    edit(bundle[0], "empirical", [bound.model_dump()])
    _, page, _ = render(bundle)
    assert "ε ≥ 0.50 at δ = 1e-5, confidence 0.95; one run, 1000 canaries" in page.text
    assert "None yet" not in page.text


def test_curves_never_leave_the_axis_for_a_bound_beyond_it() -> None:
    moments = [Moment(0, 0.0, 0.0, 0.0, 0.0), Moment(1000, 1.0, 2.0, 90.0, 1.5)]
    chart = time_chart(moments, 8.0)
    assert chart.cut
    assert chart.everything
    assert float(chart.y_ticks[-1].label) <= 15
    alone = time_chart([Moment(0, 0.0, 0.0, 0.0, 0.0), Moment(9, 1.0, 2.0, 2.0, 1.5)], 8.0)
    assert not alone.everything


def test_charged_epsilon_is_drawn_above_started_and_below_the_budget() -> None:
    moments = [Moment(0, 0.0, 0.0, 0.0, 0.0), Moment(5, 1.0, 4.0, 4.0, 3.0)]
    chart = time_chart(moments, 8.0)

    def heights(path: str) -> list[float]:
        return [float(y) for y in re.findall(r"V([\d.]+)", path)]

    assert chart.budget < heights(chart.charged)[-1] < heights(chart.pld)[-1]
    assert heights(chart.pld)[-1] < heights(chart.started)[0]


@pytest.mark.parametrize(("at", "text"), [(0, "1970-01-01 00:00:00 UTC"), (10**18, f"{10**18} ms")])
def test_times_beyond_the_calendar_are_numbers(at: int, text: str) -> None:
    assert utc(at) == text


def test_an_epsilon_is_rounded_up() -> None:
    assert [epsilon_text(value) for value in (1.0, 1.001, 2.719)] == ["1.00", "1.01", "2.72"]
    assert [epsilon_text(value) for value in (None, float("inf"))] == ["not computed", "infinite"]


def screenshot(page: Path, dark: bool = False) -> tuple[float, ...]:
    """Return the page's colour at its corner, red, green and blue from 0 to 1."""
    from matplotlib.image import imread

    picture = page.with_suffix(".png")
    scheme = 0 if dark else 1
    assert CHROMIUM is not None
    subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={page.parent / 'profile'}",
            f"--blink-settings=preferredColorScheme={scheme}",
            "--window-size=1200,900",
            f"--screenshot={picture}",
            page.as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=60,
    )
    return tuple(float(value) for value in imread(picture)[2, 2, :3])


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_shows_the_page_light_and_dark_and_loads_nothing(
    bundle: tuple[Path, Path],
) -> None:
    source, _, _ = render(bundle)
    page = bundle[0].parent / "page.html"
    with other_host() as (address, paths):
        page.write_text(source.replace("</main>", f'<img src="{address}/blocked"></main>'))
        assert min(screenshot(page)) > 0.9
        assert max(screenshot(page, dark=True)) < 0.15
        assert paths == []
        # Without its policy the same page loads: the server would have noticed.
        open_page = page.read_text().replace("default-src 'none'; ", "")
        page.write_text(open_page)
        screenshot(page)
        assert "/blocked" in paths
