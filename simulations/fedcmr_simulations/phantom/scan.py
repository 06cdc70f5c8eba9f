"""One simulated scan: a patient, a scanner and a sequence become a source for the site store."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from fedcmr_client.store.scan_file import ScanSource, Truth
from fedcmr_shared.schemas.acquisition import AcquisitionMetadata, UnknownVocabularyWarning
from fedcmr_simulations.phantom import acquisition, anatomy, protocol
from fedcmr_simulations.phantom.acquisition import Grid
from fedcmr_simulations.phantom.canvas import Canvas, Plane
from fedcmr_simulations.phantom.coils import CoilArray, noise_covariance
from fedcmr_simulations.phantom.motion import HeartState
from fedcmr_simulations.phantom.patient import Patient
from fedcmr_simulations.phantom.protocol import Protocol
from fedcmr_simulations.phantom.tissue import PROPERTIES, TISSUES

SOURCE_FORMAT: Final = "fedcmr-phantom"
_EDGE_MM: Final = 2.0
_OFF_RESONANCE_HZ_PER_T: Final = 15.0
_SUBSLICES: Final = 3
_TEXTURE: Final = np.array([PROPERTIES[t].texture for t in TISSUES], np.float32)


@dataclass(frozen=True)
class Scanner:
    """What a scan takes from its site.

    ``snr`` is that of blood in a cine of the site, per coil element, before combination.
    """

    name: str
    vendor: str
    model: str
    field_strength_t: float
    array: CoilArray
    grid: Grid
    slice_thickness_mm: float
    slice_pitch_mm: float
    snr: float
    noise_correlation: float
    life_span: str = "adult"


@dataclass(frozen=True)
class Scan:
    """A sequence on a patient; everything random comes from ``seed``.

    ``heights_mm`` are the slice centres over the apex, base first.
    """

    patient: Patient
    scanner: Scanner
    sequence: Protocol
    heights_mm: tuple[float, ...]
    seed: tuple[int, ...]

    def source(self) -> ScanSource:
        """Scan with metadata and truth; its images are computed one at a time when asked for."""
        return ScanSource(
            patient=self.patient.name,
            metadata=self.metadata(),
            images=self.images,
            truth=self.truth(),
            noise_covariance=np.asarray(self.covariance, np.complex64),
            source=f"{self.scanner.name}/{self.patient.name}/{self.sequence.modality}",
        )

    def images(self) -> Iterator[tuple[int, int, npt.NDArray[np.complex64]]]:
        """Yield (frame, slice, k-space [coil, phase, readout]), the same each time."""
        factor = np.asarray(np.linalg.cholesky(self.covariance), np.complex128)
        for slice_ in range(len(self.heights_mm)):
            noise = self._rng(1, slice_)
            plane = _Slice(self, slice_)
            for frame in range(self.sequence.frames):
                image = plane.image(frame)
                yield (
                    frame,
                    slice_,
                    acquisition.acquire(image, self.maps, self.scanner.grid, factor, noise),
                )

    @cached_property
    def axes(self) -> tuple[Plane, Plane]:
        """Fine simulation axes (x, y)."""
        return self.scanner.grid.fine_axes(self.centre)

    @cached_property
    def centre(self) -> tuple[float, float]:
        """Middle of the field of view, between the heart and the middle of the chest; mm."""
        rng = self._rng(2)
        return (
            0.6 * self.patient.placement.x + float(rng.normal(0, 5)),
            float(rng.normal(0, 4)),
        )

    @cached_property
    def maps(self) -> npt.NDArray[np.complex64]:
        """Coil sensitivities on the simulation grid."""
        return self.scanner.array.sensitivities(*self.axes, self.patient.body)

    @cached_property
    def covariance(self) -> npt.NDArray[np.complex128]:
        """Noise covariance [coil, coil] in units of the k-space."""
        shape = noise_covariance(
            self.scanner.array.coils, self.scanner.noise_correlation, self._rng(3)
        )
        return shape * (self._blood_signal() / self.scanner.snr) ** 2

    def _blood_signal(self) -> float:
        field = self.scanner.field_strength_t
        cine = protocol.protocol("cine", "quick", field)
        on_resonance = protocol.steady_state(cine, field, np.zeros((1, 1), np.float32))
        return float(np.abs(on_resonance[TISSUES.index("arterial blood"), 0, 0]))

    def _rng(self, *path: int) -> np.random.Generator:
        return np.random.default_rng([*self.seed, *path])

    @cached_property
    def shifts_mm(self) -> npt.NDArray[np.float64]:
        """Displacement by breathing [frame, slice] in mm: one breath-hold per slice, or drift."""
        rng = self._rng(4)
        amplitude = self.patient.breathing_mm
        shape = (self.sequence.frames, len(self.heights_mm))
        if not self.sequence.free_breathing:
            return np.broadcast_to(rng.normal(0, 0.5 * amplitude, shape[1]), shape)
        turn = rng.uniform(0, 2 * np.pi) + 2.1 * np.arange(shape[0])
        return np.broadcast_to(amplitude * np.sin(turn)[:, None], shape)

    @cached_property
    def states(self) -> tuple[HeartState, ...]:
        """Shape of the ventricles in each frame."""
        known = {phase: self.patient.heart.at(phase) for phase in set(self.sequence.phases)}
        return tuple(known[phase] for phase in self.sequence.phases)

    def truth(self) -> Truth:
        """Analytic phenotypes and labels at the pixel centres of the image grid."""
        x, y = self.scanner.grid.image_axes(self.centre)
        labels = np.empty((self.sequence.frames, len(self.heights_mm), len(y), len(x)), np.uint8)
        for frame, state in enumerate(self.states):
            for slice_, z in enumerate(self.heights_mm):
                shift = float(self.shifts_mm[frame, slice_])
                labels[frame, slice_] = anatomy.labels(x, y, self.patient, state, z, shift)
        phenotypes = self.patient.heart.volumes.phenotypes(self.patient.heart_rate_bpm)
        return Truth(phenotypes=phenotypes, labels=labels, label_names=anatomy.LABEL_NAMES)

    def metadata(self) -> AcquisitionMetadata:
        """Metadata of the scan, marked as simulated."""
        with warnings.catch_warnings():
            # The vocabulary is that of one database; invented research scanners lie outside it.
            warnings.simplefilter("ignore", UnknownVocabularyWarning)
            return self._metadata()

    def _metadata(self) -> AcquisitionMetadata:
        scanner, sequence = self.scanner, self.sequence
        beat_ms = 60e3 / self.patient.heart_rate_bpm
        return AcquisitionMetadata(
            origin="simulated",
            source_format=SOURCE_FORMAT,
            modality=sequence.modality,
            view="short-axis",
            vendor=scanner.vendor,
            scanner=scanner.model,
            field_strength_t=scanner.field_strength_t,
            centre=scanner.name,
            life_span=scanner.life_span,
            diseases=(self.patient.disease,),
            frames=sequence.frames,
            slices=len(self.heights_mm),
            coils=scanner.array.coils,
            phase_encodes=scanner.grid.phase,
            readout_samples=scanner.grid.readout_samples,
            readout_oversampling=scanner.grid.oversampling,
            pixel_spacing_mm=scanner.grid.spacing,
            slice_thickness_mm=scanner.slice_thickness_mm,
            slice_pitch_mm=scanner.slice_pitch_mm,
            spacing_source="phantom",
            repetition_time_ms=sequence.repetition_time_ms,
            echo_time_ms=sequence.echo_time_ms,
            flip_angle_deg=sequence.flip_angle_deg,
            heart_rate_bpm=self.patient.heart_rate_bpm,
            frame_times_ms=tuple(phase * beat_ms for phase in sequence.phases),
            contrast_times_ms=sequence.preparation_ms,
        )


class _Slice:
    """What the frames of one slice share: body, field, texture and, for cine, the steady state."""

    def __init__(self, scan: Scan, index: int) -> None:
        self._scan = scan
        self._index = index
        self._z = scan.heights_mm[index]
        x, y = scan.axes
        rng = np.random.default_rng([*scan.seed, 5, index])
        shape = (len(y), len(x))
        pixel = float(x[1] - x[0])
        fine = acquisition.smooth_field(shape, 5 / pixel, rng)
        self._texture = 0.9 * fine + 0.4 * acquisition.smooth_field(shape, 30 / pixel, rng)
        field = scan.scanner.field_strength_t
        off_resonance = acquisition.smooth_polynomial(x, y, 110, rng)
        off_resonance += 0.5 * acquisition.smooth_field(shape, 45 / pixel, rng)
        off_resonance *= np.float32(_OFF_RESONANCE_HZ_PER_T * field)
        background = np.exp(1j * acquisition.smooth_polynomial(x, y, 150, rng))
        self._phase = background.astype(np.complex64)
        self._steady: npt.NDArray[np.complex64] | None = None
        if scan.sequence.preparation_ms is None:
            self._steady = protocol.steady_state(scan.sequence, field, off_resonance)
        else:
            self._phase *= protocol.off_resonance_phase(scan.sequence, off_resonance)
        self._painted: dict[tuple[float, float], Plane] = {}
        self._bodies: dict[float, Canvas] = {}

    def image(self, frame: int) -> npt.NDArray[np.complex64]:
        """Complex transverse magnetisation [y, x] of one frame on the simulation grid."""
        weights = self._weights(frame)
        if self._steady is not None:
            parts = weights * self._steady
            plain, textured = parts.sum(axis=0), np.tensordot(_TEXTURE, parts, 1)
        else:
            values = protocol.frame_signals(
                self._scan.sequence, frame, self._scan.scanner.field_strength_t
            ).astype(np.complex64)
            plain = np.tensordot(values, weights, 1)
            textured = np.tensordot(values * _TEXTURE, weights, 1)
        return np.asarray((plain + textured * self._texture) * self._phase, np.complex64)

    def _weights(self, frame: int) -> Plane:
        scan = self._scan
        shift = float(scan.shifts_mm[frame, self._index])
        key = (scan.sequence.phases[frame], shift)
        if key not in self._painted:
            self._painted = {key: self._paint(scan.states[frame], shift)}
        return self._painted[key]

    def _paint(self, state: HeartState, shift: float) -> Plane:
        if shift not in self._bodies:
            canvas = Canvas.blank(*self._scan.axes, _EDGE_MM)
            anatomy.paint_body(canvas, self._scan.patient.body, self._z, shift)
            self._bodies = {shift: canvas}
        body = self._bodies[shift]
        # The slice is thick: the heart is averaged over it.
        result = body.copy()
        target = anatomy.heart_window(result, self._scan.patient)
        total = np.zeros_like(target.weights)
        thickness = self._scan.scanner.slice_thickness_mm
        for part in range(_SUBSLICES):
            offset = ((part + 0.5) / _SUBSLICES - 0.5) * thickness
            layer = target.copy()
            anatomy.paint_heart(layer, self._scan.patient, state, self._z + offset, shift)
            total += layer.weights
        target.weights[:] = total / np.float32(_SUBSLICES)
        return result.weights
