"""Configurations of :mod:`fedcmr_shared.models.cardiomm`: what the networks compute, by size."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final, Literal, get_args

from fedcmr_shared.errors import ConfigurationError

Variant = Literal["SM", "UT", "MT", "MM"]
"""No text; undersampling text; metadata text; both."""

_PER_LEVEL: Final = {
    "widths": 1,
    "prompt_widths": 1,
    "prompt_sizes": 1,
    "encoder_blocks": 0,
    "decoder_blocks": 0,
    "skip_blocks": 0,
}


def _at_least(name: str, value: int, lowest: int) -> None:
    if value < lowest:
        raise ConfigurationError(f"{name} {value} must be at least {lowest}")


@dataclass(frozen=True)
class UNetConfig:
    """Widths and block counts of one prompt U-Net; tuples run from fine to coarse level.

    ``pixel_unshuffle`` folds squares of pixels into channels before the first convolution: not in
    the paper, but cheaper on a CPU, as there are fewer positions. ``residual`` lets the network
    predict a correction that starts near zero: not in the paper, but small networks then learn in
    minutes.
    """

    features: int = 48
    widths: tuple[int, ...] = (72, 96, 120)
    prompt_widths: tuple[int, ...] = (24, 48, 72)
    prompt_sizes: tuple[int, ...] = (64, 32, 16)
    prompts: int = 3
    encoder_blocks: tuple[int, ...] = (2, 3, 3)
    decoder_blocks: tuple[int, ...] = (2, 2, 3)
    skip_blocks: tuple[int, ...] = (1, 1, 1)
    bottleneck_blocks: int = 3
    pixel_unshuffle: int = 1
    residual: bool = False

    def __post_init__(self) -> None:
        for name in ("features", "prompts", "pixel_unshuffle"):
            _at_least(name, getattr(self, name), 1)
        _at_least("bottleneck_blocks", self.bottleneck_blocks, 0)
        for name, lowest in _PER_LEVEL.items():
            values = getattr(self, name)
            if len(values) != len(self.widths) or not values:
                raise ConfigurationError(
                    f"{name} has {len(values)} values: give one for each level of widths"
                )
            for value in values:
                _at_least(name, value, lowest)

    @property
    def multiple(self) -> int:
        """Image sizes are padded to multiples of this."""
        return self.pixel_unshuffle << len(self.widths)


@dataclass(frozen=True)
class CardioMMConfig:
    """Everything that changes what a CardioMM network computes.

    ``text_width`` is the width of the text encoder, ``embedding_width`` that of the projections.
    ``consistency_start`` is the first data-consistency weight: 1 as published; near 0 a small
    network profits from the measured samples at once.
    """

    cascades: int = 10
    unet: UNetConfig = UNetConfig()
    sensitivity: UNetConfig = field(
        default_factory=lambda: UNetConfig(
            features=24, widths=(36, 48, 60), prompt_widths=(12, 24, 36)
        )
    )
    text_width: int = 512
    embedding_width: int = 256
    consistency_start: float = 1.0
    variant: Variant = "MM"
    legacy_projection: bool = False

    def __post_init__(self) -> None:
        for name in ("cascades", "text_width", "embedding_width"):
            _at_least(name, getattr(self, name), 1)
        if self.variant not in get_args(Variant):
            known = ", ".join(get_args(Variant))
            raise ConfigurationError(f"variant {self.variant!r} is unknown: use {known}")

    @property
    def metadata_width(self) -> int | None:
        """Width of the metadata embedding; None for variants without it."""
        return self.embedding_width if self.variant in ("MT", "MM") else None

    @property
    def sampling_width(self) -> int | None:
        """Width of the undersampling embedding; None for variants without it."""
        return self.embedding_width if self.variant in ("UT", "MM") else None


_TINY = UNetConfig(
    features=16,
    widths=(24,),
    prompt_widths=(4,),
    prompt_sizes=(24,),
    encoder_blocks=(1,),
    decoder_blocks=(0,),
    skip_blocks=(0,),
    bottleneck_blocks=1,
    pixel_unshuffle=2,
    residual=True,
)

_SMALL = UNetConfig(
    features=24,
    widths=(24, 32, 48),
    prompt_widths=(8, 12, 16),
    prompt_sizes=(48, 24, 12),
    encoder_blocks=(1, 1, 1),
    decoder_blocks=(1, 1, 1),
    skip_blocks=(0, 0, 0),
    bottleneck_blocks=1,
    pixel_unshuffle=2,
    residual=True,
)

CONFIGS: Final[dict[str, CardioMMConfig]] = {
    "tiny": CardioMMConfig(
        cascades=5,
        unet=_TINY,
        sensitivity=replace(_TINY, features=8, widths=(8,), encoder_blocks=(0,), pixel_unshuffle=4),
        embedding_width=32,
        consistency_start=0.1,
    ),
    "small": CardioMMConfig(
        cascades=4, unet=_SMALL, sensitivity=_TINY, embedding_width=64, consistency_start=0.1
    ),
    "paper": CardioMMConfig(),
}
"""Configurations by size: `paper` as published; `tiny` trains in seconds on one CPU core."""
