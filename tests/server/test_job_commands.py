"""`fedcmr coordinator`: the commands about jobs, as an operator types them."""

from __future__ import annotations

import functools
import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from job_parties import JOB, add_roster, carry, model_state, new_home

from fedcmr_server import job_control
from fedcmr_server.commands.coordinator_jobs import JOB_COMMANDS
from fedcmr_server.home import CoordinatorHome
from fedcmr_server.job_events import event_text
from fedcmr_server.job_states import JobEvent
from fedcmr_server.store import Events, Jobs, Rounds, Store
from fedcmr_shared.cli import main
from fedcmr_shared.models.bundle import save_bundle, state_sha256
from fedcmr_shared.schemas.job_files import read_job


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> CoordinatorHome:
    return new_home(tmp_path_factory.mktemp("home") / "centre")


@pytest.fixture
def store(home: CoordinatorHome, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    for left in home.folder.glob("coordinator.sqlite*"):
        left.unlink()
    monkeypatch.setenv("FEDCMR_COORDINATOR", str(home.folder))
    with home.store() as store:
        add_roster(home, store)
        yield store


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(JOB.model_dump(mode="json")))
    return path


class Command:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["coordinator", *map(str, arguments)])
        output = self._capsys.readouterr()
        return stopped.value.code, output.out, output.err

    def json(self, *arguments: object) -> Any:
        code, out, err = self(*arguments, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    def refused(self, *arguments: object) -> str:
        code, out, err = self(*arguments)
        assert (code, out, err.count("\n")) == (1, "", 1)
        return err


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


def test_all_of_them_are_there(command: Command) -> None:
    names = [each.name for each in JOB_COMMANDS]
    assert names == ["new-job", "submit", "status", "watch", "pause", "resume", "cancel"]


class TestNewJob:
    def test_what_it_writes_can_be_submitted(
        self, command: Command, store: Store, tmp_path: Path
    ) -> None:
        code, out, _ = command("new-job", "--out", tmp_path / "job.yaml")
        assert code == 0
        assert "wrote" in out
        assert read_job(tmp_path / "job.yaml").coordinator == "centre"
        assert command("new-job")[1] == (tmp_path / "job.yaml").read_text()
        assert command.json("submit", tmp_path / "job.yaml")["state"] == "submitted"
        assert "exists: choose another" in command.refused(
            "new-job", "--out", tmp_path / "job.yaml"
        )
        assert "cannot be written" in command.refused("new-job", "--out", tmp_path / "no" / "job")
        assert "no template for 'lung'" in command.refused("new-job", "--kind", "lung")


class TestSubmit:
    def test_it_says_what_sites_must_allow(
        self, command: Command, store: Store, job_file: Path
    ) -> None:
        code, out, _ = command("submit", job_file, "--valid-days", "30")
        assert code == 0
        assert f"submitted heart as {JOB.sha256[:12]}, valid for 30 days" in out
        assert "max_epsilon_per_job" in out
        assert [row.id for row in Jobs(store).due()] == [JOB.sha256]

    def test_json(self, command: Command, store: Store, job_file: Path) -> None:
        found = command.json("submit", job_file)
        assert (found["id"], found["state"]) == (JOB.sha256, "submitted")
        assert found["policy"]["minimum_sites"] == "at most 3"

    def test_start_from(
        self, command: Command, store: Store, job_file: Path, tmp_path: Path
    ) -> None:
        save_bundle(tmp_path / "b", model_state(5), JOB.model, {})
        command.json("submit", job_file, "--start-from", tmp_path / "b")
        start = Rounds(store).latest(JOB.sha256)
        assert start is not None
        assert start.model_sha256 == state_sha256(model_state(5))

    def test_refusals(self, command: Command, store: Store, job_file: Path, tmp_path: Path) -> None:
        assert "no.yaml cannot be read" in command.refused("submit", tmp_path / "no.yaml")
        assert "b does not exist" in command.refused(
            "submit", job_file, "--start-from", tmp_path / "b"
        )
        job_file.write_text("name: heart\nrouns: 3\n")
        assert "rouns is unknown (did you mean rounds?)" in command.refused("submit", job_file)
        job_file.write_text("name: heart\n")
        assert "privacy is null" in command.refused("submit", job_file)
        job_file.write_text(yaml.safe_dump({**JOB.model_dump(mode="json"), "coordinator": "other"}))
        assert "coordinator is other" in command.refused("submit", job_file)
        for days in ("0", "366"):
            assert command("submit", job_file, "--valid-days", days)[0] == 2
        assert Jobs(store).all() == []


class TestChanges:
    def test_by_name_and_by_id(self, command: Command, store: Store, job_file: Path) -> None:
        command("submit", job_file)
        assert command.json("pause", "heart")["state"] == "paused"
        code, out, _ = command("resume", JOB.sha256[:6])
        assert code == 0
        assert "is running: it runs, or waits for its next run" in out
        assert "signed anew" not in out
        cancelled = command.json("cancel", "heart", "--reason", "a mistake")
        assert (cancelled["state"], cancelled["reason"]) == ("cancelled", "a mistake")
        for change in ("pause", "resume", "cancel"):
            assert "is cancelled takes no" in command.refused(change, "heart")
            assert "no job lung" in command.refused(change, "lung")

    def test_resume_says_what_is_new(
        self,
        command: Command,
        home: CoordinatorHome,
        store: Store,
        job_file: Path,
    ) -> None:
        command("submit", job_file, "--valid-days", "1")
        command("pause", "heart")
        add_roster(home, store)
        notes = command.json("resume", "heart", "--valid-days", "20")["notes"]
        assert notes[0] == "signed anew for 20 days"
        assert "the roster has changed" in notes[1]

    def test_a_name_that_means_two(
        self, command: Command, home: CoordinatorHome, store: Store
    ) -> None:
        for seed in (1, 2):
            job_control.submit(home, store, JOB.model_copy(update={"seed": seed}))
        assert "means several jobs: say which one" in command.refused("pause", "heart")


class TestStatus:
    def test_all_and_one(
        self, command: Command, home: CoordinatorHome, store: Store, job_file: Path
    ) -> None:
        assert command.json("status") == []
        command("submit", job_file)
        assert command.json("status")[0]["round"] == "0 of 2"
        carry(home, store, JOB.sha256, closed=(1,))
        (row,) = command.json("status")
        assert (row["name"], row["state"], row["round"]) == ("heart", "finished", "2 of 2")
        assert JOB.sha256[:12] in command("status")[1]
        _, out, _ = command("status", "heart")
        assert "round 1 closed without an update" in out
        assert "round 2 scored: PSNR 22.00 dB" in out
        events = command.json("status", "heart")["events"]
        assert [event["number"] for event in events] == list(range(1, len(events) + 1))


class TestWatch:
    @pytest.mark.parametrize(("end", "code"), [("finish", 0), ("fail", 1), ("cancel", 1)])
    def test_exit_code(
        self,
        end: JobEvent,
        code: int,
        command: Command,
        home: CoordinatorHome,
        store: Store,
        job_file: Path,
    ) -> None:
        command("submit", job_file)
        if end == "finish":
            carry(home, store, JOB.sha256)
        else:
            Jobs(store).change(JOB.sha256, end, reason="too few sites")
        found, out, err = command("watch", "heart")
        assert found == code
        assert "  submitted\n" in out
        assert ("too few sites" in err) == (code == 1)
        assert "\x1b" not in out
        lines = command("watch", "heart", "--json")[1].splitlines()
        assert [json.loads(line)["number"] for line in lines] == list(range(1, len(lines) + 1))

    def test_ctrl_c_leaves_the_job_alone(
        self,
        command: Command,
        store: Store,
        job_file: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        command("submit", job_file)

        def interrupted(_seconds: float) -> None:
            raise KeyboardInterrupt

        follow = functools.partial(job_control.follow, sleep=interrupted)
        monkeypatch.setattr(job_control, "follow", follow)
        code, out, err = command("watch", "heart")
        assert code == 130
        assert "submitted" in out
        assert "heart goes on without this view; fedcmr coordinator cancel" in err
        assert Jobs(store).get(JOB.sha256).state == "submitted"

    def test_in_a_terminal_and_a_real_ctrl_c(self, home: CoordinatorHome, store: Store) -> None:
        job = job_control.submit(home, store, JOB).id
        ours, theirs = pty.openpty()
        with subprocess.Popen(
            [sys.executable, "-m", "fedcmr_shared", "coordinator", "watch", job[:8]],
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.PIPE,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
        ) as process:
            os.close(theirs)
            shown = b""
            while b"it waits for its first run" not in shown:
                assert select.select([ours], [], [], 120)[0], shown
                shown += os.read(ours, 65536)
            process.send_signal(signal.SIGINT)
            _read_to_end(ours)
            assert process.stderr is not None
            assert b"goes on without this view" in process.stderr.read()
            assert process.wait(60) == 130
        os.close(ours)
        assert b"\x1b[" in shown
        assert b"0/2" in shown


class TestEventTexts:
    def test_every_event_of_a_whole_job_has_words(
        self, home: CoordinatorHome, store: Store
    ) -> None:
        job = job_control.submit(home, store, JOB).id
        carry(home, store, job)
        for event in Events(store).of(job):
            text = event_text(event.name, event.content)
            assert text


def _read_to_end(descriptor: int) -> None:
    while True:
        try:
            if not os.read(descriptor, 65536):
                return
        except OSError:  # how Linux says that nobody writes any more
            return
