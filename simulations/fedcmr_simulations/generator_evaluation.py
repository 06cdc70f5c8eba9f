"""What a CPGG's clips are worth, measured against simulated hearts of patients it has not seen.

The hearts are parted in two. Distances are between clips of the first half and what became of the
second: the hearts themselves (the floor), their reconstructions by the autoencoder, clips generated
for their phenotypes, and the hearts with known damage, as a measure of what a distance means.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from fedcmr_shared.errors import ConfigurationError, DataError
from fedcmr_shared.metrics.clip_features import (
    Beat,
    BeatFeatures,
    Descriptors,
    Extractor,
    FrameFeatures,
    LatentFeatures,
    MotionFeatures,
    SpectrumFeatures,
)
from fedcmr_shared.metrics.generation import (
    Adherence,
    Clip,
    Distance,
    FeatureSample,
    FeatureSpace,
    Tables,
    compare_tables,
    distance,
    diversity,
)
from fedcmr_shared.metrics.phenotypes.short_axis import SINGLE_SLICE_UNITS
from fedcmr_shared.metrics.phenotypes.table import NAMES
from fedcmr_shared.models.cpgg import CPGG
from fedcmr_shared.models.masked_generator import SamplingPlan
from fedcmr_shared.models.segmenter import LoadedSegmenter
from fedcmr_simulations.clip_damage import DAMAGES
from fedcmr_simulations.generator_training import (
    FEWEST_MEASURED,
    GUIDANCES,
    PLAN,
    agreement,
    draw_clips,
    measure_clips,
)
from fedcmr_simulations.hearts import SimulatedHeart, expected_fac

Clips = Sequence[Clip]
Measured = Mapping[str, NDArray[np.float64]]
"""Phenotypes of one slice by name, ``[clip]``; NaN where a clip shows none."""

ALL: Final = "all phenotypes"
REAL: Final = "held-out"
REBUILT: Final = "reconstructed"
MADE: Final = "generated"
MADE_TO_REBUILT: Final = "generated, to reconstructed"
_FIRST: Final = "first half"
_FIRST_REBUILT: Final = "first half, reconstructed"
FEWEST_HEARTS: Final = 12
"""Halves of 6 clips: distances of fewer say nothing. Use many more."""
_AT_ONCE: Final = 16


@dataclass(frozen=True)
class EvaluationPlan:
    """What is drawn and asked for.

    ``guidances`` are swept beside ``sampling.guidance``, which is the one of everything else;
    ``alone`` are the phenotypes that are each also given alone, without the others.

    Raises:
        ConfigurationError: ``pairs`` is not positive.
    """

    sampling: SamplingPlan = PLAN
    guidances: tuple[float, ...] = GUIDANCES
    alone: tuple[str, ...] = ("LVEF",)
    pairs: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise ConfigurationError(f"pairs {self.pairs} must be at least 1")


@dataclass(frozen=True)
class Compared:
    """Distance of a set of clips to real clips of other patients, and that of as many real ones.

    ``unmeasured`` counts the clips of the set that show no heart; they are in no distance.
    """

    distance: Distance
    floor: Distance
    unmeasured: int

    @property
    def excess(self) -> float:
        """By how much the Fréchet distance lies above its floor."""
        return self.distance - self.floor


@dataclass(frozen=True)
class Distances:
    """Of one extractor, by set of clips; None where fewer than two clips of a set show a heart."""

    space: FeatureSpace
    sets: Mapping[str, Compared | None]


@dataclass(frozen=True)
class Sweep:
    """Clips drawn with one guidance: their diversity, and distances by name of the extractor."""

    guidance: float
    diversity: float
    distances: Mapping[str, Compared | None]


@dataclass(frozen=True)
class Obedience:
    """How one phenotype measured on a set of clips follows what was asked for.

    ``told`` says what the generator was told. ``result`` is None where too few could be measured.
    """

    clips: str
    told: str
    guidance: float | None
    phenotype: str
    result: Adherence | None
    unmeasured: int


@dataclass(frozen=True)
class Coherence:
    """How a set of clips beats: means over clips, by frame, and (mean, deviation) by descriptor.

    ``area`` is in shares of that at end diastole, ``strain`` in %.
    """

    clips: int
    area: tuple[float, ...]
    strain: tuple[float, ...]
    descriptors: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class GeneratorEvaluation:
    """Everything that was measured; the clips are simulated or generated, never clinical.

    ``distribution`` compares the phenotypes measured on generated with those on held-out clips.
    """

    hearts: int
    plan: EvaluationPlan
    distances: tuple[Distances, ...]
    diversity: Mapping[str, float]
    sweep: tuple[Sweep, ...]
    obedience: tuple[Obedience, ...]
    coherence: Mapping[str, Coherence]
    distribution: Tables | None

    def to_json(self) -> str:
        """Return the result as JSON; what is not finite becomes null."""
        return json.dumps(_plain(self), indent=1, allow_nan=False)


def evaluate_generator(
    model: CPGG,
    hearts: Sequence[SimulatedHeart],
    segmenter: LoadedSegmenter,
    plan: EvaluationPlan | None = None,
) -> GeneratorEvaluation:
    """Measure ``model`` against ``hearts``, which it must not have been trained on.

    Of an odd number the last one is left out. The same arguments give the same result.

    Raises:
        DataError: there are fewer than 12 hearts.
        ConfigurationError: the plan gives a phenotype alone that the model does not know.
        ModelError: clips or phenotypes of the hearts do not fit the model.
    """
    if len(hearts) < FEWEST_HEARTS:
        raise DataError(f"{len(hearts)} hearts are too few: give at least {FEWEST_HEARTS}")
    hearts = hearts[: 2 * (len(hearts) // 2)]
    plan = plan or EvaluationPlan()
    told = model.config.standardisation.names
    for name in plan.alone:
        if name not in told:
            raise ConfigurationError(f"alone: the model is not conditioned on {name}: leave it out")
    swept = sorted({*plan.guidances, plan.sampling.guidance})
    drawn = {each: _drawn(model, hearts, told, plan, each) for each in swept}
    real = [heart.clip for heart in hearts]
    clips = _Clips(real, _reconstructed(model, real), drawn[plan.sampling.guidance])
    sets = clips.sets(plan.seed)
    pixel_mm = model.config.pixel_mm
    motion = MotionFeatures(segmenter, pixel_mm)
    followed = {name: motion.beats(each) for name, each in sets.items()}
    still = (FrameFeatures(segmenter, pixel_mm), BeatFeatures(segmenter, pixel_mm))
    extractors = (*still, LatentFeatures(model.autoencoder), SpectrumFeatures())
    samples = [{name: look(each) for name, each in sets.items()} for look in extractors]
    samples += [{name: motion.of(beats, clips.half) for name, beats in followed.items()}]
    shown = {name: sets[name] for name in (REAL, REBUILT, MADE)}
    measured = {
        name: measure_clips(each, pixel_mm, segmenter.model) for name, each in shown.items()
    }
    return GeneratorEvaluation(
        hearts=len(hearts),
        plan=plan,
        distances=tuple(_distances(each) for each in samples),
        diversity={name: diversity(each, plan.pairs, plan.seed) for name, each in shown.items()},
        sweep=tuple(_sweep(clips, drawn, still, plan)),
        obedience=tuple(_obedience(model, hearts, segmenter, plan, clips, drawn)),
        coherence={name: _coherence(followed[name]) for name in shown if followed[name]},
        distribution=_distribution(measured[REAL], measured[MADE]),
    )


@dataclass(frozen=True, eq=False)
class _Clips:
    """Real, reconstructed and generated clips of the same hearts, an even number."""

    real: Clips
    rebuilt: Clips
    made: Clips

    @property
    def half(self) -> int:
        return len(self.real) // 2

    def sets(self, seed: int) -> dict[str, Clips]:
        """Sets of equally many clips; but for the first two all are of the second half's hearts."""
        rng = np.random.default_rng(seed)
        half = self.half
        later = self.real[half:]
        return {
            _FIRST: self.real[:half],
            _FIRST_REBUILT: self.rebuilt[:half],
            REAL: later,
            REBUILT: self.rebuilt[half:],
            MADE: self.made[half:],
            **{name: [damage(clip, rng) for clip in later] for name, damage in DAMAGES.items()},
        }


def _drawn(
    model: CPGG,
    hearts: Sequence[SimulatedHeart],
    told: Sequence[str],
    plan: EvaluationPlan,
    guidance: float,
) -> Clips:
    """Draw one clip for the phenotypes ``told`` of each heart; the others are said to be missing.

    A heart's clip depends on its place and the plan's seed, whatever the guidance.
    """
    names = model.config.standardisation.names
    known = [NAMES.index(name) for name in names]
    rows = np.stack([heart.phenotypes[known] for heart in hearts])
    rows[:, [name not in told for name in names]] = np.nan
    sampling = replace(plan.sampling, guidance=guidance)
    return list(draw_clips(model, torch.from_numpy(rows), sampling, plan.seed).numpy())


@torch.no_grad()
def _reconstructed(model: CPGG, clips: Clips) -> list[Clip]:
    batches = torch.split(torch.from_numpy(np.stack(clips))[:, None], _AT_ONCE)
    found = [model.autoencoder.decode(model.autoencoder.encode(each).mean) for each in batches]
    return list(torch.cat(found)[:, 0].clamp(-1, 1).numpy())


def asked(heart: SimulatedHeart) -> dict[str, float]:
    """Return what a clip for this heart should show.

    Areas are the heart's own in its slice; the fractional area change is that which hearts of its
    volumes have, as no phenotype tells more.
    """
    known = dict(zip(NAMES, map(float, heart.phenotypes), strict=True))
    return {**heart.single_slice, "LVFAC": expected_fac(known)}


def _distances(samples: Mapping[str, FeatureSample]) -> Distances:
    first, later = samples[_FIRST], samples[REAL]
    compared = [name for name in samples if name not in (_FIRST, _FIRST_REBUILT, REAL)]
    result = {name: _compare(first, samples[name], first, later) for name in compared}
    result[MADE_TO_REBUILT] = _compare(samples[_FIRST_REBUILT], samples[MADE], first, later)
    return Distances(first.space, result)


def _compare(
    reference: FeatureSample, sample: FeatureSample, first: FeatureSample, later: FeatureSample
) -> Compared | None:
    """Compare as many of each as the smallest of the four has."""
    count = min(len(each.values) for each in (reference, sample, first, later))
    if count < 2:
        return None
    a, b, c, d = (
        FeatureSample(each.space, each.values[:count]) for each in (reference, sample, first, later)
    )
    return Compared(distance(a, b), distance(c, d), sample.unmeasured)


def _sweep(
    clips: _Clips,
    drawn: Mapping[float, Clips],
    extractors: Sequence[Extractor],
    plan: EvaluationPlan,
) -> Iterator[Sweep]:
    half = clips.half
    real = [(each, each(clips.real[:half]), each(clips.real[half:])) for each in extractors]
    for guidance, everything in drawn.items():
        made = everything[half:]
        distances = {
            extractor.space.extractor: _compare(first, extractor(made), first, later)
            for extractor, first, later in real
        }
        yield Sweep(guidance, diversity(made, plan.pairs, plan.seed), distances)


def _obedience(
    model: CPGG,
    hearts: Sequence[SimulatedHeart],
    segmenter: LoadedSegmenter,
    plan: EvaluationPlan,
    clips: _Clips,
    drawn: Mapping[float, Clips],
) -> Iterator[Obedience]:
    """Rows for real and reconstructed clips, for each guidance, and for phenotypes told alone."""
    wanted = [asked(heart) for heart in hearts]
    requests = {
        name: np.array([row.get(name, math.nan) for row in wanted]) for name in SINGLE_SLICE_UNITS
    }
    guidance = plan.sampling.guidance
    rows: list[tuple[str, str, float | None, Clips]] = [
        (REAL, "", None, clips.real),
        (REBUILT, "", None, clips.rebuilt),
        *((MADE, ALL, each, made) for each, made in drawn.items()),
        *(
            (MADE, f"{name} alone", guidance, _drawn(model, hearts, (name,), plan, guidance))
            for name in plan.alone
        ),
    ]
    for name, told, strength, shown in rows:
        measured = measure_clips(shown, model.config.pixel_mm, segmenter.model)
        yield from _follows(name, told, strength, requests, measured)
        if told == ALL and strength == guidance:
            # What an evaluation says of a generator that mixes up its requests.
            others = {key: np.roll(values, 1) for key, values in requests.items()}
            yield from _follows(MADE, "the phenotypes of another heart", strength, others, measured)


def _follows(
    clips: str, told: str, guidance: float | None, requests: Measured, measured: Measured
) -> Iterator[Obedience]:
    for name, wanted in requests.items():
        missing = int((~np.isfinite(wanted) | ~np.isfinite(measured[name])).sum())
        result = agreement(wanted, measured[name])
        yield Obedience(clips, told, guidance, name, result, missing)


def _coherence(beats: Sequence[Beat]) -> Coherence:
    numbers = np.array([beat.descriptors() for beat in beats])
    means, deviations = numbers.mean(axis=0), numbers.std(axis=0)
    return Coherence(
        clips=len(beats),
        area=_mean_curve([beat.area / beat.area[0] for beat in beats]),
        strain=_mean_curve([beat.strain for beat in beats]),
        descriptors={
            name: (float(mean), float(deviation))
            for name, mean, deviation in zip(Descriptors._fields, means, deviations, strict=True)
        },
    )


def _mean_curve(curves: Sequence[NDArray[np.float64]]) -> tuple[float, ...]:
    return tuple(map(float, np.mean(curves, axis=0)))


def _distribution(real: Measured, made: Measured) -> Tables | None:
    columns = [
        np.stack([each[name] for name in SINGLE_SLICE_UNITS], axis=1) for each in (real, made)
    ]
    kept = [rows[np.isfinite(rows).all(axis=1)] for rows in columns]
    if min(map(len, kept)) < FEWEST_MEASURED:
        return None
    return compare_tables(tuple(SINGLE_SLICE_UNITS), *kept)


def _plain(value: Any) -> Any:
    """``value`` in what JSON knows."""
    if isinstance(value, Compared):  # its space stands above it
        return {
            "frechet": value.distance.frechet,
            "kernel": value.distance.kernel,
            "floor": value.floor.frechet,
            "kernel floor": value.floor.kernel,
            "excess": value.excess,
            "samples": list(value.distance.samples),
            "unmeasured": value.unmeasured,
        }
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
