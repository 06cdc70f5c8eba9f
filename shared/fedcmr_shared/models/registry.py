"""Networks by name, so that jobs and bundles can name what they need."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final, get_args

import torch
from pydantic import ValidationError
from torch import nn

from fedcmr_shared.errors import ModelError
from fedcmr_shared.models import cardiomm, cpgg, phenotype_gaussian, phenotype_vae
from fedcmr_shared.models.lora import add_lora
from fedcmr_shared.schemas.job import JobSpec, ModelSpec, Part
from fedcmr_shared.schemas.privacy import Metric
from fedcmr_shared.text.encoders import TEXT_WIDTHS


@dataclass(frozen=True)
class ModelEntry:
    """A family of networks: what it does, its sizes and variants, and how to build one.

    ``parts`` tells of each part that a job can train which parameter names belong to it; `full` is
    everything that may be trained at all. Part `lora` trains low-rank updates of the layers that
    ``updated`` names, in all models, and is not listed. ``scores`` are what sites can evaluate.
    """

    description: str
    sizes: tuple[str, ...]
    variants: tuple[str, ...]
    build: Callable[[ModelSpec], nn.Module]
    parts: Mapping[Part, Callable[[str], bool]]
    updated: Callable[[str], bool] = lambda name: True
    scores: tuple[Metric, ...] = ()

    def scoring_problem(self, job: JobSpec) -> str | None:
        """Say what is wrong with how ``job`` evaluates this family; None when nothing is."""
        if job.privacy is None:
            return None
        if not job.evaluated_rounds():
            if "memorisation" not in self.scores:
                return None
            return (
                f"privacy.evaluation: {job.model.name} can be released only when the sites' gates "
                "find no copies of patients: write rounds last and metrics [memorisation]"
            )
        foreign = [name for name in job.privacy.evaluation.metrics if name not in self.scores]
        if not foreign:
            return None
        known = f"use {', '.join(self.scores)}" if self.scores else "write rounds none"
        return f"privacy.evaluation.metrics: {foreign[0]} is none of {job.model.name}'s: {known}"


def _cardiomm(spec: ModelSpec) -> nn.Module:
    return cardiomm.CardioMM(
        replace(
            cardiomm.CONFIGS[spec.size],
            variant=spec.variant,
            text_width=TEXT_WIDTHS[spec.text_encoder],
        )
    )


def _names(*patterns: str) -> Callable[[str], bool]:
    """Return whether a name contains a match of any of the regular expressions."""
    expression = re.compile("|".join(patterns))
    return lambda name: expression.search(name) is not None


_CARDIOMM_PARTS: Final[dict[Part, Callable[[str], bool]]] = {
    # The prompt banks are frozen in all parts.
    "full": _names(r"^(?!.*prompter\.bank$)"),
    "decoder": _names(r"^cascades\.\d+\.unet\.(decoder|tail)\.(?!.*prompter\.bank$)"),
    # Small parameters that modulate features which the others compute.
    "adapters": _names(
        r"adapter\.(gate\.\w+|scale|shift)$",
        r"attention\.(squeeze|excite)\.",
        r"activation\.weight$",
        r"consistency_weight$",
        r"unet\.tail\.bias$",
    ),
    "prompts": _names(r"prompter\.(mix|refine)\.", r"^(metadata|sampling)_head\."),
}

_CPGG_PARTS: Final[dict[Part, Callable[[str], bool]]] = {
    # The autoencoder is frozen in all parts.
    "full": _names(r"^generator\."),
    "decoder": _names(r"^generator\.(between|unknown|decoder|decoder_places|diffusion)\."),
    "adapters": _names(r"^generator\..*norm\.", r"^generator\..*modulation\.bias$"),
    "prompts": _names(r"^generator\.(condition|no_condition)\."),
}

_PHENOTYPE_VAE_PARTS: Final[dict[Part, Callable[[str], bool]]] = {
    "full": _names(r""),
    "decoder": _names(r"^(widen|decoder|out)\."),
    "adapters": _names(r"^(encoder|decoder)\.\d+\.1\."),  # layer norms
}

_MOMENTS_PARTS: Final[dict[Part, Callable[[str], bool]]] = {"full": _names(r"^moments$")}

_WITHOUT_WORDS: Final = ("MM",)  # the default of a job, which does not matter to them

_MODELS: Final[dict[str, ModelEntry]] = {
    "cardiomm": ModelEntry(
        description="text-conditioned unrolled reconstruction (arXiv 2512.21652)",
        sizes=tuple(cardiomm.CONFIGS),
        variants=get_args(cardiomm.Variant),
        build=_cardiomm,
        parts=_CARDIOMM_PARTS,
        scores=("psnr", "ssim", "nmse"),
    ),
    "cpgg": ModelEntry(
        description="cine clips from phenotypes: frozen autoencoder, masked generator (2505.03426)",
        sizes=tuple(cpgg.CONFIGS),
        variants=_WITHOUT_WORDS,
        build=lambda spec: cpgg.CPGG(cpgg.CONFIGS[spec.size]),
        parts=_CPGG_PARTS,
        updated=_names(
            r"^generator\.condition$",
            r"^generator\..*\.(attention|attention_out|modulation)$",
        ),
        scores=("memorisation",),
    ),
    "phenotype-gaussian": ModelEntry(
        description="normal distribution of phenotypes from one private release",
        sizes=tuple(phenotype_gaussian.CONFIGS),
        variants=_WITHOUT_WORDS,
        build=lambda spec: phenotype_gaussian.PhenotypeMoments(
            phenotype_gaussian.CONFIGS[spec.size]
        ),
        parts=_MOMENTS_PARTS,
        updated=lambda name: False,
    ),
    "phenotype-vae": ModelEntry(
        description="vectors of phenotypes for cpgg (arXiv 2505.03426)",
        sizes=tuple(phenotype_vae.CONFIGS),
        variants=_WITHOUT_WORDS,
        build=lambda spec: phenotype_vae.PhenotypeVAE(phenotype_vae.CONFIGS[spec.size]),
        parts=_PHENOTYPE_VAE_PARTS,
    ),
}


def available_models() -> dict[str, ModelEntry]:
    """Return all models by name, sorted."""
    return dict(sorted(_MODELS.items()))


def model_entry(name: str) -> ModelEntry:
    """Return one model's entry.

    Raises:
        ModelError: there is no model of that name.
    """
    if name not in _MODELS:
        raise ModelError(f"model {name!r} is unknown: use {', '.join(available_models())}")
    return _MODELS[name]


def build_model(spec: ModelSpec) -> nn.Module:
    """Return a new network with the weights that torch's current random state gives.

    With ``lora_rank`` its layers have low-rank updates, which are then all that is trainable.

    Raises:
        ModelError: there is no model of that name, size or variant.
    """
    entry = model_entry(spec.name)
    if spec.size not in entry.sizes:
        raise ModelError(f"{spec.name} has no size {spec.size!r}: use {', '.join(entry.sizes)}")
    if spec.variant not in entry.variants:
        known = ", ".join(entry.variants)
        raise ModelError(f"{spec.name} has no variant {spec.variant!r}: use {known}")
    model = entry.build(spec)
    if spec.lora_rank:
        add_lora(model, spec.lora_rank, entry.updated)
    return model


def parameter_counts(
    name: str, size: str, *, variant: str = "MM", text_encoder: str = "minilm"
) -> dict[str, int]:
    """Return the numbers of ``trainable``, ``frozen`` and ``total`` values of a network's state.

    Frozen are all values that no optimiser changes, persistent buffers included. No memory is
    used for the weights, so any size is counted at once. The text encoder is no part of the
    network and does not count; it sets the width of the text projections.

    Raises:
        ModelError: unknown name, size, variant or text encoder.
    """
    model_entry(name)
    choice = {"size": size, "variant": variant, "text_encoder": text_encoder}
    try:
        spec = ModelSpec.model_validate({"name": name, **choice})
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        raise ModelError(f"{field} {choice[field]!r} is unknown: {first['msg']}") from error
    with torch.device("meta"):
        model = build_model(spec)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(tensor.numel() for tensor in model.state_dict().values())
    return {"trainable": trainable, "frozen": total - trainable, "total": total}
