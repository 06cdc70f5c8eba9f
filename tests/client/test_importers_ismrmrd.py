"""ISMRMRD files written through the ismrmrd package."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import ismrmrd
import ismrmrd.xsd
import numpy as np
import pytest

from fedcmr_client.importers import ImporterWarning, ImportOptions
from fedcmr_client.importers.ismrmrd_h5 import IsmrmrdImporter
from fedcmr_client.store.scan_file import ScanSource
from fedcmr_shared.errors import DataError

FRAMES, SLICES, COILS, LINES, READOUT = 3, 2, 4, 8, 16

HEADER = """<?xml version="1.0"?>
<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">
  {subject}
  {study}
  <measurementInformation>{series}<patientPosition>HFS</patientPosition><protocolName>cine_sax</protocolName></measurementInformation>
  <acquisitionSystemInformation>
    <systemVendor>SIEMENS</systemVendor><systemModel>Avanto</systemModel>
    <systemFieldStrength_T>1.494</systemFieldStrength_T>
  </acquisitionSystemInformation>
  <experimentalConditions><H1resonanceFrequency_Hz>63500000</H1resonanceFrequency_Hz>
  </experimentalConditions>
  <encoding>
    <encodedSpace><matrixSize><x>16</x><y>{lines}</y><z>1</z></matrixSize>
      <fieldOfView_mm><x>640</x><y>240</y><z>8</z></fieldOfView_mm></encodedSpace>
    <reconSpace><matrixSize><x>8</x><y>{lines}</y><z>1</z></matrixSize>
      <fieldOfView_mm><x>320</x><y>240</y><z>8</z></fieldOfView_mm></reconSpace>
    <encodingLimits><kspace_encoding_step_1>
      <minimum>0</minimum><maximum>{maximum}</maximum><center>{center}</center>
    </kspace_encoding_step_1></encodingLimits>
    <trajectory>{trajectory}</trajectory>
  </encoding>
  <sequenceParameters><TR>3.2</TR><TE>1.4</TE><flipAngle_deg>50</flipAngle_deg>
  </sequenceParameters>
  {user}
</ismrmrdHeader>"""
PILOT_TONE = """<userParameters><userParameterLong><name>PilotTone</name><value>1</value>
</userParameterLong></userParameters>"""


def acquisition(samples: np.ndarray, **place: int) -> ismrmrd.Acquisition:
    result = ismrmrd.Acquisition.from_array(np.ascontiguousarray(samples))
    result.center_sample = samples.shape[1] // 2
    result.slice_dir[:] = (0, 0, 1)
    # Slice counters run against the spatial order here.
    result.position[:] = (0, 0, -10.0 * place.get("slice", 0))
    for name, value in place.items():
        setattr(result.idx, name, value)
    return result


def noise_scan(rng: np.random.Generator, mix: np.ndarray) -> ismrmrd.Acquisition:
    white = rng.normal(size=(2, COILS, 512)) / np.sqrt(2)
    result = acquisition((mix @ (white[0] + 1j * white[1])).astype(np.complex64))
    result.setFlag(ismrmrd.ACQ_IS_NOISE_MEASUREMENT)
    return result


def write(
    path: Path,
    acquisitions: list[ismrmrd.Acquisition],
    *,
    lines: int = LINES,
    maximum: int | None = None,
    center: int | None = None,
    trajectory: str = "cartesian",
    patient: str = "volunteer",
    user: str = "",
    study: str = "",
    series: str = "",
) -> Path:
    subject = f"<subjectInformation><patientID>{patient}</patientID></subjectInformation>"
    header = HEADER.format(
        subject=subject if patient else "",
        lines=lines,
        maximum=lines - 1 if maximum is None else maximum,
        center=lines // 2 if center is None else center,
        trajectory=trajectory,
        user=user,
        study=study and f"<studyInformation><studyDate>{study}</studyDate></studyInformation>",
        series=series and f"<seriesDate>{series}</seriesDate>",
    )
    with ismrmrd.Dataset(path) as dataset:
        dataset.write_xml_header(header.encode())
        for item in acquisitions:
            dataset.append_acquisition(item)
    return path


def truth(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    shape = (2, FRAMES, SLICES, COILS, LINES, READOUT)
    parts = rng.normal(size=shape)
    samples: np.ndarray = (parts[0] + 1j * parts[1]).astype(np.complex64)
    return samples


def readouts(
    array: np.ndarray, turn: Callable[..., ismrmrd.Acquisition] = acquisition, **extra: int
) -> list[ismrmrd.Acquisition]:
    """All lines, interleaved over slices and frames as a scanner plays them."""
    return [
        turn(array[t, z, :, y], phase=t, slice=z, kspace_encode_step_1=y, **extra)
        for y in range(array.shape[3])
        for t in range(array.shape[0])
        for z in range(array.shape[1])
    ]


def only(path: Path, options: ImportOptions | None = None) -> ScanSource:
    (scan,) = IsmrmrdImporter().scans(path, options or ImportOptions())
    return scan


def stacked(scan: ScanSource) -> np.ndarray:
    images = {(t, z): image.copy() for t, z, image in scan.images()}
    m = scan.metadata
    return np.array([[images[t, z] for z in range(m.slices)] for t in range(m.frames)])


def in_space(array: np.ndarray) -> np.ndarray:
    return array[:, ::-1]


def test_phases_and_slices_are_sorted(tmp_path: Path) -> None:
    array = truth()
    path = write(tmp_path / "fs.h5", readouts(array))
    assert IsmrmrdImporter().claims(path)
    scan = only(path)
    np.testing.assert_array_equal(stacked(scan), in_space(array))
    m = scan.metadata
    assert (m.modality, m.view, m.vendor, m.scanner) == ("cine", "short-axis", "Siemens", "Avanto")
    assert (m.field_strength_t, m.readout_oversampling, m.slice_pitch_mm) == (1.5, 2.0, 10.0)
    assert m.pixel_spacing_mm == (30.0, 40.0)
    assert (m.repetition_time_ms, m.echo_time_ms, m.flip_angle_deg) == (3.2, 1.4, 50.0)
    assert scan.patient == "volunteer"
    assert scan.noise_covariance is None


def test_noise_scans_become_the_covariance(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    mix = np.tril(rng.normal(size=(COILS, COILS))) + 2 * np.eye(COILS)
    scans = [noise_scan(rng, mix) for _ in range(20)]
    array = truth()
    scan = only(write(tmp_path / "fs.h5", [*scans, *readouts(array)]))
    assert scan.noise_covariance is not None
    expected = mix @ mix.T
    np.testing.assert_allclose(scan.noise_covariance, expected, atol=0.05 * expected.max())
    np.testing.assert_array_equal(stacked(scan), in_space(array))


@pytest.mark.parametrize(
    ("study", "series", "day"),
    [
        ("", "", None),
        ("2024-05-01", "", date(2024, 5, 1)),
        ("2024-05-01", "2024-05-02", date(2024, 5, 2)),
        ("", "2024-05-02Z", date(2024, 5, 2)),
    ],
)
def test_the_day_is_that_of_the_series_or_the_study(
    tmp_path: Path, study: str, series: str, day: date | None
) -> None:
    path = write(tmp_path / "scan.h5", readouts(truth()), study=study, series=series)
    assert only(path).metadata.acquired_on == day


def test_averages_are_averaged(tmp_path: Path) -> None:
    first, second = truth(0), truth(1)
    path = write(tmp_path / "fs.h5", readouts(first, average=0) + readouts(second, average=1))
    np.testing.assert_allclose(stacked(only(path)), in_space((first + second) / 2), rtol=1e-6)


def test_asymmetric_echo_is_filled_in_front(tmp_path: Path) -> None:
    array = truth()

    def late(samples: np.ndarray, **place: int) -> ismrmrd.Acquisition:
        result = acquisition(samples[:, 4:], **place)
        result.center_sample = READOUT // 2 - 4
        return result

    stack = stacked(only(write(tmp_path / "fs.h5", readouts(array, late))))
    assert not stack[..., :4].any()
    np.testing.assert_array_equal(stack[..., 4:], in_space(array)[..., 4:])


def test_reversed_and_discarded_samples(tmp_path: Path) -> None:
    array = truth()

    def reverse(samples: np.ndarray, **place: int) -> ismrmrd.Acquisition:
        result = acquisition(samples[:, ::-1], **place)
        result.setFlag(ismrmrd.ACQ_IS_REVERSE)
        result.discard_pre = 2
        return result

    stack = stacked(only(write(tmp_path / "fs.h5", readouts(array, reverse))))
    assert not stack[..., -2:].any()
    np.testing.assert_array_equal(stack[..., :-2], in_space(array)[..., :-2])


def test_pilot_tone_samples_are_dropped(tmp_path: Path) -> None:
    array = truth()
    stack = stacked(only(write(tmp_path / "fs.h5", readouts(array), user=PILOT_TONE)))
    assert not stack[..., [0, 1, 2, -1]].any()
    np.testing.assert_array_equal(stack[..., 3:-1], in_space(array)[..., 3:-1])


def test_partial_fourier_is_centred(tmp_path: Path) -> None:
    """Six of eight lines with the centre at line 2: two empty lines belong in front."""
    array = truth()[..., :6, :]
    stack = stacked(only(write(tmp_path / "fs.h5", readouts(array), maximum=5, center=2)))
    assert stack.shape[3] == 8
    assert not stack[..., :2, :].any()
    np.testing.assert_array_equal(stack[..., 2:, :], in_space(array))


def test_other_acquisitions_are_left_out(tmp_path: Path) -> None:
    array = truth()
    navigator = acquisition(np.full((COILS, READOUT), 9, np.complex64))
    navigator.setFlag(ismrmrd.ACQ_IS_NAVIGATION_DATA)
    scan = only(write(tmp_path / "fs.h5", [navigator, *readouts(array)]))
    np.testing.assert_array_equal(stacked(scan), in_space(array))


def test_repetitions_are_frames(tmp_path: Path) -> None:
    array = truth()
    items = [
        acquisition(array[t, z, :, y], repetition=t, slice=z, kspace_encode_step_1=y)
        for t, z, y in np.ndindex(FRAMES, SLICES, LINES)
    ]
    assert only(write(tmp_path / "fs.h5", items)).metadata.frames == FRAMES


def changed(**attributes: Any) -> list[ismrmrd.Acquisition]:
    items = readouts(truth())
    for name, value in attributes.items():
        setattr(items[0].idx, name, value)
    return items


@pytest.mark.parametrize(
    ("items", "options", "message"),
    [
        (readouts(truth())[::2] + readouts(truth())[1::4], {}, "undersampled acquisition, . of 8"),
        (readouts(truth()[..., :3, :]), {"maximum": 7}, "undersampled acquisition, 3 of 8"),
        ([a for a in readouts(truth()) if (a.idx.phase, a.idx.slice) != (1, 1)], {}, "5 of 6"),
        (readouts(truth()), {"trajectory": "radial"}, "only Cartesian"),
        (changed(kspace_encode_step_2=1), {}, "3-D"),
        ([noise_scan(np.random.default_rng(), np.eye(COILS))], {}, "no imaging"),
        (
            [*readouts(truth()), acquisition(np.ones((2, READOUT), np.complex64))],
            {},
            "number of coils",
        ),
        ([acquisition(np.ones((COILS, 20), np.complex64))], {}, "exceeds the matrix"),
    ],
)
def test_refusals(
    tmp_path: Path, items: list[ismrmrd.Acquisition], options: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "scan.h5", items, **options)
    with pytest.raises(DataError, match=message):
        only(path)


def test_damaged_files(tmp_path: Path) -> None:
    path = write(tmp_path / "fs.h5", readouts(truth()))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert not IsmrmrdImporter().claims(path)
    with pytest.raises(DataError, match="damaged"):
        only(path)
    with ismrmrd.Dataset(tmp_path / "foreign.h5") as dataset:
        dataset.write_xml_header(b"<html/>")
        dataset.append_acquisition(readouts(truth())[0])
    with pytest.raises(DataError, match="XML header"):
        only(tmp_path / "foreign.h5")


def test_the_file_name_stands_for_an_absent_patient(tmp_path: Path) -> None:
    path = write(tmp_path / "fs_0001_1_5T.h5", readouts(truth()), patient="")
    with pytest.warns(ImporterWarning, match="--patient-map"):
        assert only(path).patient == "fs_0001_1_5T"
    assert only(path, ImportOptions(patient="A")).patient == "A"
