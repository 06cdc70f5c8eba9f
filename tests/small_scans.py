"""Small scans for tests: smooth random images seen by a few coils."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fedcmr_client.store.scan_file import ScanSource
from fedcmr_client.store.site_store import SiteStore
from fedcmr_client.store.split import SplitFractions
from fedcmr_shared.schemas.acquisition import AcquisitionMetadata


def smooth_kspace(
    generator: np.random.Generator, coils: int, phase: int, readout: int
) -> np.ndarray:
    """Return complex64 [coil, phase, readout]: k-space of a few blobs seen by smooth coils."""
    y, x = np.meshgrid(np.linspace(-1, 1, phase), np.linspace(-1, 1, readout), indexing="ij")
    image = np.zeros((phase, readout))
    for _ in range(6):
        cy, cx = generator.uniform(-0.6, 0.6, 2)
        width = generator.uniform(0.08, 0.3)
        image += generator.uniform(0.3, 1) * (np.hypot(y - cy, x - cx) < width)
    angles = 2 * np.pi * np.arange(coils) / coils
    maps = [
        np.exp(-((y - np.sin(a)) ** 2 + (x - np.cos(a)) ** 2) / 2) * np.exp(1j * a) for a in angles
    ]
    images = np.fft.ifftshift(np.stack(maps) * image, axes=(-2, -1))
    kspace = np.fft.fftshift(np.fft.fft2(images, norm="ortho"), axes=(-2, -1))
    noise = generator.standard_normal((2, *kspace.shape)) * 1e-3
    return (kspace + noise[0] + 1j * noise[1]).astype(np.complex64)


def smooth_scan(patient: str, seed: int, *, coils: int, phase: int, readout: int) -> ScanSource:
    """Return a scan of two frames and one slice for ``patient``."""
    metadata = AcquisitionMetadata(
        origin="simulated",
        source_format="test",
        modality="cine",
        view="short-axis",
        vendor="Siemens",
        field_strength_t=1.5,
        frames=2,
        slices=1,
        coils=coils,
        phase_encodes=phase,
        readout_samples=readout,
    )

    def images() -> Iterator[tuple[int, int, np.ndarray]]:
        generator = np.random.default_rng(seed)
        for frame in range(2):
            yield frame, 0, smooth_kspace(generator, coils, phase, readout)

    return ScanSource(patient=patient, metadata=metadata, images=images, source=patient)


def small_store(
    root: Path,
    patients: int,
    fractions: SplitFractions,
    *,
    coils: int = 3,
    phase: int = 32,
    readout: int = 32,
    first_seed: int = 0,
) -> Path:
    """Make a site store with one scan a patient; its folder's name is the site's."""
    name = root.name
    with SiteStore.create(root, secret=name.encode().ljust(32, b"0")) as store:
        store.set_split(fractions)
        for number in range(patients):
            seed = first_seed + 1000 * len(name) + number
            patient = f"{name}-{number}"
            store.add(smooth_scan(patient, seed, coils=coils, phase=phase, readout=readout))
    return root
