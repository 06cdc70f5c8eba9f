"""Real heart images, imported, divided between two sites, federated and reported."""

import json
from pathlib import Path

import pytest
from real_data import NO_SUNNYBROOK
from real_data import SUNNYBROOK as DATA

from fedcmr_client.importers import ImportOptions, import_path
from fedcmr_client.store.site_store import SiteStore
from fedcmr_shared.schemas.job import ModelSpec
from fedcmr_simulations.config import load_config
from fedcmr_simulations.partition import partition
from fedcmr_simulations.progress import SilentProgress
from fedcmr_simulations.runner import SimulationRequest, simulate

ROOT = Path(__file__).parents[2]
PATIENTS = ("SC-HF-I-05", "SC-HF-NI-04", "SC-HYP-01", "SC-HYP-03", "SC-N-02", "SC-N-03")


@pytest.mark.skipif(not DATA.is_dir(), reason=NO_SUNNYBROOK)
def test_two_sites_train_on_real_images(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for patient in PATIENTS:
        (images / f"{patient}.npz").symlink_to(DATA / "contoured_png8" / f"{patient}.npz")
    with SiteStore.create(tmp_path / "store") as store:
        summary = import_path(store, images, options=ImportOptions(coils=4))
        assert summary.imported == len(PATIENTS)
        assert {scan.metadata.origin for scan in store.scans()} == {"synthesised"}
    partition(tmp_path / "store", tmp_path / "sites", 2, 0, lambda _: None)

    config = load_config(ROOT / "simulations/fedcmr_simulations/jobs/real-images.yaml")
    training = config.job.training.model_copy(update={"local_steps": 3})
    changes = {"rounds": 1, "training": training, "model": ModelSpec(text_encoder="hashed")}
    config = config.model_copy(update={"job": config.job.model_copy(update=changes)})
    out = tmp_path / "run"
    request = SimulationRequest(config, 2, out, tmp_path / "sites", private=False)
    simulate(request, SilentProgress())

    result = json.loads((out / "summary.json").read_text())
    assert result["status"] == "finished"
    assert result["data_origin"] == "synthesised"
    assert len(result["sites"]) == 2
    # With a realised factor near 4 something of the image is always there, and never all of it.
    for site in result["sites"]:
        assert 15 < site["psnr_zero_filled"] < site["psnr_sense"] < 60
    report = (out / "report.html").read_text()
    assert "synthesised" in report
