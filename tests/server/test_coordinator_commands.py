"""`fedcmr coordinator`: what an operator types, and what comes back."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from coordinator_parties import Party

from fedcmr_server import log_files
from fedcmr_server.commands.coordinator import coordinator
from fedcmr_server.home import CoordinatorHome
from fedcmr_shared.errors import ConfigurationError, FedcmrError
from fedcmr_shared.identity.enrolment import StartupKit, file_text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "c"
    run("init", made, "--federation", "heart", "--host", "heart.example")
    return made


def run(*words: object, input_: str | None = None) -> Result:
    result = CliRunner().invoke(coordinator, list(map(str, words)), input=input_)
    if isinstance(result.exception, FedcmrError):
        raise result.exception
    return result


def run_json(*words: object) -> Any:
    result = run(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def requested(party: Party) -> Path:
    path = party.folder / "request.json"
    path.write_text(file_text(party.request))
    return path


def enrol(folder: Path, party: Party, *words: object) -> Any:
    kit = party.folder.parent / f"{party.folder.name}.kit.json"
    return run_json(
        *("enrol", requested(party), "--kit", kit, "--coordinator", folder),
        *("--fingerprint", party.request.fingerprint, *words),
    )


def test_init_prints_the_fingerprint_that_every_kit_has(tmp_path: Path) -> None:
    made = run_json("init", tmp_path / "c", "--federation", "heart", "--host", "10.0.0.7")
    assert made["fingerprint"] == CoordinatorHome.open(tmp_path / "c").fingerprint
    assert made["address"] == "https://10.0.0.7:8443"
    enrolled = enrol(tmp_path / "c", Party.make(tmp_path / "alder", "alder"))
    assert enrolled["fingerprint"] == made["fingerprint"]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--port", "0"), "port"),
        (("--host", "no host"), "host"),
        (("--listen", "nowhere"), "listen"),
        (("--database-url", "postgresql+psycopg://me:secret@db/x"), "password"),
    ],
)
def test_init_refuses_what_cannot_work_and_makes_nothing(
    tmp_path: Path, words: tuple[str, str], problem: str
) -> None:
    common = ("--federation", "heart", "--host", "heart.example")
    with pytest.raises(ConfigurationError, match=problem):
        run("init", tmp_path / "c", *common, *words)
    assert not (tmp_path / "c").exists()


def test_enrol_shows_the_fingerprint_and_asks(folder: Path, tmp_path: Path) -> None:
    alder = Party.make(tmp_path / "alder", "alder")
    kit = tmp_path / "kit.json"
    words = ("enrol", requested(alder), "--kit", kit, "--coordinator", folder)
    refused = run(*words, input_="n\n")
    assert refused.exit_code == 1
    assert alder.request.fingerprint in refused.output
    assert not kit.exists()
    assert run_json("members", "--coordinator", folder) == []
    taken = run(*words, input_="y\n")
    assert taken.exit_code == 0
    assert StartupKit.read(kit).member.name == "alder"
    assert StartupKit.read(kit).fingerprint in taken.output


def test_enrol_takes_a_fingerprint_in_any_spelling_and_no_other_one(
    folder: Path, tmp_path: Path
) -> None:
    alder, birch = (Party.make(tmp_path / name, name) for name in ("alder", "birch"))
    words = ("enrol", requested(alder), "--kit", tmp_path / "kit", "--coordinator", folder)
    with pytest.raises(ConfigurationError, match="another fingerprint"):
        run(*words, "--fingerprint", birch.request.fingerprint)
    with pytest.raises(ConfigurationError, match="nobody compared"):
        run(*words, "--json")
    spelt = alder.request.fingerprint.replace(" ", "").upper()
    assert run(*words, "--fingerprint", spelt).exit_code == 0


def test_enrol_overwrites_no_file_and_then_enrols_nobody(folder: Path, tmp_path: Path) -> None:
    alder = Party.make(tmp_path / "alder", "alder")
    (tmp_path / "alder.kit.json").write_text("something else")
    with pytest.raises(ConfigurationError, match="choose with --kit"):
        enrol(folder, alder)
    assert run_json("members", "--coordinator", folder) == []


def test_an_altered_request_is_refused(folder: Path, tmp_path: Path) -> None:
    alder = Party.make(tmp_path / "alder", "alder")
    path = requested(alder)
    path.write_text(path.read_text().replace('"alder"', '"adler"'))
    with pytest.raises(ConfigurationError, match="ask for the file again"):
        run("enrol", path, "--coordinator", folder, "--json")


def test_a_federation_s_life(folder: Path, tmp_path: Path) -> None:
    parties = [Party.make(tmp_path / name, name) for name in ("alder", "birch", "cedar", "dogwood")]
    rosters = [enrol(folder, party)["roster"] for party in parties]
    assert rosters[:2] == [None, None]
    assert rosters[3]["reason"] == "dogwood joins"
    again = Party.make(tmp_path / "new", "cedar")
    replaced = enrol(folder, again, "--replace", "a new server")
    assert replaced["roster"]["reason"] == "cedar has another key: a new server"
    ended = run_json("revoke", "alder", "--reason", "a test", "--coordinator", folder)
    assert ended["roster"]["reason"] == "alder leaves: a test"
    left = run_json("leave", "birch", "--coordinator", folder)
    assert left["roster"] is None, "two sites are no roster"
    rows = run_json("members", "--coordinator", folder)
    assert {(row["name"], row["state"]) for row in rows} == {
        ("alder", "revoked"),
        ("birch", "left"),
        ("cedar", "revoked"),
        ("cedar", "active"),
        ("dogwood", "active"),
    }
    shown = run_json("roster", "show", "--coordinator", folder)
    assert [each["number"] for each in shown] == [1, 2, 3, 4]
    text = run("roster", "show", "--coordinator", folder).output
    assert shown[-1]["fingerprint"] in text
    table = run("members", "--coordinator", folder).output
    assert "dogwood" in table
    assert "revoked" in table


def test_a_roster_without_a_change_is_not_proposed(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match="fewer than three"):
        run("roster", "propose", "--reason", "why not", "--coordinator", folder)


def test_unknown_members_cannot_be_thrown_out(folder: Path) -> None:
    with pytest.raises(FedcmrError, match="no active member is called nobody"):
        run("revoke", "nobody", "--reason", "a test", "--coordinator", folder)


def test_a_token_is_a_link(folder: Path) -> None:
    made = run_json("token", "--label", "the board", "--coordinator", folder)
    assert made["link"].startswith("https://heart.example:8443/login?token=")


def test_commands_about_jobs_are_there() -> None:
    wanted = {"new-job", "submit", "status", "watch", "pause", "resume", "cancel"}
    assert wanted <= set(coordinator.commands)


def test_every_command_says_how_to_make_a_folder(tmp_path: Path) -> None:
    for words in (("start",), ("members",), ("roster", "show"), ("token", "--label", "x")):
        with pytest.raises(ConfigurationError, match="fedcmr coordinator init"):
            run(*words, "--coordinator", tmp_path)


@pytest.fixture
def loggers() -> Iterator[None]:
    """Take handlers away again."""
    touched = [logging.getLogger(name) for name in ("", *log_files.FILES.values())]
    before = [(each, list(each.handlers), each.propagate, each.level) for each in touched]
    yield
    for logger, handlers, propagate, level in before:
        for handler in set(logger.handlers) - set(handlers):
            logger.removeHandler(handler)
            handler.close()
        logger.propagate, logger.level = propagate, level


@pytest.mark.usefixtures("loggers")
def test_logs_are_json_lines_in_small_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_files, "_FILE_BYTES", 1000)
    log_files.log_to_files(tmp_path, kept=2)
    for number in range(50):
        logging.getLogger("fedcmr.supervisor").warning("line\n%d", number)
    logging.getLogger("fedcmr.gateway").info("GET /", extra={"fields": {"status": 200}})
    logging.getLogger("a.library").warning("careful")
    assert {path.name for path in tmp_path.glob("coordinator.log*")} == {
        "coordinator.log",
        "coordinator.log.1",
        "coordinator.log.2",
    }
    lines = [json.loads(line) for line in (tmp_path / "coordinator.log").read_text().splitlines()]
    assert lines[-1]["text"] == "careful"
    assert lines[-2]["text"] == "line\n49"
    (line,) = (tmp_path / "gateway.log").read_text().splitlines()
    assert json.loads(line)["status"] == 200
