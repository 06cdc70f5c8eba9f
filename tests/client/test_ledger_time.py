"""A site's ledger and the clock: entries in order, and checkpoints that tell nothing."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fedcmr_shared.errors import LedgerError
from fedcmr_shared.identity.keys import verify_signature
from fedcmr_shared.privacy.merkle import MerkleTree, leaf_hash, verify_consistency
from fedcmr_shared.schemas.ledger import Padding

if TYPE_CHECKING:
    from conftest import LedgerSite

NOON, HOUR = 1_800_000_000_000, 3_600_000  # milliseconds

# Clocks


def test_a_clock_that_fell_behind_stops_everything(north: LedgerSite) -> None:
    north.clock.now += HOUR
    job = north.admit()
    before = north.ledger.head()
    north.clock.now -= HOUR
    calls: list[Callable[[], object]] = [
        lambda: north.ledger.start(job, "train", 1),
        lambda: north.admit(north.job("another")),
        lambda: north.ledger.finish(job, "cancelled"),
        lambda: north.ledger.withdraw("p-0"),
        north.ledger.checkpoint,
    ]
    for call in calls:
        with pytest.raises(LedgerError, match="clock is behind the last entry by 3600 s"):
            call()
    assert north.ledger.head() == before
    north.ledger.set_clock()
    assert north.ledger.start(job, "train", 1) == 1
    assert [leaf.entry.at for leaf in north.ledger.leaves()] == [NOON, NOON + HOUR, NOON, NOON]


def test_a_clock_that_jumped_ahead_is_set_back_by_the_operator(north: LedgerSite) -> None:
    north.clock.now += 24 * 365 * HOUR
    job = north.admit()
    north.clock.now = NOON + 5
    with north.open() as again:
        with pytest.raises(LedgerError, match="clock is behind"):
            again.start(job, "train", 1)
        again.set_clock()
        again.start(job, "train", 1)
    with north.open() as again:
        assert again.budget.clock == NOON + 5
        assert again.budget.jobs[job].starts == {"train": 1}


def test_clocks_of_two_machines_may_differ_a_little(north: LedgerSite) -> None:
    job = north.admit()
    north.clock.now -= 900
    north.ledger.start(job, "train", 1)
    assert [leaf.entry.at for leaf in north.ledger.leaves()] == [NOON] * 3


# Outward checkpoints


def test_checkpoints_follow_the_clock_alone(new_site: LedgerSite, tmp_path: Path) -> None:
    def life(name: str, busy: bool) -> list[tuple[int, int]]:
        site = type(new_site)(tmp_path / name)
        with site.create() as site.ledger:
            job = site.admit() if busy else None
            seen = []
            for hours in (0, 0.5, 1, 4.2):
                site.clock.now = NOON + round(hours * HOUR)
                if job is not None:
                    site.ledger.refuse(job, "declined", "budget")
                head = site.ledger.checkpoint()
                verify_signature(site.ledger.public_key, head.signature, head.signed_bytes())
                seen.append((head.at, head.size))
        return seen

    assert life("idle", busy=False) == life("busy", busy=True)
    assert life("again", busy=False) == [
        (NOON, 10),
        (NOON, 10),
        (NOON + HOUR, 20),
        (NOON + 4 * HOUR, 50),
    ]


def test_the_same_interval_gives_the_same_checkpoint(north: LedgerSite) -> None:
    first = north.ledger.checkpoint()
    north.clock.now += HOUR - 1
    north.admit()
    assert north.ledger.checkpoint() == first
    assert north.ledger.checkpoints() == [first]
    assert north.ledger.checkpoint(north.clock.now + 1) != first
    assert north.kinds().count("padding") == 9 + 9


def test_checkpoints_are_consistent_with_each_other_and_the_log(north: LedgerSite) -> None:
    for hour in range(4):
        north.clock.now = NOON + hour * HOUR
        north.admit(north.job(f"job-{hour}", noise=8.0))
        north.ledger.checkpoint()
    tree = MerkleTree(leaf_hash(leaf.content()) for leaf in north.ledger.leaves())
    heads = north.ledger.checkpoints()
    assert [head.size for head in heads] == [10, 20, 30, 40]
    for old, new in pairwise(heads):
        proof = tree.consistency_proof(old.size, new.size)
        roots = [bytes.fromhex(head.root) for head in (old, new)]
        verify_consistency(old.size, roots[0], new.size, roots[1], proof)
    with north.open() as again:
        assert again.checkpoints() == heads


def test_a_busy_interval_waits_for_the_next_checkpoints(north: LedgerSite) -> None:
    for _ in range(14):
        north.ledger.refuse(north.job().sha256, "declined", "budget")
    tree = MerkleTree(leaf_hash(leaf.content()) for leaf in north.ledger.leaves())
    first = north.ledger.checkpoint()
    assert (first.size, first.root) == (10, tree.root(10).hex())
    assert "padding" not in north.kinds()
    north.clock.now += HOUR
    assert north.ledger.checkpoint().size == 20
    assert north.kinds().count("padding") == 5


def test_published_sizes_never_fall(north: LedgerSite) -> None:
    north.clock.now += 3 * HOUR
    last = north.ledger.checkpoint()
    north.clock.now -= 2 * HOUR
    north.ledger.set_clock()
    assert north.ledger.checkpoint() == last
    north.clock.now += 3 * HOUR
    assert north.ledger.checkpoint().size == 50


def test_a_clock_absurdly_far_ahead_is_not_padded_up_to(north: LedgerSite) -> None:
    before = north.ledger.head()
    with pytest.raises(LedgerError, match="the clock is years ahead"):
        north.ledger.checkpoint(NOON + 200_000 * HOUR)
    with pytest.raises(LedgerError, match="clock is behind the ledger's first entry"):
        north.ledger.checkpoint(NOON - 1)
    assert north.ledger.head() == before


def test_padding_is_indistinguishable_by_size_of_proofs_and_is_real(north: LedgerSite) -> None:
    north.ledger.checkpoint()
    padding = [leaf for leaf in north.ledger.leaves() if isinstance(leaf.entry, Padding)]
    assert len(padding) == 9
    assert len({leaf.salt for leaf in padding}) == 9
