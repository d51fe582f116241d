"""Checks of the images of questions before any work is done."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from eval_mcq.items.schema import Bench, MCQItem
from mgll_encoder.common.errors import BadDataError, NotFoundError, UserError
from mgll_encoder.common.files import sha256
from mgll_encoder.common.images import hash_image, open_image
from mgll_encoder.common.picture_bytes import clean_copy
from mgll_encoder.common.progress import track
from mgll_encoder.data.contact_sheet import write_contact_sheet

THREADS = 4


def check_images(first_use: Mapping[Path, str]) -> dict[Path, str]:
    """Decode every image and hash its bytes; the file is read once for both.

    Args:
        first_use: Image path -> id of the first question that uses it, for the error.

    Returns:
        Image path -> SHA-256 of its bytes.

    Raises:
        UserError: an image is missing or cannot be decoded; names the question and the file.
    """
    return _each(first_use, hash_image, "Checking images")


def unreadable_images(paths: Iterable[Path]) -> dict[Path, UserError]:
    """Decode every image once, and return the missing or unreadable ones with their errors."""

    def tried(path: Path) -> tuple[Path, UserError | None]:
        try:
            open_image(path)
        except UserError as error:
            return path, error
        return path, None

    if not (wanted := list(paths)):
        return {}
    with ThreadPoolExecutor(THREADS) as pool:
        outcomes = track(pool.map(tried, wanted), "Checking images", total=len(wanted))
        return {path: error for path, error in outcomes if error}


def hash_images(first_use: Mapping[Path, str]) -> dict[Path, str]:
    """Hash the bytes of images that were checked before: `check_images` without decoding."""

    def hashed(path: Path) -> str:
        if not path.is_file():
            raise NotFoundError(f"image {path} does not exist: check the image folder")
        return sha256(path)

    return _each(first_use, hashed, "Hashing images")


def with_pictures(bench: Bench) -> Iterator[tuple[MCQItem, list[tuple[bytes, str]]]]:
    """Yield questions with their pictures for export: bytes without metadata, and the format's suffix.

    Raises:
        UserError: an image is missing or cannot be decoded; names the question.
    """
    clean = lru_cache(maxsize=16)(clean_copy)  # questions about one image are consecutive
    for item in track(bench.items, "Copying images"):
        try:
            pictures = [clean(path) for path in bench.image_paths(item)]
        except UserError as error:
            raise BadDataError(f"question '{item.id}': {error}") from None
        yield item, pictures


def content_name(data: bytes, suffix: str) -> str:
    """Return the file name of an exported picture: a hash of its content, not its original name."""
    return f"{hashlib.sha256(data).hexdigest()[:32]}.{suffix}"


def sheet_of(bench: Path, items: Sequence[MCQItem], out: Path | None, force: bool) -> int:
    """Write a contact sheet of a benchmark's images, if requested; the caption is the first question of each.

    Returns:
        The number of pictures on the sheet.

    Raises:
        UserError: an image cannot be read.
    """
    if out is None:
        return 0
    folder, shown = bench.resolve().parent, dict[Path, str]()
    for number, item in enumerate(items, start=1):
        for image in item.images:
            shown.setdefault(folder / image, f"question {number}: {item.category}")
    return write_contact_sheet([(caption, path) for path, caption in shown.items()], out, force)


def _each(first_use: Mapping[Path, str], work: Callable[[Path], str], what: str) -> dict[Path, str]:
    if not first_use:
        return {}

    def named(entry: tuple[Path, str]) -> str:
        path, item_id = entry
        try:
            return work(path)
        except UserError as error:
            raise BadDataError(f"question '{item_id}': {error}") from None

    with ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(named, first_use.items())
        return dict(zip(first_use, track(digests, what, total=len(first_use)), strict=True))
