"""Divides the patients of one store among virtual sites, so that imported scans can be federated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from fedcmr_client.store.scan_file import ScanFile, ScanSource
from fedcmr_client.store.site_store import ScanRecord, SiteStore
from fedcmr_client.store.split import SPLITS, SplitFractions
from fedcmr_shared.errors import DataError
from fedcmr_simulations.balanced_split import balanced_secret

FRACTIONS = SplitFractions(train=0.6, validation=0.15, test=0.25)
"""Shares that leave something to evaluate in a small virtual site."""


def partition(
    store: Path, out: Path, sites: int, seed: int, on_patient: Callable[[str], None]
) -> list[Path]:
    """Copy the scans of ``store`` into ``sites`` new stores below ``out``; return these.

    Patients are dealt out in an order drawn from ``seed``, so that no site has two more than
    another. A scan keeps its samples, metadata and truth; patients get new pseudonyms.

    Raises:
        DataError: ``out`` is not empty, or there are fewer than three patients for a site.
    """
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out} is not empty: choose another folder for the sites")
    with SiteStore.open(store) as source:
        by_patient: dict[str, list[ScanRecord]] = {}
        for record in source.scans():
            by_patient.setdefault(record.patient, []).append(record)
    if len(by_patient) < sites * len(SPLITS):
        raise DataError(
            f"{store} has {len(by_patient)} patients: {sites} sites need {sites * len(SPLITS)}, "
            "so that each can train, validate and test; lower --sites"
        )
    order = np.random.default_rng(seed).permutation(sorted(by_patient))
    roots = [out / f"site-{number + 1}" for number in range(sites)]
    for number, root in enumerate(roots):
        own = [str(patient) for patient in order[number::sites]]
        secret = balanced_secret(f"{root.name} {seed}", own, FRACTIONS)
        with SiteStore.create(root, secret=secret) as site:
            site.set_split(FRACTIONS)
            for done, patient in enumerate(own, start=1):
                for record in by_patient[patient]:
                    _copy(record, site)
                # No pseudonym: what is printed ends up in logs.
                on_patient(f"{root.name} {done}/{len(own)}")
    return roots


def _copy(record: ScanRecord, site: SiteStore) -> None:
    with ScanFile(record.path) as scan:

        def images() -> Iterator[tuple[int, int, np.ndarray]]:
            for frame in range(record.metadata.frames):
                for slice_index in range(record.metadata.slices):
                    yield frame, slice_index, scan.image(frame, slice_index)

        site.add(
            ScanSource(
                patient=record.patient,
                metadata=record.metadata,
                images=images,
                truth=scan.truth,
                noise_covariance=scan.noise_covariance,
                source=str(record.path),
            )
        )
