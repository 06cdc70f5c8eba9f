"""Versioned pydantic schemas that all parties exchange."""

from pydantic import BaseModel

from fedcmr_shared.schemas.acquisition import AcquisitionMetadata, UnknownVocabularyWarning
from fedcmr_shared.schemas.job import JobSpec

__all__ = ["SCHEMAS", "AcquisitionMetadata", "JobSpec", "UnknownVocabularyWarning"]

SCHEMAS: dict[str, type[BaseModel]] = {"acquisition": AcquisitionMetadata, "job": JobSpec}
"""Public schemas by name, as `fedcmr schema show NAME` exports them."""
