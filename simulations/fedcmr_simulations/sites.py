"""A sites folder: one site store per sub-folder, each a virtual hospital."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context

from fedcmr_client.app import Site
from fedcmr_client.store.site_store import SiteStore
from fedcmr_client.store.split import SPLITS
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


def choose_sites(folder: Path, count: int, modalities: tuple[str, ...] | None) -> list[Path]:
    """Return the first ``count`` sites of ``folder`` after checking that each can take part.

    Raises:
        DataError: there are fewer sites, or one has no patient in a part of its split.
    """
    stores = site_folders(folder)
    if len(stores) < count:
        raise DataError(f"{folder} holds {len(stores)} sites, not {count}: lower --sites")
    for store in stores[:count]:
        with SiteStore.open(store) as site:
            empty = [part for part in SPLITS if not site.scans(part, modalities)]
        if empty:
            raise DataError(
                f"site {store.name} has no {empty[0]} patient: import more patients or change "
                f"the fractions with `fedcmr data split --store {store}`"
            )
    return stores[:count]


def data_origin(stores: list[Path]) -> str:
    """Say where the sites' k-space came from: measured, simulated, synthesised or a mixture."""
    origins: set[str] = set()
    for path in stores:
        with SiteStore.open(path) as store:
            origins.update(record.metadata.origin for record in store.scans())
    return " and ".join(sorted(origins))


@dataclass(frozen=True)
class SimulatedSites:
    """Finds the store of a virtual node by Flower's partition number."""

    stores: tuple[Path, ...]

    def __call__(self, context: Context) -> Site:
        """Return the site of the node in ``context``."""
        store = self.stores[int(context.node_config["partition-id"])]
        # One thread a process: more contend, and sums would depend on their number.
        return Site(name=store.name, store=store, threads=1)
