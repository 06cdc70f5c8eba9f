"""A sites folder: one site store per sub-folder, each a virtual hospital."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context

from fedcmr_client.agent import SiteAgent
from fedcmr_client.app import SiteWork
from fedcmr_client.site_home import SiteHome
from fedcmr_client.store.site_store import SiteStore
from fedcmr_client.store.split import SPLITS
from fedcmr_shared.errors import DataError
from fedcmr_shared.schemas.job import CohortQuery
from fedcmr_simulations.unprotected import UnprotectedSite


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


def choose_sites(folder: Path, sites: int, query: CohortQuery) -> list[Path]:
    """Return the first ``sites`` sites of ``folder`` after checking that each can take part.

    Raises:
        DataError: there are fewer sites, or one has no patient in a part of its split.
    """
    stores = site_folders(folder)
    if len(stores) < sites:
        raise DataError(f"{folder} holds {len(stores)} sites, not {sites}: lower --sites")
    for store in stores[:sites]:
        with SiteStore.open(store) as site:
            empty = [part for part in SPLITS if not site.cohort(part, query)]
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


@dataclass(frozen=True)
class SimulatedSites:
    """Finds who answers for a virtual node by Flower's partition number.

    ``places`` are policy files of sites that train privately, or store folders of those that do
    not.
    """

    places: tuple[Path, ...]

    def __call__(self, context: Context) -> SiteWork:
        """Return the site of the node in ``context``."""
        place = self.places[int(context.node_config["partition-id"])]
        if place.is_dir():
            return UnprotectedSite(place)
        # One thread a process: more contend, and sums would depend on their number.
        return SiteAgent(SiteHome.open(place), threads=1)
