"""The distribution: what the wheel holds, and that every version is pinned."""

import re
import tomllib
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PACKAGES = {"fedcmr_shared", "fedcmr_client", "fedcmr_server", "fedcmr_simulations"}


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("wheel")
    (path,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    return zipfile.ZipFile(path).namelist()


def test_wheel_holds_the_four_packages_alone(wheel_names: list[str]) -> None:
    top = {name.split("/")[0] for name in wheel_names}
    assert {name for name in top if not name.endswith(".dist-info")} == PACKAGES


def test_wheel_holds_type_marks_licence_and_data(wheel_names: list[str]) -> None:
    for package in PACKAGES:
        assert f"{package}/py.typed" in wheel_names
    assert any(name.endswith("licenses/LICENSE") for name in wheel_names)
    assert "fedcmr_simulations/jobs/demo.yaml" in wheel_names
    assert any(name.startswith("fedcmr_client/store/migrations/versions/") for name in wheel_names)
    assert any(name.startswith("fedcmr_simulations/templates/") for name in wheel_names)
    assert "fedcmr_shared/weights/segmenter.safetensors" in wheel_names


def test_every_dependency_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {
        canonicalize_name(line.split("==")[0]): line.split("==")[1]
        for line in lines
        if not line.startswith("#")
    }
    assert pins["torch"] == "2.13.0"
    for text in requires("fedcmr") or []:
        requirement = Requirement(text)
        if requirement.name != "fedcmr":
            version = pins[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), requirement
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", requirement) for requirement in build)
