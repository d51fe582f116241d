"""The manifest: which texts, at which granularities, belong to which image. One JSON object per line.

The first line is the header, every other line a row::

    {"format": "mgll-manifest", "version": 1, "granularities": ["status", "disease"], "images": "."}
    {"image": "images/1.jpg", "texts": {"status": ["normal fundus"], "disease": ["normal"]}, "patient": "7",
     "split": "train", "source": "ODIR-5K"}

Rows are read one at a time: a manifest of any length needs no memory to speak of.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from mgll_encoder.common.errors import UserError, unknown_name
from mgll_encoder.data.skipped import Skipped

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class ManifestHeader(BaseModel):
    """The first line.

    Attributes:
        format: Always ``mgll-manifest``.
        version: Version of the format.
        granularities: Names of the levels of text, coarse to fine.
        images: Folder that image paths are relative to, itself relative to the manifest's folder.
        built: How it was made: inputs with hashes, split, counts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["mgll-manifest"] = "mgll-manifest"
    version: Literal[1] = 1
    granularities: list[Text] = Field(min_length=1)
    images: str = "."
    built: dict[str, str | int | float] = {}


class ManifestRow(BaseModel):
    """One image.

    Attributes:
        image: Path below the image folder.
        texts: Granularity -> texts that are true of the image. A granularity may be missing (unknown there).
        patient: Patient or source id; images of a patient are never on both sides of a split.
        split: Side of the split.
        source: Data set that the image comes from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: Text
    texts: dict[str, list[Text]] = Field(min_length=1)
    patient: str = ""
    split: Literal["train", "val", "test"] = "train"
    source: str = ""


def read_header(path: Path) -> ManifestHeader:
    """The header of a manifest.

    Raises:
        UserError: no such file, or its first line is no header.
    """
    return _header(path, _first_line(path))


def read_rows(path: Path, skipped: Skipped | None = None) -> Iterator[tuple[int, int, ManifestRow]]:
    """Read and check a manifest, row by row.

    Args:
        path: The manifest.
        skipped: Takes the lines that are wrong; None: stop at the first.

    Yields:
        Line number (the header is line 1), byte offset of the line, and the row.

    Raises:
        UserError: ``skipped`` is strict or None, and a line is not a row, names an unknown granularity, or holds an
            empty text.
    """
    header, skipped = read_header(path), skipped or Skipped(strict=True)
    with path.open("rb") as stream:
        offset = len(stream.readline())
        for number, line in enumerate(stream, start=2):
            if line.strip():
                try:
                    row = _row(path, number, line, header)
                except UserError as error:
                    skipped.add("line is no row", str(error))
                else:
                    yield number, offset, row
            offset += len(line)


def row_at(path: Path, offset: int) -> ManifestRow:
    """The row at a byte offset that :func:`read_rows` gave (and thereby checked)."""
    with path.open("rb") as stream:
        stream.seek(offset)
        return ManifestRow.model_validate_json(stream.readline())


def image_folder(path: Path, header: ManifestHeader) -> Path:
    """The folder that a manifest's image paths are relative to."""
    return path.parent / header.images


def manifest_text(path: Path, images: Path, header: ManifestHeader, rows: Iterable[ManifestRow]) -> str:
    """A manifest as text, to be written to ``path``.

    Args:
        path: Where it will lie; the image folder is recorded relative to it.
        images: The image folder.
        header: The header; ``images`` in it is replaced.
        rows: The rows.
    """
    relative = os.path.relpath(images.resolve(), path.resolve().parent)
    head = header.model_copy(update={"images": Path(relative).as_posix()})
    lines = [head.model_dump_json(), *(row.model_dump_json() for row in rows)]
    return "\n".join(lines) + "\n"


def _first_line(path: Path) -> bytes:
    if not path.is_file():
        raise UserError(
            f"manifest {path} does not exist or is not a file: make one with 'mgll-encoder data fundus'"
        )
    with path.open("rb") as stream:
        return stream.readline()


def _header(path: Path, line: bytes) -> ManifestHeader:
    try:
        return ManifestHeader.model_validate_json(line)
    except ValidationError as error:
        raise UserError(
            f"manifest {path} line 1 is no manifest header ({_explain(error)}): expected "
            '{"format": "mgll-manifest", "version": 1, "granularities": [...]}; '
            "make one with 'mgll-encoder data fundus'"
        ) from None


def _row(path: Path, number: int, line: bytes, header: ManifestHeader) -> ManifestRow:
    try:
        row = ManifestRow.model_validate_json(line)
    except ValidationError as error:
        raise UserError(f"manifest {path} line {number}: {_explain(error)}") from None
    for granularity, texts in row.texts.items():
        if granularity not in header.granularities:
            unknown = unknown_name("granularity", granularity, header.granularities)
            raise UserError(f"manifest {path} line {number}: {unknown}")
        if not texts:
            raise UserError(
                f"manifest {path} line {number}: granularity '{granularity}' has no text: "
                "leave it out, or give at least one"
            )
    return row


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "line"
    found = json.dumps(first["input"], default=str)
    return f"'{where}': {first['msg']} (found {found if len(found) < 60 else found[:57] + '...'})"
