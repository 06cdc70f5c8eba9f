"""All phenotypes that one short-axis stack allows: 61 of the 82, if everything passes its check."""

from __future__ import annotations

from fedcmr_shared.metrics.phenotypes.motion import Images, strains
from fedcmr_shared.metrics.phenotypes.short_axis import ShortAxis, volumes
from fedcmr_shared.metrics.phenotypes.wall import wall_thickness


def measure(heart: ShortAxis, images: Images | None = None) -> dict[str, float]:
    """Phenotypes by name in the units of the table; what cannot be trusted is missing.

    ``images`` [frame, slice, y, x] let strains see the texture; without them the labels are
    followed.

    Raises:
        DataError: ``images`` do not fit the labels or are not finite.
    """
    return volumes(heart) | wall_thickness(heart) | strains(heart, images)
