"""Where batched per-example gradients are used, and where they are refused."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from fedcmr_shared.errors import ConfigurationError, JobRefused
from fedcmr_shared.privacy.engines import engine_for
from fedcmr_shared.privacy.mechanism import BackwardEngine, Mechanism
from fedcmr_shared.privacy.per_example import Mode, PerExampleEngine

_spec = importlib.util.spec_from_file_location(
    "privacy_networks", Path(__file__).with_name("privacy_networks.py")
)
assert _spec is not None
assert _spec.loader is not None
networks: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(networks)

MODES = get_args(Mode)
MECHANISM = Mechanism(clip_norm=0.1, noise_multiplier=1.0, expected_patients=1.0)


def images(count: int, size: int = 8, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(2, size, size, dtype=dtype, generator=generator) for _ in range(count)]


def engine(module: nn.Module, mode: Mode, **options: Any) -> PerExampleEngine[Tensor]:
    parameters = [p for p in module.parameters() if p.requires_grad]
    return PerExampleEngine(module, parameters, networks.image_loss, mode=mode, **options)


def layers(*between: nn.Module) -> nn.Sequential:
    """Two layers that take any image, with ``between`` between them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 4, 3), *between, nn.Conv2d(4, 2, 3))


def refusal(module: nn.Module, mode: Mode) -> str:
    with pytest.raises(JobRefused) as refused:
        engine(module, mode).check_exact(images(3))
    assert refused.value.code == "engine"
    message = str(refused.value)
    assert message.startswith(f"privacy.engine {mode} is not exact for this model: ")
    assert message.endswith(": use engine backward")
    assert "\n" not in message
    return message


class Permuted(nn.Module):
    """A convolution of planes that were channels last, as `view_as_real` gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))


class Centred(nn.Module):
    """Subtracts the mean over the batch, without any parameter."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


class Functional(nn.Module):
    """Uses a layer's weight outside the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.linear.weight


# Accepted


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "between",
    [
        (nn.GroupNorm(2, 4), nn.ReLU()),
        (nn.PReLU(4),),
        (nn.InstanceNorm2d(4, affine=True), nn.SiLU()),
        (nn.ConvTranspose2d(4, 4, 2, stride=2),),
    ],
    ids=lambda modules: type(modules[0]).__name__,
)
def test_networks_of_known_layers_are_exact(mode: Mode, between: tuple[nn.Module, ...]) -> None:
    engine(layers(*between), mode).check_exact(images(3))


@pytest.mark.parametrize("mode", MODES)
def test_frozen_parameters_may_be_anywhere(mode: Mode) -> None:
    module = nn.Sequential(networks.TiedWeights(), nn.Linear(8, 8))
    module[0].requires_grad_(False)
    engine(module, mode).check_exact(images(2))


def test_functorch_is_exact_where_hooks_misread_convolutions() -> None:
    engine(Permuted(), "functorch").check_exact(images(3))
    padded = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"))
    engine(padded, "functorch").check_exact(images(3))


@pytest.mark.parametrize("mode", MODES)
def test_examples_of_several_shapes_are_batched_by_shape(mode: Mode) -> None:
    patients = [[images(1)[0], images(2, 9)[0]], images(3, 9), images(2)]
    found = engine(layers(), mode, shape_of=lambda e: e.shape)
    found.check_exact([*images(2), *images(2, 9)])
    module = layers()

    def alone(examples: Sequence[Tensor]) -> Tensor:
        loss = networks.image_loss(module)
        return torch.cat([loss([example]) for example in examples])

    expected = BackwardEngine(list(module.parameters()), alone)
    module.double()
    sums = [
        each.clipped_sum(patients, MECHANISM).vector
        for each in (engine(module, mode, shape_of=lambda e: e.shape), expected)
    ]
    torch.testing.assert_close(*sums, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_physical_batches_do_not_change_the_sum(mode: Mode) -> None:
    module = networks.network("Plain", torch.float64)[0]
    patients = [images(3), images(1), [], images(7), images(2)]
    sums = [
        engine(module, mode, physical_batch=size).clipped_sum(patients, MECHANISM)
        for size in (1, 2, 5, 100)
    ]
    for total in sums:
        torch.testing.assert_close(total.vector, sums[0].vector, rtol=1e-9, atol=1e-12)
        assert total.patients == 5


@pytest.mark.parametrize("mode", MODES)
def test_nobody_gives_the_zero_sum(mode: Mode) -> None:
    module = networks.network("Plain", torch.float64)[0]
    for patients in ([], [[]], [[], []]):
        total = engine(module, mode).clipped_sum(patients, MECHANISM)
        assert not total.vector.any()
        assert total.patients == len(patients)


def test_patients_are_loaded_when_their_batch_is_due() -> None:
    module = networks.network("Plain", torch.float64)[0]
    seen: list[int] = []

    def cohort() -> Iterator[list[Tensor]]:
        for number in range(6):
            seen.append(len(seen) - number)
            yield images(2)

    passes: list[int] = []

    def loss_of(wrapped: nn.Module) -> Callable[[Sequence[Tensor]], Tensor]:
        def loss(examples: Sequence[Tensor]) -> Tensor:
            passes.append(len(seen))
            return networks.image_loss(wrapped)(examples)

        return loss

    counting = PerExampleEngine(
        module, list(module.parameters()), loss_of, mode="hooks", physical_batch=4
    )
    counting.clipped_sum(cohort(), MECHANISM)
    assert passes == [2, 4, 6]


@pytest.mark.parametrize("mode", MODES)
def test_the_module_is_left_as_it_was(mode: Mode) -> None:
    module = layers(nn.GroupNorm(2, 4)).double().eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    users = engine(module, mode)
    users.check_exact(images(2))
    users.clipped_sum([images(2), images(1)], MECHANISM)
    assert not module.training
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    for part in module.modules():
        assert not part._forward_hooks
        assert not part._backward_hooks
        left = {"activations", "max_batch_len", "ft_compute_sample_grad"}
        assert not left & vars(part).keys()
    for parameter in module.parameters():
        assert parameter.grad is None
        assert not {"grad_sample", "_forward_counter"} & vars(parameter).keys()


def test_a_pass_that_breaks_off_leaves_nothing_behind() -> None:
    module = layers().double()

    def broken(wrapped: nn.Module) -> Callable[[Sequence[Tensor]], Tensor]:
        def loss(examples: Sequence[Tensor]) -> Tensor:
            networks.image_loss(wrapped)(examples)
            raise ValueError("unreadable")

        return loss

    breaking = PerExampleEngine(module, list(module.parameters()), broken, mode="hooks")
    with pytest.raises(ValueError, match="unreadable"):
        breaking.clipped_sum([images(2)], MECHANISM)
    expected = engine(layers().double(), "hooks").clipped_sum([images(2)], MECHANISM)
    found = engine(module, "hooks").clipped_sum([images(2)], MECHANISM)
    assert torch.equal(found.vector, expected.vector)


# Refused


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ("SM full", "(Cascade) holds consistency_weight itself"),
        ("MM decoder", "(MetadataAdapter) holds scale itself"),
        ("SM adapters", "(Cascade) holds consistency_weight itself"),
        ("MM lora", "(LowRankUpdate) holds factor itself"),
    ],
)
def test_cardiomm_has_bare_parameters(mode: Mode, part: str, reason: str) -> None:
    module, parameters, loss_of = networks.network(f"cardiomm {part}", torch.float32)
    with pytest.raises(JobRefused) as refused:
        PerExampleEngine(module, parameters, loss_of, mode=mode)
    assert reason in str(refused.value)


@pytest.mark.parametrize("mode", MODES)
def test_cardiomm_folds_its_coils_into_the_batch(mode: Mode) -> None:
    """Its prompters have known layers only, but the sensitivity network sees coils."""
    module, parameters, loss_of = networks.network("cardiomm MM prompts", torch.float64)
    examples = [torch.randn(3, 16, 16, dtype=torch.complex128) for _ in range(2)]
    with pytest.raises(JobRefused, match=r"6 gradients from 2 examples: coils or frames"):
        PerExampleEngine(module, parameters, loss_of, mode=mode).check_exact(examples)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (networks.ComplexWeights(), "weight is complex"),
        (networks.SeveralInputs(), "(SeveralInputs) holds gain itself"),
        (networks.TiedWeights(), "second.weight and first.weight are the same parameter"),
        (networks.Coils(), "each.weight gets 6 gradients from 3 examples"),
        (layers(nn.BatchNorm2d(4)), "1 computes statistics over several patients"),
        (
            layers(nn.BatchNorm2d(4, affine=False, track_running_stats=False)),
            "1 computes statistics over several patients",
        ),
        (
            layers(nn.InstanceNorm2d(4, track_running_stats=True)),
            "1 computes statistics over several patients",
        ),
        (layers(nn.ReLU(inplace=True)), "1 works in place"),
        (layers(Centred()), "examples meet in one operation"),
        (layers(nn.Dropout(0.5)), "gradients of 0.weight are wrong"),
        (Functional(), "linear.weight gets 0 gradients from 3 examples"),
        (nn.Sequential(nn.Flatten(), nn.Linear(7, 7)), "a pass fails: "),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_models_that_are_not_exact_are_refused(mode: Mode, module: nn.Module, reason: str) -> None:
    assert reason in refusal(module, mode)


@pytest.mark.parametrize("padding", ["reflect", "circular", "replicate"])
def test_hooks_refuse_padded_convolutions(padding: Any) -> None:
    module = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode=padding))
    assert f"0 has padding_mode {padding}" in refusal(module, "hooks")


def test_hooks_refuse_what_they_silently_misread() -> None:
    assert "memory layout that Opacus misreads" in refusal(Permuted(), "hooks")


@pytest.mark.parametrize("mode", MODES)
def test_losses_are_one_for_each_example(mode: Mode) -> None:
    module = layers()

    def mean_of(wrapped: nn.Module) -> Callable[[Sequence[Tensor]], Tensor]:
        return lambda examples: networks.image_loss(wrapped)(examples).mean()

    averaging = PerExampleEngine(module, list(module.parameters()), mean_of, mode=mode)
    with pytest.raises(JobRefused, match=r"3 examples have losses of shape \[\]"):
        averaging.check_exact(images(3))


def test_folding_is_noticed_even_without_a_check() -> None:
    with pytest.raises(JobRefused, match="6 gradients from 3 examples"):
        engine(networks.Coils().double(), "hooks").clipped_sum([images(3)], MECHANISM)


def test_parameters_are_those_of_the_module_and_trainable() -> None:
    module, other = layers(), nn.Parameter(torch.zeros(1))
    for parameters in ([other], list(module.requires_grad_(False).parameters())):
        with pytest.raises(JobRefused, match="not one of the module's or does not require"):
            PerExampleEngine(module, parameters, networks.image_loss, mode="hooks")


def test_one_example_checks_nothing() -> None:
    with pytest.raises(ConfigurationError, match="two or more examples"):
        engine(layers(), "hooks").check_exact(images(1))


# Choice


def test_the_job_names_the_engine() -> None:
    module = layers(nn.GroupNorm(2, 4))
    parameters = list(module.parameters())

    def nothing() -> list[Tensor]:
        raise AssertionError("engine backward needs no check")

    plain = engine_for("backward", module, parameters, networks.image_loss, synthetic=nothing)
    assert isinstance(plain.engine, BackwardEngine)
    for mode in MODES:
        batched = engine_for(
            mode, module, parameters, networks.image_loss, synthetic=lambda: images(2)
        )
        assert isinstance(batched.engine, PerExampleEngine)
        assert batched.parameters == parameters


def test_the_choice_is_refused_where_it_is_not_exact() -> None:
    module = Permuted()
    with pytest.raises(JobRefused, match="hooks is not exact"):
        engine_for(
            "hooks",
            module,
            list(module.parameters()),
            networks.image_loss,
            synthetic=lambda: images(2),
        )
