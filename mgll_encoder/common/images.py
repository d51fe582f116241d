"""Opening images, with errors that name the file."""

from pathlib import Path

from PIL import Image, UnidentifiedImageError

from mgll_encoder.common.errors import UserError


def open_image(path: Path) -> Image.Image:
    """Read an image file as RGB.

    Raises:
        UserError: the file is missing, is no image, is truncated, or is so large that it may be an attack.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"image {path} does not exist: check the image folder") from None
    except UnidentifiedImageError:
        raise UserError(f"image {path} is not in a format that Pillow reads") from None
    except Image.DecompressionBombError as error:
        raise UserError(f"image {path} is too large to open safely: {error}") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"image {path} cannot be decoded: {error}") from None
