"""`fedcmr site` on the way into a federation: request, join, status, pause, and the way out."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from flower_parties import free_port
from hospitals import SECURE

from fedcmr_client import agent_lock, site_health
from fedcmr_client.agent_lock import only_agent
from fedcmr_client.agent_settings import AgentSettings
from fedcmr_client.governance import ListedJob
from fedcmr_client.site_health import Health, Problem
from fedcmr_client.site_home import SiteHome
from fedcmr_shared.cli import main
from fedcmr_shared.errors import ConfigurationError, ConnectionProblem, DataError
from fedcmr_shared.identity.certificates import (
    Authority,
    Member,
    certificate_pem,
    issue_member,
    new_authority,
)
from fedcmr_shared.identity.enrolment import EnrolmentRequest, StartupKit, file_text
from fedcmr_shared.identity.keys import SiteKey
from fedcmr_shared.identity.roster import Roster, new_roster, read_roster
from fedcmr_shared.identity.roster_history import RosterVersion, next_version
from fedcmr_shared.schemas.job import JobSpec, ModelSpec
from fedcmr_shared.schemas.privacy import PrivacySpec
from fedcmr_shared.schemas.signed_job import JobAuthorisation

Run = Callable[..., tuple[int, str, str]]

OTHERS = {"birch": "b" * 64, "cedar": "c" * 64, "dogwood": "d" * 64}


@pytest.fixture
def home(
    make_home: Callable[..., SiteHome], make_site: Callable[..., Path], tmp_path: Path
) -> SiteHome:
    """A site of before federations: it has a ledger, but no member folder."""
    allowed = {"coordinators": ["coordinator"], "jobs": ["heart"]}
    return make_home(make_site("alder", 1), roster=tmp_path / "roster.yaml", **allowed, **SECURE)


@pytest.fixture
def run(home: SiteHome, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs `fedcmr site` and gives exit code, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(["site", *map(str, arguments), "--policy", str(home.path)])
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run


class Coordinator:
    """Who answers requests with kits, and signs rosters."""

    def __init__(self, folder: Path, name: str = "hearts") -> None:
        self.folder = folder
        folder.mkdir()
        self.name = name
        self.authority: Authority = new_authority(name)
        self.identity = SiteKey.create(folder / "identity.pem")
        self.history: list[RosterVersion] = []

    def answer(self, request: Path, member: Member | None = None, **changes: Any) -> Path:
        """Write the kit that answers a request file; return its path."""
        asked = EnrolmentRequest.read(request)
        now: datetime | None = changes.pop("now", None)
        wanted = member or asked.member
        certificate = issue_member(self.authority, asked.certificate_request, wanted, now)
        values = {
            "federation": self.name,
            "coordinator": "heart-net",
            "coordinator_key": self.identity.public_key,
            "host": "fl.example.org",
            "port": 8443,
            "authority": certificate_pem(self.authority.certificate),
            "certificate": certificate_pem(certificate),
        }
        path = self.folder / f"{wanted.name}.json"
        path.write_text(file_text(StartupKit.model_validate({**values, **changes})))
        return path

    def propose(self, roster: Roster, reason: str = "a site joined") -> RosterVersion:
        version = next_version(self.history, roster, reason, self.identity)
        self.history.append(version)
        return version


@pytest.fixture
def coordinator(tmp_path: Path) -> Coordinator:
    return Coordinator(tmp_path / "coordinator")


@pytest.fixture
def kit(run: Run, home: SiteHome, coordinator: Coordinator) -> Path:
    """The kit that answers the site's request."""
    assert run("request")[0] == 0
    return coordinator.answer(home.membership.request_path)


@pytest.fixture
def joined(run: Run, home: SiteHome, kit: Path) -> SiteHome:
    fingerprint = StartupKit.read(kit).fingerprint
    assert run("join", kit, "--fingerprint", fingerprint)[0] == 0
    return home


class TestRequest:
    def test_prints_the_fingerprint_and_what_to_do(self, run: Run, home: SiteHome) -> None:
        code, text, errors = run("request")
        assert (code, errors) == (0, "")
        path = home.membership.request_path
        asked = EnrolmentRequest.read(path)
        assert asked.member == Member("site", "alder")
        assert asked.identity == home.identity().public_key
        assert asked.fingerprint in text
        assert f"send {path} to the coordinator" in text
        assert "fedcmr site join KIT" in text

    def test_is_made_once(self, run: Run, home: SiteHome) -> None:
        run("request", "--json")
        before = home.membership.request_path.read_bytes()
        code, _, errors = run("request", "--json")
        assert code == 1
        assert "holds a request already" in errors
        assert home.membership.request_path.read_bytes() == before

    def test_comes_with_a_new_site(
        self, run: Run, home: SiteHome, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "elsewhere").mkdir()
        arguments = [tmp_path / "birch", "--store", home.policy.store, "--name", "birch"]
        arguments += ["--second-place", tmp_path / "elsewhere"]
        with pytest.raises(SystemExit) as stop:
            main(["site", "init", *map(str, arguments)])
        assert not stop.value.code
        made = SiteHome.open(tmp_path / "birch" / "policy.yaml")
        assert made.membership.request.fingerprint in capsys.readouterr().out
        made.membership.require_of("birch", made.identity())
        assert AgentSettings.load(made.folder) == AgentSettings(
            log_folder=tmp_path / "birch" / "logs"
        )


class TestJoin:
    def test_with_the_right_fingerprint(
        self, run: Run, home: SiteHome, kit: Path, coordinator: Coordinator
    ) -> None:
        taken = StartupKit.read(kit)
        spelled = taken.fingerprint.replace(" ", "").upper()
        code, text, errors = run("join", kit, "--fingerprint", spelled)
        assert (code, errors) == (0, "")
        assert "joined hearts; the certificate is valid until" in text
        assert "does not list heart-net under coordinators" in text
        assert home.membership.pinned[1] == coordinator.identity.public_key

    def test_a_wrong_fingerprint_changes_nothing(self, run: Run, home: SiteHome, kit: Path) -> None:
        code, _, errors = run("join", kit, "--fingerprint", "0" * 64)
        assert code == 1
        assert StartupKit.read(kit).fingerprint in errors
        assert "do not use this kit" in errors
        assert home.membership.state == "asked"

    @pytest.mark.parametrize(
        ("answer", "state"), [("y\n", "joined"), ("n\n", "asked"), ("", "asked")]
    )
    def test_asks_without_one(
        self,
        run: Run,
        home: SiteHome,
        kit: Path,
        answer: str,
        state: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        import io

        monkeypatch.setattr("sys.stdin", io.StringIO(answer))
        code, text, _ = run("join", kit)
        assert StartupKit.read(kit).fingerprint in " ".join(text.split())
        assert (home.membership.state, code == 0) == (state, state == "joined")

    def test_scripts_must_give_it(self, run: Run, home: SiteHome, kit: Path) -> None:
        code, _, errors = run("join", kit, "--json")
        assert code == 2
        assert "--fingerprint" in errors
        assert home.membership.state == "asked"

    def test_the_kit_of_another_site_is_refused_before_anything_is_asked(
        self, run: Run, home: SiteHome, kit: Path, coordinator: Coordinator
    ) -> None:
        other = coordinator.answer(home.membership.request_path, Member("site", "birch"))
        code, _, errors = run("join", other, "--fingerprint", StartupKit.read(other).fingerprint)
        assert code == 1
        assert "the kit is for site birch" in errors
        assert errors.count("\n") == 1

    def test_an_expired_kit_names_the_day(
        self, run: Run, home: SiteHome, kit: Path, coordinator: Coordinator
    ) -> None:
        past = datetime.now(UTC) - timedelta(days=400)
        old = coordinator.answer(home.membership.request_path, now=past)
        code, _, errors = run("join", old, "--fingerprint", StartupKit.read(old).fingerprint)
        assert code == 1
        assert f"expired on {past + timedelta(days=365):%Y-%m-%d}: ask the coordinator" in errors

    def test_a_second_federation_is_refused(
        self, run: Run, joined: SiteHome, tmp_path: Path
    ) -> None:
        other = Coordinator(tmp_path / "other", "livers")
        kit = other.answer(joined.membership.request_path)
        code, _, errors = run("join", kit, "--fingerprint", StartupKit.read(kit).fingerprint)
        assert code == 1
        assert "belongs to federation hearts" in errors

    def test_a_file_that_is_no_kit_is_named(self, run: Run, home: SiteHome, kit: Path) -> None:
        kit.write_text("{}")
        code, _, errors = run("join", kit, "--fingerprint", "0")
        assert code == 1
        assert str(kit) in errors

    def test_a_request_of_a_former_ledger_is_refused(
        self, run: Run, home: SiteHome, kit: Path
    ) -> None:
        """The coordinator would list a key with which nobody signs any more."""
        (home.policy.ledger.folder / "site.key").unlink()
        SiteKey.create(home.policy.ledger.folder / "site.key")
        code, _, errors = run("join", kit, "--fingerprint", StartupKit.read(kit).fingerprint)
        assert code == 1
        assert "another site or ledger key" in errors

    def test_without_a_request_there_is_nothing_to_join(
        self, run: Run, home: SiteHome, kit: Path
    ) -> None:
        home.membership.request_path.unlink()
        code, _, errors = run("join", kit, "--fingerprint", StartupKit.read(kit).fingerprint)
        assert code == 1
        assert "fedcmr site request" in errors


class Calls:
    """What the coordinator answers to a command, without a network between."""

    def __init__(self, coordinator: Coordinator, home: SiteHome) -> None:
        self.coordinator, self.home = coordinator, home
        self.left = False
        self.handed_in: list[bytes] = []

    def roster_history(self) -> list[RosterVersion]:
        return list(self.coordinator.history)

    def leave(self) -> None:
        self.left = True

    def jobs(self) -> list[ListedJob]:
        """One job that the coordinator signed, and one of before it that is over."""
        key, federation = self.coordinator.identity, self.home.membership.pinned[0]
        now = datetime.now(UTC)
        spec = JobSpec(
            name="heart",
            minimum_sites=3,
            aggregation="secure_sum",
            model=ModelSpec(text_encoder="hashed"),
            privacy=PrivacySpec(noise_multiplier=8.0),
        )
        signed = JobAuthorisation.sign(spec, federation, (now, now + timedelta(days=1)), key)
        old = spec.model_copy(update={"name": "older"})
        return [ListedJob(old, None, "finished", None), ListedJob(spec, signed, "running", None)]

    def put_evidence(self, path: Path) -> str:
        try:
            self.handed_in.append(path.read_bytes())
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
        return hashlib.sha256(self.handed_in[-1]).hexdigest()

    def renew(self, request: str) -> str:
        later = datetime.now(UTC) + timedelta(days=40)
        member = self.home.membership.member
        issued = issue_member(self.coordinator.authority, request, member, later)
        return certificate_pem(issued)


@pytest.fixture
def calls(joined: SiteHome, coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls(coordinator, joined)

    @contextmanager
    def governance_of(home: SiteHome) -> Iterator[Calls]:
        home.membership.require_joined()
        yield calls

    monkeypatch.setattr("fedcmr_client.site_link.governance_of", governance_of)
    return calls


def sites(home: SiteHome, **more: str) -> dict[str, str]:
    return {home.policy.site: home.identity().public_key, **OTHERS, **more}


def test_evidence_is_handed_in(run: Run, joined: SiteHome, calls: Calls, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle.json"
    code, _, errors = run("hand-in", bundle)
    assert (code, calls.handed_in) == (1, [])
    assert "bundle.json cannot be read" in errors
    assert run("export-evidence", "--out", bundle)[0] == 0
    code, text, _ = run("hand-in", bundle)
    assert code == 0
    assert calls.handed_in == [bundle.read_bytes()]
    assert hashlib.sha256(bundle.read_bytes()).hexdigest() in text.replace("\n", "")


class TestRoster:
    def test_fetch_shows_and_accept_pins(
        self, run: Run, joined: SiteHome, coordinator: Coordinator, calls: Calls
    ) -> None:
        first = coordinator.propose(new_roster(sites(joined)), "the first")
        code, text, errors = run("roster", "fetch")
        assert (code, errors) == (0, "")
        assert first.roster.fingerprint in text
        assert "alder joins" in text
        path = joined.policy.roster
        assert path is not None
        assert not path.exists()
        code, text, _ = run("roster", "accept", "--fingerprint", first.roster.fingerprint)
        assert code == 0
        assert read_roster(path) == first.roster
        code, text, _ = run("roster", "fetch")
        assert "version 1 is the one that this site goes by" in text
        assert run("roster")[0] == 0

    def test_a_change_is_told_line_by_line_and_waits(
        self, run: Run, joined: SiteHome, coordinator: Coordinator, calls: Calls
    ) -> None:
        first = coordinator.propose(new_roster(sites(joined)))
        run("roster", "fetch")
        run("roster", "accept", "--fingerprint", first.roster.fingerprint)
        others = sites(joined, elm="e" * 64, birch="9" * 64)
        second = coordinator.propose(new_roster(others), "elm joins, birch lost its key")
        code, text, _ = run("roster", "fetch", "--json")
        found = json.loads(text)
        assert (code, found["version"], found["accepted"]) == (0, 2, False)
        assert found["changes"] == [
            "elm joins",
            "birch has another key",
            "the threshold changes from 3 to 4",
        ]
        assert joined.policy.roster is not None
        assert read_roster(joined.policy.roster) == first.roster
        code, _, errors = run("roster", "accept", "--fingerprint", first.roster.fingerprint)
        assert code == 1
        assert second.roster.fingerprint in errors
        assert read_roster(joined.policy.roster) == first.roster

    def test_versions_that_the_coordinator_did_not_sign_are_refused(
        self, run: Run, joined: SiteHome, coordinator: Coordinator, calls: Calls, tmp_path: Path
    ) -> None:
        stranger = SiteKey.create(tmp_path / "stranger.pem")
        roster = new_roster(sites(joined))
        coordinator.history = [next_version([], roster, "mine", stranger)]
        code, _, errors = run("roster", "fetch")
        assert code == 1
        assert "roster version 1" in errors
        assert "no roster was fetched yet" in run("roster", "accept", "--fingerprint", "0")[2]

    def test_another_past_than_before_is_refused(
        self, run: Run, joined: SiteHome, coordinator: Coordinator, calls: Calls
    ) -> None:
        """Well signed, but not what this site saw: somebody else may have seen the other one."""
        coordinator.propose(new_roster(sites(joined)))
        run("roster", "fetch")
        coordinator.history = []
        coordinator.propose(new_roster(sites(joined, elm="e" * 64)))
        coordinator.propose(new_roster(sites(joined)))
        code, _, errors = run("roster", "fetch")
        assert code == 1
        assert "another history of the roster than before" in errors
        coordinator.history = []
        assert run("roster", "fetch")[0] == 1

    def test_a_roster_with_another_key_of_this_site_is_not_accepted(
        self, run: Run, joined: SiteHome, coordinator: Coordinator, calls: Calls
    ) -> None:
        version = coordinator.propose(new_roster({**OTHERS, "alder": "a" * 64}))
        run("roster", "fetch")
        code, _, errors = run("roster", "accept", "--fingerprint", version.roster.fingerprint)
        assert code == 1
        assert f"alder: {joined.identity().public_key}" in errors
        assert joined.policy.roster is not None
        assert not joined.policy.roster.exists()

    def test_a_policy_without_a_roster_is_not_edited(
        self, run: Run, joined: SiteHome, coordinator: Coordinator, calls: Calls
    ) -> None:
        content = yaml.safe_load(joined.path.read_text())
        joined.path.write_text(yaml.safe_dump({**content, "roster": None}))
        before = joined.path.read_bytes()
        version = coordinator.propose(new_roster(sites(joined)))
        run("roster", "fetch")
        code, _, errors = run("roster", "accept", "--fingerprint", version.roster.fingerprint)
        assert code == 1
        assert "write the line `roster: roster.yaml`" in errors
        assert joined.path.read_bytes() == before

    def test_options_before_the_word_are_refused(self, home: SiteHome) -> None:
        """They would be read and forgotten."""
        with pytest.raises(SystemExit) as stop:
            main(["site", "roster", "--policy", str(home.path), "fetch"])
        assert stop.value.code == 2


class TestRenewAndLeave:
    def test_renew_replaces_the_certificate(self, run: Run, joined: SiteHome, calls: Calls) -> None:
        before = joined.membership.certificate
        code, text, errors = run("renew", "--json")
        assert (code, errors) == (0, "")
        after = joined.membership.certificate
        assert after.not_valid_after_utc > before.not_valid_after_utc
        assert json.loads(text) == {"certificate_until": f"{after.not_valid_after_utc:%Y-%m-%d}"}

    def test_leave_tells_the_coordinator_and_marks_the_site(
        self, run: Run, joined: SiteHome, calls: Calls
    ) -> None:
        assert run("leave", "--json")[0] == 2
        assert not calls.left
        code, text, _ = run("leave", "--yes")
        assert (code, calls.left, joined.membership.state) == (0, True, "left")
        assert "alder left hearts" in text
        code, _, errors = run("renew")
        assert code == 1
        assert "left the federation" in errors

    def test_leave_without_the_coordinator(self, run: Run, joined: SiteHome, calls: Calls) -> None:
        assert run("leave", "--yes", "--locally")[0] == 0
        assert (calls.left, joined.membership.state) == (False, "left")

    def test_a_leave_that_did_not_arrive_is_none(
        self, run: Run, joined: SiteHome, calls: Calls, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unreachable() -> None:
            raise ConnectionProblem("refused", "fl.example.org:8443 refuses connections: ask")

        monkeypatch.setattr(calls, "leave", unreachable)
        code, _, errors = run("leave", "--yes")
        assert (code, joined.membership.state) == (1, "joined")
        assert "refuses connections" in errors


class TestCoordinator:
    """What `jobs`, `test-connection` and `start` say of a coordinator."""

    def test_jobs_are_listed_with_the_answer_of_today(
        self, run: Run, joined: SiteHome, coordinator: Coordinator, calls: Calls
    ) -> None:
        (found,) = json.loads(run("jobs", "--json")[1])
        assert (found["name"], found["state"], found["refused"]) == ("heart", "running", ["roster"])
        first = coordinator.propose(new_roster(sites(joined)))
        run("roster", "fetch")
        run("roster", "accept", "--fingerprint", first.roster.fingerprint)
        assert "takes part" in run("jobs")[1]
        older, _ = json.loads(run("jobs", "--all", "--json")[1])
        assert (older["name"], older["refused"]) == ("older", ["job-name", "signature"])

    def test_a_coordinator_that_is_not_there_is_one_clear_error(
        self, run: Run, joined: SiteHome, coordinator: Coordinator
    ) -> None:
        kit = coordinator.answer(joined.membership.request_path, host="127.0.0.1", port=free_port())
        run("join", kit, "--fingerprint", StartupKit.read(kit).fingerprint)
        for command in (["test-connection"], ["renew"], ["roster", "fetch"], ["jobs"]):
            code, text, errors = run(*command)
            assert (code, text) == (1, "")
            assert "refuses connections" in errors
            assert errors.count("\n") == 1

    @pytest.mark.parametrize("command", ["start", "test-connection", "renew", "jobs"])
    def test_before_joining_each_says_how(self, run: Run, home: SiteHome, command: str) -> None:
        run("request")
        code, _, errors = run(command)
        assert code == 1
        assert "fedcmr site join KIT" in errors


class TestStatus:
    def status(self, run: Run) -> dict[str, Any]:
        code, text, errors = run("status", "--json")
        assert (code, errors) == (0, "")
        found: dict[str, Any] = json.loads(text)
        return found

    def test_before_between_and_after(
        self, run: Run, home: SiteHome, coordinator: Coordinator
    ) -> None:
        assert self.status(run)["membership"] == {"state": "absent", "problem": None}
        assert "fedcmr site request" in run("status")[1]
        run("request")
        assert self.status(run)["membership"]["state"] == "asked"
        kit = coordinator.answer(home.membership.request_path)
        run("join", kit, "--fingerprint", StartupKit.read(kit).fingerprint)
        member = self.status(run)["membership"]
        assert (member["state"], member["federation"]) == ("joined", "hearts")
        assert 364 < member["certificate_days"] <= 365
        text = run("status")[1]
        assert "heart-net at fl.example.org:8443" in text
        assert "does not run: fedcmr site start" in text

    def test_warns_of_a_certificate_that_expires_soon(
        self, run: Run, joined: SiteHome, coordinator: Coordinator
    ) -> None:
        soon = datetime.now(UTC) - timedelta(days=365 - 12)
        kit = coordinator.answer(joined.membership.request_path, now=soon)
        run("join", kit, "--fingerprint", StartupKit.read(kit).fingerprint)
        assert "in 12 days" in run("status")[1]

    def test_an_expired_certificate_is_a_problem_but_the_budget_still_shows(
        self, run: Run, joined: SiteHome, coordinator: Coordinator
    ) -> None:
        past = datetime.now(UTC) - timedelta(days=400)
        kit = StartupKit.read(coordinator.answer(joined.membership.request_path, now=past))
        joined.membership.certificate_path.write_text(kit.certificate)
        found = self.status(run)
        assert "expired on" in found["membership"]["problem"]
        assert "ask the coordinator for a new kit" in found["membership"]["problem"]
        assert found["budget"]["epsilon"] == 8.0

    def test_a_pause_shows_and_ends(self, run: Run, joined: SiteHome) -> None:
        assert self.status(run)["paused"] is None
        assert "end it with: fedcmr site resume" in run("pause", "--reason", "scanner upgrade")[1]
        assert self.status(run)["paused"]["reason"] == "scanner upgrade"
        assert "scanner upgrade" in run("status")[1]
        assert run("resume")[1] == "the site takes part again\n"
        assert run("resume")[1] == "the site was not paused\n"
        assert self.status(run)["paused"] is None

    def test_a_running_agent_and_its_newest_problem_show(self, run: Run, joined: SiteHome) -> None:
        report = Health(
            site="alder",
            process=1,
            at=datetime.now(UTC),
            connected=False,
            paused=None,
            certificate_days=300.0,
            problem=Problem("timed-out", "fl.example.org:8443 does not answer"),
            roster_news="version 2 waits to be accepted",
        )
        with only_agent(joined.run / agent_lock.FILE):
            assert ", starting" in run("status")[1]
            report.write(joined.run / site_health.FILE)
            agent = self.status(run)["agent"]
            assert agent["running"]
            assert agent["report"]["problem"]["code"] == "timed-out"
            text = " ".join(run("status")[1].split())
            assert "not connected" in text
            assert "does not answer" in text
            assert "version 2 waits to be accepted" in text
        assert not self.status(run)["agent"]["running"]

    def test_budget_alone(self, run: Run, home: SiteHome) -> None:
        found = json.loads(run("budget", "--json")[1])
        assert found["budget"] == self.status(run)["budget"]
        assert "the patient with the most charges" in run("budget")[1]


class TestSettings:
    def test_without_a_file_all_defaults_hold(self, tmp_path: Path) -> None:
        assert AgentSettings.load(tmp_path) == AgentSettings(log_folder=tmp_path / "logs")

    def test_a_written_file_explains_itself_and_reads_the_same(self, tmp_path: Path) -> None:
        settings = AgentSettings(proxy="http://proxy:3128", gpus=(0, 2), memory_gib=24.0)
        text = settings.text()
        (tmp_path / "agent.yaml").write_text(text)
        found = AgentSettings.load(tmp_path)
        assert found == settings.model_copy(update={"log_folder": tmp_path / "logs"})
        assert (found.gpus, found.worker_memory_mib) == ((0, 2), 24576)
        assert max(map(len, text.splitlines())) <= 100
        proxy = found.forward_proxy()
        assert proxy is not None
        assert proxy.address == "proxy:3128"

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"prox": "http://proxy:3128"}, "did you mean proxy"),
            ({"proxy": "http://me:secret@proxy:3128"}, "set FEDCMR_PROXY_PASSWORD"),
            ({"nice": 20}, "nice"),
            ({"workers": 0}, "workers"),
            ({"gpus": [-1]}, "gpus.0"),
            ({"health_port": 70000}, "health_port"),
            ({"log_folder": "~/logs"}, "write it in full"),
        ],
    )
    def test_a_wrong_setting_is_named(
        self, content: dict[str, object], message: str, tmp_path: Path
    ) -> None:
        (tmp_path / "agent.yaml").write_text(yaml.safe_dump(content))
        with pytest.raises(ConfigurationError) as refusal:
            AgentSettings.load(tmp_path)
        assert message in str(refusal.value)
        assert str(tmp_path / "agent.yaml") in str(refusal.value)
        assert "secret" not in str(refusal.value)
