"""The root command: exit codes, discovery of commands, silence towards vendors."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest

from fedcmr_shared import __version__
from fedcmr_shared.cli import FLOWER_SILENCE, EntryPointGroup, cli, main

GROUPS = {"data", "models", "schema", "simulate", "completion"}


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return int(stop.value.code or 0)


def leaf_commands(
    group: click.Group, path: tuple[str, ...] = ()
) -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from leaf_commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"fedcmr {__version__}\n"


def test_every_package_adds_its_group() -> None:
    assert set(cli.list_commands(click.Context(cli))) >= GROUPS


def test_every_command_takes_json_and_says_what_it_does() -> None:
    commands = dict(leaf_commands(cli))
    assert {"data import", "models reconstruct", "simulate run"} <= set(commands)
    for name, command in commands.items():
        options = {option for parameter in command.params for option in parameter.opts}
        assert "--json" in options, name
        assert command.help, name


def test_exit_code_of_a_command_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    @click.pass_context
    def stops(context: click.Context) -> None:
        context.exit(3)

    monkeypatch.setitem(cli.commands, "stops", stops)
    assert exit_code("stops") == 3


def test_wrong_usage_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("simulate", "run", "--sites", "0") == 2
    assert "--sites" in capsys.readouterr().err
    assert exit_code("no-such-group") == 2


def test_refusal_is_exit_code_1_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("models", "show", "nosuchmodel", "--size", "tiny") == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1


def test_refusal_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("models", "show", "nosuchmodel", "--size", "tiny", "--json") == 1
    assert "nosuchmodel" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("completion", shell) == 0
    assert "_FEDCMR_COMPLETE" in capsys.readouterr().out


def test_processes_are_silent_towards_vendors(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FLOWER_SILENCE:
        monkeypatch.delenv(name, raising=False)
    exit_code("--version")
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0"
    assert os.environ["FLWR_DISABLE_UPDATE_CHECK"] == "1"


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\nfrom fedcmr_shared.cli import main\n"
        "try: main(['simulate', '--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'flwr', 'h5py', 'sqlalchemy', 'ray'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"


def test_an_entry_point_that_is_no_command_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    group = EntryPointGroup("x", entry_point_group="fedcmr.commands")
    point = next(iter(group._entry_points.values()))
    wrong = type(point)(name="wrong", value="json:dumps", group="fedcmr.commands")
    monkeypatch.setitem(group._entry_points, "wrong", wrong)
    with pytest.raises(TypeError, match="not a command"):
        group.get_command(click.Context(group), "wrong")
