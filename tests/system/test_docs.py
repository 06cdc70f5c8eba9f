"""What the documents show is true: commands parse, files exist, configurations validate."""

import copy
import re
import shlex
from pathlib import Path

import click
import pytest
import yaml

from fedcmr_shared.cli import cli
from fedcmr_shared.identity.roster import Roster
from fedcmr_shared.schemas import SitePolicy
from fedcmr_simulations.config import SimulationConfig

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "deploy" / "README.md"])
BEGIN = re.compile(r"(?:^(?:\$ )?|\$\(|\b(?:until|do) |\| )\s*(?=fedcmr )")
END = re.compile(r" (?:#|\d?>|\||&)|; |\)$")
"""What begins and ends a command, for its reader's shell."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The names by which GitHub links to the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"(?m)^#+ (.+)$", text)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def shown_commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        text = page.read_text()
        lines = "\n".join([*blocks(page, "console"), *blocks(page, "bash")])
        inline = re.findall(r"`(fedcmr [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        for line in [*lines.replace("\\\n", " ").splitlines(), *inline]:
            for start in BEGIN.finditer(line):
                command = END.split(line[start.end() :])[0]
                found.append((page.name, " ".join(command.split())))
    return sorted(set(found))


def parse(arguments: list[str], group: click.Group, path: str) -> None:
    """Walk to the named command and let click check its arguments, without running it."""
    name, *rest = arguments
    context = click.Context(group, info_name=path)
    command = group.get_command(context, name)
    assert command is not None, f"{path} has no command {name}"
    if isinstance(command, click.Group):
        if rest:
            parse(rest, command, f"{path} {name}")
        return
    # A copy: the commands are global, and other tests run them.
    command = copy.copy(command)
    command.params = [copy.copy(parameter) for parameter in command.params]
    for parameter in command.params:
        # Documents name files that only their reader has.
        if isinstance(parameter.type, click.Path | click.File):
            parameter.type = click.STRING
    command.make_context(name, rest, parent=context, resilient_parsing=not rest)


@pytest.mark.parametrize(("page", "command"), shown_commands())
def test_shown_command_is_valid(page: str, command: str) -> None:
    arguments = shlex.split(command)[1:]
    if arguments[0].startswith("-"):
        assert arguments in (["--version"], ["--help"])
        return
    parse(arguments, cli, "fedcmr")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_configurations_validate(page: Path) -> None:
    special = {"sites/policy.md": SitePolicy, "sites/secure-aggregation.md": Roster}
    model = special.get(f"{page.parent.name}/{page.name}", SimulationConfig)
    for block in blocks(page, "yaml"):
        model.model_validate(yaml.safe_load(block))


def test_named_source_files_exist() -> None:
    for page in PAGES:
        names = re.findall(
            r"`((?:shared|client|server|simulations|benchmarks)/[^`\s*]+)`", page.read_text()
        )
        for name in names:
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_documents_show_commands_at_all() -> None:
    assert len(shown_commands()) > 5
