"""The Flower app holds no code, and what it names is in the installed packages."""

import importlib
import tomllib
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedcmr_shared import __version__

APP = Path(__file__).parents[2] / "deploy" / "flower-app"
PROJECT = tomllib.loads((APP / "pyproject.toml").read_text())


# typer calls what click 8.4 deprecates, pathspec what it renamed: both inside flwr's own command
# line, which builds the bundle.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:typer")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:pathspec")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:click")
def test_bundle_holds_the_project_file_alone() -> None:
    from flwr.cli.build import build_fab_from_disk

    bundle = zipfile.ZipFile(BytesIO(build_fab_from_disk(APP)))
    assert sorted(bundle.namelist()) == [".info/CONTENT", "pyproject.toml"]


@pytest.mark.parametrize(("key", "kind"), [("serverapp", ServerApp), ("clientapp", ClientApp)])
def test_components_are_in_the_installed_packages(key: str, kind: type) -> None:
    module, _, name = PROJECT["tool"]["flwr"]["app"]["components"][key].partition(":")
    assert isinstance(getattr(importlib.import_module(module), name), kind)


def test_app_has_the_version_of_the_package_and_no_dependency_but_flwr() -> None:
    assert PROJECT["project"]["version"] == __version__
    assert [name.split("==")[0] for name in PROJECT["project"]["dependencies"]] == ["flwr"]
