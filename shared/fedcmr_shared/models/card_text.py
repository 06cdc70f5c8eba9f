"""A model card as Markdown, for people.

The text is part of release format 1: who verifies a release writes it again and compares. So for
the same card it never changes; another text needs another format.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fedcmr_shared.audit.claims import delta_text, epsilon_text
from fedcmr_shared.models.card import Evaluation, LineageRound, ModelCard
from fedcmr_shared.privacy.job_claim import JobClaim, PhaseClaim
from fedcmr_shared.schemas.privacy import NoiseShares


def card_text(card: ModelCard) -> str:
    """Return the card as Markdown; the same card gives the same text on every machine."""
    sections = (_head(card), _use(card), _privacy(card), _results(card), _lineage(card), _end(card))
    return "\n\n".join(block for section in sections for block in section) + "\n"


def privacy_sentence(claim: JobClaim) -> str:
    """Return the claim in one sentence; it leaves nothing out that weakens it."""
    text = (
        f"This job costs a patient of any one site at most ε = {epsilon_text(claim.epsilon)} at "
        f"δ = {delta_text(claim.delta)}."
    )
    if claim.without_noise:
        text += " The figures of evaluation left the sites without noise and are not covered."
    if claim.shared_noise is not None:
        text += f" {_shared(claim.shared_noise)}"
    return text


def _shared(shares: NoiseShares) -> str:
    return (
        "Sites shared the noise: the ε holds only if secure aggregation holds and at most "
        f"{shares.unseen_sites} of the at least {shares.sites} sites in a sum work with the "
        "coordinator."
    )


def _head(card: ModelCard) -> Iterator[str]:
    model = card.job.model
    yield f"# {card.job.name}"
    yield (
        f"{model.name} {model.size} {model.variant}, trained by the federation "
        f"{_plain(card.federation)}, released {card.created_at.isoformat()}."
    )


def _use(card: ModelCard) -> Iterator[str]:
    yield "## Use"
    yield _plain(card.intended_use)
    yield "\n".join(f"- {_plain(limit)}" for limit in card.limits)


def _privacy(card: ModelCard) -> Iterator[str]:
    claim = card.privacy
    noise = "Gaussian noise" if claim.shared_noise is None else "shares of discrete Gaussian noise"
    yield "## Privacy"
    yield privacy_sentence(claim)
    yield (
        f"The unit is the {claim.unit}, the relation {claim.relation}. The mechanism is DP-SGD "
        f"with Poisson sampling of patients, each gradient clipped to C = {claim.clip_norm:g} "
        f"({claim.clipping}), and {noise} once per step. Certified by a Rényi divergence at "
        f"order {claim.order}, which follows from the job's published numbers; spare rounds are "
        "counted as if all had been used."
    )
    rows = (
        (
            name,
            f"{phase.release.sampling_rate:g}",
            _sigma(phase),
            f"{phase.steps}",
            "no bound" if phase.epsilon is None else epsilon_text(phase.epsilon),
        )
        for name, phase in sorted(claim.phases.items(), reverse=True)
    )
    yield _table(("phase", "q", "σ", "steps", "ε"), rows)
    if card.asks_energy:
        yield _energy(card.energy_kwh)


def _energy(kwh: float | None) -> str:
    found = "There is no figure." if kwh is None else f"It adds up to {kwh:g} kWh."
    return (
        "Sites whose policy lets it also gave the energy that the job took, rounded up, in a sum "
        f"without noise: no ε covers it. {found}"
    )


def _sigma(phase: PhaseClaim) -> str:
    noise = phase.release.noise_multiplier
    return "none" if noise is None else f"{noise:g}"


def _results(card: ModelCard) -> Iterator[str]:
    yield "## Results"
    privacy = card.job.privacy
    if privacy is not None and privacy.evaluation.memorisation:
        yield (
            "After the last round each site searched samples of the model for copies of its "
            "patients. Of what it found only one bit left, in the number of sites whose gate passed, "
            "a sum without noise: no ε covers it. What the gates found stands under Gates."
        )
        return
    if not card.evaluation:
        yield "The model was not evaluated at the sites."
        return
    noise = card.privacy.phases["evaluate"].release.noise_multiplier
    how = "without noise" if noise is None else f"with noise (σ = {noise:g})"
    yield f"Means over held-out patients of all sites, which left the sites as sums {how}."
    yield _table(("round", "sites", "means"), map(_evaluated, card.evaluation))


def _evaluated(found: Evaluation) -> tuple[str, ...]:
    means = ", ".join(f"{name} {value:.4g}" for name, value in sorted(found.means.items()))
    return f"{found.round}", f"{found.sites}", means


def _lineage(card: ModelCard) -> Iterator[str]:
    lineage, start = card.lineage, card.lineage.start
    yield "## Lineage"
    origin = "the job's seed" if start.origin == "seed" else "a bundle"
    yield f"Job `{card.job_sha256}`. Started from {origin}, model `{start.model_sha256}`."
    if start.notes:
        notes = (f"- {_plain(k)}: {_plain(v)}" for k, v in sorted(start.notes.items()))
        yield "\n".join(notes)
    yield _table(("round", "sites", "model after it"), map(_round, lineage.rounds))
    roster = lineage.roster_sha256
    yield "No roster." if roster is None else f"Roster `{roster}`."


def _round(one: LineageRound) -> tuple[str, ...]:
    return f"{one.number}", "closed" if one.closed else f"{one.sites}", f"`{one.model_sha256}`"


def _end(card: ModelCard) -> Iterator[str]:
    yield "## Gates"
    gates = [f"- {found.gate}: {_plain(found.text)}" for found in card.gates]
    yield "\n".join(gates) if gates else "None apply to this kind of model."
    yield "## Software"
    yield ", ".join(
        f"{_plain(name)} {_plain(text)}" for name, text in sorted(card.software.items())
    )


def _table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _plain(text: str) -> str:
    """Return ``text`` on one line and without what Markdown or HTML would act on."""
    return "".join(f"\\{c}" if c in r"\`*_[]<>#|&!" else c for c in " ".join(text.split()))
