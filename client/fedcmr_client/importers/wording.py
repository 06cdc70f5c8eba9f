"""From the words of file names, folders and headers to the vocabulary of the metadata."""

from __future__ import annotations

import re
from typing import Final

from fedcmr_shared.schemas import vocabulary

# Matched as whole words, so that T1map is never found inside T1mappost.
_MODALITIES: Final = {
    "cine": "cine",
    "t1map": "T1 mapping",
    "t1mapping": "T1 mapping",
    "t1mappost": "T1 mapping post",
    "t2map": "T2 mapping",
    "t2mapping": "T2 mapping",
    "t2smap": "T2 star mapping",
    "t1rho": "T1rho mapping",
    "t1rhomap": "T1rho mapping",
    "t1w": "T1 weighted",
    "t2w": "T2 weighted",
    "lge": "LGE",
    "perfusion": "perfusion",
    "tagging": "tagging",
    "flow2d": "phase contrast",
    "blackblood": "black blood",
    "aorta": "aorta",
}
_SPELLINGS: Final = {
    "t1 rho mapping": "T1rho mapping",
    "late gadolinium enhancement": "LGE",
    "blackblood": "black blood",
}
_VIEWS: Final = {
    "sax": "short-axis",
    "lax": "long-axis",
    "2ch": "long-axis",
    "3ch": "long-axis",
    "4ch": "long-axis",
    "lvot": "outflow tract",
    "rvot": "outflow tract",
    "sag": "sagittal aorta",
    "tra": "transversal aorta",
    "inplane": "in-plane",
    "throughplane": "through-plane",
}
_VENDORS: Final = {"siemens": "Siemens", "uih": "UIH", "ge": "GE", "philips": "Philips"}
_FIELDS: Final = {"055T": 0.55, "15T": 1.5, "30T": 3.0, "50T": 5.0}


def modality(*texts: str) -> str | None:
    """First modality word in ``texts``, each searched in turn, or None."""
    return _first(_MODALITIES, texts)


def view(*texts: str) -> str | None:
    """First view word in ``texts``, or None."""
    return _first(_VIEWS, texts)


def vendor(text: str) -> str | None:
    """Vendor named in a header or folder; an unknown one is returned as written."""
    return _first(_VENDORS, (text,)) or text.strip() or None


def scanner(text: str, vendor_name: str | None) -> str | None:
    """Scanner model in the vocabulary's spelling where it is known, as written otherwise."""
    models: tuple[str, ...] = vocabulary.SCANNERS.get(vendor_name or "", ())
    plain = _plain(text)
    known = {_plain(model): model for model in models}
    return known.get(plain) or text.strip() or None


def spelled(text: str) -> str | None:
    """A modality, view or life span in the vocabulary's spelling; unknown words stay."""
    words = (*vocabulary.MODALITIES, *vocabulary.VIEWS, *vocabulary.LIFE_SPANS)
    known = {word.lower(): word for word in words} | _SPELLINGS
    lowered = text.strip().lower()
    return None if lowered in {"", "unknown"} else known.get(lowered, text.strip())


def field_strength(text: str) -> float | None:
    """Field strength of a folder token (``055T``, ``15T``) or of a text such as ``3.0T``."""
    if text in _FIELDS:
        return _FIELDS[text]
    match = re.fullmatch(r"(\d+\.\d+)\s*T?", text.strip())
    return nominal_field(float(match.group(1))) if match else None


def nominal_field(tesla: float) -> float | None:
    """Nominal field strength within 10 % of a measured one (1.494 T is sold as 1.5 T)."""
    if tesla <= 0:
        return None
    near = [f for f in vocabulary.FIELD_STRENGTHS_T if abs(tesla - f) <= 0.1 * f]
    return near[0] if near else tesla


def _first(words: dict[str, str], texts: tuple[str, ...]) -> str | None:
    for text in texts:
        for token in re.split(r"[^a-z0-9]+", text.lower()):
            if token in words:
                return words[token]
    return None


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())
