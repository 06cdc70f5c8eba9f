"""Import of a CMRxRecon file against a plain h5py read and write of the same bytes.

Both read the same MATLAB v7.3 file image by image and write complex64 to one HDF5 file that is
synchronised to the disk; the import also hashes, validates and catalogues. Run it as
``python benchmarks/import_throughput.py [--folder DIR] [--out FILE]``. The source is read once
before, so that both read from the page cache. Peak memory is measured in a process per task.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

TARGET = 0.6
PAIR = np.dtype([("real", "<f4"), ("imag", "<f4")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="where to work; else the temporary folder")
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--slices", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--task", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        run_task(*options.task)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = compare(Path(folder), (options.frames, options.slices, 10, 204, 512), options)
    print(json.dumps(result, indent=2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(0 if result["passed"] else 1)


def compare(folder: Path, shape: tuple[int, ...], options: argparse.Namespace) -> dict[str, object]:
    source = folder / "P001" / "cine_sax.mat"
    source.parent.mkdir()
    write_source(source, shape)
    runs: dict[str, list[dict[str, float]]] = {"plain": [], "import": []}
    for number in range(options.repeats):
        for task, measured in runs.items():  # alternating, so that both see the same machine
            measured.append(measure(task, source, folder / f"{task}-{number}"))
    # The fastest run says what the code needs, slower ones what else the machine did.
    seconds = {task: min(m["seconds"] for m in runs[task]) for task in runs}
    peak = max(m["peak_mib"] for m in runs["import"])
    stack = 8 * shape[0] * int(np.prod(shape[2:])) / 2**20
    ratio = seconds["plain"] / seconds["import"]
    mebibytes = 8 * int(np.prod(shape)) / 2**20
    return {
        "shape": shape,
        "mebibytes": round(mebibytes),
        "file_system": file_system(folder),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "repeats": options.repeats,
        "all_seconds": {task: [round(m["seconds"], 2) for m in runs[task]] for task in runs},
        "plain_mib_per_s": round(mebibytes / seconds["plain"]),
        "import_mib_per_s": round(mebibytes / seconds["import"]),
        "throughput_ratio": round(ratio, 3),
        "throughput_ratio_target": TARGET,
        "peak_memory_added_mib": round(peak, 1),
        "frame_stack_of_one_slice_mib": round(stack, 1),
        "passed": ratio >= TARGET and peak < 2 * stack,
    }


def write_source(path: Path, shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(0)
    with h5py.File(path, "w", userblock_size=512) as file:
        dataset = file.create_dataset("kspace_full", shape, PAIR)
        for frame in range(shape[0]):
            parts = generator.standard_normal((*shape[1:], 2), np.float32)
            dataset[frame] = parts.view(PAIR)[..., 0]
    with path.open("r+b") as raw:
        raw.write(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM")
    os.sync()


def measure(task: str, source: Path, target: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--task", task, str(source), str(target)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    measured: dict[str, float] = json.loads(done.stdout)
    subprocess.run(["rm", "-r", str(target)], check=True)
    return measured


def run_task(task: str, source: str, target: str) -> None:
    """Time one task; its peak memory is counted above what the imported packages need."""
    from fedcmr_client.importers import import_path
    from fedcmr_client.store.site_store import SiteStore

    folder = Path(target)
    store = SiteStore.create(folder) if task == "import" else None
    folder.mkdir(exist_ok=True)
    before = peak_mib()
    start = time.perf_counter()
    if store is None:
        copy(Path(source), folder / "copy.h5")
    else:
        summary = import_path(store, Path(source))
        assert summary.imported == 1, summary.to_json()
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak_mib": peak_mib() - before}))


def copy(source: Path, target: Path) -> None:
    with h5py.File(source) as old, h5py.File(target, "w") as new:
        samples = old["kspace_full"]
        chunks = (1, 1, *samples.shape[2:])
        kspace = new.create_dataset("kspace", samples.shape, np.complex64, chunks=chunks)
        for frame, slice_ in np.ndindex(samples.shape[:2]):
            kspace[frame, slice_] = samples[frame, slice_].view(np.complex64)
    descriptor = os.open(target, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def peak_mib() -> float:
    """Highest resident memory of this process; getrusage would count the parent's, too."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def file_system(folder: Path) -> str:
    done = subprocess.run(
        ["stat", "-f", "-c", "%T", folder], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


if __name__ == "__main__":
    main()
