"""Hearts to ask for, hearts to draw, and the clips that a model makes of them."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from generator_parts import MICRO, NAMES, micro, moved
from release_parts import write_model

from fedcmr_client.generation import (
    PLANS,
    ClipRequest,
    clip_seeds,
    draw_clips,
    load_clip_model,
    load_phenotype_model,
)
from fedcmr_client.heart_requests import complete, known_name, parse_settings, read_requests
from fedcmr_client.heart_sampling import sample_model, sample_prior
from fedcmr_shared.errors import ConfigurationError, DataError, ModelError
from fedcmr_shared.metrics.phenotypes.table import (
    CAVITIES,
    PHENOTYPES,
    VESSELS,
    Cavity,
    implausible,
    phenotype,
)
from fedcmr_shared.metrics.phenotypes.table import NAMES as ALL_NAMES
from fedcmr_shared.models import phenotype_vae
from fedcmr_shared.models.bundle import load_bundle, save_bundle
from fedcmr_shared.models.cpgg import CONFIGS, CPGG
from fedcmr_shared.models.masked_generator import SamplingPlan
from fedcmr_shared.models.registry import build_model
from fedcmr_shared.schemas.job import ModelSpec

PLAN = SamplingPlan(steps=2, diffusion_steps=3, method="dpm")
HEARTS = {
    "LVEDV": {"LVEDV": 200.0, "LVESV": 130.0, "LVSV": 70.0, "LVEF": 35.0},
    "RVEDV": {"RVEDV": 160.0, "RVESV": 80.0, "RVSV": 80.0, "RVEF": 50.0},
    "LAV max": {"LAV max": 80.0, "LAV min": 32.0, "LASV": 48.0, "LAEF": 60.0},
    "RAV max": {"RAV max": 100.0, "RAV min": 55.0, "RASV": 45.0, "RAEF": 45.0},
}


def obeys(heart: dict[str, float], cavity: Cavity) -> bool:
    stroke = heart[cavity.largest] - heart[cavity.smallest]
    fraction = 100 * stroke / heart[cavity.largest]
    return heart[cavity.stroke] == pytest.approx(stroke) and heart[
        cavity.fraction
    ] == pytest.approx(fraction)


class TestCompletion:
    @pytest.mark.parametrize("cavity", CAVITIES, ids=lambda cavity: cavity.largest)
    def test_any_two_numbers_of_a_cavity_give_the_others(self, cavity: Cavity) -> None:
        heart = HEARTS[cavity.largest]
        for pair in combinations(cavity, 2):
            found = complete({name: heart[name] for name in pair})
            assert found == pytest.approx(heart)

    @pytest.mark.parametrize("name", [name for cavity in CAVITIES for name in cavity])
    def test_one_number_gets_a_plausible_cavity_that_has_it(self, name: str) -> None:
        (cavity,) = (cavity for cavity in CAVITIES if name in cavity)
        for value in (HEARTS[cavity.largest][name], phenotype(name).prior[0]):
            found = complete({name: value})
            assert set(found) == set(cavity)
            assert found[name] == value
            assert obeys(found, cavity)
            assert not implausible(found)

    def test_an_average_number_gets_an_average_cavity(self) -> None:
        found = complete({"LVEDV": 146})
        for name, value in found.items():
            mean, deviation = phenotype(name).prior
            assert abs(value - mean) < 0.2 * deviation

    def test_other_phenotypes_stay_missing_and_come_in_the_models_order(self) -> None:
        found = complete({"WT Global": 9, "LVESV": 50, "LVEDV": 120})
        assert list(found) == ["LVEDV", "LVESV", "LVSV", "LVEF", "WT Global"]
        assert list(complete({"LVESV": 50, "LVEDV": 120}, ("LVEF", "LVEDV"))) == ["LVEF", "LVEDV"]
        assert complete({}) == {}

    def test_numbers_rounded_by_people_are_used_as_they_are(self) -> None:
        given = {"LVEDV": 146.0, "LVESV": 59.0, "LVEF": 60.0}  # 59.6 %
        assert complete(given) == {**given, "LVSV": pytest.approx(87)}

    @pytest.mark.parametrize(
        ("given", "reason"),
        [
            ({"LVEDV": 100, "LVESV": 50, "LVEF": 70}, "LVEDV=100, LVESV=50, LVEF=70 contradict"),
            ({"LVEDV": 100, "LVESV": 50, "LVEF": 70}, "LVEF = 100 LVSV / LVEDV"),
            ({"RAV max": 80, "RAV min": 90}, "RASV = RAV max - RAV min"),
            ({"AAo max area": 500, "AAo min area": 600}, "AAo max area=500, AAo min area=600"),
        ],
    )
    def test_contradictions_are_refused(self, given: dict[str, float], reason: str) -> None:
        with pytest.raises(ConfigurationError, match=reason):
            complete(given)

    @pytest.mark.parametrize(
        ("given", "reason"),
        [
            ({"LVEF": 99}, "LVEF 99 % lies outside its plausible range 11 to 82 %$"),
            ({"LVEDV": 370, "LVESV": 20}, "LVSV 350 mL lies .* follows from LVEDV=370, LVESV=20"),
            ({"LAEF": 100}, "no LAV max makes a plausible heart with LAEF=100"),
        ],
    )
    def test_implausible_hearts_are_refused(self, given: dict[str, float], reason: str) -> None:
        with pytest.raises(ConfigurationError, match=reason):
            complete(given)

    @pytest.mark.parametrize(("cavity", "end"), [(c, end) for c in CAVITIES[:2] for end in (0, 1)])
    def test_the_ends_of_the_ranges_of_ventricles_can_be_asked_for(
        self, cavity: Cavity, end: int
    ) -> None:
        plausible = phenotype(cavity.largest).plausible
        value = (plausible.low, plausible.high)[end]
        assert complete({cavity.largest: value})[cavity.largest] == value


class TestNames:
    def test_case_does_not_matter(self) -> None:
        assert parse_settings(["lvef=35", "wt global=9.5"]) == {"LVEF": 35, "WT Global": 9.5}

    @pytest.mark.parametrize(
        ("name", "hint"), [("LVFE", "did you mean LVEF"), ("WT", "WT_AHA_1"), ("qqq", "try LVEDV")]
    )
    def test_unknown_names_get_a_hint(self, name: str, hint: str) -> None:
        with pytest.raises(ConfigurationError, match=f"'{name}' is unknown to the model: .*{hint}"):
            known_name(name)

    def test_what_the_model_does_not_know_is_refused(self) -> None:
        assert known_name("LVM") == "LVM"
        with pytest.raises(ConfigurationError, match="'LVM' is unknown to the model"):
            known_name("LVM", NAMES)

    @pytest.mark.parametrize(
        ("settings", "reason"),
        [
            (["LVEF"], "'LVEF' is not NAME=VALUE"),
            (["LVEF=much"], "'LVEF=much' is not NAME=VALUE"),
            (["LVEF=nan"], "'LVEF=nan' is not NAME=VALUE"),
            (["LVEF=35", "lvef=36"], "LVEF is given twice"),
        ],
    )
    def test_settings_of_another_form_are_refused(self, settings: list[str], reason: str) -> None:
        with pytest.raises(ConfigurationError, match=reason):
            parse_settings(settings)


class TestTable:
    def test_one_heart_in_each_row(self, tmp_path: Path) -> None:
        path = tmp_path / "hearts.csv"
        path.write_text("\ufefflvedv, LVESV ,LVM\n120,60,\n\n,,90\n,,\n", encoding="utf-8")
        first, second, third = read_requests(path).hearts
        assert first[0] == {"LVEDV": 120, "LVESV": 60}
        assert first[1] == complete(first[0])
        assert second == ({"LVM": 90}, {"LVM": 90})
        assert third == ({}, {})

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("LVEDV,LVFE\n1,2\n", "line 1, column 2: phenotype 'LVFE' is unknown .* LVEF"),
            ("LVEDV,lvedv\n1,2\n", "line 1, column 2: phenotype LVEDV has two columns"),
            ("LVEDV,LVM\n100,80\n110,much\n", "line 3, column LVM: 'much' is not a number"),
            ("LVEDV,LVM\n100,inf\n", "line 2, column LVM: 'inf' is not a number"),
            ("LVEDV,LVM\n100\n", "line 2: 1 cells, the header has 2"),
            ("LVEDV\n100\n\n1000\n", "line 4: LVEDV 1000 mL lies outside"),
            ("LVEDV,LVESV,LVEF\n100,50,70\n", "line 2: .* contradict one another"),
            ("LVEDV\n", "give a line of phenotype names and one line for each clip"),
            ("", "give a line of phenotype names"),
            ('LVEDV\n"1"0\n', "is not a table of comma-separated values"),
            ("LVEDV;LVM\n100,5;80\n", "line 1: semicolons divide the columns: use commas"),
            ("LVEDV,\n100,\n", "line 1, column 2: phenotype '' is unknown to the model: try LVEDV"),
        ],
    )
    def test_what_is_wrong_is_said_with_its_place(
        self, tmp_path: Path, text: str, reason: str
    ) -> None:
        path = tmp_path / "hearts.csv"
        path.write_text(text)
        with pytest.raises(DataError, match=rf"hearts\.csv.*{reason}"):
            read_requests(path)

    def test_the_hash_is_that_of_what_was_read(self, tmp_path: Path) -> None:
        pipe, content = tmp_path / "pipe", b"LVEDV\r\n120\r\n"
        os.mkfifo(pipe)
        writer = threading.Thread(target=pipe.write_bytes, args=(content,))
        writer.start()
        table = read_requests(pipe)
        writer.join()
        assert table.hearts[0][0] == {"LVEDV": 120}
        assert table.sha256 == hashlib.sha256(content).hexdigest()

    def test_files_that_are_no_text_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "hearts.csv").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(DataError, match="is not a table"):
            read_requests(tmp_path / "hearts.csv")
        with pytest.raises(DataError, match=r"none\.csv: cannot be read: No such file"):
            read_requests(tmp_path / "none.csv")


@pytest.fixture(scope="module")
def hearts() -> list[dict[str, float]]:
    return [sample_prior(seed) for seed in range(300)]


class TestPrior:
    def test_every_heart_is_complete_plausible_and_consistent(
        self, hearts: list[dict[str, float]]
    ) -> None:
        for heart in hearts:
            assert tuple(heart) == ALL_NAMES
            assert not implausible(heart)
            assert all(obeys(heart, cavity) for cavity in CAVITIES)
            assert all(heart[largest] >= heart[smallest] for largest, smallest in VESSELS)
            assert heart["RVSV"] == pytest.approx(heart["LVSV"], rel=0.2)

    def test_the_same_seed_gives_the_same_heart(self, hearts: list[dict[str, float]]) -> None:
        assert sample_prior(7) == hearts[7]
        assert len({heart["LVEDV"] for heart in hearts}) == len(hearts)

    def test_means_and_deviations_are_about_those_of_the_priors(
        self, hearts: list[dict[str, float]]
    ) -> None:
        for one in PHENOTYPES:
            mean, deviation = one.prior
            values = np.array([heart[one.name] for heart in hearts])
            assert abs(values.mean() - mean) < 0.35 * deviation, one.name
            assert 0.5 * deviation < values.std() < 1.5 * deviation, one.name

    def test_sizes_go_together_and_fractions_do_not(self, hearts: list[dict[str, float]]) -> None:
        def correlation(first: str, second: str) -> float:
            pairs = [[heart[first], heart[second]] for heart in hearts]
            return float(np.corrcoef(np.array(pairs).T)[0, 1])

        assert correlation("LVEDV", "LVM") > 0.3
        assert correlation("WT_AHA_1", "WT_AHA_9") > 0.3
        assert abs(correlation("LVEF", "LAEF")) < 0.2


def distribution() -> phenotype_vae.PhenotypeVAE:
    torch.manual_seed(0)
    return phenotype_vae.PhenotypeVAE(phenotype_vae.CONFIGS["tiny"])


class TestPhenotypeModel:
    def test_hearts_are_plausible_and_consistent(self) -> None:
        model = distribution()
        moved(model, 0.02)
        hearts = [sample_model(model, seed) for seed in (1, 2, 1)]
        for heart in hearts:
            assert not implausible(heart)
            assert all(obeys(heart, cavity) for cavity in CAVITIES)
        assert hearts[0] == hearts[2] != hearts[1]

    def test_a_model_that_draws_no_plausible_heart_is_refused(self) -> None:
        model = distribution()
        with torch.no_grad():
            model.out.bias.fill_(30.0)
        with pytest.raises(
            ModelError, match=r"none of 200 hearts is plausible .* outside its range"
        ):
            sample_model(model, 0)


def request(edv: float, seed: int) -> ClipRequest:
    given = {"LVEDV": edv, "LVEF": 50.0}
    return ClipRequest(given, complete(given, NAMES), seed)


@pytest.fixture(scope="module")
def network() -> CPGG:
    return micro().eval()


class TestDrawing:
    requests = (request(120, 1), request(180, 2), request(240, 3))

    def test_a_clip_is_what_the_network_draws_for_its_numbers_and_seed(self, network: CPGG) -> None:
        (clip,) = draw_clips(network, self.requests[:1], PLAN)
        phenotypes = torch.tensor([[120.0, 60.0, 50.0]], dtype=torch.float64)
        expected = network.sample(phenotypes, [torch.Generator().manual_seed(1)], PLAN)
        np.testing.assert_array_equal(clip.frames, expected[0, 0].float().numpy())
        assert clip.frames.shape == MICRO.video.clip
        assert clip.frames.dtype == np.float32
        assert clip.request == self.requests[0]

    def test_the_same_requests_give_the_same_bytes(self, network: CPGG) -> None:
        first, again = ([*draw_clips(network, self.requests, PLAN)] for _ in range(2))
        for one, other in zip(first, again, strict=True):
            assert one.frames.tobytes() == other.frames.tobytes()

    @pytest.mark.parametrize("batch", [1, 2])
    def test_a_clip_does_not_depend_on_its_batch(self, network: CPGG, batch: int) -> None:
        together = list(draw_clips(network, self.requests, PLAN))
        apart = list(draw_clips(network, self.requests, PLAN, batch=batch))
        for one, other in zip(together, apart, strict=True):
            assert one.request is other.request
            np.testing.assert_allclose(one.frames, other.frames, atol=1e-5)

    def test_seed_and_phenotypes_both_matter(self, network: CPGG) -> None:
        variants = (request(120, 1), request(120, 2), request(240, 1))
        drawn = [clip.frames for clip in draw_clips(network, variants, PLAN)]
        assert all(np.abs(a - b).max() > 1e-3 for a, b in combinations(drawn, 2))

    def test_values_that_are_not_finite_are_refused(self) -> None:
        broken = micro().eval()
        with torch.no_grad():
            for parameter in broken.autoencoder.parameters():
                parameter.fill_(torch.nan)
        with pytest.raises(ModelError, match="not finite with guidance 3: use another"):
            list(draw_clips(broken, self.requests, PLAN))

    def test_a_device_that_is_out_of_memory_is_told(
        self, network: CPGG, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def exhausted(*_arguments: object) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        monkeypatch.setattr(network, "sample", exhausted)
        with pytest.raises(ModelError, match=r"out of memory for 3 clips .*: use --device cpu"):
            list(draw_clips(network, self.requests, PLAN))

    def test_clips_of_different_runs_have_different_seeds(self) -> None:
        seeds = [seed for run in range(20) for seed in clip_seeds(run, 50)]
        assert len(set(seeds)) == len(seeds)
        assert clip_seeds(3, 5) == clip_seeds(3, 9)[:5]


class TestPlans:
    @pytest.mark.parametrize("size", CONFIGS)
    def test_every_size_has_a_plan_that_it_can_follow(self, size: str) -> None:
        plan, generator = PLANS[size], CONFIGS[size].generator
        assert plan.steps <= generator.tokens
        assert plan.diffusion_steps <= generator.diffusion.steps
        assert PLANS.keys() == CONFIGS.keys()


class TestModels:
    def test_a_reconstructor_draws_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        write_model(path)
        loaders: list[tuple[Callable[[Path], object], str]] = [
            (load_clip_model, "model cardiomm draws no clips: use a cpgg model"),
            (load_phenotype_model, "model cardiomm draws no phenotypes: use a phenotype-vae"),
        ]
        for load, reason in loaders:
            with pytest.raises(ModelError, match=reason):
                load(path)

    def test_models_are_told_apart(self, tmp_path: Path) -> None:
        spec = ModelSpec(name="phenotype-vae")
        path = tmp_path / "model.safetensors"
        save_bundle(path, build_model(spec).state_dict(), spec, {})
        loaded = load_phenotype_model(path)
        assert loaded.distribution.config.standardisation.names == ALL_NAMES
        assert loaded.name == "phenotype-vae"
        assert loaded.sha256 == load_bundle(path).sha256
        with pytest.raises(ModelError, match="phenotype-vae draws no clips"):
            load_clip_model(path)
