"""Draw docs/images/phantom.png: what the phantom looks like, slice by slice and contrast by contrast.

Run from the repository root: python benchmarks/phantom_picture.py [OUT.png]
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import scipy.fft

from fedcmr_simulations.centres import CENTRES, Centre
from fedcmr_simulations.phantom.patient import Patient, draw_patient
from fedcmr_simulations.phantom.protocol import Modality, protocol
from fedcmr_simulations.phantom.scan import Scan

OUT = Path("docs/images/phantom.png")
BY_NAME = {centre.name: centre for centre in CENTRES}


def magnitude(scan: Scan, frame: int, slice_: int) -> npt.NDArray[np.float64]:
    """Root-sum-of-squares image of one fully sampled frame, cropped around the heart."""
    wanted = (frame, slice_)
    kspace = next(data for *place, data in scan.images() if tuple(place) == wanted)
    axes = (-2, -1)
    shifted = scipy.fft.ifft2(scipy.fft.ifftshift(kspace, axes=axes), norm="ortho")
    image = np.sqrt((np.abs(scipy.fft.fftshift(shifted, axes=axes)) ** 2).sum(axis=0))
    readout = scan.scanner.grid.readout
    start = image.shape[1] // 2 - readout // 2
    # Readers look at the heart: most of the chest wall is cut off.
    rows, columns = image.shape[0] // 8, start + readout // 8
    return image[rows:-rows, columns : columns + readout - 2 * (readout // 8)]


def scan_of(
    centre: Centre, patient: Patient, modality: Modality, heights: tuple[float, ...]
) -> Scan:
    """One standard-resolution scan with few frames."""
    scanner = centre.equipment("standard")
    sequence = protocol(modality, "quick", centre.field_strength_t)
    base = patient.heart.at(0).base
    return Scan(patient, scanner, sequence, tuple(h * base for h in heights), (7, 1))


def panels() -> list[tuple[str, npt.NDArray[np.float64]]]:
    rng = np.random.default_rng(2026)
    normal, infarct, thick = (draw_patient(d, d, rng) for d in ("NC", "MI", "HCM"))
    heights = (0.86, 0.66, 0.46, 0.26)
    cine = scan_of(BY_NAME["alder"], normal, "cine", heights)
    result = []
    for frame, phase in ((0, "ED"), (2, "ES")):
        for index, place in enumerate(("base", "mid-basal", "mid-apical", "apex")):
            result.append((f"cine 1.5 T {phase}, {place}", magnitude(cine, frame, index)))
    for centre, patient, modality, frame, title in (
        ("alder", infarct, "LGE", 0, "LGE 1.5 T, infarct"),
        ("birch", thick, "T1 mapping", 1, "T1 mapping 3 T, TI 400 ms, HCM"),
        ("dogwood", normal, "T2 mapping", 2, "T2 mapping 0.55 T, 55 ms"),
        ("cedar", infarct, "perfusion", 1, "perfusion 1.5 T, first pass"),
    ):
        scan = scan_of(BY_NAME[centre], patient, modality, (0.55,))
        result.append((title, magnitude(scan, frame, 0)))
    return result


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else OUT
    figure, axes = plt.subplots(3, 4, figsize=(11, 8.2), facecolor="black")
    for axis, (title, image) in zip(axes.flat, panels(), strict=True):
        axis.imshow(image, cmap="gray", vmin=0, vmax=np.percentile(image, 99.3))
        axis.set_title(title, color="white", fontsize=9)
        axis.axis("off")
    figure.suptitle("FedCMR phantom: simulated, not measured", color="white", fontsize=11)
    figure.tight_layout(pad=0.4, rect=(0, 0, 1, 0.97))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100, facecolor="black")


if __name__ == "__main__":
    main()
