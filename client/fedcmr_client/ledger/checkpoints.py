"""When outward checkpoints are due and how many entries they cover: the clock alone decides.

Whoever gets a site's checkpoints would otherwise read from their sizes what the site does for
other coordinators.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fedcmr_client.ledger.log import SignedLog
from fedcmr_shared.errors import LedgerError
from fedcmr_shared.schemas.ledger import Checkpoint, Opened, Padding

_MOST_PADDING: Final = 1_000_000
"""At once. More means that the clock is wrong: with the default schedule these are five years."""


@dataclass(frozen=True)
class CheckpointSchedule:
    """A checkpoint every ``every_s`` seconds, each over ``leaves`` entries more.

    ``leaves`` bounds how many entries an interval can publish; what a busy interval wrote beyond
    waits for the next ones.
    """

    every_s: float = 6 * 3600.0
    leaves: int = 128


def due(opened: Opened, now: int) -> tuple[int, int]:
    """Return time and size of the checkpoint that is due at ``now`` (UTC milliseconds).

    Raises:
        LedgerError: ``now`` is before the log began.
    """
    ticks = (now - opened.at) // opened.checkpoint_interval_ms
    if ticks < 0:
        raise LedgerError("the clock is behind the ledger's first entry: set the machine's clock")
    at = opened.at + ticks * opened.checkpoint_interval_ms
    return at, opened.checkpoint_leaves * (ticks + 1)


def issue(log: SignedLog, now_ms: int | None = None) -> Checkpoint:
    """Return the checkpoint of the current interval, made and kept if it is new.

    The log is padded up to the checkpoint's size. If an earlier answer was for a later time, as
    after a clock that was ahead, it is repeated: published sizes never fall.

    Raises:
        LedgerError: the clock is behind the last entry or absurdly far ahead of it, or the
            ledger cannot be written.
    """
    with log.transaction() as work:
        if now_ms is not None:
            work.wall_clock = now_ms
        at, size = due(work.budget.opened, work.wall_clock)
        newest = log.newest_checkpoint(work)
        if newest is not None and newest.at >= at:
            return newest
        missing = size - work.state.size
        if missing > _MOST_PADDING:
            message = "set the machine's clock, and then `fedcmr site set-clock`"
            raise LedgerError(f"the clock is years ahead of the last checkpoint: {message}")
        for _ in range(missing):
            work.append(Padding(at=work.now))
        return log.sign_checkpoint(work, size, at)
