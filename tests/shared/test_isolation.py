"""Networks that carry data between patients: found, refused, and measured without protection."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from fedcmr_shared.errors import JobRefused
from fedcmr_shared.models.lora import add_lora
from fedcmr_shared.models.registry import available_models, build_model
from fedcmr_shared.privacy.engines import engine_for
from fedcmr_shared.privacy.isolation import IsolatedEngine, carriers, refuse_carriers, unchanged
from fedcmr_shared.privacy.mechanism import BackwardEngine, Mechanism
from fedcmr_shared.schemas.job import ModelSpec

CLIP = 1.0
WIDTH = 4


class Codebook(nn.Module):
    """Replaces each row by the nearest code; codes follow the rows by a moving average."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.eye(WIDTH, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        codes = self.codes.clone()
        which = torch.cdist(x.detach(), codes).argmin(1)
        if self.training:
            for row, code in zip(x.detach(), which, strict=True):
                self.codes.data[code].mul_(0.5).add_(row, alpha=0.5)
        return x + (codes[which] - x).detach()


class HiddenCodebook(nn.Module):
    """The same in a frozen parameter: no buffer to be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.eye(WIDTH, dtype=torch.float64), requires_grad=False)

    forward = Codebook.forward


class DeclaredCodebook(Codebook):
    """Says that its codes are a public constant, and they are not."""

    public_constants = frozenset({"codes"})


class FittedScaler(nn.Module):
    """Takes mean and deviation from the first rows that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fitted", torch.zeros(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if not self.fitted.any():
            self.fitted = torch.stack([x.detach().mean(), x.detach().std() + 0.1])
        return (x - self.fitted[0]) / self.fitted[1]


class SecretScaler(nn.Module):
    """Keeps what it took from the first rows in an attribute that torch does not know."""

    def __init__(self, as_tensor: bool) -> None:
        super().__init__()
        self.first = torch.zeros(()) if as_tensor else 0.0

    def forward(self, x: Tensor) -> Tensor:
        if not self.first:
            mean = x.detach().mean()
            self.first = mean if isinstance(self.first, Tensor) else float(mean)
        return x - self.first


def network(middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), middle, nn.Linear(WIDTH, 1)).double()


def loss_of(module: nn.Module) -> Callable[[Sequence[Tensor]], Tensor]:
    """One example is [2, WIDTH]; the rows of an example may meet."""
    return lambda examples: torch.stack([(module(e) - 3).square().mean() for e in examples])


def patients(count: int, seed: int = 0) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, 2, WIDTH, generator=generator, dtype=torch.float64)
    return [[4 * row] for row in rows]


def mechanism(noise: float = 1.0) -> Mechanism:
    return Mechanism(CLIP, noise, expected_patients=4.0)


LEAKY = {
    "running statistics": (lambda: nn.BatchNorm1d(WIDTH), "1 computes statistics over several"),
    "tracked instance norm": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (WIDTH, 1)),
            nn.InstanceNorm1d(WIDTH, track_running_stats=True),
            nn.Flatten(),
        ),
        r"1\.1 computes statistics over several",
    ),
    "codebook": (Codebook, r"1 \(Codebook\) keeps buffer codes"),
    "fitted scaler": (FittedScaler, r"1 \(FittedScaler\) keeps buffer fitted"),
}
HIDDEN = {
    "frozen parameter": (HiddenCodebook, r"1\.codes changes while gradients"),
    "false constant": (DeclaredCodebook, r"1\.codes changes while gradients"),
    "tensor attribute": (lambda: SecretScaler(True), r"1\.first changes while gradients"),
    "number": (lambda: SecretScaler(False), r"1\.first changes while gradients"),
}


# What is refused


@pytest.mark.parametrize("kind", LEAKY)
def test_leaky_layers_are_refused_before_they_see_anybody(kind: str) -> None:
    make, message = LEAKY[kind]
    module = network(make())
    with pytest.raises(JobRefused, match=message) as refusal:
        engine_for("backward", module, list(module.parameters()), loss_of, synthetic=list)
    assert (refusal.value.code, refusal.value.rule) == ("model", "isolation")
    with pytest.raises(JobRefused, match=message):
        IsolatedEngine(BackwardEngine(list(module.parameters()), loss_of(module)), module)


@pytest.mark.parametrize("kind", HIDDEN)
def test_hidden_state_is_refused_when_it_changes(kind: str) -> None:
    make, message = HIDDEN[kind]
    module = network(make())
    refuse_carriers(module)
    trained = [p for p in module.parameters() if p.requires_grad]
    engine = engine_for("backward", module, trained, loss_of, synthetic=list)
    with pytest.raises(JobRefused, match=message) as refusal:
        engine.clipped_sum(patients(3), mechanism())
    assert refusal.value.code == "model"


@pytest.mark.parametrize("mode", ["backward", "hooks", "functorch"])
def test_harmless_networks_pass_with_all_engines(mode: str) -> None:
    module = network(nn.LayerNorm(WIDTH))
    examples = [example for (example,) in patients(2)]
    engine = engine_for(
        mode,  # type: ignore[arg-type]  # one of the names
        module,
        list(module.parameters()),
        lambda m: lambda rows: (m(torch.stack(list(rows))) - 3).square().mean((1, 2)),
        synthetic=lambda: examples,
    )
    assert engine.clipped_sum(patients(3), mechanism()).patients == 3


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        *((name, 0) for name in available_models()),
        # Moments have no layer that could be updated.
        *((name, 2) for name in available_models() if name != "phenotype-gaussian"),
    ],
)
def test_no_registered_model_is_a_carrier(name: str, rank: int) -> None:
    with torch.device("meta"):
        model = build_model(ModelSpec(name=name, text_encoder="hashed", lora_rank=rank))
    assert carriers(model) == []


def test_reasons_name_all_layers() -> None:
    module = nn.Sequential(network(nn.BatchNorm1d(WIDTH)), Codebook())
    assert [reason.split()[0] for reason in carriers(module)] == ["0.1", "1"]
    assert carriers(Codebook())[0].startswith("the module (Codebook)")
    plain = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    add_lora(plain, 1)
    assert carriers(plain) == []


def test_a_step_of_the_optimiser_is_a_change_and_a_pass_is_none() -> None:
    module = network(nn.LayerNorm(WIDTH))
    optimiser = torch.optim.SGD(module.parameters(), 0.1)
    with unchanged(module):
        loss_of(module)([torch.ones(2, WIDTH).double()]).sum().backward()
    with (
        pytest.raises(JobRefused, match=r"^0\.bias changes while gradients"),
        unchanged(module),
    ):
        optimiser.step()


def test_swapped_values_and_types_are_changes() -> None:
    module = network(HiddenCodebook())
    with pytest.raises(JobRefused, match=r"1\.codes"), unchanged(module):
        module[1].codes.data[0, 0] = math.nextafter(1.0, 2.0)
    with pytest.raises(JobRefused), unchanged(module):
        module.float()
    with pytest.raises(JobRefused, match="new"), unchanged(module):
        module.register_buffer("new", torch.zeros(1))


# What they leak: the positive control


def moved_by(make: Callable[[], nn.Module], everybody: list[list[Tensor]]) -> float:
    """Return how far the unprotected sum moves when the first patient stays away."""

    def total(some: list[list[Tensor]]) -> Tensor:
        module = network(make()).train()
        trained = [p for p in module.parameters() if p.requires_grad]
        return BackwardEngine(trained, loss_of(module)).clipped_sum(some, mechanism()).vector

    return float((total(everybody) - total(everybody[1:])).norm())


@pytest.mark.parametrize("make", [Codebook, HiddenCodebook, FittedScaler])
def test_unprotected_state_moves_the_sum_by_more_than_the_clip_norm(
    make: Callable[[], nn.Module],
) -> None:
    moves = [moved_by(make, patients(12, seed)) for seed in range(5)]
    assert max(moves) > 1.5 * CLIP
    harmless = [moved_by(lambda: nn.LayerNorm(WIDTH), patients(12, seed)) for seed in range(5)]
    assert max(harmless) <= CLIP * (1 + 1e-9)


def running_mean(some: list[list[Tensor]]) -> Tensor:
    module = network(nn.BatchNorm1d(WIDTH)).train()
    engine = BackwardEngine(list(module.parameters()), loss_of(module))
    engine.clipped_sum(some, mechanism(noise=1e6))
    mean = module[1].running_mean
    assert isinstance(mean, Tensor)
    return mean


def test_unprotected_running_statistics_tell_who_was_there_whatever_the_noise() -> None:
    """Noise of a million clip norms on the gradients; the statistics name the patient each time."""
    hits = 0
    for seed in range(20):
        everybody = patients(8, seed)
        with_first, without = running_mean(everybody), running_mean(everybody[1:])
        present = seed % 2 == 0
        released = running_mean(everybody if present else everybody[1:])
        guess = (released - with_first).norm() < (released - without).norm()
        hits += bool(guess) == present
        assert (with_first - without).norm() > 0.01
    assert hits == 20
