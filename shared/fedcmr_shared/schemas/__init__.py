"""Versioned pydantic schemas that all parties exchange."""

from pydantic import BaseModel

from fedcmr_shared.schemas.acquisition import AcquisitionMetadata, UnknownVocabularyWarning
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.policy import SitePolicy

__all__ = ["SCHEMAS", "AcquisitionMetadata", "JobSpec", "SitePolicy", "UnknownVocabularyWarning"]

SCHEMAS: dict[str, type[BaseModel]] = {
    "acquisition": AcquisitionMetadata,
    "job": JobSpec,
    "policy": SitePolicy,
}
"""Public schemas by name, as `fedcmr schema show NAME` exports them."""
