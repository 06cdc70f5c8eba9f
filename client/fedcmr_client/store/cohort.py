"""Which scans a job may use: what its query asks for, within the limits that the site sets."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import date

from fedcmr_shared.schemas.acquisition import AcquisitionMetadata
from fedcmr_shared.schemas.job import CohortQuery


@dataclass(frozen=True)
class CohortFilter:
    """Words and days that a scan must have; None does not restrict. Both days are included.

    A scan that does not say its modality, view, vendor or date never passes a limit on it.
    """

    modalities: Collection[str] | None = None
    views: Collection[str] | None = None
    vendors: Collection[str] | None = None
    acquired_from: date | None = None
    acquired_until: date | None = None

    @classmethod
    def of(cls, query: CohortQuery) -> CohortFilter:
        """Return what a job's query asks for."""
        return cls(**{name: getattr(query, name) for name in CohortQuery.model_fields})

    def admits(self, scan: AcquisitionMetadata) -> bool:
        """Whether ``scan`` passes every limit."""
        return (
            _listed(scan.modality, self.modalities)
            and _listed(scan.view, self.views)
            and _listed(scan.vendor, self.vendors)
            and self._in_time(scan.acquired_on)
        )

    def _in_time(self, day: date | None) -> bool:
        if self.acquired_from is None and self.acquired_until is None:
            return True
        return (
            day is not None
            and (self.acquired_from is None or self.acquired_from <= day)
            and (self.acquired_until is None or day <= self.acquired_until)
        )


def _listed(word: str | None, words: Collection[str] | None) -> bool:
    return words is None or word in words
