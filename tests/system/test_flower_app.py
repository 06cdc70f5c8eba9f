"""The Flower app holds no code, and what it names is in the installed packages."""

import importlib
import tomllib
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
from flwr.clientapp import ClientApp
from flwr.common.config import get_fab_config, get_metadata_from_config
from flwr.serverapp import ServerApp

from fedcmr_shared import __version__
from fedcmr_shared.federation.flower_app import app_bundle

APP = Path(__file__).parents[2] / "deploy" / "flower-app"
PROJECT = tomllib.loads((APP / "pyproject.toml").read_text())


# typer calls what click 8.4 deprecates, pathspec what it renamed: both inside flwr's own command
# line, which builds the bundle.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:typer")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:pathspec")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:click")
def test_bundle_holds_the_project_file_alone_and_says_what_flower_would_build() -> None:
    from flwr.cli.build import build_fab_from_disk

    contents = []
    for made in (app_bundle(), build_fab_from_disk(APP)):
        with zipfile.ZipFile(BytesIO(made)) as bundle:
            contents.append({name: bundle.read(name) for name in bundle.namelist()})
    assert contents[0] == contents[1]
    assert sorted(contents[0]) == [".info/CONTENT", "pyproject.toml"]


def test_flower_reads_the_bundle() -> None:
    project = get_fab_config(app_bundle())
    assert get_metadata_from_config(project) == ("fedcmr/fedcmr-app", __version__)
    assert project == PROJECT


def test_the_bundle_is_the_same_on_every_machine() -> None:
    with zipfile.ZipFile(BytesIO(app_bundle())) as bundle:
        for entry in bundle.infolist():
            assert entry.compress_type == zipfile.ZIP_STORED
            assert entry.date_time == (1980, 1, 1, 0, 0, 0)
            assert entry.create_system == 3


@pytest.mark.parametrize(("key", "kind"), [("serverapp", ServerApp), ("clientapp", ClientApp)])
def test_components_are_in_the_installed_packages(key: str, kind: type) -> None:
    module, _, name = PROJECT["tool"]["flwr"]["app"]["components"][key].partition(":")
    assert isinstance(getattr(importlib.import_module(module), name), kind)


def test_app_has_the_version_of_the_package_and_no_dependency_but_flwr() -> None:
    assert PROJECT["project"]["version"] == __version__
    assert [name.split("==")[0] for name in PROJECT["project"]["dependencies"]] == ["flwr"]
