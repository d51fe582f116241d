"""Pictures in common formats, read alike by every command."""

import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin
from transformers.image_utils import load_image

from mgll_encoder.common.errors import BadDataError, UserError
from mgll_encoder.common.images import check_image_header, image_format, open_image

WHITE_IS_ZERO = TiffImagePlugin.ImageFileDirectory_v2()
WHITE_IS_ZERO[TiffImagePlugin.PHOTOMETRIC_INTERPRETATION] = 0


def eight() -> np.ndarray:
    """A picture of 8 bits that is not symmetric: 0 to 237, darker at the top."""
    return np.linspace(0, 237, 24 * 16).reshape(24, 16).round().astype(np.uint8)


def read(path: Path) -> np.ndarray:
    picture = open_image(path)
    assert picture.mode == "RGB"
    return np.asarray(picture)[..., 0].astype(int)


def saved(path: Path, values: np.ndarray, **options: object) -> Path:
    Image.fromarray(values).save(path, **options)
    return path


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("16.png", eight().astype(np.uint16) * 257),
        ("16.tif", eight().astype(np.uint16) * 257),
        ("16.jp2", eight().astype(np.uint16) * 257),
        ("12_in_16.png", (eight() * (4095 / 255)).round().astype(np.uint16)),
        ("10_in_16.tif", (eight() * (1023 / 255)).round().astype(np.uint16)),
        ("14_in_16.png", (eight() * (16383 / 255)).round().astype(np.uint16)),
        ("8_in_16.png", eight().astype(np.uint16)),
        ("32.tif", eight().astype(np.int32) * 257),
        ("unit.tif", eight().astype(np.float32) / 255),
        ("float.tif", eight().astype(np.float32)),
    ],
)
def test_a_deep_picture_looks_as_its_8_bit_version(tmp_path: Path, name: str, values: np.ndarray) -> None:
    options = {"irreversible": False} if name.endswith("jp2") else {}
    found = read(saved(tmp_path / name, values, **options))
    np.testing.assert_allclose(found, eight(), atol=1)
    check_image_header(tmp_path / name)


def test_floats_that_resampling_has_driven_past_their_scale_are_cut_off(tmp_path: Path) -> None:
    values = np.linspace(-0.02, 1.02, 24 * 16, dtype=np.float32).reshape(24, 16)
    found = read(saved(tmp_path / "a.tif", values))
    np.testing.assert_allclose(found, np.clip(values, 0, 1) * 255, atol=0.51)


def test_the_cases_of_16_and_32_bits(cases: Path) -> None:
    expected = read(cases / "pictures" / "l.png")
    for name in ("x16.png", "x16.tif", "x32i.tif"):
        np.testing.assert_array_equal(read(cases / "pictures" / name), expected)


def test_a_tiff_whose_white_is_zero_is_inverted(tmp_path: Path) -> None:
    stored = {
        "8.tif": eight(),
        "16.tif": 65535 - eight().astype(np.uint16) * 257,
    }  # Pillow inverts 8 bits itself
    for name, values in stored.items():
        saved(tmp_path / name, values, tiffinfo=WHITE_IS_ZERO)
        np.testing.assert_allclose(read(tmp_path / name), eight(), atol=1)


@pytest.mark.parametrize(
    ("name", "values", "complaint"),
    [
        ("hounsfield.tif", eight().astype(np.int32) - 100, "-100 to 137"),
        ("negative.tif", eight().astype(np.float32) / 255 - 0.5, "-0.5"),
        ("nan.tif", np.where(eight() > 9, np.nan, 1).astype(np.float32), "nan"),
        ("neither.tif", eight().astype(np.float32) / 100, "2.37"),
    ],
)
def test_values_that_are_no_brightness_are_refused(
    tmp_path: Path, name: str, values: np.ndarray, complaint: str
) -> None:
    with pytest.raises(BadDataError, match=complaint) as error:
        open_image(saved(tmp_path / name, values))
    assert name in str(error.value)
    assert "8 or 16 bits" in str(error.value)


UPRIGHT = {
    1: eight(), 2: np.fliplr(eight()), 3: np.rot90(eight(), 2), 4: np.flipud(eight()), 5: eight().T,
    6: np.rot90(eight(), -1), 7: np.rot90(eight(), 2).T, 8: np.rot90(eight()),
}  # fmt: skip
"""EXIF orientation -> the picture as it is meant to be seen."""


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("bits", [8, 16])
def test_exif_turns_a_picture_upright(tmp_path: Path, orientation: int, suffix: str, bits: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    if suffix == "webp":
        picture, options = Image.fromarray(eight()).convert("RGB"), {"lossless": True}
    else:
        picture, options = Image.fromarray(eight() * np.uint16(257) if bits == 16 else eight()), {}
    picture.save(tmp_path / f"a.{suffix}", exif=exif, **options)
    np.testing.assert_array_equal(read(tmp_path / f"a.{suffix}"), UPRIGHT[orientation])


def test_the_case_of_a_turned_photograph(cases: Path) -> None:
    path = cases / "pictures" / "exif6.jpg"
    assert open_image(path).size == (96, 160)
    np.testing.assert_array_equal(np.asarray(open_image(path)), np.asarray(load_image(str(path))))


def test_damaged_exif_turns_nothing(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", eight(), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    np.testing.assert_array_equal(read(path), eight())


def painted(mode: str) -> Image.Image:
    """A picture with transparent and half-transparent parts, in the mode asked for."""
    bands = [Image.fromarray(np.roll(eight(), 5 * i, axis=i % 2)) for i in range(4)]
    rgba = Image.merge("RGBA", bands)
    if mode == "P with transparency":
        palette = rgba.convert("RGB").quantize(16)
        palette.info["transparency"] = 3
        return palette
    return Image.merge("CMYK", bands) if mode == "CMYK" else rgba.convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("1", "png"), ("L", "bmp"), ("LA", "png"), ("P", "png"), ("P with transparency", "png"),
        ("P with transparency", "gif"), ("RGB", "webp"), ("RGBA", "png"), ("RGBA", "webp"), ("CMYK", "jpg"),
        ("CMYK", "tif"), ("YCbCr", "jpg"), ("L", "pgm"),
    ],
)  # fmt: skip
def test_other_modes_are_read_as_the_library_reads_them(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    painted(mode).save(path)
    np.testing.assert_array_equal(np.asarray(open_image(path)), np.asarray(load_image(str(path))))


@pytest.mark.parametrize("suffix", ["tif", "gif", "webp", "png"])
def test_a_file_with_several_frames_is_no_picture(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"pages.{suffix}"
    first, *others = (Image.fromarray(np.roll(eight(), 3 * i, axis=0)).convert("RGB") for i in range(3))
    first.save(path, save_all=True, append_images=others)
    for look in (open_image, check_image_header):
        with pytest.raises(BadDataError, match="3 frames") as error:
            look(path)
        assert path.name in str(error.value)
    with pytest.raises(BadDataError, match="row 7: embedded image has 3 frames"):
        image_format(BytesIO(path.read_bytes()), "row 7: embedded image")


def test_a_camera_jpeg_with_previews_is_one_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    first = Image.fromarray(eight())
    first.save(path, format="MPO", save_all=True, append_images=[Image.new("L", (4, 4))])
    assert open_image(path).size == (16, 24)


def _pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (_pipe, "pipe"),
        (Path.mkdir, "folder"),
        (lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "format"),
        (lambda path: path.write_bytes(b""), "format"),
        (lambda path: path.symlink_to("nowhere"), "does not exist"),
    ],
)
def test_what_is_no_picture_is_refused_in_one_line(
    tmp_path: Path, make: Callable[[Path], object], complaint: str
) -> None:
    path = tmp_path / "a.png"
    make(path)
    for look in (open_image, check_image_header):
        with pytest.raises(UserError, match=complaint):
            look(path)
