"""When a site's work waits: while its operator has paused it, and in the policy's quiet hours.

Training looks here before every step. It waits with everything in memory, so the update is the
one that would have come without the wait; only later.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from fedcmr_client.ledger.place import make_folder, write_durably
from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.privacy.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from fedcmr_client.site_home import SiteHome

POLL_S: Final = 1.0

_log = logging.getLogger("fedcmr.site")


@dataclass(frozen=True)
class Pause:
    """Since when the operator's pause lasts, and why, in the operator's words."""

    since: datetime
    reason: str | None


@dataclass(frozen=True)
class PauseSwitch:
    """The operator's pause: a file that is there while it lasts, also over restarts."""

    path: Path

    @property
    def on(self) -> bool:
        """Whether the site is paused."""
        return self.read() is not None

    def pause(self, reason: str | None = None) -> Pause:
        """Begin a pause; one that lasts already goes on as it is.

        Raises:
            ConfigurationError: the file cannot be written.
        """
        running = self.read()
        if running is not None:
            return running
        pause = Pause(datetime.now(UTC), reason)
        content = {"since": pause.since.isoformat(timespec="seconds"), "reason": reason}
        try:
            make_folder(self.path.parent)
            write_durably(self.path, json.dumps(content).encode())
        except OSError as error:
            raise ConfigurationError(f"{self.path}: cannot be written: {error.strerror}") from error
        return pause

    def resume(self) -> bool:
        """End the pause; return whether there was one. ConfigurationError if that fails."""
        try:
            self.path.unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise ConfigurationError(f"{self.path}: cannot be removed: {error.strerror}") from error
        return True

    def read(self) -> Pause | None:
        """Return the pause that lasts, or None; a damaged file still counts as one."""
        try:
            content = json.loads(self.path.read_bytes())
            return Pause(datetime.fromisoformat(content["since"]), content["reason"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            return Pause(datetime.now(UTC), f"{self.path} cannot be read")


def held_by(home: SiteHome, now: datetime | None = None) -> str | None:
    """Return what keeps the site from working now (local time ``now``), or None."""
    pause = home.pause.read()
    if pause is not None:
        return (
            f"paused by the operator ({pause.reason})" if pause.reason else "paused by the operator"
        )
    local = (now or datetime.now().astimezone()).time()
    return "quiet hours" if home.policy.is_quiet(local) else None


def wait_while_held(
    home: SiteHome, ranks: Ranks = ALONE, device: str = "cpu", *, poll_s: float = POLL_S
) -> float:
    """Return once work may go on, with the seconds that this took.

    With several ranks rank 0 decides, and all wait together: one that went on alone would sit in
    an exchange until that times out.
    """
    began: float | None = None
    while (reason := _decision(home, ranks, device)) is not None:
        if began is None:
            began = time.monotonic()
            _log.info("training waits: %s", reason)
        time.sleep(poll_s)
    if began is None:
        return 0.0
    _log.info("training goes on")
    return time.monotonic() - began


def _decision(home: SiteHome, ranks: Ranks, device: str) -> str | None:
    """Return rank 0's reason to wait; the other ranks learn only that there is one."""
    reason = held_by(home) if ranks.index == 0 else None
    if ranks.count == 1:
        return reason
    held = torch.tensor([reason is not None], dtype=torch.uint8, device=device)
    ranks.spread(held)
    return (reason or "rank 0 waits") if held.item() else None
