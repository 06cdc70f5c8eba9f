"""Batched per-example gradients (Opacus GradSampleModule) as an engine of the private step.

Examples of several patients share one forward and backward pass; each patient's gradient is the
mean over its own examples and is clipped as a whole. That saves passes when patients have few
small examples, and needs more memory.

It is exact only where each trained layer sees one row for each example. Elsewhere Opacus 1.6 fails
or is silently wrong, so :meth:`PerExampleEngine.check_exact` compares it with one backward pass
per example, and every pass counts its rows. Layers may round differently in batches of other
sizes, so that in float32 a patient's neighbours in a batch move its gradient by about 1e-7 of it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Final, Generic, Literal, Self, TypeVar

import torch
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn

from fedcmr_shared.errors import ConfigurationError, JobRefused
from fedcmr_shared.privacy.isolation import meets_patients
from fedcmr_shared.privacy.mechanism import ClippedSum, Engine, Loss, Mechanism

Example = TypeVar("Example")
Mode = Literal["hooks", "functorch"]
LossOf = Callable[[nn.Module], Loss[Example]]

TOLERANCE: Final = 1e-6
"""Largest error of a per-example gradient, relative to its own largest value."""

_LAYERS: Final = frozenset(
    {
        *(nn.Linear, nn.Embedding, nn.PReLU, nn.GroupNorm, nn.LayerNorm),
        *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
        *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    }
)


class PerExampleEngine(Engine[Example]):
    """Per-example gradients of ``module`` in physical batches of several patients.

    Args:
        module: the network.
        parameters: what is trained of it; the rest should not require gradients.
        loss_of: gives the loss that runs a module. It is called with ``module`` as Opacus wraps it
            and, for the check, with a float64 copy.
        mode: `hooks` for Opacus' rules per layer, `functorch` for vectorised autograd.
        shape_of: examples for which this is equal can be in one batch.
        physical_batch: most examples in one pass; changes speed and memory, not results.

    Raises:
        JobRefused: per-example gradients of this module cannot be exact (code ``engine``).
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Sequence[nn.Parameter],
        loss_of: LossOf[Example],
        *,
        mode: Mode,
        shape_of: Callable[[Example], Hashable] = lambda _: None,
        physical_batch: int = 16,
    ) -> None:
        self._module = module
        self._parameters = list(parameters)
        self._loss_of = loss_of
        self._mode: Mode = mode
        self._shape_of = shape_of
        self._physical_batch = physical_batch
        for reason in _reasons_against(module, self._parameters, mode):
            raise _refusal(mode, reason)

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """See :class:`Engine`."""
        return self._parameters

    def clipped_sum(
        self, patients: Iterable[Sequence[Example]], mechanism: Mechanism
    ) -> ClippedSum:
        """See :class:`Engine`.

        Raises:
            JobRefused: a layer saw another number of rows than there were examples.
        """
        total = ClippedSum.zero(self._parameters)
        with _Pass(self._module, self._parameters, self._loss_of, self._mode) as single:
            for group in _groups(patients, self._physical_batch):
                means = self._patient_means(group, single)
                for index in range(len(group)):
                    total.add([mean[index] for mean in means], mechanism)
        return total

    def check_exact(self, examples: Sequence[Example]) -> None:
        """Compare with one backward pass per example, in float64 and with perturbed weights.

        Args:
            examples: synthetic ones with float64 or complex128 values, at least two of each shape.

        Raises:
            JobRefused: a gradient errs by more than :data:`TOLERANCE`, or a pass fails.
            ConfigurationError: there are too few examples.
        """
        if len(examples) < 2:
            raise ConfigurationError("a gradient engine is checked with two or more examples")
        module = _perturbed_float64(self._module)
        named = dict(module.named_parameters())
        names = _names(self._module, self._parameters)
        parameters = [named[name] for name in names]
        for batch in self._batches([(0, example) for example in examples]):
            alike = [example for _, example in batch]
            try:
                with _Pass(module, parameters, self._loss_of, self._mode) as single:
                    rows = single(alike)
                expected = _one_by_one(self._loss_of(module), parameters, alike)
            except (RuntimeError, TypeError, ValueError, AttributeError) as error:
                # What torch and Opacus raise where they notice that a model does not suit them.
                reason = f"a pass fails: {str(error).strip().partition(chr(10))[0]}"
                raise _refusal(self._mode, reason) from error
            _compare(self._mode, names, rows, expected)

    def _patient_means(
        self, group: Sequence[Sequence[Example]], single: _Pass[Example]
    ) -> list[Tensor]:
        """Return for each parameter the patients' mean gradients [patients, ...]."""
        means = [p.new_zeros(len(group), *p.shape) for p in self._parameters]
        owned = [(owner, example) for owner, examples in enumerate(group) for example in examples]
        for batch in self._batches(owned):
            owners = torch.tensor([owner for owner, _ in batch], device=means[0].device)
            for mean, rows in zip(means, single([example for _, example in batch]), strict=True):
                mean.index_add_(0, owners, rows)
        for owner, examples in enumerate(group):
            for mean in means:
                mean[owner] /= max(1, len(examples))
        return means

    def _batches(self, owned: Iterable[tuple[int, Example]]) -> Iterator[list[tuple[int, Example]]]:
        """Split pairs of owner and example into batches of one shape and physical size."""
        by_shape: dict[Hashable, list[tuple[int, Example]]] = {}
        for owner, example in owned:
            by_shape.setdefault(self._shape_of(example), []).append((owner, example))
        for alike in by_shape.values():
            for start in range(0, len(alike), self._physical_batch):
                yield alike[start : start + self._physical_batch]


class _Pass(Generic[Example]):
    """Wraps a module while in its context; called, it returns examples' gradients."""

    def __init__(
        self,
        module: nn.Module,
        parameters: Sequence[nn.Parameter],
        loss_of: LossOf[Example],
        mode: Mode,
    ) -> None:
        self._module, self._parameters, self._mode = module, parameters, mode
        self._loss_of = loss_of
        self._was_training = module.training

    def __enter__(self) -> Self:
        self._wrapped = GradSampleModule(
            self._module, loss_reduction="sum", force_functorch=self._mode == "functorch"
        )
        self._wrapped.train()  # Opacus' hooks do nothing in evaluation mode
        self._loss = self._loss_of(self._wrapped)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._forget()
        self._wrapped.to_standard_module()
        self._module.train(self._was_training)

    def __call__(self, examples: Sequence[Example]) -> list[Tensor]:
        """Return for each parameter the gradients [examples, ...] of the examples' losses."""
        losses = self._loss(examples)
        if losses.shape != (len(examples),):
            shape = list(losses.shape)
            raise _refusal(self._mode, f"{len(examples)} examples have losses of shape {shape}")
        with warnings.catch_warnings():
            # Said of a first layer, whose input needs no gradient; its weights' is right.
            warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
            losses.sum().backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        rows = [self._rows(p, len(examples)) for p in self._parameters]
        self._forget()
        return rows

    def _rows(self, parameter: nn.Parameter, examples: int) -> Tensor:
        rows: object = parameter.grad_sample  # type: ignore[attr-defined]  # set by Opacus
        if rows is None and parameter.grad is None:  # the pass did not use it
            return parameter.new_zeros(examples, *parameter.shape)
        if not isinstance(rows, Tensor) or len(rows) != examples:
            found = len(rows) if isinstance(rows, Tensor) else 0
            (name,) = _names(self._module, [parameter])
            raise _refusal(
                self._mode,
                f"{name} gets {found} gradients from {examples} examples: coils or frames are "
                "folded into the batch, or it is used outside its layer",
            )
        return rows

    def _forget(self) -> None:
        """Delete what a pass left in module and parameters, also if it was broken off."""
        for parameter in self._module.parameters():
            parameter.grad = None
            if parameter.requires_grad:
                parameter.grad_sample = None  # type: ignore[attr-defined]
                parameter._forward_counter = 0  # type: ignore[attr-defined]
        for module in self._module.modules():
            for name in ("activations", "max_batch_len"):
                vars(module).pop(name, None)


def _groups(patients: Iterable[Sequence[Example]], size: int) -> Iterator[list[Sequence[Example]]]:
    """Gather patients until they have ``size`` examples or more; loads no patient in advance."""
    group: list[Sequence[Example]] = []
    for examples in patients:
        group.append(examples)
        if sum(map(len, group)) >= size:
            yield group
            group = []
    if group:
        yield group


def _reasons_against(
    module: nn.Module, parameters: Sequence[nn.Parameter], mode: Mode
) -> Iterator[str]:
    """Yield what in the structure of ``module`` makes per-example gradients wrong."""
    known = {id(p) for p in module.parameters() if p.requires_grad}
    if not all(id(parameter) in known for parameter in parameters):
        yield "a trained parameter is not one of the module's or does not require gradients"
    seen: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and id(parameter) in seen:
            yield f"{name} and {seen[id(parameter)]} are the same parameter"
        seen[id(parameter)] = name
        if parameter.requires_grad and parameter.is_complex():
            yield f"{name} is complex"
    for name, layer in module.named_modules():
        yield from (f"{name or 'the module'} {reason}" for reason in _layer_reasons(layer, mode))


def _layer_reasons(layer: nn.Module, mode: Mode) -> Iterator[str]:
    if meets_patients(layer):
        yield "computes statistics over several patients"
    own = [name for name, p in layer.named_parameters(recurse=False) if p.requires_grad]
    if own and type(layer) not in _LAYERS:
        yield f"({type(layer).__name__}) holds {own[0]} itself, outside the layers known to be exact"
    if getattr(layer, "inplace", False) is True:
        yield "works in place"
    if mode == "hooks" and isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
        yield f"has padding_mode {layer.padding_mode}, for which hooks give wrong gradients"


def _perturbed_float64(module: nn.Module) -> nn.Module:
    """Return a float64 copy, moved off special weights such as zeros, where gradients vanish."""
    twin = copy.deepcopy(module).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.1 * noise.to(parameter.device))
    return twin


def _one_by_one(
    loss: Loss[Example], parameters: Sequence[nn.Parameter], examples: Sequence[Example]
) -> list[list[Tensor]]:
    """Return each example's gradient by a backward pass of its own."""
    return [
        list(
            torch.autograd.grad(
                loss([example]).sum(), parameters, allow_unused=True, materialize_grads=True
            )
        )
        for example in examples
    ]


def _compare(
    mode: Mode,
    names: Sequence[str],
    rows: Sequence[Tensor],
    expected: Sequence[Sequence[Tensor]],
) -> None:
    for index, gradient in enumerate(expected):
        largest = max(float(part.abs().max()) for part in gradient) or 1.0
        for name, found, part in zip(names, rows, gradient, strict=True):
            error = float((found[index] - part).abs().max())
            if not error <= TOLERANCE * largest:
                raise _refusal(
                    mode,
                    f"gradients of {name} are wrong by {error / largest:.1e}: examples meet in one "
                    "operation, or a layer's input has a memory layout that Opacus misreads",
                )


def _names(module: nn.Module, parameters: Iterable[nn.Parameter]) -> list[str]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [names[id(parameter)] for parameter in parameters]


def _refusal(mode: Mode, reason: str) -> JobRefused:
    message = f"privacy.engine {mode} is not exact for this model: {reason}: use engine backward"
    return JobRefused("engine", "engine", message)
