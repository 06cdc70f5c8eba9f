"""The gradient engine that a job names."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from torch import nn

from fedcmr_shared.privacy.mechanism import BackwardEngine, Engine, Loss
from fedcmr_shared.schemas.privacy import Engine as EngineName

Example = TypeVar("Example")


def engine_for(
    name: EngineName,
    module: nn.Module,
    parameters: Sequence[nn.Parameter],
    loss_of: Callable[[nn.Module], Loss[Example]],
    *,
    synthetic: Callable[[], Sequence[Example]],
    shape_of: Callable[[Example], Hashable] = lambda _: None,
) -> Engine[Example]:
    """Return the engine called ``name``, checked to be exact for ``module``.

    ``synthetic`` makes float64 examples for the check of
    :meth:`~fedcmr_shared.privacy.per_example.PerExampleEngine.check_exact`, never patients' data:
    whether a site refuses must not depend on them. It is not called for engine `backward`.

    Raises:
        JobRefused: the engine is not exact for this module (code ``engine``).
    """
    if name == "backward":
        return BackwardEngine(parameters, loss_of(module))
    # Opacus takes seconds to import, and most sites never need it.
    from fedcmr_shared.privacy.per_example import PerExampleEngine

    engine = PerExampleEngine(module, parameters, loss_of, mode=name, shape_of=shape_of)
    engine.check_exact(synthetic())
    return engine
