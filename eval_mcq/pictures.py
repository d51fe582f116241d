"""Checking the images of questions before any work is done."""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mgll_encoder.common.cli import track
from mgll_encoder.common.errors import UserError
from mgll_encoder.common.images import open_image

THREADS = 4


def check_images(first_use: Mapping[Path, str]) -> dict[Path, str]:
    """Decode every image once and hash its bytes.

    Args:
        first_use: Image path to the id of the first question that shows it, for the error.

    Returns:
        Image path to the SHA-256 of its bytes.

    Raises:
        UserError: an image is missing or cannot be decoded; names the question and the file.
    """

    def check(entry: tuple[Path, str]) -> str:
        path, item_id = entry
        try:
            open_image(path)
            return hashlib.sha256(path.read_bytes()).hexdigest()
        except UserError as error:
            raise UserError(f"question '{item_id}': {error}") from None

    with ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(check, first_use.items())
        return dict(zip(first_use, track(digests, "Checking images", total=len(first_use)), strict=True))
