"""Draw synthetic cine clips from a CPGG model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from fedcmr_client.devices import on_device
from fedcmr_client.heart_requests import Heart
from fedcmr_client.heart_sampling import PhenotypeModel
from fedcmr_shared.errors import ModelError
from fedcmr_shared.models.cpgg import CPGG
from fedcmr_shared.models.masked_generator import PUBLISHED, SamplingPlan
from fedcmr_shared.models.release import CARD, ReleaseBundle, is_release, load_model

PLANS: Final[Mapping[str, SamplingPlan]] = {
    # Token by token and row by row, with less noise: in the published random order a network of this
    # size leaves torn hearts, and with more guidance it overshoots.
    "tiny": SamplingPlan(
        steps=18, diffusion_steps=50, guidance=1.0, temperature=0.5, order="raster"
    ),
    # On a tiny network 20 steps of this method do as well as 100:
    # benchmarks/results/cpgg_sampling.json.
    "small": SamplingPlan(diffusion_steps=20, method="dpm"),
    "paper": PUBLISHED,
}
"""How clips are drawn by size of the model, unless a user says otherwise."""

_BATCH: Final = 8
_SEEDS: Final = 2**32  # torch's generator for CPUs keeps no more of a seed


@dataclass(frozen=True, eq=False)
class ClipModel:
    """A network that draws clips; ``release`` says who released it, None if nobody did.

    ``release["trusted"]`` is whether the user named the key that signed it: else anybody may have.
    """

    network: CPGG
    size: str
    sha256: str
    release: Mapping[str, Any] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The phenotypes that the network is conditioned on."""
        return self.network.config.standardisation.names


@dataclass(frozen=True, eq=False)
class HeartModel:
    """A model that draws phenotypes, with its registered name and the hash of its weights."""

    distribution: PhenotypeModel
    name: str
    sha256: str


@dataclass(frozen=True)
class ClipRequest:
    """What one clip is to show: phenotypes as ``given`` and as ``completed``, and its own seed."""

    given: Heart
    completed: Heart
    seed: int


@dataclass(frozen=True, eq=False)
class SyntheticClip:
    """``frames`` float32 [frame, y, x] in [-1, 1] that a model drew for ``request``."""

    request: ClipRequest
    frames: NDArray[np.float32]


def load_clip_model(path: Path, trusted_key: str | None = None, device: str = "cpu") -> ClipModel:
    """Load a CPGG model from a bundle, or from a release that ``trusted_key`` signed if given.

    Raises:
        ModelError: the file is neither, is not signed by that key, or holds another kind of model.
        ConfigurationError: there is no such device.
    """
    release = _release(path, trusted_key) if is_release(path) else None
    bundle = release.bundle if release else load_model(path, trusted_key)
    if not isinstance(bundle.model, CPGG):
        raise ModelError(f"{path}: model {bundle.spec.name} draws no clips: use a cpgg model")
    network = on_device(bundle.model, device)
    described = _described(release, trusted_key is not None) if release else None
    return ClipModel(network, bundle.spec.size, bundle.sha256, described)


def load_phenotype_model(path: Path) -> HeartModel:
    """Load a model of phenotypes from a bundle, or from a release, whoever signed it.

    Raises:
        ModelError: the file is neither, or holds another kind of model.
    """
    bundle = load_model(path)
    if not isinstance(bundle.model, PhenotypeModel):
        raise ModelError(
            f"{path}: model {bundle.spec.name} draws no phenotypes: use a phenotype-vae or "
            "phenotype-gaussian model"
        )
    return HeartModel(bundle.model, bundle.spec.name, bundle.sha256)


def clip_seeds(seed: int, count: int) -> list[int]:
    """Return ``count`` different seeds of single clips; other seeds give others."""
    first = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return [(first + index) % _SEEDS for index in range(count)]


def draw_clips(
    network: CPGG,
    requests: Sequence[ClipRequest],
    plan: SamplingPlan,
    *,
    batch: int = _BATCH,
) -> Iterator[SyntheticClip]:
    """Yield a clip for each request, each drawn with its own seed.

    A clip depends on its batch by rounding errors only; the same requests give the same bytes on
    the same machine. ``network`` is in evaluation mode, on any device.

    Raises:
        ModelError: the network gives values that are not finite, or its device is out of memory.
    """
    names = network.config.standardisation.names
    device = next(network.parameters()).device
    for start in range(0, len(requests), batch):
        part = requests[start : start + batch]
        rows = [[one.completed.get(name, np.nan) for name in names] for one in part]
        generators = [torch.Generator().manual_seed(one.seed) for one in part]
        phenotypes = torch.tensor(rows, dtype=torch.float64)
        try:
            drawn = network.sample(phenotypes.to(device), generators, plan).float().cpu().numpy()
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"device {device} is out of memory for {len(part)} clips at once: use --device cpu, "
                "a GPU with more memory that is free, or a smaller model"
            ) from error
        if not np.isfinite(drawn).all():
            raise ModelError(
                f"the model gives clips that are not finite with guidance {plan.guidance:g}: use "
                "another guidance or model"
            )
        for request, frames in zip(part, drawn[:, 0], strict=True):
            yield SyntheticClip(request, frames)


def _release(path: Path, trusted_key: str | None) -> ReleaseBundle:
    if trusted_key is None:
        return ReleaseBundle.read(path)
    return ReleaseBundle.verify(path, trusted_key)


def _described(release: ReleaseBundle, trusted: bool) -> dict[str, Any]:
    card = release.card
    return {
        "card_sha256": release.signature.members[CARD],
        "release_sha256": release.sha256,
        "signed_by": release.signature.key,
        "trusted": trusted,
        "federation": card.federation,
        "job": card.job.name,
        "gates": {found.gate: found.text for found in card.gates},
    }
