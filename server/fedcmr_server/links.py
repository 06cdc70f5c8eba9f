"""The narrow seam between the round loop and Flower's transport."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Literal, Protocol

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedcmr_shared.errors import FederationError

Action = Literal["train", "evaluate"]

_log = logging.getLogger("fedcmr.server")


class SiteLink(Protocol):
    """Sends one content to all sites and collects the answers."""

    def connected(self, at_least: int, timeout_s: float) -> list[int]:
        """Return the ids of the connected sites, sorted.

        Raises:
            FederationError: fewer than ``at_least`` are connected when the time is over.
        """

    def exchange(
        self, action: Action, content: RecordDict, sites: list[int], timeout_s: float
    ) -> Mapping[int, RecordDict]:
        """Send ``content`` to ``sites`` and return what came back in time, by site id.

        A site that fails or is late is absent from the result.
        """


class FlowerLink:
    """:class:`SiteLink` over Flower's grid."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def connected(self, at_least: int, timeout_s: float) -> list[int]:
        """See :class:`SiteLink`."""
        deadline = time.monotonic() + timeout_s
        while True:
            sites = sorted(self._grid.get_node_ids())
            if len(sites) >= at_least:
                return sites
            if time.monotonic() > deadline:
                raise FederationError(
                    f"{len(sites)} of at least {at_least} sites connected within {timeout_s:g} s: "
                    "start the missing sites or lower minimum_sites in the job"
                )
            time.sleep(0.2)

    def exchange(
        self, action: Action, content: RecordDict, sites: list[int], timeout_s: float
    ) -> Mapping[int, RecordDict]:
        """See :class:`SiteLink`."""
        messages = [Message(content, dst_node_id=site, message_type=action) for site in sites]
        answers: dict[int, RecordDict] = {}
        for reply in self._grid.send_and_receive(messages, timeout=timeout_s):
            site = reply.metadata.src_node_id
            if reply.has_error():
                _log.warning("site %d answered with Flower error %d", site, reply.error.code)
            else:
                answers[site] = reply.content
        return answers
