"""Dividing a store among virtual sites loses no scan and keeps patients whole."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fedcmr_client.store.site_store import SiteStore
from fedcmr_shared.errors import DataError
from fedcmr_simulations.partition import FRACTIONS, partition


def digests(root: Path) -> dict[str, str]:
    with SiteStore.open(root) as store:
        return {record.digest: record.patient for record in store.scans()}


def test_every_scan_lands_in_one_site(make_site: Callable[..., Path], tmp_path: Path) -> None:
    store = make_site(patients=11)
    notes: list[str] = []
    roots = partition(store, tmp_path / "out", 3, seed=1, on_patient=notes.append)
    parts = [digests(root) for root in roots]
    assert sorted(len(part) for part in parts) == [3, 4, 4]
    assert set().union(*parts) == set(digests(store))
    assert sum(map(len, parts)) == 11 == len(notes)
    for root in roots:
        with SiteStore.open(root) as site:
            assert site.verify() == []
            counts = site.split_counts()
        assert all(counts.values())
        for part, number in counts.items():
            assert abs(number - sum(counts.values()) * getattr(FRACTIONS, part)) < 1


def test_the_seed_decides_who_goes_where(make_site: Callable[..., Path], tmp_path: Path) -> None:
    store = make_site(patients=6)

    def divide(name: str, seed: int) -> list[set[str]]:
        roots = partition(store, tmp_path / name, 2, seed, lambda _: None)
        return [set(digests(root)) for root in roots]

    assert divide("a", 1) == divide("b", 1) != divide("c", 2)


def test_more_sites_than_patients_are_refused(
    make_site: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="3 sites need 9"):
        partition(make_site(patients=8), tmp_path / "out", 3, 0, lambda _: None)
    assert not (tmp_path / "out").exists()


def test_a_used_folder_is_refused(make_site: Callable[..., Path]) -> None:
    store = make_site(patients=3)
    with pytest.raises(DataError, match="not empty"):
        partition(store, store, 1, 0, lambda _: None)
