"""A pool of single-threaded worker processes that an interrupt ends at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def each_in_pool(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Iterator[tuple[Item, Result]]:
    """Yield each item with its result as it is done; an error in one ends all.

    ``work`` and the items must be importable and picklable: processes are spawned, so that each
    has its own single torch thread and no inherited locks.
    """
    pool = ProcessPoolExecutor(
        max_workers=min(workers, len(items)), mp_context=get_context("spawn"), initializer=_start
    )
    finished = False
    try:
        futures = {pool.submit(work, item): item for item in items}
        for future in as_completed(futures):
            yield futures[future], future.result()
        finished = True
    finally:
        processes = list((pool._processes or {}).values())
        if not finished:
            # The executor would wait for running work; an interrupted user would not.
            for process in processes:
                process.kill()
        pool.shutdown(wait=True, cancel_futures=True)


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
