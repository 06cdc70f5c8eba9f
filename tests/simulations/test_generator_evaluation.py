"""The evaluation tells a generator that obeys from one that does not."""

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from drawn_hearts import PIXEL_MM, drawn_heart
from torch import Tensor

from fedcmr_shared.errors import ConfigurationError, DataError
from fedcmr_shared.metrics.phenotypes.table import NAMES, PhenotypeTable
from fedcmr_shared.models.cpgg import CPGG, CPGGConfig
from fedcmr_shared.models.masked_generator import PUBLISHED, MaskedGeneratorConfig, SamplingPlan
from fedcmr_shared.models.segmenter import load_segmenter
from fedcmr_shared.models.video_vae import VideoVAEConfig
from fedcmr_simulations.clip_damage import DAMAGES
from fedcmr_simulations.generator_evaluation import (
    ALL,
    MADE,
    MADE_TO_REBUILT,
    REAL,
    REBUILT,
    EvaluationPlan,
    GeneratorEvaluation,
    Obedience,
    evaluate_generator,
)
from fedcmr_simulations.hearts import SimulatedHeart, expected_fac

VIDEO = VideoVAEConfig((8, 48, 48), (2, 4), ((2, 4, 4),), blocks=1, groups=2, latents=1)
CONFIG = CPGGConfig(
    video=VIDEO,
    generator=MaskedGeneratorConfig(
        latent_shape=VIDEO.latent_shape,
        patch=(4, 12, 12),
        width=8,
        heads=1,
        encoder_blocks=1,
        decoder_blocks=1,
        condition_tokens=1,
    ),
    pixel_mm=PIXEL_MM,
)
PLAN = EvaluationPlan(SamplingPlan(guidance=1.0), guidances=(0.0,), pairs=8)


def phenotypes(edv: float, fraction: float) -> dict[str, float]:
    return {"LVEDV": edv, "LVESV": edv * (1 - fraction), "LVEF": 100 * fraction, "LVM": 110.0}


def drawn_for(known: dict[str, float], seed: int) -> np.ndarray:
    shortening = 1 - math.sqrt(1 - expected_fac(known) / 100)
    return drawn_heart(24 * (known["LVEDV"] / 146) ** 0.35, shortening, seed=seed)


def heart(number: int) -> SimulatedHeart:
    rng = np.random.default_rng([7, number])
    known = phenotypes(rng.uniform(100, 220), rng.uniform(0.2, 0.55))
    clip = drawn_for(known, number)
    radius = 24 * (known["LVEDV"] / 146) ** 0.35
    areas = {"LVEDA": math.pi * radius**2}
    areas["LVESA"] = areas["LVEDA"] * (1 - expected_fac(known) / 100)
    areas |= {"LVMA": math.pi * ((radius + 9) ** 2 - radius**2), "LVFAC": expected_fac(known)}
    return SimulatedHeart(f"drawn-{number}", clip, PhenotypeTable.of([known]).values[0], areas)


class Draughtsman(CPGG):
    """Draws the heart that it is asked for, where guidance is not 0; otherwise any heart."""

    def sample(
        self,
        phenotypes: Tensor,
        generators: Sequence[torch.Generator],
        plan: SamplingPlan = PUBLISHED,
    ) -> Tensor:
        clips = []
        for row, generator in zip(phenotypes.tolist(), generators, strict=True):
            seed = int(torch.randint(1 << 30, (1,), generator=generator))
            told = {n: v for n, v in zip(NAMES, row, strict=True) if math.isfinite(v)}
            draws = np.random.default_rng(seed)
            edv = told.get("LVEDV", draws.uniform(100, 220))
            fraction = told.get("LVEF", 0.0) / 100
            if plan.guidance == 0:
                edv, fraction = draws.uniform(100, 220), draws.uniform(0.2, 0.55)
            known = {"LVEDV": edv, "LVESV": edv * (1 - fraction), "LVM": 110.0}
            clips.append(torch.from_numpy(drawn_for(known, seed)))
        return torch.stack(clips)[:, None]


@pytest.fixture(scope="module")
def found() -> GeneratorEvaluation:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Draughtsman(CONFIG).eval()
    # The last one of an odd number is left out.
    return evaluate_generator(model, [heart(n) for n in range(13)], load_segmenter(), PLAN)


def row(found: GeneratorEvaluation, told: str, guidance: float | None, name: str) -> Obedience:
    (chosen,) = (
        each
        for each in found.obedience
        if (each.told, each.guidance, each.phenotype) == (told, guidance, name)
        and each.clips != REBUILT
    )
    return chosen


def r2(found: GeneratorEvaluation, told: str, guidance: float | None, name: str) -> float:
    result = row(found, told, guidance, name).result
    assert result is not None
    return result.r2


class TestObedience:
    def test_a_generator_that_obeys_is_as_good_as_the_hearts_themselves(
        self, found: GeneratorEvaluation
    ) -> None:
        assert r2(found, "", None, "LVFAC") > 0.9
        assert r2(found, ALL, 1.0, "LVFAC") > 0.9
        assert r2(found, ALL, 1.0, "LVEDA") > 0.7

    def test_without_guidance_it_does_not_and_neither_do_mixed_up_requests(
        self, found: GeneratorEvaluation
    ) -> None:
        assert r2(found, ALL, 0.0, "LVFAC") < 0.3
        assert r2(found, "the phenotypes of another heart", 1.0, "LVFAC") < 0.3

    def test_the_ejection_fraction_alone_tells_the_change_but_not_the_size(
        self, found: GeneratorEvaluation
    ) -> None:
        assert r2(found, "LVEF alone", 1.0, "LVFAC") > 0.6
        assert r2(found, "LVEF alone", 1.0, "LVEDA") < 0.5

    def test_clips_without_a_heart_have_no_figures(self, found: GeneratorEvaluation) -> None:
        """The autoencoder here is untrained."""
        rows = [each for each in found.obedience if each.clips == REBUILT]
        assert min(each.unmeasured for each in rows) > 6
        assert any(each.unmeasured == 12 for each in rows)
        assert all((each.result is None) == (each.unmeasured > 9) for each in rows)


class TestDistances:
    def test_each_damage_is_noticed_by_some_extractor(self, found: GeneratorEvaluation) -> None:
        for damage in DAMAGES:
            shares = []
            for each in found.distances:
                compared = each.sets[damage]
                if compared is not None:
                    shares.append(compared.distance.frechet / compared.floor.frechet)
            assert max(shares) > 1.5, damage

    def test_what_is_generated_well_is_near_and_bad_reconstructions_are_far(
        self, found: GeneratorEvaluation
    ) -> None:
        for each in found.distances[:2]:
            made, rebuilt = each.sets[MADE], each.sets[REBUILT]
            assert made is not None
            assert rebuilt is not None
            assert made.distance < rebuilt.distance
            assert rebuilt.excess > 0
            assert made.floor == rebuilt.floor
            assert each.sets[MADE_TO_REBUILT] is not None

    def test_motion_cannot_be_compared_where_no_heart_is(self, found: GeneratorEvaluation) -> None:
        motion = found.distances[-1]
        assert motion.sets[REBUILT] is None
        assert motion.sets[MADE] is not None


def test_still_and_beating_hearts_have_curves(found: GeneratorEvaluation) -> None:
    for name in (REAL, MADE):
        curve = found.coherence[name].area
        assert curve[0] == 1
        assert min(curve) == curve[4]
        assert min(found.coherence[name].strain) < -5


def test_the_result_is_json_and_says_how_it_was_measured(found: GeneratorEvaluation) -> None:
    said = json.loads(found.to_json())
    assert said["hearts"] == 12
    assert said["plan"]["sampling"]["guidance"] == 1.0
    assert [each["guidance"] for each in said["sweep"]] == [0.0, 1.0]
    for each in said["distances"]:
        assert set(each["space"]) == {"extractor", "dimensions", "preprocessing", "sha256"}
        assert len(each["sets"]["blurred"]["samples"]) == 2
    assert said["distribution"]["wasserstein"].keys() == {"LVEDA", "LVESA", "LVMA", "LVFAC"}


def test_every_row_is_about_as_many_hearts(found: GeneratorEvaluation) -> None:
    assert found.hearts == 12
    results = [(each.result, each.unmeasured) for each in found.obedience]
    assert {result.samples + missing for result, missing in results if result} == {12}


def test_refusals() -> None:
    with pytest.raises(ConfigurationError, match="pairs 0"):
        EvaluationPlan(pairs=0)
    with pytest.raises(DataError, match="2 hearts are too few: give at least 12"):
        evaluate_generator(CPGG(CONFIG), [heart(0), heart(1)], load_segmenter())
    unknown = EvaluationPlan(alone=("LVEF", "LVFAC"))
    with pytest.raises(ConfigurationError, match="alone: the model is not conditioned on LVFAC"):
        evaluate_generator(CPGG(CONFIG), [heart(0)] * 12, load_segmenter(), unknown)
