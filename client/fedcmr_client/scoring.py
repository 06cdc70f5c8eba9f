"""Image quality of a model on a site's held-out patients."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from fedcmr_client.dataset import all_images, undersample
from fedcmr_client.store.site_store import ScanRecord
from fedcmr_client.trainer import collate
from fedcmr_shared.errors import ConfigurationError, DataError
from fedcmr_shared.kspace.masks import Sampling
from fedcmr_shared.metrics.image_quality import score
from fedcmr_shared.models.cardiomm import CardioMM
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.text.encoders import TextEncoder

_log = logging.getLogger("fedcmr.site")


@torch.no_grad()
def patient_scores(
    model: CardioMM,
    job: JobSpec,
    records: Sequence[ScanRecord],
    encoder: TextEncoder,
    device: torch.device,
) -> dict[str, dict[str, float]]:
    """Return each patient's mean ``psnr``, ``ssim`` and ``nmse``, by pseudonym.

    Images are undersampled by the job's first pattern at its highest acceleration factor. A
    patient without a readable scan is left out, which the log says.
    """
    spec = job.sampling
    sampling = Sampling(spec.patterns[0], max(spec.accelerations), spec.acs_lines)
    model = model.to(device).eval()
    by_patient: dict[str, list[dict[str, float]]] = {}
    for record in records:
        try:
            images = list(all_images([record]))
            items = [undersample(image, sampling, seed=job.seed) for image in images]
        except (ConfigurationError, DataError) as error:
            _log.error("a held-out scan is left out: %s", error)
            continue
        for item in items:
            (batch,) = (batch.to(device) for batch in collate([item], encoder))
            output = model(
                batch.measured, batch.mask, batch.acs, batch.metadata_text, batch.sampling_text
            )
            quality = score(batch.target[0].cpu().numpy(), output.image[0].cpu().numpy())
            by_patient.setdefault(record.patient, []).append(quality._asdict())
    return {patient: _means(scores) for patient, scores in sorted(by_patient.items())}


def _means(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(each[name] for each in scores) / len(scores) for name in scores[0]}
