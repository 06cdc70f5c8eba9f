"""A sites folder: one site store per sub-folder, each a virtual hospital."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from flwr.app import Context

from fedcmr_client.app import Site
from fedcmr_client.store.pseudonyms import pseudonym
from fedcmr_client.store.site_store import SiteStore
from fedcmr_client.store.split import SPLITS, SplitFractions, split_of, split_position
from fedcmr_shared.errors import DataError


def site_folders(folder: Path) -> list[Path]:
    """Return the site stores below ``folder``, sorted by name.

    Raises:
        DataError: the folder is missing or holds no store.
    """
    if not folder.is_dir():
        raise DataError(
            f"sites folder {folder} does not exist: give the folder that holds the sites"
        )
    stores = sorted(path.parent for path in folder.glob("*/site.toml"))
    if not stores:
        raise DataError(
            f"{folder} holds no site store: make one with `fedcmr simulate phantom {folder}` "
            "or `fedcmr data import`"
        )
    return stores


def choose_sites(folder: Path, sites: int, modalities: tuple[str, ...] | None) -> list[Path]:
    """Return the first ``sites`` sites of ``folder`` after checking that each can take part.

    Raises:
        DataError: there are fewer sites, or one has no patient in a part of its split.
    """
    stores = site_folders(folder)
    if len(stores) < sites:
        raise DataError(f"{folder} holds {len(stores)} sites, not {sites}: lower --sites")
    for store in stores[:sites]:
        with SiteStore.open(store) as site:
            empty = [part for part in SPLITS if not site.scans(part, modalities)]
        if empty:
            raise DataError(
                f"site {store.name} has no {empty[0]} patient: import more patients or change "
                f"the fractions with `fedcmr data split --store {store}`"
            )
    return stores[:sites]


def data_origin(stores: list[Path]) -> str:
    """Say where the sites' k-space came from: measured, simulated, synthesised or a mixture."""
    origins: set[str] = set()
    for path in stores:
        with SiteStore.open(path) as store:
            origins.update(record.metadata.origin for record in store.scans())
    return " and ".join(sorted(origins))


def balanced_secret(label: str, patients: Sequence[str], fractions: SplitFractions) -> bytes:
    """Return the first secret derived from ``label`` whose split of ``patients`` is balanced.

    Each part then has at least one patient and differs from its expected number by less than one.
    Only virtual sites may choose their secret so: a hospital's is random.

    Raises:
        DataError: there are fewer patients than parts.
    """
    if len(patients) < len(SPLITS):
        raise DataError(
            f"a virtual site needs {len(SPLITS)} patients, one for each part of its split, "
            f"not {len(patients)}: use fewer sites or more patients"
        )
    secrets = (
        hashlib.sha256(f"fedcmr virtual site {label} {attempt}".encode()).digest()
        for attempt in count()
    )
    return next(secret for secret in secrets if _is_balanced(secret, patients, fractions))


def _is_balanced(secret: bytes, patients: Sequence[str], fractions: SplitFractions) -> bool:
    places = (split_position(secret, pseudonym(secret, patient)) for patient in patients)
    counts = Counter(split_of(place, fractions) for place in places)
    return all(
        counts[part] >= 1 and abs(counts[part] - len(patients) * getattr(fractions, part)) < 1
        for part in SPLITS
    )


@dataclass(frozen=True)
class SimulatedSites:
    """Finds the store of a virtual node by Flower's partition number."""

    stores: tuple[Path, ...]

    def __call__(self, context: Context) -> Site:
        """Return the site of the node in ``context``."""
        store = self.stores[int(context.node_config["partition-id"])]
        # One thread a process: more contend, and sums would depend on their number.
        return Site(name=store.name, store=store, threads=1)
