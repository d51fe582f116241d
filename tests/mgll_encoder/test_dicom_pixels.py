"""A DICOM radiograph is converted as a workstation shows it, or skipped with a reason."""

from pathlib import Path

import numpy as np
import pytest
from pydicom import Dataset, dcmread, dcmwrite
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders import JPEGLSLosslessDecoder
from pydicom.sequence import Sequence
from pydicom.uid import MPEG2MPML, JPEGExtended12Bit, JPEGLSLossless, RLELossless

from mgll_encoder.data.dicom.header import UnusableDicomError
from tests.mgll_encoder.radiographs import gray, radiograph, ramp


def test_the_whole_range_becomes_eight_bits(tmp_path: Path) -> None:
    found = gray(radiograph(tmp_path / "a.dcm", ramp()))
    np.testing.assert_array_equal(found, np.round(ramp() / 4095 * 255))


def test_monochrome1_is_inverted(tmp_path: Path) -> None:
    found = gray(radiograph(tmp_path / "a.dcm", ramp(), photometric="MONOCHROME1"))
    assert (found[0, 0], found[-1, -1]) == (255, 0)


def test_a_window_decides_what_is_black_and_white(tmp_path: Path) -> None:
    found = gray(radiograph(tmp_path / "a.dcm", ramp(), WindowCenter=2048, WindowWidth=1024))
    # DICOM PS3.3 C.11.2.1.2: linear between c - 0.5 - (w-1)/2 and c - 0.5 + (w-1)/2
    expected = np.clip((ramp() - 2047.5) / 1023 + 0.5, 0, 1) * 255
    np.testing.assert_allclose(found, expected, atol=0.51)
    wide = gray(radiograph(tmp_path / "b.dcm", ramp(1000), WindowCenter=2048, WindowWidth=4096))
    assert wide.max() < 70, "a window wider than the values is kept, not stretched"


def test_rescale_comes_before_the_window(tmp_path: Path) -> None:
    fields = {"RescaleSlope": 2, "RescaleIntercept": -100, "RescaleType": "US"}
    found = gray(radiograph(tmp_path / "a.dcm", ramp(), WindowCenter=4000, WindowWidth=2000, **fields))
    expected = np.clip((ramp() * 2.0 - 100 - 3999.5) / 1999 + 0.5, 0, 1) * 255
    np.testing.assert_allclose(found, expected, atol=0.51)


def test_a_lookup_table_is_applied(tmp_path: Path) -> None:
    table = Dataset()
    table.LUTDescriptor = [16, 0, 8]
    table.add_new("LUTData", "US", list(range(0, 256, 17))[::-1])
    falling = radiograph(tmp_path / "a.dcm", ramp(15), bits=4, VOILUTSequence=Sequence([table]))
    found = gray(falling)
    np.testing.assert_array_equal(found, 255 - ramp(15) * 17)


WHOLE = np.round(ramp() / 4095 * 255)
"""The ramp over its whole range."""


def left_out(path: Path) -> UnusableDicomError:
    with pytest.raises(UnusableDicomError) as error:
        gray(path)
    return error.value


def table(first: int, bits: int, data: bytes | list[int], entries: int | None = None) -> Sequence:
    item = Dataset()
    item.LUTDescriptor = [len(data) if entries is None else entries, first, bits]
    item.add_new("LUTData", "OW" if isinstance(data, bytes) else "US", data)
    return Sequence([item])


@pytest.mark.parametrize(
    ("center", "width"),
    [(None, None), ("", ""), ("", "1024"), ("2048", ""), ("2048", "0"), ("2048", "-300"), (["", ""], ["", ""])],
)  # fmt: skip
def test_a_window_without_a_value_is_no_window(tmp_path: Path, center: object, width: object) -> None:
    path = radiograph(tmp_path / "a.dcm", ramp())
    header = dcmread(path)
    if center is not None:
        header.WindowCenter, header.WindowWidth = center, width
    dcmwrite(path, header)
    np.testing.assert_array_equal(gray(path), WHOLE)


def test_a_window_of_which_half_is_missing_is_no_window(tmp_path: Path) -> None:
    np.testing.assert_array_equal(gray(radiograph(tmp_path / "a.dcm", ramp(), WindowWidth=10)), WHOLE)


def test_the_first_window_with_a_width_counts(tmp_path: Path) -> None:
    several = {"WindowCenter": [100, 2048, 50], "WindowWidth": [0, 1024, 20]}
    one = {"WindowCenter": 2048, "WindowWidth": 1024}
    found = [gray(radiograph(tmp_path / "a.dcm", ramp(), **fields)) for fields in (several, one)]
    np.testing.assert_array_equal(*found)


def test_window_functions(tmp_path: Path) -> None:
    window = {"WindowCenter": 2048, "WindowWidth": 1024}
    exact = gray(radiograph(tmp_path / "a.dcm", ramp(), VOILUTFunction="LINEAR_EXACT", **window))
    np.testing.assert_allclose(exact, np.clip((ramp() - 2048.0) / 1024 + 0.5, 0, 1) * 255, atol=0.51)
    sigmoid = gray(radiograph(tmp_path / "a.dcm", ramp(), VOILUTFunction="SIGMOID", **window))
    np.testing.assert_allclose(sigmoid, 255 / (1 + np.exp(-4 * (ramp() - 2048.0) / 1024)), atol=0.51)
    step = gray(radiograph(tmp_path / "a.dcm", ramp(), WindowCenter=2048, WindowWidth=1))
    np.testing.assert_array_equal(step, np.where(ramp() > 2047, 255, 0))
    unknown = left_out(radiograph(tmp_path / "a.dcm", ramp(), VOILUTFunction="LOGARITHMIC", **window))
    assert unknown.reason == "unknown window function"


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(
    ("padding", "bits", "fields"),
    [
        (65535, 16, {"PixelPaddingValue": 65535}),
        (4095, 12, {"PixelPaddingValue": 65535}),  # cut to the stored bits, as the pixels are
        (60010, 16, {"PixelPaddingValue": 60000, "PixelPaddingRangeLimit": 60020}),
        (60010, 16, {"PixelPaddingValue": 60020, "PixelPaddingRangeLimit": 60000}),
    ],
)
def test_padding_is_black_and_decides_nothing(
    tmp_path: Path, photometric: str, padding: int, bits: int, fields: dict[str, int]
) -> None:
    pixels = ramp(4000)
    pixels[:4] = padding
    found = gray(radiograph(tmp_path / "a.dcm", pixels, bits=bits, photometric=photometric, **fields))
    assert (found[:4] == 0).all()
    expected = (pixels[4:] - float(pixels[4, 0])) / (4000 - pixels[4, 0]) * 255
    inverted = photometric == "MONOCHROME1"
    np.testing.assert_allclose(found[4:], 255 - expected if inverted else expected, atol=0.51)


def test_signed_values_and_their_padding(tmp_path: Path) -> None:
    pixels = ramp(3000).astype(np.int16) - 1000
    pixels[0] = -2000
    found = gray(radiograph(tmp_path / "a.dcm", pixels, bits=16, PixelPaddingValue=-2000))
    assert (found[0] == 0).all()
    low = pixels[1:].min()
    np.testing.assert_allclose(found[1:], (pixels[1:] - low) / (2000 - low) * 255, atol=0.51)
    twelve = ramp(2000).astype(np.int16) - 1000
    unextended = (twelve & 0xFFF).astype(np.int16)  # the unused bits say nothing of the sign
    signed = [gray(radiograph(tmp_path / "b.dcm", values, bits=12)) for values in (twelve, unextended)]
    np.testing.assert_array_equal(*signed)


def test_a_field_without_a_value_changes_nothing(tmp_path: Path) -> None:
    path = radiograph(tmp_path / "a.dcm", ramp())
    header = dcmread(path)
    for name in ("RescaleSlope", "RescaleIntercept", "VOILUTFunction", "NumberOfFrames"):
        setattr(header, name, None)
    header.add_new("PixelPaddingValue", "US", None)
    header.VOILUTSequence, header.ModalityLUTSequence = Sequence([]), Sequence([])
    dcmwrite(path, header)
    np.testing.assert_array_equal(gray(path), WHOLE)


def test_a_modality_table_comes_before_the_window(tmp_path: Path) -> None:
    falling = table(0, 12, list(range(4095, -1, -1)))  # pydicom's own function takes 8 and 16 bits only
    fields = {"ModalityLUTSequence": falling, "WindowCenter": 2048, "WindowWidth": 1024}
    found = gray(radiograph(tmp_path / "a.dcm", ramp(), **fields))
    expected = np.clip((4095 - ramp() - 2047.5) / 1023 + 0.5, 0, 1) * 255
    np.testing.assert_allclose(found, expected, atol=0.51)
    nothing = left_out(radiograph(tmp_path / "b.dcm", ramp(), ModalityLUTSequence=table(0, 12, [], 4096)))
    assert nothing.reason == "damaged header"


def test_tables_of_bytes_may_be_longer_than_a_byte_counts(tmp_path: Path) -> None:
    entries = bytes(np.linspace(0, 255, 4096).round().astype(np.uint8))
    found = gray(radiograph(tmp_path / "a.dcm", ramp(), VOILUTSequence=table(0, 8, entries)))
    np.testing.assert_allclose(found, WHOLE, atol=1)
    words = np.arange(4096, dtype="<u2").tobytes()
    found = gray(radiograph(tmp_path / "a.dcm", ramp(), VOILUTSequence=table(0, 12, words, 4096)))
    np.testing.assert_array_equal(found, WHOLE)


def test_an_empty_table_gives_way_to_the_window(tmp_path: Path) -> None:
    window = {"WindowCenter": 2048, "WindowWidth": 1024}
    found = [
        gray(radiograph(tmp_path / "a.dcm", ramp(), **window, **fields))
        for fields in ({"VOILUTSequence": table(0, 12, [7] * 4096)}, {})
    ]
    np.testing.assert_array_equal(*found)


def hot() -> np.ndarray:
    """A flat picture with one broken pixel."""
    pixels = np.full((40, 40), 7, np.uint16)
    pixels[3, 3] = 4095
    return pixels


@pytest.mark.parametrize(
    ("pixels", "fields"),
    [
        (np.full((16, 16), 1234, np.uint16), {}),
        (ramp(), {"WindowCenter": 60000, "WindowWidth": 10}),
        (hot(), {}),
        (np.zeros((16, 16), np.uint16), {"PixelPaddingValue": 0}),
    ],
)
def test_a_picture_that_shows_nothing_is_left_out(
    tmp_path: Path, pixels: np.ndarray, fields: dict[str, int]
) -> None:
    assert left_out(radiograph(tmp_path / "a.dcm", pixels, **fields)).reason == "no contrast"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3, "PlanarConfiguration": 0}, "color image (RGB)"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "color image (PALETTE COLOR)"),
        ({"PhotometricInterpretation": None}, "photometric interpretation missing or unknown"),
        ({"SamplesPerPixel": 2}, "several samples per pixel"),
        ({"NumberOfFrames": 12}, "several frames"),
        ({"Rows": 65535, "Columns": 65535}, "too large"),
        ({"HighBit": 15}, "unusual bits"),
        ({"Rows": 500}, "pixels cannot be decoded (Explicit VR Little Endian)"),
        ({"Rows": None}, "pixels cannot be decoded (Explicit VR Little Endian)"),
    ],
)  # fmt: skip
def test_what_is_no_grey_picture_is_left_out_by_name(
    tmp_path: Path, fields: dict[str, object], reason: str
) -> None:
    assert left_out(radiograph(tmp_path / "a.dcm", ramp(), **fields)).reason == reason


def test_only_a_missing_decoder_is_told_with_what_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A format that nothing reads, one without its decoder, 12 bits that Pillow cannot, a damaged file."""
    path = radiograph(tmp_path / "a.dcm", ramp())
    monkeypatch.setattr(JPEGLSLosslessDecoder, "_available", {})
    for syntax, reason, advice in [
        (MPEG2MPML, "no decoder (MPEG2 Main Profile / Main Level)", "convert"),
        (JPEGLSLossless, "no decoder (JPEG-LS Lossless Image Compression)", "pip install 'mgll-mllm[dicom]'"),
        (JPEGExtended12Bit, "(JPEG Extended (Process 2 and 4))", ""),
    ]:
        header = dcmread(path)
        header.PixelData = encapsulate([header.PixelData])
        header["PixelData"].is_undefined_length = True
        header.file_meta.TransferSyntaxUID = syntax
        dcmwrite(tmp_path / "b.dcm", header)
        trouble = left_out(tmp_path / "b.dcm")
        assert reason in trouble.reason
        assert advice in trouble.advice
    header = dcmread(path)
    header.compress(RLELossless)
    header.PixelData = header.PixelData[:40]
    dcmwrite(path, header)
    damaged = left_out(path)
    assert damaged.reason == "pixels cannot be decoded (RLE Lossless)"
    assert "pip" not in damaged.advice


def test_the_cases(cases: Path) -> None:
    folder = cases / "dicom"
    for name in ("window_empty", "window_zero"):
        header = dcmread(folder / name / "a.dcm")
        stored = header.pixel_array.astype(float)
        whole = (stored - stored.min()) / np.ptp(stored) * 255
        np.testing.assert_allclose(gray(folder / name / "a.dcm"), whole, atol=0.51)
    for name in ("window_out", "const"):
        assert left_out(folder / name / "a.dcm").reason == "no contrast"
    header = dcmread(folder / "padding" / "a.dcm")
    stored, found = header.pixel_array.astype(float), gray(folder / "padding" / "a.dcm")
    anatomy = stored != 65535
    assert (found[~anatomy] == 0).all()
    whole = (stored[anatomy] - stored[anatomy].min()) / np.ptp(stored[anatomy]) * 255
    np.testing.assert_allclose(found[anatomy], whole, atol=0.51)
