"""The published heads of each site's ledger: one chain, which only grows, and what breaks it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fedcmr_server.governance.admission import Caller
from fedcmr_server.governance.gatekeeper import NotFound
from fedcmr_server.store import Checkpoints, Members, Store
from fedcmr_shared.audit.cosignature import verify_cosignature
from fedcmr_shared.errors import FederationError, LedgerError
from fedcmr_shared.identity.keys import verify_signature
from fedcmr_shared.privacy.merkle import verify_consistency
from fedcmr_shared.schemas.ledger import Checkpoint

MOST_REFUSED: Final = 10
"""Refused heads of one site that are kept: each is evidence, and more say nothing new."""


class Contradiction(LedgerError):
    """A signed head that does not continue what its site published before."""


@dataclass(frozen=True)
class Published:
    """A published head with its cosignatures, and the proof that it continues the one before."""

    checkpoint: Checkpoint
    proof: tuple[bytes, ...]


def is_new(
    published: Sequence[Checkpoint], offered: Checkpoint, since: int, proof: Sequence[bytes]
) -> bool:
    """Return whether ``offered`` continues ``published`` (by size); False: it is one of them.

    ``proof`` is that from the head of size ``since``, 0 if nothing was published.

    Raises:
        Contradiction: it does not continue them: two histories, or one that shrank.
        FederationError: the proof is from another head than the newest.
    """
    same = next((each for each in published if each.size == offered.size), None)
    if same is not None:
        if same.root != offered.root:
            raise Contradiction(
                f"site {offered.site} signed two histories of {offered.size} entries"
            )
        return False
    newest = published[-1].size if published else 0
    if offered.size < newest:
        raise Contradiction(
            f"site {offered.site} published {newest} entries and comes with {offered.size}"
        )
    if since != newest:
        raise FederationError(
            f"the newest checkpoint covers {newest} entries, the proof begins at {since}: "
            "ask for the list and try again"
        )
    if published:
        old = published[-1]
        roots = bytes.fromhex(old.root), bytes.fromhex(offered.root)
        try:
            verify_consistency(old.size, roots[0], offered.size, roots[1], proof)
        except LedgerError as error:
            raise Contradiction(f"site {offered.site}: {error}") from error
    return True


class CheckpointBoard:
    """Takes and shows the heads of all sites; the store keeps them."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._checkpoints = Checkpoints(store)
        self._lock = threading.Lock()  # between looking and keeping

    def publish(
        self, caller: Caller, offered: Checkpoint, since: int, proof: Sequence[bytes]
    ) -> None:
        """Keep the caller's head; one that contradicts the others is kept too, marked, and refused.

        Raises:
            LedgerError: it is not signed by the caller, or a `Contradiction`.
            FederationError: the proof is from another head than the newest.
        """
        if offered.site != caller.name:
            raise LedgerError(f"{caller.name} publishes its own checkpoints alone")
        verify_signature(caller.identity, offered.signature, offered.signed_bytes())
        with self._lock:
            published = [each.checkpoint for each in self._chain(caller.name, caller.identity)]
            try:
                if is_new(published, offered, since, proof):
                    self._checkpoints.keep(offered, [node.hex() for node in proof])
            except Contradiction as problem:
                if len(self._refused(caller.name, caller.identity)) < MOST_REFUSED:
                    self._checkpoints.keep(offered, problem=str(problem))
                raise

    def published(self, site: str, after: int) -> list[Published]:
        """Return the heads of ``site`` over more than ``after`` entries, the smallest first.

        Raises:
            NotFound: there is and was no such site.
        """
        return self._chain(site, self._identity(site), after)

    def refused(self, site: str) -> list[Checkpoint]:
        """Return the kept heads that contradict what ``site`` published; NotFound as above."""
        return self._refused(site, self._identity(site))

    def cosign(self, caller: Caller, site: str, head: tuple[int, str], signature: str) -> None:
        """Keep the caller's signature under the head (size, root) of another site.

        Raises:
            FederationError: it is the caller's own.
            NotFound: no such head was published.
            LedgerError: the caller did not sign it.
        """
        if site == caller.name:
            raise FederationError("a site does not cosign its own checkpoints: others do")
        size, root = head
        for each in self.published(site, size - 1 if size else 0):
            if (each.checkpoint.size, each.checkpoint.root) == (size, root):
                verify_cosignature(caller.identity, each.checkpoint, signature)
                self._checkpoints.cosign(each.checkpoint, caller.name, caller.identity, signature)
                return
        raise NotFound(f"site {site} published no such checkpoint of {size} entries")

    def _chain(self, site: str, identity: str, after: int = 0) -> list[Published]:
        proofs = self._checkpoints.proofs(site)
        return [
            Published(each, tuple(bytes.fromhex(node) for node in proofs[each.size, each.root]))
            for each in self._signed(site, identity, after)
            if (each.size, each.root) in proofs
        ]

    def _refused(self, site: str, identity: str) -> list[Checkpoint]:
        proofs = self._checkpoints.proofs(site)
        kept = self._signed(site, identity, 0)
        return [each for each in kept if (each.size, each.root) not in proofs]

    def _signed(self, site: str, identity: str, after: int) -> list[Checkpoint]:
        # A site that came back with new keys began a new ledger: the old one's heads are another's.
        return [c for c in self._checkpoints.of(site, after) if _is_signed(identity, c)]

    def _identity(self, site: str) -> str:
        rows = [row for row in Members(self._store).all() if (row.name, row.role) == (site, "site")]
        if not rows:
            raise NotFound(f"no site is called {site[:63]}")
        return next((row.identity for row in rows if row.state == "active"), rows[-1].identity)


def _is_signed(identity: str, checkpoint: Checkpoint) -> bool:
    try:
        verify_signature(identity, checkpoint.signature, checkpoint.signed_bytes())
    except LedgerError:
        return False
    return True
