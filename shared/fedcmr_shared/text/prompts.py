"""Sentences that tell the text encoder how a scan was acquired and undersampled.

They follow the templates of CardioMM (arXiv 2512.21652): one sentence about population, scanner,
contrast and view, one about the undersampling. Disease and centre are left out on purpose, so
that the network cannot reconstruct what a diagnosis or a hospital makes likely.
"""

from __future__ import annotations

from typing import Final

from fedcmr_shared.kspace.masks import Sampling
from fedcmr_shared.schemas.acquisition import AcquisitionMetadata
from fedcmr_shared.schemas.job import Pattern

_UNKNOWN: Final = "unknown"

# The words of CardioMM, where they differ from our vocabulary. Its aorta scans are labelled cine.
_MODALITY_WORDS: Final = {
    "T1rho mapping": "T1 rho mapping",
    "LGE": "late Gadolinium enhancement",
    "black blood": "blackblood",
    "aorta": "cine",
}

_PATTERN_WORDS: Final[dict[Pattern, str]] = {
    "uniform": "uniform",
    "kt-uniform": "uniform",
    "random": "random",
    "kt-gaussian": "random",
    "radial": "radial",
    "kt-radial": "radial",
}


def metadata_text(metadata: AcquisitionMetadata) -> str:
    """Return the metadata sentence of a scan; what is missing is said to be unknown.

    Example: ``Adult cardiac MRI reconstruction. Vendor: 3.0T Siemens Vida. Modality: cine,
    short-axis.``
    """
    life_span = _word(metadata.life_span).capitalize()
    scanner = f"{_field(metadata)} {_word(metadata.vendor)} {_word(metadata.scanner)}"
    modality = _word(metadata.modality)
    modality = _MODALITY_WORDS.get(modality, modality)
    return (
        f"{life_span} cardiac MRI reconstruction. Vendor: {scanner}. "
        f"Modality: {modality}, {_word(metadata.view)}."
    )


def sampling_text(sampling: Sampling) -> str:
    """Return the undersampling sentence: nominal acceleration factor and kind of pattern.

    Test patterns are named by the training pattern that they belong to. Example:
    ``Undersampling: 8x uniform.``
    """
    return f"Undersampling: {sampling.acceleration:g}x {_PATTERN_WORDS[sampling.pattern]}."


def _field(metadata: AcquisitionMetadata) -> str:
    # Two digits at most and one at least, as in 0.55T and 3.0T.
    tesla = metadata.field_strength_t
    return f"{_UNKNOWN} field" if tesla is None else f"{round(tesla, 2)}T"


def _word(value: str | None) -> str:
    return " ".join(value.split()) if value and value.strip() else _UNKNOWN
