import hashlib

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedcmr_shared.errors import LedgerError
from fedcmr_shared.privacy.merkle import (
    EMPTY_ROOT,
    Frontier,
    MerkleTree,
    leaf_hash,
    node_hash,
    verify_consistency,
    verify_inclusion,
)

# The test vectors of the certificate-transparency reference implementation.
INPUTS = [
    "",
    "00",
    "10",
    "2021",
    "3031",
    "40414243",
    "5051525354555657",
    "606162636465666768696a6b6c6d6e6f",
]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
# Audit path of entry 5 and consistency proof from 6 entries, in the tree of all eight (from the
# same reference).
PATH_OF_5 = [
    "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
]
FROM_6_TO_8 = [
    "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
    "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
]
LAWS = settings(max_examples=60)


def leaves(count: int) -> list[bytes]:
    return [leaf_hash(str(number).encode()) for number in range(count)]


def recursive_root(hashes: list[bytes]) -> bytes:
    """The definition of RFC 6962, section 2.1, word for word."""
    if len(hashes) == 1:
        return hashes[0]
    split = 1
    while 2 * split < len(hashes):
        split *= 2
    return node_hash(recursive_root(hashes[:split]), recursive_root(hashes[split:]))


@pytest.fixture(scope="module")
def reference() -> MerkleTree:
    return MerkleTree(leaf_hash(bytes.fromhex(text)) for text in INPUTS)


def test_known_roots(reference: MerkleTree) -> None:
    assert [reference.root(size).hex() for size in range(1, 9)] == ROOTS
    assert reference.root(0) == EMPTY_ROOT == hashlib.sha256().digest()
    assert reference.root().hex() == ROOTS[-1]


def test_known_proofs(reference: MerkleTree) -> None:
    assert [node.hex() for node in reference.inclusion_proof(5, 8)] == PATH_OF_5
    assert [node.hex() for node in reference.consistency_proof(6, 8)] == FROM_6_TO_8
    assert reference.consistency_proof(8, 8) == []
    assert reference.inclusion_proof(0, 1) == []


@given(st.integers(1, 70))
@LAWS
def test_the_edge_and_the_tree_have_the_root_of_the_definition(count: int) -> None:
    hashes = leaves(count)
    expected = recursive_root(hashes)
    assert MerkleTree(hashes).root() == expected
    assert Frontier().extend(hashes).root() == expected
    middle = Frontier().extend(hashes[: count // 2])
    assert middle.extend(hashes[count // 2 :]) == Frontier().extend(hashes)
    assert MerkleTree(leaves(100)).root(count) == expected


def test_the_edge_of_nothing_has_the_empty_root() -> None:
    assert Frontier().root() == EMPTY_ROOT
    assert Frontier().extend([]) == Frontier()


def test_all_proofs_of_small_trees_hold() -> None:
    hashes = leaves(20)
    tree = MerkleTree(hashes)
    for size in range(1, 21):
        root = tree.root(size)
        for index in range(size):
            proof = tree.inclusion_proof(index, size)
            verify_inclusion(hashes[index], index, size, proof, root)
        for old in range(1, size + 1):
            verify_consistency(old, tree.root(old), size, root, tree.consistency_proof(old, size))


@given(st.integers(1, 300), st.data())
@LAWS
def test_a_changed_inclusion_proof_is_rejected(size: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, size - 1))
    hashes = leaves(size)
    tree = MerkleTree(hashes)
    proof, root = tree.inclusion_proof(index, size), tree.root()
    verify_inclusion(hashes[index], index, size, proof, root)
    other = data.draw(st.integers(0, size - 1))
    wrong = [
        (leaf_hash(b"another"), index, size, proof, root),
        (hashes[index], index, size, proof, leaf_hash(b"another")),
        (hashes[index], index, size, [*proof, root], root),
        (hashes[index], -1, size, proof, root),
        (hashes[index], size, size, proof, root),
    ]
    if other != index:
        wrong.append((hashes[index], other, size, proof, root))
    if proof:
        place = data.draw(st.integers(0, len(proof) - 1))
        changed = [*proof]
        changed[place] = bytes([changed[place][0] ^ 1]) + changed[place][1:]
        wrong += [
            (hashes[index], index, size, changed, root),
            (hashes[index], index, size, proof[:-1], root),
            (hashes[index], index, size, proof[1:], root),
        ]
    for arguments in wrong:
        with pytest.raises(LedgerError, match="inclusion proof does not hold"):
            verify_inclusion(*arguments)


@given(st.integers(2, 300), st.data())
@LAWS
def test_a_changed_consistency_proof_is_rejected(size: int, data: st.DataObject) -> None:
    old = data.draw(st.integers(1, size - 1))
    tree = MerkleTree(leaves(size))
    proof, old_root, root = tree.consistency_proof(old, size), tree.root(old), tree.root()
    verify_consistency(old, old_root, size, root, proof)
    place = data.draw(st.integers(0, len(proof) - 1))
    changed = [*proof]
    changed[place] = bytes([changed[place][0] ^ 1]) + changed[place][1:]
    another = leaf_hash(b"another")
    for arguments in [
        (old, another, size, root, proof),
        (old, old_root, size, another, proof),
        (old, old_root, size, root, changed),
        (old, old_root, size, root, proof[:-1]),
        (old, old_root, size, root, [*proof, root]),
        (old, old_root, size, root, []),
        (size, root, old, old_root, proof),
        (0, EMPTY_ROOT, size, root, proof),
        (old, old_root, old, another, []),
        (old, old_root, old, old_root, proof),
    ]:
        with pytest.raises(LedgerError, match="forked, shortened or changed"):
            verify_consistency(*arguments)


@given(st.integers(2, 100), st.data())
@LAWS
def test_a_forked_log_has_no_consistency_proof(size: int, data: st.DataObject) -> None:
    old = data.draw(st.integers(1, size - 1))
    changed = data.draw(st.integers(0, old - 1))
    hashes = leaves(size)
    forked = [*hashes]
    forked[changed] = leaf_hash(b"another past")
    assume(forked != hashes)
    tree, fork = MerkleTree(hashes), MerkleTree(forked)
    with pytest.raises(LedgerError, match="does not begin with that of"):
        verify_consistency(
            old, tree.root(old), size, fork.root(), fork.consistency_proof(old, size)
        )


def test_proofs_of_absent_leaves_and_trees_are_refused() -> None:
    tree = MerkleTree(leaves(5))
    for ask in (
        lambda: tree.root(6),
        lambda: tree.root(-1),
        lambda: tree.inclusion_proof(5, 5),
        lambda: tree.inclusion_proof(-1, 5),
        lambda: tree.inclusion_proof(0, 6),
        lambda: tree.consistency_proof(0, 5),
        lambda: tree.consistency_proof(4, 3),
        lambda: tree.consistency_proof(3, 6),
    ):
        with pytest.raises(LedgerError, match="the log of 5 entries has no such tree or entry"):
            ask()
    with pytest.raises(LedgerError, match="has 32 bytes, not 3"):
        tree.append(b"abc")
    assert tree.size == 5


def test_leaves_and_nodes_are_told_apart() -> None:
    left, right = leaves(2)
    assert leaf_hash(left + right) != node_hash(left, right)
    assert MerkleTree([left, right]).root() == node_hash(left, right)
