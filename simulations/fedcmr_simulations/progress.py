"""Progress of a run on standard error: bars at a terminal, a line per step elsewhere, or nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

Advance = Callable[[str], None]


class Progress(Protocol):
    """Shows one stage after the other."""

    def stage(self, title: str, steps: int) -> AbstractContextManager[Advance]:
        """Begin a stage of ``steps`` steps; call the result once per step with a short note."""


class TerminalProgress:
    """Bars where standard error is a terminal, plain lines where it is a file."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)

    @contextmanager
    def stage(self, title: str, steps: int) -> Iterator[Advance]:
        """See :class:`Progress`."""
        if not sys.stderr.isatty():
            self._console.print(f"{title} …")
            yield lambda note: self._console.print(f"  {note}", highlight=False)
            return
        columns = (
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[note]}"),
        )
        with RichProgress(*columns, console=self._console) as bars:
            task = bars.add_task(title, total=steps, note="")
            yield lambda note: bars.update(task, advance=1, note=note)


class SilentProgress:
    """Shows nothing."""

    @contextmanager
    def stage(self, title: str, steps: int) -> Iterator[Advance]:
        """See :class:`Progress`."""
        yield lambda note: None
