"""`fedcmr models reconstruct`: images from a stored scan and a trained network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from fedcmr_client.commands.progress import progress
from fedcmr_shared.cli import json_option, print_json, print_table
from fedcmr_shared.schemas.job import Pattern

if TYPE_CHECKING:
    from fedcmr_client.image_export import ImageSeries
    from fedcmr_client.store.scan_file import ScanFile
    from fedcmr_shared.kspace.masks import Sampling
    from fedcmr_shared.models.bundle import Bundle

_PSEUDONYM = re.compile(r"p-[a-z2-7]{26}")
_SHOWN = (
    "undersampling",
    "pattern",
    "acceleration_nominal",
    "acceleration_realised",
    "data_consistency_residual",
    "voxel_size_note",
)


@click.command()
@click.argument("scan", type=click.Path(path_type=Path))
@click.option("--model", required=True, type=click.Path(path_type=Path), help="Bundle or release.")
@click.option("--trust", metavar="KEY", help="Public key of the coordinator who released it.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="New or empty folder.")
@click.option("--pattern", type=click.Choice(get_args(Pattern)), default="uniform")
@click.option("--acceleration", type=float, default=8.0, help="Nominal factor, without ACS lines.")
@click.option("--acs-lines", type=int, default=20, help="Calibration lines.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of random patterns.")
@click.option("--text-folder", type=click.Path(path_type=Path), help="Text encoder's weights.")
@click.option("--device", default="cpu", help="torch device")
@json_option
def reconstruct(
    scan: Path,
    model: Path,
    trust: str | None,
    out: Path,
    pattern: Pattern,
    acceleration: float,
    acs_lines: int,
    seed: int,
    text_folder: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Reconstruct SCAN, a scan file of a site store, as NIfTI and DICOM. Research use only.

    A fully sampled scan is undersampled first; of a scan that lacks lines already, the options
    say how it was acquired.
    """
    from fedcmr_client.image_export import export_images
    from fedcmr_client.image_files import check_free
    from fedcmr_client.store.scan_file import ScanFile
    from fedcmr_shared.kspace.masks import Sampling
    from fedcmr_shared.models.release import load_model

    check_free(out)
    sampling = Sampling(pattern, acceleration, acs_lines)
    with ScanFile(scan) as file:
        series = _reconstruct(file, load_model(model, trust), sampling, seed, text_folder, device)
    files = export_images(out, series)
    summary = {**series.provenance, "scan": scan, "model": model, "out": out, "files": len(files)}
    if as_json:
        print_json({**summary, "files": files})
    else:
        rows = [{"what": name, "value": summary[name]} for name in (*_SHOWN, "out", "files")]
        print_table(f"{summary['notice']}: reconstruction of {scan.name}", rows, ("what", "value"))


def _reconstruct(
    file: ScanFile,
    bundle: Bundle,
    sampling: Sampling,
    seed: int,
    text_folder: Path | None,
    device: str,
) -> ImageSeries:
    from fedcmr_client.image_export import ImageSeries
    from fedcmr_client.reconstruction import reconstruct_scan
    from fedcmr_shared.text.encoders import load_text_encoder

    encoder = load_text_encoder(bundle.spec.text_encoder, text_folder)
    with progress("Reconstructing images", file.metadata.frames * file.metadata.slices) as on_image:
        result = reconstruct_scan(
            file.image,
            file.metadata,
            bundle,
            encoder,
            sampling,
            seed=seed,
            device=device,
            on_image=on_image,
        )
    patient = _patient(file.path, file.digest)
    return ImageSeries(result, file.metadata, patient, file.digest, bundle.sha256, seed)


def _patient(path: Path, digest: str) -> str:
    """Pseudonym that the store's folder gives; outside a store a name made from the samples."""
    folder = path.absolute().parent.name
    return folder if _PSEUDONYM.fullmatch(folder) else f"scan-{digest[:16]}"
