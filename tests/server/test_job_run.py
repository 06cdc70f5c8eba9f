"""Stored runs: what is committed counts, nothing else does, and nobody but the carrier writes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from databases import NewDatabase
from plain_federation import JOB, TRAINABLE, MemoryLink, adds
from secure_federation import Place, ProtocolLink, federation
from sqlalchemy import update

from fedcmr_server.app import carry_job
from fedcmr_server.checkpoint_files import Checkpoint, CheckpointFiles
from fedcmr_server.job_run import StoredRun
from fedcmr_server.job_states import TransitionRefused
from fedcmr_server.links import SitesMissing
from fedcmr_server.rounds import initial_state, run_job
from fedcmr_server.run_folder import RunFolder
from fedcmr_server.store import Events, Jobs, Rounds, Store, StoreUnreachable, open_store
from fedcmr_server.store.jobs import JobStart
from fedcmr_server.store.tables import JobRow
from fedcmr_shared.errors import FederationError, ModelError
from fedcmr_shared.federation.messages import Refusal, Task
from fedcmr_shared.identity.roster import Roster
from fedcmr_shared.models.bundle import state_sha256
from fedcmr_shared.schemas.job import JobSpec, TrainingSpec

SECURE = JobSpec(rounds=2, model=JOB.model, training=TrainingSpec(part="prompts"))
AMOUNTS = {"alder": 0.1, "birch": 0.2, "cedar": 0.4, "dogwood": 0.8}


class Stop(BaseException):
    """The coordinator is killed."""


class Coordinator:
    """A database, a folder for jobs, and numbered runs of one job."""

    def __init__(self, store: Store, folder: Path, job: JobSpec, roster: Roster | None) -> None:
        self.store, self.folder, self.job = store, folder, job.sha256
        Jobs(store).submit(job, None, roster)
        self.runs = 0

    def next_run(self) -> StoredRun:
        self.runs += 1
        return StoredRun(self.store, self.folder, self.job, f"run-{self.runs}")

    def row(self) -> JobRow:
        return Jobs(self.store).get(self.job)

    def lose(self) -> None:
        Jobs(self.store).change(self.job, "run_lost", run=f"run-{self.runs}")

    def events(self, *names: str) -> list[dict[str, Any]]:
        found = Events(self.store).as_values(self.job)
        return [event for event in found if event["event"] in names]

    def standing(self) -> tuple[str, str | None, int, str | None]:
        row = self.row()
        return row.state, row.run, row.losses, row.reason


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(f"sqlite:///{tmp_path}/coordinator.sqlite") as store:
        yield store


@pytest.fixture
def plain(store: Store, tmp_path: Path) -> Coordinator:
    return Coordinator(store, tmp_path / "jobs", JOB, None)


def two_sites() -> MemoryLink:
    return MemoryLink({"a": adds(1.0), "b": adds(6.0)})


def secure_coordinator(store: Store, tmp_path: Path, link: ProtocolLink) -> Coordinator:
    return Coordinator(store, tmp_path / "jobs", SECURE, link.sites[0].roster)


def test_a_job_runs_to_its_end_as_in_a_folder(new_database: NewDatabase, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", JOB)
    expected = run_job(two_sites(), folder)
    with open_store(new_database()) as store:
        plain = Coordinator(store, tmp_path / "jobs", JOB, None)
        run = plain.next_run()
        carry_job(two_sites(), run)
        assert plain.standing() == ("finished", None, 0, None)
        latest = run.latest()
        assert latest is not None
        assert latest.round == JOB.rounds
        assert state_sha256(latest.state) == state_sha256(expected.state)
        rows = Rounds(store).of(plain.job)
        assert [(row.number, row.state) for row in rows] == [
            (0, "committed"),
            (1, "committed"),
            (2, "committed"),
        ]

        def without_seconds(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return [{k: v for k, v in event.items() if k != "seconds"} for event in events]

        found = plain.events("round", "evaluation")
        assert without_seconds(found) == without_seconds(folder.events())


def test_in_the_open_only_sites_of_the_job_s_roster_count(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = {"a": adds(1.0), "b": adds(6.0), "c": adds(2.0)}
    keys = {name: name * 64 for name in names}
    job = JOB.model_copy(update={"minimum_sites": 3})
    answers = {**names, "e": adds(900.0), "f": lambda name, *_: Refusal(name, "paused")}
    listed = Coordinator(store, tmp_path / "jobs", job, Roster.model_validate({"sites": keys}))
    run = listed.next_run()
    carry_job(MemoryLink(answers), run)
    folder = RunFolder.create(tmp_path / "run", job)
    expected = run_job(MemoryLink(names), folder)
    latest = run.latest()
    assert latest is not None
    assert state_sha256(latest.state) == state_sha256(expected.state)
    assert [event["sites"] for event in listed.events("round", "evaluation")] == [3] * 4
    assert "node 3 answers as 'e': not a site of the job" in caplog.text
    assert "refused by f" not in caplog.text
    # A simulation has all that come, so the stranger would have moved the model.
    strangers = run_job(MemoryLink(answers), RunFolder.create(tmp_path / "open", job))
    assert state_sha256(strangers.state) != state_sha256(expected.state)


def test_strangers_do_not_make_up_for_missing_sites(store: Store, tmp_path: Path) -> None:
    job = JOB.model_copy(update={"minimum_sites": 3})
    roster = Roster.model_validate({"sites": {name: name * 64 for name in "abc"}})
    listed = Coordinator(store, tmp_path / "jobs", job, roster)
    link = MemoryLink({name: adds(1.0) for name in "abe"})
    with pytest.raises(SitesMissing, match="2 of at least 3 sites"):
        carry_job(link, listed.next_run())


def test_a_job_starts_from_given_weights(store: Store, tmp_path: Path) -> None:
    job = JOB.model_copy(update={"rounds": 1})
    start = {name: value + 1 for name, value in initial_state(job).items()}
    CheckpointFiles(tmp_path / job.sha256).save(Checkpoint(0, start, {}), job.model)
    given = JobStart(state_sha256(start), state_sha256({}), {})
    Jobs(store).submit(job, None, None, start=given)
    run = StoredRun(store, tmp_path, job.sha256, "run-1")
    carry_job(two_sites(), run)
    latest = run.latest()
    assert latest is not None
    for name in TRAINABLE:
        torch.testing.assert_close(latest.state[name], start[name] + 2.0)


def test_a_lost_round_is_done_again_from_the_model_before(plain: Coordinator) -> None:
    def dies_in_round_2(name: str, action: str, task: Task) -> Any:
        if task.round == 2:
            raise Stop
        return adds(6.0)(name, action, task)

    with pytest.raises(Stop):
        carry_job(MemoryLink({"a": adds(1.0), "b": dies_in_round_2}), plain.next_run())
    assert Rounds(plain.store).of(plain.job)[-1].state == "started"
    plain.lose()
    link = two_sites()
    carry_job(link, plain.next_run())
    assert link.asked == [("train", 2), ("evaluate", 2)]
    assert plain.row().state == "finished"


def test_a_round_that_was_not_evaluated_is_evaluated_first(plain: Coordinator) -> None:
    def dies_in_evaluation(name: str, action: str, task: Task) -> Any:
        if action == "evaluate":
            raise Stop
        return adds(6.0)(name, action, task)

    with pytest.raises(Stop):
        carry_job(MemoryLink({"a": adds(1.0), "b": dies_in_evaluation}), plain.next_run())
    plain.lose()
    link = two_sites()
    carry_job(link, plain.next_run())
    assert link.asked == [("evaluate", 1), ("train", 2), ("evaluate", 2)]
    assert [event["round"] for event in plain.events("evaluation")] == [1, 2]


class TestFiles:
    """Only what the database committed is believed, and it must be there unchanged."""

    @pytest.fixture
    def done(self, plain: Coordinator) -> StoredRun:
        run = plain.next_run()
        carry_job(two_sites(), run)
        return run

    def test_files_of_a_round_that_is_no_row_are_nothing(self, done: StoredRun) -> None:
        files = CheckpointFiles(done.folder)
        last = files.load(2)
        files.save(Checkpoint(3, last.state, last.optimiser), JOB.model)
        latest = done.latest()
        assert latest is not None
        assert latest.round == 2
        # Positive control: a run folder, which has no rows, believes them.
        assert files.newest() == 3

    @pytest.mark.parametrize("what", ["model", "server optimiser"])
    def test_other_files_than_the_committed_ones_are_refused(
        self, done: StoredRun, what: str
    ) -> None:
        last = CheckpointFiles(done.folder).load(2)
        state = {name: value + (what == "model") for name, value in last.state.items()}
        optimiser = {**last.optimiser} if what == "model" else {"x": torch.ones(1)}
        CheckpointFiles(done.folder).save(Checkpoint(2, state, optimiser), JOB.model)
        with pytest.raises(ModelError, match=f"the {what} has SHA-256 .* was committed: restore"):
            done.latest()

    def test_missing_and_exchanged_files_are_named(self, done: StoredRun) -> None:
        files = CheckpointFiles(done.folder)
        optimiser = files.path(2).with_suffix(".optimiser.safetensors")
        optimiser.unlink()
        with pytest.raises(ModelError, match=r"optimiser\.safetensors cannot be read"):
            done.latest()
        files.path(2).write_bytes(files.path(1).read_bytes())
        with pytest.raises(ModelError, match="is not the bundle of round 2"):
            done.latest()
        files.path(2).unlink()
        with pytest.raises(ModelError, match="does not exist"):
            done.latest()

    def test_a_job_that_was_changed_in_the_database_is_refused(self, plain: Coordinator) -> None:
        other = JOB.model_copy(update={"rounds": 7}).model_dump_json()
        self.rewrite(plain.store, other)
        with pytest.raises(FederationError, match="changed in the database: restore it"):
            _ = plain.next_run().job
        self.rewrite(plain.store, "{")
        with pytest.raises(FederationError, match="cannot be read from the database"):
            _ = plain.next_run().job

    def rewrite(self, store: Store, spec: str) -> None:
        with store.writing() as session:
            session.execute(update(JobRow).values(spec=spec))

    def test_a_plain_job_has_no_roster(self, plain: Coordinator) -> None:
        with pytest.raises(FederationError, match="has no roster"):
            _ = plain.next_run().roster

    def test_a_folder_that_cannot_be_made_fails_the_job(
        self, plain: Coordinator, tmp_path: Path
    ) -> None:
        (tmp_path / "jobs").write_text("a file")
        with pytest.raises(ModelError, match="cannot write"):
            carry_job(two_sites(), plain.next_run())
        assert plain.row().state == "failed"


class TestEndings:
    def in_round_1(self, deed: Callable[[], object]) -> MemoryLink:
        """Return a link to two sites of which one does something while it trains in round 1."""

        def acts(name: str, action: str, task: Task) -> Any:
            if (action, task.round) == ("train", 1):
                deed()
            return adds(6.0)(name, action, task)

        return MemoryLink({"a": adds(1.0), "b": acts})

    def test_too_few_sites_lose_the_run_and_not_the_job(self, plain: Coordinator) -> None:
        with pytest.raises(SitesMissing):
            carry_job(MemoryLink({"a": adds(1.0), "b": lambda *_: None}), plain.next_run())
        state, run, losses, reason = plain.standing()
        assert (state, run, losses) == ("running", None, 1)
        assert reason is not None
        assert "1 of at least 2 sites answered `train`" in reason
        carry_job(two_sites(), plain.next_run())
        assert plain.standing() == ("finished", None, 0, None)

    def test_a_wrong_answer_fails_the_job_until_it_is_resumed(self, plain: Coordinator) -> None:
        link = MemoryLink({"a": adds(1.0), "b": lambda _, *rest: adds(1.0)("a", *rest)})
        with pytest.raises(FederationError, match="two nodes answered"):
            carry_job(link, plain.next_run())
        assert plain.standing() == ("failed", None, 0, "two nodes answered as site a")
        with pytest.raises(TransitionRefused, match="a job that is failed takes no `start`"):
            carry_job(two_sites(), plain.next_run())
        Jobs(plain.store).change(plain.job, "resume")
        carry_job(two_sites(), plain.next_run())
        assert plain.row().state == "finished"

    def test_a_database_that_stays_away_loses_the_run(
        self, plain: Coordinator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unreachable(*_: object, **__: object) -> None:
            raise StoreUnreachable("away")

        monkeypatch.setattr(Rounds, "commit", unreachable)
        with pytest.raises(StoreUnreachable):
            carry_job(two_sites(), plain.next_run())
        assert plain.standing() == ("running", "run-1", 0, None)

    def test_a_pause_waits_for_the_round_and_resumes_after_it(self, plain: Coordinator) -> None:
        jobs = Jobs(plain.store)
        carry_job(self.in_round_1(lambda: jobs.change(plain.job, "pause")), plain.next_run())
        assert plain.standing() == ("paused", None, 0, None)
        assert [event["round"] for event in plain.events("evaluation")] == [1]
        jobs.change(plain.job, "resume")
        link = two_sites()
        carry_job(link, plain.next_run())
        assert link.asked == [("train", 2), ("evaluate", 2)]
        assert plain.row().state == "finished"

    def test_a_pause_in_the_last_round_comes_too_late(self, store: Store, tmp_path: Path) -> None:
        job = JOB.model_copy(update={"rounds": 1})
        once = Coordinator(store, tmp_path / "jobs", job, None)
        pause = self.in_round_1(lambda: Jobs(store).change(once.job, "pause"))
        carry_job(pause, once.next_run())
        assert once.row().state == "finished"

    def test_a_cancelled_job_commits_nothing_more(self, plain: Coordinator) -> None:
        cancel = self.in_round_1(lambda: Jobs(plain.store).change(plain.job, "cancel"))
        with pytest.raises(TransitionRefused, match="the job is cancelled"):
            carry_job(cancel, plain.next_run())
        assert plain.row().state == "cancelled"
        assert [row.state for row in Rounds(plain.store).of(plain.job)] == ["committed", "started"]

    def test_a_run_that_was_replaced_commits_nothing_more(self, plain: Coordinator) -> None:
        def replace() -> None:
            plain.lose()
            carry_job(two_sites(), plain.next_run())

        with pytest.raises(TransitionRefused, match="run run-1 does not carry"):
            carry_job(self.in_round_1(replace), plain.next_run())
        assert plain.row().state == "finished"
        hashes = {row.number: row.model_sha256 for row in Rounds(plain.store).of(plain.job)}
        assert [e["model_sha256"] for e in plain.events("round")] == [hashes[1], hashes[2]]

    def test_a_second_run_is_refused_and_changes_nothing(self, plain: Coordinator) -> None:
        Jobs(plain.store).change(plain.job, "start", run="other")
        link = two_sites()
        with pytest.raises(TransitionRefused, match="carried by run other, not by run-1"):
            carry_job(link, plain.next_run())
        assert link.asked == []
        assert plain.standing() == ("running", "other", 0, None)


class TestSecureSums:
    """The guarantees of one opening a round, with events in the database."""

    def test_a_run_lost_before_shares_has_stored_results_sent_again(
        self, store: Store, tmp_path: Path
    ) -> None:
        link = federation(AMOUNTS)
        link.changed[Place("cedar", "train.update")] = stop
        secure = secure_coordinator(store, tmp_path, link)
        with pytest.raises(Stop):
            carry_job(link, secure.next_run())
        secure.lose()
        carry_job(link, secure.next_run())
        first = [e for e in secure.events("attempt_started") if e["phase"] == "train"]
        assert [(e["round"], e["attempt"]) for e in first] == [(1, 1), (1, 2), (2, 1)]
        assert {site.trained for site in link.sites} == {2}
        assert [event["closed"] for event in secure.events("round")] == [False, False]

    def test_a_run_lost_after_it_asked_for_shares_closes_the_round(
        self, store: Store, tmp_path: Path
    ) -> None:
        link = federation(AMOUNTS)
        link.changed[Place("cedar", "train.unmask")] = stop
        secure = secure_coordinator(store, tmp_path, link)
        with pytest.raises(Stop):
            carry_job(link, secure.next_run())
        secure.lose()
        carry_job(link, secure.next_run())
        assert [row.state for row in Rounds(store).of(secure.job)] == [
            "committed",
            "closed",
            "committed",
        ]
        assert secure.row().state == "finished"

    def test_a_run_that_was_replaced_asks_for_no_shares(self, store: Store, tmp_path: Path) -> None:
        link = federation(AMOUNTS)
        secure = secure_coordinator(store, tmp_path, link)

        def replace(content: Any) -> Any:
            link.changed.clear()
            secure.lose()
            carry_job(link, secure.next_run())
            return content

        link.changed[Place("cedar", "train.consistency")] = replace
        with pytest.raises(TransitionRefused, match="run run-1 does not carry"):
            carry_job(link, secure.next_run())
        opened = [e["attempt"] for e in secure.events("unmask_asked") if e["phase"] == "train"]
        assert opened == [2, 1]
        for site in link.sites:
            sessions = [s for s in site.answers if (s.phase, s.round) == ("train", 1)]
            assert [session.attempt for session in sessions] == [2]

    def test_strangers_among_the_nodes_are_lost_and_the_sum_is_opened(
        self, store: Store, tmp_path: Path
    ) -> None:
        link = federation(AMOUNTS)
        stranger = federation({"elm": 0.5, "fir": 0.5, "gum": 0.5}).sites[0]
        link.sites = [*link.sites, stranger]
        secure = secure_coordinator(store, tmp_path, link)
        carry_job(link, secure.next_run())
        event = secure.events("attempt")[0]
        assert event["survivors"] == sorted(AMOUNTS)
        assert secure.row().state == "finished"


def stop(_: object) -> Any:
    raise Stop
