import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from html_page import Page

from fedcmr_shared.errors import DataError
from fedcmr_shared.kspace.masks import Sampling
from fedcmr_shared.schemas import JobSpec
from fedcmr_shared.schemas.privacy import PrivacySpec
from fedcmr_simulations.evaluation import METHODS, EvaluationRow, append_rows, site_summary
from fedcmr_simulations.examples import Example, save_example
from fedcmr_simulations.figures import error_png, line_chart, magnitude_png, nice_ticks
from fedcmr_simulations.report import summary_rows, write_report

GAINS = {"zero_filled": 0.0, "sense": 3.0, "start": 5.25, "local": 6.0, "federated": 7.5}


def image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).gamma(2.0, 1.0, (16, 20)).astype(np.float32)


def make_rows(sites: list[str]) -> list[EvaluationRow]:
    rows = []
    for index, site in enumerate(sites):
        for pattern in ("uniform", "kt-radial"):
            for method, gain in GAINS.items():
                rows.append(
                    EvaluationRow(
                        site=site,
                        patient=f"p{index}",
                        scan=f"s{index}",
                        modality="cine",
                        frame=0,
                        slice=0,
                        pattern=pattern,
                        nominal_af=8.0,
                        realised_af=3.9,
                        method=method,
                        psnr=27.1234 + index + gain,
                        ssim=0.8 + gain / 100,
                        nmse=0.02 - gain / 1000,
                    )
                )
    return rows


def make_events(sites: list[str], rounds: int = 3) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    for number in range(1, rounds + 1):
        sizes = {"seconds": 75.0, "bytes_up": 2_000_000, "bytes_down": 2_100_000}
        events.append(
            {"event": "round", "round": number, "train_loss": 0.1 / number, "sites": 2, **sizes}
        )
        for index, site in enumerate(sites):
            named = {"round": number, "site": site}
            events.append({"event": "site_loss", **named, "loss": 0.1 / number + index / 100})
            quality = {"psnr": 30.0 + number, "ssim": 0.9, "nmse": 0.01}
            events.append({"event": "site_evaluation", **named, **quality})
    return events


def make_privacy(sites: list[str]) -> dict[str, Any]:
    spent = {
        name: {
            "order": 4,
            "train": {"starts": 3, "epsilon": 6.5 + index, "epsilon_if_fixed": 6.0 + index},
            "evaluate": {"starts": 1, "epsilon": 1.25, "epsilon_if_fixed": 1.0},
        }
        for index, name in enumerate(sites)
    }
    budget = {"epsilon": 8.0, "delta": 1e-5, "order": None}
    return {**PrivacySpec().model_dump(), "steps": 60, "budget": budget, "sites": spent}


def make_run(folder: Path, sites: list[str]) -> dict[str, Any]:
    rows = make_rows(sites)
    append_rows(folder / "evaluation.jsonl", rows)
    lines = [json.dumps(event) + "\n" for event in make_events(sites)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "job.json").write_text(JobSpec(name="demo").model_dump_json())
    environment = {"seed": 7, "versions": {"torch": "2.13.0"}, "data_origin": "simulated"}
    (folder / "environment.json").write_text(json.dumps(environment))
    summary = {
        "status": "finished",
        "pattern": "uniform",
        "nominal_af": 8.0,
        "sites": site_summary(rows, Sampling("uniform", 8)),
        "rounds": 3,
        "seconds": 312.4,
        "bytes_up": 6_000_000,
        "bytes_down": 6_300_000,
        "data_origin": "simulated",
        "model": {"name": "cardiomm", "size": "tiny", "trainable": 123456, "frozen": 78},
        "model_sha256": "ab" * 32,
        "start": "packaged",
        "private": True,
        "privacy": make_privacy(sites),
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    for index, site in enumerate(sites):
        images = {name: image(index) + 0.1 * image(99) for name in METHODS}
        scores = dict.fromkeys(METHODS, 31.5)
        save_example(
            folder / "examples",
            Example(site, "cine", 0, 0, "uniform", 8.0, 3.9, image(index), images, scores, scores),
        )
    return summary


def render(folder: Path) -> tuple[str, Page]:
    source = write_report(folder).read_text(encoding="utf-8")
    return source, Page(source)


def test_numbers_of_the_headline_table_are_those_of_the_summary(tmp_path: Path) -> None:
    summary = make_run(tmp_path, ["north", "south"])
    _, page = render(tmp_path)
    table = {row[0]: row[1:] for row in page.rows[1:4]}
    for entry in summary["sites"]:
        values = [f"{entry[f'psnr_{name}']:.2f}" for name in METHODS]
        spent = summary["privacy"]["sites"][entry["name"]]["train"]["epsilon"]
        gains = ["+4.50", "+1.50", "+2.25", f"{spent:.2f}"]
        assert table[entry["name"]] == [str(entry["patients"]), *values, *gains]
    mean = np.mean([entry["psnr_federated"] for entry in summary["sites"]])
    assert table["mean of sites"][5] == f"{mean:.2f}"
    assert table["mean of sites"][-1] == "7.50"  # the worst site's epsilon, no mean
    assert f"{mean:.2f} dB PSNR on average" in page.text
    assert "4.50 dB above tuned CG-SENSE" in page.text
    assert "beats CG-SENSE at 2 of 2 sites" in page.text


def test_the_privacy_section_gives_claim_and_every_site(tmp_path: Path) -> None:
    make_run(tmp_path, ["north", "south"])
    _, page = render(tmp_path)
    assert "epsilon 7.50 for the worst trained patient" in page.text
    assert "unit patient, relation zero-out" in page.text
    assert ["south", "4", "3", "7.50", "7.00", "1", "1.25", "8.00"] in page.rows
    assert "NO PRIVACY" not in page.text


def test_attempts_say_who_was_summed_and_who_was_lost(tmp_path: Path) -> None:
    folder = tmp_path
    make_run(folder, ["a", "b", "c", "d"])
    job = json.loads((folder / "job.json").read_text())
    (folder / "job.json").write_text(json.dumps({**job, "aggregation": "secure_sum"}))
    place = {"event": "attempt", "phase": "train", "round": 2, "sites": 4, "threshold": 3}
    silent = {"site": "a", "step": "update", "fault": "silent", "reason": "no answer in time"}
    liar = {"site": "b", "step": "unmask", "fault": "signature", "reason": "not its key"}
    events = [
        {**place, "attempt": 1, "outcome": "ended", "step": "update", "survivors": [],
         "losses": [silent]},
        {**place, "attempt": 2, "outcome": "opened", "step": "unmask",
         "survivors": ["b", "c", "d"], "losses": [silent, liar]},
        {**place, "round": 3, "attempt": 1, "outcome": "closed", "step": "unmask",
         "survivors": [], "losses": []},
    ]  # fmt: skip
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.writelines(json.dumps(event) + "\n" for event in events)
    text, _ = render(folder)
    for sentence in (
        "ended: fewer than 3 sites left",
        "opened: sum of 3 of 4 sites",
        "a in step update; b in step unmask: not its key",
        "closed without a sum, the model stays",
        "could open nothing else",
    ):
        assert sentence in text


def test_figures_that_distributed_noise_does_not_have_are_named_in_words(tmp_path: Path) -> None:
    summary = make_run(tmp_path, ["north"])
    summary["privacy"]["sites"]["north"]["train"]["epsilon_if_fixed"] = None
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    _, page = render(tmp_path)
    assert "no figure by PLD, as noise was distributed), of 8 allowed" in page.text
    assert ["north", "4", "3", "6.50", "–", "1", "1.25", "8.00"] in page.rows


def test_scores_without_noise_are_named_in_words(tmp_path: Path) -> None:
    summary = make_run(tmp_path, ["north"])
    summary["privacy"]["evaluation"]["noise_multiplier"] = None
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert "left WITHOUT noise" in render(tmp_path)[1].text


def test_a_run_without_privacy_says_so_in_red(tmp_path: Path) -> None:
    summary = make_run(tmp_path, ["north"])
    del summary["privacy"]
    summary["private"] = False
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    source, page = render(tmp_path)
    assert page.text.count("NO PRIVACY") == 2
    assert re.search(r"\.unprotected \{ background: #b3140b", source)


def test_a_federated_model_that_loses_is_said_to_lose(tmp_path: Path) -> None:
    summary = make_run(tmp_path, ["north", "south"])
    summary["sites"][0]["psnr_federated"] = 20.0
    summary["sites"][1]["psnr_federated"] = 20.0
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    _, page = render(tmp_path)
    assert "dB below tuned CG-SENSE" in page.text
    assert "beats CG-SENSE at 0 of 2 sites" in page.text
    assert "−10.12" in page.text


def test_all_scores_of_the_evaluation_are_in_the_tables(tmp_path: Path) -> None:
    make_run(tmp_path, ["north", "south"])
    _, page = render(tmp_path)
    wanted = ["south", "cine", "kt-radial", "8×", "3.9×", "1", "1"]
    found = [row[7:] for row in page.rows if row[:7] == wanted]
    assert found == [
        ["28.12", "31.12", "33.37", "34.12", "35.62"],
        ["0.8000", "0.8300", "0.8525", "0.8600", "0.8750"],
        ["0.0200", "0.0170", "0.0147", "0.0140", "0.0125"],
    ]


def test_the_page_is_self_contained(tmp_path: Path) -> None:
    make_run(tmp_path, ["north", "south"])
    source, page = render(tmp_path)
    assert "http://" not in source
    assert "https://" not in source
    assert "//" not in re.sub(r"base64,[^\"]*", "", source)
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in page.elements}
    for attributes in (item for _, item in page.elements):
        assert not any(name.startswith("on") for name in attributes)
        assert (attributes.get("src") or "data:").startswith("data:")
        assert (attributes.get("href") or "#").startswith("#")
    (policy,) = [meta for meta in page.of("meta") if "http-equiv" in meta]
    assert "default-src 'none'" in str(policy["content"])


def test_images_and_figures_have_texts_for_those_who_cannot_see_them(tmp_path: Path) -> None:
    make_run(tmp_path, ["north", "south"])
    source, page = render(tmp_path)
    assert len(page.of("img")) == 2 * (1 + 2 * len(METHODS))
    alternatives = [attributes.get("alt") for attributes in page.of("img")]
    assert all(alternatives)
    assert len(set(alternatives)) == len(alternatives)
    for svg in page.of("svg"):
        assert "aria-hidden" in svg or "aria-label" in svg or "aria-labelledby" in svg
    assert page.of("html")[0]["lang"] == "en"
    identifiers = [item["id"] for _, item in page.elements if "id" in item]
    assert len(set(identifiers)) == len(identifiers)
    for link in page.of("a"):
        assert str(link["href"]).removeprefix("#") in identifiers
    assert "prefers-color-scheme: dark" in source


def test_a_malicious_site_name_stays_text(tmp_path: Path) -> None:
    name = '</title><script>alert("x")</script><img src=x onerror=alert(1)>'
    make_run(tmp_path, [name, "south"])
    _, page = render(tmp_path)
    assert page.of("script") == []
    assert all("onerror" not in attributes for attributes in page.of("img"))
    assert name in page.text


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("summary.json", "summary.json lists no sites"),
        ("evaluation.jsonl", "evaluation.jsonl is missing or empty"),
        ("metrics.jsonl", "No round was recorded"),
        ("environment.json", "environment.json is missing"),
        ("job.json", "job.json is missing"),
        ("examples", "No example image was stored"),
    ],
)
def test_a_missing_part_says_so(tmp_path: Path, name: str, sentence: str) -> None:
    make_run(tmp_path, ["north", "south"])
    _, complete = render(tmp_path)
    assert sentence not in complete.text
    path = tmp_path / name
    if path.is_dir():
        for file in path.iterdir():
            file.unlink()
    else:
        path.unlink()
    _, page = render(tmp_path)
    assert sentence in page.text


def test_an_empty_run_folder_has_a_report(tmp_path: Path) -> None:
    _, page = render(tmp_path)
    assert "has no result yet" in page.text
    assert "research use only" in page.text


def test_an_interrupted_run_shows_its_rounds_and_drops_a_cut_off_line(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"status": "interrupted", "sites": []}')
    event = json.dumps(make_events([], 1)[0])
    (tmp_path / "metrics.jsonl").write_text(f'{event}\n{{"event": "rou')
    _, page = render(tmp_path)
    assert "The run is interrupted" in page.text
    assert ["1", "2", "0.1000", "1 min 15 s", "2 MB", "2.1 MB"] in page.rows


@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl", "evaluation.jsonl"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    make_run(tmp_path, ["north"])
    (tmp_path / name).write_text("{broken\n")
    with pytest.raises(DataError, match=re.escape(name)):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("origin", "sentence"),
    [
        ("simulated", "numerical phantom, not clinical"),
        ("synthesised", "computed from magnitude images"),
        ("measured", "measured k-space that the user imported"),
        (None, "not recorded"),
    ],
)
def test_the_origin_of_the_data_is_named(tmp_path: Path, origin: str | None, sentence: str) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"data_origin": origin}))
    _, page = render(tmp_path)
    assert sentence in page.text


def test_a_method_that_did_not_run_shows_as_a_dash(tmp_path: Path) -> None:
    summary = make_run(tmp_path, ["north", "south"])
    for entry in summary["sites"]:
        entry["psnr_local"] = None
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    _, page = render(tmp_path)
    assert page.rows[1][5] == "–"
    assert page.rows[3][5] == "–"
    assert summary_rows(summary)[0]["gain over local"] is None


def test_rows_for_the_terminal_have_one_mean_row_for_several_sites() -> None:
    sites = site_summary(make_rows(["north", "south"]), Sampling("uniform", 8))
    rows = summary_rows({"sites": sites})
    assert [row["site"] for row in rows] == ["north", "south", "mean of sites"]
    assert rows[-1]["patients"] == 2
    assert rows[-1]["gain over CG-SENSE"] == pytest.approx(4.5)
    assert len(summary_rows({"sites": sites[:1]})) == 1
    assert summary_rows({}) == []


def test_images_share_one_window_and_errors_are_five_times_larger() -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    def pixels(text: str) -> np.ndarray:
        import io

        return imread(io.BytesIO(base64.b64decode(text)), format="png")[..., 0]

    reference = np.tile(np.linspace(0, 1, 20), (16, 1))
    grey = pixels(magnitude_png(40.0 * reference))
    np.testing.assert_allclose(grey, np.clip(reference, 0, 1), atol=0.01)
    assert pixels(error_png(reference, 2.0 * reference)).max() == 0
    shifted = reference.copy()
    shifted[3, 4] += 0.3
    error = pixels(error_png(reference, shifted))
    assert error[3, 4] > 0.9
    assert error[8:].max() < 0.05


@pytest.mark.parametrize(("low", "high"), [(27.1, 38.4), (0.0, 1e-4), (5.0, 5.0), (-3.0, 0.5)])
def test_axes_enclose_the_values_with_round_numbers(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low + 1e-12
    assert ticks[-1] >= high - 1e-12
    assert 2 <= len(ticks) <= 8


def test_curves_go_up_with_the_values_and_skip_what_is_not_finite() -> None:
    curves = {"a": [(1, 1.0), (2, 2.0), (3, float("nan"))], "b": [(1, 4.0)]}
    chart = line_chart("t", "dB", curves, ["b", "a"])
    first, second = chart.lines
    assert (first.style, second.style) == (1, 0)
    (x1, y1), (x2, y2) = first.markers
    assert x1 < x2
    assert y1 > y2 > second.markers[0][1]
