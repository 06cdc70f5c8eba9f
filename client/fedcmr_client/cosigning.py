"""Publishes this site's checkpoints and cosigns those of the others.

Whoever cosigned a head cosigns only what continues it. So a site that shows two histories, alone
or together with the coordinator, finds no peer for one of them; and whoever is shown the other one
later holds two signed heads that prove it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Final

from fedcmr_client.cosignatures import Cosignatures, Cosigned, keep_fork
from fedcmr_client.governance import Governance, PublishedCheckpoint, SiteCheckpoints
from fedcmr_client.ledger import Ledger
from fedcmr_client.site_home import SiteHome
from fedcmr_shared.audit.cosignature import cosign, verify_cosignature
from fedcmr_shared.errors import FederationError, LedgerError
from fedcmr_shared.identity.keys import SiteKey, verify_signature
from fedcmr_shared.privacy.merkle import MerkleTree, leaf_hash, verify_consistency
from fedcmr_shared.schemas.ledger import Checkpoint

_RECENT: Final = 50  # own checkpoints among which the newest published one is looked for first

_log = logging.getLogger("fedcmr.site")


class Fork(LedgerError):
    """Two signed heads of one site of which neither continues the other, as far as is shown."""

    def __init__(self, heads: tuple[Checkpoint, Checkpoint], message: str) -> None:
        super().__init__(message)
        self.heads = heads


def publish_and_cosign(governance: Governance, home: SiteHome, keys: Mapping[str, str]) -> None:
    """Publish this site's due checkpoint, collect its cosignatures, and cosign the others' heads.

    ``keys`` maps the sites of the pinned roster to their public keys. One site that cannot be
    cosigned keeps none of the others back.

    Raises:
        LedgerError: a site shows two histories, or the coordinator hides one; the message names
            it, and ``forks/`` in the ledger's folder keeps what proves it.
        ConnectionProblem, FederationError: see `Governance`.
    """
    own = home.policy.site
    others = {site: key for site, key in keys.items() if site != own}
    with closing(home.open_ledger()) as ledger:
        folder = ledger.place.folder
        keep_cosignatures(folder, publish(governance, ledger), others.values())
    identity = home.identity()
    problems: list[LedgerError | FederationError] = []
    for site, key in sorted(others.items()):
        try:
            cosign_site(governance, folder, identity, site, key)
        except (LedgerError, FederationError) as error:
            problems.append(error)
    if problems:
        kind = LedgerError if any(isinstance(e, LedgerError) for e in problems) else FederationError
        raise kind("; ".join(map(str, problems)))


def publish(governance: Governance, ledger: Ledger) -> list[Checkpoint]:
    """Publish the checkpoint that is due; return those published before, with cosignatures.

    Never the inner head: its time and size would tell what the site does.

    Raises:
        LedgerError: the coordinator lists a head that this ledger does not have.
    """
    due, made = ledger.checkpoint(), ledger.checkpoints()
    recent = made[-_RECENT:]
    published = _listed(governance, due.site, recent[0].size - 1 if len(made) > _RECENT else 0)
    if not published and len(made) > _RECENT:
        published = _listed(governance, due.site, 0)
    known = {(each.size, each.root) for each in made}
    for each in published:
        if (each.size, each.root) not in known:
            raise LedgerError(
                f"the coordinator lists a head of {each.size} entries that this ledger does not "
                "have: another copy of the ledger is in use, or an older one was restored"
            )
    since = published[-1].size if published else 0
    if since < due.size:
        leaves = ledger.leaves()[: due.size]
        tree = MerkleTree(leaf_hash(leaf.content()) for leaf in leaves)
        proof = tree.consistency_proof(since, due.size) if since else []
        governance.put_checkpoint(due, since, proof)
    return published


def keep_cosignatures(folder: Path, own: Sequence[Checkpoint], keys: Collection[str]) -> None:
    """Keep the cosignatures under ``own`` heads by ``keys``, for evidence; false ones are left out.

    Raises:
        LedgerError: the file in the ledger's ``folder`` cannot be read or written.
    """
    found: dict[str, dict[str, str]] = {}
    for head in own:
        for key, signature in head.cosignatures.items():
            if key not in keys:
                continue
            try:
                verify_cosignature(key, head, signature)
            except LedgerError as error:
                _log.warning("cosignature under the head of %d entries: %s", head.size, error)
            else:
                found.setdefault(head.root, {})[key] = signature
    Cosignatures.read(folder).keep(folder, found)


def cosign_site(
    governance: Governance, folder: Path, identity: SiteKey, site: str, key: str
) -> Checkpoint | None:
    """Cosign the newest head of ``site``, whose key is ``key``; None while it published none.

    ``folder`` is that of this site's ledger.

    Raises:
        LedgerError: the head does not continue what was cosigned before, or is not signed.
    """
    cosigned = Cosigned.read(folder)
    kept = cosigned.heads.get(site)
    # With a new key a site begins a new ledger.
    last = kept.checkpoint if kept is not None and kept.key == key else None
    listed = governance.checkpoints(site, last.size - 1 if last else 0)
    try:
        newest = newest_head(site, key, last, listed)
        _require_one_history(governance, site, key, listed.refused)
    except Fork as fork:
        path = keep_fork(folder, fork.heads)
        raise LedgerError(f"{fork}; {path} keeps both heads: tell the other sites") from fork
    if newest is None:
        return None
    if last is None or newest.size > last.size:
        cosigned.keep(folder, site, key, newest)
    signature = cosign(identity, newest)
    if newest.cosignatures.get(identity.public_key) != signature:
        governance.put_cosignature(newest, signature)
    return newest


def newest_head(
    site: str, key: str, last: Checkpoint | None, listed: SiteCheckpoints
) -> Checkpoint | None:
    """Return the newest head that may be cosigned after ``last``; None if nothing is published.

    ``listed`` begins with the head of the size of ``last``, or with the first head of all.

    Raises:
        Fork: a head is not shown to continue the one before, or ``last``.
        LedgerError: a head is not signed by ``key``, or the coordinator hides ``last``.
    """
    heads = [each.checkpoint for each in listed.published]
    _require_signed(site, key, [*heads, *listed.refused])
    if last is not None:
        if not heads or heads[0].size != last.size:
            raise LedgerError(
                f"the coordinator no longer shows the head of site {site} over {last.size} entries "
                "that this site cosigned: it lost it or hides it"
            )
        if heads[0].root != last.root:
            raise _two_histories(last, heads[0])
    for old, new in pairwise(listed.published):
        _require_continues(old.checkpoint, new)
    return heads[-1] if heads else None


def _require_continues(old: Checkpoint, new: PublishedCheckpoint) -> None:
    head = new.checkpoint
    if head.size == old.size and head.root != old.root:
        raise _two_histories(old, head)
    roots = bytes.fromhex(old.root), bytes.fromhex(head.root)
    try:
        verify_consistency(old.size, roots[0], head.size, roots[1], new.proof)
    except LedgerError as error:
        raise Fork(
            (old, head),
            f"site {old.site}: {error}; or the coordinator gave a wrong proof: nothing was cosigned",
        ) from error


def _require_one_history(
    governance: Governance, site: str, key: str, refused: Sequence[Checkpoint]
) -> None:
    """Hold heads that the coordinator refused against those of the same size that it shows."""
    if not refused:
        return
    shown = _listed(governance, site, min(head.size for head in refused) - 1)
    _require_signed(site, key, shown)
    for head in refused:
        for other in shown:
            if head.size == other.size and head.root != other.root:
                raise _two_histories(other, head)


def _require_signed(site: str, key: str, heads: Sequence[Checkpoint]) -> None:
    for head in heads:
        try:
            if head.site != site:
                raise LedgerError(f"it is of site {head.site[:63]}")
            verify_signature(key, head.signature, head.signed_bytes())
        except LedgerError as error:
            raise LedgerError(
                f"head of {head.size} entries that the coordinator shows for site {site}: {error}"
            ) from error


def _two_histories(first: Checkpoint, second: Checkpoint) -> Fork:
    return Fork(
        (first, second),
        f"site {first.site} signed two histories of {first.size} entries: its figures prove "
        "nothing; nothing of it was cosigned",
    )


def _listed(governance: Governance, site: str, after: int) -> list[Checkpoint]:
    return [each.checkpoint for each in governance.checkpoints(site, after).published]
