"""Pictures embedded in other tools' files, saved once each and named by a hash of their content."""

import base64
import binascii
import hashlib
import io
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from eval_mcq.formats.faults import BadQuestionError
from mgll_encoder.common.errors import UserError
from mgll_encoder.common.files import new_folder
from mgll_encoder.common.images import image_format
from mgll_encoder.common.skipped import UNREADABLE

SUFFIXES = {
    "JPEG": "jpg",
    "PNG": "png",
    "TIFF": "tif",
    "WEBP": "webp",
    "BMP": "bmp",
    "GIF": "gif",
    "MPO": "jpg",
}
"""Pillow's format name -> file suffix; others get the format name in lowercase."""


class PictureFolder:
    """A folder of embedded pictures that appears complete when the block ends, and only if there are any.

    Args:
        path: The folder.
        force: Replace an existing one.
    """

    def __init__(self, path: Path, force: bool = False) -> None:
        self.path = path
        self.force = force
        self._stack = ExitStack()
        self._partial: Path | None = None
        self._names: dict[str, str] = {}

    def __enter__(self) -> "PictureFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._stack.__exit__(kind, error, trace)

    @property
    def kept(self) -> set[str]:
        """Paths of the saved pictures, relative to the folder's parent."""
        return set(self._names.values())

    def add(self, data: bytes, where: str) -> str:
        """Save a picture, and return its path relative to the folder's parent.

        Raises:
            BadQuestionError: it cannot be decoded or is so large that it may be an attack (names ``where``).
            UserError: the folder exists and ``force`` is not set.
        """
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self._names:
            try:
                format_ = image_format(io.BytesIO(data), f"{where}: embedded image")
            except UserError as error:
                raise BadQuestionError(UNREADABLE, str(error)) from None
            name = f"{digest[:32]}.{SUFFIXES.get(format_, format_.lower())}"
            if self._partial is None:
                self._partial = self._stack.enter_context(new_folder(self.path, self.force))
            (self._partial / name).write_bytes(data)
            self._names[digest] = f"{self.path.name}/{name}"
        return self._names[digest]

    def keep_only(self, used: set[str]) -> None:
        """Remove the pictures of skipped questions."""
        for digest, path in list(self._names.items()):
            if path not in used and self._partial is not None:
                (self._partial / Path(path).name).unlink()
                del self._names[digest]


def from_base64(text: str, where: str) -> bytes:
    """Decode a base64 text, with or without line breaks and the prefix of a data URI.

    Raises:
        BadQuestionError: it is not base64.
    """
    payload = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadQuestionError(UNREADABLE, f"{where}: the image is not base64: {error}") from None
