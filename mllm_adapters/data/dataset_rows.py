"""Conversation rows of data sets of the library ``datasets``: Parquet files and folders, images embedded or by path."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mgll_encoder.common.errors import BadDataError
from mgll_encoder.common.files import appearing, sha256
from mgll_encoder.common.hf_datasets import open_dataset
from mllm_adapters.data.row_shapes import IMAGE_LISTS

TRAIN = "train"
"""The split that is trained on if there are several."""


def content_digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of the names and contents of all files in a folder."""
    if not path.is_dir():
        return sha256(path)
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{sha256(file)}\0".encode())
    return digest.hexdigest()


def dataset_records(path: Path, pictures: Path) -> Iterator[tuple[int, Any]]:
    """Yield row numbers, from 1, and rows in the form of parsed JSON.

    Args:
        path: What `mgll_encoder.common.hf_datasets.open_dataset` reads.
        pictures: Folder for embedded images, one file per distinct image; created if needed.

    Raises:
        UserError: the data set cannot be read.
    """
    for number, row in enumerate(open_dataset(path, None, TRAIN), 1):
        yield number, _unpacked(row, pictures)


def _unpacked(row: Mapping[str, Any], pictures: Path) -> dict[str, Any]:
    """Replace the embedded images of a row by the paths of their files."""
    cells = {name: value for name, value in row.items() if value is not None}
    for name in IMAGE_LISTS:
        if name in cells:
            value = cells[name]
            many = value if isinstance(value, list) else [value]
            cells[name] = [_file_of(image, pictures) for image in many]
    return cells


def _file_of(image: Any, pictures: Path) -> Any:
    data = image.get("bytes") if isinstance(image, Mapping) else image
    if not isinstance(data, bytes):
        return image.get("path") if isinstance(image, Mapping) else image
    file = pictures / hashlib.sha256(data).hexdigest()
    if not file.is_file():
        with appearing(file) as partial:
            partial.write_bytes(data)
    return str(file)


def refuse_archive(path: Path) -> None:
    """Refuse shards of WebDataset and other archives.

    Raises:
        UserError: the file is an archive.
    """
    if path.name.endswith((".tar", ".tar.gz", ".tgz", ".zip")):
        raise BadDataError(
            f"data file {path} is an archive (WebDataset shards are not read): unpack it, and pass its rows as JSON, "
            "or convert it to Parquet with the library datasets"
        )
