"""Thumbnails of the questions' images: inlined as data URIs, or as files of a folder."""

import base64
import hashlib
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from mgll_encoder.common.images import open_image
from mgll_encoder.common.progress import track

THREADS = 4
QUALITY = 80


def thumbnail(path: Path, side: int) -> bytes:
    """Encode an image as JPEG, with its longer side at most ``side`` pixels.

    Raises:
        UserError: the image cannot be read.
    """
    image = open_image(path)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=QUALITY, optimize=True)
    return stream.getvalue()


def inlined(paths: Sequence[Path], side: int) -> list[str]:
    """Return data URIs of thumbnails, in the given order."""
    return [f"data:image/jpeg;base64,{base64.b64encode(image).decode()}" for image in _all(paths, side)]


def as_files(paths: Sequence[Path], side: int, folder: Path) -> list[str]:
    """Write thumbnails to an existing folder, named by their content, and return their names in the given order."""
    names = []
    for image in _all(paths, side):
        name = f"{hashlib.sha256(image).hexdigest()[:20]}.jpg"
        (folder / name).write_bytes(image)
        names.append(name)
    return names


def _all(paths: Sequence[Path], side: int) -> list[bytes]:
    with ThreadPoolExecutor(THREADS) as pool:
        made = pool.map(lambda path: thumbnail(path, side), paths)
        return list(track(made, "Making thumbnails", total=len(paths)))
