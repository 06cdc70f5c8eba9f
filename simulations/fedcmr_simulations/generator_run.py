"""What follows the rounds of a simulated generator: its gates, its release, and six hearts.

The last two show what anybody can do who gets the model: hearts are drawn for rising ejection
fractions, and how well clips do what they are asked for is measured before and after training, on
virtual patients that no site has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image, ImageSequence

from fedcmr_client.generation import PLANS, ClipModel, ClipRequest, draw_clips, load_clip_model
from fedcmr_client.heart_requests import complete
from fedcmr_client.synthetic_export import GenerationRun, export_clips, write_gif
from fedcmr_server.release_gates import GATES
from fedcmr_server.run_folder import RunFolder
from fedcmr_shared.identity.certificates import fingerprint, new_authority
from fedcmr_shared.identity.keys import SiteKey
from fedcmr_shared.metrics.generation import adherence
from fedcmr_shared.metrics.phenotypes.clip import measure_clip
from fedcmr_shared.models.bundle import load_bundle
from fedcmr_shared.models.card import (
    PURPOSES,
    GateResult,
    Lineage,
    LineageRound,
    ModelCard,
    Start,
    software,
)
from fedcmr_shared.models.release import ReleaseBundle
from fedcmr_shared.models.segmenter import Segmenter, default_segmenter, load_segmenter
from fedcmr_shared.privacy.job_claim import claim_of
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.signed_job import JobAuthorisation
from fedcmr_simulations.hearts import draw_heart, expected_fac
from fedcmr_simulations.phantom.motion import END_SYSTOLE
from fedcmr_simulations.progress import Progress

FRACTIONS: Final = (20.0, 30.0, 40.0, 50.0, 60.0, 70.0)
"""Ejection fractions of the hearts in the picture, in %."""
REQUESTS: Final = 48
_FEWEST: Final = 3
_FEDERATION: Final = "simulated"
_STREAM: Final = 97  # of virtual patients that no site has
_WEEK: Final = timedelta(days=7)


def finish_generator(folder: RunFolder, progress: Progress) -> dict[str, Any]:
    """Ask the gates, release the model if they pass, and draw with it; return what was found.

    Writes ``release.zip`` (if the gates pass), ``hearts/``, ``hearts.gif`` and ``hearts.png`` into the
    run folder.

    Raises:
        FedcmrError: the model cannot be read, released or drawn from.
    """
    job, events = folder.job, folder.events()
    path = folder.bundle_path(job.rounds)
    bundle = load_bundle(path)
    gates = [gate.check(job, bundle, events) for gate in GATES[job.model.name]]
    refused = [found for found in gates if not found.passed]
    for found in refused:
        folder.record("release_refused", **found.model_dump())
    released = None if refused else _release(folder, job, gates)
    model = load_clip_model(
        folder.root / "release.zip" if released else path,
        released["key"] if released else None,
    )
    segmenter = load_segmenter(default_segmenter()).model
    with progress.stage("drawing hearts", 3) as advance:
        start = load_clip_model(folder.bundle_path(0))
        found_start = _obedience(start, segmenter)
        advance(f"starting weights: {_worded(found_start)}")
        found_end = _obedience(model, segmenter)
        advance(f"after private training: {_worded(found_end)}")
        hearts = _draw_hearts(folder.root, model, segmenter)
        advance(f"{len(hearts)} hearts in {folder.root / 'hearts.gif'}")
    return {
        "gates": [found.model_dump() for found in gates],
        "release": released,
        "adherence": {"requests": REQUESTS, "start": found_start, "federated": found_end},
        "hearts": hearts,
    }


def _release(folder: RunFolder, job: JobSpec, gates: Sequence[GateResult]) -> dict[str, str]:
    """Write the signed release of a coordinator that exists for this run alone."""
    key = SiteKey.create(folder.root / "coordinator.pem")
    federation = fingerprint(new_authority(_FEDERATION).certificate)
    now = datetime.now(UTC).replace(microsecond=0)
    events = folder.events()
    card = ModelCard(
        federation=_FEDERATION,
        federation_sha256=federation,
        job_sha256=job.sha256,
        job=job,
        authorisation=JobAuthorisation.sign(job, federation, (now, now + _WEEK), key),
        lineage=_lineage(folder, job, events),
        privacy=claim_of(job),
        evaluation=(),
        gates=tuple(gates),
        software=software(),
        energy_kwh=next((e["energy_kwh"] for e in events[::-1] if "energy_kwh" in e), None),
        intended_use=PURPOSES[job.model.name].use,
        limits=PURPOSES[job.model.name].limits,
        created_at=now,
    )
    path = folder.root / "release.zip"
    ReleaseBundle.write(path, folder.bundle_path(job.rounds), card, key)
    written = ReleaseBundle.verify(path, key.public_key)
    return {"path": path.name, "sha256": written.sha256, "key": key.public_key}


def _lineage(folder: RunFolder, job: JobSpec, events: Sequence[Mapping[str, Any]]) -> Lineage:
    rounds = {event["round"]: event for event in events if event["event"] == "round"}
    start = load_bundle(folder.bundle_path(0))
    return Lineage(
        start=Start(origin="bundle", model_sha256=start.sha256, notes={}),
        rounds=tuple(
            LineageRound(
                number=number,
                sites=rounds[number]["sites"],
                closed=rounds[number]["sites"] == 0,
                model_sha256=rounds[number]["model_sha256"],
            )
            for number in range(1, job.rounds + 1)
        ),
        roster_sha256=folder.roster.sha256,
    )


def _obedience(model: ClipModel, segmenter: Segmenter) -> dict[str, float | None]:
    """Ask for other virtual patients' hearts; compare the change of area (FAC) in %."""
    asked, requests = [], []
    for number in range(REQUESTS):
        patient = draw_heart("nobody", np.random.default_rng([_STREAM, number]))
        heart = patient.heart.volumes.phenotypes(patient.heart_rate_bpm)
        requests.append(ClipRequest(heart, heart, number))
        asked.append(expected_fac(heart))
    found = _measured(model, requests, segmenter)
    samples = int(np.isfinite(found).sum())
    if samples < _FEWEST:  # what an untrained network draws shows no ventricle
        return {"r2": None, "mae": None, "bias": None, "samples": samples}
    return adherence(np.array(asked), found)._asdict()


def _worded(found: Mapping[str, float | None]) -> str:
    r2 = found["r2"]
    return "no heart was found" if r2 is None else f"R2 {r2:.3f}"


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.0f} %"


def _measured(
    model: ClipModel, requests: Sequence[ClipRequest], segmenter: Segmenter
) -> np.ndarray:
    pixel_mm = model.network.config.pixel_mm
    drawn = draw_clips(model.network, requests, PLANS[model.size])
    found = [measure_clip(clip.frames, pixel_mm, segmenter) for clip in drawn]
    return np.array([each.get("LVFAC", math.nan) for each in found])


def _draw_hearts(
    root: Path, model: ClipModel, segmenter: Segmenter
) -> list[dict[str, float | None]]:
    """Draw hearts of rising ejection fraction; write them and a picture of all."""
    requests = []
    for number, fraction in enumerate(FRACTIONS):
        # Weak hearts are large: that of a failing one at 20 %, of a healthy one at 70 %.
        given = {"LVEF": fraction, "LVEDV": 240 - 2 * (fraction - 20), "LVM": 110.0}
        requests.append(ClipRequest(given, complete(given), number))
    run = GenerationRun(model, PLANS[model.size], "rising ejection fractions", 0)
    clips = list(draw_clips(model.network, requests, run.plan))
    export_clips(root / "hearts", run, clips, ("nifti", "gif"))
    found = [measure_clip(clip.frames, run.grid.pixel_mm, segmenter) for clip in clips]
    hearts: list[dict[str, float | None]] = [
        {
            "LVEF": request.given["LVEF"],
            "LVEDV": request.given["LVEDV"],
            "asked": expected_fac(request.completed),
            "measured": each.get("LVFAC"),
        }
        for request, each in zip(requests, found, strict=True)
    ]
    captions = [
        [
            f"LVEF asked {h['LVEF']:.0f} %",
            f"FAC {h['asked']:.0f} %, found {_percent(h['measured'])}",
        ]
        for h in hearts
    ]
    write_gif(root / "hearts.gif", [clip.frames for clip in clips], captions)
    _write_still(root / "hearts.gif", root / "hearts.png")
    return hearts


def _write_still(moving: Path, still: Path) -> None:
    """Write the pictures of end diastole and end systole, one above the other."""
    with Image.open(moving) as picture:
        frames = [frame.convert("L") for frame in ImageSequence.Iterator(picture)]
    width, height = frames[0].size
    both = Image.new("L", (width, 2 * height))
    both.paste(frames[0], (0, 0))
    both.paste(frames[round(END_SYSTOLE * len(frames))], (0, height))
    both.save(still, optimize=True)
