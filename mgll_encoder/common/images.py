"""Opening images, with errors that name the file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from PIL import Image, UnidentifiedImageError

from mgll_encoder.common.errors import UserError


def open_image(path: Path) -> Image.Image:
    """Read an image file as RGB.

    Raises:
        UserError: the file is missing, is no image, is truncated, or is so large that it may be an attack.
    """
    with _named(f"image {path}"), Image.open(path) as image:
        return image.convert("RGB")


def image_format(stream: IO[bytes], name: str) -> str:
    """Decode an image in memory and give the name of its format as Pillow calls it, such as ``"JPEG"``.

    Args:
        stream: The bytes of the image.
        name: What to call it in an error message.

    Raises:
        UserError: it is no image, is truncated, or is so large that it may be an attack.
    """
    with _named(name), Image.open(stream) as image:
        image.load()
        return image.format or ""


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Turn Pillow's errors into one line about the image of this name."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{name} does not exist: check the image folder") from None
    except UnidentifiedImageError:
        raise UserError(f"{name} is not in a format that Pillow reads") from None
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} is too large to open safely: {error}") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{name} cannot be decoded: {error}") from None
