"""`fedcmr site roster`: who is pinned, the fingerprint to read out, and what cannot be right."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hospitals import SECURE, write_roster

from fedcmr_client.site_home import SiteHome
from fedcmr_shared.cli import main
from fedcmr_shared.identity.roster import Roster, roster_text
from fedcmr_shared.schemas.job import JobSpec, ModelSpec
from fedcmr_shared.schemas.privacy import PrivacySpec

Run = Callable[..., tuple[int, str, str]]
OTHERS = {"birch": "b" * 64, "cedar": "c" * 64, "dogwood": "d" * 64}
JOB = JobSpec(
    name="summed",
    model=ModelSpec(text_encoder="hashed"),
    privacy=PrivacySpec(noise_multiplier=8.0),
)


@pytest.fixture
def home(
    make_home: Callable[..., SiteHome], make_site: Callable[..., Path], tmp_path: Path
) -> SiteHome:
    """A site whose policy names a roster that is not written yet."""
    return make_home(make_site("alder", 1), roster=tmp_path / "roster.yaml", **SECURE)


@pytest.fixture
def run(home: SiteHome, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs `fedcmr site` and gives exit code, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(["site", *map(str, arguments), "--policy", str(home.path)])
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run


def pin(home: SiteHome, own: str | None = None, **more: str) -> Roster:
    key = home.identity().public_key if own is None else own
    assert home.policy.roster is not None
    return write_roster(home.policy.roster, {"alder": key, **OTHERS, **more})


def test_sites_keys_threshold_and_fingerprint(run: Run, home: SiteHome) -> None:
    roster = pin(home)
    code, text, errors = run("roster")
    assert (code, errors) == (0, "")
    for name, key in roster.sites.items():
        assert name in text
        assert key in text
    assert "3 of 4 sites open a sum" in text
    assert f"fingerprint {roster.fingerprint}\n" in text
    assert roster.fingerprint.replace(" ", "") == roster.sha256


def test_the_same_for_scripts(run: Run, home: SiteHome) -> None:
    roster = pin(home)
    code, text, _ = run("roster", "--json")
    assert code == 0
    shown = json.loads(text)
    assert shown.pop("site") == "alder"
    assert shown.pop("sha256") == roster.sha256
    assert Roster.model_validate(shown) == roster


def test_every_site_reads_out_the_same_fingerprint_and_any_change_shows(
    run: Run, home: SiteHome
) -> None:
    """The order of the lines does not count; a key, a name, a site or the threshold does."""

    def fingerprint() -> str:
        return run("roster")[1].splitlines()[-1]

    roster, path = pin(home), home.policy.roster
    assert path is not None
    first = fingerprint()
    backwards = {"threshold": 3, "sites": dict(reversed(roster.sites.items()))}
    path.write_text(yaml.safe_dump(backwards, sort_keys=False))
    assert fingerprint() == first
    others = []
    for changed in (
        {**roster.sites, "birch": "e" * 64},
        {**roster.sites, "elm": "e" * 64},
        {"elm" if name == "birch" else name: key for name, key in roster.sites.items()},
        {**roster.sites, "birch": roster.sites["cedar"], "cedar": roster.sites["birch"]},
    ):
        write_roster(path, changed)
        others.append(fingerprint())
    path.write_text(roster_text(Roster(sites=roster.sites, threshold=4)))
    others.append(fingerprint())
    assert len({first, *others}) == 6


def test_another_key_of_this_site_is_refused_with_the_right_line(run: Run, home: SiteHome) -> None:
    pin(home, own="a" * 64)
    code, text, errors = run("roster")
    assert (code, text) == (1, "")
    assert f"alder: {home.identity().public_key}" in errors
    assert str(home.policy.roster) in errors


def test_a_roster_without_this_site_is_refused(run: Run, home: SiteHome) -> None:
    assert home.policy.roster is not None
    write_roster(home.policy.roster, OTHERS)
    code, _, errors = run("roster", "--json")
    assert code == 1
    assert "does not list this site as it is" in errors


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("sites: [", "is not valid YAML"),
        (yaml.safe_dump({"sites": {"alder": "a" * 64}}), "sites"),
        (yaml.safe_dump({"sites": {**OTHERS, "elm": "b" * 64}}), "same key"),
        (yaml.safe_dump({"sites": OTHERS, "threshold": 2}), "threshold"),
    ],
)
def test_a_file_that_is_no_roster_is_named(
    content: str | None, message: str, run: Run, home: SiteHome
) -> None:
    assert home.policy.roster is not None
    if content is not None:
        home.policy.roster.write_text(content)
    code, _, errors = run("roster")
    assert code == 1
    assert message in errors
    assert str(home.policy.roster) in errors


def test_without_a_roster_in_the_policy_the_field_is_named(run: Run, home: SiteHome) -> None:
    content = yaml.safe_load(home.path.read_text())
    home.path.write_text(yaml.safe_dump({**content, "roster": None}))
    code, _, errors = run("roster")
    assert code == 1
    assert "name the file in roster" in errors
    assert str(home.path) in errors


class TestCheck:
    """The row *roster* of `fedcmr site check` says what the site would answer to the job."""

    def row(self, run: Run, tmp_path: Path, job: JobSpec = JOB) -> dict[str, Any] | None:
        path = tmp_path / "job.json"
        path.write_text(job.model_dump_json())
        code, text, errors = run("check", path, "--json")
        assert errors == ""
        summary = json.loads(text)
        assert code == (0 if summary["passed"] else 1)
        rows = [row for row in summary["rules"] if row["rule"] == "roster"]
        if rows and not rows[0]["passed"]:
            assert not summary["passed"]
        return rows[0] if rows else None

    def test_says_with_how_many_sites_a_job_sums(
        self, run: Run, home: SiteHome, tmp_path: Path
    ) -> None:
        pin(home)
        row = self.row(run, tmp_path)
        assert row == {
            "rule": "roster",
            "passed": True,
            "text": "summed with 3 other sites; 3 open a sum",
        }

    def test_fails_where_the_site_would_refuse(
        self, run: Run, home: SiteHome, tmp_path: Path
    ) -> None:
        assert home.policy.roster is not None
        texts = []
        row = self.row(run, tmp_path)  # no file
        texts.append(row)
        pin(home, own="a" * 64)
        texts.append(self.row(run, tmp_path))
        write_roster(home.policy.roster, OTHERS)
        texts.append(self.row(run, tmp_path))
        pin(home)
        groups = JOB.model_copy(update={"aggregation": "secure_groups", "minimum_sites": 6})
        texts.append(self.row(run, tmp_path, groups))
        found = [(row["passed"], row["text"]) for row in texts if row is not None]
        expected = ("cannot be read", "another key of this site", "does not list", "no two groups")
        for (passed, text), message in zip(found, expected, strict=True):
            assert not passed
            assert message in text

    def test_a_threshold_below_the_policys_sites_fails(
        self, run: Run, home: SiteHome, tmp_path: Path
    ) -> None:
        pin(home)
        content = yaml.safe_load(home.path.read_text())
        home.path.write_text(yaml.safe_dump({**content, "minimum_sites": 4}))
        row = self.row(run, tmp_path, JOB.model_copy(update={"minimum_sites": 4}))
        assert row is not None
        assert not row["passed"]
        assert row["text"] == "3 sites would open the sum; the policy asks for 4"

    def test_a_job_in_the_open_needs_none(self, run: Run, home: SiteHome, tmp_path: Path) -> None:
        job = JOB.model_copy(update={"aggregation": "plain_with_local_dp"})
        assert self.row(run, tmp_path, job) is None
