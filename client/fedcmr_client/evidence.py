"""Make the evidence bundle that a site hands to an auditor."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from fedcmr_client.cosignatures import Cosignatures
from fedcmr_client.ledger import Ledger
from fedcmr_shared import __version__
from fedcmr_shared.audit.evidence import Disclosed, EarlierCheckpoint, Evidence
from fedcmr_shared.errors import LedgerError
from fedcmr_shared.privacy.merkle import MerkleTree, leaf_hash
from fedcmr_shared.schemas.ledger import (
    Checkpoint,
    ClockSet,
    Closed,
    Entry,
    JobEntry,
    Leaf,
    Opened,
)


def build(ledger: Ledger, job: str | None = None) -> Evidence:
    """Return the evidence for the whole ledger, or for ``job`` (SHA-256, hexadecimal).

    Only what the newest outward checkpoint covers can be proven; that checkpoint is made now if
    it is due. The ledger's own scope then ends at it. A job's evidence may end before the job's
    newest entry while the job is open, which makes its figures larger, never smaller; for a
    closed job it must reach the entry that closes it. Cosignatures that were collected come with
    the checkpoints.

    Raises:
        LedgerError: the job was never admitted, its admission or its end is not covered yet (the
            message says when it will be), or the ledger cannot be read or written.
    """
    cosignatures = Cosignatures.read(ledger.place.folder)
    checkpoint = cosignatures.on(ledger.checkpoint())
    earlier = [old for old in ledger.checkpoints() if old.size < checkpoint.size]
    leaves = ledger.leaves()
    covered = leaves[: checkpoint.size]
    tree = MerkleTree(leaf_hash(leaf.content()) for leaf in covered)
    if job is None:
        disclosed = [Disclosed(index=i, content=_text(leaf)) for i, leaf in enumerate(covered)]
    else:
        indices = _of_job(leaves, job, checkpoint)
        disclosed = [_with_proof(tree, index, covered[index]) for index in indices]
    return Evidence(
        scope="ledger" if job is None else "job",
        job=job,
        site=checkpoint.site,
        public_key=ledger.public_key,
        software=f"fedcmr {__version__}",
        checkpoint=checkpoint,
        leaves=tuple(disclosed),
        earlier=tuple(
            EarlierCheckpoint(
                checkpoint=cosignatures.on(old),
                proof=_hex(tree.consistency_proof(old.size, checkpoint.size)),
            )
            for old in earlier
        ),
    )


def _of_job(leaves: Sequence[Leaf], job: str, checkpoint: Checkpoint) -> list[int]:
    """Return the covered leaves of ``job``, after the first one and with clock corrections."""
    own = [index for index, leaf in enumerate(leaves) if _belongs(leaf.entry, job)]
    if not own:
        raise LedgerError(
            f"job {job[:12]} was never admitted here: `fedcmr site status` lists the jobs"
        )
    # What follows the closing entry opens secure sums and costs nothing.
    closed = next((index for index in own if isinstance(leaves[index].entry, Closed)), None)
    needed = own[0] if closed is None else closed
    if needed >= checkpoint.size:
        raise LedgerError(
            f"no checkpoint covers the {'admission' if closed is None else 'end'} of job "
            f"{job[:12]} yet: "
            f"export again after {_covered_at(leaves, needed)}"
        )
    last = max(index for index in own if index < checkpoint.size)
    clock = [i for i in range(last) if isinstance(leaves[i].entry, ClockSet)]
    return sorted({0, *clock, *(index for index in own if index <= last)})


def _belongs(entry: Entry, job: str) -> bool:
    return isinstance(entry, JobEntry) and entry.job == job


def _covered_at(leaves: Sequence[Leaf], index: int) -> str:
    """Say when the schedule's checkpoint that covers leaf ``index`` is due."""
    opened = leaves[0].entry
    if not isinstance(opened, Opened):
        raise LedgerError("the ledger has no opening entry: restore the newest backup")
    at = opened.at + index // opened.checkpoint_leaves * opened.checkpoint_interval_ms
    return datetime.fromtimestamp(-(-at // 1000), UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _with_proof(tree: MerkleTree, index: int, leaf: Leaf) -> Disclosed:
    proof = _hex(tree.inclusion_proof(index, tree.size))
    return Disclosed(index=index, content=_text(leaf), proof=proof)


def _text(leaf: Leaf) -> str:
    return leaf.content().decode()


def _hex(nodes: Sequence[bytes]) -> tuple[str, ...]:
    return tuple(node.hex() for node in nodes)
