"""`fedcmr site` on a real store and ledger: what it writes, prints, refuses and leaves alone."""

import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedcmr_client.ledger import Ledger
from fedcmr_client.policy import load_policy
from fedcmr_client.site_home import SiteHome
from fedcmr_client.store.site_store import SiteStore
from fedcmr_shared.audit.evidence import Evidence
from fedcmr_shared.cli import main
from fedcmr_shared.errors import ConfigurationError, DataError, LedgerError
from fedcmr_shared.identity.keys import verify_signature
from fedcmr_shared.privacy import accounting
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.ledger import Checkpoint, ClockSet

Run = Callable[..., tuple[int, str, str]]

JOB: dict[str, Any] = {
    "name": "cardiomm-demo",
    "coordinator": "heart-net",
    "minimum_sites": 3,
    "rounds": 3,
    "training": {"local_steps": 10},
    "privacy": {"sampling_rate": 0.1, "noise_multiplier": 1.5},
}
ALLOWED = ("--coordinator", "heart-net", "--job", "cardiomm-*", "--model", "cardiomm/tiny")
PATIENTS = [f"p-{number}" for number in range(6)]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs `fedcmr site` and gives exit code, output and errors."""
    monkeypatch.delenv("FEDCMR_POLICY", raising=False)

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(["site", *map(str, arguments)])
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def store(tmp_path: Path) -> Path:
    root = tmp_path / "store"
    SiteStore.create(root).close()
    (tmp_path / "elsewhere").mkdir()
    return root


@pytest.fixture
def policy_path(run: Run, store: Path, tmp_path: Path) -> Path:
    """The policy of a new site that takes jobs of heart-net."""
    arguments = ("--store", store, "--name", "north", "--second-place", tmp_path / "elsewhere")
    code, _, err = run("init", tmp_path / "site", *arguments, *ALLOWED)
    assert (code, err) == (0, "")
    return tmp_path / "site" / "policy.yaml"


def edit(path: Path, field: str, value: object) -> None:
    """Change one field of a policy, named by its dotted path."""
    content = yaml.safe_load(path.read_text())
    *parents, name = field.split(".")
    part = content
    for parent in parents:
        part = part[parent]
    part[name] = value
    path.write_text(yaml.safe_dump(content))


def give_roster(policy_path: Path) -> None:
    """Let the policy name a roster of this site and two others."""
    own = SiteHome.open(policy_path).identity().public_key
    sites = {"north": own, "east": "e" * 64, "south": "5" * 64}
    (policy_path.parent / "roster.yaml").write_text(yaml.safe_dump({"sites": sites}))
    edit(policy_path, "roster", "roster.yaml")


def write_job(folder: Path, **changes: Any) -> tuple[Path, JobSpec]:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump({**JOB, **changes}))
    return path, JobSpec.model_validate({**JOB, **changes})


def admit(policy_path: Path, job: JobSpec) -> None:
    home = SiteHome.open(policy_path)
    with home.open_ledger() as ledger:
        ledger.admit(
            job,
            policy_sha256=home.policy.sha256,
            training=PATIENTS[:4],
            evaluation=PATIENTS[4:],
        )


def contents(folder: Path) -> dict[str, bytes]:
    """All files below ``folder`` but SQLite's shared memory, which only coordinates readers."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith(("-shm", "-wal"))
    }


class TestInit:
    def test_writes_a_policy_that_loads_and_a_ledger_that_opens(
        self, policy_path: Path, store: Path, tmp_path: Path
    ) -> None:
        home = SiteHome.open(policy_path)
        assert home.policy.store == store
        assert home.policy.ledger.second_place == tmp_path / "elsewhere"
        assert (tmp_path / "elsewhere" / "north.head.json").is_file()
        assert home.policy.budget.order == accounting.best_order(8.0, 1e-5)
        assert home.policy.models == ("cardiomm/tiny",)
        with home.open_ledger() as ledger:
            opened = ledger.budget.opened
            assert (opened.site, opened.epsilon, opened.delta) == ("north", 8.0, 1e-5)
            assert opened.order == home.policy.budget.order
        text = policy_path.read_text()
        assert "# Public name of the site" in text
        assert (policy_path.parent / "ledger" / "site.key").stat().st_mode & 0o077 == 0

    def test_takes_budget_and_order_from_its_options(
        self, run: Run, store: Path, tmp_path: Path
    ) -> None:
        code, out, _ = run(
            "init", tmp_path / "site", "--store", store, "--name", "south", "--second-place", tmp_path,
            "--epsilon", 3, "--delta", 1e-6, "--order", 12, "--json",
        )  # fmt: skip
        assert code == 0
        home = SiteHome.open(tmp_path / "site" / "policy.yaml")
        assert home.policy.budget.model_dump() == {"epsilon": 3.0, "delta": 1e-6, "order": 12}
        assert home.policy.coordinators == ()
        with home.open_ledger() as ledger:
            assert json.loads(out)["public_key"] == ledger.public_key
            assert ledger.limit_rdp == accounting.rdp_limit(3.0, 1e-6, 12)

    def test_does_not_overwrite(self, run: Run, policy_path: Path, store: Path) -> None:
        before = contents(policy_path.parent)
        arguments = ("--store", store, "--name", "north", "--second-place", store.parent)
        code, _, err = run("init", policy_path.parent, *arguments)
        assert (code, contents(policy_path.parent)) == (1, before)
        assert f"{policy_path} exists: move it away" in err

    @pytest.mark.parametrize(
        ("option", "value", "message"),
        [
            ("--epsilon", "-8", "budget.epsilon"),
            ("--epsilon", "nan", "budget.epsilon"),
            ("--delta", "1", "budget.delta"),
            ("--order", "1", "budget.order"),
            ("--epsilon", "0.0001", "out of reach"),
            ("--name", "two words", "site"),
            ("--model", "cardiomm/huge", "models"),
            ("--second-place", "site/ledger/second", "lies in ledger.folder"),
            ("--second-place", "absent", "mount or make the second place"),
            ("--database-url", "postgresql+psycopg://a:b@c/d", "holds a password"),
            ("--database-url", "mysql://c/d", "cannot be kept in mysql"),
            ("--store", "nothing", "is no site store"),
        ],
    )
    def test_a_wrong_setting_leaves_no_policy(
        self,
        run: Run,
        store: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        option: str,
        value: str,
        message: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        settings = {"--store": str(store), "--name": "north", "--second-place": "elsewhere"}
        settings[option] = value
        pairs = [part for pair in settings.items() for part in pair]
        code, _, err = run("init", "site", *pairs)
        assert code == 1
        assert message in err
        assert err.count("\n") == 1
        assert not (tmp_path / "site" / "policy.yaml").exists()

    def test_the_second_place_must_be_named(self, run: Run, store: Path, tmp_path: Path) -> None:
        code, _, err = run("init", tmp_path / "site", "--store", store, "--name", "north")
        assert code == 2
        assert "--second-place" in err


class TestHome:
    @pytest.mark.parametrize(
        ("field", "value", "kept"),
        [
            ("budget.epsilon", 80.0, "8.0"),
            ("budget.delta", 1e-4, "1e-05"),
            ("budget.order", 9, "4"),
            ("ledger.checkpoint_hours", 1.0, "6.0"),
            ("ledger.checkpoint_entries", 1, "128"),
        ],
    )
    def test_what_the_ledger_fixed_cannot_be_edited(
        self, policy_path: Path, field: str, value: object, kept: str
    ) -> None:
        edit(policy_path, field, value)
        with pytest.raises(ConfigurationError, match=f"write {kept}$") as refusal:
            SiteHome.open(policy_path).open_ledger()
        assert field in str(refusal.value)
        assert str(policy_path) in str(refusal.value)

    def test_a_site_that_is_renamed_is_refused(self, policy_path: Path) -> None:
        edit(policy_path, "site", "south")
        with pytest.raises(LedgerError, match=r"south\.head\.json"):
            SiteHome.open(policy_path).open_ledger()
        second = load_policy(policy_path).ledger.second_place
        (second / "north.head.json").rename(second / "south.head.json")
        with pytest.raises(ConfigurationError, match=r"site is south, .* write north$"):
            SiteHome.open(policy_path).open_ledger()

    def test_no_order_in_the_policy_means_the_ledgers(self, policy_path: Path) -> None:
        edit(policy_path, "budget.order", None)
        SiteHome.open(policy_path).open_ledger().close()

    def test_another_secret_is_refused(self, policy_path: Path, store: Path) -> None:
        (store / "site.secret").write_bytes(b"x" * 32)
        with pytest.raises(LedgerError, match="another site secret"):
            SiteHome.open(policy_path).open_ledger()
        (store / "site.secret").unlink()
        with pytest.raises(DataError, match="cannot read the site secret"):
            SiteHome.open(policy_path).open_ledger()

    def test_opens_the_store_of_the_policy(self, policy_path: Path, store: Path) -> None:
        with SiteHome.open(policy_path).open_store() as opened:
            assert opened.root == store


class TestCheck:
    def test_a_job_that_fits_passes_and_changes_nothing(
        self, run: Run, policy_path: Path, tmp_path: Path
    ) -> None:
        path, job = write_job(tmp_path)
        give_roster(policy_path)
        before = contents(policy_path.parent)
        code, out, err = run("check", path, "--policy", policy_path)
        assert (code, err) == (0, "")
        assert "every rule passes" in out
        assert "FAIL" not in out
        assert contents(policy_path.parent) == before
        code, out, _ = run("check", path, "--policy", policy_path, "--json")
        answer = json.loads(out)
        assert (code, answer["passed"], answer["sha256"]) == (0, True, job.sha256)
        assert answer["budget"]["committed_epsilon"] == 0
        assert answer["budget"]["after_epsilon"] == answer["budget"]["reserves_epsilon"] > 0

    def test_each_failing_rule_is_named(self, run: Run, policy_path: Path, tmp_path: Path) -> None:
        plain = {"aggregation": "plain_with_local_dp", "minimum_sites": 1}
        path, _ = write_job(tmp_path, coordinator="stranger", **plain)
        code, out, _ = run("check", path, "--policy", policy_path)
        assert code == 1
        assert "refused: coordinator, minimum-sites, aggregation" in out
        code, out, _ = run("check", path, "--policy", policy_path, "--json")
        failed = [row["rule"] for row in json.loads(out)["rules"] if not row["passed"]]
        assert (code, failed) == (1, ["coordinator", "minimum-sites", "aggregation"])

    def test_a_job_of_secure_sums_needs_the_roster(
        self, run: Run, policy_path: Path, tmp_path: Path
    ) -> None:
        path, _ = write_job(tmp_path)
        code, out, _ = run("check", path, "--policy", policy_path, "--json")
        failed = [row for row in json.loads(out)["rules"] if not row["passed"]]
        assert (code, [row["rule"] for row in failed]) == (1, ["roster"])
        assert "name the file in roster" in failed[0]["text"]

    @pytest.mark.parametrize(
        ("energy", "expected"),
        [
            (None, "gives none, 0 leaves: the policy has no energy section"),
            ({"country": "DEU"}, "gives none, 0 leaves: energy.report_total is false"),
            ({"country": "DEU", "report_total": True}, "leaves, rounded up, inside a secure sum"),
        ],
    )
    def test_whether_energy_leaves_is_said_to_jobs_that_ask(
        self,
        run: Run,
        policy_path: Path,
        tmp_path: Path,
        energy: dict[str, Any] | None,
        expected: str,
    ) -> None:
        give_roster(policy_path)
        edit(policy_path, "energy", energy)
        rows = []
        for asked in (False, True):
            evaluation = {"energy_total": asked}
            path, _ = write_job(tmp_path, privacy={**JOB["privacy"], "evaluation": evaluation})
            code, out, _ = run("check", path, "--policy", policy_path, "--json")
            assert code == 0
            rules = json.loads(out)["rules"]
            rows.append([row for row in rules if row["rule"] == "energy-total"])
        assert rows[0] == []
        assert rows[1][0]["passed"]
        assert expected in rows[1][0]["text"]

    def test_a_simulations_job_is_found(self, run: Run, policy_path: Path, tmp_path: Path) -> None:
        give_roster(policy_path)
        path = tmp_path / "simulation.json"
        path.write_text(json.dumps({"job": JOB, "phantom": {"patients": 3}}))
        code, out, _ = run("check", path, "--policy", policy_path, "--json")
        assert (code, json.loads(out)["name"]) == (0, "cardiomm-demo")

    def test_a_job_without_privacy_has_no_finite_cost(
        self, run: Run, policy_path: Path, tmp_path: Path
    ) -> None:
        path, _ = write_job(tmp_path, privacy=None)
        code, out, _ = run("check", path, "--policy", policy_path, "--json")
        answer = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert code == 1
        assert answer["rules"][0] == {
            "rule": "privacy-missing",
            "passed": False,
            "text": "the job declares no privacy",
        }
        assert answer["budget"]["reserves_epsilon"] is None
        assert "no finite cost" in run("check", path, "--policy", policy_path)[1]

    def test_the_budget_counts_what_other_jobs_reserved(
        self, run: Run, policy_path: Path, tmp_path: Path
    ) -> None:
        """As many equal jobs pass the check as the ledger admits."""
        give_roster(policy_path)
        edit(policy_path, "max_epsilon_per_job", 8.0)
        rounds = {"rounds": 10, "training": {"local_steps": 10}}
        for seed in range(20):
            path, job = write_job(tmp_path, seed=seed, **rounds)
            code, out, _ = run("check", path, "--policy", policy_path, "--json")
            answer = json.loads(out)
            if code:
                break
            admit(policy_path, job)
        assert seed >= 2
        assert [row["rule"] for row in answer["rules"] if not row["passed"]] == ["budget"]
        assert answer["budget"]["after_epsilon"] > 8.0 >= answer["budget"]["committed_epsilon"]
        with pytest.raises(Exception, match="over the site's budget"):
            admit(policy_path, job)
        # A job that has its reservation is not counted twice.
        path, _ = write_job(tmp_path, seed=0, **rounds)
        code, out, _ = run("check", path, "--policy", policy_path)
        assert code == 0
        assert "admitted before" in out

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("rounds: many\n", "rounds: "),
            ("simulated: true\n", "simulated is unknown"),
            ("job: 3\n", "should be a valid dictionary"),
            ("resources: {energy_kwh: .inf}\n", "resources.energy_kwh"),
            ("a: 1\na: 2\n", "given twice"),
            ("", "is empty"),
        ],
    )
    def test_a_malformed_job_is_an_error(
        self, run: Run, policy_path: Path, tmp_path: Path, text: str, message: str
    ) -> None:
        path = tmp_path / "job.yaml"
        path.write_text(text)
        code, out, err = run("check", path, "--policy", policy_path)
        assert (code, out) == (1, "")
        assert message in err
        assert str(path) in err
        assert err.count("\n") == 1


class TestStatus:
    def test_of_a_new_ledger(self, run: Run, policy_path: Path) -> None:
        code, out, _ = run("status", "--policy", policy_path, "--json")
        status = json.loads(out)
        assert (code, status["site"], status["entries"], status["jobs"]) == (0, "north", 1, [])
        assert status["budget"]["left_share"] == 1.0
        assert "100.0%" in run("status", "--policy", policy_path)[1]

    def test_says_that_distributed_noise_has_no_figure_in_advance(
        self, run: Run, policy_path: Path, tmp_path: Path
    ) -> None:
        privacy = {"distributed": {"unseen_sites": 1}, "evaluation": {"rounds": "none"}}
        training = {"local_steps": 1, "optimiser": "sgd"}
        _, job = write_job(tmp_path, minimum_sites=3, privacy=privacy, training=training)
        admit(policy_path, job)
        _, out, _ = run("status", "--policy", policy_path)
        assert "no figure, as noise was distributed" in out
        status = json.loads(run("status", "--policy", policy_path, "--json")[1])
        assert status["fixed_in_advance_epsilon"] is None

    def test_adds_up_spent_reserved_and_left(
        self, run: Run, policy_path: Path, tmp_path: Path
    ) -> None:
        _, job = write_job(tmp_path)
        admit(policy_path, job)
        with SiteHome.open(policy_path).open_ledger() as ledger:
            ledger.start(job.sha256, "train", 1)
            worst = ledger.spending()
        code, out, _ = run("status", "--policy", policy_path, "--json")
        status = json.loads(out)
        budget = status["budget"]
        assert code == 0
        shares = [budget[f"{part}_share"] for part in ("spent", "reserved", "left")]
        assert sum(shares) == pytest.approx(1.0)
        assert 0 < budget["spent_epsilon"] < budget["committed_epsilon"] < 8
        assert budget["spent_share"] == pytest.approx(worst.spent_rdp / worst.limit_rdp)
        assert 0 < status["fixed_in_advance_epsilon"] <= budget["committed_epsilon"]
        (row,) = status["jobs"]
        assert (row["job"], row["name"]) == (job.sha256, "cardiomm-demo")
        assert (row["started"]["train"], row["left"]["train"]) == (1, 3)
        text = run("status", "--policy", policy_path)[1]
        assert "1 / 3" in text
        assert f'north = "{status["public_key"]}"' in text.replace("\n", "")

    def test_policy_from_environment_and_current_folder(
        self, run: Run, policy_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert "policy policy.yaml cannot be read" in run("status")[2]
        monkeypatch.chdir(policy_path.parent)
        assert run("status")[0] == 0
        monkeypatch.chdir("/")
        monkeypatch.setenv("FEDCMR_POLICY", str(policy_path))
        assert run("status")[0] == 0


class TestKeeping:
    def test_checkpoint_is_signed_and_padded(
        self, run: Run, policy_path: Path, tmp_path: Path
    ) -> None:
        out_file = tmp_path / "head.json"
        code, out, _ = run("checkpoint", "--policy", policy_path, "--out", out_file, "--json")
        head = Checkpoint.model_validate_json(out)
        assert (code, head.size, head.site) == (0, 128, "north")
        assert Checkpoint.model_validate_json(out_file.read_bytes()) == head
        with SiteHome.open(policy_path).open_ledger() as ledger:
            verify_signature(ledger.public_key, head.signature, head.signed_bytes())
        code, out, err = run("checkpoint", "--policy", policy_path, "--out", out_file)
        assert (code, "exists" in err) == (1, True)
        assert head.root in run("checkpoint", "--policy", policy_path)[1].replace("\n", "")

    def test_backup_replaces_a_lost_ledger(
        self, run: Run, policy_path: Path, tmp_path: Path
    ) -> None:
        _, job = write_job(tmp_path)
        admit(policy_path, job)
        code, out, _ = run("backup", tmp_path / "copy", "--policy", policy_path)
        assert (code, "2 entries" in out) == (0, True)
        folder = policy_path.parent / "ledger"
        shutil.rmtree(folder)
        assert "no ledger is there" in run("status", "--policy", policy_path)[2]
        shutil.copytree(tmp_path / "copy", folder)
        status = json.loads(run("status", "--policy", policy_path, "--json")[1])
        assert [row["job"] for row in status["jobs"]] == [job.sha256]
        code, _, err = run("backup", tmp_path / "copy", "--policy", policy_path, "--json")
        assert (code, "exists" in err) == (1, True)

    def test_an_older_backup_is_noticed(self, run: Run, policy_path: Path, tmp_path: Path) -> None:
        assert run("backup", tmp_path / "copy", "--policy", policy_path)[0] == 0
        _, job = write_job(tmp_path)
        admit(policy_path, job)
        folder = policy_path.parent / "ledger"
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "copy", folder)
        path, _ = write_job(tmp_path)
        for command in (["status"], ["check", str(path)], ["checkpoint"], ["set-clock"]):
            code, out, err = run(*command, "--policy", policy_path)
            assert (code, out) == (1, "")
            assert "keeps a head over 2 entries" in err

    def test_a_lost_second_place_is_written_anew(self, run: Run, policy_path: Path) -> None:
        second = load_policy(policy_path).ledger.second_place
        (head,) = second.iterdir()
        kept = head.read_bytes()
        assert run("second-place", "--ledger-is-newest", "--policy", policy_path)[0] == 1
        head.unlink()
        assert "newest head is missing" in run("status", "--policy", policy_path)[2]
        code, _, err = run("second-place", "--policy", policy_path)
        assert (code, head.exists()) == (2, False)
        assert "--ledger-is-newest" in err
        code, out, _ = run("second-place", "--ledger-is-newest", "--policy", policy_path, "--json")
        assert (code, json.loads(out)) == (0, {"second_place": str(second)})
        assert head.read_bytes() == kept
        assert run("status", "--policy", policy_path)[0] == 0

    def test_the_log_moves_to_another_database(
        self, run: Run, policy_path: Path, tmp_path: Path, new_database: Callable[[], str]
    ) -> None:
        _, job = write_job(tmp_path)
        admit(policy_path, job)
        before = json.loads(run("status", "--policy", policy_path, "--json")[1])
        url = new_database()
        code, out, _ = run("move-log", url, "--policy", policy_path, "--json")
        assert (code, json.loads(out)) == (0, {"entries": 2})
        code, _, err = run("move-log", url, "--policy", policy_path)
        assert (code, "holds a ledger already" in err) == (1, True)
        edit(policy_path, "ledger.database_url", url)
        assert json.loads(run("status", "--policy", policy_path, "--json")[1]) == before
        code, _, err = run("move-log", url, "--policy", policy_path)
        assert (code, "choose another database" in err) == (1, True)
        # The copy grows, so the old log is out of date and noticed.
        with SiteHome.open(policy_path).open_ledger() as ledger:
            ledger.start(job.sha256, "train", 1)
        edit(policy_path, "ledger.database_url", None)
        assert "keeps a head over 3 entries" in run("status", "--policy", policy_path)[2]

    def test_a_clock_that_was_ahead(self, run: Run, policy_path: Path, tmp_path: Path) -> None:
        home = SiteHome.open(policy_path)
        _, job = write_job(tmp_path)
        with home.open_ledger() as ledger:
            place, later = ledger.place, ledger.budget.clock + 3_600_000
        secret = (home.policy.store / "site.secret").read_bytes()
        with Ledger.open(place, secret=secret, clock=lambda: later) as ledger:
            ledger.refuse(job.sha256, "delta", "delta")
        with pytest.raises(LedgerError, match="clock is behind"):
            admit(policy_path, job)
        code, out, _ = run("set-clock", "--policy", policy_path)
        assert (code, "the ledger goes on at" in out) == (0, True)
        admit(policy_path, job)
        with home.open_ledger() as ledger:
            assert [isinstance(leaf.entry, ClockSet) for leaf in ledger.leaves()].count(True) == 1

    def test_cancel_releases_and_cannot_be_undone(
        self, run: Run, policy_path: Path, tmp_path: Path
    ) -> None:
        _, job = write_job(tmp_path)
        _, other = write_job(tmp_path, seed=1)
        admit(policy_path, job)
        admit(policy_path, other)
        with SiteHome.open(policy_path).open_ledger() as ledger:
            ledger.start(job.sha256, "train", 1)
        code, out, _ = run("cancel", job.sha256[:16], "--policy", policy_path, "--json")
        assert code == 0
        assert json.loads(out)["released"]["train"] == 3
        states = {
            row["job"]: (row["outcome"], row["started"]["train"], row["left"]["train"])
            for row in json.loads(run("status", "--policy", policy_path, "--json")[1])["jobs"]
        }
        assert states == {job.sha256: ("cancelled", 1, 0), other.sha256: (None, 0, 4)}
        assert "cancelled already" in run("cancel", job.sha256, "--policy", policy_path)[2]
        assert "admitted no job" in run("cancel", "f" * 64, "--policy", policy_path)[2]
        assert "fits several jobs" in run("cancel", "", "--policy", policy_path)[2]

    def test_cancel_erases_latents_at_once(
        self, run: Run, policy_path: Path, tmp_path: Path
    ) -> None:
        jobs = [write_job(tmp_path, seed=seed)[1] for seed in (0, 1)]
        files = []
        for job in jobs:
            admit(policy_path, job)
            files.append(SiteHome.open(policy_path).latents_folder / job.sha256 / "p-a-0.latents")
            files[-1].parent.mkdir(parents=True)
            files[-1].write_bytes(b"sealed")
        gone, other = files
        assert run("cancel", jobs[0].sha256, "--policy", policy_path)[0] == 0
        assert (gone.parent.exists(), other.exists()) == (False, True)
        gone.parent.mkdir()
        gone.write_bytes(b"of a cancelling that was cut off")
        code, _, err = run("cancel", jobs[0].sha256, "--policy", policy_path)
        assert (code, "cancelled already" in err) == (1, True)
        assert not gone.exists()

    def test_evidence_of_ledger_and_job(self, run: Run, policy_path: Path, tmp_path: Path) -> None:
        _, job = write_job(tmp_path)
        admit(policy_path, job)
        bundle = tmp_path / "ledger.json"
        code, out, _ = run("export-evidence", "--out", bundle, "--policy", policy_path, "--json")
        assert (code, json.loads(out)["scope"]) == (0, "ledger")
        evidence = Evidence.read(bundle)
        assert len(evidence.leaves) == evidence.checkpoint.size == 128
        assert all(name not in bundle.read_text() for name in PATIENTS)
        one = tmp_path / "job.json"
        code, out, _ = run(
            "export-evidence", "--out", one, "--job", job.sha256[:10], "--policy", policy_path
        )
        assert (code, Evidence.read(one).job) == (0, job.sha256)
        assert f'north = "{evidence.public_key}"' in out.replace("\n", "")
        # What was exported convinces an auditor who trusts the printed key.
        keys = tmp_path / "keys.toml"
        keys.write_text(f'north = "{evidence.public_key}"\n')
        for file in (bundle, one):
            with pytest.raises(SystemExit) as stop:
                main(["audit", "verify", str(file), "--trust", str(keys)])
            assert not stop.value.code

    def test_evidence_of_an_unknown_job_writes_nothing(
        self, run: Run, policy_path: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "x.json"
        code, _, err = run("export-evidence", "--out", out, "--job", "ab", "--policy", policy_path)
        assert (code, out.exists()) == (1, False)
        assert "admitted no job" in err


def test_a_new_log_in_another_database(
    run: Run, store: Path, tmp_path: Path, new_database: Callable[[], str]
) -> None:
    url = new_database()
    arguments = ("--store", store, "--name", "north", "--second-place", tmp_path / "elsewhere")
    assert run("init", tmp_path / "site", *arguments, "--database-url", url)[0] == 0
    policy_path = tmp_path / "site" / "policy.yaml"
    assert load_policy(policy_path).ledger.database_url == url
    assert not (tmp_path / "site" / "ledger" / "ledger.sqlite").exists()
    assert json.loads(run("status", "--policy", policy_path, "--json")[1])["entries"] == 1


COMMANDS = (
    ("status",),
    ("checkpoint",),
    ("set-clock",),
    ("backup", "copy"),
    ("cancel", "ab"),
    ("export-evidence", "--out", "x.json"),
    ("second-place", "--ledger-is-newest"),
    ("check", "job.yaml"),
    ("move-log", "sqlite:///copy.sqlite"),
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_wrong_policy_or_tampered_ledger_stops_every_command(
    run: Run,
    policy_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_job(tmp_path)
    log = policy_path.parent / "ledger" / "ledger.sqlite"
    whole = log.read_bytes()
    with closing(sqlite3.connect(log)) as database:
        changed = "UPDATE ledger_entries SET leaf = replace(leaf, ?, ?)"
        database.execute(changed, ('"epsilon":8.0', '"epsilon":9.0'))
        database.commit()
    damaged = contents(tmp_path)
    code, out, err = run(*command, "--policy", policy_path)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert contents(tmp_path) == damaged
    log.write_bytes(whole[:1000])
    code, out, err = run(*command, "--policy", policy_path)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert log.stat().st_size == 1000
    log.write_bytes(whole)
    edit(policy_path, "budget.epsilon", -1)
    before = contents(tmp_path)
    code, out, err = run(*command, "--policy", policy_path)
    assert (code, out) == (1, "")
    assert "budget.epsilon: Input should be greater than 0" in err
    assert contents(tmp_path) == before
