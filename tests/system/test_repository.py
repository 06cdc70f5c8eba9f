"""The repository speaks of the project alone and carries nothing that it must not."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LARGEST_BYTES = 2_000_000
LARGEST_WEIGHTS_BYTES = 8_000_000
WEIGHTS = (
    ROOT / "simulations" / "fedcmr_simulations" / "weights" / "cardiomm-tiny.safetensors",
    ROOT / "simulations" / "fedcmr_simulations" / "weights" / "cpgg-tiny.safetensors",
    ROOT / "shared" / "fedcmr_shared" / "weights" / "segmenter.safetensors",
)
# Homes, scratch folders and addresses of package indexes belong to somebody's machine.
FOREIGN = re.compile(r"/(?:work|root|home|tmp)/|pypi\.org|pythonhosted|deb\.debian|index-url")


def tracked() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for name in listing.stdout.splitlines() if (path := ROOT / name).is_file()]


def test_no_file_names_a_machine() -> None:
    found = []
    for path in tracked():
        if path.suffix == ".png" or path == Path(__file__):
            continue
        # Weights carry text as well: where they come from.
        text = path.read_text(errors="replace" if path in WEIGHTS else "strict")
        for number, line in enumerate(text.splitlines(), start=1):
            if FOREIGN.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert found == []


def test_no_data_and_no_large_file() -> None:
    for path in tracked():
        assert path.suffix not in {".dcm", ".mat", ".h5", ".npz", ".nii", ".gz"}, path
        assert path.suffix != ".safetensors" or path in WEIGHTS, path
        largest = LARGEST_WEIGHTS_BYTES if path in WEIGHTS else LARGEST_BYTES
        assert path.stat().st_size < largest, path


def test_packages_hold_no_drawer_modules() -> None:
    names = {path.stem for path in tracked() if path.suffix == ".py"}
    assert not names & {"utils", "util", "helpers", "common", "misc"}
