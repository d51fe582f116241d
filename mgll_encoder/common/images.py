"""The only image reader: training, scoring, probes, caches and reports get the same pixels from a file.

The result is that of ``transformers.image_utils.load_image``: the picture rotated by its EXIF orientation, then
Pillow's conversion to RGB, which drops transparency and keeps the colors as they are stored. Two things differ:
pictures of more than 8 bits are scaled (Pillow clips values at 255), and files with several frames are refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from mgll_encoder.common.errors import BadDataError, UserError
from mgll_encoder.common.faults import Fault, find_fault
from mgll_encoder.common.files import regular_file

READER_VERSION = 2
"""Part of every cache key: changes when the same file yields different pixels."""

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "DIB", "GIF", "WEBP", "AVIF", "JPEG2000", "PPM")
"""Supported formats, by Pillow's names. Others contain several pictures (ICO) or run a program (EPS)."""

DEPTHS = (8, 10, 12, 14, 16, 24, 32)
"""Assumed bits per sample; files with more than 8 do not say how many of them are used."""

_PHOTOMETRIC = TiffImagePlugin.PHOTOMETRIC_INTERPRETATION
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
"""Pillow's modes of more than 8 bits; Pillow itself reduces color pictures of 16 bits to 8."""

_READABLE = "PNG, JPEG, TIFF, BMP, GIF, WebP, AVIF, JPEG 2000 or PNM"

_SLACK = 0.05
"""How far floats may exceed their scale, as after resampling; they are clipped to it."""

_FLOAT_GAP = 16.0
"""A maximum between 1 and this fits neither a scale of 0 to 1 nor of 0 to 255."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> the transpose that turns the picture upright."""


def open_image(path: Path) -> Image.Image:
    """Read an image file as RGB with 8 bits, upright.

    Values of more than 8 bits are scaled by their depth: the smallest of `DEPTHS` that covers the file's maximum, so
    12 bits stored in 16 are scaled correctly. Floats up to 1 have a scale of 0 to 1.

    Raises:
        UserError: the file is missing, is not an image, is truncated, has several frames or values that cannot be
            brightness, or is so large that it may be an attack.
    """
    name = f"image {path}"
    with _opened(path, name) as image:
        return _upright_rgb(image, name)


def hash_image(path: Path) -> str:
    """Decode an image file, to find damage, and hash its bytes; the file is read once for both.

    Returns:
        The SHA-256 of its bytes, in hexadecimal.

    Raises:
        UserError: as for `open_image`.
    """
    name = f"image {path}"
    with _named(name):
        content = regular_file(path, "image").read_bytes()
        image_format(BytesIO(content), name)
    return sha256(content).hexdigest()


def check_image_header(path: Path) -> None:
    """Check that a file is a supported image, without decoding its pixels.

    Raises:
        UserError: the file is missing, is not an image, or has several frames.
    """
    name = f"image {path}"
    with _opened(path, name) as image:
        _check_single(image, name)


def image_format(stream: IO[bytes], name: str) -> str:
    """Decode an image in memory and return Pillow's name of its format, such as ``"JPEG"``.

    Args:
        stream: The bytes of the image.
        name: Its name in error messages.

    Raises:
        UserError: as for `open_image`.
    """
    with _named(name), Image.open(stream, formats=FORMATS) as image:
        _upright_rgb(image, name)
        return image.format or ""


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    _check_single(image, name)
    image.load()
    pixels = _eight_bits(image, name) if image.mode in _DEEP else image
    upright = pixels.transpose(turn) if (turn := _turn(image)) is not None else pixels
    rgb = upright.convert("RGB")
    rgb.info = {}  # comments, profiles and text, which Pillow would write into every copy
    return rgb


@contextmanager
def _opened(path: Path, name: str) -> Iterator[Image.Image]:
    """Open an image as a stream: given a path, Pillow memory-maps plain TIFFs and shears those that EXIF rotates."""
    with (
        _named(name),
        regular_file(path, "image").open("rb") as stream,
        Image.open(stream, formats=FORMATS) as image,
    ):
        yield image


def _check_single(image: Image.Image, name: str) -> None:
    """Refuse pages and animations; the additional pictures in a camera's JPEG (MPO) are previews of the first."""
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames > 1:
        raise BadDataError(
            f"{name} has {frames} frames (pages, or an animation): expected one picture; save each as a file of its own"
        )


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return the rotation that EXIF or XMP asks for; None if they are damaged, as in any viewer."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # of any kind, see `_named`
        return None
    return _TURNS.get(orientation)


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """Scale gray values of more than 8 bits to 0 to 255, mode ``L``."""
    values = np.asarray(image)
    white = _white(values, name)
    scaled = np.clip(values * (255 / white), 0, 255)
    if _white_is_zero(image):
        scaled = 255 - scaled
    return Image.fromarray(np.round(scaled).astype(np.uint8))


def _white(values: NDArray[np.generic], name: str) -> float:
    """Return the value of white (black is 0)."""
    low, high = float(values.min()), float(values.max())
    floating = values.dtype.kind == "f"
    slack = 1 + _SLACK if floating else 1.0
    scales = ([1] if floating else []) + [2**bits - 1 for bits in DEPTHS]
    white = next((scale for scale in scales if high <= scale * slack), None)
    unclear = floating and white == 255 and high < _FLOAT_GAP
    if white is None or unclear or low < -(slack - 1) * white:
        raise BadDataError(
            f"{name} has values from {low:g} to {high:g}: expected brightness from 0 to 255 or 65535, or floats from 0 "
            "to 1; apply its display window, and save it with 8 or 16 bits"
        )
    return float(white)


def _white_is_zero(image: Image.Image) -> bool:
    """Return whether 0 means white in a TIFF; Pillow inverts only those of 8 bits."""
    return isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_PHOTOMETRIC, 1) == 0


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Turn Pillow's errors into one line about the image of this name; damaged files raise errors of any kind."""
    try:
        yield
    except UserError:
        raise
    except UnidentifiedImageError:
        raise BadDataError(f"{name} is not in a supported format: expected {_READABLE}") from None
    except Image.DecompressionBombError as error:
        raise BadDataError(f"{name} is too large to open safely: {error}") from None
    except MemoryError:
        raise BadDataError(f"{name} is too large for the memory of this machine") from None
    except Exception as error:
        if fault := find_fault(error):
            raise BadDataError(f"{name} cannot be read: {Fault(fault.number).line()}") from None
        raise BadDataError(f"{name} cannot be decoded: {error}") from None
