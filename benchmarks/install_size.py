"""Download size of an installation: the sum over the wheels that pip would fetch.

    python benchmarks/install_size.py client simulation dev

pip resolves the extra for an empty environment with the pinned versions and reports where each
wheel lies; nothing is installed. Which build of torch counts depends on the index in use.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[1]


def wheel_bytes(url: str) -> int:
    """Size of one wheel, from the disk or from the server's header."""
    parts = urllib.parse.urlparse(url)
    if parts.scheme == "file":
        return Path(urllib.parse.unquote(parts.path)).stat().st_size
    request = urllib.request.Request(url, method="HEAD")
    with urllib.request.urlopen(request, timeout=60) as answer:
        return int(answer.headers["Content-Length"])


def wheels(extra: str) -> dict[str, str]:
    """Name and address of each wheel that the extra needs."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
    options = ["--quiet", "--report", "-", "-c", str(ROOT / "constraints.txt")]
    report = subprocess.run(
        [*command, *options, f"{ROOT}[{extra}]"], check=True, capture_output=True, text=True
    )
    items = json.loads(report.stdout)["install"]
    return {
        f"{item['metadata']['name']} {item['metadata']['version']}": item["download_info"]["url"]
        for item in items
        if item["metadata"]["name"] != "fedcmr"
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("extras", nargs="+")
    for extra in parser.parse_args().extras:
        sizes = {name: wheel_bytes(url) for name, url in wheels(extra).items()}
        largest = ", ".join(
            f"{name} {sizes[name] / 1e6:.0f} MB"
            for name in sorted(sizes, key=sizes.__getitem__)[:-4:-1]
        )
        print(
            f"{extra:<12} {len(sizes):3d} wheels {sum(sizes.values()) / 1e6:7.0f} MB  ({largest})"
        )


if __name__ == "__main__":
    main()
