"""A contact sheet to check the data before a long run: images as they are read, and as the tower's input."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mgll_encoder.common.errors import InvalidArgumentError
from mgll_encoder.common.files import check_free, new_file
from mgll_encoder.common.images import open_image
from mgll_encoder.tower.preprocess import image_transform
from mgll_encoder.tower.spec import PixelRule

SHOWN = 12
"""Number of pictures on a sheet, evenly spaced over all."""

RULE = PixelRule(image_size=224)
"""The rule of MGLL's towers: the whole picture is squashed to a square."""

_TILE, _GAP, _TEXT, _PAIRS = 224, 8, 20, 3
_PAPER, _INK, _FAINT = "white", "black", "dimgray"
_MAT, _FRAME = "lightsteelblue", "slategray"
"""Border of a picture that is not square; its color cannot be confused with gray values."""


def check_sheet(path: Path | None, force: bool) -> None:
    """Check the path of a requested sheet before any work is done.

    Raises:
        UserError: it is not the name of a PNG file, or exists.
    """
    if path is None:
        return
    if path.suffix.lower() != ".png":
        raise InvalidArgumentError(f"`contact_sheet` is {path}: expected a name that ends in .png")
    check_free(path, force)


def write_contact_sheet(pictures: Sequence[tuple[str, Path]], out: Path, force: bool = False) -> int:
    """Write a sheet of pairs of pictures: on the left as read, on the right as the input of a tower with `RULE`.

    Args:
        pictures: Caption and file of each; captions are shown, so they must not contain file names.
        out: The PNG.
        force: Replace ``out``.

    Returns:
        The number of pictures on the sheet.

    Raises:
        UserError: there are none, one cannot be read, or ``out`` exists.
    """
    if not pictures:
        raise InvalidArgumentError("no picture for the contact sheet")
    chosen = np.unique(np.linspace(0, len(pictures) - 1, min(SHOWN, len(pictures))).round().astype(int))
    pairs = [(pictures[place][0], open_image(pictures[place][1])) for place in chosen]
    page = _page(pairs, len(pictures))
    with new_file(out, force) as partial:
        page.save(partial, "PNG")
    return len(pairs)


def seen(picture: Image.Image, rule: PixelRule) -> Image.Image:
    """Convert the pixels that a tower gets back to a visible picture."""
    pixels = image_transform(rule)(picture).permute(1, 2, 0).numpy()
    values = (pixels * np.array(rule.std) + np.array(rule.mean)).clip(0, 1)
    return Image.fromarray((values * 255).round().astype(np.uint8))


def _page(pairs: Sequence[tuple[str, Image.Image]], total: int) -> Image.Image:
    across = min(_PAIRS, len(pairs))
    wide, high = 2 * _TILE + 3 * _GAP, _TILE + _TEXT + 2 * _GAP
    top = 2 * _TEXT + 2 * _GAP
    page = Image.new("RGB", (across * wide + _GAP, -(-len(pairs) // across) * high + top), _PAPER)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=12)
    pen.text((2 * _GAP, _GAP), f"{len(pairs)} of {total} pictures", _INK, ImageFont.load_default(size=14))
    legend = f"left: as read; right: input of a tower of {RULE.image_size} px (squashed to a square)"
    pen.text((2 * _GAP, _GAP + _TEXT), legend, _FAINT, font)
    for place, (caption, picture) in enumerate(pairs):
        left, upper = place % across * wide + 2 * _GAP, place // across * high + top
        _paste(page, picture, left, upper)
        _paste(page, seen(picture, RULE), left + _TILE + _GAP, upper)
        pen.text((left, upper + _TILE + 3), f"{caption}, {picture.width} x {picture.height}", _INK, font)
    return page


def _paste(page: Image.Image, picture: Image.Image, left: int, upper: int) -> None:
    """Paste a picture, scaled to fit, into the middle of a framed tile."""
    tile = Image.new("RGB", (_TILE, _TILE), _MAT)
    factor = _TILE / max(picture.size)
    size = [max(1, round(side * factor)) for side in picture.size]
    small = picture.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    tile.paste(small, ((_TILE - small.width) // 2, (_TILE - small.height) // 2))
    page.paste(tile, (left, upper))
    ImageDraw.Draw(page).rectangle((left - 1, upper - 1, left + _TILE, upper + _TILE), outline=_FRAME)
