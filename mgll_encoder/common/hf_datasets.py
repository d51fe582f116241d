"""Data sets read with ``datasets``: folders, Parquet files and hub ids, with images as bytes."""

from pathlib import Path
from typing import Any

from mgll_encoder.common.errors import BadDataError, NotFoundError

SAVED = ("dataset_info.json", "dataset_dict.json")
"""A folder written by ``save_to_disk`` contains one of these."""


def is_dataset(path: Path) -> bool:
    """Return whether a path is a Parquet file, a folder written by ``save_to_disk``, or one with Parquet files."""
    if path.is_dir():
        return any((path / name).is_file() for name in SAVED) or any(path.rglob("*.parquet"))
    return path.suffix == ".parquet"


def open_dataset(path: Path, split: str | None, default: str | None = None) -> Any:
    """Open one split of a data set, without decoding its images.

    Args:
        path: A folder written by ``save_to_disk``, a folder of Parquet or image files, a Parquet file, or the hub id of
            a data set.
        split: The split; optional if there is only one.
        default: The split to use if there are several and none is given.

    Raises:
        UserError: there is no such data set or split.
    """
    import datasets

    try:
        if any((path / name).is_file() for name in SAVED):
            data: Any = datasets.load_from_disk(str(path))
        elif path.suffix == ".parquet":
            if not path.is_file():
                raise NotFoundError(f"data set {path} does not exist: check the path")
            data = datasets.load_dataset(
                "parquet", data_files=str(path), streaming=True, trust_remote_code=False
            )
        else:
            data = datasets.load_dataset(str(path), streaming=True, trust_remote_code=False)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        message = str(error).partition("\n")[0]
        raise BadDataError(
            f"data set {path} cannot be read: {message} (expected a folder, a .parquet file, or an id on the hub)"
        ) from None
    return _with_raw_images(_chosen(data, path, split, default))


def _chosen(data: Any, path: Path, split: str | None, default: str | None) -> Any:
    import datasets

    if not isinstance(data, datasets.DatasetDict | datasets.IterableDatasetDict):
        return data
    if split is None and len(data) == 1:
        return next(iter(data.values()))
    wanted = split or default
    if wanted not in data:
        asked = f"no split '{wanted}'" if wanted else "several splits"
        raise BadDataError(f"data set {path} has {asked}: give one of {', '.join(data)} with `split`")
    return data[wanted]


def _with_raw_images(data: Any) -> Any:
    from datasets import Image, List

    for column, feature in (data.features or {}).items():
        if isinstance(feature, Image):
            data = data.cast_column(column, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            data = data.cast_column(column, List(Image(decode=False)))
    return data
