"""The manifest: the texts of each image, by granularity. JSON lines, or Parquet, chosen by its name.

The first line is the header, every other line a row::

    {"format": "mgll-manifest", "version": 1, "granularities": ["status", "disease"], "images": "."}
    {"image": "images/1.jpg", "texts": {"status": ["normal fundus"], "disease": ["normal"]}, "patient": "7",
     "split": "train", "source": "ODIR-5K"}

In ``.parquet`` files the same fields are columns and the header is metadata, see :mod:`.manifest_formats`. Rows are
read one at a time, so memory does not grow with the length of a manifest.
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from mgll_encoder.common.errors import BadDataError, UserError, unknown_name
from mgll_encoder.common.files import new_file
from mgll_encoder.common.skipped import Skipped
from mgll_encoder.data.manifest_formats import format_named, format_of
from mgll_encoder.weights.locate import check_manifest

_logger = logging.getLogger(__name__)

SPLIT_FIELDS = (
    "split", "split_by", "split_test", "split_val", "split_seed", "test_share"
)  # fmt: skip
"""Entries of ``built`` that describe the split, in manifests and benchmarks."""

_SHOWN = ("format", "version", "granularities", "images", "texts", "split", "source")
"""Fields whose values messages show; the values of others may identify a patient."""

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class ManifestHeader(BaseModel):
    """The first line.

    Attributes:
        format: Always ``mgll-manifest``.
        version: Version of the format.
        granularities: Names of the levels of text, coarse to fine.
        images: Folder that image paths are relative to, itself relative to the manifest's folder.
        built: How it was built: inputs with hashes, split, and how many rows or files were read and skipped, by reason.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["mgll-manifest"] = "mgll-manifest"
    version: Literal[1] = 1
    granularities: list[Text] = Field(min_length=1)
    images: str = "."
    built: dict[str, str | int | float | dict[str, int]] = {}


class ManifestRow(BaseModel):
    """One image.

    Attributes:
        image: Path below the image folder.
        texts: Granularity -> texts that are true of the image. A missing granularity is unknown.
        patient: Patient or source id; images of a patient are never in different splits.
        split: The split.
        source: Data set that the image comes from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: Text
    texts: dict[str, list[Text]] = Field(min_length=1)
    patient: str = ""
    split: Literal["train", "val", "test"] = "train"
    source: str = ""


def read_header(path: Path) -> ManifestHeader:
    """Read the header of a manifest.

    Raises:
        UserError: there is no such file, or it has no header.
    """
    check_manifest(path)
    form = format_of(path)
    try:
        return ManifestHeader.model_validate_json(form.header(path))
    except ValidationError as error:
        raise BadDataError(
            f"manifest {path} {form.header_place} is not a manifest header ({_explain(error)}): expected "
            '{"format": "mgll-manifest", "version": 1, "granularities": [...]}; '
            "create one with `build_fundus()`"
        ) from None


def read_rows(path: Path, skipped: Skipped | None = None) -> Iterator[tuple[int, int, ManifestRow]]:
    """Read and check a manifest, row by row.

    Args:
        path: The manifest.
        skipped: Collects the invalid rows; None: stop at the first.

    Yields:
        Number of the row (in JSON lines the line, the header is line 1; in Parquet the first row is 1), its place
        for :func:`row_at`, and the row.

    Raises:
        UserError: ``skipped`` is strict or None, and a row is invalid, names an unknown granularity, or contains an
            empty text.
    """
    header, form, skipped = read_header(path), format_of(path), skipped or Skipped(strict=True)
    for number, place, content in form.rows(path):
        skipped.read += 1
        try:
            row = _row(named(path, number), content, header)
        except UserError as error:
            skipped.add("line is not a row", str(error))
        else:
            yield number, place, row


def named(path: Path, number: int) -> str:
    """Name a row of a manifest in error messages, by its number from :func:`read_rows`."""
    return f"manifest {path} {format_of(path).unit} {number}"


def row_at(path: Path, place: int) -> ManifestRow:
    """Read the row at a place from :func:`read_rows`, which has checked it."""
    return ManifestRow.model_validate_json(format_of(path).row(path, place))


def split_of(built: Mapping[str, Any]) -> dict[str, str | int | float]:
    """Return the entries of ``built`` that describe the split of a manifest or benchmark."""
    return {name: value for name, value in built.items() if name in SPLIT_FIELDS}


def warn_if_test(path: Path, built: Mapping[str, Any]) -> None:
    """Warn that a file is of a test split, by its ``built``: what it trains cannot be judged by it."""
    if built.get("split") == "test":
        _logger.warning(
            f"{path} is of the test split: a model that is trained on it cannot be judged by it (build one with "
            "`build_benchmark(split=train)`)"
        )


def image_folder(path: Path, header: ManifestHeader) -> Path:
    """Return the folder that a manifest's image paths are relative to."""
    return path.parent / header.images


def write_manifest(
    path: Path, images: Path, header: ManifestHeader, rows: Iterable[ManifestRow], force: bool = False
) -> None:
    """Write a manifest, completely or not at all, in the format of its name (``.parquet``, or JSON lines).

    Args:
        path: The file to write; the image folder is recorded relative to it.
        images: The image folder.
        header: The header; its ``images`` is replaced.
        rows: The rows; only one at a time is in memory.
        force: Replace ``path`` if it exists.

    Raises:
        UserError: ``path`` exists and ``force`` is not set.
    """
    head = _with_images(path, images, header).model_dump_json()
    with new_file(path, force) as partial:
        format_named(path).write(partial, head, (row.model_dump_json() for row in rows))


def _with_images(path: Path, images: Path, header: ManifestHeader) -> ManifestHeader:
    relative = os.path.relpath(images.resolve(), path.resolve().parent)
    return header.model_copy(update={"images": Path(relative).as_posix()})


def _row(where: str, content: bytes, header: ManifestHeader) -> ManifestRow:
    try:
        row = ManifestRow.model_validate_json(content)
    except ValidationError as error:
        raise BadDataError(f"{where}: {_explain(error)}") from None
    for granularity, texts in row.texts.items():
        if granularity not in header.granularities:
            raise BadDataError(f"{where}: {unknown_name('granularity', granularity, header.granularities)}")
        if not texts:
            raise BadDataError(
                f"{where}: granularity '{granularity}' has no text: leave it out, or give at least one"
            )
    return row


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "line"
    if not first["loc"] or first["loc"][0] not in _SHOWN:
        return f"'{where}': {first['msg']}"
    found = json.dumps(first["input"], default=str)
    return f"'{where}': {first['msg']} (found {found if len(found) < 60 else found[:57] + '...'})"
