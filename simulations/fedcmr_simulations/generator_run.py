"""What follows the rounds of a simulated generator: its gates, its release, and six hearts.

Whether or not the gates pass, the model is then used as anybody would who gets it: how well clips
do what they are asked for is measured before and after training, on virtual patients that no site
has, and hearts are drawn for rising ejection fractions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image, ImageSequence

from fedcmr_client.generation import PLANS, ClipModel, ClipRequest, draw_clips, load_clip_model
from fedcmr_client.heart_requests import complete
from fedcmr_client.synthetic_export import GenerationRun, export_clips, write_gif
from fedcmr_server.release_card import card_of
from fedcmr_server.release_gates import GATES
from fedcmr_server.run_folder import RunFolder
from fedcmr_shared.identity.certificates import fingerprint, new_authority
from fedcmr_shared.identity.keys import SiteKey
from fedcmr_shared.models.bundle import Bundle, load_bundle
from fedcmr_shared.models.card import (
    GateResult,
    Lineage,
    LineageRound,
    Start,
    bounded_notes,
)
from fedcmr_shared.models.refusal import ReleaseRefusal
from fedcmr_shared.models.release import ReleaseBundle
from fedcmr_shared.models.segmenter import Segmenter, load_segmenter
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.signed_job import JobAuthorisation
from fedcmr_simulations.generator_training import agreement, measure_clips
from fedcmr_simulations.hearts import draw_heart, expected_fac
from fedcmr_simulations.phantom.motion import END_SYSTOLE
from fedcmr_simulations.progress import Progress
from fedcmr_simulations.starting import starting_bundle

FRACTIONS: Final = (20.0, 30.0, 40.0, 50.0, 60.0, 70.0)
"""Ejection fractions of the hearts in the picture, in %."""
REQUESTS: Final = 48
"""Virtual patients by whom is measured how well clips do what they are asked for."""
_FEDERATION: Final = "simulated"
_STREAM: Final = 97  # of virtual patients that no site has
_WEEK: Final = timedelta(days=7)


def finish_generator(
    folder: RunFolder, start: str | None, progress: Progress
) -> Iterator[dict[str, Any]]:
    """Ask the gates, release the model if they pass, and draw with it.

    Yields what the run's summary says, each part when it is there: ``gates`` and ``release`` (None
    when a gate refused), ``adherence``, ``hearts``. ``release.zip`` or ``refusal.json``, ``hearts/``,
    ``hearts.gif`` and ``hearts.png`` appear in the run folder.

    Args:
        folder: a run whose last round is committed.
        start: the bundle that the run began with, as its configuration names it; None for the seed.
        progress: is told of each stage.

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
    if refused:
        _refuse(folder, bundle, refused[0])
    released = None if refused else _release(folder, start, gates)
    yield {"gates": [found.model_dump() for found in gates], "release": released}
    if released:
        model = load_clip_model(folder.root / released["path"], released["key"])
    else:
        model = load_clip_model(path)
    segmenter = load_segmenter().model
    with progress.stage("drawing hearts", 3) as advance:
        found_start = _obedience(load_clip_model(folder.bundle_path(0)), segmenter)
        advance(f"starting weights: {_worded(found_start)}")
        found_end = _obedience(model, segmenter)
        advance(f"after private training: {_worded(found_end)}")
        yield {"adherence": {"requests": REQUESTS, "start": found_start, "federated": found_end}}
        hearts = _draw_hearts(folder.root, model, segmenter)
        advance(f"{len(hearts)} hearts in {folder.root / 'hearts.gif'}")
    yield {"hearts": hearts}


def _release(folder: RunFolder, start: str | None, gates: Sequence[GateResult]) -> dict[str, str]:
    """Write the signed release."""
    job, events = folder.job, folder.events()
    key, federation = _coordinator(folder)
    now = datetime.now(UTC).replace(microsecond=0)
    authorisation = JobAuthorisation.sign(job, federation[1], (now, now + _WEEK), key)
    lineage = _lineage(folder, job, start, events)
    card = card_of(federation, job, authorisation, lineage, gates, events, now)
    path = folder.root / "release.zip"
    ReleaseBundle.write(path, folder.bundle_path(job.rounds), card, key)
    written = ReleaseBundle.verify(path, key.public_key)
    return {"path": path.name, "sha256": written.sha256, "key": key.public_key}


def _refuse(folder: RunFolder, bundle: Bundle, gate: GateResult) -> None:
    """Write the signed refusal by ``gate`` where the release would have been."""
    key, federation = _coordinator(folder)
    now = datetime.now(UTC).replace(microsecond=0)
    refused = (folder.job.sha256, bundle.sha256)
    refusal = ReleaseRefusal.sign(federation, refused, gate, now, key)
    text = refusal.model_dump_json(indent=1)
    (folder.root / "refusal.json").write_text(f"{text}\n", encoding="utf-8")


def _coordinator(folder: RunFolder) -> tuple[SiteKey, tuple[str, str]]:
    """Make a coordinator for this run alone; return its key, and the federation's name and SHA-256."""
    key = SiteKey.create(folder.root / "coordinator.pem")
    return key, (_FEDERATION, fingerprint(new_authority(_FEDERATION).certificate))


def _lineage(
    folder: RunFolder, job: JobSpec, start: str | None, events: Sequence[Mapping[str, Any]]
) -> Lineage:
    rounds = {event["round"]: event for event in events if event["event"] == "round"}
    return Lineage(
        start=_start(load_bundle(folder.bundle_path(0)), start, job),
        rounds=tuple(
            LineageRound(
                number=number,
                sites=rounds[number]["sites"],
                closed=rounds[number]["closed"],
                model_sha256=rounds[number]["model_sha256"],
            )
            for number in range(1, job.rounds + 1)
        ),
        roster_sha256=folder.roster.sha256,
    )


def _start(first: Bundle, start: str | None, job: JobSpec) -> Start:
    if start is None:
        return Start(origin="seed", model_sha256=first.sha256)
    notes = bounded_notes(load_bundle(starting_bundle(start, job)).extra)
    return Start(origin="bundle", model_sha256=first.sha256, notes=notes)


def _obedience(model: ClipModel, segmenter: Segmenter) -> dict[str, float | None]:
    """Ask for other virtual patients' hearts; compare the change of area (FAC) in %."""
    asked, requests = [], []
    for number in range(REQUESTS):
        patient = draw_heart("nobody", np.random.default_rng([_STREAM, number]))
        heart = patient.heart.volumes.phenotypes(patient.heart_rate_bpm)
        requests.append(ClipRequest(heart, heart, number))
        asked.append(expected_fac(heart))
    drawn = draw_clips(model.network, requests, PLANS[model.size])
    frames = (clip.frames for clip in drawn)
    measured = measure_clips(frames, model.network.config.pixel_mm, segmenter)["LVFAC"]
    found = agreement(np.array(asked), measured)
    if found is None:  # what an untrained network draws shows no ventricle
        samples = int(np.isfinite(measured).sum())
        return {"r2": None, "mae": None, "bias": None, "samples": samples}
    return found._asdict()


def _worded(found: Mapping[str, float | None]) -> str:
    r2 = found["r2"]
    return "no heart was found" if r2 is None else f"R2 {r2:.3f}"


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.0f} %"


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
    frames = [clip.frames for clip in clips]
    measured = measure_clips(frames, run.grid.pixel_mm, segmenter)["LVFAC"].tolist()
    hearts: list[dict[str, float | None]] = [
        {
            "LVEF": request.given["LVEF"],
            "LVEDV": request.given["LVEDV"],
            "asked": expected_fac(request.completed),
            "measured": found if math.isfinite(found) else None,
        }
        for request, found in zip(requests, measured, strict=True)
    ]
    captions = [
        [
            f"LVEF asked {h['LVEF']:.0f} %",
            f"FAC {h['asked']:.0f} %, found {_percent(h['measured'])}",
        ]
        for h in hearts
    ]
    write_gif(root / "hearts.gif", frames, captions)
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
