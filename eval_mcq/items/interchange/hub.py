"""Data sets of the library ``datasets``: a hub id, a folder, or Parquet files, row by row."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eval_mcq.items.interchange.columns import ColumnMap
from eval_mcq.items.interchange.rows import READERS, Row, read_rows
from mgll_encoder.common.errors import UserError

COLUMNS = ColumnMap(
    {
        "id": ("id", "question_id", "index", "idx"), "image": ("image", "images", "decoded_image"),
        "question": ("question",), "hint": (), "options": ("options", "choices", "{}", "option_{}"),
        "answer": ("answer", "label"), "category": ("category", "disease", "subject"),
        "source": ("source", "dataset"), "patient": ("patient", "patient_id"), "tags": ("tags",),
    }
)  # fmt: skip


def read_dataset(name: str, split: str | None) -> Iterator[Row]:
    """Rows of a data set, images as bytes and not decoded.

    Args:
        name: A folder that ``save_to_disk`` wrote, a folder of Parquet or image files, a .parquet, .json,
            .jsonl, .csv or .tsv file, or the id of a data set on the hub.
        split: Which split to read; may be left out where there is only one.

    Raises:
        UserError: no such data set or split.
    """
    path = Path(name)
    if path.suffix.lower() in READERS and path.is_file():
        yield from read_rows(path)
        return
    data = _with_raw_images(_load(path, split))
    for number, cells in enumerate(data, start=1):
        yield Row(f"{name} row {number}", cells)


def _load(path: Path, split: str | None) -> Any:
    import datasets

    try:
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            data: Any = datasets.load_from_disk(str(path))
        elif path.suffix == ".parquet":
            if not path.is_file():
                raise UserError(f"data set {path} does not exist: check the path")
            data = datasets.load_dataset(
                "parquet", data_files=str(path), streaming=True, trust_remote_code=False
            )
        else:
            data = datasets.load_dataset(str(path), streaming=True, trust_remote_code=False)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        message = str(error).partition("\n")[0]
        raise UserError(
            f"data set {path} cannot be read: {message} (expected a folder, a .parquet file, or an id on the hub)"
        ) from None
    if not isinstance(data, datasets.DatasetDict | datasets.IterableDatasetDict):
        return data
    if split is None and len(data) == 1:
        return next(iter(data.values()))
    if split not in data:
        asked = f"no split '{split}'" if split else "several splits"
        raise UserError(f"data set {path} has {asked}: give one of {', '.join(data)} with --split")
    return data[split]


def _with_raw_images(data: Any) -> Any:
    from datasets import Image, List

    for column, feature in (data.features or {}).items():
        if isinstance(feature, Image):
            data = data.cast_column(column, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            data = data.cast_column(column, List(Image(decode=False)))
    return data
