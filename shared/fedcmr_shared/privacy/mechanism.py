"""One private step: a noisy sum of the patients' clipped gradients (DP-SGD, the patient as unit).

After Abadi et al. (arXiv 1607.00133) with the unit of Charles et al. (arXiv 2407.07737):

1. each drawn patient contributes the gradient of its mean loss over its own examples;
2. a contribution of non-finite norm counts as zero, any other is scaled to norm <= C;
3. Gaussian noise of standard deviation sigma * C is added to the sum once, also when nobody was
   drawn;
4. the sum is divided by a public number of patients.

Removing one patient (replacing its contribution by zero) moves the sum by at most C. That holds
for every model and loss in which examples of one patient meet no statistics of another one, since
each patient has a backward pass of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.privacy.noise import gaussian
from fedcmr_shared.schemas.privacy import Clipping, PrivacySpec

Example = TypeVar("Example")
Example_contra = TypeVar("Example_contra", contravariant=True)


class Loss(Protocol[Example_contra]):
    """Losses of examples; the loss of one must not depend on the others."""

    def __call__(self, examples: Sequence[Example_contra], /) -> Tensor:
        """Return one loss for each of at least one example, a tensor [len(examples)]."""


@dataclass(frozen=True)
class Mechanism:
    """The public numbers of a private step.

    ``expected_patients`` is sampling rate times coarse cohort size; ``clip_norm`` is C. With
    *per-layer* clipping each of L parameter tensors is clipped to C / sqrt(L), so that the whole
    still moves by at most C and the accounting is the same.

    With ``levels`` contributions are vectors of whole numbers of norm <= ``levels`` instead, for
    noise that several sites make together (:mod:`fedcmr_shared.privacy.distributed`).

    Raises:
        ConfigurationError: a value is not positive and finite.
    """

    clip_norm: float
    noise_multiplier: float
    expected_patients: float
    clipping: Clipping = "flat"
    levels: int | None = None

    def __post_init__(self) -> None:
        for name in ("clip_norm", "noise_multiplier", "expected_patients"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigurationError(f"{name} is {value}: it must be positive and finite")

    @classmethod
    def of(cls, privacy: PrivacySpec, weight: float) -> Mechanism:
        """Return the mechanism of a site of the given size-class weight."""
        return cls(
            clip_norm=privacy.clip_norm,
            noise_multiplier=privacy.noise_multiplier,
            expected_patients=privacy.sampling_rate * privacy.cohort_size * weight,
            clipping=privacy.clipping,
            levels=None if privacy.distributed is None else privacy.distributed.levels,
        )

    def grid_scale(self, values: int) -> float:
        """Return the grid steps in one unit of a gradient of ``values`` values; 1 without levels.

        Rounding to whole steps moves a vector by at most sqrt(values) / 2. A norm of C becomes that
        much less than ``levels``, and 2^-20 of them less for the rounding of float64 itself. So
        every rounded vector has a norm of at most ``levels``.

        Raises:
            ConfigurationError: ``levels`` are too few for so many values.
        """
        if self.levels is None:
            return 1.0
        radius = self.levels * (1 - _ARITHMETIC) - math.sqrt(values) / 2
        if not (radius >= self.levels / 4 and math.isfinite(self.levels / self.clip_norm)):
            raise ConfigurationError(
                f"{self.levels} levels are too few for {values} values and a clip norm of "
                f"{self.clip_norm:g}: raise distributed.levels"
            )
        return radius / self.clip_norm


@dataclass
class ClippedSum:
    """Sum of clipped contributions: one float64 vector over all parameters of ``shapes``.

    With levels it holds whole numbers, which float64 adds exactly up to 2^53. Complex parameters
    count as real pairs ``[..., 2]``. ``patients``, ``clipped`` and ``non_finite`` count
    contributions. They depend on the data: show them at the site only.
    """

    vector: Tensor
    shapes: Sequence[torch.Size]
    patients: int = 0
    clipped: int = 0
    non_finite: int = 0

    @classmethod
    def zero(cls, parameters: Sequence[nn.Parameter]) -> ClippedSum:
        """Return the sum over nobody."""
        shapes = [as_real(p.detach()).shape for p in parameters]
        device = parameters[0].device if parameters else None
        count = sum(shape.numel() for shape in shapes)
        return cls(torch.zeros(count, dtype=torch.float64, device=device), shapes)

    @property
    def tensors(self) -> list[Tensor]:
        """The sum as views, one tensor per parameter."""
        return split(self.vector, self.shapes)

    def add(self, gradient: Sequence[Tensor | None], mechanism: Mechanism) -> None:
        """Clip one patient's ``gradient`` (None for an unused parameter) and add it."""
        self.patients += 1
        vector = torch.cat([self._flat(*pair) for pair in zip(gradient, self.shapes, strict=True)])
        if not math.isfinite(norm(vector)):
            self.non_finite += 1
            return
        self.clipped += self._add_clipped(vector, mechanism)

    def _flat(self, part: Tensor | None, shape: torch.Size) -> Tensor:
        if part is None:
            return torch.zeros(shape.numel(), device=self.vector.device)
        return as_real(part.detach()).reshape(-1)

    def _add_clipped(self, vector: Tensor, mechanism: Mechanism) -> bool:
        parts, totals = [vector], [self.vector]
        if mechanism.clipping == "per-layer":
            parts, totals = split(vector, self.shapes), self.tensors
        limit = mechanism.clip_norm / math.sqrt(len(parts))
        scale = mechanism.grid_scale(vector.numel())
        clipped = False
        for part, total in zip(parts, totals, strict=True):
            length = norm(part)
            clipped |= length > limit
            if mechanism.levels is None:
                total.add_(part, alpha=limit / length if length > limit else 1.0)
            else:
                total.add_(torch.round(part.double() * (limit * scale / max(length, limit))))
        return clipped


class Engine(Protocol[Example_contra]):
    """Computes the clipped sum of patients' gradients; all engines obey the same laws."""

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """The parameters whose gradients are summed."""

    def clipped_sum(
        self, patients: Iterable[Sequence[Example_contra]], mechanism: Mechanism
    ) -> ClippedSum:
        """Return the sum over ``patients``, each given by its examples (none: counts zero)."""


class BackwardEngine(Engine[Example]):
    """One ordinary backward pass per patient: right for every model, lean in memory."""

    def __init__(self, parameters: Sequence[nn.Parameter], loss: Loss[Example]) -> None:
        self._parameters = list(parameters)
        self._loss = loss

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """See :class:`Engine`."""
        return self._parameters

    def clipped_sum(
        self, patients: Iterable[Sequence[Example]], mechanism: Mechanism
    ) -> ClippedSum:
        """See :class:`Engine`."""
        total = ClippedSum.zero(self._parameters)
        for examples in patients:
            total.add(self._gradient(examples), mechanism)
        return total

    def _gradient(self, examples: Sequence[Example]) -> Sequence[Tensor | None]:
        if not examples:
            return [None] * len(self._parameters)
        loss = self._loss(examples).mean()
        return torch.autograd.grad(loss, self._parameters, allow_unused=True)


def noisy_mean(total: ClippedSum, mechanism: Mechanism) -> Tensor:
    """Return (sum + noise) / expected patients as one float64 vector.

    Every call draws new noise; a sum must be released once only.

    Raises:
        ValueError: the mechanism has levels, so that the sum is one of whole numbers.
    """
    if mechanism.levels is not None:
        raise ValueError("whole numbers get noise from fedcmr_shared.privacy.distributed")
    scale = mechanism.noise_multiplier * mechanism.clip_norm
    noise = torch.from_numpy(gaussian(total.vector.numel())).to(total.vector.device)
    return noise.mul_(scale).add_(total.vector).div_(mechanism.expected_patients)


def release(total: ClippedSum, mechanism: Mechanism) -> list[Tensor]:
    """Return :func:`noisy_mean` as views shaped like ``total.tensors``."""
    return split(noisy_mean(total, mechanism), total.shapes)


def set_gradients(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
    """Give each parameter its gradient, converted to the parameter's type, for an optimiser."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if parameter.is_complex():
            gradient = torch.view_as_complex(gradient)
        parameter.grad = gradient.to(parameter.dtype)


_SAFE: Final = 1e-150
_ARITHMETIC: Final = 2.0**-20


def as_real(tensor: Tensor) -> Tensor:
    """Return complex tensors as pairs [..., 2] of real and imaginary parts, others as they are."""
    # Clipping and noise act on real components: complex noise would have half the variance.
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def norm(vector: Tensor) -> float:
    """Return the Euclidean norm in float64; infinite or NaN if any value is."""
    length = float(torch.linalg.vector_norm(vector, dtype=torch.float64))
    if _SAFE < length < 1 / _SAFE or vector.dtype != torch.float64 or not vector.numel():
        return length
    # Squares of float64 values can overflow or vanish, those of narrower types cannot.
    peak = float(vector.abs().max())
    if peak == 0 or not math.isfinite(peak):
        return peak
    return peak * float((vector / peak).norm())


def split(vector: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Return views of ``vector``, one for each shape."""
    parts = torch.split(vector, [shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
