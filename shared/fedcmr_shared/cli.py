"""The command `fedcmr`.

Subcommands come from entry points of the group ``fedcmr.commands``, so that the packages add
their commands without this module importing them. Exit codes: 0 done, 1 refused or failed,
2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.table import Table

from fedcmr_shared import __version__
from fedcmr_shared.errors import FedcmrError

# Flower reads these once, at import: no process that we start reports to its vendor.
FLOWER_SILENCE = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


class EntryPointGroup(click.Group):
    """A group whose subcommands are the entry points of ``entry_point_group``, loaded on use."""

    def __init__(self, *args: Any, entry_point_group: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._entry_points: dict[str, EntryPoint] = {
            point.name: point for point in entry_points(group=entry_point_group)
        }

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the group's own commands and of those added by entry points, sorted."""
        return sorted({*super().list_commands(ctx), *self._entry_points})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the named command, importing its package only now."""
        own = super().get_command(ctx, cmd_name)
        if own is not None or cmd_name not in self._entry_points:
            return own
        command = self._entry_points[cmd_name].load()
        if not isinstance(command, click.Command):
            raise TypeError(f"entry point {self._entry_points[cmd_name].value} is not a command")
        return command


json_option: Callable[[Callable[..., Any]], Callable[..., Any]] = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON for scripts instead of text."
)


def print_json(value: object) -> None:
    """Print ``value`` as indented JSON with sorted keys on standard output."""
    click.echo(json.dumps(value, indent=2, sort_keys=True, default=str))


def print_table(title: str, rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> None:
    """Print ``rows`` as a table with the given columns; absent and None cells show as a dash."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        table.add_column(column.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    # A pipe has no width: 120 columns keep listings readable in logs.
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


@click.group(
    cls=EntryPointGroup,
    entry_point_group="fedcmr.commands",
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(__version__, prog_name="fedcmr", message="%(prog)s %(version)s")
def cli() -> None:
    """Hospitals train cardiac-MRI models together; patient data never leaves the site."""


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@json_option
def completion(shell: str, as_json: bool) -> None:
    """Print the completion script of SHELL: eval "$(fedcmr completion bash)"."""
    from click.shell_completion import get_completion_class

    completer = get_completion_class(shell)
    if completer is None:
        raise FedcmrError(f"no completion script for {shell}: use bash, zsh or fish")
    script = completer(cli, {}, "fedcmr", "_FEDCMR_COMPLETE").source()
    if as_json:
        print_json({"shell": shell, "script": script})
    else:
        click.echo(script)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    os.environ.update(FLOWER_SILENCE)
    try:
        # Outside standalone mode click returns the code of `ctx.exit`, and else what the command
        # returned: ours return nothing.
        code = cli.main(args=arguments, prog_name="fedcmr", standalone_mode=False)
    except FedcmrError as error:
        _report(str(error), wants_json="--json" in (arguments or sys.argv))
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


def _report(message: str, *, wants_json: bool) -> None:
    if wants_json:
        print_json({"error": message})
    click.echo(f"error: {message}", err=True)
