"""The gradient engine that a job names."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from torch import nn

from fedcmr_shared.privacy.isolation import IsolatedEngine, refuse_carriers
from fedcmr_shared.privacy.mechanism import BackwardEngine, Loss
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
) -> IsolatedEngine[Example]:
    """Return the engine called ``name``, checked to be exact for ``module``.

    It refuses networks that carry data between patients past the mechanism; see
    :mod:`fedcmr_shared.privacy.isolation`.

    ``synthetic`` makes float64 examples for the check of
    :meth:`~fedcmr_shared.privacy.per_example.PerExampleEngine.check_exact`, never patients' data:
    whether a site refuses must not depend on them. It is not called for engine `backward`.

    Raises:
        JobRefused: the engine is not exact for this module (code ``engine``), or the module
            carries data between patients (code ``model``).
    """
    refuse_carriers(module)
    if name == "backward":
        return IsolatedEngine(BackwardEngine(parameters, loss_of(module)), module)
    # Opacus takes seconds to import, and most sites never need it.
    from fedcmr_shared.privacy.per_example import PerExampleEngine

    engine = PerExampleEngine(module, parameters, loss_of, mode=name, shape_of=shape_of)
    engine.check_exact(synthetic())
    return IsolatedEngine(engine, module)
