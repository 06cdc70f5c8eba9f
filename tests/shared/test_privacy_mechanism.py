"""The laws of the private step, for all engines and networks."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.privacy.mechanism import (
    BackwardEngine,
    ClippedSum,
    Engine,
    Mechanism,
    norm,
    release,
    set_gradients,
)
from fedcmr_shared.privacy.per_example import PerExampleEngine
from fedcmr_shared.schemas.job import ModelSpec
from fedcmr_shared.schemas.privacy import Clipping

_spec = importlib.util.spec_from_file_location(
    "privacy_networks", Path(__file__).with_name("privacy_networks.py")
)
assert _spec is not None
assert _spec.loader is not None
networks: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(networks)

CLIP = 0.25
# Noise far below rounding, for steps whose sum is to be seen.
SILENT = 1e-30

CARDIOMM = [
    *(
        f"cardiomm {variant} full"
        for variant in get_args(ModelSpec.model_fields["variant"].annotation)
    ),
    *(f"cardiomm MM {part}" for part in ("decoder", "adapters", "prompts", "lora")),
]
BACKWARD_ONLY = ["ComplexWeights", "SeveralInputs", "Coils", "TiedWeights"]
BOTH = ["Plain", "Fourier"]
CASES = [
    *(("backward", name) for name in [*BOTH, *BACKWARD_ONLY, *CARDIOMM]),
    *((engine, name) for engine in ("hooks", "functorch") for name in BOTH),
    *(("ranks", name) for name in [*BOTH, "ComplexWeights", "cardiomm MM full"]),
]

Patients = Sequence[Sequence[Tensor]]
Summed = Callable[[Patients, Mechanism], Tensor]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with networks.RankPair(tmp_path_factory.mktemp("ranks")) as running:
        yield running


def engine_of(kind: str, name: str, dtype: torch.dtype) -> Engine[Tensor]:
    # Batches that no patient fills and that split others; larger ones where speed matters.
    batch = 3 if dtype == torch.float64 else 250
    module, parameters, loss_of = networks.network(name, dtype)
    if kind == "backward":
        return BackwardEngine(parameters, loss_of(module))
    return PerExampleEngine(
        module, parameters, loss_of, mode=kind, shape_of=lambda e: e.shape, physical_batch=batch
    )


@pytest.fixture
def summed_by(request: pytest.FixtureRequest) -> Callable[[str, str, torch.dtype], Summed]:
    """The clipped sum as one vector, by engine, network and precision."""

    def choose(kind: str, name: str, dtype: torch.dtype = torch.float64) -> Summed:
        if kind != "ranks":
            engine = engine_of(kind, name, dtype)
            return lambda patients, mechanism: engine.clipped_sum(patients, mechanism).vector
        running = request.getfixturevalue("pair")

        def of_ranks(patients: Patients, mechanism: Mechanism) -> Tensor:
            first, second = running.ask(
                "summed", name=name, dtype=dtype, patients=patients, mechanism=mechanism
            )
            assert torch.equal(first, second)
            return first

        return of_ranks

    return choose


def mechanism(clip: float = CLIP, clipping: Clipping = "flat") -> Mechanism:
    return Mechanism(clip, SILENT, expected_patients=5.0, clipping=clipping)


def some_patients(name: str, dtype: torch.dtype, counts: Sequence[int], seed: int = 0) -> Patients:
    """Random examples of the kind that the network takes, ``counts`` of them per patient."""
    generator = torch.Generator().manual_seed(seed)
    cardiac = name.startswith("cardiomm")
    shape = (2, 24, 24) if cardiac else (2, 8, 8)
    kind = (torch.complex128 if dtype == torch.float64 else torch.complex64) if cardiac else dtype
    return [
        [torch.randn(shape, dtype=kind, generator=generator) for _ in range(count)]
        for count in counts
    ]


def gradients_by_hand(name: str, patients: Patients) -> list[list[Tensor]]:
    """Each patient's mean gradient as real vectors, one backward pass per example."""
    module, parameters, loss_of = networks.network(name, torch.float64)
    loss = loss_of(module)
    gradients = []
    for examples in patients:
        module.zero_grad()
        for example in examples:
            (loss([example]).sum() / len(examples)).backward()
        gradients.append(
            [
                (torch.view_as_real(g) if g.is_complex() else g).flatten()
                for g in (torch.zeros_like(p) if p.grad is None else p.grad for p in parameters)
            ]
        )
        module.zero_grad(set_to_none=True)
    return gradients


def clipped_by_hand(
    gradients: Sequence[Sequence[Tensor]], clip: float, clipping: Clipping
) -> Tensor:
    total = []
    for vectors in gradients:
        layers = [torch.cat(list(vectors))] if clipping == "flat" else vectors
        limit = clip / math.sqrt(len(layers))
        factors = [min(1.0, limit / max(float(layer.norm()), 1e-300)) for layer in layers]
        total.append(torch.cat([f * layer for f, layer in zip(factors, layers, strict=True)]))
    return torch.stack(total).sum(0)


def length(vectors: Sequence[Tensor]) -> float:
    return float(torch.cat(list(vectors)).norm())


def require_sensitivity(summed: Summed, patients: Patients, clip: float) -> list[float]:
    """Each patient's influence on the sum in units of the clipping norm; none exceeds one."""
    whole = summed(patients, mechanism(clip))
    moves = []
    for left_out in range(len(patients)):
        rest = [p for index, p in enumerate(patients) if index != left_out]
        moves.append(float((whole - summed(rest, mechanism(clip))).norm()) / clip)
    assert max(moves) <= 1 + 1e-6, f"one patient moves the sum by {max(moves):.3f} C"
    return moves


# The sum


@pytest.mark.parametrize("clipping", get_args(Clipping))
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_sum_is_that_of_clipped_means(
    kind: str, name: str, clipping: Clipping, summed_by: Any
) -> None:
    patients = some_patients(name, torch.float64, [2, 1, 3])
    gradients = gradients_by_hand(name, patients)
    summed = summed_by(kind, name)
    # The first clips all patients, the second none of them.
    for factor in (0.3, 30):
        clip = factor * length(gradients[0])
        found = summed(patients, mechanism(clip, clipping))
        expected = clipped_by_hand(gradients, clip, clipping)
        assert float((found - expected).norm()) <= 1e-6 * float(expected.norm())
        assert float(expected.norm()) > 0


@pytest.mark.parametrize("name", BOTH)
def test_engines_agree(name: str, summed_by: Any) -> None:
    patients = some_patients(name, torch.float64, [2, 0, 4, 1])
    backward = summed_by("backward", name)(patients, mechanism())
    for kind in ("hooks", "functorch", "ranks"):
        torch.testing.assert_close(
            summed_by(kind, name)(patients, mechanism()), backward, rtol=1e-6, atol=1e-12
        )


# Sensitivity


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_no_patient_moves_the_sum_by_more_than_the_norm(
    kind: str, name: str, summed_by: Any
) -> None:
    patients = some_patients(name, torch.float64, [1, 2, 1])
    clip = 0.1 * min(length(gradient) for gradient in gradients_by_hand(name, patients))
    moves = require_sensitivity(summed_by(kind, name), patients, clip)
    # All are clipped, so that the law is met with equality.
    assert moves == pytest.approx([1, 1, 1], abs=1e-6)


def spoiled(example: Tensor, value: float) -> Tensor:
    example = example.clone()
    example.view(-1)[7] = value
    return example


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_nor_does_an_adversarial_patient(kind: str, name: str, summed_by: Any) -> None:
    many = 5 if name.startswith("cardiomm") else 1000
    plain = some_patients(name, torch.float32, [1, 2, 1, 1, many])
    patients = [
        plain[0],
        [plain[1][0], spoiled(plain[1][1], math.nan)],
        [spoiled(plain[2][0], math.inf)],
        [1e38 * plain[3][0] / plain[3][0].abs().max()],
        plain[4],
        [],
    ]
    summed = summed_by(kind, name, torch.float32)
    moves = require_sensitivity(summed, patients, 1e-5)
    assert moves[0] == pytest.approx(1, abs=1e-6)
    # Values that are no numbers and empty patients have no influence, not even on their batch.
    # Batches of another composition round differently in float32, that is all.
    assert max(moves[1], moves[2], moves[-1]) < 1e-6


@pytest.mark.parametrize("clipping", get_args(Clipping))
def test_lengths_that_overflow_or_vanish_in_float64(clipping: Clipping) -> None:
    weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
    for value in (1e-200, 1e-5, 1e200, 1e308):
        total = ClippedSum.zero([weight])
        total.add([torch.full((2, 3), value, dtype=torch.float64)], mechanism(1.0, clipping))
        size = value * math.sqrt(6)
        expected = min(1.0, size) if math.isfinite(size) else 0.0
        assert norm(total.vector) == pytest.approx(expected, rel=1e-12, abs=1e-250)
        assert (total.patients, total.clipped) == (1, 1 < size < math.inf)


def test_per_layer_clipping_bounds_each_layer() -> None:
    parameters = [nn.Parameter(torch.zeros(n)) for n in (1, 4, 9)]
    total = ClippedSum.zero(parameters)
    total.add(
        [torch.ones(1) * 1e-3, torch.ones(4), torch.ones(9) * 1e30], mechanism(3.0, "per-layer")
    )
    lengths = [float(tensor.norm()) for tensor in total.tensors]
    assert lengths == pytest.approx([1e-3, math.sqrt(3), math.sqrt(3)], rel=1e-6)


def test_counts_tell_what_happened_to_the_patients() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    total = ClippedSum.zero([parameter])
    for gradient in ([0.1, 0.1], [3.0, 4.0], [math.nan, 0.0], [math.inf, 1.0]):
        total.add([torch.tensor(gradient)], mechanism(1.0))
    total.add([None], mechanism(1.0))
    assert (total.patients, total.clipped, total.non_finite) == (5, 1, 2)
    torch.testing.assert_close(total.tensors[0], torch.tensor([0.7, 0.9], dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("name", ["Plain"])
def test_slice_level_clipping_breaks_the_law(name: str) -> None:
    """Opacus' optimiser clips each slice; a patient with four of them moves the sum fourfold."""
    one_each = some_patients(name, torch.float64, [1] * 6)
    generator = torch.Generator().manual_seed(1)
    patients = [
        [slice_ + 0.1 * torch.randn(slice_.shape, generator=generator) for slice_ in 4 * patient]
        for patient in one_each
    ]

    def slice_level(patients: Patients, mechanism: Mechanism) -> Tensor:
        module, parameters, loss_of = networks.network(name, torch.float64)
        wrapped = GradSampleModule(module, loss_reduction="sum")
        optimiser = DPOptimizer(
            torch.optim.SGD(parameters, lr=1.0),
            noise_multiplier=0.0,
            max_grad_norm=mechanism.clip_norm,
            expected_batch_size=1,
            loss_reduction="sum",
        )
        loss_of(wrapped)([slice_ for patient in patients for slice_ in patient]).sum().backward()
        optimiser.clip_and_accumulate()
        return torch.cat([p.summed_grad.flatten() for p in parameters])

    with pytest.raises(AssertionError, match=r"one patient moves the sum by 3\.[789]\d\d C"):
        require_sensitivity(slice_level, patients, 0.01)


# The release


def test_a_release_is_the_noisy_sum_over_the_public_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.urandom", bytes)  # a known key, so that the noise repeats
    parameters = [nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(4))]
    empty, total = ClippedSum.zero(parameters), ClippedSum.zero(parameters)
    total.add([torch.full((3, 2), 0.1), torch.full((4,), -0.2)], mechanism(1.0))
    public = Mechanism(clip_norm=2.0, noise_multiplier=3.0, expected_patients=7.0)
    noise, released = release(empty, public), release(total, public)
    for tensor, alone, noisy in zip(total.tensors, noise, released, strict=True):
        torch.testing.assert_close(noisy - alone, tensor / 7)
    assert [tensor.shape for tensor in released] == [(3, 2), (4,)]


def test_gradients_reach_real_and_complex_parameters() -> None:
    real = nn.Parameter(torch.zeros(2, dtype=torch.float32))
    complex_ = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    pairs = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    set_gradients([real, complex_], [pairs[0], pairs])
    assert real.grad is not None
    assert complex_.grad is not None
    assert real.grad.tolist() == [1, 2]
    assert complex_.grad.tolist() == [1 + 2j, 3 + 4j]


@pytest.mark.parametrize("field", ["clip_norm", "noise_multiplier", "expected_patients"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_public_numbers_are_positive_and_finite(field: str, value: float) -> None:
    numbers = {"clip_norm": 1.0, "noise_multiplier": 1.0, "expected_patients": 1.0}
    with pytest.raises(ConfigurationError, match=f"{field} is"):
        Mechanism(**{**numbers, field: value})
