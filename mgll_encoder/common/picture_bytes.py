"""Image files without the metadata of cameras, scanners and people: EXIF, XMP, comments, PNG text, profiles.

Only the data that determine the pixels are kept, byte for byte, so nothing is recompressed. The same bytes identify a
picture: a photograph and its stripped copy count as the same picture.
"""

import hashlib
import io
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from mgll_encoder.common.errors import BadDataError
from mgll_encoder.common.images import open_image
from mgll_encoder.common.progress import track

THREADS = 4

_UPRIGHT = 1
_ORIENTATION = 0x0112  # EXIF 2.3, table 4

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"sBIT", b"IDAT", b"IEND")

# ITU-T T.81, annex B
_EOI, _SOS, _COMMENT = 0xD9, 0xDA, 0xFE
_APPLICATION = range(0xE0, 0xF0)
_JFIF, _ADOBE = (0xE0, b"JFIF\0"), (0xEE, b"Adobe")  # color encoding
_JFIF_LENGTH, _ADOBE_LENGTH = 14, 12  # without a thumbnail
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)


def without_metadata(data: bytes) -> bytes | None:
    """Reduce a JPEG or PNG file to the data that determine its pixels; None for other formats and damaged files."""
    try:
        if data.startswith(_PNG):
            return _png(data)
        return _jpeg(data) if data.startswith(b"\xff\xd8") else None
    except IndexError:
        return None


def clean_copy(path: Path) -> tuple[bytes, str]:
    """Return the bytes of a picture for publication, and the suffix of their format.

    An upright JPEG or PNG only loses its metadata. A picture that must be rotated, or has any other format, becomes a
    PNG of the pixels returned by `open_image`.

    Raises:
        UserError: the file is missing or not a picture.
    """
    picture = open_image(path)
    data = path.read_bytes()
    kept = without_metadata(data)
    if kept is not None and _orientation(data) == _UPRIGHT:
        return kept, "png" if kept.startswith(_PNG) else "jpg"
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue(), "png"


def picture_digest(path: Path) -> str:
    """Return the SHA-256, in hexadecimal, of what determines a picture's pixels: its data and its orientation.

    Raises:
        OSError: the file cannot be read.
    """
    data = path.read_bytes()
    digest = hashlib.sha256(without_metadata(data) or data)
    if (turned := _orientation(data)) != _UPRIGHT:
        digest.update(b"orientation %d" % turned)
    return digest.hexdigest()


def picture_digests(paths: Iterable[Path], description: str) -> dict[Path, str]:
    """Compute `picture_digest` of each file, under a progress bar.

    Raises:
        UserError: a file cannot be read.
    """
    wanted = list(dict.fromkeys(paths))

    def digest(path: Path) -> str:
        try:
            return picture_digest(path)
        except OSError as error:
            raise BadDataError(
                f"image {path} cannot be read ({error.strerror}): check the image folder"
            ) from None

    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(wanted, track(pool.map(digest, wanted), description, len(wanted)), strict=True))


def _orientation(data: bytes) -> int:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return int(image.getexif().get(_ORIENTATION) or _UPRIGHT)
    except Exception:  # damaged files raise errors of any kind; `open_image` reports them
        return _UPRIGHT


def _png(data: bytes) -> bytes | None:
    kept, at = [_PNG], len(_PNG)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        if kind in _PNG_KEPT:
            kept.append(data[at:end])
        if kind == b"IEND":
            return b"".join(kept)  # the rest is not part of the picture
        at = end
    return None


def _jpeg(data: bytes) -> bytes | None:
    kept, at = [data[:2]], 2
    while data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == _EOI:
            return b"".join([*kept, b"\xff\xd9"])  # the rest is not part of the picture
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        kept.append(_segment(marker, data[at:end]))
        if marker == _SOS:
            following = _END_OF_SCAN.search(data, end)
            if following is None:
                return None
            kept.append(data[end : following.start()])
            end = following.start()
        at = end
    return None


def _segment(marker: int, segment: bytes) -> bytes:
    """Return what is kept of a segment: nothing if it does not affect the pixels."""
    for (wanted, name), length in ((_JFIF, _JFIF_LENGTH), (_ADOBE, _ADOBE_LENGTH)):
        if marker == wanted and segment[4:].startswith(name):
            content = segment[4 : 4 + length]
            if wanted == _JFIF[0]:
                content = content[:-2] + b"\0\0"  # no thumbnail
            return b"\xff" + bytes([marker]) + (length + 2).to_bytes(2, "big") + content
    return b"" if marker in _APPLICATION or marker == _COMMENT else segment
