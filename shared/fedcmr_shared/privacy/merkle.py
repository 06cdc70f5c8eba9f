"""Merkle trees of RFC 6962, section 2.1: roots, inclusion proofs and consistency proofs.

A leaf's hash is SHA-256(0x00 || content), a node's SHA-256(0x01 || left || right); a tree of n
leaves splits at the largest power of two below n. Verification follows RFC 9162, sections 2.1.3.2
and 2.1.4.2. All hashes are 32 bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Final

from fedcmr_shared.errors import LedgerError

HASH_BYTES: Final = 32
EMPTY_ROOT: Final = hashlib.sha256(b"").digest()
"""Root of the tree without leaves."""


def leaf_hash(data: bytes) -> bytes:
    """Return the hash of a leaf with content ``data``."""
    return hashlib.sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Return the hash of a node with two children."""
    return hashlib.sha256(b"\x01" + left + right).digest()


@dataclass(frozen=True)
class Frontier:
    """The right edge of a tree: all that is needed to append leaves and to know the root.

    ``peaks`` are the roots of the perfect subtrees that the binary digits of ``size`` name,
    largest first.
    """

    size: int = 0
    peaks: tuple[bytes, ...] = ()

    def extend(self, leaves: Iterable[bytes]) -> Frontier:
        """Return the edge after more leaves, given by their hashes."""
        size, peaks = self.size, list(self.peaks)
        for leaf in leaves:
            node, places = leaf, size
            while places & 1:
                node, places = node_hash(peaks.pop(), node), places >> 1
            peaks.append(node)
            size += 1
        return Frontier(size, tuple(peaks))

    def root(self) -> bytes:
        """Return the root of the tree."""
        return _join(self.peaks)


class MerkleTree:
    """A tree that keeps the hashes of all perfect subtrees: 64 bytes for each leaf."""

    def __init__(self, leaf_hashes: Iterable[bytes] = ()) -> None:
        # Level k holds the hashes of the complete subtrees of 2^k leaves, one after the other.
        self._levels: list[bytearray] = [bytearray()]
        for leaf in leaf_hashes:
            self.append(leaf)

    @property
    def size(self) -> int:
        """Number of leaves."""
        return len(self._levels[0]) // HASH_BYTES

    def append(self, leaf_hash: bytes) -> None:
        """Add a leaf, given by its hash.

        Raises:
            LedgerError: ``leaf_hash`` has not 32 bytes.
        """
        if len(leaf_hash) != HASH_BYTES:
            raise LedgerError(f"a leaf hash has {HASH_BYTES} bytes, not {len(leaf_hash)}")
        index, node, level = self.size, leaf_hash, 0
        self._levels[0] += node
        while index & 1:
            node = node_hash(self._node(level, index - 1), node)
            index, level = index >> 1, level + 1
            if level == len(self._levels):
                self._levels.append(bytearray())
            self._levels[level] += node

    def root(self, size: int | None = None) -> bytes:
        """Return the root of the first ``size`` leaves, of all when not given.

        Raises:
            LedgerError: the tree has fewer leaves.
        """
        size = self.size if size is None else size
        self._require(size >= 0, size)
        return self._range_root(0, size)

    def inclusion_proof(self, index: int, size: int) -> list[bytes]:
        """Return the audit path of leaf ``index`` in the tree of the first ``size`` leaves.

        Raises:
            LedgerError: there is no such leaf or tree.
        """
        self._require(0 <= index < size, size)
        start, end, path = 0, size, []
        while end - start > 1:
            middle = start + _split(end - start)
            if index < middle:
                path.append(self._range_root(middle, end))
                end = middle
            else:
                path.append(self._range_root(start, middle))
                start = middle
        return path[::-1]

    def consistency_proof(self, old_size: int, new_size: int) -> list[bytes]:
        """Return the proof that the tree of ``old_size`` leaves begins that of ``new_size``.

        Raises:
            LedgerError: there are no such trees, or ``old_size`` is 0.
        """
        self._require(0 < old_size <= new_size, new_size)
        start, end, path, whole = 0, new_size, [], True
        while old_size < end:
            middle = start + _split(end - start)
            if old_size <= middle:
                path.append(self._range_root(middle, end))
                end = middle
            else:
                path.append(self._range_root(start, middle))
                start, whole = middle, False
        # The verifier knows the old tree's root; it needs the last part only if that is another.
        return path[::-1] if whole else [self._range_root(start, end), *path[::-1]]

    def _node(self, level: int, index: int) -> bytes:
        at = index * HASH_BYTES
        return bytes(self._levels[level][at : at + HASH_BYTES])

    def _range_root(self, start: int, end: int) -> bytes:
        """Root of the leaves from ``start``, a border between subtrees, up to ``end``."""
        peaks = []
        while start < end:
            level = (end - start).bit_length() - 1
            peaks.append(self._node(level, start >> level))
            start += 1 << level
        return _join(peaks)

    def _require(self, condition: bool, size: int) -> None:
        if not condition or size > self.size:
            raise LedgerError(f"the log of {self.size} entries has no such tree or entry")


def verify_inclusion(
    leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes
) -> None:
    """Return if ``proof`` shows that leaf hash ``leaf`` is entry ``index`` of the tree.

    Raises:
        LedgerError: it does not.
    """
    node, last, path = leaf, size - 1, list(proof)
    valid = 0 <= index < size
    while valid and path:
        sibling = path.pop(0)
        valid = last > 0
        if index & 1 or index == last:
            node = node_hash(sibling, node)
            while not index & 1 and index:
                index, last = index >> 1, last >> 1
        else:
            node = node_hash(node, sibling)
        index, last = index >> 1, last >> 1
    if not valid or last != 0 or node != root:
        raise LedgerError("the inclusion proof does not hold: the entry is not in this log")


def verify_consistency(
    old_size: int, old_root: bytes, new_size: int, new_root: bytes, proof: Sequence[bytes]
) -> None:
    """Return if ``proof`` shows that the old tree is the beginning of the new one.

    Raises:
        LedgerError: it does not, or ``old_size`` is 0.
    """
    if not _is_consistent(old_size, old_root, new_size, new_root, proof):
        message = f"the log of {new_size} entries does not begin with that of {old_size}"
        raise LedgerError(f"{message}: it was forked, shortened or changed")


def _is_consistent(
    old_size: int, old_root: bytes, new_size: int, new_root: bytes, proof: Sequence[bytes]
) -> bool:
    if not 0 < old_size <= new_size:
        return False
    if old_size == new_size:
        return not proof and old_root == new_root
    path = list(proof)
    if old_size & (old_size - 1) == 0:
        path.insert(0, old_root)
    old, new = old_size - 1, new_size - 1
    while old & 1:
        old, new = old >> 1, new >> 1
    if not path:
        return False
    old_node = new_node = path.pop(0)
    for sibling in path:
        if new == 0:
            return False
        if old & 1 or old == new:
            old_node, new_node = node_hash(sibling, old_node), node_hash(sibling, new_node)
            while not old & 1 and old:
                old, new = old >> 1, new >> 1
        else:
            new_node = node_hash(new_node, sibling)
        old, new = old >> 1, new >> 1
    return new == 0 and (old_node, new_node) == (old_root, new_root)


def _split(size: int) -> int:
    """Return the largest power of two below ``size``."""
    return 1 << ((size - 1).bit_length() - 1)


def _join(peaks: Sequence[bytes]) -> bytes:
    if not peaks:
        return EMPTY_ROOT
    return reduce(lambda right, left: node_hash(left, right), reversed(peaks))
