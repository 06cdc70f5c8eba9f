"""The narrow seam between the round loop and Flower's transport."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from typing import Final, Protocol

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedcmr_shared.errors import FederationError

CONNECT_TIMEOUT_S: Final = 300.0
FIRST_PAUSE_S: Final = 0.2
LONGEST_PAUSE_S: Final = 2.0
_PAUSE_GROWTH: Final = 1.5
_GRACE_S: Final = 60.0  # a question is void so long after its answer would be late

_log = logging.getLogger("fedcmr.server")


class SitesMissing(FederationError):
    """Too few sites are connected or answer: nothing is wrong with the job, which may go on later.

    What was committed stays, and sites keep their stored results.
    """


class SiteLink(Protocol):
    """Sends contents to sites and collects the answers."""

    def connected(self, at_least: int, timeout_s: float) -> list[int]:
        """Return the ids of the connected nodes, sorted.

        Raises:
            SitesMissing: fewer than ``at_least`` are connected when the time is over.
        """

    def exchange(
        self, action: str, contents: Mapping[int, RecordDict], timeout_s: float
    ) -> Iterator[tuple[int, RecordDict]]:
        """Send each node its content; yield node and answer as the answers arrive.

        ``action`` is Flower's message type: ``train``, ``evaluate``, ``train.keys`` and so on. A
        node that fails or is late does not occur. The link keeps no answer that it yielded, so
        that only one needs to be in memory.
        """


class FlowerLink:
    """:class:`SiteLink` over Flower's grid.

    Flower's own ``send_and_receive`` looks for answers every 3 s and returns all of them at once:
    too slow for the short steps of a secure sum, and too large for its vectors.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def connected(self, at_least: int, timeout_s: float) -> list[int]:
        """See :class:`SiteLink`."""
        deadline = time.monotonic() + timeout_s
        while True:
            nodes = sorted(self._grid.get_node_ids())
            if len(nodes) >= at_least:
                return nodes
            if time.monotonic() > deadline:
                raise SitesMissing(
                    f"{len(nodes)} of at least {at_least} sites connected within {timeout_s:g} s: "
                    "start the missing sites or lower minimum_sites in the job"
                )
            time.sleep(FIRST_PAUSE_S)

    def exchange(
        self, action: str, contents: Mapping[int, RecordDict], timeout_s: float
    ) -> Iterator[tuple[int, RecordDict]]:
        """See :class:`SiteLink`."""
        deadline = time.monotonic() + timeout_s
        pending = self._push(action, contents, timeout_s + _GRACE_S)
        pause = FIRST_PAUSE_S
        while pending:
            last_look = time.monotonic() >= deadline
            for question in list(pending):
                # One at a time: a pull of all would hold all answers at once.
                for reply in self._grid.pull_messages([question]):
                    node = pending.pop(question)
                    if reply.has_error():
                        _log.warning("node %d: Flower error %d", node, reply.error.code)
                        continue
                    answer = reply.content
                    del reply
                    yield node, answer
                    del answer
            if last_look or not pending:
                break
            time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
            pause = min(LONGEST_PAUSE_S, pause * _PAUSE_GROWTH)
        for node in pending.values():
            _log.warning("node %d: no answer to `%s` within %g s", node, action, timeout_s)

    def _push(
        self, action: str, contents: Mapping[int, RecordDict], lifetime_s: float
    ) -> dict[str, int]:
        """Send the questions; return the nodes by the id of their question."""
        pending = {}
        for node, content in contents.items():
            message = Message(content, dst_node_id=node, message_type=action, ttl=lifetime_s)
            ids = [question for question in self._grid.push_messages([message]) if question]
            if ids:
                pending[ids[0]] = node
            else:
                _log.warning("node %d: Flower did not take the question `%s`", node, action)
        return pending
