"""Networks on which the laws of the private step are tested, and two processes that share steps.

As a script it joins the ranks that its environment names and answers jobs from standard input:
each line is the path of a file with a job's name and arguments, `PATH.RANK` its answer.
"""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from fedcmr_shared.models.registry import build_model
from fedcmr_shared.privacy import step
from fedcmr_shared.privacy.distributed import NoiseShare
from fedcmr_shared.privacy.mechanism import BackwardEngine, Mechanism
from fedcmr_shared.privacy.parts import freeze, trainable_names
from fedcmr_shared.privacy.ranks import Ranks, joined
from fedcmr_shared.schemas.job import ModelSpec

LossOf = Callable[[nn.Module], Callable[[Sequence[Tensor]], Tensor]]


def image_loss(module: nn.Module) -> Callable[[Sequence[Tensor]], Tensor]:
    """Squared error against ones; an example is one image [2, 8, 8]."""
    return lambda examples: (module(torch.stack(list(examples))) - 1).square().flatten(1).mean(1)


class Plain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.GroupNorm(2, 4),
            nn.Tanh(),
            nn.Conv2d(4, 2, 3, stride=2),
            nn.Flatten(),
            nn.Linear(18, 3),
        )


class Fourier(nn.Module):
    """One convolution used in two iterations, with complex images and an FFT between."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            spectrum = torch.fft.fft2(torch.complex(x[:, 0], x[:, 1]), norm="ortho")
            x = x + torch.tanh(self.shared(torch.stack([spectrum.real, spectrum.imag], 1)))
        return x


class ComplexWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, dtype=torch.complex64) / 3)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_real(torch.complex(x[:, 0], x[:, 1]) @ self.weight)


class SeveralInputs(nn.Module):
    """A bare parameter on the root and a layer with two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([0.7]))
        self.mix = nn.Bilinear(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x[:, 0] * self.gain, x[:, 1])


class Coils(nn.Module):
    """Both planes of an image, folded into the batch as coils are."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Conv2d(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.each(x.flatten(0, 1)[:, None]).reshape(len(x), -1)


class TiedWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


NETWORKS: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (Plain, Fourier, ComplexWeights, SeveralInputs, Coils, TiedWeights)
}


def kspace_loss(variant: str) -> LossOf:
    """Mean magnitude of the reconstruction; an example is k-space [coil, y, x]."""

    def loss_of(module: nn.Module) -> Callable[[Sequence[Tensor]], Tensor]:
        def loss(examples: Sequence[Tensor]) -> Tensor:
            kspace = torch.stack(list(examples))
            lines = torch.arange(kspace.shape[-2]) % 4 == 0
            acs = (torch.arange(kspace.shape[-2]) - kspace.shape[-2] // 2).abs() < 4
            text = torch.linspace(-1, 1, 32, dtype=kspace.real.dtype).expand(len(kspace), -1)
            masks = [
                m[None, None, :, None].expand(len(kspace), 1, -1, kspace.shape[-1])
                for m in (lines | acs, acs)
            ]
            return module(kspace * masks[0], *masks, text, text).image.flatten(1).mean(1)

        return loss

    return loss_of


def network(name: str, dtype: torch.dtype) -> tuple[nn.Module, list[nn.Parameter], LossOf]:
    """Return a network of fixed weights, its trained parameters and loss.

    ``name`` is one of :data:`NETWORKS`, or `cardiomm VARIANT PART`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        if name in NETWORKS:
            module = NETWORKS[name]()
            parameters, loss_of = list(module.parameters()), image_loss
        else:
            _, variant, part = name.split()
            rank = 2 if part == "lora" else 0
            spec = ModelSpec(variant=variant, text_encoder="hashed", lora_rank=rank)
            module = build_model(spec)
            parameters = freeze(module, trainable_names(spec, module, part))
            loss_of = kspace_loss(variant)
    if dtype == torch.float64:
        module = module.double()
        for parameter in parameters:
            if parameter.is_complex():
                parameter.data = parameter.data.to(torch.complex128)
    return module, parameters, loss_of


# Jobs of several ranks


def summed(
    ranks: Ranks,
    name: str,
    dtype: torch.dtype,
    patients: list[list[Tensor]],
    mechanism: Mechanism,
) -> Tensor:
    """Return the sum of the whole step at rate 1; the mechanism's noise should be negligible."""
    module, parameters, loss_of = network(name, dtype)
    engine = BackwardEngine(parameters, loss_of(module))
    result = step.private_gradient(
        engine, patients, lambda patient: patient, mechanism, 1.0, ranks=ranks
    )
    return torch.cat([g.flatten() for g in result.gradients]) * mechanism.expected_patients


def stepped(
    ranks: Ranks, cohort: int, rate: float, coordinates: int, mechanism: Mechanism
) -> tuple[Tensor, list[int], step.PatientCounts]:
    """Take a step in which every patient's gradient is one everywhere, as far as not clipped."""
    weight = nn.Parameter(torch.zeros(coordinates, dtype=torch.float64))
    engine = BackwardEngine([weight], lambda examples: weight.sum().expand(len(examples)))
    loaded: list[int] = []

    def load(patient: int) -> list[int]:
        loaded.append(patient)
        return [patient]

    if ranks.index > 0:
        # Whatever another rank draws must not count.
        step.draw_patients = step.noisy_mean = None  # type: ignore[assignment]
    result = step.private_gradient(engine, range(cohort), load, mechanism, rate, ranks=ranks)
    return result.gradients[0], loaded, result.counts


def shared_integers(
    ranks: Ranks, cohort: int, coordinates: int, mechanism: Mechanism, share: NoiseShare
) -> Tensor:
    """Take a step with distributed noise in which every patient's gradient is one everywhere."""
    weight = nn.Parameter(torch.zeros(coordinates))
    engine = BackwardEngine([weight], lambda examples: weight.sum().expand(len(examples)))
    if ranks.index > 0:
        step.noisy_integers = None  # type: ignore[assignment]
    result = step.private_integers(
        engine, range(cohort), lambda patient: [patient], mechanism, 1.0, share, ranks=ranks
    )
    return result.gradients[0]


class RankPair:
    """Two processes started as `torchrun` would; files for jobs and answers are in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count()

    def __enter__(self) -> Self:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        self._workers = [
            subprocess.Popen(
                [sys.executable, __file__],
                env={**os.environ, **place, "RANK": str(rank), "WORLD_SIZE": "2"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.communicate(timeout=30)

    def ask(self, job: str, **arguments: Any) -> list[Any]:
        """Return both ranks' answers to a job of this file."""
        path = self._folder / f"{next(self._numbers)}.pt"
        torch.save((job, arguments), path)
        for worker in self._workers:
            assert worker.stdin is not None
            worker.stdin.write(f"{path}\n")
            worker.stdin.flush()
        for worker in self._workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "done\n", "a rank failed"
        return [torch.load(f"{path}.{rank}", weights_only=False) for rank in range(2)]


def main() -> None:
    jobs: dict[str, Callable[..., Any]] = {
        "summed": summed,
        "stepped": stepped,
        "shared_integers": shared_integers,
    }
    with joined(torch.device("cpu")) as ranks:
        for line in sys.stdin:
            path = Path(line.strip())
            name, arguments = torch.load(path, weights_only=False)
            answer = jobs[name](ranks, **arguments)
            torch.save(answer, f"{path}.{ranks.index}")
            print("done", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
