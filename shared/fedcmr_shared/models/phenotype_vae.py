"""Variational autoencoder of phenotype vectors: the first stage of CPGG.

Written from the description of phenotype-guided generation of cine cardiac MR (arXiv 2505.03426):
three hidden layers on each side, leaky rectifiers, a last linear layer, squared error and a small
Kullback-Leibler weight. Layer norms take the place of batch norms, whose running statistics would
leave a site without noise; phenotypes are standardised by public constants. The last hidden layer,
as wide as the vector, has no norm: unlike a batch norm, a layer norm there would tie the phenotypes
of a patient to one another.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor, nn

from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.models.standardisation import PhenotypeScale, Standardisation


@dataclass(frozen=True)
class PhenotypeVAEConfig:
    """Widths of hidden layers and latents, the number of hidden layers, and the KL weight."""

    standardisation: Standardisation = field(default_factory=Standardisation.of_priors)
    hidden: int = 128
    layers: int = 3
    latents: int = 32
    kl_weight: float = 0.01

    def __post_init__(self) -> None:
        for name in ("hidden", "layers", "latents"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} {getattr(self, name)} must be at least 1")
        if not self.kl_weight >= 0:
            raise ConfigurationError(f"kl_weight {self.kl_weight} must not be negative")


CONFIGS: Final[dict[str, PhenotypeVAEConfig]] = {
    "tiny": PhenotypeVAEConfig(hidden=64, latents=16),
    "small": PhenotypeVAEConfig(hidden=96, latents=24),
    "paper": PhenotypeVAEConfig(),
}
"""Configurations by size: `paper` as published."""


class PhenotypeVAE(nn.Module):
    """Encoder and decoder of standardised phenotypes; values outside are in their units."""

    def __init__(self, config: PhenotypeVAEConfig) -> None:
        super().__init__()
        self.config = config
        width, hidden = len(config.standardisation), [config.hidden] * config.layers
        self.scale = PhenotypeScale(config.standardisation)
        self.encoder = _layers(width, *hidden)
        self.mean = nn.Linear(config.hidden, config.latents)
        self.log_variance = nn.Linear(config.hidden, config.latents)
        self.widen = nn.Linear(config.latents, config.hidden)
        last = nn.Sequential(nn.Linear(config.hidden, width), nn.LeakyReLU())
        self.decoder = nn.Sequential(*_layers(*hidden), last)
        self.out = nn.Linear(width, width)

    def encode(self, standard: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance ``[batch, latents]`` of standardised phenotypes."""
        hidden = self.encoder(standard)
        return self.mean(hidden), self.log_variance(hidden)

    def decode(self, latents: Tensor) -> Tensor:
        """Return standardised phenotypes ``[batch, names]``."""
        decoded: Tensor = self.out(self.decoder(self.widen(latents)))
        return decoded

    def forward(self, values: Tensor, noise: Tensor) -> Tensor:
        """Return each patient's loss ``[batch]``: squared error and weighted KL divergence.

        The error is a mean over the phenotypes that are there, the divergence a sum over latents.

        Args:
            values: ``[batch, names]`` in the phenotypes' units, NaN where missing.
            noise: standard normal numbers ``[batch, latents]``.
        """
        standard, known = self.scale(values)
        mean, log_variance = self.encode(standard)
        decoded = self.decode(mean + torch.exp(log_variance / 2) * noise)
        error = torch.where(known, decoded - standard, 0.0).square().sum(1)
        divergence = (mean.square() + log_variance.exp() - log_variance - 1).sum(1) / 2
        each: Tensor = error / known.sum(1).clamp(min=1) + self.config.kl_weight * divergence
        return each

    def loss(self, values: Tensor, generator: torch.Generator) -> Tensor:
        """Return the loss of ``values`` with latents drawn by ``generator``."""
        shape = (len(values), self.config.latents)
        noise = torch.randn(shape, generator=generator, device=generator.device)
        return self.forward(values, noise.to(self.widen.weight))

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        """Return ``count`` vectors of phenotypes ``[count, names]`` in their units.

        The identities between phenotypes hold only roughly; see
        :func:`fedcmr_shared.metrics.phenotypes.identities.project`.
        """
        shape = (count, self.config.latents)
        noise = torch.randn(shape, generator=generator, device=generator.device)
        latents = temperature * noise.to(self.widen.weight)
        return self.config.standardisation.undo(self.decode(latents))


class _Layer(nn.Sequential):
    """Linear layer, layer norm, leaky rectifier."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.LeakyReLU())


def _layers(*widths: int) -> nn.Sequential:
    return nn.Sequential(*map(_Layer, widths[:-1], widths[1:]))
